"""`Machine`: a pushdown automaton over bytes, made deterministic as it is walked.

What may follow is a set of stacks; a stack is a list of nodes still to be matched, and a node is a set of bytes, a sequence, a
choice, a repetition with bounds, or one that is expanded when it is first needed. A set of stacks whose tops are sets of bytes is a
state, known by a number: 0 has no stack (nothing may follow), and each has a row of 256 next states, filled when first asked for.
Recursion (a schema that refers to itself) is a stack that grows, counters are repetitions that shrink, so neither is unrolled.
"""
# Shapes: N states, C different sets of bytes of a state

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anabranch.errors import InputError

__all__ = ["DEAD", "Machine"]

DEAD = 0
_EMPTY = 0  # the stack with nothing left: the text may end here
_MOST_STACKS = 20_000  # of one state; more is a grammar that is too ambiguous to walk


@dataclass(frozen=True, slots=True)
class _Bytes:
    set: int  # bit b: byte b


@dataclass(frozen=True, slots=True)
class _Sequence:
    parts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Choice:
    options: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Repeat:
    part: int
    least: int
    most: int | None


@dataclass(frozen=True, slots=True)
class _Lazy:
    key: Hashable


@dataclass(frozen=True, slots=True)
class _Regular:
    state: int  # that its text has come to


_Node = _Bytes | _Sequence | _Choice | _Repeat | _Lazy | _Regular


class Machine:
    """Nodes, stacks and states of one grammar. Nodes, stacks and states are integers; equal ones are the same."""

    def __init__(self) -> None:
        self._nodes: list[_Node] = []
        self._node_of: dict[_Node, int] = {}
        self.nothing = self._node(_Choice(()))  # what no text matches; whatever needs it is it too
        self._expand: dict[Hashable, Callable[[], int]] = {}
        self._expanded: dict[Hashable, int] = {}
        self._stacks: list[tuple[int, int]] = [(-1, -1)]  # (top node, the stack below); _EMPTY first
        self._stack_of: dict[tuple[int, int], int] = {}
        self._items: list[tuple[tuple[int, int], ...]] = [()]  # of each state: (set of bytes, stack after it)
        self._final: list[bool] = [False]
        self._state_of: dict[tuple[frozenset[tuple[int, int]], bool], int] = {(frozenset(), False): DEAD}
        self._arcs_of: dict[int, list[tuple[int, int]]] = {}
        self._near_of: dict[int, int] = {}
        self._stepped: dict[tuple[int, int], int] = {}
        self.next_N256: NDArray[np.int32] = np.zeros((64, 256), dtype=np.int32)
        self.filled_N: NDArray[np.bool_] = np.zeros(64, dtype=np.bool_)
        self.filled_N[DEAD] = True

    # -- nodes

    def one_of(self, values: Iterable[int]) -> int:
        """One byte out of ``values``."""
        members = set(values)
        return self._node(_Bytes(sum(1 << value for value in members))) if members else self.nothing

    def literal(self, text: bytes) -> int:
        """Exactly ``text``."""
        return self.sequence(*(self.one_of([value]) for value in text))

    def sequence(self, *parts: int) -> int:
        """All ``parts``, one after the other; the empty text without parts."""
        if self.nothing in parts:
            return self.nothing
        return parts[0] if len(parts) == 1 else self._node(_Sequence(parts))

    def choice(self, *options: int) -> int:
        """One of ``options``; without options a text that cannot be."""
        some = tuple(dict.fromkeys(option for option in options if option != self.nothing))
        return some[0] if len(some) == 1 else self._node(_Choice(some))

    def optional(self, part: int) -> int:
        """``part`` or nothing."""
        return self.choice(self.sequence(), part)

    def repeat(self, part: int, least: int = 0, most: int | None = None) -> int:
        """``part`` from ``least`` to ``most`` times; None for no end."""
        if part == self.nothing:
            return self.nothing if least else self.sequence()
        return self._node(_Repeat(part, least, most))

    def lazy(self, key: Hashable, expand: Callable[[], int]) -> int:
        """The node that ``expand`` gives, asked for once, when it is first needed; the same ``key`` is the same node."""
        if key not in self._expanded:
            self._expand.setdefault(key, expand)
        return self._node(_Lazy(key))

    def regular(self, node: int) -> int:
        """``node``, made deterministic once rather than on every stack it is the top of; for small ones without recursion."""
        return node if node == self.nothing else self._node(_Regular(self.start(node)))

    def _node(self, node: _Node) -> int:
        number = self._node_of.setdefault(node, len(self._nodes))
        if number == len(self._nodes):
            self._nodes.append(node)
        return number

    # -- states

    def start(self, node: int) -> int:
        """The state before a text that matches ``node``. Raises InputError for a node that leads back to itself without a byte."""
        return self._close([self._push(node, _EMPTY)])

    def is_final(self, state: int) -> bool:
        """Whether the text may end here."""
        return self._final[state]

    @property
    def num_states(self) -> int:
        """States seen so far."""
        return len(self._final)

    def step(self, state: int, byte: int) -> int:
        """The state after ``byte``; `DEAD` if it may not follow."""
        if self.filled_N[state]:
            return int(self.next_N256[state, byte])
        # Whole rows are for masks; a text that is followed needs one byte of each.
        if (state, byte) not in self._stepped:
            self._stepped[state, byte] = self._close(
                [stack for bytes_set, stack in self._items[state] if bytes_set >> byte & 1]
            )
        return self._stepped[state, byte]

    def accepts(self, node: int, text: bytes) -> bool:
        """Whether the whole of ``text`` matches ``node``."""
        state = self.start(node)
        for byte in text:
            state = self.step(state, byte)
        return self.is_final(state)

    def fill(self, state: int) -> None:
        """Work out the row of ``state``."""
        after: dict[int, list[int]] = {}
        for bytes_set, stack in self._items[state]:
            after.setdefault(bytes_set, []).append(stack)
        has_C256 = np.array([_members(bytes_set) for bytes_set in after])
        # Bytes that are in the same sets lead to the same state.
        _, first, group_256 = np.unique(np.packbits(has_C256, axis=0), axis=1, return_index=True, return_inverse=True)
        stacks = list(after.values())
        target = np.array(
            [
                self._close([stack for at in np.flatnonzero(has_C256[:, byte]) for stack in stacks[at]])
                for byte in first.tolist()
            ],
            dtype=np.int32,
        )
        self.next_N256[state] = target[group_256.reshape(-1)]
        self.filled_N[state] = True

    def _push(self, node: int, below: int) -> int:
        stack = self._stack_of.setdefault((node, below), len(self._stacks))
        if stack == len(self._stacks):
            self._stacks.append((node, below))
        return stack

    def _close(self, stacks: list[int]) -> int:
        """The state of ``stacks``, whose tops are expanded until they are sets of bytes."""
        items: set[tuple[int, int]] = set()
        seen, todo, final = set(stacks), list(stacks), False
        while todo:
            stack = todo.pop()
            if stack == _EMPTY:
                final = True
                continue
            top, below = self._stacks[stack]
            node = self._nodes[top]
            if isinstance(node, _Bytes):
                items.add((node.set, below))
                continue
            if isinstance(node, _Regular):
                items.update((bytes_set, self._behind(target, below)) for bytes_set, target in self._arcs(node.state))
                if not self._final[node.state]:
                    continue
            for new in self._unfold(node, below):
                if new not in seen:
                    seen.add(new)
                    todo.append(new)
            if len(seen) > _MOST_STACKS:
                raise InputError(f"the grammar is too ambiguous: more than {_MOST_STACKS} ways to go on at one place")
        return self._state(frozenset(items), final)

    def _unfold(self, node: _Node, below: int) -> list[int]:
        """The stacks that ``node`` on top of ``below`` stands for."""
        if isinstance(node, _Regular):
            return [below]  # it may end here
        if isinstance(node, _Sequence):
            for part in reversed(node.parts):
                below = self._push(part, below)
            return [below]
        if isinstance(node, _Choice):
            return [self._push(option, below) for option in node.options]
        if isinstance(node, _Repeat):
            if node.most == 0:
                return [below]
            rest = self.repeat(node.part, max(node.least - 1, 0), None if node.most is None else node.most - 1)
            once = self._push(node.part, self._push(rest, below))
            return [once] if node.least else [once, below]
        assert isinstance(node, _Lazy)
        if node.key not in self._expanded:
            self._expanded[node.key] = self._expand.pop(node.key)()
        return [self._push(self._expanded[node.key], below)]

    def _behind(self, state: int, below: int) -> int:
        """The stack of a regular text that has come to ``state``."""
        is_whole = self._final[state] and not self._items[state]
        return below if is_whole else self._push(self._node(_Regular(state)), below)

    def _arcs(self, state: int) -> list[tuple[int, int]]:
        """(set of bytes, next state) of each next state."""
        if state not in self._arcs_of:
            if not self.filled_N[state]:
                self.fill(state)
            sets: dict[int, int] = {}
            for byte, target in enumerate(self.next_N256[state].tolist()):
                if target != DEAD:
                    sets[target] = sets.get(target, 0) | 1 << byte
            self._arcs_of[state] = [(bytes_set, target) for target, bytes_set in sets.items()]
        return self._arcs_of[state]

    def near(self, state: int, horizon: int) -> int:
        """A state that lets the same texts of up to ``horizon`` bytes through, and is the same for all whose counters are further."""
        if state not in self._near_of:
            items = frozenset((bytes_set, self._near_stack(stack, horizon)) for bytes_set, stack in self._items[state])
            self._near_of[state] = (
                state if items == frozenset(self._items[state]) else self._state(items, self._final[state])
            )
        return self._near_of[state]

    def _near_stack(self, stack: int, horizon: int) -> int:
        path = []
        while stack != _EMPTY:
            top, stack = self._stacks[stack]
            path.append(top)
        for top in reversed(path):
            node = self._nodes[top]
            if isinstance(node, _Repeat):
                most = None if node.most is None or node.most > horizon else node.most
                top = self.repeat(node.part, min(node.least, horizon), most)
            stack = self._push(top, stack)
        return stack

    def _state(self, items: frozenset[tuple[int, int]], final: bool) -> int:
        state = self._state_of.setdefault((items, final), len(self._final))
        if state == len(self._final):
            self._items.append(tuple(items))
            self._final.append(final)
            if state == len(self.next_N256):
                self.next_N256 = np.concatenate([self.next_N256, np.zeros_like(self.next_N256)])
                self.filled_N = np.concatenate([self.filled_N, np.zeros_like(self.filled_N)])
            self.filled_N[state] = not items  # nothing follows: the row of zeros is right
        return state


def _members(bytes_set: int) -> NDArray[np.bool_]:
    """[256] of a set of bytes."""
    packed = np.frombuffer(bytes_set.to_bytes(32, "little"), dtype=np.uint8)
    return np.unpackbits(packed, bitorder="little").astype(np.bool_)
