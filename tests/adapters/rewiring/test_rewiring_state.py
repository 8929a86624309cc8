"""What a rewired request keeps: saved, loaded, copied, reset."""

import io

import pytest
import torch

from anabranch.adapters.rewiring import Phase, RewiringState
from anabranch.errors import ConfigError


def state_of(*values):
    return RewiringState([torch.tensor(value) for value in values], 3, 0.5, [Phase(7)])


def test_it_goes_through_a_file_and_is_its_own():
    state, fresh = state_of([1.0, -1.0], [0.5, 0.0, -0.5]), state_of([0.0, 0.0], [0.0] * 3)
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(one, other) for one, other in zip(fresh.delta, state.delta, strict=True))
    assert (fresh.steps, fresh.seconds) == (3, 0.5)
    kept = state.state_dict()
    fresh.load_state_dict(kept)
    kept["delta"][0][0] = 9.0
    assert fresh.delta[0][0] == state.delta[0][0] == 1.0


def test_a_copy_goes_on_alone_and_a_reset_begins_anew():
    state = state_of([1.0, -1.0])
    other = state.copy()
    other.delta[0][0] = 5.0
    other.phases.append(Phase(8))
    assert state.delta[0][0] == 1.0
    assert len(state.phases) == 1
    assert not state.is_zero
    state.reset()
    assert state.is_zero
    assert (state.steps, state.seconds, state.phases) == (0, 0.0, [])
    assert other.delta[0].tolist() == [5.0, -1.0]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "no delta, steps and seconds"),
        ([], "no state of a rewired request"),
        ({"delta": 3, "steps": 0, "seconds": 0.0}, "delta of a rewired request is a list of tensors"),
        ({"delta": [1.0], "steps": 0, "seconds": 0.0}, "delta of a rewired request is a list of tensors"),
        ({"delta": [torch.zeros(3)], "steps": 0, "seconds": 0.0}, r"shapes \[\[3\]\], but the model needs \[\[2\]\]"),
        ({"delta": [torch.tensor([0.0, torch.inf])], "steps": 0, "seconds": 0.0}, "a number that is not finite"),
        (
            {"delta": [torch.tensor([1e300] * 2, dtype=torch.float64)], "steps": 0, "seconds": 0.0},
            "not finite in torch.float32",
        ),
        ({"delta": [torch.ones(2) * 1j], "steps": 0, "seconds": 0.0}, "complex numbers"),
        ({"delta": [torch.ones(2)], "steps": "x", "seconds": 0.0}, "steps of the state is 'x'"),
        ({"delta": [torch.ones(2)], "steps": -100, "seconds": 0.0}, "steps of the state is -100"),
        ({"delta": [torch.ones(2)], "steps": 1.5, "seconds": 0.0}, "steps of the state is 1.5"),
        ({"delta": [torch.ones(2)], "steps": 0, "seconds": float("nan")}, "seconds of the state is nan"),
        ({"delta": [torch.ones(2)], "steps": 0, "seconds": -1}, "seconds of the state is -1"),
        ({"delta": [torch.ones(2)], "steps": 0, "seconds": None}, "seconds of the state is None"),
    ],
)
def test_what_is_no_state_of_it_changes_nothing(found, message):
    state = state_of([1.0, -1.0])
    with pytest.raises(ConfigError, match=message):
        state.load_state_dict(found)
    assert state.delta[0].tolist() == [1.0, -1.0]
    assert state.steps == 3
