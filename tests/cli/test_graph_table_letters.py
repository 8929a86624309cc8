"""Names of columns, nodes and labels in any letters, through everything that reads a table or is told of its columns."""

import numpy as np
import pytest

from anabranch.cli.graph.inputs import columns_of, open_graph, open_typed, read_items, whole_number
from anabranch.cli.graph.node_tables import LABELS, read_columns, read_edges
from anabranch.cli.graph.peer import _address, _id
from anabranch.cli.graph.rank import _user
from anabranch.cli.graph.vectors import read_vectors
from anabranch.errors import AnabranchError, DataError, InputError
from anabranch.graph import GRank, Graph, read_graph
from anabranch.graph.rank import Item, Peer
from anabranch.graph.rank.clicks import read_clicks

# Of two to four bytes, of an accent of its own, of figures that are none of ASCII, and of another size in small letters.
WORDS = ["échange", "Ñ", "источник", "源", "مصدر", "🜁", "e\u0301", "²", "٣", "\uff11", "İ", "ẞ", "\u200b"]
GRAPH = Graph.from_edges([0], [1], names=["ann", "bob"])


@pytest.fixture
def made(tmp_path):
    """Writes a table whose cells are divided at bars here."""

    def make(text, mark=",", encoding="utf-8"):
        path = tmp_path / {",": "t.csv", "\t": "t.tsv", " ": "t.txt"}[mark]
        path.write_bytes(text.replace("|", mark).encode(encoding))
        return str(path)

    return make


def _edges(graph):
    source, target, weight = graph.edges()
    ends = [graph.names_of(end).tolist() for end in (source, target)]
    return sorted(zip(*ends, *([] if weight is None else [weight.tolist()]), strict=True))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("mark", [",", "\t", " "])
@pytest.mark.parametrize("word", WORDS)
def test_columns_may_be_called_in_any_letters(made, word, mark, encoding):
    """A first letter that is not ASCII was a TypeError."""
    path = made(f"{word}|{word}2|weight\nann|bob|1\nbob|cy|2\n", mark, encoding)
    weighted = [("ann", "bob", 1.0), ("bob", "cy", 2.0)]
    assert _edges(read_graph(path, directed=True)) == weighted
    assert _edges(read_graph(path, directed=True, source=word, target=f"{word}2")) == weighted
    found = open_graph(path, directed=True, columns=f"{word},{word}2", quiet=True).graph
    assert _edges(found) == [edge[:2] for edge in weighted]
    with pytest.raises(InputError, match=r"has no column .* \(columns: "):
        read_graph(path, source=f"{word}x")
    path = made(f"source|target|{word}\nann|bob|1\nbob|cy|2\n", mark, encoding)
    assert _edges(read_graph(path, directed=True, weight=word)) == weighted
    assert _edges(open_graph(path, directed=True, columns=f"source,target,{word}", quiet=True).graph) == weighted


@pytest.mark.parametrize("word", WORDS)
def test_nodes_and_labels_may_be_called_in_any_letters(made, word):
    path = made(f"source|target\n{word}|{word}2\n{word}2|{word}\n")
    assert _edges(read_graph(path, directed=True)) == sorted([(word, f"{word}2"), (f"{word}2", word)])
    known = Graph.from_edges([0], [1], names=[word, f"{word}2"])
    assert read_edges(path, known) == ([word, f"{word}2"], [f"{word}2", word], None)
    path = made(f"node|{word}\nann|{word}\nbob|{word}2\n")
    assert read_columns(path, LABELS, GRAPH) == {"node": ["ann", "bob"], "label": [word, f"{word}2"]}
    path = made(f"id|{word}\n1|{word}\n2|{word}2\n")
    assert [item.id for item in read_items(path)] == [1, 2]
    path = made(f"node|{word}\nann|2.5\nbob|3.5\n")
    np.testing.assert_array_equal(read_vectors(path).array, [[2.5], [3.5]])
    path = made(f"{word}|{word}2|{word}3\nann|{word}|1\nbob|{word}2|2\n")
    clicks = [part.tolist() for part in read_clicks(path, (word, f"{word}2", f"{word}3"))]
    assert clicks == [["ann", "bob"], [word, f"{word}2"], [1, 2]]
    path = made(f"source|target|{word}\nann|bob|{word}\nbob|cy|other\n")
    of_kinds = open_typed(path, word, [f"{word}=2"], "edges", directed=True, columns=None, quiet=True).graph
    assert _edges(of_kinds) == [("ann", "bob", 2.0), ("bob", "cy", 1.0)]


@pytest.mark.parametrize("again", ["échange|autre|weight", "источник|цель|weight", "源|目标|weight"])
def test_names_of_any_letters_once_more_are_told(made, again):
    path = made(f"{again}\nann|bob|1\n{again}\nbob|cy|2\n")
    with pytest.raises(DataError, match="line 3: the names of columns once more"):
        read_graph(path)


def test_names_once_more_are_told_in_another_case_of_any_letters(made):
    # Of other first bytes, and of more of them.
    for name, other in (("Рост", "рост"), ("İ", "İ".lower()), ("ÉTÉ", "été")):
        path = made(f"source|target|{name}\nann|bob|1\nTarget|SOURCE|{other}\n")
        with pytest.raises(DataError, match="line 3: the names of columns once more"):
            read_graph(path, weight=name)


@pytest.mark.parametrize("mark", [",", "\t"])
@pytest.mark.parametrize(("word", "encoding"), [("échange", "latin-1"), ("источник", "cp1251"), ("类别", "gb18030")])
def test_names_in_other_encodings_are_refused_or_passed_over(made, word, encoding, mark):
    """Names of columns of clicks that are not UTF-8 were a UnicodeDecodeError."""
    path = made(f"{word}|{word}2|weight\n1|2|1\n2|3|2\n", mark, encoding)
    assert _edges(read_graph(path, directed=True)) == [(1, 2, 1.0), (2, 3, 2.0)]
    with pytest.raises(InputError, match="has no column"):
        read_graph(path, source=word)
    doors = {
        "clicks": lambda: read_clicks(path),
        "added": lambda: read_edges(path, GRAPH),
        "of kinds": lambda: open_typed(path, "weight", None, "edges", directed=True, columns=None, quiet=True),
        "items": lambda: read_items(path),
        "vectors": lambda: read_vectors(path),
    }
    for door, read in doors.items():
        with pytest.raises(AnabranchError, match=r"UTF-?8|is its first line"):
            pytest.fail(f"{door}: {read()}")


@pytest.mark.parametrize("text", ["²", "٣", "\uff11", "--5", "-", "", "1_0", " 1", "9" * 5000])
def test_only_figures_of_ascii_are_numbers_in_options(text):
    """² was a ValueError, as it is a figure to Python that makes no number."""
    assert whole_number(text) is None
    if text and text == text.strip():
        assert columns_of(f"{text},0") == {"source": text, "target": 0, "weight": None}
    model = GRank().fit([(1, "jazz", 2), (2, "jazz", 3)])
    assert _user(model, text) == text
    assert _id(Peer([Item(5)], "me"), text) == text
    assert _id(Peer((), "me"), text) == text
    with pytest.raises(InputError, match="write HOST:PORT"):
        _address("--listen", f"here:{text}")


def test_figures_of_ascii_are_numbers_in_options():
    assert columns_of("0,12,name") == {"source": 0, "target": 12, "weight": "name"}
    assert columns_of("-1,0") == {"source": "-1", "target": 0, "weight": None}
    assert _user(GRank().fit([(1, "jazz", 2), (-2, "jazz", 3)]), "-2") == -2
    assert [_id(Peer([Item(5)], "me"), text) for text in ("5", "6")] == [5, "6"]
    assert [_id(Peer((), "me"), text) for text in ("5", str(2**53))] == [5, str(2**53)]
    assert _address("--listen", "[::1]:80") == ("::1", 80)
