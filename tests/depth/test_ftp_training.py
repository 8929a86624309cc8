"""The router of FTP learns: the pass with gates is the pruned pass, gradients reach the router and nothing else, losses are as told."""

import math

import pytest
import torch
import torch.nn.functional as F

from anabranch.depth.ftp import (
    FactorConfig,
    RouterConfig,
    TokenRouter,
    TokenSkipper,
    TrainingConfig,
    sparsity_loss,
    train_router,
)
from anabranch.depth.ftp.decider import Decider
from anabranch.depth.ftp.router import straight_through
from anabranch.depth.ftp.training import frozen, gated_pass
from anabranch.depth.gathered import gathered
from anabranch.depth.stack import stack_of
from anabranch.errors import ConfigError, DataError, NotFiniteError
from skipped_models import BLOCKS, decoder, items, tokens
from skipped_models import router as router_of

SCHEDULE = (0.0, 0.4, 0.6, 0.3, 1.0)


def router_with_gradient(config=None, seed=3):
    return router_of(seed, config).requires_grad_(True)


def gated(model, router, token_1L, prompt, schedule=SCHEDULE, kv="drop", **options):
    stack = stack_of(model)
    decider = Decider(router, schedule, torch.ones(1, prompt, dtype=torch.bool), mode="threshold", **options)
    x_1LD, state = stack.embed(token_1L)
    with torch.enable_grad():
        return gated_pass(gathered(stack), decider, x_1LD.detach(), prompt, kv=kv), state, stack


def test_gates_are_exactly_what_was_decided():
    score = torch.randn(1, 6, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    keep = torch.tensor([[1, 0, 1, 1, 0, 0]]).bool()
    gate = straight_through(score, keep)
    assert gate.tolist() == [[[0.0, 1.0] if kept else [1.0, 0.0] for kept in keep[0].tolist()]]
    (gradient,) = torch.autograd.grad(gate[..., 1].sum(), score)
    soft = score.softmax(-1)
    torch.testing.assert_close(gradient[..., 1], soft[..., 0] * soft[..., 1])


@pytest.mark.parametrize("kv", ["drop", "keep"])
@pytest.mark.parametrize(
    "options", [{}, {"one_pass": True}, {"factors": FactorConfig(causal=True)}, {"factors": FactorConfig(refresh=2)}]
)
def test_the_pass_with_gates_is_the_pruned_pass(kv, options):
    model, token_1L = decoder(window=5), tokens(1, 15)
    router = router_with_gradient()
    made, state, stack = gated(model, router, token_1L, 11, kv=kv, **options)
    skipper = TokenSkipper(model, SCHEDULE, router, mode="threshold", kv=kv, **options)
    prefilled = skipper.prefill(token_1L[:, :11])
    assert torch.equal(made.keep_IL[:, :11], prefilled.keep_IBL[:, 0])
    assert made.keep_IL[:, 11:].all(1).tolist() == [True, True, False, True, False]
    with torch.no_grad():
        logits = stack.head(made.x_1LD, state)
    torch.testing.assert_close(logits, skipper.uncached(prefilled, token_1L[:, 11:]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[:, 11:], skipper.decode(token_1L[:, 11:], prefilled), rtol=1e-4, atol=1e-4)
    assert 0 < int((~made.keep_IL[1:4, :11]).sum()) < 30


def test_gradients_reach_the_router_and_no_weight_of_the_model():
    model, router = decoder(), router_with_gradient()
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    assert all(wanted)
    with frozen(model):
        made, *_ = gated(model, router, tokens(1, 12), 12)
        made.x_1LD.square().mean().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad.abs().sum() > 0 for parameter in router.parameters())
    learned, _ = train_router(model, items(), SCHEDULE, config=TrainingConfig(steps=2))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in learned.parameters())


def test_the_gradient_of_a_gate_is_that_of_a_soft_mixture():
    """Against a loop by hand: one block that decides, mixed by the softmax at the decided values."""
    model, token_1L, router = decoder(2), tokens(1, 7), router_with_gradient()
    made, *_ = gated(model, router, token_1L, 7, schedule=(0.0, 0.5))
    weight = torch.randn(made.x_1LD.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((made.x_1LD * weight).sum(), list(router.parameters()))

    skipper = TokenSkipper(model, (0.0, 0.5), router, mode="threshold")
    scores = {}
    decider = skipper.decider(torch.ones(1, 7, dtype=torch.bool))
    skipper.decider = lambda real: decider
    original = decider.scores
    decider.scores = lambda *given: scores.setdefault("made", original(*given))
    with torch.enable_grad():
        keep = skipper.prefill(token_1L).keep_IBL[1, 0]
        context = model.context(token_1L)
        x = model.blocks[0](model.embed(token_1L), context).detach()
        score = TokenRouter.forward(router, *_inputs(router, decider, x, model, token_1L))
    soft = score.softmax(-1)
    place = torch.arange(7)
    seen = (place[:, None] >= place) & (keep | torch.eye(7, dtype=torch.bool))
    context = model.context(token_1L)
    context.attention_mask = seen[None, None]
    with torch.no_grad():
        y = model.blocks[1](x, context)
    change = ((y - x) * weight).sum(-1)
    # d loss / d soft_1 = weight y, d loss / d soft_0 = weight x; the first token has no say.
    expected = torch.autograd.grad(
        (soft[:, 1:, 1] * (y * weight).sum(-1)[:, 1:] + soft[:, 1:, 0] * (x * weight).sum(-1)[:, 1:]).sum(),
        list(router.parameters()),
    )
    assert change.abs().max() > 0.1
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def _inputs(router, decider, x, model, token_1L):
    """What the router sees behind the first block, by hand."""
    from anabranch.depth.ftp.features import factors_of

    attention = model.blocks[0].attention
    context = model.context(token_1L)
    query, key, _ = attention.project(model.blocks[0].attention_norm(model.embed(token_1L)), context)
    key = key.repeat_interleave(2, dim=1)
    score = (query @ key.transpose(2, 3) * 8**-0.5).masked_fill(~torch.ones(7, 7).tril().bool(), -torch.inf)
    mean = score.softmax(-1).mean(1).sum(1) / torch.arange(7, 0, -1)
    return factors_of(mean.detach(), decider.real_BL, 0.5, decider.factors), None


def test_the_sparsity_loss():
    target = torch.tensor([0.3, 0.5])
    assert sparsity_loss(target.clone(), target) == 0
    assert sparsity_loss(target.clone(), target, two_sided=False) == 0
    more, less = torch.tensor([0.4, 0.7]), torch.tensor([0.1, 0.5])
    assert float(sparsity_loss(more, target)) == pytest.approx(0.3)
    assert sparsity_loss(more, target, two_sided=False) == 0, "the paper's does not mind what is passed over beyond"
    for two_sided in (True, False):
        assert float(sparsity_loss(less, target, two_sided=two_sided)) == pytest.approx(0.2)


def test_shares_are_those_of_the_prompt_with_a_gradient():
    router = router_with_gradient()
    made, *_ = gated(decoder(), router, tokens(1, 15), 10)
    assert made.target_I.tolist() == pytest.approx([0.4, 0.6, 0.3])
    expected = (~made.keep_IL[1:4, :10]).float().mean(1)
    torch.testing.assert_close(made.share_I.detach(), expected)
    gradient = torch.autograd.grad(sparsity_loss(made.share_I, made.target_I), list(router.parameters()))
    assert sum(float(one.abs().sum()) for one in gradient) > 0


def test_training_lowers_the_loss_and_meets_the_sparsity():
    model, data = decoder(3), items(6, prompt=20)
    config = TrainingConfig(steps=60, learning_rate=2e-2, lambda_d=0.1)
    schedule, told = (0.0, 0.6, 0.6), []
    router, history = train_router(
        model, data, schedule, config=config, on_step=lambda step, losses: told.append((step, losses))
    )
    assert [step for step, _ in told] == list(range(60))
    assert [losses for _, losses in told] == history
    late = [row["sparsity"] for row in history[-20:]]
    assert sum(late) / 20 < sum(row["sparsity"] for row in history[:10]) / 10
    found = TokenSkipper(model, schedule, router, mode="threshold").prefill([data[0][0]]).report
    assert found.sparsity == pytest.approx(0.4, abs=0.2)


def test_training_goes_the_same_way_again():
    model, config = decoder(3), TrainingConfig(steps=5)
    runs = [train_router(model, items(), (0.0, 0.5, 0.5), config=config, seed=4) for _ in range(2)]
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True))
    assert train_router(model, items(), (0.0, 0.5, 0.5), config=config, seed=5)[1] != runs[0][1]


def test_the_guide_teaches_the_static_router():
    model, data = decoder(3), items(4, prompt=20)
    config = TrainingConfig(steps=80, learning_rate=4e-2, lambda_d=0, lambda_s=0, guided=1.0)
    schedule = (0.0, 0.5, 0.5)
    router, history = train_router(model, data, schedule, config=config)
    assert history[-1]["guide"] < 0.4 < history[0]["guide"]
    keep = TokenSkipper(model, schedule, router).prefill([data[0][0]]).keep_IBL[1:3]
    static = TokenSkipper(model, schedule).prefill([data[0][0]]).keep_IBL[1:3]
    assert float((keep == static).float().mean()) >= 0.9


@pytest.mark.parametrize("distance", ["states", "kl"])
def test_distances(distance):
    model, config = decoder(), TrainingConfig(steps=1, distance=distance)
    _, nothing = train_router(model, items(), [0.0] * BLOCKS, config=config)
    assert nothing[0]["distance"] == pytest.approx(0, abs=1e-6)
    assert nothing[0]["sparsity"] == nothing[0]["guide"] == nothing[0]["achieved"] == 0
    _, removed = train_router(model, [(tokens(1, 9)[0].tolist(), [])], [0.0, 1.0, 1.0, 1.0, 1.0], config=config)
    stack, token_1L = stack_of(model), tokens(1, 9)
    with torch.no_grad():
        x, state = stack.embed(token_1L)
        x = stack.block(0, x, state)
        y = x
        for layer in range(1, BLOCKS):
            y = stack.block(layer, y, state)
        if distance == "states":
            expected = F.mse_loss(F.rms_norm(x, (32,), eps=1e-6), F.rms_norm(y, (32,), eps=1e-6))
        else:
            ours, dense = (stack.head(one, state).log_softmax(-1) for one in (x, y))
            expected = (dense.exp() * (dense - ours)).sum(-1).mean()
    assert removed[0]["distance"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("inputs", ["hidden", "both"])
def test_a_router_of_hidden_states_learns(inputs):
    model, router = decoder(), TokenRouter(RouterConfig(inputs=inputs, dim=32), seed=1)
    before = [parameter.clone() for parameter in router.parameters()]
    train_router(model, items(), SCHEDULE, router=router, config=TrainingConfig(steps=3))
    assert all(not torch.equal(a, b) for a, b in zip(before, router.parameters(), strict=True))


def test_a_prompt_of_one_token_teaches_nothing():
    model = decoder()
    router = TokenRouter(seed=1)
    before = [parameter.clone() for parameter in router.parameters()]
    _, history = train_router(
        model, [([3], [4, 5])], SCHEDULE, router=router, config=TrainingConfig(steps=2, weight_decay=0)
    )
    assert all(math.isfinite(row["loss"]) for row in history)
    assert all(torch.equal(a, b) for a, b in zip(before, router.parameters(), strict=True))


def test_wrong_training():
    with pytest.raises(ConfigError, match="schedule has 2 sparsities"):
        train_router(decoder(), items(), (0.0, 0.5))
    with pytest.raises(DataError, match="there are no items"):
        train_router(decoder(), [], SCHEDULE)
    model = decoder()
    with torch.no_grad():
        model.blocks[2].attention.qkv.weight.fill_(torch.nan)
    with pytest.raises(NotFiniteError):
        train_router(model, items(), SCHEDULE, config=TrainingConfig(steps=1))
    for wrong in ({"steps": 0}, {"learning_rate": 0}, {"guided": 2}, {"distance": "l1"}, {"lambda_d": -1}):
        with pytest.raises(ConfigError):
            TrainingConfig(**wrong)
