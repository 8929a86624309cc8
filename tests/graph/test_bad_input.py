"""What users get wrong: a table of malformed files and arrays, each with the message it gives. Never another exception, never a graph."""

import gzip
import io
import json
import types

import networkx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.io import savemat
from scipy.sparse import csr_array, save_npz

from anabranch.errors import AnabranchError, DataError, InputError
from anabranch.graph import Graph
from anabranch.graph.formats import (
    from_igraph,
    from_networkx,
    from_pyg,
    from_table,
    from_torch,
    read_graph,
    write_graph,
)


def gz(text):
    return gzip.compress(text.encode() if isinstance(text, str) else text)


def parquet(**columns):
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def sparse(matrix):
    file = io.BytesIO()
    save_npz(file, matrix)
    return file.getvalue()


def mat(**arrays):
    file = io.BytesIO()
    savemat(file, arrays)
    return file.getvalue()


def saved(**options):
    from pathlib import Path
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        Graph.from_edges([0, 1], [1, 2], [1.0, 2], **options).save(Path(folder) / "g")
        return (Path(folder) / "g").read_bytes()


def flipped(raw, place):
    return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]


MANY = "".join(f"{n} {n + 1}\n" for n in range(300_000))  # several blocks
MTX = "%%MatrixMarket matrix coordinate "
SQUARE = csr_array([[0, 1.0], [1, 0]])
NETWORK = {"network": SQUARE}

# name of the file, what is in it, options of read_graph, a part of the message
FILES = [
    # Text: nothing, or no text
    ("g.txt", "", {}, "g.txt is empty"),
    ("g.csv", "\n\n  \n", {}, "g.csv holds no edges, only comments and blank lines"),
    ("g.txt", "# only\n% comments\n", {}, "holds no edges, only comments"),
    ("g.csv", "source,target\n", {}, "holds no edges, only the header in line 1"),
    ("g.txt", b"\x00\x01\x02\xff\n" * 9, {}, "g.txt, line 1: a zero byte; this is a binary file"),
    ("g.txt", "0 1\n" * 5 + "0 \0 1\n", {}, "g.txt, line 6: a zero byte"),
    ("g.txt", "0 1\n".encode("utf-16"), {}, "g.txt, line 1: this is UTF-16 text; save it as UTF-8"),
    ("g.txt", b"a b\nc \xff\xfe\nd e\n", {}, "g.txt, line 2: the target is not UTF-8 text"),
    ("g.txt", b"\xff\xd8\xff\xe0 photo\nx y z\n", {}, "line 1: the source is not UTF-8 text"),
    # Text: rows
    ("g.txt", "0 1\n1 2 3\n", {}, "g.txt, line 2: 3 fields, where the lines before have 2"),
    ("g.txt", "0 1 1\n# c\n\n1 2\n", {}, "g.txt, line 4: 2 fields, where the lines before have 3"),
    ("g.csv", "0,1,\n1,2,3\n", {}, "line 1: the third field '' is not a number"),
    ("g.csv", "0,1,2\n1,2,\n", {}, "line 2: the weight '' is not a number"),
    ("g.csv", "0,1\n1,\n", {}, "line 2: the target '' is not a whole number"),
    ("g.csv", "a,b\n,c\n", {"header": False}, "line 2: the source is empty"),
    ("g.txt", "0\n1\n", {}, "line 1: 1 field, where an edge needs two (split at whitespace"),
    ("g.txt", "0 1\n", {"delimiter": ","}, "line 1: 1 field, where an edge needs two (split at ','"),
    ("g.csv", 'a,"b\nc,d\n', {}, "line 1: a quote that is not closed on its line"),
    ("g.csv", 'a,b\nc,"d"e\n', {}, "line 2: something behind a closing quote"),
    ("g.txt", MANY + "7 8 9\n", {}, "line 300001: 3 fields"),
    ("g.txt", MANY + "7 x\n", {"memory_limit": 1 << 22}, "line 300001: the target 'x' is not a whole number"),
    # Text: ids
    (
        "g.txt",
        "0 1\n1 x4\n",
        {},
        "line 2: the target 'x4' is not a whole number, as the ids of the first row are; ids='text'",
    ),
    ("g.txt", "0 1\n1.0 2\n", {}, "line 2: the source '1.0' is not a whole number"),
    ("g.txt", "a b\n", {"ids": "numbers"}, "line 1: the source 'a' is not a whole number"),
    ("g.txt", "0 1\n1 -2\n", {"ids": "numbers"}, "line 2: the target -2 must not be negative"),
    ("g.txt", "0 1\n-1 2\n", {"num_nodes": 5}, "line 2: the source -1 is out of range; nodes are 0 to 4"),
    ("g.txt", "0 1\n1 2\n2 5\n", {"num_nodes": 5}, "line 3: the target 5 is out of range; nodes are 0 to 4"),
    ("g.txt", "0 9223372036854775808\n", {}, "line 1: the target '9223372036854775808' is beyond 64-bit whole numbers"),
    ("g.txt", f"0 1\n1 {10**15}\n", {"ids": "numbers"}, "1,000,000,000,000,001 nodes need"),
    (
        "g.txt",
        "# anabranch graph: 2 nodes, directed\n0 1\n1 2\n",
        {},
        "line 3: the target 2 is out of range; nodes are 0 to 1",
    ),
    # Text: weights
    ("g.txt", "0 1 1\n1 2 heavy\n", {}, "line 2: the weight 'heavy' is not a number"),
    ("g.txt", "0 1 heavy\n", {}, "line 1: the third field 'heavy' is not a number; weight=None leaves it out"),
    ("g.txt", "0 1 1_0\n", {}, "line 1: the third field '1_0' is not a number"),
    ("g.txt", "0 1 1\n1 2 -2\n", {}, "line 2: the weight -2.0 is not allowed; weights must be not negative"),
    ("g.txt", "0 1 1\n1 2 0\n", {}, "line 2: the weight 0.0 is not allowed; weights must be not 0"),
    ("g.txt", "0 1 1\n1 2 nan\n", {}, "line 2: the weight nan is not allowed; weights must be finite"),
    ("g.txt", "0 1 inf\n", {}, "line 1: the weight inf is not allowed"),
    ("g.txt", "0 1 1e39\n", {}, "line 1: the weight 1e+39 is not allowed; weights must be finite (as 32-bit numbers)"),
    ("g.txt", "0 1 1e-60\n", {}, "line 1: the weight 1e-60 is not allowed; weights must be not 0 (as 32-bit"),
    ("g.txt", "0 1 3e38\n1 0 3e38\n", {}, "g.txt: the weights of the edge (0, 1) add up to more than a 32-bit number"),
    ("g.txt", "0 1\n1 0\n", {"duplicates": "error"}, "g.txt: the edge (0, 1) is given more than once"),
    # Text: of several faults the first line is named
    ("g.txt", "0 1 1\n1 2 -1\n2 x 1\n", {}, "line 2: the weight -1.0"),
    ("g.txt", "0 1 1\n1 x 1\ny 2 -1\n", {}, "line 2: the target 'x'"),
    ("g.txt", "0 1 1\n1 2 x\n2 3\n", {}, "line 2: the weight 'x'"),
    ("g.txt", "0 1 1\n1 2 0\n2 3 x\n", {}, "line 2: the weight 0.0"),
    # Text: columns and options
    (
        "g.csv",
        "u,v,weight\n0,1,2\n",
        {"weight": "wieght"},
        "no column 'wieght'; did you mean 'weight'? (columns: u, v, weight)",
    ),
    ("g.csv", "a,b\n0,1\n", {"source": "x"}, "has no column 'x' (columns: a, b)"),
    ("g.csv", "0,1\n", {"weight": 2}, "has no column 2; columns are 0 to 1"),
    ("g.csv", "0,1\n", {"source": -1}, "source is -1; it must be a whole number from 0 to"),
    ("g.csv", "0,1\n", {"source": 1, "target": 1}, "source and target are both column 1"),
    ("g.csv", "0,1\n", {"source": "a", "header": False}, "has no header to look for the column 'a' in"),
    ("g.txt", "0 1\n", {"delimiter": "::"}, "delimiter is '::'; it must be one ASCII character"),
    ("g.txt", "0 1\n", {"ids": "number"}, "ids is 'number'; did you mean 'numbers'?"),
    ("g.txt", "0 1\n", {"format": "parket"}, "the format 'parket' is unknown; did you mean 'parquet'?"),
    ("g.txt", "0 1\n", {"num_nodes": -1}, "num_nodes is -1; it must be a whole number from 0 to"),
    ("g.txt", "0 1\n", {"num_nodes": 2.5}, "num_nodes is 2.5; it must be a whole number"),
    ("g.txt", "0 1\n", {"num_nodes": 3, "ids": "text"}, "num_nodes goes with ids that are numbers"),
    ("g.txt", "0 1\n", {"variable": "A"}, "variable='A' chooses a matrix of an .npz or .mat file"),
    ("g.txt", "0 1\n", {"duplicates": "sum"}, "duplicates is 'sum'; it must be one of"),
    # Compressed
    ("g.gz", gz(MANY)[:-900], {}, "g.gz is truncated: its compressed data end after line"),
    ("g.gz", gz("0 1\n")[:9], {}, "g.gz"),
    ("g.gz", flipped(gz(MANY), 5000), {}, "g.gz cannot be read on from line"),
    ("g.gz", flipped(gz("0 1\n1 2\n"), -5 % len(gz("0 1\n1 2\n"))), {}, "g.gz"),
    ("g.parquet.gz", gz(parquet(u=[0], v=[1])), {}, "is a compressed 'parquet' file; uncompress it first"),
    # Parquet
    ("g.parquet", "", {}, "g.parquet cannot be read as Parquet"),
    ("g.parquet", "source,target\n0,1\n", {}, "g.parquet cannot be read as Parquet"),
    ("g.parquet", parquet(u=[0, 1], v=[1, 2])[:-20], {}, "g.parquet cannot be read as Parquet"),
    ("g.parquet", parquet(u=[0]), {}, "has 1 column, where an edge needs two"),
    ("g.parquet", parquet(u=np.array([], int), v=np.array([], int)), {}, "g.parquet holds no edges"),
    ("g.parquet", parquet(u=[0.5], v=[1.0]), {}, "the column 'u' is of type double; node ids are integers or text"),
    (
        "g.parquet",
        parquet(u=[0], v=[1], weight=["x"]),
        {},
        "the column 'weight' is of type string; weights are numbers",
    ),
    ("g.parquet", parquet(u=[0, None], v=[1, 2]), {}, "g.parquet, row 1: the source is missing (null)"),
    ("g.parquet", parquet(u=[0, 1], v=[1, 2], weight=[1, None]), {}, "row 1: the weight is missing (null)"),
    ("g.parquet", parquet(u=["a", None], v=["b", "c"]), {}, "row 1: the source is missing (null)"),
    ("g.parquet", parquet(u=[0, 1], v=[1, 2], w=[1.0, np.nan]), {}, "row 1: the weight nan is not allowed"),
    ("g.parquet", parquet(u=[0, 1], v=[1, 2], w=[1.0, -1]), {}, "row 1: the weight -1.0 is not allowed"),
    (
        "g.parquet",
        parquet(u=[0, 7], v=[1, 2]),
        {"num_nodes": 3},
        "row 1: the source 7 is out of range; nodes are 0 to 2",
    ),
    ("g.parquet", parquet(u=[0, -7], v=[1, 2]), {"ids": "numbers"}, "row 1: the source -7 must not be negative"),
    ("g.parquet", parquet(u=np.array([2**63], "u8"), v=[1]), {}, "row 0: the source 9223372036854775808 is beyond"),
    ("g.parquet", parquet(u=["a"], v=["b"]), {"num_nodes": 3}, "ids are text, not numbers"),
    ("g.parquet", parquet(src=[0], dst=[1]), {"weight": "w8"}, "has no column 'w8'"),
    # MatrixMarket
    ("g.mtx", "", {}, "g.mtx is empty"),
    ("g.mtx", "1 2 3\n", {}, "g.mtx, line 1: a MatrixMarket file starts with"),
    ("g.mtx", MTX + "real general\n", {}, "ends before its sizes"),
    ("g.mtx", MTX + "real general\n2 2\n", {}, "line 2: '2 2' where the sizes"),
    ("g.mtx", MTX + "real general\n% c\n2 3 1\n1 2 1\n", {}, "line 3: the matrix has 2 rows and 3 columns"),
    ("g.mtx", MTX + "real general\n2 2 2\n1 2 1\n", {}, "is truncated: it holds 1 of the 2 entries"),
    ("g.mtx", MTX + "real general\n2 2 1\n1 2 1\n2 1 1\n", {}, "line 4: more than the 1 entries"),
    ("g.mtx", MTX + "real general\n2 2 1\n1 3 1\n", {}, "line 3: the target 3 is out of range; nodes are 1 to 2"),
    ("g.mtx", MTX + "real general\n2 2 1\n0 1 1\n", {}, "line 3: the source 0 is out of range; nodes are 1 to 2"),
    ("g.mtx", MTX + "real general\n2 2 1\n1 2\n", {}, "line 3: 2 fields, where the lines before have 3"),
    ("g.mtx", MTX + "pattern general\n2 2 1\n1 2 5\n", {}, "line 3: 3 fields, where the lines before have 2"),
    ("g.mtx", MTX + "real general\n2 2 1\n1 2 -5\n", {}, "line 3: the weight -5.0 is not allowed"),
    ("g.mtx", MTX + "real general\n2 2 1\n1 2 x\n", {}, "line 3: the weight 'x' is not a number"),
    ("g.mtx", MTX + "real general\n2 2 1\n1 2 5\n", {"directed": False}, "g.mtx: the matrix is not symmetric"),
    ("g.mtx", MTX + "real general\n2 2 1\n1 2 5\n", {"num_nodes": 3}, "has 2 rows; num_nodes is 3"),
    (
        "g.mtx",
        MTX.replace("coordinate", "array") + "real general\n2 2\n",
        {},
        "line 1: this matrix is written as 'array'",
    ),
    ("g.mtx", MTX + "complex general\n", {}, "line 1: entries are 'complex'"),
    ("g.mtx", MTX + "real skew-symmetric\n", {}, "line 1: the matrix is 'skew-symmetric'"),
    # METIS
    ("g.metis", "", {}, "the line of sizes (nodes, edges) is missing"),
    ("g.metis", "% c\n", {}, "the line of sizes (nodes, edges) is missing"),
    ("g.metis", "two 1\n", {}, "line 1: 'two 1' where nodes, edges and (perhaps) a format"),
    ("g.metis", "2 1 7\n2\n1\n", {}, "line 1: the format '7' is unknown"),
    ("g.metis", "3 1\n2\n1\n", {}, "is truncated: it has lines for 2 of 3 nodes"),
    ("g.metis", "2 1\n2\n1\n\n1\n", {}, "line 5: more lines than the 2 nodes"),
    ("g.metis", "2 1\n2\n0\n", {}, "line 3: the neighbour 0 is out of range; nodes are 1 to 2"),
    ("g.metis", "2 1\n3\n1\n", {}, "line 2: the neighbour 3 is out of range"),
    ("g.metis", "2 1\n2 x\n1\n", {}, "line 2: something that is not a whole number"),
    ("g.metis", "2 1 1\n2\n1 5\n", {}, "line 2: the last neighbour has no weight"),
    ("g.metis", "2 1 1\n2 0\n1 0\n", {}, "line 2: the weight 0 is not allowed"),
    (
        "g.metis",
        "2 1 1\n2 5\n1 6\n",
        {},
        "some edge stands in the line of one of its nodes only, or with another weight",
    ),
    ("g.metis", "3 1\n2\n\n\n", {}, "some edge stands in the line of one of its nodes only"),
    ("g.metis", "2 2\n2\n1\n", {}, "promises 2 edges in its first line and holds 1"),
    # NumPy and MATLAB
    ("g.npz", "", {}, "g.npz cannot be read as .npz"),
    ("g.npz", b"\x93NUMPY\x01\x00" + b" " * 99, {}, "g.npz holds one array (.npy)"),
    ("g.npz", sparse(SQUARE)[:-50], {}, "g.npz cannot be read as .npz"),
    ("g.npz", flipped(sparse(SQUARE), sparse(SQUARE).find(b".npy") + 30), {}, "g.npz cannot be read as .npz"),
    ("g.npz", npz(x=np.arange(3)), {}, "holds no sparse matrix and no lists of edges (there: x)"),
    ("g.npz", npz(row=[0, 1], col=[1]), {}, "source has 2 ends and target 1"),
    ("g.npz", npz(row=[0.5], col=[1]), {}, "node ids are integers"),
    ("g.npz", npz(row=[0], col=[1], weight=[np.nan]), {}, "edge 0 has the weight nan"),
    ("g.npz", npz(row=[0], col=[5], num_nodes=3), {}, "edge 0 has the target 5; nodes are 0 to 2"),
    ("g.npz", npz(edge_index=np.arange(3)), {}, "edge_index has the shape (3,)"),
    ("g.npz", npz(data=[1.0], indices=[9], indptr=[0, 1, 1], shape=[2, 2]), {}, "g.npz"),
    ("g.npz", npz(data=[1.0], indices=[1], indptr=[0, 5, 1], shape=[2, 2]), {}, "g.npz"),
    ("g.npz", npz(data=[1.0], indices=[1], indptr=[0, 1, 1], shape=[2, 3]), {}, "an adjacency matrix is square"),
    ("g.npz", npz(x=np.array([object()])), {}, "g.npz holds no sparse matrix"),
    ("g.npz", npz(row=np.array([object()]), col=[1]), {}, "g.npz cannot be read as .npz"),
    ("g.npz", sparse(SQUARE), {"variable": "adj"}, "has no matrix 'adj' (there: matrix)"),
    ("g.npz", sparse(SQUARE), {"memory_limit": 1 << 20}, "is read whole; memory_limit is for"),
    ("g.npz", sparse(csr_array([[0, -1.0], [-1, 0]])), {}, "has the weight -1.0; weights must be not negative"),
    ("g.npz", sparse(csr_array([[0, 1.0], [0, 0]])), {"directed": False}, "not symmetric (1 entries differ)"),
    ("g.mat", "", {}, "g.mat cannot be read as .mat"),
    ("g.mat", mat(**NETWORK)[:200], {}, "g.mat cannot be read as .mat"),
    ("g.mat", b"MATLAB 7.3 MAT-file" + b"\0" * 600, {}, "is a MATLAB 7.3 (HDF5) file; save it with '-v7'"),
    ("g.mat", mat(**NETWORK), {"variable": "netwrok"}, "has no matrix 'netwrok'; did you mean 'network'?"),
    ("g.mat", mat(x=np.eye(2)), {}, "holds no sparse matrix and no lists of edges (there: x)"),
    ("g.mat", mat(a=SQUARE, b=SQUARE), {}, "holds several square matrices; choose one with variable=: a, b"),
    ("g.mat", mat(a=csr_array((2, 3))), {}, "an adjacency matrix is square, this one has the shape (2, 3)"),
    ("g.mat", mat(words="text"), {"variable": "words"}, "g.mat"),
    # Our own
    ("g.anb", "", {}, "is not one of our array files"),
    ("g.anb", saved()[:-1], {}, "is truncated or damaged"),
    ("g.anb", flipped(saved(), -64 % len(saved())), {}, "is damaged: the checksum of 'weights' is wrong"),
    ("g.anb", flipped(saved(), 30), {}, "is damaged: the checksum of its header is wrong"),
    ("g.anb", saved().replace(b'"graph"', b'"grapf"', 1), {}, "is damaged: the checksum of its header"),
    ("g.anb", saved(), {"directed": True}, "`to_directed` and `to_undirected` change that"),
]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"), FILES, ids=[f"{number}-{row[0]}" for number, row in enumerate(FILES)]
)
def test_files(tmp_path, name, content, options, message):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(AnabranchError) as caught:
        read_graph(path, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    if isinstance(caught.value, DataError):
        assert str(path) in str(caught.value)  # whose fault it is


def test_the_table_is_as_long_as_it_should_be():
    assert len(FILES) >= 100


STREAMED = [row for row in FILES if row[0] not in ("g.npz", "g.mat", "g.anb") and "memory_limit" not in row[2]]


@pytest.mark.parametrize("limit", [1 << 20, 1 << 24])
@pytest.mark.parametrize("row", STREAMED[::3], ids=lambda row: None)
def test_a_limit_changes_no_message(tmp_path, row, limit):
    name, content, options, message = row
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(AnabranchError) as caught:
        read_graph(path, **options, memory_limit=limit)
    assert message in str(caught.value) or "memory_limit is" in str(caught.value)


def test_places_without_a_file(tmp_path):
    with pytest.raises(DataError, match=r"there is no file .*none\.csv"):
        read_graph(tmp_path / "none.csv")
    with pytest.raises(DataError, match="is a folder, not a file"):
        read_graph(tmp_path)


OBJECTS = [
    (from_networkx, [[0, 1]], "needs a networkx graph, not list"),
    (from_networkx, networkx.Graph([(0, 1, {"weight": -1})]), "edge 0 has the weight -1"),
    (from_networkx, networkx.Graph([(0, 1, {"weight": 0})]), "edge 0 has the weight 0"),
    (from_networkx, networkx.Graph([(0, 1, {"weight": float("nan")})]), "edge 0 has the weight nan"),
    (
        from_networkx,
        networkx.Graph([("a", "b", {"weight": [1]})]),
        "edge ('a', 'b') has the weight [1], which is not a number",
    ),
    (from_igraph, networkx.Graph(), "needs an igraph graph, not Graph"),
    (from_pyg, object(), "needs an object with an edge_index"),
    (from_pyg, types.SimpleNamespace(edge_index=np.zeros((3, 2), int)), "edge_index has the shape (3, 2)"),
    (from_pyg, types.SimpleNamespace(edge_index=np.zeros((2, 2))), "node ids are integers"),
    (from_pyg, types.SimpleNamespace(edge_index=np.array([[0], [5]]), num_nodes=3), "edge 0 has the target 5"),
    (
        from_pyg,
        types.SimpleNamespace(edge_index=np.array([[0], [1]]), edge_weight=np.ones(2)),
        "weight has the shape (2,)",
    ),
    (from_torch, np.eye(2), "needs a sparse tensor"),
    (from_table, 3, "needs a table, not int"),
    (from_table, {"u": [0], "v": [1, 2]}, "needs a table"),
    (from_table, {"u": [0]}, "has 1 column"),
    (from_table, {"u": [0, 1], "v": [1, None]}, "row 1: the target is missing"),
    (Graph.from_scipy, csr_array((2, 3)), "square"),
    (Graph.from_scipy, [[0, 1], [1]], "adjacency matrix"),
    (Graph.from_scipy, "text", "adjacency matrix"),
    (Graph.load, "/no/such/file.anb", "no such file"),
]


@pytest.mark.parametrize(("make", "value", "message"), OBJECTS, ids=lambda value: None)
def test_objects(make, value, message):
    with pytest.raises((DataError, InputError)) as caught:
        make(value)
    assert message in str(caught.value)


WRITES = [
    (Graph.from_edges([0], [1]), "g.xyz", {}, "the format of 'g.xyz' is unknown; give one of anb, edges"),
    (Graph.from_edges([0], [1]), "g", {"format": "edge"}, "the format 'edge' is unknown"),
    (Graph.from_edges([0], [1]), "g.parquet.gz", {}, "cannot be written compressed like that"),
    (Graph.from_edges([0], [1], directed=True), "g.metis", {}, "METIS files hold undirected graphs"),
    (Graph.from_edges([0], [0]), "g.metis", {}, "METIS files hold no self-loops; this graph has 1"),
    (Graph.from_edges([0], [1], [0.5]), "g.metis", {}, "METIS files hold whole weights"),
    (Graph.from_edges([0], [1], names=["a", "b"]), "g.mtx", {}, "cannot hold the names of nodes"),
    (Graph.from_edges([0], [1], names=["a", "b"]), "g.npz", {}, "cannot hold the names of nodes"),
    (
        Graph.from_edges([0], [1], names=["a", "b", "c"], num_nodes=3),
        "g.csv",
        {},
        "1 nodes without edges have names (first 'c')",
    ),
    (Graph.from_edges([0], [1], names=["a", "b\nc"]), "g.csv", {}, "'b\\nc' holds a line break"),
    (Graph.from_edges([0], [1], names=["a", "b\nc"]), "g.edges", {}, "'b\\nc' holds a line break"),
    (
        Graph.from_edges([0], [1], names=["a", 1]),
        "g.csv",
        {},
        "names can be written if all are integers or all are text",
    ),
    (Graph.from_edges([0], [1]), "g.txt/x.csv", {}, "cannot write"),
]


@pytest.mark.parametrize(("graph", "name", "options", "message"), WRITES, ids=lambda value: None)
def test_what_cannot_be_written_leaves_nothing(tmp_path, graph, name, options, message):
    (tmp_path / "g.txt").write_text("in the way")
    with pytest.raises((DataError, InputError)) as caught:
        write_graph(graph, tmp_path / name, **options)
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["g.txt"]


@pytest.mark.parametrize("kind", ["anb", "parquet", "npz", "mat", "edges", "csv", "mtx", "metis"])
def test_any_cut_and_any_flip_is_an_error_of_ours_or_a_graph(tmp_path, kind):
    """Fuzz: what is left of a file may be a graph (text has no checksum), but never another exception."""
    graph = Graph.from_edges([0, 1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4])
    path = tmp_path / f"g.{kind}"
    write_graph(graph, path)
    raw = path.read_bytes()
    places = range(0, len(raw), max(1, len(raw) // 60))
    changed = [raw[:place] for place in places] + [flipped(raw, place) for place in places]
    changed += [raw[:place] + bytes([255 - raw[place]]) + raw[place + 1 :] for place in places]
    refused = 0
    for content in changed:
        path.write_bytes(content)
        try:
            read_graph(path, format=kind)
        except AnabranchError:
            refused += 1
    assert refused > len(places) // 2


def test_junk_is_never_a_crash(tmp_path):
    generator = np.random.default_rng(0)
    for kind in ("anb", "parquet", "npz", "mat", "edges", "csv", "mtx", "metis"):
        for size in (1, 7, 100, 3000):
            path = tmp_path / f"junk.{kind}"
            path.write_bytes(generator.integers(1, 256, size, dtype=np.uint8).tobytes())
            with pytest.raises(DataError):
                read_graph(path)


def test_messages_of_headers_are_json_free(tmp_path):
    # Regression: a header of the right sum that held a list gave a TypeError.
    import zlib

    from anabranch.graph.array_file import MAGIC

    text = json.dumps([1]).encode()
    fixed = MAGIC + np.array([len(text), 64], "<u8").tobytes() + text + np.array([zlib.crc32(text)], "<u4").tobytes()
    (tmp_path / "g.anb").write_bytes(fixed.ljust(64, b"\0"))
    with pytest.raises(DataError, match="header that this release cannot read"):
        read_graph(tmp_path / "g.anb")
