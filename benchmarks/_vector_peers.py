"""Who searches vectors in `benchmarks/hnsw.py`, by class of what is kept of a vector, each with the settings that it is tuned over.

    float32            vectors as they are
    int8 + float32     the walk goes over bytes, the best found are measured again by vectors that are kept beside
    int8               bytes alone
    int4 + float32     half bytes, and vectors beside
    codes + float32    a byte for each four numbers, and vectors beside

Every contestant is built by one thread, from vectors [N, D], by one of its settings; its effort (``ef``, or the window) is set apart from
the searches, which answer many queries in one call or one query in each.
"""
# Shapes: N vectors, D dimension, Q queries

import contextlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from anabranch.graph.hnsw import HNSW

K = 10
# Candidates of a search beyond which nobody is asked.
MOST = 1280
FLOAT, BESIDE, BYTES, HALVES, CODES = "float32", "int8 + float32", "int8", "int4 + float32", "codes + float32"
KINDS = (FLOAT, BESIDE, BYTES, HALVES, CODES)


class Setting(NamedTuple):
    """Of a graph.

    Attributes:
        M: links of a new element; 2 M on the lowest level.
        candidates: how many are considered for them.
        is_filled: whether lists that pruning leaves short are filled up with the nearest that it rejected. On vectors of many independent
            dimensions it leaves 5 of 32. Ours and faiss can; SVS prunes less by its own rule.
    """

    M: int
    candidates: int
    is_filled: bool = False


SETTINGS = {
    "M 16, 100 candidates": Setting(16, 100),
    "M 32, 200 candidates": Setting(32, 200),
    "M 16, 100 candidates, filled": Setting(16, 100, True),
    "M 32, 200 candidates, filled": Setting(32, 200, True),
}


def least(reaches: Callable[[int], bool]) -> int | None:
    """The smallest effort that reaches something (which comes nearer with it but for noise); None where it is out of reach."""
    low, high = K - 1, K
    while not reaches(high):
        low, high = high, 2 * high
        if high > MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


class Built(Protocol):
    """An index of a contestant."""

    def settle(self) -> None:
        """Whatever else it tunes itself by, once it is the one that is measured; that is not timed."""

    def aim(self, effort: int) -> None:
        """How much the next searches look for."""

    def batch(self, query_QD: np.ndarray) -> np.ndarray:
        """Ids [Q, K]."""

    def one(self, query_D: np.ndarray) -> np.ndarray:
        """Ids [K] or [1, K]."""

    def saved_bytes(self) -> int:
        """Bytes of the index on disk."""


class Contestant(NamedTuple):
    """One of them; ``build`` makes an index by a setting, one that is filled where it can."""

    name: str
    kind: str
    build: Callable[[np.ndarray, Setting], Built]
    can_fill: bool = False

    def settings(self) -> list[str]:
        """What it is tuned over."""
        return [name for name, setting in SETTINGS.items() if self.can_fill or not setting.is_filled]


def contestants() -> list[Contestant]:
    """All whose packages are there, ours first in each class; the others are named."""
    found = [
        Contestant("ours", FLOAT, lambda base_ND, setting: Ours(base_ND, setting, dtype="f32"), can_fill=True),
        Contestant("ours", BESIDE, lambda base_ND, setting: Ours(base_ND, setting, dtype="i8"), can_fill=True),
        Contestant(
            "ours", BYTES, lambda base_ND, setting: Ours(base_ND, setting, dtype="i8", rerank=False), can_fill=True
        ),
        Contestant("ours", HALVES, lambda base_ND, setting: Ours(base_ND, setting, quantization="int4"), can_fill=True),
        Contestant("ours", CODES, lambda base_ND, setting: Ours(base_ND, setting, quantization="pq"), can_fill=True),
    ]
    for package, made in {
        "hnswlib": _hnswlib,
        "faiss": _faiss,
        "usearch": _usearch,
        "glass": _glass,
        "svs": _svs,
    }.items():
        if importlib.util.find_spec(package) is None:
            print(f"not installed, left out: {package}", file=sys.stderr)
        else:
            found += made()
    return found


def compile_kernels() -> None:
    """Compile what builds, single elements and a repair call, so that no row but that of the first call holds a compiler.

    Groups far apart and few links: some elements are cut off, and linked again.
    """
    draw = np.random.default_rng(0)
    middle_ND = np.repeat(50 * draw.standard_normal((30, 16), np.float32), 10, axis=0)
    index = HNSW(16, M=2, ef_construction=4, workers=1)
    index.add(middle_ND + draw.standard_normal(middle_ND.shape, np.float32))
    for vector_D in middle_ND[:4]:
        index.add(vector_D)
    index.add(np.concatenate([middle_ND] * 4) + draw.standard_normal((1200, 16), np.float32))
    index.repair()
    index.search(middle_ND, K)
    index.search(middle_ND[0], K)


@contextlib.contextmanager
def _file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "index"


def _size(path: Path) -> int:
    """Of a file, or of all files of a folder."""
    return (
        path.stat().st_size if path.is_file() else sum(one.stat().st_size for one in path.rglob("*") if one.is_file())
    )


class Ours(Built):
    """`HNSW`."""

    def __init__(self, base_ND: np.ndarray, setting: Setting, **options: Any) -> None:
        M, candidates, fill = setting
        self.index = HNSW(base_ND.shape[1], M=M, ef_construction=candidates, keep_pruned=fill, workers=1, **options)
        self.index.add(base_ND)
        self._effort = K

    def aim(self, effort: int) -> None:
        self._effort = effort

    def batch(self, query_QD: np.ndarray) -> np.ndarray:
        return self.index.search(query_QD, K, self._effort)[0]

    def one(self, query_D: np.ndarray) -> np.ndarray:
        return self.index.search(query_D, K, self._effort)[0]

    def saved_bytes(self) -> int:
        with _file() as path:
            self.index.save(path)
            return _size(path)


class Hnswlib(Built):
    """hnswlib's Index."""

    def __init__(self, base_ND: np.ndarray, setting: Setting) -> None:
        import hnswlib

        self.index = hnswlib.Index("l2", base_ND.shape[1])
        self.index.init_index(len(base_ND), M=setting.M, ef_construction=setting.candidates)
        self.index.add_items(base_ND, num_threads=1)

    def aim(self, effort: int) -> None:
        self.index.set_ef(effort)

    def batch(self, query_QD: np.ndarray) -> np.ndarray:
        return self.index.knn_query(query_QD, K, num_threads=1)[0].astype(np.int64)

    def one(self, query_D: np.ndarray) -> np.ndarray:
        return self.index.knn_query(query_D, K, num_threads=1)[0]

    def saved_bytes(self) -> int:
        return int(self.index.index_file_size())


def _hnswlib() -> list[Contestant]:
    return [Contestant("hnswlib", FLOAT, Hnswlib)]


class Faiss(Built):
    """faiss' IndexHNSWFlat, -SQ or -PQ; within an IndexRefineFlat that measures the best again, 3 K of bytes, all that is held of less."""

    def __init__(self, base_ND: np.ndarray, setting: Setting, kind: str) -> None:
        import faiss

        faiss.omp_set_num_threads(1)
        self._faiss, (M, candidates, fill), dim = faiss, setting, base_ND.shape[1]
        scalar = faiss.ScalarQuantizer.QT_4bit if kind == HALVES else faiss.ScalarQuantizer.QT_8bit
        if kind == FLOAT:
            self.inner = faiss.IndexHNSWFlat(dim, M)
        elif kind == CODES:
            self.inner = faiss.IndexHNSWPQ(dim, dim // 4, M)
        else:
            self.inner = faiss.IndexHNSWSQ(dim, scalar, M)
        self.inner.hnsw.efConstruction, self.inner.keep_max_size_level0 = candidates, fill
        self.index, self._is_wide = self.inner, kind in (HALVES, CODES)
        if kind not in (FLOAT, BYTES):
            self.index = faiss.IndexRefineFlat(self.inner)
            self.index.k_factor = 3
        self.index.train(base_ND[:32768])
        self.index.add(base_ND)

    def aim(self, effort: int) -> None:
        self.inner.hnsw.efSearch = effort
        if self._is_wide:
            self.index.k_factor = effort / K

    def batch(self, query_QD: np.ndarray) -> np.ndarray:
        return self.index.search(query_QD, K)[1]

    def one(self, query_D: np.ndarray) -> np.ndarray:
        return self.index.search(query_D[None], K)[1]

    def saved_bytes(self) -> int:
        return int(self._faiss.serialize_index(self.index).nbytes)


def _faiss() -> list[Contestant]:
    kinds = {
        FLOAT: "faiss",
        BESIDE: "faiss SQ8 + refine",
        BYTES: "faiss SQ8",
        HALVES: "faiss SQ4 + refine",
        CODES: "faiss PQ + refine",
    }
    return [
        Contestant(name, kind, lambda base_ND, setting, kind=kind: Faiss(base_ND, setting, kind), True)  # type: ignore[misc]
        for kind, name in kinds.items()
    ]


class Usearch(Built):
    """usearch's Index. It scales each vector by its own length before it rounds to bytes, which L2 does not bear: it is given bytes."""

    def __init__(self, base_ND: np.ndarray, setting: Setting, kind: str) -> None:
        from usearch.index import Index

        self._scale = np.float32(127 / np.abs(base_ND).max()) if kind == BYTES else None
        dtype = "i8" if kind == BYTES else "f32"
        self.index = Index(
            ndim=base_ND.shape[1], metric="l2sq", dtype=dtype, connectivity=setting.M, expansion_add=setting.candidates
        )
        self.index.add(np.arange(len(base_ND)), self._scaled(base_ND), threads=1)

    def _scaled(self, vector_ND: np.ndarray) -> np.ndarray:
        if self._scale is None:
            return vector_ND
        return np.rint(vector_ND * self._scale).clip(-127, 127).astype(np.int8)

    def aim(self, effort: int) -> None:
        self.index.expansion_search = effort

    def batch(self, query_QD: np.ndarray) -> np.ndarray:
        return self.index.search(self._scaled(query_QD), K, threads=1).keys.astype(np.int64)

    def one(self, query_D: np.ndarray) -> np.ndarray:
        return self.index.search(self._scaled(query_D), K, threads=1).keys

    def saved_bytes(self) -> int:
        return int(self.index.serialized_length)


def _usearch() -> list[Contestant]:
    return [
        Contestant("usearch", FLOAT, lambda base_ND, setting: Usearch(base_ND, setting, FLOAT)),
        Contestant("usearch i8", BYTES, lambda base_ND, setting: Usearch(base_ND, setting, BYTES)),
    ]


class Glass(Built):
    """Glass' HNSW, searched over vectors as they are or over bytes of them, with the best measured again or not."""

    def __init__(self, base_ND: np.ndarray, setting: Setting, search: str, refine: str) -> None:
        import glass

        glass.set_num_threads(1)
        self._base_ND = base_ND
        index = glass.Index(index_type="HNSW", metric="L2", quant="FP32", R=2 * setting.M, L=setting.candidates)
        self._graph = index.build(base_ND)
        # A searcher takes the graph for its own.
        with _file() as path:
            self._graph.save(str(path))
            self._graph_bytes = _size(path)
        self._searcher = glass.Searcher(
            graph=self._graph, data=base_ND, metric="L2", quantizer=search, refine_quant=refine
        )
        self._bytes = base_ND.shape[1] * ({"FP32": 4}.get(search, 1) + {"FP32": 4}.get(refine, 0))

    def settle(self) -> None:
        # It tries how far ahead to ask for memory: up to a minute.
        self._searcher.optimize(1)

    def aim(self, effort: int) -> None:
        self._searcher.set_ef(effort)

    def batch(self, query_QD: np.ndarray) -> np.ndarray:
        return np.asarray(self._searcher.batch_search(query_QD, K, num_threads=1)[0]).reshape(len(query_QD), K)

    def one(self, query_D: np.ndarray) -> np.ndarray:
        return np.asarray(self._searcher.search(query_D, K)[0])

    def saved_bytes(self) -> int:
        return self._graph_bytes + len(self._base_ND) * self._bytes


def _glass() -> list[Contestant]:
    return [
        Contestant("glass", FLOAT, lambda base_ND, setting: Glass(base_ND, setting, "FP32", "")),
        Contestant("glass SQ8 + FP32", BESIDE, lambda base_ND, setting: Glass(base_ND, setting, "SQ8U", "FP32")),
        Contestant("glass SQ8", BYTES, lambda base_ND, setting: Glass(base_ND, setting, "SQ8U", "")),
    ]


class Svs(Built):
    """Intel's SVS, a Vamana graph, over vectors or over its codes (LVQ), with rests of these to measure the best again."""

    def __init__(self, base_ND: np.ndarray, setting: Setting, bits: tuple[int, int] | None) -> None:
        import svs

        parameters = svs.VamanaBuildParameters(
            graph_max_degree=2 * setting.M, window_size=setting.candidates, alpha=1.2
        )
        if bits is None:
            self.index = svs.Vamana.build(parameters, base_ND, svs.DistanceType.L2, num_threads=1)
            return
        with tempfile.TemporaryDirectory() as folder:
            # It reads what it codes from a file.
            path = os.path.join(folder, "vectors.fvecs")
            svs.write_vecs(base_ND, path)
            vectors = svs.VectorDataLoader(path, svs.DataType.float32, dims=base_ND.shape[1])
            loader = svs.LVQLoader(vectors, primary=bits[0], residual=bits[1], padding=32)
            self.index = svs.Vamana.build(parameters, loader, svs.DistanceType.L2, num_threads=1)

    def aim(self, effort: int) -> None:
        self.index.search_window_size = effort

    def batch(self, query_QD: np.ndarray) -> np.ndarray:
        return self.index.search(query_QD, K)[0].astype(np.int64)

    def one(self, query_D: np.ndarray) -> np.ndarray:
        return self.index.search(query_D[None], K)[0]

    def saved_bytes(self) -> int:
        with tempfile.TemporaryDirectory() as folder:
            self.index.save(*(os.path.join(folder, name) for name in ("config", "graph", "data")))
            return _size(Path(folder))


def _svs() -> list[Contestant]:
    kinds = {
        "svs": (FLOAT, None),
        "svs LVQ8x8": (BESIDE, (8, 8)),
        "svs LVQ8": (BYTES, (8, 0)),
        "svs LVQ4x8": (HALVES, (4, 8)),
    }
    return [
        Contestant(name, kind, lambda base_ND, setting, bits=bits: Svs(base_ND, setting, bits))  # type: ignore[misc]
        for name, (kind, bits) in kinds.items()
    ]
