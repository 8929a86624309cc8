"""Peers that search among some ids alone, for `benchmarks/hnsw.py`: one query at a time, by what each has for it."""
# Shapes: N vectors, D dimension

from collections.abc import Callable
from typing import Any

import numpy as np

from _vector_peers import FLOAT, K, contestants

# Of one query at an ef: ids.
Search = Callable[[np.ndarray, int], np.ndarray]


def filtering(base_ND: np.ndarray, setting: tuple[int, int]) -> dict[str, Callable[[np.ndarray], Search]]:
    """For each peer: from which ids are allowed, bool [N], to a search."""
    makers = {"hnswlib": by_function, "faiss": by_bitmap}
    built = {one.name: one.build(base_ND, setting) for one in contestants() if one.kind == FLOAT and one.name in makers}
    return {name: lambda allowed_N, name=name: makers[name](built[name], allowed_N) for name in built}  # type: ignore[misc]


def by_function(index: Any, allowed_N: np.ndarray) -> Search:
    """hnswlib's: a function of Python that is called for every element that might be returned."""
    is_allowed = set(np.flatnonzero(allowed_N).tolist()).__contains__

    def search(query_D: np.ndarray, ef: int) -> np.ndarray:
        index.aim(ef)
        return index.index.knn_query(query_D, K, num_threads=1, filter=is_allowed)[0]

    return search


def by_bitmap(index: Any, allowed_N: np.ndarray) -> Search:
    """faiss': a bit for each id."""
    import faiss

    bits = np.packbits(allowed_N, bitorder="little")
    parameters = faiss.SearchParametersHNSW(sel=faiss.IDSelectorBitmap(bits), efSearch=K)

    def search(query_D: np.ndarray, ef: int) -> np.ndarray:
        parameters.efSearch = ef
        return index.index.search(query_D[None], K, params=parameters)[1]

    return search
