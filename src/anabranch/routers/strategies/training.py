"""What learners share: what they may be given, means over what is known, parts of the data to learn from and to check on."""
# Shapes: N queries, M models, D dimensions of a vector

import hashlib
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from anabranch.errors import DataError, InputError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Query
from anabranch.routers.contract.strategy import Arrays, Facts

# Queries that two models answered, below which their comparison says nothing of a log.
LEAST_COMPARED = 10


class Kept:
    """What was learned is the arrays named in ``learned``: mixed into a predictor or strategy, saves and reads them."""

    learned: ClassVar[tuple[str, ...]] = ()

    def state(self) -> tuple[Arrays, Facts]:
        """The arrays."""
        return {name: getattr(self, name) for name in self.learned}, {}

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave."""
        for name in self.learned:
            setattr(self, name, arrays[name])


def training_set(data: Recorded, name: str, *, vector: bool = True, cost: bool = False) -> Recorded:
    """The data, if ``name`` can learn from it.

    Raises DataError for no rows, no score at all, vectors that are missing or not finite, and, where ``cost`` is asked for, no cost at all.
    """
    if not len(data):
        raise DataError(f"{name} has no recorded outcomes to learn from; give at least one query with scores")
    if not np.isfinite(data.score_NM).any():
        raise DataError(f"{name} needs scores to learn from; all of {len(data)} rows lack them")
    if vector:
        if data.vector_ND is None:
            raise DataError(f"{name} learns from vectors of the queries; embed them first (Recorded.with_vectors)")
        bad_N = ~np.isfinite(data.vector_ND).all(axis=1)
        if data.vector_ND.ndim != 2 or bad_N.any():
            raise DataError(f"{name}: the vector of row {int(np.argmax(bad_N))} is not finite; embed that text again")
    if cost and (data.cost_NM is None or not np.isfinite(data.cost_NM).any()):
        raise DataError(f"{name} weighs quality against cost; the recorded outcomes carry no costs")
    return data


def check_compared(score_NM: np.ndarray, name: str) -> None:
    """Raises DataError if too few queries were answered by two models for ``name``, which compares them.

    At least `LEAST_COMPARED`, or all if there are no more than that.
    """
    count = int((np.isfinite(score_NM).sum(1) >= 2).sum())
    least = min(LEAST_COMPARED, len(score_NM))
    if count < least:
        have = "no query has scores of two"
        if count:
            have = f"only {count:,} of {len(score_NM):,} queries have scores of two, and {least} must"
        raise DataError(
            f"{name} compares models; {have}. Ask the other models too (anabranch gateway collect), or take a strategy "
            "that learns from one answer per query: ridge, knn, irt, linucb"
        )


def vectors_of(data: Recorded, dim: int, name: str) -> np.ndarray:
    """float32 ``[N, D]``. Raises InputError where there are none, or of another length than learned from."""
    if data.vector_ND is None:
        raise InputError(f"{name} needs the vectors of queries; give the gateway an embedder")
    return _checked(np.asarray(data.vector_ND, np.float32), dim, name)


def vector_of(query: Query, dim: int, name: str) -> np.ndarray:
    """The vector of one query, float32 ``[1, D]``; quicker than by a table of one row. Raises as `vectors_of`."""
    if query.vector_D is None:
        raise InputError(f"{name} needs the vectors of queries; give the gateway an embedder")
    return _checked(np.asarray(query.vector_D, np.float32)[None], dim, name)


def _checked(vector_ND: np.ndarray, dim: int, name: str) -> np.ndarray:
    if vector_ND.shape[1] != dim:
        raise InputError(
            f"{name} learned from vectors of {dim} dimensions and was given {vector_ND.shape[1]}; use the embedder it was fitted with"
        )
    if not np.isfinite(vector_ND).all():
        raise InputError(f"{name} was given a vector that is not finite")
    return vector_ND


def means(value_NM: np.ndarray) -> np.ndarray:
    """Mean of each column over what is known; NaN where nothing is."""
    known_NM = np.isfinite(value_NM)
    count_M = known_NM.sum(0)
    total_M = np.where(known_NM, value_NM, 0.0).sum(0)
    return np.where(count_M > 0, total_M / np.maximum(count_M, 1), np.nan)


def shrunk(total_GM: np.ndarray, count_GM: np.ndarray, prior: float, mean_M: np.ndarray) -> np.ndarray:
    """Means of groups, pulled to the overall mean as if ``prior`` more observations of it had been made."""
    mean_M = np.nan_to_num(mean_M)
    weight_GM = count_GM + prior
    return np.where(weight_GM > 0, (total_GM + prior * mean_M) / np.where(weight_GM > 0, weight_GM, 1.0), mean_M)


def totals(value_NM: np.ndarray, group_N: np.ndarray, num_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count of the known values of each group and model."""
    known_NM = np.isfinite(value_NM)
    total_GM, count_GM = np.zeros((2, num_groups, value_NM.shape[1]))
    np.add.at(total_GM, group_N, np.where(known_NM, value_NM, 0.0))
    np.add.at(count_GM, group_N, known_NM.astype(float))
    return total_GM, count_GM


def closed(quality_NM: np.ndarray, mean_M: np.ndarray) -> np.ndarray:
    """Qualities with -inf for models of which no score was ever seen, so that they are not chosen."""
    return np.where(np.isfinite(mean_M), quality_NM, -np.inf)


def folds(num_rows: int, parts: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows to learn from and rows to check on, ``parts`` times; every row is checked on once."""
    order = np.random.default_rng(seed).permutation(num_rows)
    for part in range(parts):
        held_N = np.zeros(num_rows, bool)
        held_N[order[part::parts]] = True
        yield np.flatnonzero(~held_N), np.flatnonzero(held_N)


def lot(query: Query) -> tuple[str, ...]:
    """What a draw for a query is a hash of: its text and the request, so that copies of a question are drawn each for itself."""
    return (query.text, query.request_id) if query.request_id else (query.text,)


def share(*what: object) -> float:
    """A number in [0, 1) that is a hash of ``what``: chance that falls the same way on every machine and in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, what)).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
