"""The study of Rewiring: its controls leave the model as it was and learn, its measures by hand, its rule, and its quick form."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from anabranch.adapters.rewiring import Rerouter, Rewiring
from anabranch.lm import Decoder
from anabranch.nn import MoE
from anabranch.studies.harness import Results
from anabranch.studies.rewiring import ARMS, judge, make, run
from anabranch.studies.rewiring_controls import CONTROLS, fitted_control
from anabranch.studies.rewiring_small import losses

CONTEXT = list(b"the same words, and the same words, and the same words again and again")


@pytest.fixture(scope="module")
def model():
    layer = MoE.Config(num_experts=4, hidden_dim=16)
    config = Decoder.Config(dim=16, num_layers=2, feed_forward=layer, max_positions=128)
    return config.build(seed=0).double().eval().requires_grad_(False)


@torch.no_grad()
def nats(model, tokens):
    token_BL = torch.tensor([tokens])
    return float(F.cross_entropy(model(token_BL[:, :-1]).logits_BLV[0], token_BL[0, 1:]))


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_learns_the_context_and_leaves_the_model_as_it_was(model, name):
    own = copy.deepcopy(model)
    before, state = nats(own, CONTEXT), {key: value.clone() for key, value in own.state_dict().items()}
    with fitted_control(own, name, CONTEXT, rate=0.02, steps=5):
        assert nats(own, CONTEXT) < before
    assert nats(own, CONTEXT) == before
    assert own.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in own.state_dict().items())
    assert not any(one.grad is not None for one in own.parameters())


def test_losses_are_of_what_follows_alone(model):
    context, follows = CONTEXT[:40], CONTEXT[40:48]
    log_p = model(torch.tensor([context + follows])).logits_BLV[0].log_softmax(-1)
    wanted = -sum(float(log_p[39 + place, token]) for place, token in enumerate(follows)) / len(follows)
    assert losses(model, [(context, follows)])[0] == pytest.approx(wanted, rel=1e-5)
    # Routers that were fitted are as `attached` has them.
    config = Rewiring(interval=None, guard=False, select="all", scale_step=False)
    rerouter = Rerouter(model, config)
    state = rerouter.new_state()
    rerouter.adapt([context], [state])
    with rerouter.attached(state):
        changed = losses(model, [(context, follows)])[0]
    assert losses(model, [(context, follows)], config) == [pytest.approx(changed)]
    assert changed != pytest.approx(wanted, rel=1e-6)


def runs(**values):
    return {seed: {"zero": 0.0, **{name: each[seed] for name, each in values.items()}} for seed in range(5)}


def test_the_rule():
    gain = [0.030, 0.034, 0.029, 0.031, 0.033]
    small = runs(gain=gain, undone=[0.30, 0.33, 0.31, 0.32, 0.30], gain_free=gain, most_control=[0.02] * 5)
    found = {claim.claim: claim for claim in judge(Results({"small": small}))}
    primary = found["PRIMARY: unseen text is foretold better by more than 0.01 nats a byte"]
    assert (primary.verdict, primary.limit) == ("holds", pytest.approx(0.01))
    assert found["small: at least 40% of a disturbance is undone, without the guard"].verdict == "does not hold"
    assert found["small: at least 80% of the best of four other things that learn as many steps"].verdict == "holds"
    assert found["SmolLM2: unseen text is foretold better"].verdict == "not run"


def test_both_sizes_are_made():
    assert make().seeds == (0, 1)
    assert make().default_arms == ("small",)
    assert make(full=True).seeds == (0, 1, 2, 3, 4)
    assert [arm.name for arm in make(full=True).arms] == list(ARMS)


@pytest.mark.slow
def test_the_quick_form_measures_everything():
    found = run(make().arms[0].config, 0, lambda text: None)
    assert all(math.isfinite(value) for value in found.values())
    asked = judge(Results({"small": {0: found}}))
    assert {claim.verdict for claim in asked if not claim.claim.startswith("SmolLM2")} == {"not resolved"}
    assert {f"gain_{name}" for name in CONTROLS} <= found.keys()
    assert any(name.startswith("sweep_") for name in found)
