"""Single answers as right or wrong: what counts, on which scale, of whom."""

import json
from dataclasses import replace

import numpy as np
import pytest

from anabranch.errors import DataError, InputError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.data import pooled
from anabranch.routers.data.jsonl import load_jsonl
from anabranch.routers.samples import drawn

DATA = Recorded(
    query=("a", "b", "c"),
    models=("small", "large"),
    task=("t", None, "u"),
    score_NM=np.array([[5.0, 9.0], [10.0, np.nan], [np.nan, 0.0]]),
    samples=({"small": (0.0, 10.0)}, {}, {}),
)
TEN = {"scale": (0.0, 10.0)}


def test_what_a_model_answered_is_right_from_half_of_the_scale_of_single_answers():
    found = drawn(DATA, "small", **TEN)
    assert found.row_Q.tolist() == [0, 1]
    assert found.task_Q.tolist() == ["t", ""]
    assert [one.tolist() for one in found.right] == [[False, True], [True]]
    assert (found.correct_Q.tolist(), found.samples_Q.tolist()) == ([1, 1], [2, 1])
    other = drawn(DATA, "large", **TEN)
    assert [one.tolist() for one in other.right] == [[True], [False]]
    assert other.row_Q.tolist() == [0, 2]
    assert found.take(np.array([1])).right[0].tolist() == [True]


def test_the_scale_is_the_one_that_was_said():
    assert drawn(DATA, "large", right=0.95, **TEN).right[0].tolist() == [False]
    assert drawn(DATA, "large", right=0.95, scale=(-10.0, 10.0)).right[0].tolist() == [True]
    assert drawn(DATA, "large", right=0.5, scale=(0.0, 20.0)).right[0].tolist() == [False]
    for scale in ((1.0, 0.0), (1.0, 1.0), (0.0, np.inf), (np.nan, 1.0), (0.0,), (0.0, 1.0, 2.0)):
        with pytest.raises(
            InputError, match="it must be the scores of the worst and the best answer, the lower one first"
        ):
            drawn(DATA, "large", scale=scale)
    with pytest.raises(InputError, match=r"right is 1\.5; it must be a number from 0\.0 to 1\.0"):
        drawn(DATA, "small", right=1.5)


@pytest.mark.parametrize("odd", [-1.0, 100.0, -0.001, 1.001])
def test_one_odd_score_is_told_and_turns_no_other_over(odd):
    """The scale went from the least to the largest: one of -1 made each 0 right, one of 100 each 1 wrong."""
    samples = [{"m": (0.0, 0.0, 1.0)} for _ in range(40)]
    whole = Recorded(
        query=tuple(f"q{at}" for at in range(40)),
        models=("m",),
        score_NM=np.full((40, 1), 1 / 3),
        samples=tuple(samples),
    )
    assert drawn(whole, "m").correct_Q.tolist() == [1] * 40
    samples[5] = {"m": (0.0, odd, 1.0)}
    with pytest.raises(DataError) as caught:
        drawn(replace(whole, samples=tuple(samples)), "m")
    assert str(caught.value) == (
        f"a score of m for the question 'q5' is {odd:g}; scores must lie from 0 to 1: mend it, or say the scale of all "
        "(scale, the worst and the best score)"
    )


def test_samples_that_are_not_known_are_to_be_left_out(tmp_path):
    """One message said to write null, the next refused it."""
    for odd, told in ((None, "null"), ("yes", "'yes'")):
        with pytest.raises(DataError) as caught:
            read(tmp_path, {"question": "a", "samples": [1, odd]})
        assert str(caught.value).endswith(
            f"sample 2 of 'model' is {told}; it must be a finite number; leave out what is not known"
        )


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
