"""`Network`: a whole network of peers in one process, by the tick, with gossip, churn and attackers.

In a tick one node asks for a random term, clicks, and gossips once. All rows ever made stand in one table; what a node knows is a
row of bits over it, so that a message is a difference of bit rows, and counts, similarities and rankings are a few
`numpy.bincount`s over the distinct (origin, term, item) cells of the table. The same formulas as `Peer`'s; a test drives both with
the same rows.

What is simulated beside the paper: departures (``churn``), nodes that go on without a connection (`disconnect`), users with tastes
(``groups``), rows in the name of others (`Attack.forge`), and every field of `Defences` but byte and row limits.
"""
# Shapes: N nodes, T terms, I items, R rows, D distinct (origin, term, item), L most items of a term (padded)

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from anabranch.errors import InputError
from anabranch.graph.rank.attacks import Attack
from anabranch.graph.rank.defences import Defences
from anabranch.graph.rank.evaluation import evaluate
from anabranch.graph.rank.formula import check_parameters, raw_similarity, saturated, top_terms_mask
from anabranch.graph.rank.items import Item, library, matches
from anabranch.graph.rank.rows import Row

SHOWN = 10


class Network:
    """A simulated network.

    Args:
        items: what can be searched for; default a made-up library of the paper's shape (256 items, 39 tags). Terms are their tags.
        num_nodes: honest nodes.
        F: isolation constant of all.
        explore: as in `Peer`.
        top_terms: as in `Peer`.
        gossip: "pull": the acting node asks a known peer for rows; "push": it sends its rows to one, attackers to two.
        defences: of the honest nodes; default `Defences()`, with ``pull_only`` off for "push".
        attack: attackers, who join and act at their ticks.
        library_share: of the items that a node holds from the start.
        bootstrap_share: of a random earlier node's log that a joining node is handed.
        churn: probability per tick that an honest node leaves, for ``away`` ticks; it then neither searches nor gossips.
        away: see churn.
        answerer_learns: whether the answering peer learns the asker.
        groups: of users with different tastes. With more than 1 each term's items are dealt out to the groups, and a user clicks the best
            shown item of the own group.
        fidelity: with groups, the probability of doing so; else the top item is clicked.
        seed: of everything.

    Attributes:
        tick: ticks so far.
        history: what `evaluate` found, by tick.

    Raises InputError for bad arguments.
    """

    def __init__(
        self,
        items: Sequence[Item] | None = None,
        num_nodes: int = 100,
        F: float = 0.0,
        explore: float = 0.5,
        top_terms: int = 10,
        *,
        gossip: Literal["pull", "push"] = "pull",
        defences: Defences | None = None,
        attack: Attack | None = None,
        library_share: float = 0.1,
        bootstrap_share: float = 0.1,
        churn: float = 0.0,
        away: int = 500,
        answerer_learns: bool = True,
        groups: int = 1,
        fidelity: float = 0.9,
        seed: int = 0,
    ) -> None:
        check_parameters(F, explore, top_terms)
        _check_network(num_nodes, gossip, library_share, bootstrap_share, churn, away, groups, fidelity)
        self.defences = Defences(pull_only=gossip == "pull") if defences is None else defences
        if gossip == "push" and self.defences.pull_only:
            raise InputError(
                "gossip is 'push', and the defences take rows by pull only; pass Defences(pull_only=False)"
            )
        self.items = list(library(seed=seed) if items is None else items)
        self.F, self.explore, self.top_terms, self.gossip, self.attack = float(F), explore, top_terms, gossip, attack
        self.bootstrap_share, self.churn, self.away = bootstrap_share, churn, away
        self.answerer_learns, self.groups, self.fidelity = answerer_learns, groups, fidelity
        self.generator = np.random.default_rng(seed)
        self.num_honest = num_nodes
        self.num_nodes = num_nodes + (attack.attackers if attack else 0)
        self.tick = 0
        self._terms()
        self._nodes(library_share)
        self._table()
        self.history: list[dict[str, Any]] = []
        for node in range(num_nodes):
            self._join(node)
        first = self.draw(np.arange(1, num_nodes)) if num_nodes > 1 else None
        # Every other node was handed something.
        if first is not None:
            self._bootstrap(0, first)

    # Setting up

    def _terms(self) -> None:
        self.terms = sorted({tag for item in self.items for tag in item.tags})
        if not self.terms:
            raise InputError("no item has a tag, and tags are what is searched for")
        self.num_terms, self.num_items = len(self.terms), len(self.items)
        self.match_TI = np.array([[matches(term, item) for item in self.items] for term in self.terms])
        self.of_term = [np.flatnonzero(row) for row in self.match_TI]
        longest = max(map(len, self.of_term))
        self.item_TL = np.array([np.pad(of, (0, longest - len(of)), constant_values=-1) for of in self.of_term])
        self.real_TL = self.item_TL >= 0
        self.group_TI = np.zeros((self.num_terms, self.num_items), np.int64)
        for term, of in enumerate(self.of_term):
            self.group_TI[term, self.generator.permutation(of)] = np.arange(len(of)) % self.groups

    def _nodes(self, share: float) -> None:
        count, size = self.num_nodes, max(1, int(share * self.num_items))
        self.library_NI = np.zeros((count, self.num_items), bool)
        for node in range(count):
            self.library_NI[node, self.generator.choice(self.num_items, size, replace=False)] = True
        self.known_NN = np.zeros((count, count), bool)
        self.joined_N = np.zeros(count, bool)
        self.connected_N = np.ones(count, bool)
        # The tick from which a node is there.
        self.back_N = np.zeros(count, np.int64)
        self.group_N = np.arange(count) % self.groups
        self.clicks_N = np.zeros(count, np.int64)
        self.messages = self.rows_sent = self.bytes_sent = self.largest_bytes = self.failed = 0

    def _table(self) -> None:
        self.num_rows = self.num_cells = 0
        self.row_origin, self.row_number, self.row_cell, self.row_tick, self.row_bytes = (
            np.zeros(1024, np.int64) for _ in range(5)
        )
        self.row_forged = np.zeros(1024, bool)
        self.has_NR = np.zeros((self.num_nodes, 1024), bool)
        self._cells: dict[tuple[int, int], int] = {}
        self._bytes_of_pair: dict[int, int] = {}
        self.cell_origin, self.cell_pair = np.zeros(1024, np.int64), np.zeros(1024, np.int64)
        self._cells_of_term: list[list[int]] = [[] for _ in range(self.num_terms)]

    def _join(self, node: int) -> None:
        """A node comes with a click for each term, on a random item that has it, and is handed a part of the log of an earlier one."""
        earlier = np.flatnonzero(self.joined_N[: self.num_honest])
        self.joined_N[node] = True
        if node < self.num_honest:
            for term in range(self.num_terms):
                own = self.of_term[term][self.group_TI[term, self.of_term[term]] == self.group_N[node]]
                self.write(node, term, self.draw(own if self.groups > 1 and len(own) else self.of_term[term]))
        if len(earlier):
            self._bootstrap(node, self.draw(earlier))

    def _bootstrap(self, node: int, giver: int) -> None:
        rows = np.flatnonzero(self.has_NR[giver, : self.num_rows])
        if len(rows):
            chosen = self.generator.choice(rows, int(np.ceil(self.bootstrap_share * len(rows))), replace=False)
            self._receive(node, np.sort(chosen), giver)
        self._meet(node, giver)

    def draw(self, among: np.ndarray) -> int:
        """One of these, all alike."""
        return int(among[self.generator.integers(len(among))])

    def _meet(self, asker: int, answerer: int) -> None:
        if asker != answerer:
            self.known_NN[asker, answerer] = True
            self.known_NN[answerer, asker] |= self.answerer_learns

    # The table of rows

    def write(self, author: int, term: int, item: int, name: int | None = None) -> int:
        """A new row by ``author``, who has it; in the name of another node where ``name`` says so."""
        origin = author if name is None else name
        if self.num_rows == len(self.row_origin):
            self._grow()
        row, pair = self.num_rows, term * self.num_items + item
        self.num_rows += 1
        cell = self._cells.setdefault((origin, pair), self.num_cells)
        if cell == self.num_cells:
            self.num_cells += 1
            if cell == len(self.cell_origin):
                self.cell_origin, self.cell_pair = (
                    np.append(a, np.zeros_like(a)) for a in (self.cell_origin, self.cell_pair)
                )
            self.cell_origin[cell], self.cell_pair[cell] = origin, pair
            self._cells_of_term[term].append(cell)
        self.row_origin[row], self.row_number[row], self.row_cell[row] = origin, self.clicks_N[origin], cell
        self.row_tick[row] = self.tick
        self.row_forged[row], self.row_bytes[row] = name is not None, self._row_bytes(pair)
        self.clicks_N[origin] += 1
        self.has_NR[author, row] = True
        return row

    def _grow(self) -> None:
        for name in ("row_origin", "row_number", "row_cell", "row_tick", "row_bytes", "row_forged"):
            array = getattr(self, name)
            setattr(self, name, np.append(array, np.zeros_like(array)))
        self.has_NR = np.concatenate([self.has_NR, np.zeros_like(self.has_NR)], axis=1)

    def _row_bytes(self, pair: int) -> int:
        """Bytes of such a row on the wire, ten results shown."""
        found = self._bytes_of_pair.get(pair)
        if found is None:
            item = self.items[pair % self.num_items]
            shown = tuple(self.items[place].id for place in self.of_term[pair // self.num_items][:SHOWN])
            row = Row(
                "node-123",
                1234,
                self.terms[pair // self.num_items],
                item.id,
                item.title,
                item.artist,
                item.tags,
                shown,
                12345.0,
            )
            found = self._bytes_of_pair[pair] = row.size() + (128 + 64 if self.defences.signed else 0)
        return found

    def rows_of(self, node: int) -> np.ndarray:
        """Places in the table of the rows that a node has and that count: within ``rows_per_origin`` and ``ttl``."""
        rows = np.flatnonzero(self.has_NR[node, : self.num_rows])
        window, ttl = self.defences.rows_per_origin, self.defences.ttl
        if window is not None and self.clicks_N.max() > window:
            newest_N = np.full(self.num_nodes, -1)
            np.maximum.at(newest_N, self.row_origin[rows], self.row_number[rows])
            rows = rows[self.row_number[rows] > newest_N[self.row_origin[rows]] - window]
        return rows if ttl is None else rows[self.row_tick[rows] >= self.tick - ttl]

    def counts(self, node: int) -> np.ndarray:
        """n[Q][item][origin] as the node has it: clicks by cell, int64 ``[D]``."""
        return np.bincount(self.row_cell[self.rows_of(node)], minlength=self.num_cells)

    # What a node computes

    def similarity(self, node: int, count_D: np.ndarray | None = None) -> np.ndarray:
        """S of all nodes as ``node`` has it, float64 ``[N]``: 0 to 1, 1 of itself."""
        count_D = self.counts(node) if count_D is None else count_D
        held = np.flatnonzero(count_D)
        origin, pair = self.cell_origin[held], self.cell_pair[held]
        term, item = np.divmod(pair, self.num_items)
        shape = self.num_nodes, self.num_terms
        count_NT = np.bincount(origin * self.num_terms + term, count_D[held], minlength=shape[0] * shape[1]).reshape(
            shape
        )
        top_NT = top_terms_mask(count_NT, self.top_terms)
        own = np.zeros(self.num_terms * self.num_items, bool)
        own[pair[origin == node]] = True
        common_N = np.bincount(origin[own[pair]], minlength=self.num_nodes)
        clicked_NI = np.zeros((self.num_nodes, self.num_items), bool)
        clicked_NI[origin, item] = True
        union_N = (clicked_NI | clicked_NI[node]).sum(1)
        raw_N = raw_similarity((top_NT & top_NT[node]).sum(1), common_N, union_N, self.defences.min_common)
        raw_N[node] = 0.0
        largest = raw_N.max()
        found_N = raw_N / largest if largest > 0 else raw_N
        found_N[node] = 1.0
        return found_N

    def scores(self, node: int) -> tuple[np.ndarray, np.ndarray]:
        """R of every term and item as ``node`` has it, and plain clicks; float64 ``[T, I]`` both."""
        count_D = self.counts(node)
        weight_N = self.similarity(node, count_D) + self.F
        return self._sum(saturated(count_D, self.defences) * weight_N[self.cell_origin[: self.num_cells]]), self._sum(
            count_D
        )

    def _sum(self, value_D: np.ndarray) -> np.ndarray:
        size = self.num_terms * self.num_items
        summed = np.bincount(self.cell_pair[: self.num_cells], value_D, minlength=size)
        return summed.reshape(self.num_terms, self.num_items)

    def global_clicks(self) -> np.ndarray:
        """Clicks of all honest nodes, float64 ``[T, I]``: what local rankings are compared with."""
        rows = np.arange(self.num_rows)
        rows = rows[(self.row_origin[rows] < self.num_honest) & ~self.row_forged[rows]]
        return self._sum(np.bincount(self.row_cell[rows], minlength=self.num_cells))

    def own_clicks(self, node: int) -> np.ndarray:
        """The node's own clicks, float64 ``[T, I]``."""
        rows = np.flatnonzero((self.row_origin[: self.num_rows] == node) & ~self.row_forged[: self.num_rows])
        return self._sum(np.bincount(self.row_cell[rows], minlength=self.num_cells))

    def rank(self, node: int, term: int) -> np.ndarray:
        """Places of the items that ``node`` shows for a term, best first, before exploration."""
        count_D = self.counts(node)
        cells = np.array(self._cells_of_term[term], np.int64)
        cells = cells[count_D[cells] > 0]
        local_I = self.library_NI[node] & self.match_TI[term]
        if not len(cells):
            return self._rank_unseen(node, term, local_I)
        weight_N = self.similarity(node, count_D) + self.F
        item, origin = self.cell_pair[cells] - term * self.num_items, self.cell_origin[cells]
        score_I = np.bincount(
            item, saturated(count_D[cells], self.defences) * weight_N[origin], minlength=self.num_items
        )
        shown_I = local_I.copy()
        shown_I[item] = True
        found = np.flatnonzero(shown_I)
        return found[np.lexsort((found, -score_I[found], ~self.match_TI[term, found]))]

    def _rank_unseen(self, node: int, term: int, local_I: np.ndarray) -> np.ndarray:
        clicks_I = np.bincount(
            self.cell_pair[: self.num_cells] % self.num_items, self.counts(node), minlength=self.num_items
        )
        heard_I = (clicks_I > 0) & self.match_TI[term] & ~local_I
        if not (local_I | heard_I).any():
            heard_I = clicks_I > 0
        found = np.flatnonzero(local_I | heard_I)
        return found[np.lexsort((found, -clicks_I[found], ~local_I[found]))]

    # Running

    def run(self, ticks: int, evaluate_every: int = 100) -> list[dict[str, Any]]:
        """Go on for so many ticks; evaluates at the start and every ``evaluate_every`` ticks. Returns `history`."""
        for _ in range(ticks):
            if self.tick == 0 and not self.history:
                self.evaluate()
            self.step()
            if self.tick % evaluate_every == 0:
                self.evaluate()
        return self.history

    def step(self) -> None:
        """One tick."""
        self.tick += 1
        if self.attack is not None and self.tick == self.attack.join_at:
            for node in range(self.num_honest, self.num_nodes):
                self._join(node)
        if self.churn and self.generator.random() < self.churn:
            there = np.flatnonzero(self.back_N[: self.num_honest] <= self.tick)
            if len(there) > 2:
                self.back_N[self.draw(there)] = self.tick + self.away
        attacking = self.attack is not None and self.tick > self.attack.attack_at
        last = self.num_nodes if attacking else self.num_honest
        actors = np.flatnonzero(self.joined_N[:last] & (self.back_N[:last] <= self.tick))
        node = self.draw(actors)
        self._search(node, int(self.generator.integers(self.num_terms)))
        self._gossip(node)
        if self.attack is not None and self.tick == self.attack.attack_at:
            for attacker in range(self.num_honest, self.num_nodes):
                self.attack.act(self, attacker)
                self._gossip(attacker)

    def _search(self, node: int, term: int) -> None:
        ranked = self.rank(node, term)
        if not len(ranked):
            return
        if len(ranked) > 1 and self.generator.random() < self.explore:
            swap = self.generator.choice(len(ranked), 2, replace=False)
            ranked[swap] = ranked[swap[::-1]]
        clicked = ranked[0]
        if self.groups > 1 and node < self.num_honest and self.generator.random() < self.fidelity:
            liked = ranked[self.match_TI[term, ranked] & (self.group_TI[term, ranked] == self.group_N[node])]
            clicked = liked[0] if len(liked) else clicked
        self.write(node, term, int(clicked))

    def _gossip(self, node: int) -> None:
        if not self.connected_N[node]:
            return
        known = np.flatnonzero(self.known_NN[node])
        if not len(known):
            return
        if self.gossip == "pull":
            self._exchange(node, self.draw(known), giver_first=False)
            return
        count = 1 if node < self.num_honest else 2
        for other in self.generator.choice(known, min(count, len(known)), replace=False):
            self._exchange(node, int(other), giver_first=True)

    def _exchange(self, node: int, other: int, *, giver_first: bool) -> None:
        """A message from ``other`` to ``node`` that asked, or the other way round with ``giver_first``."""
        if not self.connected_N[other] or self.back_N[other] > self.tick:
            self.failed += 1
            return
        giver, taker = (node, other) if giver_first else (other, node)
        rows = np.flatnonzero(self.has_NR[giver, : self.num_rows] & ~self.has_NR[taker, : self.num_rows])
        rows = self._within_quotas(rows)
        size = int(self.row_bytes[rows].sum())
        self.messages += 1
        self.rows_sent += len(rows)
        self.bytes_sent += size
        self.largest_bytes = max(self.largest_bytes, size)
        self._receive(taker, rows, giver)
        self._meet(node, other)

    def _within_quotas(self, rows: np.ndarray) -> np.ndarray:
        limit = self.defences.reply_rows_per_origin
        if len(rows) > limit:
            order = rows[np.argsort(self.row_origin[rows], kind="stable")]
            origin = self.row_origin[order]
            start = np.flatnonzero(np.append(True, origin[1:] != origin[:-1]))
            place = np.arange(len(order)) - np.repeat(start, np.diff(np.append(start, len(order))))
            rows = np.sort(order[place < limit])
        return rows[: self.defences.reply_rows]

    def _receive(self, node: int, rows: np.ndarray, giver: int) -> None:
        # Attackers do not mind.
        if self.defences.signed and node < self.num_honest:
            rows = rows[~self.row_forged[rows]]
        self.has_NR[node, rows] = True
        self.known_NN[node, self.row_origin[rows]] = True
        self.known_NN[node, giver] = True
        self.known_NN[node, node] = False

    def disconnect(self, nodes: Iterable[int]) -> None:
        """These nodes go on searching, and hear nothing any more."""
        self.connected_N[list(nodes)] = False

    def reconnect(self, nodes: Iterable[int]) -> None:
        """These nodes gossip again."""
        self.connected_N[list(nodes)] = True

    def evaluate(self, nodes: Sequence[int] | None = None, reference_TI: np.ndarray | None = None) -> dict[str, Any]:
        """What `anabranch.graph.rank.evaluation` finds now; noted in `history` if it is about all honest nodes (the default)."""
        found = evaluate(self, range(self.num_honest) if nodes is None else nodes, reference_TI)
        if nodes is None:
            self.history.append(found)
        return found


def _check_network(
    num_nodes: int, gossip: str, library: float, bootstrap: float, churn: float, away: int, groups: int, fidelity: float
) -> None:
    for name, value, least in (("num_nodes", num_nodes, 1), ("away", away, 1), ("groups", groups, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} is {value!r}; it is a whole number of at least {least}")
    shares = {"library_share": library, "bootstrap_share": bootstrap, "churn": churn, "fidelity": fidelity}
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise InputError(f"{name} is {share!r}; it is 0 to 1")
    if gossip not in ("pull", "push"):
        raise InputError(f"gossip is {gossip!r}; it is 'pull' or 'push'")
