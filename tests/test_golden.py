"""Every preset computes what it did when ``golden.json`` was written, within what another processor may change.

After a change that is meant: ``python tests/golden.py --json tests/golden.json``, and say in the change what moved and why.
"""

import json
from pathlib import Path

import pytest

import golden
from anabranch.presets import PRESETS
from side_by_side import differences

RECORDED = json.loads((Path(__file__).parent / "golden.json").read_text())

# Sums in another order differ in the last bits, and twenty steps of training pull near-ties of routers apart.
FIRST, LATER = 1e-5, 2e-2


def test_every_preset_is_recorded():
    assert set(RECORDED) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_first_steps(name, tmp_path):
    found, wanted = golden.run(name, tmp_path), RECORDED[name]
    assert found["loss"][0] == pytest.approx(wanted["loss"][0], rel=FIRST)
    assert found["gradient_norm"][0] == pytest.approx(wanted["gradient_norm"][0], rel=1e-3)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=LATER)
    assert found["validation"] == pytest.approx(wanted["validation"], rel=LATER)
    assert found["loss"][-1] < found["loss"][0] - 0.5
    assert [len(tokens) for tokens in found["tokens"]] == [golden.TOKENS, golden.TOKENS]


def test_differences_names_the_first_of_each_quantity():
    before = {"dense": {"loss": [1.0, 2.0], "tokens": [[1]]}, "moe": {"loss": [1.0]}}
    assert differences(before, before) == []
    after = {"dense": {"loss": [1.0, 2.5], "tokens": [[1]]}, "duo": {"loss": []}}
    assert differences(before, after) == [
        "dense: loss 1 is 2.0 and 2.5",
        "moe: only in the first",
        "duo: only in the second",
    ]
    shorter = {"dense": {"loss": [1.0], "tokens": [[2]]}, "moe": {"loss": [1.0]}}
    assert differences(before, shorter) == [
        "dense: loss 1 is of another length",
        "dense: tokens 0 is [1] and [2]",
    ]
