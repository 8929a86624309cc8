"""The exact twin of the index: every distance, in numpy, or in torch on any device."""
# Shapes: N vectors, D dimension, Q queries, K neighbours

from types import ModuleType
from typing import Any

import numpy as np

from anabranch.bounds import shown
from anabranch.errors import BackendError, InputError, first_line
from anabranch.extras import require
from anabranch.graph.arguments import check_one_of
from anabranch.graph.hnsw.checks import as_distinct, as_ids, as_positive, as_vectors, is_tensor, results
from anabranch.graph.hnsw.storage import METRICS

# Numbers at once.
PIECE = 1 << 24

# Candidates of the quick formula beside k, which are measured again.
SLACK = 32


def brute_force(
    vectors: Any,
    queries: Any,
    k: int = 10,
    metric: str = "l2",
    *,
    ids: Any = None,
    device: Any = None,
) -> tuple[Any, Any]:
    """The k nearest of each query, exactly; in the order of (distance, id).

    Distances of all pairs come from one matrix product; the k + 32 nearest by that are measured again as (a - b)^2, whose rounding does not
    grow with the length of vectors.

    Args:
        vectors: [N, D], an array or a tensor.
        queries: [Q, D] or [D].
        k: how many.
        metric: "l2" (squared), "ip", "cosine" or "hamming" (packed bits, or truth values), as of `HNSW`.
        ids: int [N]; None for 0 ... N - 1.
        device: of the work, such as "cuda"; None for that of ``vectors`` (the processor for arrays, which needs no torch).

    Returns:
        ids, int64 [Q, K], and distances, float32 [Q, K]; -1 and infinity where N < k. Tensors, on their device, where queries are.

    Raises:
        InputError: as `HNSW.search`.
        MissingExtraError: a device is named and torch is missing.
        BackendError: torch has no such device.
    """
    check_one_of("metric", metric, METRICS)
    k = as_positive(k, "k")
    if not (device is None or isinstance(device, str) or is_tensor(vectors) or "torch" in type(device).__module__):
        raise InputError(f"device is {shown(device)}; it must be the name of one, or None")
    work: _Numpy | _Torch = _Numpy()
    if device is not None or is_tensor(vectors):
        work = _Torch(device if device is not None else vectors.device)
    try:
        held = vectors if is_tensor(vectors) else np.asarray(vectors)
    except ValueError:
        raise InputError("vectors are of different lengths, so they are no array") from None
    if len(shape := tuple(held.shape)) != 2:
        raise InputError(f"vectors have the shape {list(shape)}; they must be rows")
    dim = 8 * shape[1] if metric == "hamming" and "bool" not in str(held.dtype) else shape[1]
    vector_ND = as_vectors(vectors, dim, metric, "vectors")
    query_QD = as_vectors(queries, dim, metric, "queries")
    id_N = np.arange(len(vector_ND)) if ids is None else as_distinct(as_ids(ids, len(vector_ND)))
    # So that the order of rows is that of ids.
    order = np.argsort(id_N)
    found_id, found = results(len(query_QD), k)
    held = min(k, len(vector_ND))
    if held:
        found_id[:, :held], found[:, :held] = _measured(work, vector_ND[order], query_QD, held, metric)
        found_id[:, :held] = id_N[order][found_id[:, :held]]
    if not is_tensor(queries):
        return found_id, found
    import torch

    return tuple(torch.from_numpy(array).to(queries.device) for array in (found_id, found))  # type: ignore[return-value]


def _measured(
    work: "_Numpy | _Torch", row_ND: np.ndarray, query_QD: np.ndarray, k: int, metric: str
) -> tuple[np.ndarray, np.ndarray]:
    """Places and distances [Q, K]."""
    if metric == "hamming":
        return _nearest_bits(work, row_ND, query_QD, k)
    rows, dim = work.take(row_ND), row_ND.shape[1]
    place_QK, distance_QK = np.empty((len(query_QD), k), np.int64), np.empty((len(query_QD), k), np.float32)
    step = max(1, PIECE // max(len(row_ND), (k + SLACK) * dim))
    for begin in range(0, len(query_QD), step):
        piece = slice(begin, begin + step)
        place_QK[piece], distance_QK[piece] = work.nearest(rows, work.take(query_QD[piece]), k, metric)
    return place_QK, distance_QK


def _nearest_bits(
    work: "_Numpy | _Torch", row_ND: np.ndarray, query_QD: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of packed bits: places and distances [Q, K]. Bits that differ are |a| + |b| - 2 <a, b>, which 32 bits hold exactly."""
    place_QK, distance_QK = np.empty((len(query_QD), k), np.int64), np.empty((len(query_QD), k), np.float32)
    size = 8 * row_ND.shape[1]
    many = max(1, PIECE // size)
    for start in range(0, len(query_QD), many):
        query_PD = np.unpackbits(query_QD[start : start + many], axis=1).astype(np.float32)
        best_PK = np.empty((len(query_PD), 0), np.int64)
        step = max(1, PIECE // max(size, len(query_PD)))
        for begin in range(0, len(row_ND), step):
            bit_RD = np.unpackbits(row_ND[begin : begin + step], axis=1).astype(np.float32)
            bits_PR = query_PD.sum(1, keepdims=True) + bit_RD.sum(1) - 2 * work.products(query_PD, bit_RD)
            # Distance and place in one number: equal distances are many, and all of them count.
            key_PR = bits_PR.astype(np.int64) * len(row_ND) + np.arange(begin, begin + len(bit_RD))
            key_PR = np.concatenate([best_PK, key_PR], 1)
            most = min(k, key_PR.shape[1])
            best_PK = np.partition(key_PR, most - 1, axis=1)[:, :most]
        key_PK = np.sort(best_PK, axis=1)
        place_QK[start : start + many] = key_PK % len(row_ND)
        distance_QK[start : start + many] = key_PK // len(row_ND)
    return place_QK, distance_QK


class _Numpy:
    """Distances of arrays on the processor."""

    def take(self, array: np.ndarray) -> np.ndarray:
        return array

    def products(self, a_PD: np.ndarray, b_RD: np.ndarray) -> np.ndarray:
        """<a, b> of all pairs."""
        product: np.ndarray = a_PD @ b_RD.T
        return product

    def nearest(self, row_ND: np.ndarray, query_PD: np.ndarray, k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
        product_PN = query_PD @ row_ND.T
        quick_PN = -product_PN if metric != "l2" else np.einsum("nd,nd->n", row_ND, row_ND) - 2 * product_PN
        most = min(k + SLACK, len(row_ND))
        near_PK = np.sort(np.argpartition(quick_PN, most - 1, axis=1)[:, :most], axis=1)
        close_PKD = row_ND[near_PK]
        if metric == "l2":
            distance_PK = np.square(close_PKD - query_PD[:, None]).sum(2)
        else:
            distance_PK = 1 - (close_PKD * query_PD[:, None]).sum(2)
        best_PK = np.argsort(distance_PK, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(near_PK, best_PK, 1), np.take_along_axis(distance_PK, best_PK, 1)


class _Torch:
    """The same in torch. Raises MissingExtraError without it, BackendError where it has no such device."""

    def __init__(self, device: Any) -> None:
        require("torch", by="brute_force with a device", of="lm")
        import torch

        self._torch: ModuleType = torch
        try:
            self._place = torch.device(device)
            torch.empty(0, device=self._place)
        except (RuntimeError, AssertionError) as error:
            raise BackendError(f"torch has no device {shown(device)} here: {first_line(error)[:200]}") from error

    def take(self, array: np.ndarray) -> Any:
        return self._torch.from_numpy(array).to(self._place)

    def products(self, a_PD: np.ndarray, b_RD: np.ndarray) -> np.ndarray:
        """<a, b> of all pairs."""
        product: np.ndarray = (self.take(a_PD) @ self.take(b_RD).T).cpu().numpy()
        return product

    def nearest(self, row_ND: Any, query_PD: Any, k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
        product_PN = query_PD @ row_ND.T
        quick_PN = -product_PN if metric != "l2" else (row_ND * row_ND).sum(1) - 2 * product_PN
        near_PK = quick_PN.topk(min(k + SLACK, len(row_ND)), largest=False).indices.sort(1).values
        close_PKD = row_ND[near_PK]
        if metric == "l2":
            distance_PK = (close_PKD - query_PD[:, None]).square().sum(2)
        else:
            distance_PK = 1 - (close_PKD * query_PD[:, None]).sum(2)
        best_PK = distance_PK.sort(stable=True, dim=1)
        return near_PK.gather(1, best_PK.indices[:, :k]).cpu().numpy(), best_PK.values[:, :k].cpu().numpy()
