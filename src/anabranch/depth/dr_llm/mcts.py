"""Monte Carlo tree search over anything that has states, moves and a reward: selection by an upper confidence bound that minds a cost.

    UCB(child) = Q / v + c sqrt(ln V / v) - lambda cost(child)

Q is the sum of the rewards below the child, v how often it was come by, V how often its parent was. A child that nobody came by is
infinite. The cost counts in selection alone, not in the reward (Dr.LLM, arXiv 2510.12773, where it is the length of a path).
"""

import math
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from anabranch.errors import ConfigError

__all__ = ["Node", "TreeSearch"]

S = TypeVar("S", bound=Hashable)


@dataclass(eq=False)
class Node(Generic[S]):
    """A state in the tree.

    Attributes:
        state: what it stands for.
        parent: None for the root.
        children: those that were made, in order.
        untried: states that a move leads to and that are no children yet; None before anybody asked.
        visits: v.
        total: Q.
    """

    state: S
    parent: "Node[S] | None" = None
    children: list["Node[S]"] = field(default_factory=list)
    untried: list[S] | None = None
    visits: int = 0
    total: float = 0.0


class TreeSearch(Generic[S]):
    """A tree that grows by one state a simulation, each state once: what was reached by other moves before is not tried again.

    Args:
        root: where it begins.
        moves: the states that a state leads to; asked once for each node.
        cost: of a state, for the penalty.
        draw: orders moves and picks random children.
        exploration: c.
        penalty: lambda.
        random_share: how often a random child is gone into instead of the best.
        widening: a node that was come by v times has at most ``ceil(widening * sqrt(v))`` children, so that a tree of few simulations
            goes deep where moves are many; None tries every move of a node before any child is gone into.
        weight: of a state and one that a move leads to: moves are tried in a random order, heavy ones earlier. Alike by default.

    Raises ConfigError for a number that cannot be.
    """

    def __init__(
        self,
        root: S,
        *,
        moves: Callable[[S], Sequence[S]],
        cost: Callable[[S], float],
        draw: random.Random,
        exploration: float = 1.8,
        penalty: float = 3.0,
        random_share: float = 0.1,
        widening: float | None = 1.0,
        weight: Callable[[S, S], float] = lambda state, move: 1.0,
    ) -> None:
        if not 0 <= random_share <= 1:
            raise ConfigError(f"random_share is {random_share}; it must be from 0 to 1")
        if widening is not None and not widening > 0:
            raise ConfigError(f"widening is {widening}; it must be above 0, or None")
        self.root: Node[S] = Node(root)
        self._seen = {root}
        self._moves, self._cost, self._draw, self._weight = moves, cost, draw, weight
        self.exploration, self.penalty, self.random_share, self.widening = (
            exploration,
            penalty,
            random_share,
            widening,
        )

    def ucb(self, node: Node[S]) -> float:
        """The bound by which ``node``, which is not the root, is compared with its siblings."""
        if node.visits == 0:
            return math.inf
        assert node.parent is not None
        spread = math.sqrt(math.log(max(node.parent.visits, 1)) / node.visits)
        return node.total / node.visits + self.exploration * spread - self.penalty * self._cost(node.state)

    def next(self) -> Node[S]:
        """The node to evaluate: from the root down to one that nobody came by, or that may have one child more, which is made."""
        node = self.root
        while node.visits:
            untried = self._untried(node)
            if untried and len(node.children) < self._most_children(node):
                child = Node(untried.pop(), parent=node)
                self._seen.add(child.state)
                node.children.append(child)
                return child
            if not node.children:
                # No move leads on from here.
                return node
            node = self._pick(node.children)
        return node

    def back_up(self, node: Node[S], reward: float) -> None:
        """Count a visit of ``node`` and of all above it."""
        above: Node[S] | None = node
        while above is not None:
            above.visits += 1
            above.total += reward
            above = above.parent

    def run(
        self,
        reward: Callable[[S], float],
        simulations: int,
        *,
        stop: Callable[[S, float], bool] = lambda state, reward: False,
    ) -> int:
        """Do up to ``simulations``; returns how many were done.

        Args:
            reward: of a state. It may be asked of the same state again.
            simulations: the most.
            stop: is told each state and its reward; True ends the search.
        """
        for done in range(1, simulations + 1):
            node = self.next()
            value = reward(node.state)
            self.back_up(node, value)
            if stop(node.state, value):
                return done
        return simulations

    def nodes(self) -> list[Node[S]]:
        """All there are, the root first."""
        found = [self.root]
        for node in found:
            found += node.children
        return found

    def _untried(self, node: Node[S]) -> list[S]:
        if node.untried is None:
            # Drawn one after the other with these weights and without replacement; the last one is tried first.
            chance = {
                move: self._draw.random() ** (1 / self._weight(node.state, move)) for move in self._moves(node.state)
            }
            node.untried = sorted(chance, key=chance.__getitem__)
        # The end of the list is tried next.
        while node.untried and node.untried[-1] in self._seen:
            node.untried.pop()
        return node.untried

    def _most_children(self, node: Node[S]) -> float:
        return math.inf if self.widening is None else math.ceil(self.widening * math.sqrt(node.visits))

    def _pick(self, children: list[Node[S]]) -> Node[S]:
        if self._draw.random() < self.random_share:
            return self._draw.choice(children)
        return max(children, key=self.ucb)
