"""The state of a rewired request as JSON: it reads back to the bit, goes on, and what is no state of the model is refused."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from anabranch.adapters.rewiring import Rerouter, Rewiring
from anabranch.adapters.rewiring.state import MOST_SECONDS, MOST_SHIFT, MOST_STEPS
from anabranch.errors import ConfigError
from anabranch.lm import Decoder, load_model, save_model
from anabranch.nn import MoE
from anabranch.routing import Router, TopK
from anabranch.serving.load import load_weights

QUICK = Rewiring(steps=2, eta=0.5, scale_step=False, guard=False, interval=4)
TEXT = list(range(20))


LAYER = MoE.Config(num_experts=4, hidden_dim=32, router=Router.Config(select=TopK.Config(normalize="sum")))


def tiny_model(seed=0, **changes):
    body = {"vocab_size": 61, "dim": 16, "num_layers": 2, "init_std": 0.4, "depth_scaled_init": False}
    return Decoder.Config(**{**body, **changes}, feed_forward=LAYER).build(seed=seed).eval()


@pytest.fixture
def rerouter():
    return Rerouter(tiny_model(), QUICK)


def fitted(rerouter, text=TEXT):
    state = rerouter.new_state()
    rerouter.adapt([text], [state])
    assert not state.is_zero
    return state


def through_json(told):
    return json.loads(json.dumps(told, allow_nan=False))


def test_it_reads_back_to_the_bit_and_goes_on_as_the_request_itself(rerouter):
    state = fitted(rerouter)
    back = rerouter.state_from_told(through_json(rerouter.told_state(state)))
    assert all(torch.equal(one, other) for one, other in zip(back.delta, state.delta, strict=True))
    assert (back.steps, back.seconds, back.phases) == (state.steps, state.seconds, [])
    state.go_on()
    longer = [*TEXT, 3, 1, 4]
    for one in (state, back):
        rerouter.adapt([longer], [one])
    assert all(torch.equal(one, other) for one, other in zip(back.delta, state.delta, strict=True))
    assert back.steps == state.steps == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_number_reads_back_to_the_bit(dtype):
    rerouter = Rerouter(tiny_model().to(dtype), QUICK)
    for seed in range(200):
        state = rerouter.new_state()
        random = torch.Generator().manual_seed(seed)
        for delta_E in state.delta:
            size = 10.0 ** torch.randint(-38, 5, delta_E.shape, generator=random)
            delta_E.copy_(torch.randn(delta_E.shape, generator=random, dtype=torch.float64) * size)
            delta_E.clamp_(-MOST_SHIFT, MOST_SHIFT)
        back = rerouter.state_from_told(through_json(rerouter.told_state(state)))
        assert all(torch.equal(one, other) for one, other in zip(back.delta, state.delta, strict=True))


def test_limits_are_of_a_request_not_of_its_conversation():
    rerouter = Rerouter(tiny_model(), replace_config(most_steps=3))
    state = rerouter.new_state()
    for taken, said in ((2, None), (3, "has taken its 3 steps"), (3, "has taken its 3 steps")):
        [report] = rerouter.adapt([TEXT], [state])
        assert state.steps == taken
        assert said is None or said in report.skipped
    state.go_on()
    assert state.phases == []
    rerouter.adapt([TEXT], [state])
    assert (state.steps, state.own_steps) == (5, 2)
    other = state.copy()
    assert (other.own_steps, other.own_seconds) == (2, state.own_seconds)
    state.reset()
    assert (state.own_steps, state.own_seconds) == (0, 0.0)


@given(steps=st.integers(0, MOST_STEPS), seconds=st.floats(0, MOST_SECONDS))
@example(steps=MOST_STEPS, seconds=MOST_SECONDS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_conversation_has_taken_its_limits_hold_and_what_is_told_can_be_given_back(rerouter, steps, seconds):
    told = {**rerouter.told_state(rerouter.new_state()), "steps": steps, "seconds": seconds}
    config = replace(QUICK, most_seconds=25.0, most_steps=3)
    state, ticks = rerouter.state_from_told(told), iter(range(0, 10_000, 10))
    taken = [rerouter.adapt([TEXT], [state], config=config, clock=lambda: next(ticks))[0] for _ in range(3)]
    # The first phase asks the clock four times, so that 25 seconds are up in it.
    assert [report.steps for report in taken] == [2, 0, 0]
    assert (state.own_steps, state.own_seconds) == (2, sum(report.seconds for report in taken))
    back = rerouter.state_from_told(through_json(rerouter.told_state(state)))
    assert (back.steps, back.seconds) == (min(steps + 2, MOST_STEPS), min(seconds + state.own_seconds, MOST_SECONDS))


@pytest.mark.parametrize("guard", [True, False])
def test_time_is_up_before_the_first_step_and_there_is_more_for_the_next_request(guard):
    rerouter = Rerouter(tiny_model(), replace_config(most_seconds=5.0, guard=guard, least_tail=4))
    state, ticks = rerouter.new_state(), iter(range(0, 1000, 10))
    [report] = rerouter.adapt([TEXT], [state], clock=lambda: next(ticks))
    assert "has spent its 5 seconds" in report.skipped
    assert (report.steps, report.loss_before) == (0, report.loss_after)
    assert set(report.overlap) == {1.0}
    assert state.is_zero
    [report] = rerouter.adapt([TEXT], [state], clock=lambda: next(ticks))
    assert report.loss_before is None
    state.go_on()
    [report] = rerouter.adapt([TEXT], [state], clock=lambda: 0.0)
    assert (report.skipped, report.steps) == (None, 2)


def replace_config(**changes):
    return replace(QUICK, **changes)


def test_steps_without_end_stay_numbers_that_a_state_may_have():
    """Of whatever size: what a server tells it takes again."""
    rerouter = Rerouter(tiny_model(), replace_config(eta=1e37, steps=3))
    state = fitted(rerouter)
    assert max(float(delta_E.abs().max()) for delta_E in state.delta) <= MOST_SHIFT
    rerouter.state_from_told(rerouter.told_state(state))


def test_a_model_has_one_fingerprint_whatever_it_is_held_in(tmp_path):
    model = tiny_model(dim=64)
    save_model(tmp_path / "m", model, None)
    forms = [load_model(tmp_path / "m")[0], model.to(torch.bfloat16)]
    forms += [
        load_weights(tmp_path / "m", dtype=torch.float32, quantize=bits).model for bits in ("int8", "int4", "nf4")
    ]
    prints = {Rerouter(form).fingerprint for form in forms}
    assert len(prints) == 1
    others = [tiny_model(dim=64, seed=1), tiny_model(dim=32)]
    assert all(Rerouter(other).fingerprint not in prints for other in others)


CHANGES = [
    ({"kind": "other"}, "no state of a rewired request"),
    ({"version": 2}, "its version is 2; this version of anabranch reads 1"),
    ({"version": True}, "its version is True"),
    ({"model": "rt_other"}, "it is of the routers 'rt_other', and the model's are 'rt_"),
    ({"model": None}, "it is of the routers None"),
    ({"routers": []}, "vectors of one model mean nothing to another"),
    ({"more": 1}, "it has the field 'more', which no state has"),
    ({"delta": None}, "its delta is None; it must be 2 lists"),
    ({"delta": []}, "its delta is 0 lists"),
    ({"delta": [[0.0] * 4]}, "its delta is 1 lists; it must be 2"),
    ({"delta": [[0.0] * 4, [0.0] * 3]}, r"its delta\[1\] is a list of 3; blocks.1.feed_forward.router has 4 experts"),
    ({"delta": [[0.0] * 4, "abcd"]}, r"its delta\[1\] is 'abcd'"),
    ({"delta": [[0.0] * 4, [0.0, 0.0, math.nan, 0.0]]}, r"its delta\[1\]\[2\] is nan; it must be a number"),
    ({"delta": [[0.0] * 4, [0.0, 0.0, math.inf, 0.0]]}, r"its delta\[1\]\[2\] is inf"),
    ({"delta": [[0.0] * 4, [0.0, 10**5000, 0.0, 0.0]]}, r"its delta\[1\]\[1\] is "),
    ({"delta": [[0.0] * 4, [0.0, 10001, 0.0, 0.0]]}, "10001; it must be a number from -10,000 to 10,000"),
    ({"delta": [[0.0] * 4, [0.0, True, 0.0, 0.0]]}, r"its delta\[1\]\[1\] is True"),
    ({"delta": [[0.0] * 4, [0.0, [1.0], 0.0, 0.0]]}, r"its delta\[1\]\[1\] is "),
    ({"delta": [[0.0] * 4, [0.0, None, 0.0, 0.0]]}, r"its delta\[1\]\[1\] is None"),
    ({"steps": -1}, "steps of the state is -1"),
    ({"steps": 10**5000}, "steps of the state is "),
    ({"steps": 2**53 + 1}, "it must be an integer from 0 to 9007199254740992"),
    ({"seconds": 10**400}, "seconds of the state is "),
    ({"seconds": 1e17}, "it must be a number from 0 to 3200000000"),
    ({"steps": 1.5}, "steps of the state is 1.5"),
    ({"seconds": math.nan}, "seconds of the state is nan"),
    ({"seconds": "1"}, "seconds of the state is '1'"),
]


@pytest.mark.parametrize(("change", "says"), CHANGES, ids=[str(number) for number in range(len(CHANGES))])
def test_what_is_no_state_of_the_model_is_refused_in_one_line(rerouter, change, says):
    told = rerouter.told_state(rerouter.new_state())
    assert len(told["delta"]) == 2
    with pytest.raises(ConfigError, match=says) as raised:
        rerouter.state_from_told({**told, **change})
    assert len(str(raised.value)) < 500
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("found", [None, [], 3, "x", {}])
def test_what_is_no_state_at_all(rerouter, found):
    with pytest.raises(ConfigError, match="no state of a rewired request"):
        rerouter.state_from_told(found)


def test_each_field_is_needed(rerouter):
    told = rerouter.told_state(rerouter.new_state())
    for name in set(told) - {"kind"}:
        with pytest.raises(ConfigError, match=f"it has no {name}; take a state as it was told"):
            rerouter.state_from_told({key: value for key, value in told.items() if key != name})
