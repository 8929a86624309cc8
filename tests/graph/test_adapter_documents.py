"""What belongs to vectors: ids that are text, contents, and both kept together."""

import json

import numpy as np
import pytest

from anabranch.errors import DataError, InputError
from anabranch.graph.adapters.documents import DOCUMENTS, INDEX, Documents

ROWS = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)


def made():
    documents = Documents(metric="l2", M=4, ef_construction=20)
    documents.put(["a", "b", "c"], ROWS[:3], [1, {"x": "y"}, None])
    return documents


def test_contents_come_move_and_go():
    documents = made()
    assert documents.search(ROWS[1], 2)[0][0] == "b"
    documents.put(["b", "d"], ROWS[10:12], ["new", "d"])
    assert documents.search(ROWS[10], 1) == [("b", 0.0)]
    assert documents.content("b") == "new"
    assert documents.drop(["a", "a", "nobody"]) == 1
    assert ("a" in documents, len(documents), documents.ids()) == (False, 3, ["b", "c", "d"])
    assert {id for id, _ in documents.search(ROWS[0], 9)} == {"b", "c", "d"}
    assert {id for id, _ in documents.search(ROWS[0], 9, ["c"])} == {"c"}
    assert documents.search(ROWS[0], 9, []) == []
    # A number is never given twice, so nobody finds another's content.
    documents.put(["e"], ROWS[20:21], ["e"])
    assert documents.search(ROWS[20], 1) == [("e", 0.0)]


def test_of_one_id_the_last_counts():
    documents = made()
    documents.put(["z", "z"], ROWS[5:7], ["first", "last"])
    assert (documents.content("z"), documents.search(ROWS[6], 1)[0][0], len(documents)) == ("last", "z", 4)


def test_an_empty_one():
    documents = Documents()
    documents.put([], [], [])
    assert (documents.search([1.0, 2.0], 3), documents.drop(["x"]), len(documents)) == ([], 0, 0)


@pytest.mark.parametrize(
    ("vectors", "contents", "message"),
    [
        (ROWS[:1], [{1, 2}], "the content of 'n' cannot be kept"),
        (ROWS[:2], ["n"], "there are 1 ids and vectors of the shape"),
        (ROWS[:1, :3], ["n"], "rows of 4 numbers"),
        ([[np.nan] * 4], ["n"], "is not finite"),
    ],
)
def test_what_cannot_be_taken_changes_nothing(vectors, contents, message):
    documents = made()
    with pytest.raises(InputError, match=message):
        documents.put(["n"], vectors, contents)
    assert ("n" in documents, len(documents.index)) == (False, 3)
    empty = Documents(metric="l2")
    with pytest.raises(InputError):
        empty.put(["n"], [[np.inf] * 4], ["n"])
    assert empty.index is None


def test_saved_and_loaded(tmp_path):
    documents = made()
    documents.drop(["a"])
    documents.save(tmp_path)
    again = Documents.load(tmp_path, metric="l2")
    assert [(id, again.content(id)) for id in again.ids()] == [("b", {"x": "y"}), ("c", None)]
    assert again.search(ROWS[1], 2) == documents.search(ROWS[1], 2)
    again.put(["n"], ROWS[30:31], ["n"])
    assert again.search(ROWS[30], 1) == [("n", 0.0)]
    Documents().save(tmp_path / "empty")
    assert len(Documents.load(tmp_path / "empty")) == 0


def test_files_that_do_not_belong_together(tmp_path):
    documents = made()
    documents.save(tmp_path)
    found = json.loads((tmp_path / DOCUMENTS).read_text())

    def refused(message, **changes):
        (tmp_path / DOCUMENTS).write_text(json.dumps({**found, **changes}))
        with pytest.raises(DataError, match=message):
            Documents.load(tmp_path)

    refused("belongs to another index", index="1-2")
    refused("does not name the vectors", documents=found["documents"][:2])
    refused("is version 9", version=9)
    refused("is damaged", documents=[[1]])
    refused("is damaged", documents=3)
    (tmp_path / DOCUMENTS).write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        Documents.load(tmp_path)
    (tmp_path / DOCUMENTS).write_text(json.dumps(found))
    documents.put(["n"], ROWS[9:10], ["n"])
    documents.index.save(tmp_path / INDEX)
    with pytest.raises(DataError, match="belongs to another index"):
        Documents.load(tmp_path)
    with pytest.raises(DataError, match="cannot read"):
        Documents.load(tmp_path / "none")
