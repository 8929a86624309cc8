"""Adjacency matrices and edge arrays in NumPy ``.npz`` and MATLAB ``.mat`` files. Both are read whole."""
# Shapes: N nodes, E edges

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.bounds import near_name
from anabranch.errors import DataError, InputError, first_line
from anabranch.graph.formats.build import Rules
from anabranch.graph.store import Graph

_ENDS = (("row", "col"), ("source", "target"), ("src", "dst"))


@dataclass(frozen=True)
class Found:
    """A matrix in a file, under the name that ``variable`` chooses it by."""

    name: str
    matrix: Any


def read_npz(path: Path, rules: Rules, variable: str | None) -> Graph:
    """The graph of an ``.npz``: what `scipy.sparse.save_npz` writes, arrays ``X_data, X_indices, X_indptr, X_shape``, or lists of edges.

    Lists are ``row, col`` (with perhaps ``data`` and ``shape``), ``source, target`` or ``src, dst`` with perhaps ``weight`` and
    ``num_nodes``, or ``edge_index`` [2, E] with perhaps ``edge_weight`` or an ``edge_attr`` of one number an edge; they hold entries of
    the matrix, so an undirected edge stands in them both ways. Pickles are never read.
    """
    with open(path, "rb") as opened:
        if opened.read(6) == b"\x93NUMPY":
            raise DataError(f"{path} holds one array (.npy), not a sparse matrix or lists of edges")
    try:
        # Numpy leaves a bad file open.
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            names = list(file.files)
            found = _sparse_of(file, names)
            if not found and (lists := _lists_of(path, file, names)):
                return _of_lists(path, lists, rules)
            matrix = _choose(path, found, names, variable)
    except DataError:
        raise
    except InputError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:
        # Zip, zlib, numpy and pickle each raise their own for damage of their part.
        raise DataError(f"{path} cannot be read as .npz: {first_line(error)}") from error
    return of_matrix(path, matrix, rules)


def read_mat(path: Path, rules: Rules, variable: str | None) -> Graph:
    """The graph of a matrix in a ``.mat`` file of version 4 to 7.2: ``variable``, or the only square sparse one."""
    from scipy.io import loadmat
    from scipy.sparse import issparse

    with open(path, "rb") as file:
        start = file.read(128)
    if start.startswith(b"\x89HDF") or start.startswith(b"MATLAB 7.3"):
        raise DataError(f"{path} is a MATLAB 7.3 (HDF5) file; save it with '-v7'")
    try:
        held = (
            loadmat(str(path), spmatrix=False)
            if variable is None
            else loadmat(str(path), spmatrix=False, variable_names=[variable])
        )
        names = (
            [name for name in loadmat(str(path)) if not name.startswith("__")] if variable is not None else list(held)
        )
    except Exception as error:
        # The reader raises whatever the damage makes of its input.
        raise DataError(f"{path} cannot be read as .mat: {first_line(error)}") from error
    names = [name for name in names if not name.startswith("__")]
    if variable is not None and variable in held:
        return of_matrix(path, held[variable], rules)
    found = [Found(name, held[name]) for name in names if name in held and issparse(held[name])]
    square = [one for one in found if one.matrix.shape[0] == one.matrix.shape[1]]
    return of_matrix(path, _choose(path, square or found, names, variable), rules)


def of_matrix(path: Path, matrix: Any, rules: Rules) -> Graph:
    """`Graph.from_scipy` of a matrix in a file. Raises DataError naming the file."""
    shape = getattr(matrix, "shape", ())
    if rules.num_nodes is not None and shape and rules.num_nodes != shape[0]:
        raise DataError(f"{path} has {shape[0]:,} rows; num_nodes is {rules.num_nodes:,}")
    try:
        return Graph.from_scipy(matrix, rules.directed, drop_zero=rules.drop_zero, allow_negative=rules.allow_negative)
    except InputError as error:
        raise DataError(f"{path}: {error}") from error
    except (ValueError, IndexError, OverflowError, TypeError) as error:
        # Scipy's, of parts that do not fit each other.
        raise DataError(f"{path} holds a damaged matrix: {error}") from error


def _sparse_of(file: Mapping[str, np.ndarray], names: list[str]) -> list[Found]:
    from scipy.sparse import coo_array, csc_array, csr_array

    found = []
    for name in names:
        if not name.endswith("indptr"):
            continue
        prefix = name.removesuffix("indptr")
        if not {f"{prefix}indices", f"{prefix}data", f"{prefix}shape"} <= set(names):
            continue
        kind = str(file["format"].item().decode()) if prefix == "" and "format" in names else "csr"
        make = {"csr": csr_array, "csc": csc_array}.get(kind)
        if make is None:
            raise InputError(f"the matrix is stored as {kind!r}; csr, csc and coo are read")
        parts = (file[f"{prefix}data"], file[f"{prefix}indices"], file[f"{prefix}indptr"])
        _check_compressed(parts[1], parts[2])
        matrix = make(parts, shape=tuple(int(side) for side in file[f"{prefix}shape"]))
        matrix.check_format(full_check=True)
        found.append(Found(prefix.rstrip("_") or "matrix", matrix))
    if "format" in names and file["format"].item() == b"coo":
        shape = tuple(int(side) for side in file["shape"])
        found.append(Found("matrix", coo_array((file["data"], (file["row"], file["col"])), shape=shape)))
    return found


def _check_compressed(indices: np.ndarray, indptr: np.ndarray) -> None:
    """What scipy leaves unchecked: it drops entries beyond the last of ``indptr``, and later meets them. Raises InputError."""
    if len(indptr) == 0 or indptr[0] != 0 or (indptr[1:] < indptr[:-1]).any() or indptr[-1] > len(indices):
        raise InputError(f"indptr must rise from 0 to at most the number of entries, {len(indices):,}")


def _lists_of(path: Path, file: Mapping[str, np.ndarray], names: list[str]) -> dict[str, Any] | None:
    """Source, target, weight and number of nodes, if the file holds lists of edges."""
    ends = next(((a, b) for a, b in _ENDS if a in names and b in names), None)
    if ends is None and "edge_index" not in names:
        return None
    if ends is None and (file["edge_index"].ndim != 2 or file["edge_index"].shape[0] != 2):
        raise DataError(f"{path}: edge_index has the shape {file['edge_index'].shape}; it must be [2, edges]")
    source, target = file["edge_index"] if ends is None else (file[ends[0]], file[ends[1]])
    weight = next((file[name] for name in ("weight", "edge_weight", "data") if name in names), None)
    if weight is None and "edge_attr" in names and file["edge_attr"].size == len(source):
        # One number an edge, as of `from_pyg`.
        weight = file["edge_attr"].reshape(-1)
    num_nodes = int(file["num_nodes"]) if "num_nodes" in names else None
    if num_nodes is None and ends == ("row", "col") and "shape" in names:
        num_nodes = _side(path, file["shape"])
    return {"source": source, "target": target, "weight": weight, "num_nodes": num_nodes}


def _side(path: Path, shape: np.ndarray) -> int:
    """Of a square matrix. Raises DataError for what is none."""
    if shape.shape != (2,) or shape.dtype.kind not in "iu" or shape[0] != shape[1]:
        raise DataError(f"{path}: shape is {shape.tolist()}; the matrix of a graph is square")
    return int(shape[0])


def _of_lists(path: Path, lists: dict[str, Any], rules: Rules) -> Graph:
    num_nodes = lists["num_nodes"] if rules.num_nodes is None else rules.num_nodes
    try:
        return of_entries(lists["source"], lists["target"], lists["weight"], num_nodes, rules)
    except InputError as error:
        raise DataError(f"{path}: {error}") from error


def of_entries(source: Any, target: Any, weight: Any, num_nodes: int | None, rules: Rules, names: Any = None) -> Graph:
    """The graph of entries of a matrix; undirected if it is symmetric, or must be so by ``rules.directed``. Raises InputError."""
    graph = Graph.from_edges(
        source,
        target,
        weight,
        True,
        num_nodes,
        names=names,
        duplicates=rules.duplicates,
        drop_zero=rules.drop_zero,
        allow_negative=rules.allow_negative,
    )
    if graph.weights is not None and (graph.weights == 1).all():
        graph = graph.with_weights(None)
    return graph if rules.directed else graph._as_undirected(demanded=rules.directed is False)


def _choose(path: Path, found: list[Found], names: list[str], variable: str | None) -> Any:
    """The matrix that is asked for, or the only square one. Raises DataError or InputError naming what there is."""
    known = [one.name for one in found]
    if variable is not None:
        if variable not in known:
            there = known or names
            raise DataError(
                f"{path} has no matrix {variable!r}{near_name(variable, there)} (there: {', '.join(there) or 'nothing'})"
            )
        return found[known.index(variable)].matrix
    if not found:
        raise DataError(f"{path} holds no sparse matrix and no lists of edges (there: {', '.join(names) or 'nothing'})")
    square = [one for one in found if len(one.matrix.shape) == 2 and one.matrix.shape[0] == one.matrix.shape[1]]
    if len(square) > 1:
        raise DataError(
            f"{path} holds several square matrices; choose one with variable=: {', '.join(one.name for one in square)}"
        )
    return (square or found)[0].matrix
