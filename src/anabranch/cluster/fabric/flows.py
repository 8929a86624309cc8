"""What a collective sends: steps of (source, destination, bytes), of the usual algorithms and of a routed layer of experts.

A rank starts its sends of a step when all that it sends and receives in earlier steps is over; ranks wait for nobody else. Blocks are
padded to one size, as libraries do, so flows of a step are equal; those of `moe_dispatch` are what tokens ask for, and are not.
"""
# Shapes: F flows, R ranks, N items, K choices of an item

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from anabranch.bounds import MOST_SEED, shown, whole
from anabranch.errors import CapacityError, InputError

MOST_RANKS, MOST_FLOWS = 65_536, 50_000_000
MOST_BYTES = 2**50
ALGORITHMS = {
    "all-reduce": ("ring", "halving-doubling", "double-binary-tree"),
    "all-gather": ("ring", "direct", "doubling"),
    "reduce-scatter": ("ring", "direct", "halving"),
    "all-to-all": ("direct",),
    "permutation": ("direct",),
}


@dataclass(frozen=True, eq=False)
class Flows:
    """Flows between hosts; row f is ``size_F[f]`` bytes from host ``src_F[f]`` to ``dst_F[f]`` in step ``step_F[f]``.

    Raises InputError for a flow without bytes, of a host to itself, or of a host below 0.
    """

    src_F: np.ndarray
    dst_F: np.ndarray
    size_F: np.ndarray
    step_F: np.ndarray

    def __post_init__(self) -> None:
        for name, kind in (("src_F", np.int32), ("dst_F", np.int32), ("size_F", np.int64), ("step_F", np.int32)):
            object.__setattr__(self, name, _whole_column(name, getattr(self, name), kind))
        lengths = {len(column) for column in (self.src_F, self.dst_F, self.size_F, self.step_F)}
        if len(lengths) > 1:
            raise InputError(f"flows have columns of {', '.join(map(str, sorted(lengths)))} rows; they must be equal")
        for wrong_F, what in (
            (self.size_F < 1, "it must have 1 byte or more"),
            (self.src_F == self.dst_F, "a host sends itself nothing"),
            (np.minimum(self.src_F, self.dst_F) < 0, "hosts are counted from 0"),
            (self.step_F < 0, "steps are counted from 0"),
        ):
            if wrong_F.any():
                f = int(wrong_F.argmax())
                raise InputError(
                    f"flow {f} is {self.size_F[f]} bytes from host {self.src_F[f]} to {self.dst_F[f]} in step {self.step_F[f]}; {what}"
                )
        if len(self) and float(self.size_F.astype(float).sum()) > MOST_BYTES:
            raise InputError(
                f"the flows have {float(self.size_F.astype(float).sum()):.3g} bytes; at most 2^50 are planned"
            )

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> Self:
        """Flows of (source, destination, bytes) or (source, destination, bytes, step)."""
        made = [(*row, 0) if len(row) == 3 else tuple(row) for row in rows]
        if any(len(row) != 4 for row in made):
            raise InputError("a flow is (source, destination, bytes) or (source, destination, bytes, step)")
        columns = list(zip(*made, strict=True)) or [(), (), (), ()]
        src_F, dst_F, size_F, step_F = (np.array(column, dtype=None if column else np.int64) for column in columns)
        return cls(src_F, dst_F, size_F, step_F)

    def __len__(self) -> int:
        return len(self.src_F)

    @property
    def num_steps(self) -> int:
        """Steps, also those without a flow before the last."""
        return int(self.step_F.max()) + 1 if len(self) else 0

    @property
    def num_ranks(self) -> int:
        """The highest host that takes part, and one."""
        return int(max(self.src_F.max(), self.dst_F.max())) + 1 if len(self) else 0

    def steps(self) -> list[list[tuple[int, int, int]]]:
        """Each step as (source, destination, bytes)."""
        found: list[list[tuple[int, int, int]]] = [[] for _ in range(self.num_steps)]
        for src, dst, size, step in zip(
            *(c.tolist() for c in (self.src_F, self.dst_F, self.size_F, self.step_F)), strict=True
        ):
            found[step].append((src, dst, size))
        return found

    def step(self, number: int) -> Self:
        """The flows of one step, as step 0."""
        keep_F = self.step_F == number
        return replace(
            self,
            src_F=self.src_F[keep_F],
            dst_F=self.dst_F[keep_F],
            size_F=self.size_F[keep_F],
            step_F=np.zeros(int(keep_F.sum()), np.int32),
        )

    def placed(self, host_R: Sequence[int] | np.ndarray) -> Self:
        """The same flows with rank r on host ``host_R[r]``. Raises InputError if two ranks share a host or one has none."""
        host_R = _whole_column("host_R", host_R, np.int32)
        if len(host_R) < self.num_ranks or len(np.unique(host_R)) < len(host_R):
            raise InputError(
                f"{self.num_ranks} ranks need as many hosts, each its own; {shown(host_R.tolist()[:20])} were given"
            )
        return replace(self, src_F=host_R[self.src_F], dst_F=host_R[self.dst_F])


def _whole_column(name: str, column: object, kind: type) -> np.ndarray:
    values = np.asarray(column)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise InputError(f"{name} must be one row of whole numbers, not {values.dtype} of shape {list(values.shape)}")
    limits = np.iinfo(kind)
    if values.size and (values.max() > limits.max or values.min() < limits.min):
        raise InputError(f"{name} has a number beyond {limits.max:,}")
    return values.astype(kind)


def collective_flows(kind: str, ranks: int, bytes: int, algo: str | None = None, *, seed: int = 0) -> Flows:
    """The flows of a collective.

    Args:
        kind: ``all-reduce``, ``all-gather``, ``reduce-scatter``, ``all-to-all``, or ``permutation``: everybody sends to one other,
            drawn by ``seed``.
        ranks: R; rank r is host r (`Flows.placed` puts it elsewhere).
        bytes: of a rank's buffer: what is reduced, what comes out of a gather, what a rank has for all others together.
        algo: one of `ALGORITHMS` of the kind; default the first. Recursive halving and doubling want a power of two of ranks. The
            double binary tree sends a half of the buffer over each tree, in one piece.

    Raises InputError for another name or number, CapacityError for more than 50 million flows.
    """
    if kind not in ALGORITHMS:
        raise InputError(f"there is no collective {kind!r}; known: {', '.join(ALGORITHMS)}")
    algo = ALGORITHMS[kind][0] if algo is None else algo
    if algo not in ALGORITHMS[kind]:
        raise InputError(f"there is no {algo!r} of {kind}; known: {', '.join(ALGORITHMS[kind])}")
    ranks, bytes = whole("ranks", ranks, 2, MOST_RANKS), whole("bytes", bytes, 1, MOST_BYTES)
    if kind == "permutation":
        return _permutation(ranks, bytes, whole("seed", seed, 0, MOST_SEED))
    if algo in ("halving-doubling", "halving", "doubling") and ranks & (ranks - 1):
        raise InputError(f"{algo} of {ranks} ranks; it needs a power of two, such as {1 << ranks.bit_length() - 1}")
    _check_count(2 * ranks * ranks if algo in ("ring", "direct") else ranks)
    block = -(-bytes // ranks)
    if algo == "direct":
        return _direct(ranks, block)
    if algo == "ring":
        return _ring(ranks, block, 2 if kind == "all-reduce" else 1)
    if algo == "double-binary-tree":
        return _double_tree(ranks, bytes)
    halves = algo in ("halving-doubling", "halving"), algo in ("halving-doubling", "doubling")
    return _halving_doubling(ranks, block, *halves)


def _check_count(count: int) -> None:
    if count > MOST_FLOWS:
        raise CapacityError(f"{count:,} flows; at most {MOST_FLOWS:,} are planned")


def _permutation(ranks: int, size: int, seed: int) -> Flows:
    generator = np.random.default_rng(seed)
    # A cycle through all ranks in random order: nobody sends to itself.
    order_R = generator.permutation(ranks)
    return Flows(order_R, np.roll(order_R, -1), np.full(ranks, size), np.zeros(ranks, np.int32))


def _direct(ranks: int, block: int) -> Flows:
    """Each rank sends a block to each other, its right neighbour first."""
    src_F = np.repeat(np.arange(ranks), ranks - 1)
    dst_F = (src_F + np.tile(np.arange(1, ranks), ranks)) % ranks
    return Flows(src_F, dst_F, np.full(len(src_F), block), np.zeros(len(src_F), np.int32))


def _ring(ranks: int, block: int, rounds: int) -> Flows:
    """Each rank sends a block to its right neighbour, R - 1 times to reduce-scatter or gather, twice that for both."""
    num_steps = rounds * (ranks - 1)
    src_F = np.tile(np.arange(ranks), num_steps)
    step_F = np.repeat(np.arange(num_steps), ranks)
    return Flows(src_F, (src_F + 1) % ranks, np.full(len(src_F), block), step_F)


def _halving_doubling(ranks: int, block: int, halves: bool, doubles: bool) -> Flows:
    """Exchanges with the rank half of all away, then a quarter, with half of the bytes each time; and back."""
    distances = [ranks >> power for power in range(1, ranks.bit_length())]
    turns = (distances if halves else []) + (distances[::-1] if doubles else [])
    rank_R = np.arange(ranks)
    rows = [(rank_R, rank_R ^ far, np.full(ranks, block * far), np.full(ranks, step)) for step, far in enumerate(turns)]
    return Flows(*(np.concatenate(column) for column in zip(*rows, strict=True)))


def tree_parents(ranks: int) -> np.ndarray:
    """int64 [R]: the parent of each rank in the in-order binary tree, -1 for the root, rank 0. Odd ranks have no children."""
    parent_R = np.full(ranks, -1, np.int64)
    for rank in range(1, ranks):
        low = rank & -rank
        above = (rank ^ low) | (low << 1)
        parent_R[rank] = above if above < ranks else rank ^ low
    return parent_R


def _double_tree(ranks: int, bytes: int) -> Flows:
    """Two binary trees; who has children in one has none in the other, so that each rank sends and receives about the buffer once."""
    halves = [size for size in (-(-bytes // 2), bytes // 2) if size]
    rows = []
    for tree, size in enumerate(halves):
        parent_R = tree_parents(ranks)
        # The second is the first mirrored, or shifted where that would not exchange odd and even.
        name_R = (
            np.arange(ranks)
            if not tree
            else (ranks - 1 - np.arange(ranks) if ranks % 2 == 0 else (np.arange(ranks) + 1) % ranks)
        )
        depth_R = np.zeros(ranks, np.int64)
        for rank in range(ranks):
            above = rank
            while parent_R[above] >= 0:
                above = int(parent_R[above])
                depth_R[rank] += 1
        deepest = int(depth_R.max())
        for rank in np.flatnonzero(parent_R >= 0).tolist():
            child, parent = int(name_R[rank]), int(name_R[parent_R[rank]])
            rows += [
                (child, parent, size, deepest - int(depth_R[rank])),
                (parent, child, size, deepest + int(depth_R[rank]) - 1),
            ]
    return Flows.of(sorted(rows, key=lambda row: row[3]))


def dispatch_matrix(index_NK: np.ndarray, num_experts: int, ranks: int, *, once: bool = False) -> np.ndarray:
    """int64 [R, R]: how many rows each rank sends to each, where experts are spread over ranks.

    Args:
        index_NK: the expert of each choice, -1 where it is unused, as in a `Routing` or in `RoutingTrace.decisions`.
        num_experts: E. Rank r has the experts from E r / R up to E (r + 1) / R, and as many of the items, in their order.
        ranks: R.
        once: an item goes to a rank once, though several of its experts are there.

    Raises InputError for experts that are not there, or fewer experts than ranks.
    """
    index_NK = np.asarray(index_NK)
    if index_NK.ndim != 2 or index_NK.dtype.kind not in "iu":
        raise InputError(f"index_NK must be whole numbers [N, K], not {index_NK.dtype} of shape {list(index_NK.shape)}")
    num_experts = whole("num_experts", num_experts, 1, 2**24)
    ranks = whole("ranks", ranks, 1, min(MOST_RANKS, num_experts))
    if index_NK.size and (index_NK.max() >= num_experts or index_NK.min() < -1):
        wrong = int(index_NK.max()) if index_NK.max() >= num_experts else int(index_NK.min())
        raise InputError(f"index_NK has expert {wrong}; there are experts 0 to {num_experts - 1}, and -1 for none")
    source_N = np.arange(len(index_NK)) * ranks // max(len(index_NK), 1)
    rank_NK = np.where(index_NK >= 0, index_NK.astype(np.int64) * ranks // num_experts, -1)
    if once:
        rank_NK = np.sort(rank_NK, 1)
        rank_NK[:, 1:][np.diff(rank_NK, axis=1) == 0] = -1
    pair_NK = source_N[:, None] * ranks + rank_NK
    return np.bincount(pair_NK[rank_NK >= 0], minlength=ranks * ranks).reshape(ranks, ranks)


def moe_dispatch(rows_RR: np.ndarray, bytes_per_row: int, *, combine: bool = False) -> Flows:
    """The flows of a matrix of `dispatch_matrix`: unequal, and none where nothing goes.

    Args:
        rows_RR: int [R, R].
        bytes_per_row: width times bytes of a number, 14,336 for 7,168 numbers of bfloat16.
        combine: results come back too, as a second step.

    Raises InputError for a matrix that is not square, or has nothing for others.
    """
    rows_RR = np.asarray(rows_RR)
    if rows_RR.ndim != 2 or rows_RR.shape[0] != rows_RR.shape[1] or rows_RR.dtype.kind not in "iu":
        raise InputError(f"rows_RR must be whole numbers [R, R], not {rows_RR.dtype} of shape {list(rows_RR.shape)}")
    bytes_per_row = whole("bytes_per_row", bytes_per_row, 1, MOST_BYTES)
    sent_RR = rows_RR.astype(np.int64)
    if sent_RR.size and sent_RR.min() < 0:
        raise InputError(f"rows_RR has {sent_RR.min()} rows; numbers of rows are 0 or more")
    sent_RR = sent_RR * (1 - np.eye(len(sent_RR), dtype=np.int64))
    src_F, dst_F = np.nonzero(sent_RR)
    if not len(src_F):
        raise InputError("no rank sends a row to another: there is nothing to plan")
    if int(sent_RR.max()) * bytes_per_row > MOST_BYTES:
        raise InputError(
            f"{sent_RR.max():,} rows of {bytes_per_row:,} bytes from one rank to another; at most 2^50 bytes are planned"
        )
    size_F = sent_RR[src_F, dst_F] * bytes_per_row
    step_F = np.zeros(len(src_F), np.int32)
    if not combine:
        return Flows(src_F, dst_F, size_F, step_F)
    both = [np.concatenate(pair) for pair in ((src_F, dst_F), (dst_F, src_F), (size_F, size_F), (step_F, step_F + 1))]
    return Flows(*both)
