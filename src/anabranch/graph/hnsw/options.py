"""What an index may be made with, said before anything is made."""

from typing import Any

from anabranch.bounds import is_whole, shown
from anabranch.errors import InputError
from anabranch.graph.arguments import check_one_of, is_number
from anabranch.graph.hnsw.encoding import BITS, PRECISIONS
from anabranch.graph.hnsw.storage import METRICS

HEURISTICS = ("diverse", "simple")
MAX_DIM, MAX_M = 2**16, 1024

# Candidates of an insertion, which each thread has room for; and results that are measured again, of all that there may be.
MAX_EF, MAX_RERANK = 2**20, 2**31 - 1


def check_options(
    dim: int, M: int, *, metric: Any, dtype: Any, heuristic: Any, compact_at: float | None, seed: Any
) -> None:
    """Raise InputError where an argument of `HNSW` has a value that it may not have."""
    for name, value, allowed in (
        ("metric", metric, METRICS),
        ("dtype", dtype, (*PRECISIONS, BITS)),
        ("heuristic", heuristic, HEURISTICS),
    ):
        check_one_of(name, value, allowed)
    if M < 2 or M > MAX_M or dim > MAX_DIM:
        raise InputError(f"M is {shown(M)} and dim {shown(dim)}; M must be 2 to {MAX_M} and dim at most {MAX_DIM}")
    if (metric == "hamming") != (dtype == BITS):
        raise InputError(
            f"metric is {metric!r} and dtype {dtype!r}; 'hamming' compares bits, {BITS!r}, and nothing else does"
        )
    if metric == "hamming" and dim % 8:
        raise InputError(
            f"dim is {dim}; with the metric 'hamming' it is a number of bits in whole bytes, a multiple of 8"
        )
    if compact_at is not None and not (is_number(compact_at) and 0 <= compact_at < 1):
        raise InputError(f"compact_at is {shown(compact_at)}; it must be a share from 0 to below 1, or None")
    if not is_whole(seed):
        raise InputError(f"seed is {shown(seed)}; it must be an integer")
