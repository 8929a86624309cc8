"""Scoring with online rewiring: what comes behind a phase is measured, with vectors of what stands before it."""

import math

import pytest
import torch
import torch.nn.functional as F

from anabranch.adapters.rewiring import Rerouter, Rewiring
from anabranch.adapters.rewiring.scored import Comparison, Scored
from anabranch.adapters.rewiring.state import Phase, RewiringState
from anabranch.adapters.rewiring.vectors import Vectors, run
from anabranch.errors import ConfigError
from anabranch.lm import Decoder, SamplingConfig
from anabranch.nn import MoE
from anabranch.routing import ExpertChoice, Router, TopK

LAYER = MoE.Config(num_experts=4, hidden_dim=16, router=Router.Config(select=TopK.Config(normalize="sum")))
QUICK = Rewiring(interval=12, steps=2, eta=0.5, scale_step=False, least_tail=6)
CONFIGS = {
    "as it is": QUICK,
    "no guard": QUICK.replace(guard=False),
    "a window": QUICK.replace(window=10),
    "the prompt alone": QUICK.replace(interval=None),
    "keys and values that stay": QUICK.replace(cache="keep"),
    "some layers": QUICK.replace(select="uncertain", choice="soft"),
    "steps in all": QUICK.replace(most_steps=3),
}


def model_of(feed_forward=LAYER, **changes):
    body = {"vocab_size": 61, "dim": 16, "num_layers": 2, "init_std": 0.4, "depth_scaled_init": False}
    return Decoder.Config(**{**body, **changes}, feed_forward=feed_forward).build(seed=0).eval()


def texts(count=3, length=50, seed=0):
    return torch.randint(61, (count, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def losses(model, rerouter, token_L, delta):
    """nats of each token but the first, the whole text with one vector each."""
    vectors = Vectors(rerouter.layers, [delta_E[None] for delta_E in delta], len(token_L))
    logits_LV = run(model, token_L[None], None, vectors)[0, :-1]
    return F.cross_entropy(logits_LV, token_L[1:], reduction="none")


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if CONFIGS[kind].cache == "recompute"])
def test_it_is_the_two_phases_written_out(kind):
    """Of each text alone, the whole text anew for each phase; in a batch."""
    model, config, token_BL, first = model_of(), CONFIGS[kind], texts(), 20
    rerouter = Rerouter(model, config)
    scored = rerouter.score(token_BL, first=first)
    starts = [20] if config.interval is None else [20, 32, 44]
    assert list(scored.starts) == starts
    moved = 0
    for row, token_L in enumerate(token_BL):
        state = rerouter.new_state()
        plain = losses(model, rerouter, token_L, state.delta)
        torch.testing.assert_close(scored.plain_BL[row], plain)
        wanted = plain.clone()
        for start, end in zip(starts, [*starts[1:], 50], strict=True):
            rerouter.adapt([token_L[:start].tolist()], [state])
            wanted[start - 1 : end - 1] = losses(model, rerouter, token_L, state.delta)[start - 1 : end - 1]
        torch.testing.assert_close(scored.rewired_BL[row], wanted, atol=2e-5, rtol=2e-5)
        assert [phase.scale for phase in scored.states[row].phases] == [phase.scale for phase in state.phases]
        assert torch.equal(scored.rewired_BL[row, : first - 1], scored.plain_BL[row, : first - 1])
        moved += not torch.equal(scored.rewired_BL[row], scored.plain_BL[row])
    assert moved


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_is_generation_in_which_the_text_says_what_comes(kind):
    """Of what is generated without chance each token is the likeliest: its loss is least among all that might stand there."""
    model = model_of()
    rerouter = Rerouter(model, CONFIGS[kind])
    prompt, state = texts(1, 20)[0].tolist(), rerouter.new_state()
    [new] = rerouter.generate([prompt], SamplingConfig(max_tokens=30, temperature=0), states=[state])
    scored = rerouter.score(torch.tensor([prompt + new]), first=20)
    own = scored.states[0]
    assert [phase.steps for phase in own.phases] == [phase.steps for phase in state.phases]
    for one, other in zip(own.delta, state.delta, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    for place in (0, 11, 12, 13, 29):
        others = torch.tensor([[*prompt, *new[:place], token] for token in range(61)])
        each = rerouter.score(others, first=20).rewired_BL[:, -1]
        assert int(each.argmin()) == new[place], place
        # All that may come is as likely as it can be: probabilities.
        assert float((-each).exp().sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_nothing_is_fitted_to_what_is_measured(kind):
    """Another end of the text changes no vector that was there before it, to the bit, and no loss but by rounding."""
    rerouter = Rerouter(model_of(), CONFIGS[kind])
    token_BL = texts()
    scored = rerouter.score(token_BL, first=20)
    for end in (20, 27, 32, 40, 49):
        other_BL = token_BL.clone()
        other_BL[:, end:] = texts(seed=1)[:, end:]
        other = rerouter.score(other_BL, first=20)
        # Experts multiply rows of others with them, which moves the last digit.
        torch.testing.assert_close(
            other.rewired_BL[:, : end - 1], scored.rewired_BL[:, : end - 1], atol=1e-5, rtol=1e-5
        )
        fitted = sum(start <= end for start in scored.starts)
        for one, another in zip(scored.states, other.states, strict=True):
            for phase, twin in zip(one.phases[:fitted], another.phases[:fitted], strict=True):
                assert phase.norms == twin.norms


def test_where_the_first_phase_is():
    model = model_of()
    assert Rerouter(model, QUICK).score(texts()).starts == (12, 24, 36, 48)
    assert Rerouter(model, QUICK.replace(interval=None)).score(texts()).starts == (25,)
    assert Rerouter(model, QUICK).score(texts(), first=49).starts == (49,)
    with pytest.raises(ConfigError, match="the text has 50 tokens, of which the first 50 are read"):
        Rerouter(model, QUICK).score(texts(), first=50)
    with pytest.raises(ConfigError, match="of which the first 128 are read"):
        Rerouter(model).score(texts())
    with pytest.raises(ConfigError, match="60"):
        Rerouter(model).score(texts() + 61)
    router = Router.Config(select=ExpertChoice.Config())
    other = model_of(MoE.Config(num_experts=4, hidden_dim=16, router=router))
    with pytest.raises(ConfigError):
        Rerouter(other, QUICK).score(texts())


def test_the_model_is_left_as_it_was():
    model = model_of().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Rerouter(model, QUICK).score(texts())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def made(plain, rewired, reports=None):
    """Texts of 4 tokens, of which two are read before a phase each token."""
    plain_BL, rewired_BL = torch.tensor(plain), torch.tensor(rewired)
    states = [RewiringState([], phases=reports or [Phase(2), Phase(3)]) for _ in plain]
    return Scored((2, 3), plain_BL, rewired_BL, states)


def test_a_comparison_is_of_what_was_measured_alone():
    """By hand: nats per token, and the error over texts; what stands before the first phase is in neither."""
    found = Comparison(("a", "b", "c"))
    found.add(made([[9.0, 2.0, 3.0], [9.0, 4.0, 5.0]], [[9.0, 1.0, 3.0], [9.0, 4.0, 3.0]]), torch.tensor([0, 2]))
    found.add(made([[9.0, 6.0, 6.0]], [[9.0, 6.0, 9.0]]), torch.tensor([2]))
    told = found.to_dict()
    assert (told["texts"], told["tokens"]) == (3, 6)
    assert told["plain"] == pytest.approx(26 / 6)
    assert (told["rewired"], told["difference"]) == (pytest.approx(26 / 6), pytest.approx(0))
    # Differences of the texts are -1, -2 and 3 of 2 tokens each; their mean over texts has the usual error.
    differences = torch.tensor([-0.5, -1.0, 1.5], dtype=torch.float64)
    assert told["standard_error"] == pytest.approx(float(differences.std() / math.sqrt(3)))
    assert set(told["by_domain"]) == {"a", "c"}
    assert told["by_domain"]["a"]["standard_error"] is None
    assert told["by_domain"]["c"]["difference"] == pytest.approx(0.25)
    first, second = told["phases"]
    assert (first["read"], first["tokens"], first["difference"]) == (2, 3, pytest.approx(-1 / 3))
    assert (second["read"], second["tokens"], second["difference"]) == (3, 3, pytest.approx(1 / 3))
    assert first["kept"] is None


def test_a_comparison_tells_what_phases_did():
    reports = [
        Phase(
            2, steps=2, scale=0.5, tail_before=3.0, tail_after=2.0, overlap=(0.5, None), norms=(1.0, 3.0), seconds=2.0
        ),
        Phase(3, skipped="too short"),
    ]
    found = Comparison()
    found.add(made([[9.0, 2.0, 3.0]] * 2, [[9.0, 1.0, 3.0]] * 2, reports))
    told = found.to_dict()
    assert told["seconds"] == 2.0
    assert "by_domain" not in told
    first, second = told["phases"]
    assert (first["steps"], first["overlap"], first["norms"], first["tail_after"]) == (2, 0.5, 2.0, 2.0)
    assert first["kept"] == {"none": 0, "half": 2, "all": 0, "reset": 0}
    assert (second["steps"], second["overlap"], second["kept"]) == (0, None, None)
    assert second["skipped"] == {"too short": 2}
