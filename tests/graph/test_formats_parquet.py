"""Parquet of any row groups and dictionaries is read as it is written, or refused as the same table in one piece is."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.cli.graph.files import read_arrow
from anabranch.cli.graph.node_tables import read_edges
from anabranch.errors import DataError
from anabranch.graph import Graph, read_graph
from anabranch.graph.formats import from_table
from anabranch.graph.rank.clicks import read_clicks
from anabranch.graph.table_look import EdgeTable, unpacked

RING = [[0, 1, 0, 0, 1], [1, 0, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 0, 1], [1, 0, 0, 1, 0]]


def _packed(values, kind=None):
    return pa.array(values, kind).dictionary_encode()


def _in_groups(path, table, sizes, packed=()):
    """The table in row groups of these sizes, each with dictionaries of its own for the packed columns."""

    def part_of(done, size):
        columns = {name: table[name].slice(done, size).combine_chunks() for name in table.column_names}
        return pa.table(
            {name: cells.dictionary_encode() if name in packed else cells for name, cells in columns.items()}
        )

    with pq.ParquetWriter(path, part_of(0, 0).schema) as writer:
        for place, size in enumerate(sizes):
            writer.write_table(part_of(sum(sizes[:place]), size))
    return path


def _edges(graph):
    source, target, weight = graph.edges()
    ends = [graph.names_of(end).tolist() for end in (source, target)]
    return sorted(zip(*ends, *([] if weight is None else [weight.tolist()]), strict=True))


@given(
    groups=st.lists(st.integers(0, 3), min_size=1, max_size=6).filter(lambda sizes: 0 < sum(sizes)),
    packed=st.sets(st.sampled_from(["x", "y", "kind"])),
    is_text=st.booleans(),
    seed=st.integers(0, 9),
)
def test_row_groups_and_dictionaries_of_any_kind_are_read_as_written(tmp_path_factory, groups, packed, is_text, seed):
    """Columns of which one is a dictionary, whose row groups are parts of their own, were a ValueError."""
    count, generator = sum(groups), np.random.default_rng(seed)
    ends = generator.permutation(2 * count).reshape(2, count).tolist()
    if is_text:
        ends = [[f"n{end}" for end in column] for column in ends]
    weights = generator.integers(1, 9, count).tolist()
    table = pa.table({"x": ends[0], "y": ends[1], "kind": ["k"] * count, "weight": weights})
    path = _in_groups(tmp_path_factory.mktemp("parquet") / "t.parquet", table, groups, packed)
    meant = sorted(zip(*ends, map(float, weights), strict=True))
    assert _edges(read_graph(path, directed=True, ids="names")) == meant
    assert _edges(from_table(pq.read_table(path), directed=True, ids="names")) == meant
    known = Graph.from_edges([0], [1], names=["n0", "n1"]) if is_text else Graph.from_edges([0], [1])
    assert sorted(zip(*read_edges(str(path), known), strict=True)) == meant


@pytest.mark.parametrize("sizes", [[5], [1] * 5, [2, 0, 3], [4, 1]])
@pytest.mark.parametrize("packed", ["", "k", "klmno", "klm"])
@pytest.mark.parametrize("kind", [str, int])
def test_a_matrix_in_row_groups_is_no_table_of_edges(tmp_path, sizes, packed, kind):
    """Only its first row group was looked at, so that it was a graph of the nodes 0 and 1."""
    table = pa.table({name: [kind(row[place]) for row in RING] for place, name in enumerate("klmno")})
    path = _in_groups(tmp_path / "m.parquet", table, sizes, set(packed))
    with pytest.raises(DataError, match="is it a matrix"):
        read_graph(path)
    with pytest.raises(DataError, match="is it a matrix"):
        from_table(pq.read_table(path))
    _in_groups(path, table.append_column("__index_level_0__", [list("klmno")]), sizes, {*packed, "__index_level_0__"})
    with pytest.raises(DataError, match="is a matrix whose rows are called as its columns"):
        read_graph(path)


@pytest.mark.parametrize("packed", ["", "a", "b", "abc"])
def test_printed_rows_in_row_groups_are_refused(tmp_path, packed):
    table = pa.table({"a": ["ann", "bob", "cy"], "b": ["->"] * 3, "c": ["bob", "cy", "ann"]})
    path = _in_groups(tmp_path / "t.parquet", table, [1, 1, 1], set(packed))
    with pytest.raises(DataError, match="row 0: is '->' a node, or a sign between two"):
        read_graph(path)


@pytest.mark.parametrize("sizes", [[6], [1] * 6, [0, 4, 0, 2]])
def test_a_direction_is_looked_for_in_all_row_groups(tmp_path, sizes):
    ends = {"source": list("abcdef"), "target": list("bcdefa")}
    path = tmp_path / "t.parquet"
    _in_groups(path, pa.table({**ends, "Type": ["Directed"] * 6}), sizes, {"source", "Type"})
    assert read_graph(path).is_directed
    mixed = pa.table({**ends, "Type": ["Directed"] * 5 + ["Undirected"]})
    _in_groups(path, mixed, sizes, {"source", "Type"})
    with pytest.raises(DataError, match="row 5: an edge of the type 'Undirected'"):
        read_graph(path)


@pytest.mark.parametrize("sizes", [[4], [1] * 4, [2, 2]])
@pytest.mark.parametrize("packed", ["", "source", "target"])
def test_a_missing_end_in_any_row_group_is_told(tmp_path, sizes, packed):
    """All of a page may be missing."""
    table = pa.table({"source": ["a", "b", None, None], "target": ["b", "c", "d", "e"]})
    path = _in_groups(tmp_path / "t.parquet", table, sizes, {packed})
    with pytest.raises(DataError, match=r"row 2: the source is missing \(null\)"):
        read_graph(path)
    with pytest.raises(DataError, match="row 2: an empty cell"):
        read_edges(str(path), Graph.from_edges([0], [1], names=["a", "b"]))


def test_what_is_missing_in_a_dictionary_is_missing():
    """It was a node of the number -2^63, or an error of Arrow."""
    for values in (["a", None], [3, None]):
        cells = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int8()), pa.array(values))
        table = pa.table({"source": cells, "target": values[:1] * 2})
        with pytest.raises(DataError, match=r"row 1: the source is missing \(null\)"):
            from_table(table)


def test_categories_of_frames_are_nodes_and_weights(tmp_path):
    frame = pd.DataFrame({"source": ["a", "b", "a"], "target": ["b", "c", "c"], "weight": [1, 2, 2]})
    meant = [("a", "b", 1.0), ("a", "c", 2.0), ("b", "c", 2.0)]
    for kinds in ({"source": "category"}, {"source": "category", "target": "category", "weight": "category"}):
        packed = frame.astype(kinds)
        assert _edges(from_table(packed, directed=True)) == meant
        packed.to_parquet(tmp_path / "t.parquet", index=False)
        assert _edges(read_graph(tmp_path / "t.parquet", directed=True)) == meant
        assert read_arrow(tmp_path / "t.parquet")["source"].to_pylist() == ["a", "b", "a"]
    numbers = frame.assign(source=[0, 5, 0], target=[5, 7, 7]).astype({"source": "category", "target": "category"})
    assert _edges(from_table(numbers, directed=True)) == [(0, 5, 1.0), (0, 7, 2.0), (5, 7, 2.0)]
    with pytest.raises(DataError, match="is of type double; node ids are integers or text"):
        from_table(frame.assign(source=[0.5, 1.5, 0.5]).astype({"source": "category"}))
    with pytest.raises(DataError, match=r"is of type (large_)?string; weights are numbers"):
        from_table(frame.assign(weight=["x", "y", "y"]).astype({"weight": "category"}))


@pytest.mark.parametrize("sizes", [[4], [1] * 4, [0, 3, 1]])
def test_clicks_of_row_groups_and_dictionaries_are_read(tmp_path, sizes):
    table = pa.table({"node": list("abca"), "term": ["x", "y", "x", "z"], "item": [1, 2, 3, 1]})
    path = _in_groups(tmp_path / "t.parquet", table, sizes, {"node", "term"})
    assert [part.tolist() for part in read_clicks(path)] == [column.to_pylist() for column in table.columns]


@pytest.mark.parametrize("sizes", [[5000], [700] * 7 + [100], [1] * 1030 + [3970]])
def test_cells_that_are_looked_at_are_as_many_in_any_row_groups(tmp_path, sizes):
    table = pa.table({"x": [f"n{number % 7}" for number in range(5000)], "y": range(5000)})
    path = _in_groups(tmp_path / "t.parquet", table, sizes, {"x"})
    with pq.ParquetFile(path) as file:

        def parts(name, size):
            return (batch.column(0) for batch in file.iter_batches(size, columns=[name], use_threads=False))

        read = EdgeTable.in_parts(path, file.schema_arrow, 5000, parts)
        for looked in (read, EdgeTable.of(path, pq.read_table(path))):
            for name in ("x", "y"):
                first = looked.first(name)
                rest = [cell for part in looked.rest(name) for cell in part.to_pylist()]
                assert len(first) == 1024
                assert first.to_pylist() + rest == table[name].to_pylist()
                assert first.type == table[name].type == unpacked(first).type


@pytest.mark.parametrize("is_text", [True, False])
def test_tables_with_categories_that_were_put_together_are_read(is_text):
    """Short indices, as pandas gives categories, are too few for the dictionaries of all parts: it was a fault of Arrow."""

    def part_of(first):
        numbers = np.arange(first, first + 100)
        ends = {"source": numbers, "target": numbers + 1000}
        frame = pd.DataFrame({name: [f"n{id}" for id in ids] if is_text else ids for name, ids in ends.items()})
        frame["weight"] = numbers / 8 + 1
        return pa.Table.from_pandas(frame.astype("category"), preserve_index=False)

    whole = pa.concat_tables([part_of(0), part_of(100)])
    assert whole.schema.field("source").type.index_type == pa.int8()
    numbers = [(id, id + 1000, id / 8 + 1) for id in range(200)]
    meant = [(f"n{one}", f"n{two}", weight) for one, two, weight in numbers] if is_text else numbers
    assert _edges(from_table(whole, directed=True, ids="text" if is_text else "names")) == sorted(meant)
