"""Every way in takes the same look at a table of edges: what one refuses all refuse, and what one says of direction all say."""

from types import SimpleNamespace

import pandas as pd
import pytest

from anabranch.cli.graph.inputs import open_typed
from anabranch.cli.graph.node_tables import pairs_of, read_edges
from anabranch.errors import DataError
from anabranch.graph import Graph, TypedGraph, read_graph, table_look
from anabranch.graph.formats import from_table, parquet
from anabranch.graph.spark import edges as spark_edges

RING = [[0, 1, 0, 0, 1], [1, 0, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 0, 1], [1, 0, 0, 1, 0]]


def _graph(frame, *, directed=False):
    """One that knows the nodes of a table, and what may be taken for some."""
    is_text = isinstance(frame.iloc[0, 0], str)
    return Graph.from_edges(
        [0], [1], directed=directed, num_nodes=3, names=["ann", "bob", "cy"] if is_text else [0, 1, 2]
    )


class Rows:
    """A few rows as Spark's frames give them, of what `spark.edges` asks."""

    def __init__(self, rows, fields=()):
        self.rows, self.schema = rows, SimpleNamespace(fields=fields)

    @classmethod
    def of(cls, frame):
        def kind(column):
            values = frame[column].dropna()
            if values.map(lambda value: isinstance(value, str)).all():
                return "string"
            return {"i": "bigint", "f": "double", "b": "boolean"}[frame[column].dtype.kind]

        fields = [
            SimpleNamespace(name=name, dataType=SimpleNamespace(simpleString=lambda name=name: kind(name)))
            for name in frame
        ]
        made = cls(
            [tuple(None if pd.isna(cell) else cell for cell in row) for row in frame.itertuples(index=False)], fields
        )
        made.names = list(frame)
        return made

    def inputFiles(self):
        return []

    def limit(self, count):
        return Rows(self.rows[:count])

    def selectExpr(self, text):
        place = self.names.index(text.split("`")[1])
        return Rows([(None if row[place] is None else row[place].strip().lower(),) for row in self.rows])

    def distinct(self):
        return Rows(list(dict.fromkeys(self.rows)))

    def collect(self):
        return self.rows


def _file(tmp_path, frame, name):
    path = tmp_path / name
    frame.to_parquet(path, index=False) if name.endswith("parquet") else frame.to_csv(path, index=False)
    return str(path)


def _with_kind(frame):
    return frame.assign(kind="k")


def _of_kinds(path):
    return open_typed(path, "kind", None, "edges", directed=None, columns=None, quiet=True).graph.is_directed


# Each gives the direction of a table's edges.
DOORS = {
    "read_graph, text": lambda folder, frame: read_graph(_file(folder, frame, "t.csv")).is_directed,
    "read_graph, Parquet": lambda folder, frame: read_graph(_file(folder, frame, "t.parquet")).is_directed,
    "from_table": lambda folder, frame: from_table(frame).is_directed,
    "--relation, text": lambda folder, frame: _of_kinds(_file(folder, _with_kind(frame), "t.csv")),
    "--relation, Parquet": lambda folder, frame: _of_kinds(_file(folder, _with_kind(frame), "t.parquet")),
    "TypedGraph": lambda folder, frame: TypedGraph.from_table(_with_kind(frame), "kind").graph.is_directed,
    "Spark": lambda folder, frame: spark_edges._direction(Rows.of(frame), spark_edges.EdgeFiles("t.parquet"), None),
}
# Each adds a table's edges to a graph, or takes them away.
OF_GRAPHS = {
    "--add, --remove and transform, text": lambda folder, frame, graph: read_edges(
        _file(folder, frame, "t.csv"), graph
    ),
    "--add, --remove and transform, Parquet": lambda folder, frame, graph: read_edges(
        _file(folder, frame, "t.parquet"), graph
    ),
}
ENDS = {"Source": ["ann", "bob"], "Target": ["bob", "cy"]}
REFUSED = {
    "tuples": (pd.DataFrame({"source": ["(ann", "(bob"], "target": ["bob)", "cy)"]}), "as Python or JSON prints it"),
    "arrows": (
        pd.DataFrame({"x": ["ann", "bob"], "y": ["->", "->"], "z": ["bob", "cy"]}),
        "a sign between|third field|are these names",
    ),
    "lists": (
        pd.DataFrame({"x": ["ann:", "bob:"], "y": ["bob", "cy"]}),
        "are those behind it neighbours|are these names",
    ),
    "a matrix": (pd.DataFrame(RING, columns=list("klmno")), "is it a matrix|are these names"),
    "a matrix of true and false": (
        pd.DataFrame(RING, columns=list("klmno")).astype(bool),
        "is it a matrix|third field|are these names",
    ),
    "both directions": (pd.DataFrame({**ENDS, "Type": ["Directed", "Undirected"]}), "where those before are directed"),
    "both directions, undirected first": (
        pd.DataFrame({**ENDS, "type": ["undirected", "Directed "]}),
        "where those before are undirected",
    ),
    "a direction and none": (
        pd.DataFrame({**ENDS, "Type": ["Directed", None]}),
        "where those before are directed|type is empty",
    ),
    "a direction and another word": (
        pd.DataFrame({**ENDS, "Type": ["Directed", "friend"]}),
        "where those before are directed",
    ),
}


@pytest.mark.parametrize("door", [*DOORS, *OF_GRAPHS])
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_table_of_edges_is_refused_by_all(tmp_path, what, door):
    frame, says = REFUSED[what]
    with pytest.raises(DataError, match=says):
        DOORS[door](tmp_path, frame) if door in DOORS else OF_GRAPHS[door](tmp_path, frame, _graph(frame))


DIRECTIONS = {
    "Directed": (pd.DataFrame({**ENDS, "Type": ["Directed", " directed"]}), True),
    "Undirected": (pd.DataFrame({**ENDS, "type": ["Undirected", "UNDIRECTED"]}), False),
    "another word first": (pd.DataFrame({**ENDS, "Type": ["friend", "Directed"]}), None),
    "numbers": (pd.DataFrame({**ENDS, "Type": [1, 2]}), None),
    "no column": (pd.DataFrame(ENDS), None),
}


@pytest.mark.parametrize("what", DIRECTIONS)
def test_what_gephi_says_of_direction_counts_for_all(tmp_path, what):
    frame, said = DIRECTIONS[what]
    for door, read in DOORS.items():
        assert read(tmp_path, frame) == bool(said), door
    for door, read in OF_GRAPHS.items():
        for directed in (True, False):
            graph = _graph(frame, directed=directed)
            if said in (None, directed):
                assert read(tmp_path, frame, graph)[:2] == (ENDS["Source"], ENDS["Target"]), door
            else:
                with pytest.raises(
                    DataError,
                    match=r"says that edges are .*directed, and the graph is .*directed; leave the column out",
                ):
                    read(tmp_path, frame, graph)


def test_of_pairs_no_direction_counts(tmp_path):
    """They are asked about, and change nothing."""
    frame = DIRECTIONS["Directed"][0]
    ids_E2, source, target = pairs_of(_graph(frame), _file(tmp_path, frame, "t.csv"))
    assert (ids_E2.tolist(), source, target) == ([[0, 1], [1, 2]], ENDS["Source"], ENDS["Target"])
    with pytest.raises(DataError, match="as Python or JSON prints it"):
        pairs_of(_graph(frame), _file(tmp_path, REFUSED["tuples"][0], "t.csv"))


def test_who_says_a_direction_is_believed(tmp_path):
    frame = REFUSED["both directions"][0]
    for directed in (True, False):
        assert read_graph(_file(tmp_path, frame, "t.parquet"), directed=directed).is_directed == directed
        assert from_table(frame, directed=directed).is_directed == directed
        assert TypedGraph.from_table(_with_kind(frame), "kind", directed=directed).graph.is_directed == directed
        given = spark_edges.EdgeFiles("t.parquet", directed)
        assert spark_edges._direction(Rows.of(frame), given, None) == directed
    # A relation that is called Type is one of kinds.
    assert not TypedGraph.from_table(frame, "Type").graph.is_directed
    assert TypedGraph.from_table(_with_kind(frame), "kind", directed=["k"]).graph.is_directed


def test_who_says_which_columns_are_ends_is_believed_by_spark():
    given = spark_edges.EdgeFiles("t.parquet", columns=("k", "l"))
    assert spark_edges._direction(Rows.of(REFUSED["a matrix"][0]), given, None) is False
    # A column that is no number makes it no matrix.
    dated = REFUSED["a matrix"][0].assign(o="2020-01-01")
    assert spark_edges._direction(Rows.of(dated), spark_edges.EdgeFiles("t.parquet"), None) is False
    # What `write_graph` noted comes first.
    assert spark_edges._direction(Rows.of(dated), spark_edges.EdgeFiles("t.parquet"), (3, True)) is True


@pytest.mark.parametrize("words", ["friend", "Directed"])
def test_a_column_type_of_parquet_is_read_in_parts(tmp_path, monkeypatch, words):
    """All of it was read, to look at its first cell: a text of each edge, beyond any memory_limit."""
    monkeypatch.setattr(table_look, "_LOOKED_AT", 10)
    rows = 100
    frame = pd.DataFrame({"source": range(rows), "target": range(1, rows + 1), "type": [words] * rows})
    path = tmp_path / "t.parquet"
    frame.to_parquet(path, index=False)
    asked = []
    with parquet._opened(path) as file:
        real = file.iter_batches

        def counted(size, columns, **options):
            for batch in real(size, columns=columns, **options):
                asked.append((columns, len(batch)))
                yield batch

        monkeypatch.setattr(file, "iter_batches", counted)
        monkeypatch.setattr(file, "read", None)
        table = parquet._edge_table(path, file)
        rules = parquet.looked(table, parquet.Rules(directed=None), parquet.Dialect())
    assert rules.directed == (True if words == "Directed" else None)
    of_type = [count for columns, count in asked if columns == ["type"]]
    assert max(of_type) == 10
    # The first part for its rows, and once more for its direction.
    assert (len(of_type) <= 2) if words == "friend" else sum(of_type) >= rows


def test_few_texts_are_read_to_look_at_them(tmp_path):
    """65,536 documents beside the ends were more than a graph is."""
    path = tmp_path / "t.parquet"
    pd.DataFrame({"source": range(5000), "target": range(5000), "abstract": ["x" * 100] * 5000}).to_parquet(path)
    with parquet._opened(path) as file:
        table = parquet._edge_table(path, file)
        assert len(table.first("abstract")) <= 1024
        assert sum(map(len, table.rest("abstract"))) + len(table.first("abstract")) == 5000


def test_a_row_behind_the_first_part_is_told_by_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(table_look, "_LOOKED_AT", 10)
    path = tmp_path / "t.parquet"
    kinds = ["Directed"] * 57 + ["Undirected"] + ["Directed"] * 2
    pd.DataFrame({"source": range(60), "target": range(60), "type": kinds}).to_parquet(path, index=False)
    with pytest.raises(DataError, match="row 57: an edge of the type 'Undirected'"):
        read_graph(path)
