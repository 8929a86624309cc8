"""The partitioned plan: walks from all nodes as rounds, each a join of walks with the records they stand at.

A walk under way is part of a row (source, record, count); rows of the same source and record are one row, since walks do not remember how
they came. One round of one partition is a pure function of its rows and its records (`move`), which Spark calls on Arrow batches and
`run_rounds` calls on arrays in this process. Draws come from the stream (seed, round, source, record), so rows are the same for any
number of partitions, on one machine and on a cluster, run after run.
"""
# Shapes: S sources, W rows of walks, D rows of what is counted, R records, E entries

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numba as nb
import numpy as np

from anabranch.graph.alias import pick
from anabranch.graph.counters import ABSORB, SOURCE, VANISH
from anabranch.graph.fully_ppr.devices import MOVE, NODE, Records, adapt_gamma, choose_gamma
from anabranch.graph.random import below, next_bits, stream, to_unit

# Of visits on the way of a big move, which are fractions: counts stay whole, and sums do not depend on their order.
UNIT = 1 << 24

# Walks that are moved one by one before they are merged into rows again.
PIECE = 1 << 21

# Moved in the time of a round's fixed cost on a cluster: about a second of one core; ours.
OVERHEAD_WALKS = 1_000_000


@dataclass(frozen=True)
class Rows:
    """Rows (source, key, count), int64 each [W]; key is a record of walks under way, or the node that is counted."""

    source: np.ndarray
    key: np.ndarray
    count: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    @property
    def total(self) -> int:
        """Sum of the counts."""
        return int(self.count.sum())


@dataclass(frozen=True)
class Rules:
    """What a round needs to know of the walks.

    Attributes:
        seed: of the streams.
        alpha: probability to end before each step.
        dangling: `SOURCE`, `ABSORB`, `UNIFORM` or `VANISH` of `anabranch.graph.counters`.
        full: count every visit (else ends).
        num_nodes: N.
        unit: what one visit counts.
    """

    seed: int
    alpha: float
    dangling: int
    full: bool
    num_nodes: int
    unit: int = 1


NONE = Rows(*(np.empty(0, np.int64) for _ in range(3)))


def joined(parts: list[Rows]) -> Rows:
    """Rows of all parts, one after another."""
    if not parts:
        return NONE
    return Rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("source", "key", "count")))


def merged(rows: Rows) -> Rows:
    """Rows of the same source and key as one, in rising order."""
    if not len(rows):
        return rows
    span = int(rows.key.max()) + 1
    if (int(rows.source.max()) + 1) * span < 1 << 63:
        combined = rows.source * span + rows.key
        order = np.argsort(combined, kind="stable")
        changes = np.diff(combined[order]) != 0
    else:
        order = np.lexsort((rows.key, rows.source))
        changes = (np.diff(rows.source[order]) != 0) | (np.diff(rows.key[order]) != 0)
    first = np.flatnonzero(np.append(True, changes))
    kept = order[first]
    return Rows(rows.source[kept], rows.key[kept], np.add.reduceat(rows.count[order], first))


def move(walks: Rows, records: Records, ids: np.ndarray | None, rules: Rules, number: int) -> tuple[Rows, Rows]:
    """One round of one partition.

    Args:
        walks: rows of walks under way; several of the same source and record are allowed.
        records: the records of the partition, in it at the places 0, 1, ...
        ids: their numbers, rising; None where the partition holds all.
        rules: of the walks.
        number: of the round.

    Returns:
        Walks still under way, and what is counted: ends (or visits, times ``rules.unit``) by node. Each merged.
    """
    walks = merged(walks)
    if not len(walks):
        return NONE, NONE
    if rules.full and records.share is None and (records.kind == MOVE).any():
        raise AssertionError("records of moves keep no probabilities; make them with visits=True")
    # Walks of a row part: some at a time, so that memory follows rows, not walks. Streams are those of rows, so the cuts do not show.
    piece_W = (np.cumsum(walks.count) - 1) // PIECE
    edges = np.flatnonzero(np.diff(piece_W, prepend=-1, append=-1))
    parts = [
        _move_piece(_where(walks, slice(first, end)), records, ids, rules, number)
        for first, end in itertools.pairwise(edges.tolist())
    ]
    live, done = (joined([part[place] for part in parts]) for place in (0, 1))
    return (live, done) if len(parts) == 1 else (merged(live), merged(done))


def _move_piece(walks: Rows, records: Records, ids: np.ndarray | None, rules: Rules, number: int) -> tuple[Rows, Rows]:
    place_W = walks.key if ids is None else np.searchsorted(ids, walks.key)
    is_move = records.kind[place_W] == MOVE
    length_W = records.indptr[place_W + 1] - records.indptr[place_W]
    room = len(walks) + int((length_W if rules.full else walks.count)[is_move].sum())
    live = Rows(*(np.empty(walks.total, np.int64) for _ in range(3)))
    done = Rows(*(np.empty(room, np.int64) for _ in range(3)))
    share = np.empty(0) if records.share is None else records.share
    num_live, num_done = _move(
        np.uint64(stream(np.uint64(rules.seed % 2**64), np.uint64(number))),
        tuple(getattr(rules, name) for name in How._fields),
        (walks.source, walks.key, place_W, walks.count),
        (records.indptr, records.kind, records.code, records.keep, records.other, share),
        (live.source, live.key, live.count),
        (done.source, done.key, done.count),
    )
    return merged(_front(live, num_live)), merged(_front(done, num_done))


def _front(rows: Rows, count: int) -> Rows:
    return Rows(rows.source[:count], rows.key[:count], rows.count[:count])


class How(NamedTuple):
    """`Rules` as the kernel takes them, but for the seed."""

    alpha: float
    dangling: int
    full: bool
    num_nodes: int
    unit: int


@nb.njit(cache=True, nogil=True)
def _move(key, plain_how, standing, held, live, done):
    """Walks move into ``live`` and ``done``, sources, keys and counts each: how many rows of both there are.

    Takes a `How` as a plain tuple; ``standing`` are walks (source, record, its place, count), ``held`` are the arrays of `Records`.
    """
    how = How(*plain_how)
    alpha, dangling, full, unit = how.alpha, how.dangling, how.full, how.unit
    source_W, record_W, place_W, count_W = standing
    indptr, kind_R, code_E, keep_E, other_E, share_E = held
    live_source, live_key, live_count = live
    done_source, done_key, done_count = done
    num_live, num_done = 0, 0
    for row in range(len(source_W)):
        source, record, place = source_W[row], record_W[row], place_W[row]
        walkers = count_W[row]
        start = indptr[place]
        entries = indptr[place + 1] - start
        kind = kind_R[place]
        stuck = kind == NODE and entries == 0 and (dangling == ABSORB or (dangling == SOURCE and record == source))
        # It can only end here: no need to wait for it.
        if stuck and not full:
            done_source[num_done], done_key[num_done], done_count[num_done] = source, record, walkers
            num_done += 1
            continue
        state = stream(key, source, record)
        # Expected visits before the next look-up: P(ends at v) / alpha each.
        if kind == MOVE and full:
            for entry in range(start, start + entries):
                if code_E[entry] & 1:
                    done_source[num_done] = source
                    done_key[num_done] = code_E[entry] >> 1
                    done_count[num_done] = np.int64(walkers * share_E[entry] / alpha * unit + 0.5)
                    num_done += 1
        ended = 0
        for _ in range(walkers):
            if kind == NODE:
                state, bits = next_bits(state)
                if to_unit(bits) < alpha:
                    ended += 1
                    continue
            state, bits = next_bits(state)
            if entries > 0:
                code = code_E[pick(bits, start, entries, keep_E, other_E)]
            elif dangling == SOURCE:
                code = 2 * source
            elif dangling == ABSORB:
                code = 2 * record
            elif dangling == VANISH:
                continue
            else:
                code = 2 * below(bits, how.num_nodes)
            if code & 1:
                if not full:
                    done_source[num_done] = source
                    done_key[num_done] = code >> 1
                    done_count[num_done] = 1
                    num_done += 1
                continue
            live_source[num_live] = source
            live_key[num_live] = code >> 1
            live_count[num_live] = 1
            num_live += 1
        if kind == NODE and (full or ended > 0):
            done_source[num_done] = source
            done_key[num_done] = record
            done_count[num_done] = walkers * unit if full else ended
            num_done += 1
    return num_live, num_done


# Which walks start when


@dataclass
class Round:
    """What one round did.

    Attributes:
        number: of the round.
        gamma: walks of each source that a pipeline has.
        started: walks of each source that started in it.
        walks: walks that it moved.
        rows: rows that these were.
        alive: walks under way after it.
    """

    number: int
    gamma: int
    started: int
    walks: int
    rows: int
    alive: int


@dataclass
class Schedule:
    """Pipelines of walks: decides how many start in a round, and keeps the log. What it decides depends on counts alone.

    Attributes:
        num_sources: S.
        walks: omega.
        gamma: of the next round.
        memory: bytes for rows of walks; gamma follows it unless ``is_fixed``.
        is_fixed: keep gamma.
        pipelined: start a pipeline each round; else only when all walks have ended.
        overhead: fixed cost of a round, in walks moved.
        patience: rounds before gamma changes again: what a change does shows after about 1 / alpha.
        since: rounds since it changed.
    """

    num_sources: int
    walks: int
    gamma: int
    memory: float = float("inf")
    is_fixed: bool = False
    pipelined: bool = True
    overhead: float = OVERHEAD_WALKS
    patience: int = 1
    since: int = 0
    started: int = 0
    alive: int = 0
    log: list[Round] = field(default_factory=list)

    @classmethod
    def make(
        cls, num_sources: int, walks: int, alpha: float, memory: float, gamma: int | None = None, **options: Any
    ) -> "Schedule":
        """A schedule with the given gamma, fixed, or with one that is chosen for the memory and follows it."""
        chosen = choose_gamma(num_sources, walks, alpha, memory) if gamma is None else min(gamma, walks)
        patience = math.ceil(1 / alpha)
        return cls(num_sources, walks, chosen, memory, gamma is not None, patience=patience, **options)

    @property
    def is_over(self) -> bool:
        """Whether all walks have started and ended."""
        return self.started == self.walks and self.alive == 0

    @property
    def number(self) -> int:
        """Of the next round."""
        return len(self.log)

    def start(self) -> int:
        """How many walks of each source start in the next round."""
        if self.alive and not self.pipelined:
            return 0
        return min(self.gamma, self.walks - self.started)

    def finish(self, started: int, walks: int, rows: int, alive: int) -> None:
        """Note what the round did and choose gamma for the next."""
        self.log.append(Round(self.number, self.gamma, started, walks, rows, alive))
        self.started += started
        self.alive = alive
        self.since += 1
        if not self.is_fixed and self.since >= self.patience:
            gamma = min(adapt_gamma(self.gamma, rows, walks, self.memory, self.overhead), self.walks)
            if gamma != self.gamma:
                self.gamma, self.since = gamma, 0

    @property
    def peak(self) -> int:
        """Most walks in one round."""
        return max((entry.walks for entry in self.log), default=0)

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "Schedule":
        """What `to_dict` gave."""
        return cls(**{**found, "log": [Round(**entry) for entry in found["log"]]})


def newcomers(source_S: np.ndarray, count: int) -> Rows:
    """``count`` walks at each source."""
    if not count:
        return NONE
    return Rows(source_S, source_S, np.full(len(source_S), count, np.int64))


def run_rounds(
    records: Records,
    source_S: np.ndarray,
    schedule: Schedule,
    rules: Rules,
    *,
    partitions: int = 1,
    each: Callable[[Schedule], None] = lambda schedule: None,
) -> Rows:
    """All rounds in this process, with the operators of the cluster. Returns what is counted, merged.

    Args:
        records: all of them; record r lies on partition r mod ``partitions``.
        source_S: int64, distinct nodes.
        schedule: which walks start when; holds the log afterwards.
        rules: of the walks.
        partitions: parts that are moved one by one.
        each: called after every round.
    """
    parts = [split(records, part, partitions) for part in range(partitions)]
    walks, counted = NONE, [NONE]
    while not schedule.is_over:
        started = schedule.start()
        walks = merged(joined([walks, newcomers(source_S, started)]))
        moved = []
        for part, (held, ids) in enumerate(parts):
            here = walks if partitions == 1 else _where(walks, walks.key % partitions == part)
            moved.append(move(here, held, ids, rules, schedule.number))
        total, rows = walks.total, len(walks)
        walks = joined([live for live, _ in moved])
        counted.append(joined([done for _, done in moved]))
        if sum(map(len, counted[1:])) > 4 * len(counted[0]) + 1_000_000:
            counted = [merged(joined(counted))]
        schedule.finish(started, total, rows, walks.total)
        each(schedule)
    return merged(joined(counted))


def split(records: Records, part: int, partitions: int) -> tuple[Records, np.ndarray | None]:
    """The records of a partition and their numbers."""
    if partitions == 1:
        return records, None
    ids = np.arange(part, len(records), partitions)
    length = np.diff(records.indptr)[ids]
    indptr = np.append(0, np.cumsum(length))
    place = np.repeat(records.indptr[ids] - indptr[:-1], length) + np.arange(indptr[-1])
    share = None if records.share is None else records.share[place]
    held = Records(
        indptr,
        records.kind[ids],
        records.code[place],
        records.keep[place],
        records.other[place],
        share,
        records.num_nodes,
    )
    return held, ids


def _where(rows: Rows, chosen: np.ndarray | slice) -> Rows:
    """Rows by mask, places or slice."""
    return Rows(rows.source[chosen], rows.key[chosen], rows.count[chosen])


def best_rows(counted: Rows, top_k: int, least: float) -> tuple[Rows, np.ndarray]:
    """The ``top_k`` largest counts of each source (0: all) with a score of at least ``least``, and their scores, float32.

    A score is a count over the sum of its source's. Sources rise; within one scores fall, ties by rising node.
    """
    rows = merged(counted)
    if not len(rows):
        return rows, np.empty(0, np.float32)
    first = np.flatnonzero(np.append(True, np.diff(rows.source) != 0))
    scale = 1.0 / np.add.reduceat(rows.count, first)
    score = (rows.count * np.repeat(scale, np.diff(np.append(first, len(rows))))).astype(np.float32)
    order = np.lexsort((rows.key, -score, rows.source))
    rank = np.arange(len(rows)) - np.repeat(first, np.diff(np.append(first, len(rows))))
    kept = score[order] >= np.float32(least)
    if top_k:
        kept &= rank < top_k
    order = order[kept]
    return _where(rows, order), score[order]
