"""Outcomes that a score may still come for."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from anabranch.routers.contract.query import Outcome

REMEMBERED = 2_000

# Of the texts of these, all together.
HELD_CHARACTERS = 16 << 20


@dataclass(frozen=True, slots=True)
class Waited:
    """An outcome that was told to a strategy without a score.

    Attributes:
        strategy: that decided.
        key_id, team: of the request; empty if it had none.
        outcome: without the conversation and the answer.
        refused: ids of keys whose scores of it teach nothing.
        told: what the strategy was told of it: a score, a preference.
    """

    strategy: str
    key_id: str
    team: str
    outcome: Outcome
    refused: set[str] = field(default_factory=set)
    told: set[str] = field(default_factory=set)

    @property
    def characters(self) -> int:
        """Of its text."""
        return len(self.outcome.query.text)


class Waiting:
    """The last so many. When it is full, those go of whoever holds most: nobody's requests push out those of others.

    Args:
        most: outcomes.
        most_characters: of their texts.
    """

    def __init__(self, most: int = REMEMBERED, most_characters: int = HELD_CHARACTERS) -> None:
        self._most, self._most_characters = most, most_characters
        self._by_key: dict[str, OrderedDict[str, Waited]] = {}
        self._key: dict[str, str] = {}
        self._characters: dict[str, int] = {}
        self._all_characters = 0

    def __len__(self) -> int:
        return len(self._key)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._key

    def put(self, request_id: str, strategy: str, key_id: str, team: str, outcome: Outcome) -> None:
        """Remember an outcome, but for what was said and answered."""
        bare = replace(outcome, answer=None, query=replace(outcome.query, messages=(), headers={}))
        waited = Waited(strategy, key_id, team, bare)
        self._by_key.setdefault(key_id, OrderedDict())[request_id] = waited
        self._key[request_id] = key_id
        self._characters[key_id] = self._characters.get(key_id, 0) + waited.characters
        self._all_characters += waited.characters
        while len(self) > self._most or self._all_characters > self._most_characters:
            self.take(next(iter(self._by_key[self._fullest(key_id)])))

    def price(self, request_id: str, cost: float | None) -> None:
        """Note what one has cost; nothing if it is not there."""
        key_id = self._key.get(request_id)
        if key_id is not None:
            own = self._by_key[key_id]
            own[request_id] = replace(own[request_id], outcome=replace(own[request_id].outcome, cost=cost))

    def get(self, request_id: str) -> Waited | None:
        """One of them; None if it is not there."""
        key_id = self._key.get(request_id)
        return None if key_id is None else self._by_key[key_id][request_id]

    def take(self, request_id: str) -> Waited | None:
        """One of them, which then waits no more."""
        key_id = self._key.pop(request_id, None)
        if key_id is None:
            return None
        own = self._by_key[key_id]
        waited = own.pop(request_id)
        self._characters[key_id] -= waited.characters
        self._all_characters -= waited.characters
        if not own:
            del self._by_key[key_id], self._characters[key_id]
        return waited

    def forget(self, matches: Callable[[Waited], bool]) -> int:
        """Let go of what matches; how many there were."""
        gone = [id for own in self._by_key.values() for id, waited in own.items() if matches(waited)]
        for id in gone:
            self.take(id)
        return len(gone)

    def _fullest(self, newest: str) -> str:
        """The key that holds most. That of the newest one is seen without a look at all others, if it holds its part or more."""
        if self._part(newest) * len(self._by_key) >= 1:
            return newest
        return max(self._by_key, key=self._part)

    def _part(self, key_id: str) -> float:
        return max(len(self._by_key[key_id]) / self._most, self._characters[key_id] / self._most_characters)
