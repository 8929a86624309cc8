"""A graph in one checked file (`anabranch.graph.array_file`): its rows, weights, names, and whether edges have a direction."""
# Shapes: N nodes, M stored edges

from pathlib import Path
from typing import Any

import numpy as np

from anabranch.graph import csr
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.header import described
from anabranch.graph.names import check_saved_names, names_arrays, names_from

KIND = "graph"

Stored = tuple[np.ndarray, np.ndarray, np.ndarray | None, bool, np.ndarray | None]


def write(
    path: str | Path,
    indptr: np.ndarray,
    indices: np.ndarray,
    weights: np.ndarray | None,
    names: np.ndarray | None,
    is_directed: bool,
) -> None:
    """Write a graph. Raises as `Graph.save`."""
    arrays = {"indptr": indptr, "indices": indices}
    if weights is not None:
        arrays["weights"] = weights
    if names is not None:
        check_saved_names(names)
    write_arrays(path, KIND, {**arrays, **names_arrays(names)}, {"is_directed": is_directed})


def read(path: str | Path, *, mmap: bool, verify: bool | None) -> Stored:
    """``indptr``, ``indices``, ``weights``, ``is_directed`` and ``names`` of a graph. Raises as `Graph.load`."""
    found = read_arrays(path, KIND, mmap=mmap, verify=verify)
    with described(path, "a graph"):
        return _checked(found.arrays, found.meta)


def _checked(arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> Stored:
    """Raises ValueError for arrays that do not make a graph, UnicodeDecodeError (which is one) for names that are no text."""
    indptr, indices, weights, names = arrays["indptr"], arrays["indices"], arrays.get("weights"), names_from(arrays)
    if indptr.dtype != np.int64 or indptr.ndim != 1 or not len(indptr):
        raise ValueError("indptr is not a list of int64")
    if indices.dtype not in (np.int32, np.int64) or indices.ndim != 1:
        raise ValueError("indices are not a list of integers")
    if indptr[0] != 0 or indptr[-1] != len(indices):
        raise ValueError("indptr does not fit indices")
    if weights is not None and (weights.dtype != np.float32 or weights.shape != indices.shape):
        raise ValueError("weights do not fit indices")
    if names is not None and names.shape != (len(indptr) - 1,):
        raise ValueError("names do not fit nodes")
    if names is not None and names.dtype == object and len(set(names.tolist())) < len(names):
        raise ValueError("several nodes have one name")
    if (row := csr.find_fault(indptr, indices, len(indices))) >= 0:
        raise ValueError(f"the edges of node {row} are out of order or range")
    return indptr, indices, weights, bool(meta["is_directed"]), names
