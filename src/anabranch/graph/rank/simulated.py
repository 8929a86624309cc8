"""What attackers and measures read of a simulated network, which imports them and so is not imported there."""
# Shapes: N nodes, T terms, I items, L most items of a term (padded), R rows

from typing import Any, Protocol

import numpy as np


class Simulated(Protocol):
    """See `anabranch.graph.rank.network.Network`.

    Attributes:
        generator: of all that is drawn.
        num_honest, num_terms, num_rows, groups, tick: counts, and the time.
        of_term: places of each term's items.
        item_TL, real_TL: items of each term, and which of them are not padding.
        group_TI, group_N: groups of items and of nodes.
        library_NI, has_NR, row_bytes: what nodes hold, and the size of rows.
        messages, rows_sent, bytes_sent, largest_bytes: what was sent so far.
        attack: the `anabranch.graph.rank.attacks.Attack`, or None.
    """

    generator: np.random.Generator
    num_honest: int
    num_terms: int
    num_rows: int
    groups: int
    tick: int
    of_term: Any
    item_TL: np.ndarray
    real_TL: np.ndarray
    group_TI: np.ndarray
    group_N: np.ndarray
    library_NI: np.ndarray
    has_NR: np.ndarray
    row_bytes: np.ndarray
    messages: int
    rows_sent: int
    bytes_sent: int
    largest_bytes: int
    attack: Any

    def global_clicks(self) -> np.ndarray:
        """Clicks [T, I] of honest nodes."""

    def own_clicks(self, node: int) -> np.ndarray:
        """Clicks [T, I] of one node."""

    def scores(self, node: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores [T, I] as a node has them, and the clicks that it knows."""

    def rank(self, node: int, term: int) -> np.ndarray:
        """Items of a term as a node ranks them."""

    def draw(self, items: np.ndarray) -> int:
        """One of some items."""

    def write(self, node: int, term: int, item: int, name: int | None = None) -> Any:
        """A row of a click, perhaps in the name of another."""
