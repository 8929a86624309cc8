"""Single answers as right or wrong: what counts, on which scale, of whom."""

import json
from dataclasses import replace

import numpy as np
import pytest

from anabranch.errors import DataError, InputError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.data import pooled
from anabranch.routers.data.jsonl import load_jsonl
from anabranch.routers.samples import drawn, right_span

DATA = Recorded(
    query=("a", "b", "c"),
    models=("small", "large"),
    task=("t", None, "u"),
    score_NM=np.array([[5.0, 9.0], [10.0, np.nan], [np.nan, 0.0]]),
    samples=({"small": (0.0, 10.0)}, {}, {}),
)


def test_what_a_model_answered_is_right_from_half_of_the_scale_of_single_answers():
    found = drawn(DATA, "small")
    assert found.row_Q.tolist() == [0, 1]
    assert found.task_Q.tolist() == ["t", ""]
    assert [one.tolist() for one in found.right] == [[False, True], [True]]
    assert (found.correct_Q.tolist(), found.samples_Q.tolist()) == ([1, 1], [2, 1])
    other = drawn(DATA, "large")
    assert [one.tolist() for one in other.right] == [[True], [False]]
    assert other.row_Q.tolist() == [0, 2]
    assert found.take(np.array([1])).right[0].tolist() == [True]


def test_the_scale_is_that_of_samples_and_not_of_their_means():
    # Means lie from 5 to 10; an answer that scored 6 is no bad one.
    assert (right_span(DATA).low, right_span(DATA).high) == (0.0, 10.0)
    assert drawn(DATA, "large", right=0.95).right[0].tolist() == [False]
    with pytest.raises(InputError, match=r"right is 1\.5; it must be a number from 0\.0 to 1\.0"):
        drawn(DATA, "small", right=1.5)


def test_what_single_answers_say_is_known_of_all_of_them_or_not_at_all():
    data = Recorded(
        query=("a", "b", "c", "d"),
        models=("small",),
        score_NM=np.array([[0.5], [1.0], [0.5], [0.0]]),
        answers=({"small": "one of both"}, {"small": "4"}, {}, {}),
        samples=({"small": (0.0, 1.0)}, {}, {"small": (1.0, 0.0)}, {}),
        texts=({}, {}, {"small": ("4", "5")}, {}),
    )
    assert drawn(data, "small").texts == ((), ("4",), ("4", "5"), ())
    assert drawn(data.take([2, 1]), "small").take(np.array([0])).texts == (("4", "5"),)
    with pytest.raises(DataError, match="texts has 1 rows; there are 4 queries"):
        replace(data, texts=({},))


def read(tmp_path, *rows):
    (tmp_path / "o.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_jsonl(tmp_path / "o.jsonl")


def test_texts_of_samples_are_read_in_every_form_of_row(tmp_path):
    alone = {"question": "a", "model": "m", "samples": [1, 0], "answers": ["4", "5"]}
    table = {"query": "a", "scores": {"m": [1, 0]}, "answers": {"m": ["4", "5"]}}
    each = [{"query": "a", "scores": {"m": score}, "answers": {"m": text}} for score, text in ((1, "4"), (0, "5"))]
    for rows in ([alone], [table], each):
        found = pooled(read(tmp_path, *rows))
        assert drawn(found, "m").texts == (("4", "5"),)
    # Where one of them is not known, none is: nobody could tell whose the others are.
    assert drawn(pooled(read(tmp_path, *each, {"query": "a", "scores": {"m": 1}})), "m").texts == ((),)
    assert drawn(pooled(read(tmp_path, table, *each)), "m").texts == (("4", "5", "4", "5"),)
    assert drawn(pooled(read(tmp_path, {"question": "a", "samples": [1, 0]})), "model").texts == ((),)


@pytest.mark.parametrize("answers", [["4"], ["4", 5], ["4", "5", "6"]])
def test_texts_that_are_not_one_for_each_sample_are_refused(tmp_path, answers):
    with pytest.raises(DataError, match=r"line 1: answers of 'm' are \[.*; they must be 2 texts, one for each sample"):
        read(tmp_path, {"query": "a", "scores": {"m": [1, 0]}, "answers": {"m": answers}})
    with pytest.raises(DataError, match=r"answer of 'm' is .*; it must be a text, or a text for each sample"):
        read(tmp_path, {"query": "a", "scores": {"m": 1}, "answers": {"m": answers}})
