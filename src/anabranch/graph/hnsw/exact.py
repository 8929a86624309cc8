"""The exact twin of the index: every distance, in torch, on any device."""
# Shapes: N vectors, D dimension, Q queries, K neighbours

from typing import Any

import numpy as np

from anabranch.errors import BackendError, InputError
from anabranch.extras import require
from anabranch.graph.hnsw.checks import as_distinct, as_ids, as_positive, as_vectors, is_tensor
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
        device: of the work, such as "cuda"; None for that of ``vectors`` (the processor for arrays).

    Returns:
        ids, int64 [Q, K], and distances, float32 [Q, K]; -1 and infinity where N < k. Tensors, on their device, where queries are.

    Raises:
        InputError: as `HNSW.search`.
        BackendError: torch is missing, or has no such device.
    """
    require("torch", by="brute_force")
    import torch

    if metric not in METRICS:
        raise InputError(f"metric is {metric!r}; it must be one of {', '.join(METRICS)}")
    k = as_positive(k, "k")
    try:
        place = torch.device(device if device is not None else vectors.device if is_tensor(vectors) else "cpu")
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise BackendError(f"torch has no device {device!r} here: {error}") from error
    shape = np.shape(vectors) if not is_tensor(vectors) else tuple(vectors.shape)
    if len(shape) != 2:
        raise InputError(f"vectors have the shape {list(shape)}; they must be rows")
    dim = 8 * shape[1] if metric == "hamming" and "bool" not in str(vectors.dtype) else shape[1]
    vector_ND = as_vectors(vectors, dim, metric, "vectors")
    query_QD = as_vectors(queries, dim, metric, "queries")
    id_N = np.arange(len(vector_ND)) if ids is None else as_distinct(as_ids(ids, len(vector_ND)))
    # So that the order of rows is that of ids.
    order = np.argsort(id_N)
    found_id, found = np.full((len(query_QD), k), -1), np.full((len(query_QD), k), np.inf, np.float32)
    held = min(k, len(vector_ND))
    if held and metric == "hamming":
        index_QK, found[:, :held] = _nearest_bits(torch, vector_ND[order], query_QD, held, place)
        found_id[:, :held] = id_N[order][index_QK]
    elif held:
        row_ND = torch.from_numpy(vector_ND[order]).to(place)
        step = max(1, PIECE // max(len(vector_ND), (held + SLACK) * shape[1]))
        for begin in range(0, len(query_QD), step):
            query_PD = torch.from_numpy(query_QD[begin : begin + step]).to(place)
            index_PK, distance_PK = _nearest(torch, row_ND, query_PD, held, metric)
            found_id[begin : begin + step, :held] = id_N[order][index_PK.cpu().numpy()]
            found[begin : begin + step, :held] = distance_PK.cpu().numpy()
    if not is_tensor(queries):
        return found_id, found
    return tuple(torch.from_numpy(array).to(queries.device) for array in (found_id, found))  # type: ignore[return-value]


def _nearest_bits(
    torch: Any, row_ND: np.ndarray, query_QD: np.ndarray, k: int, place: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Of packed bits: places and distances [Q, K]. Bits that differ are |a| + |b| - 2 <a, b>, which 32 bits hold exactly."""
    index_QK, distance_QK = np.empty((len(query_QD), k), np.int64), np.empty((len(query_QD), k), np.float32)
    size = 8 * row_ND.shape[1]
    many = max(1, PIECE // size)
    for start in range(0, len(query_QD), many):
        query_PD = torch.from_numpy(np.unpackbits(query_QD[start : start + many], axis=1)).to(place).float()
        best_PK: Any = None
        step = max(1, PIECE // max(size, len(query_PD)))
        for begin in range(0, len(row_ND), step):
            bits_RD = torch.from_numpy(np.unpackbits(row_ND[begin : begin + step], axis=1)).to(place).float()
            bits_PR = query_PD.sum(1, keepdim=True) + bits_RD.sum(1) - 2 * query_PD @ bits_RD.T
            # Distance and place in one number: equal distances are many, and all of them count.
            key_PR = bits_PR.long() * len(row_ND) + torch.arange(begin, begin + len(bits_RD), device=place)
            key_PR = key_PR if best_PK is None else torch.cat([best_PK, key_PR], 1)
            best_PK = key_PR.topk(min(k, key_PR.shape[1]), largest=False).values
        key_PK = best_PK.cpu().numpy()
        index_QK[start : start + many] = key_PK % len(row_ND)
        distance_QK[start : start + many] = key_PK // len(row_ND)
    return index_QK, distance_QK


def _nearest(torch: Any, row_ND: Any, query_PD: Any, k: int, metric: str) -> tuple[Any, Any]:
    product_PN = query_PD @ row_ND.T
    quick_PN = -product_PN if metric != "l2" else (row_ND * row_ND).sum(1) - 2 * product_PN
    near_PK = quick_PN.topk(min(k + SLACK, len(row_ND)), largest=False).indices.sort(1).values
    close_PKD = row_ND[near_PK]
    if metric == "l2":
        distance_PK = (close_PKD - query_PD[:, None]).square().sum(2)
    else:
        distance_PK = 1 - (close_PKD * query_PD[:, None]).sum(2)
    best_PK = distance_PK.sort(stable=True, dim=1)
    return near_PK.gather(1, best_PK.indices[:, :k]), best_PK.values[:, :k]
