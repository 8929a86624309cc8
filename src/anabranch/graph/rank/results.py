"""What a peer answers: ranked items, the results of a query, and what became of a message."""

from dataclasses import dataclass, field
from typing import NamedTuple

from anabranch.graph.rank.items import Id


class Ranked(NamedTuple):
    """An item with its score."""

    item: Id
    score: float


@dataclass(frozen=True)
class Results:
    """What a query shows.

    Attributes:
        qid: number of the query, for `Peer.click`.
        term: normalised.
        items: ids, best first.
        scores: of the items, as ranked (an exploring swap moves an item with its score).
    """

    qid: int
    term: str
    items: tuple[Id, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Merged:
    """What became of the rows of a message.

    Attributes:
        added: new rows.
        known: those that were there, or are too old to be kept.
        refused: how many, by reason ("malformed", "signature", "forged", "conflict", "future", "full", "quota", "unsolicited").
    """

    added: int = 0
    known: int = 0
    refused: dict[str, int] = field(default_factory=dict)
