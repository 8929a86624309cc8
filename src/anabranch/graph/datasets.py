"""Well-known small graphs by name, from the folder that ``ANABRANCH_DATA`` names (``graphs/`` in it) or an installed package.

Nothing is downloaded. Sizes are those of the graphs as loaded (undirected edges counted once, self-loops included):

    name           nodes    edges     what                                     labels                      source, licence
    blogcatalog    10,312   333,983   friendships of bloggers                  39, overlapping             Zafarani and Liu (ASU); MIT repo
    ppi             3,890    38,739   proteins that interact (Homo sapiens)    50, overlapping             BioGRID, node2vec; MIT repo
    dblp           51,264   127,968   authors who wrote together               60, one each                AMiner; MIT repo
    dblp_weighted  27,199    66,832   the same of 4 fields, weights 1 to 59    4 fields, soft membership   HARP; MIT repo
    cora            2,708     5,429   citations (directed)                     7, one each                 shchur/gnn-benchmark; MIT repo
    karate             34        78   members of a club (networkx)             2                           Zachary, 1977
    lesmis             77       254   characters of a novel, weighted (networkx)  none                     Knuth, 1993
"""
# Shapes: N nodes, C classes

import gzip
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.bounds import shown
from anabranch.errors import ConfigError, DataError, InputError
from anabranch.extras import require
from anabranch.graph.store import Graph
from anabranch.places import data_file


@dataclass(frozen=True)
class Dataset:
    """A graph with what is known of its nodes.

    Attributes:
        graph: the graph.
        labels_NC: `scipy.sparse.csr_array` of bool, whose node has which label; None where there are none.
        classes: names of the labels, [C]; None where they have none.
    """

    graph: Graph
    labels_NC: Any = None
    classes: tuple[str, ...] | None = None


def load_dataset(name: str) -> Dataset:
    """The data set of this name.

    Raises:
        ConfigError: there is none of this name.
        DataError: ``ANABRANCH_DATA`` is not set, or the file is not there or not readable.
        BackendError: networkx, which holds the smallest ones, is not installed.
    """
    if not isinstance(name, str) or name not in _READERS:
        raise ConfigError(f"no graph {shown(name)}; known: {', '.join(_READERS)}")
    return _READERS[name](name)


def files_of(name: str) -> tuple[Path, ...]:
    """Where the graph of this name lies; empty for one that no file holds, and for a name that is none.

    Raises DataError if ``ANABRANCH_DATA`` is not set, or a file is not there.
    """
    reader = _READERS.get(name)
    return () if reader is None else tuple(data_file(f"graphs/{name}.{ending}") for ending in _ENDINGS.get(reader, ()))


@contextmanager
def _reading(path: Path, *also: type[Exception]) -> Iterator[None]:
    """Say which file it is that cannot be read or holds something else."""
    wrong: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, *also)
    wrong += (InputError, NotImplementedError, UserWarning, zlib.error, zipfile.BadZipFile)
    try:
        with warnings.catch_warnings():
            # Numpy's, of a file without data.
            warnings.simplefilter("error", UserWarning)
            yield
    except wrong as error:
        raise DataError(f"cannot read {path}: {error}; it is damaged, or not the shipped file") from error


def _mat(name: str) -> Dataset:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError
    from scipy.sparse import csr_array

    path = data_file(f"graphs/{name}.mat")
    with _reading(path, MatReadError):
        found = loadmat(str(path))
        return Dataset(Graph.from_scipy(found["network"]), csr_array(found["group"]).astype(bool))


def _edge_list(name: str) -> Dataset:
    edges, labels = data_file(f"graphs/{name}.edgelist.gz"), data_file(f"graphs/{name}.labels.gz")
    with _reading(edges):
        ends = np.loadtxt(edges, np.int64, ndmin=2)
        source_E, target_E = ends.T
    with _reading(labels), gzip.open(labels, "rt") as file:
        members = [np.array(line.split(), np.int64) for line in file]
        count = 1 + max(int(ends.max()), max((int(of.max()) for of in members if of.size), default=-1))
        label_NC = _labels(members, count)
    with _reading(edges):
        return Dataset(Graph.from_edges(source_E, target_E, num_nodes=count), label_NC)


def _weighted(name: str) -> Dataset:
    from scipy.sparse import coo_array, csr_array

    path = data_file(f"graphs/{name}.npz")
    with _reading(path):
        found = np.load(path)
        count = int(found["num_nodes"])
        matrix = coo_array((found["weight"], (found["row"], found["col"])), shape=(count, count)).tocsr()
        fields = csr_array(found["field_weight"] > 0)
        return Dataset(Graph.from_scipy(matrix, directed=False), fields, tuple(map(str, found["field_name"])))


def _cora(name: str) -> Dataset:
    from scipy.sparse import csr_array

    path = data_file(f"graphs/{name}.npz")
    with _reading(path):
        found = np.load(path)
        shape = tuple(found["adj_shape"])
        matrix = csr_array((found["adj_data"], found["adj_indices"], found["adj_indptr"]), shape=shape)
        members = [np.flatnonzero(found["labels"] == label) for label in range(int(found["labels"].max()) + 1)]
        return Dataset(Graph.from_scipy(matrix, directed=True), _labels(members, shape[0]))


def _networkx(name: str) -> Dataset:
    require("networkx", by=f"the graph {name!r}")
    import networkx

    found = {"karate": networkx.karate_club_graph, "lesmis": networkx.les_miserables_graph}[name]()
    matrix = networkx.to_scipy_sparse_array(found, weight="weight" if name == "lesmis" else None)
    names = None if name == "karate" else list(found.nodes)
    graph = Graph.from_scipy(matrix, directed=False, names=names)
    if name == "lesmis":
        return Dataset(graph)
    clubs = [club for _, club in found.nodes(data="club")]
    classes = tuple(sorted(set(clubs)))
    members = [np.flatnonzero([club == one for club in clubs]) for one in classes]
    return Dataset(graph, _labels(members, len(clubs)), classes)


def _labels(members: list[np.ndarray], count: int) -> Any:
    """[N, C] of the members of each class."""
    from scipy.sparse import coo_array

    column = np.repeat(np.arange(len(members)), [len(of) for of in members])
    row = np.concatenate(members)
    return coo_array((np.ones(len(row), bool), (row, column)), shape=(count, len(members))).tocsr()


_READERS: dict[str, Callable[[str], Dataset]] = {
    "blogcatalog": _mat,
    "ppi": _edge_list,
    "dblp": _edge_list,
    "dblp_weighted": _weighted,
    "cora": _cora,
    "karate": _networkx,
    "lesmis": _networkx,
}

# Of the files of each kind.
_ENDINGS: dict[Callable[[str], Dataset], tuple[str, ...]] = {
    _mat: ("mat",),
    _edge_list: ("edgelist.gz", "labels.gz"),
    _weighted: ("npz",),
    _cora: ("npz",),
}
