"""Packed bits for `benchmarks/hnsw.py`: ours beside faiss' binary index and usearch's b1."""
# Shapes: N vectors, B bytes of each, D dimension, Q queries

import importlib.util
from collections.abc import Callable

import numpy as np

from _vector_peers import K
from anabranch.graph.hnsw import HNSW, brute_force

Search = Callable[[np.ndarray, int], np.ndarray]
M, CANDIDATES = 16, 100


def bits_of(vector_ND: np.ndarray) -> np.ndarray:
    """Two bits of each number, whether it is above 0 and above 1, packed."""
    return np.packbits(np.concatenate([vector_ND > 0, vector_ND > 1], 1), axis=1)


def score_of(base_NB: np.ndarray, query_QB: np.ndarray) -> Callable[[np.ndarray], float]:
    """What share of what was found is as near as the tenth nearest: many are equally far."""
    far_QK = brute_force(base_NB, query_QB, K, "hamming")[1]

    def score(found_QK: np.ndarray) -> float:
        differ_QK = np.unpackbits(base_NB[found_QK] ^ query_QB[:, None], axis=2).sum(2)
        return float((differ_QK <= far_QK[:, -1:]).mean())

    return score


def builds() -> dict[str, Callable[[np.ndarray], Search]]:
    """Who builds an index of them; from that a search at an ef."""
    found = {"ours": ours}
    found |= {"faiss": faiss_binary} if importlib.util.find_spec("faiss") else {}
    return found | ({"usearch b1": usearch_bits} if importlib.util.find_spec("usearch") else {})


def ours(base_NB: np.ndarray) -> Search:
    """`HNSW` with "hamming"."""
    index = HNSW(8 * base_NB.shape[1], "hamming", M=M, ef_construction=CANDIDATES, workers=1)
    index.add(base_NB)
    return lambda query_QB, ef: index.search(query_QB, K, ef)[0]


def faiss_binary(base_NB: np.ndarray) -> Search:
    """faiss' IndexBinaryHNSW."""
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.IndexBinaryHNSW(8 * base_NB.shape[1], M)
    index.hnsw.efConstruction = CANDIDATES
    index.add(base_NB)

    def search(query_QB: np.ndarray, ef: int) -> np.ndarray:
        index.hnsw.efSearch = ef
        return index.search(query_QB, K)[1]

    return search


def usearch_bits(base_NB: np.ndarray) -> Search:
    """usearch's b1."""
    from usearch.index import Index

    index = Index(ndim=8 * base_NB.shape[1], metric="hamming", dtype="b1", connectivity=M, expansion_add=CANDIDATES)
    index.add(np.arange(len(base_NB)), base_NB, threads=1)

    def search(query_QB: np.ndarray, ef: int) -> np.ndarray:
        index.expansion_search = ef
        return index.search(query_QB, K, threads=1).keys.astype(np.int64)

    return search
