"""`CharacterAutomaton`: a deterministic automaton over characters, of which every state leads to an end."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from anabranch.errors import InputError
from anabranch.serving.grammar.machine import Machine
from anabranch.serving.grammar.pattern import Alternatives, Characters, Concatenation, Expression, Repetition
from anabranch.serving.grammar.text import ALL, Ranges, complement, normal

__all__ = ["CharacterAutomaton", "anything_but", "of_expression"]

_MOST_STATES = 2000
_MOST_WORK = 5_000_000  # states times lengths


@dataclass(frozen=True)
class CharacterAutomaton:
    """States by number, 0 first.

    Attributes:
        arcs: of each state, {next state: characters that lead there}.
        final: whether a text may end in each.
    """

    arcs: tuple[dict[int, Ranges], ...]
    final: tuple[bool, ...]

    def lengths(self, most: int) -> list[int]:
        """Of each state the lengths of the texts that end well from there, up to ``most``, as the bits of a number."""
        keep = (1 << most + 1) - 1
        reach = [int(final) for final in self.final]
        for _ in range(most):
            longer = [
                bits | keep & (_any(reach[after] for after in arcs) << 1)
                for bits, arcs in zip(reach, self.arcs, strict=True)
            ]
            if longer == reach:
                break
            reach = longer
        return reach

    def node(
        self,
        machine: Machine,
        character: Callable[[Machine, Ranges], int],
        *,
        least: int = 0,
        most: int | None = None,
    ) -> int:
        """The texts it takes, of ``least`` to ``most`` characters, each written as ``character`` does.

        No state of the machine is a dead end. Raises InputError if there is no such text.
        """
        bound = len(self.arcs)
        if bound * (least + bound) > _MOST_WORK and (least or most is not None):
            raise InputError(f"a pattern of {bound} states with lengths of {least:,} and more is not supported")
        reach = self.lengths(least + bound) if least or most is not None else []
        written = {ranges: character(machine, ranges) for arcs in self.arcs for ranges in arcs.values()}

        def allowed(state: int, length: int) -> bool:
            """Whether a text can end from here with the length it must have."""
            if not reach:
                return True
            low = max(least - length, 0)
            bits = reach[state] >> low
            # A longer text than needed loses one of its loops, which are no longer than the number of states.
            room = bound if most is None else min(most - length - low, bound)
            return bits & ((1 << room + 1) - 1) != 0

        def expand(state: int, length: int) -> int:
            options = [machine.sequence()] if self.final[state] and length >= least else []
            after = length + 1 if most is not None else min(length + 1, least)
            if most is None or length < most:
                options += [
                    machine.sequence(written[ranges], at(target, after))
                    for target, ranges in self.arcs[state].items()
                    if allowed(target, after)
                ]
            return machine.choice(*options)

        def at(state: int, length: int) -> int:
            return machine.lazy((self, character, least, most, state, length), lambda: expand(state, length))

        if not (self.arcs[0] or self.final[0]) or not allowed(0, 0):
            return machine.nothing
        return at(0, 0)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def _any(bits: Iterable[int]) -> int:
    result = 0
    for value in bits:
        result |= value
    return result


def anything_but(texts: Iterable[str]) -> CharacterAutomaton:
    """Every text except ``texts``."""
    prefixes = sorted({text[:size] for text in texts for size in range(len(text) + 1)} | {""})
    place = {prefix: at for at, prefix in enumerate(prefixes)}
    other = len(prefixes)
    arcs: list[dict[int, Ranges]] = []
    whole = set(texts)
    for prefix in prefixes:
        children = {
            place[longer]: normal([(ord(longer[-1]), ord(longer[-1]))])
            for longer in prefixes
            if longer[:-1] == prefix and longer
        }
        rest = complement(normal([pair for ranges in children.values() for pair in ranges]))
        arcs.append({**children, other: rest})
    arcs.append({other: ALL})
    return CharacterAutomaton(tuple(arcs), (*(prefix not in whole for prefix in prefixes), True))


@lru_cache(maxsize=64)
def of_expression(expression: Expression) -> CharacterAutomaton:
    """The automaton of a regular expression. Raises InputError if it needs too many states."""
    nfa = _Nfa()
    start, end = nfa.add(expression)
    numbers: dict[frozenset[int], int] = {}
    arcs: list[dict[int, Ranges]] = []
    todo = [nfa.close({start})]
    numbers[todo[0]] = 0
    while todo:
        here: dict[int, list[tuple[int, int]]] = {}
        for low, high, after in _split_ranges(nfa, todo.pop(0)):
            closed = nfa.close(after)
            if closed not in numbers:
                numbers[closed] = len(numbers)
                todo.append(closed)
            here.setdefault(numbers[closed], []).append((low, high))
        arcs.append({target: normal(ranges) for target, ranges in here.items()})
        if len(numbers) > _MOST_STATES:
            raise InputError(f"the pattern needs an automaton of more than {_MOST_STATES} states; make it simpler")
    return _trim(arcs, [end in states for states in numbers])


class _Nfa:
    """Thompson's construction: states with arcs that take a character or nothing."""

    def __init__(self) -> None:
        self.free: list[list[int]] = []
        self.taking: list[list[tuple[Ranges, int]]] = []

    def state(self) -> int:
        if len(self.free) > 2 * _MOST_STATES:
            raise InputError("the pattern is too long, or repeats too often")
        self.free.append([])
        self.taking.append([])
        return len(self.free) - 1

    def add(self, expression: Expression) -> tuple[int, int]:
        """The first and last state of ``expression``."""
        start = end = self.state()
        if isinstance(expression, Characters):
            end = self.state()
            self.taking[start].append((expression.ranges, end))
        elif isinstance(expression, Concatenation):
            for part in expression.parts:
                end = self._append(end, part)
        elif isinstance(expression, Alternatives):
            end = self.state()
            for option in expression.options:
                self.free[self._append(start, option)].append(end)
        elif isinstance(expression, Repetition):
            end = self._repeat(start, expression)
        return start, end

    def _append(self, at: int, part: Expression) -> int:
        first, last = self.add(part)
        self.free[at].append(first)
        return last

    def _repeat(self, at: int, repetition: Repetition) -> int:
        for _ in range(repetition.least):
            at = self._append(at, repetition.part)
        end = self.state()
        if repetition.most is None:
            loop = self.state()
            self.free[at].append(loop)
            self.free[self._append(loop, repetition.part)].append(loop)
            self.free[loop].append(end)
            return end
        for _ in range(repetition.most - repetition.least):
            self.free[at].append(end)
            at = self._append(at, repetition.part)
        self.free[at].append(end)
        return end

    def close(self, states: Iterable[int]) -> frozenset[int]:
        """``states`` and what they lead to without a character."""
        found, todo = set(states), list(states)
        while todo:
            new = [state for state in self.free[todo.pop()] if state not in found]
            found.update(new)
            todo += new
        return frozenset(found)


def _split_ranges(nfa: _Nfa, states: frozenset[int]) -> list[tuple[int, int, frozenset[int]]]:
    """Ranges of characters that do not overlap, each with the states it leads to."""
    edges: dict[int, list[tuple[int, bool]]] = {}
    for state in states:
        for ranges, after in nfa.taking[state]:
            for low, high in ranges:
                edges.setdefault(low, []).append((after, True))
                edges.setdefault(high + 1, []).append((after, False))
    counts: dict[int, int] = {}
    result = []
    points = sorted(edges)
    for here, following in pairwise(points):
        for after, begins in edges[here]:
            counts[after] = counts.get(after, 0) + (1 if begins else -1)
        active = frozenset(after for after, count in counts.items() if count)
        if active:
            result.append((here, following - 1, active))
    return result


def _trim(arcs: list[dict[int, Ranges]], final: list[bool]) -> CharacterAutomaton:
    """Without states from which no text ends; the first stays."""
    live = {state for state, ends in enumerate(final) if ends}
    while True:
        more = {state for state, leads in enumerate(arcs) if state not in live and live & leads.keys()}
        if not more:
            break
        live |= more
    number = {state: at for at, state in enumerate(sorted(live | {0}))}
    kept = [{number[after]: ranges for after, ranges in arcs[state].items() if after in live} for state in number]
    return CharacterAutomaton(tuple(kept), tuple(final[state] for state in number))
