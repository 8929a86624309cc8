"""`Peer`: one node of G-Rank, with its library, its log, the peers it knows, and how it ranks.

R_i(Q)[k] = sum_j C_jk(Q) (S_i(j) + F)                 C: clicks by node j on item k for Q in the log of i, saturated by `Defences`
S_i(j)    = (kappa_t + kappa_m^2) / kappa_u, over the largest S_i of all known peers; S_i(i) = 1
"""

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np

from anabranch.bounds import is_whole, shown
from anabranch.errors import DataError, InputError
from anabranch.graph.rank import peer_file
from anabranch.graph.rank.defences import Defences
from anabranch.graph.rank.formula import check_parameters, raw_similarity, saturated, top_terms
from anabranch.graph.rank.items import Id, Item, by_id, matches, normalize, order_of
from anabranch.graph.rank.keys import SigningKey, is_signed
from anabranch.graph.rank.log import ClickLog, TermKey
from anabranch.graph.rank.results import Merged, Ranked, Results
from anabranch.graph.rank.rows import (
    END,
    SHOWN_LIMIT,
    START,
    Part,
    Row,
    Vector,
    check_vector,
    is_node,
    row_from_json,
)
from anabranch.graph.rank.store import RowStore

# Bytes of a message around its rows: names and addresses.
AROUND = 1 << 14

# Queries without a click that are remembered.
PENDING = 1_000
PEERS_LIMIT = 100_000
Match = Callable[[str, Item], bool]


class Peer:
    """A node.

    Args:
        items: its library.
        node_id: its name, 1 to 128 characters; with ``key`` the name is that of the key.
        F: the isolation constant, at least 0: the weight of nodes without overlap. With 0 they do not count.
        explore: probability that two random results of a query change places.
        top_terms: K, most searched terms that are compared.
        store: path of an SQLite file to which rows are written as they come, and from which they are read at the start.
        defences: see `Defences`.
        match: whether an item's metadata match a term, ``match(term, item)``; default: a tag, or words of title or artist.
        term_key: under which key clicks for a term are counted; default: the normalised term itself. Terms with one key are one term: map
            to the nearest of some anchors to rank for text, pictures or vectors. Keys must sort; it may raise InputError for a term it
            cannot place, whose rows are then refused.
        key: to sign rows with.
        clock: seconds, for `Defences.ttl`; without it rows have no time.
        seed: of exploration and of the random share handed to new nodes.

    Raises:
        InputError: a bad argument. DataError: a store that is damaged or another node's. BackendError: signatures without ``cryptography``.
    """

    def __init__(
        self,
        items: Iterable[Item] = (),
        node_id: str | None = None,
        F: float = 0.0,
        explore: float = 0.5,
        top_terms: int = 10,
        store: str | Path | None = None,
        *,
        defences: Defences | None = None,
        match: Match = matches,
        term_key: TermKey = normalize,
        key: SigningKey | None = None,
        clock: Callable[[], float] | None = None,
        seed: int = 0,
    ) -> None:
        check_parameters(F, explore, top_terms)
        defences = Defences() if defences is None else defences
        node_id = key.node_id if key is not None and node_id is None else node_id
        if not is_node(node_id):
            raise InputError(f"node_id is {node_id!r:.200}; a node's name is a text of 1 to 128 characters")
        if key is not None and node_id != key.node_id:
            raise InputError(f"node_id is {node_id!r}, but a node that signs is called as its key, {key.node_id!r}")
        if defences.signed and key is None:
            raise InputError("signed rows are asked for, and there is no key; pass key=SigningKey.generate()")
        if defences.ttl is not None and clock is None:
            raise InputError("ttl needs a clock; pass clock=time.time")
        self.library, self.node_id = by_id(items), str(node_id)
        self.F, self.explore, self.top_terms, self.defences = float(F), float(explore), int(top_terms), defences
        self.match, self.term_key, self._key, self._clock = match, term_key, key, clock
        self.log = ClickLog(self.node_id, defences, term_key, is_signed)
        self._generator = np.random.default_rng([seed, zlib.crc32(self.node_id.encode())])
        # In the order in which they were met.
        self._known: dict[str, None] = {}
        self._raw: dict[str, float] = {}
        self._stale: set[str] = set()
        # Most searched terms.
        self._top: dict[str, set[Any]] = {self.node_id: set()}
        self._own: tuple[set[Any], set[Any]] = set(), set()
        self._pending: dict[int, tuple[str, tuple[Id, ...]]] = {}
        self._next_query = 0
        self._matching: dict[str, list[Id]] = {}
        self._store = None if store is None else RowStore(store, self.node_id)
        # Rows that the store has still to take, and who told them: a full disk may have room later.
        self._unsaved: list[tuple[Row, str]] = []
        if self._store is not None:
            self._take(self._store.rows(), is_ours=True, stored=True)

    # Searching

    def query(self, term: str, k: int = 10) -> Results:
        """The best items for a term, at most ``k``, after the exploring swap.

        Raises InputError for a term that is no text or empty, or a ``k`` below 1.
        """
        _check_k(k)
        text = normalize(term)
        ranked = self.rank(text)
        if len(ranked) > 1 and self._generator.random() < self.explore:
            first, second = self._generator.choice(len(ranked), 2, replace=False)
            ranked[first], ranked[second] = ranked[second], ranked[first]
        shown = ranked[:k]
        qid, self._next_query = self._next_query, self._next_query + 1
        self._pending[qid] = text, tuple(item for item, _ in shown)
        if len(self._pending) > PENDING:
            del self._pending[next(iter(self._pending))]
        return Results(qid, text, self._pending[qid][1], tuple(score for _, score in shown))

    def rank(self, term: str, k: int | None = None) -> list[Ranked]:
        """The ranking without exploration; nothing is remembered. All items there are for ``k`` None. Raises as `query`."""
        _check_k(k)
        text = normalize(term)
        self._expire()
        clicked = self.log.count.get(self.term_key(text))
        found = self._rank_clicked(text, clicked) if clicked else self._rank_unseen(text)
        return found if k is None else found[:k]

    def _rank_clicked(self, text: str, clicked: Mapping[Id, Counter[str]]) -> list[Ranked]:
        weight = self._weights()
        score = {
            item: float(
                sum(saturated(count, self.defences) * weight.get(origin, 0.0) for origin, count in origins.items())
            )
            for item, origins in clicked.items()
        }
        matching = set(self._local_matches(text))
        score |= dict.fromkeys(matching - score.keys(), 0.0)
        first = matching | {item for item in clicked if item not in self.library and self.match(text, self.item(item))}
        order = sorted(score, key=lambda item: (item not in first, -score[item], order_of(item)))
        return [Ranked(item, score[item]) for item in order]

    def _rank_unseen(self, text: str) -> list[Ranked]:
        """Items of the library that match, then items of the log that do, each by clicks on them; if none, the log's most popular."""
        popularity = self.log.popularity
        local = self._local_matches(text)
        heard = [item for item in popularity if item not in self.library and self.match(text, self.item(item))]
        if not local and not heard:
            heard = list(popularity)
        ranked = [sorted(part, key=lambda item: (-popularity[item], order_of(item))) for part in (local, heard)]
        return [Ranked(item, 0.0) for part in ranked for item in part]

    def item(self, id: Id) -> Item:
        """An item's metadata, from the library or else as most origins of clicks on it describe it."""
        return self.library.get(id) or self.log.metadata(id)

    def _local_matches(self, text: str) -> list[Id]:
        found = self._matching.get(text)
        if found is None:
            if len(self._matching) >= 10_000:
                self._matching.clear()
            found = [id for id, item in self.library.items() if self.match(text, item)]
            self._matching[text] = found
        return found

    def click(self, qid: int, item: Id) -> Row:
        """Record that the user chose ``item`` among the results of query ``qid``; the new row of the log.

        Raises InputError for a query that is not open (each takes one click, and 1,000 are remembered) or an item it did not show.
        """
        if qid not in self._pending:
            raise InputError(
                f"query {qid!r} is not open: unknown, clicked before, or more than {PENDING:,} queries ago"
            )
        text, shown = self._pending[qid]
        if item not in shown:
            raise InputError(f"query {qid} did not show the item {item!r}")
        del self._pending[qid]
        return self.record(text, item, shown)

    def record(self, term: str, item: Id, shown: Iterable[Id] = ()) -> Row:
        """Record a click that did not come from `query`: of an older log, or of another search. Raises InputError as those."""
        about = self.item(item)
        number = self.log.held[self.node_id].end if self.node_id in self.log.held else 0
        time = None if self._clock is None else float(self._clock())
        fields = (self.node_id, number, normalize(term), item, about.title, about.artist, about.tags)
        row = Row(*fields, tuple(islice(shown, SHOWN_LIMIT)), time)
        if self._key is not None:
            row = replace(row, signature=self._key.sign(row.signed_bytes()))
        self._take([(row, "")], is_ours=True)
        return row

    # Similarity

    def similarity(self, j: str) -> float:
        """S_i(j), 0 to 1; 1 of the node itself. Raises InputError for a peer that is not known."""
        if j != self.node_id and j not in self._known:
            raise InputError(f"{j!r} is not a known peer of {self.node_id!r}")
        self._expire()
        return 1.0 if j == self.node_id else self._similarities().get(j, 0.0)

    def _similarities(self) -> dict[str, float]:
        """Of all origins but the node itself. Only those whose clicks changed are computed again; all if our own did."""
        for j in self._stale:
            if self.log.clicks.get(j):
                self._raw[j] = self._raw_similarity(j)
            else:
                self._raw.pop(j, None)
        self._stale.clear()
        largest = max(self._raw.values(), default=0.0)
        return {j: value / largest if largest else 0.0 for j, value in self._raw.items()}

    def _raw_similarity(self, j: str) -> float:
        """O(distinct clicks of j)."""
        log, i = self.log, self.node_id
        terms = len(self._top[i] & self._top[j])
        clicks = len(log.clicks[i].keys() & log.clicks[j].keys())
        union = len(log.items[i]) + len(log.items[j]) - len(log.items[i].keys() & log.items[j].keys())
        return float(raw_similarity(terms, clicks, union, self.defences.min_common))

    def _weights(self) -> dict[str, float]:
        """S_i(j) + F by origin; 0 of those that are proven to lie."""
        weight = {j: value + self.F for j, value in self._similarities().items() if j not in self.log.distrusted}
        weight[self.node_id] = 1.0 + self.F
        return weight

    def _touch(self, origins: set[str]) -> None:
        """Note whose similarities are to be computed again: those of ``origins``, or all if what we compare with them changed."""
        for origin in origins:
            self._top[origin] = top_terms(self.log.terms[origin], self.top_terms)
        if self.node_id in origins:
            own = self._top[self.node_id], set(self.log.clicks[self.node_id])
            # Often we click again what we clicked before, and nothing changes.
            if own != self._own:
                self._own = own
                origins = set(self.log.clicks)
        self._stale |= origins - {self.node_id}

    def _expire(self) -> None:
        if self.defences.ttl is not None and self._clock is not None:
            self._touch(self.log.expire(self._clock()))

    # Gossip

    def peers(self) -> list[str]:
        """Nodes known by their rows, or because they asked; in the order in which they were met."""
        return list(self._known)

    def learn(self, node: str) -> None:
        """Note that a node exists. At most 100,000 are noted."""
        if node != self.node_id and is_node(node) and len(self._known) < PEERS_LIMIT:
            self._known.setdefault(node)

    def vector(self) -> Vector:
        """Which rows this node has: what it asks with."""
        return self.log.vector()

    def make_reply(
        self, since: Mapping[str, Any], asker: str | None = None, part: Part = (START, END)
    ) -> dict[str, Any]:
        """The rows that a peer with the vector ``since`` lacks, within the quotas: a message for its `merge`.

        Args:
            since: the asker's `vector`; ``{}`` for all.
            asker: its name, which this node then knows.
            part: of which rows, by origin and number, ``since`` tells; others are left out. Default: of all.

        Returns:
            ``{"from": node, "rows": [...], "more": whether quotas left some out}``.

        Raises DataError for a vector that is none.
        """
        vector = check_vector(since)
        if asker is not None:
            self.learn(asker)
        self._expire()
        limit = self.defences.reply_rows_per_origin
        missing = list(self.log.beyond(vector, part))
        rows = (self.log.rows[origin][number] for origin, numbers in missing for number in numbers[:limit])
        return self._message(rows, sum(len(numbers) for _, numbers in missing))

    def make_bootstrap(self, share: float = 0.1, asker: str | None = None) -> dict[str, Any]:
        """A random ``share`` of the log (at least a row), for a node that is new. Raises InputError for a share outside 0 to 1."""
        if not 0 < share <= 1:
            raise InputError(f"share is {share}; it is above 0 and at most 1")
        if asker is not None:
            self.learn(asker)
        self._expire()
        rows = list(self.log.all_rows())
        chosen = self._generator.permutation(len(rows))[: int(np.ceil(share * len(rows)))]
        return self._message((rows[place] for place in sorted(chosen)), len(chosen))

    def _message(self, rows: Iterable[Row], available: int) -> dict[str, Any]:
        sent: list[list[Any]] = []
        left = self.defences.max_message_bytes - AROUND
        for row in islice(rows, self.defences.reply_rows):
            left -= row.size() + 1
            if left < 0:
                break
            sent.append(row.to_json())
        return {"from": self.node_id, "rows": sent, "more": len(sent) < available}

    def merge(self, reply: Mapping[str, Any], *, solicited: bool = True, teller: str | None = None) -> Merged:
        """Take in the rows of a message. The sender and all origins become known peers.

        A bad row is refused by itself and the others are taken. Rows beyond the quotas are refused; they come again with the next message.

        Args:
            reply: what `make_reply` or `make_bootstrap` of a peer gave, or its JSON.
            solicited: whether this node asked for it; if not, ``pull_only`` refuses all of it.
            teller: who told it, by what they cannot choose freely, such as the address that was asked: where rows are not signed,
                one teller's rows push out no more than their share of what others told of an origin. None is the name in the message.

        Raises DataError if it is no message at all.
        """
        rows = reply.get("rows") if isinstance(reply, Mapping) else None
        if not isinstance(rows, list | tuple) or not is_node(reply.get("from")):
            raise DataError('a message has "from", a name, and "rows", a list')
        if not solicited and self.defences.pull_only:
            return Merged(refused={"unsolicited": len(rows)})
        self.learn(reply["from"])
        refused: Counter[str] = Counter()
        good: list[Row] = []
        by_origin: Counter[str] = Counter()
        for value in rows[: self.defences.reply_rows]:
            try:
                row = row_from_json(value)
                normal = normalize(row.term) == row.term
                # Before anything is changed: it is the user's, and may refuse.
                self.term_key(row.term)
            except (DataError, InputError):
                refused["malformed"] += 1
                continue
            by_origin[row.origin] += 1
            if not normal:
                refused["malformed"] += 1
            elif by_origin[row.origin] > self.defences.reply_rows_per_origin:
                refused["quota"] += 1
            else:
                good.append(row)
        if len(rows) > self.defences.reply_rows:
            refused["quota"] += len(rows) - self.defences.reply_rows
        who = reply["from"] if teller is None else teller
        taken = self._take((row, who) for row in good)
        return Merged(taken.added, taken.known, dict(refused + Counter(taken.refused)))

    def _take(self, told: Iterable[tuple[Row, str]], *, is_ours: bool = False, stored: bool = False) -> Merged:
        """Add rows, each with who told it, to the log and the store."""
        now = None if self._clock is None else float(self._clock())
        outcome: Counter[str] = Counter()
        added: list[tuple[Row, str]] = []
        touched: set[str] = set()
        for row, teller in told:
            what = self.log.add(row, is_ours=is_ours, now=now, teller=teller)
            outcome[what] += 1
            if what == "added":
                added.append((row, teller))
            # A row that is too old may still push older ones out.
            if what in ("added", "known"):
                touched.add(row.origin)
        for origin in dict.fromkeys(row.origin for row, _ in added):
            self.learn(origin)
        self._touch(touched | self.log.take_lost())
        if self._store is not None and not stored:
            self._unsaved += added
            self._store.add(self._unsaved)
            self._unsaved.clear()
        return Merged(outcome.pop("added", 0), outcome.pop("known", 0), dict(outcome))

    # Keeping

    def stats(self) -> dict[str, int]:
        """``rows``, their ``bytes`` on the wire, ``origins`` of rows, ``cells`` (term, item, origin), ``peers``, ``marked`` origins."""
        cells = sum(len(clicks) for clicks in self.log.clicks.values())
        origins = sum(bool(rows) for rows in self.log.rows.values())
        return {
            "rows": self.log.num_rows,
            "bytes": self.log.num_bytes,
            "origins": origins,
            "cells": cells,
            "peers": len(self._known),
            "marked": len(self.log.marked),
        }

    def save(self, path: str | Path) -> None:
        """Write the peer into one checked file, all or nothing: log, library, known peers, parameters.

        Not: the key, the store, open queries.
        """
        peer_file.write(path, self)

    @classmethod
    def load(cls, path: str | Path, **others: Any) -> Self:
        """Read what `save` wrote; ``others`` are arguments that a file does not hold (match, term_key, key, clock, store).

        Raises DataError for a file that is missing, foreign or damaged.
        """
        return peer_file.read(path, cls, others)

    def close(self) -> None:
        """Close the store, if there is one."""
        if self._store is not None:
            self._store.close()

    def __repr__(self) -> str:
        return f"Peer({self.node_id!r}, {len(self.library):,} items, {self.log.num_rows:,} rows, {len(self._known):,} peers, F={self.F:g})"


def _check_k(k: int | None) -> None:
    if k is not None and (not is_whole(k) or k < 1):
        raise InputError(f"k is {shown(k)}; it is a whole number of at least 1")
