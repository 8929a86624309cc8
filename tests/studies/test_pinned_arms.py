"""What the arms of studies compute is what they did when ``pinned_arms.json`` was written, or somebody says that it moved."""

import json

import pytest
import torch

import pinned_arms

RECORDED = json.loads(pinned_arms.RECORD.read_text())
# As in tests/test_golden.py: another processor may change the last bits, which a few steps of training enlarge.
FIRST, LATER = 1e-5, 5e-3


@pytest.fixture
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", pinned_arms.NAMES)
def test_first_steps_of_every_arm(name, tmp_path, same_threads):
    found = pinned_arms.losses(name, tmp_path)
    assert found.keys() == RECORDED[name].keys()
    for arm, losses in found.items():
        assert losses[0] == pytest.approx(RECORDED[name][arm][0], rel=FIRST), arm
        assert losses == pytest.approx(RECORDED[name][arm], rel=LATER), arm
