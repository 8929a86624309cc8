"""Judged steps from files and from outcomes; what is none is told with its line."""

import json

import numpy as np
import pytest

from anabranch.errors import DataError, InputError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.scale.steps import Steps


def read(tmp_path, *rows):
    path = tmp_path / "steps.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return Steps.read(path)


def test_steps_of_both_systems(tmp_path):
    found = read(
        tmp_path,
        {"step": "a", "right1": 0, "right2": True},
        "",
        {"text": "b", "right1": 0.25, "right2": 1},
        {"query": "c", "right1": False, "right2": 0},
    )
    assert found.text == ("a", "b", "c")
    assert (found.right1_N.tolist(), found.right2_N.tolist()) == ([0, 0.25, 0], [1, 1, 0])
    part = found.take(np.array([2, 0]))
    assert (part.text, part.right1_N.tolist(), part.right2_N.tolist()) == (("c", "a"), [0, 0], [0, 1])
    alone = read(tmp_path, {"question": "a", "right1": 1})
    assert (len(alone), alone.right2_N, alone.take(np.array([0])).right2_N) == (1, None, None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: a row must be an object with step and right1"),
        ({"right1": 1}, "line 2: step is null; it must be a text that is not empty"),
        ({"step": " ", "right1": 1}, 'line 2: step is " "'),
        ({"step": "a"}, "line 2: right1 is missing"),
        ({"step": "a", "right1": 2}, "line 2: right1 is 2; it must be from 0 to 1"),
        ('{"step": "a", "right1": NaN}', "line 2: "),
        ({"step": "a", "right1": "yes"}, 'line 2: right1 is "yes"'),
        ({"step": "a", "right1": 1, "right2": 0}, "line 2: right2 is there, unlike before"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, {"step": "a", "right1": 1}, row)


def test_no_rows(tmp_path):
    with pytest.raises(DataError, match="holds no steps; a line is"):
        read(tmp_path, "")


def test_outcomes_of_two_models_are_steps(tmp_path):
    data = Recorded(
        query=("a", "b", "c"), models=("small", "large"), score_NM=np.array([[0.0, 1.0], [np.nan, 1.0], [1.0, 0.5]])
    )
    found = Steps.of_outcomes(data, "small", "large")
    assert (found.text, found.right1_N.tolist(), found.right2_N.tolist()) == (("a", "c"), [0, 1], [1, 0.5])
    assert Steps.of_outcomes(data, "large", None).right2_N is None
    with pytest.raises(InputError, match="no model 'x' in the recorded outcomes"):
        Steps.of_outcomes(data, "x", None)
    with pytest.raises(DataError, match="is 7; scores must lie from 0 to 1: bring all to that scale"):
        Steps.of_outcomes(Recorded(query=("a",), models=("s",), score_NM=np.array([[7.0]])), "s", None)
