import math

import pytest
import torch
import torch.nn.functional as F

from anabranch.config import configclass
from anabranch.errors import ConfigError
from anabranch.nn import BuildContext, ExpertPool, ForwardContext, MoE
from anabranch.nn.pool_policy import PoolAccess, PoolPolicy
from anabranch.routing import (
    UNUSED,
    BiasBalancer,
    CosineScore,
    DeviceLoss,
    ExpertChoice,
    GroupTopK,
    LinearScore,
    Router,
    SwitchLoss,
    Threshold,
    TopK,
    TopP,
    ZLoss,
)
from anabranch.routing.destinations import Destinations

DIM = 6
SCORE = LinearScore.Config(init_std=0.5)
LOSSES = (SwitchLoss.Config(), ZLoss.Config())


def build(select=None, score=SCORE, balance=LOSSES, seed=0, **fields):
    router = Router.Config(score=score, select=select or TopK.Config(top_k=2), balance=balance)
    config = MoE.Config(**{"num_experts": 5, "hidden_dim": 4, "router": router, **fields})
    context = BuildContext(DIM, init_std=0.5, residual_std=0.5, generator=torch.Generator().manual_seed(seed))
    return config.build(context)


def forward_context(**fields):
    return ForwardContext(position_BL=None, rotary=None, **fields)


def expert(layer, e, x_D):
    gate, up = (layer.experts.w13[e].to(x_D) @ x_D).chunk(2)
    return layer.experts.w2[e].to(x_D) @ (F.silu(gate) * up)


def naive(layer, x_BLD, routing):
    """Token by token, expert by expert."""
    config, rows = layer.config, []
    for n, x_D in enumerate(x_BLD.flatten(0, 1)):
        y_D = torch.zeros_like(x_D)
        for e, weight in zip(routing.index_NK[n].tolist(), routing.weight_NK[n].to(x_D), strict=True):
            if e == UNUSED:
                continue
            y_D = y_D + (
                weight * expert(layer, e, x_D) if config.weight_on == "output" else expert(layer, e, weight * x_D)
            )
        if layer.shared is not None:
            shared_D = layer.shared(x_D)
            shared_D = shared_D if layer.shared_gate is None else shared_D * layer.shared_gate(x_D).sigmoid()
            weight = config.shared_weight
            y_D = y_D + shared_D if weight is None else (1 - weight) * y_D + weight * shared_D
        rows.append(y_D)
    return torch.stack(rows).view_as(x_BLD)


VARIANTS = {
    "top_k": {},
    "renormalised": {"select": TopK.Config(top_k=3, normalize="sum", scale=2.5)},
    "groups": {"num_experts": 6, "select": GroupTopK.Config(top_k=2, num_groups=3, top_groups=2)},
    "top_p": {"select": TopP.Config(top_p=0.5)},
    "threshold": {"select": Threshold.Config(threshold=0.25)},
    "expert_choice": {"select": ExpertChoice.Config(capacity_factor=1.5)},
    "shared": {"shared_experts": 2},
    "gated_shared": {"shared_experts": 1, "shared_hidden_dim": 7, "shared_gate": True},
    "half_shared": {"shared_experts": 1, "shared_weight": 0.5, "shared_gate": True},
    "weight_on_input": {"weight_on": "input"},
    "cosine": {"score": CosineScore.Config(init_std=0.5)},
    "reference": {"backend": "reference"},
    "recompute": {"recompute": True},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_dropless_is_a_naive_loop(fields, dtype, tolerance):
    layer, x_BLD = build(**fields).to(dtype), torch.randn(2, 7, DIM, dtype=dtype)
    routing = layer.router(x_BLD.flatten(0, 1), forward_context())
    torch.testing.assert_close(
        layer(x_BLD, forward_context()), naive(layer, x_BLD, routing), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_bf16_autocast_is_within_two_percent(fields):
    layer, x_BLD = build(**fields), torch.randn(2, 7, DIM)
    expected_BLD = layer(x_BLD, forward_context())
    with torch.autocast("cpu", torch.bfloat16):
        y_BLD = layer(x_BLD, forward_context())
    assert (y_BLD - expected_BLD).norm() < 2e-2 * expected_BLD.norm()


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_gradients_are_those_of_the_naive_loop(fields):
    layer, x_BLD = build(**fields).double(), torch.randn(2, 7, DIM, dtype=torch.float64, requires_grad=True)
    named = {"x": x_BLD, **dict(layer.named_parameters())}
    routing = layer.router(x_BLD.flatten(0, 1), forward_context())
    expected = torch.autograd.grad(naive(layer, x_BLD, routing).sin().sum(), list(named.values()))
    ours = torch.autograd.grad(layer(x_BLD, forward_context()).sin().sum(), list(named.values()))
    for name, gradient, wanted in zip(named, ours, expected, strict=True):
        torch.testing.assert_close(
            gradient, wanted, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_all_experts_are_the_dense_mixture():
    layer, x_BLD = build(TopK.Config(top_k=5)).double(), torch.randn(2, 7, DIM, dtype=torch.float64)
    weight_NE = (x_BLD.flatten(0, 1) @ layer.router.score.weight.T).softmax(-1)
    rows = [sum(weight_NE[n, e] * expert(layer, e, x) for e in range(5)) for n, x in enumerate(x_BLD.flatten(0, 1))]
    torch.testing.assert_close(layer(x_BLD, forward_context()).flatten(0, 1), torch.stack(rows), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_permuting_tokens_permutes_outputs(fields):
    layer, x_BLD, order_L = build(**fields), torch.randn(1, 14, DIM), torch.randperm(14)
    torch.testing.assert_close(
        layer(x_BLD[:, order_L], forward_context()), layer(x_BLD, forward_context())[:, order_L], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_an_expert_without_tokens_gets_exactly_zero_gradient(fields):
    layer = build(**{**fields, "balance": (BiasBalancer.Config(),)})
    layer.router.balance[0].expert_bias[2] = -1e6
    x_BLD = torch.randn(2, 7, DIM)
    routing = layer.router(x_BLD.flatten(0, 1), forward_context())
    if (routing.index_NK == 2).any():
        assert not layer.router.select.is_causal  # expert choice: a bias moves no expert's own order
        return
    layer(x_BLD, forward_context()).square().sum().backward()
    for weight in (layer.experts.w13, layer.experts.w2):
        assert (weight.grad[2] == 0).all()
        assert weight.grad.abs().sum((1, 2)).count_nonzero() >= 2


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_an_empty_batch_gives_an_empty_tensor_and_zero_losses(fields):
    layer, context = build(**fields), forward_context(training=True)
    x_BLD = torch.zeros(0, 7, DIM, requires_grad=True)
    y_BLD = layer(x_BLD, context)
    assert y_BLD.shape == (0, 7, DIM)
    assert {name: loss.item() for name, loss in context.mean_losses().items()} == {"load_balancing": 0.0, "z_loss": 0.0}
    (y_BLD.sum() + sum(context.mean_losses().values())).backward()


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_the_count_is_the_number_of_parameters(fields):
    layer = build(**fields)
    count = layer.config.count(BuildContext(DIM))
    assert count.parameters == sum(parameter.numel() for parameter in layer.parameters())
    assert count.active <= count.parameters
    assert count.flops == 2 * count.active


def test_active_parameters_by_hand():
    # 5 experts of 3 * 6 * 4 = 72, of which 2; shared 72; gate 6; router 30
    count = MoE.Config(num_experts=5, hidden_dim=4, shared_experts=1, shared_gate=True).count(BuildContext(DIM))
    assert (count.parameters, count.active) == (5 * 72 + 72 + 6 + 30, 2 * 72 + 72 + 6 + 30)


def test_padding_is_not_computed():
    layer, mask_N = build(), torch.tensor([True, False, True, True])
    x_BLD = torch.randn(1, 4, DIM)
    y_BLD = layer(x_BLD, forward_context(item_mask_N=mask_N))
    assert (y_BLD[0, 1] == 0).all()
    torch.testing.assert_close(y_BLD[:, mask_N], layer(x_BLD[:, mask_N], forward_context()))


def test_the_same_result_whatever_the_number_of_threads():
    layer, x_BLD = build(num_experts=5), torch.randn(4, 64, DIM)
    one = layer(x_BLD, forward_context())
    torch.set_num_threads(2)
    try:
        assert torch.equal(layer(x_BLD, forward_context()), one)
    finally:
        torch.set_num_threads(1)


# -- capacity


@pytest.mark.parametrize("order", ["token", "score"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_capacity_drops_in_training_only_and_reports_how_much(order, renormalize):
    layer = build(capacity_factor=0.5, capacity_order=order, capacity_renormalize=renormalize).double()
    x_BLD = torch.randn(2, 7, DIM, dtype=torch.float64)
    routing = layer.router(x_BLD.flatten(0, 1), forward_context())
    torch.testing.assert_close(
        layer(x_BLD, forward_context()), naive(layer, x_BLD, routing)
    )  # evaluation drops nothing

    capacity = math.ceil(0.5 * 14 * 2 / 5)
    choices = [(n, k) for n in range(14) for k in range(2)]
    if order == "score":
        choices.sort(key=lambda choice: -routing.weight_NK[choice].item())
    taken, kept_NK = [0] * 5, torch.zeros(14, 2, dtype=torch.bool)
    for choice in choices:
        e = int(routing.index_NK[choice])
        kept_NK[choice] = taken[e] < capacity
        taken[e] += 1
    limited = routing.drop(~kept_NK)
    if renormalize:
        scale_N = routing.weight_NK.sum(-1) / limited.weight_NK.sum(-1).clamp_min(1e-20)
        limited = limited.__class__(limited.index_NK, limited.weight_NK * scale_N.unsqueeze(-1), limited.score_NE)
    context = forward_context(training=True)
    torch.testing.assert_close(layer(x_BLD, context), naive(layer, x_BLD, limited))
    dropped = (~kept_NK).sum().item()
    assert dropped > 0
    assert context.mean_metrics()["drop_ratio"].item() == pytest.approx(dropped / 28)


def test_balancers_see_what_was_asked_for_and_not_what_was_dropped():
    layer, context = build(capacity_factor=0.5, balance=(BiasBalancer.Config(),)), forward_context(training=True)
    layer(torch.randn(2, 7, DIM), context)
    context.commit()
    assert layer.router.balance[0].load_E.sum() == 28


def test_a_large_capacity_drops_nothing():
    layer, context, x_BLD = build(capacity_factor=5.0), forward_context(training=True), torch.randn(2, 7, DIM)
    torch.testing.assert_close(layer(x_BLD, context), layer(x_BLD, forward_context()))
    assert context.mean_metrics()["drop_ratio"].item() == 0.0


# -- building


def test_a_pool_that_is_given_is_used_and_not_registered():
    pool = ExpertPool(8, DIM, 4)
    destinations = Destinations("pool", own_start=4)

    class Given(PoolPolicy):
        def build(self, config, context):
            return PoolAccess(config.router, pool.num_experts, destinations, pool)

    class Picking(MoE):
        @configclass
        class Config(MoE.Config):
            @property
            def pool_policy(self):
                return Given()

    layer = Picking.Config(num_experts=8, hidden_dim=4).build(BuildContext(DIM))
    assert layer.experts is pool
    assert not any(name.startswith("experts") for name in layer.state_dict())
    assert layer.router.destinations is destinations


def test_the_router_knows_its_layer():
    assert MoE.Config().build(BuildContext(DIM, num_layers=8, layer=5)).router.layer == 5


def test_initial_weights_follow_the_contexts_spread():
    context = BuildContext(64, init_std=0.1, residual_std=0.01, generator=torch.Generator().manual_seed(0))
    layer = MoE.Config(num_experts=8, hidden_dim=64).build(context)
    assert layer.experts.w13.std().item() == pytest.approx(0.1, rel=0.05)
    assert layer.experts.w2.std().item() == pytest.approx(0.01, rel=0.05)


def sized(**fields):
    """What a decoder's config asks before anything is built."""
    return MoE.Config(**fields).count(BuildContext(DIM))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: MoE.Config(num_experts=64, router=Router.Config(select=TopK.Config(top_k=80))),
            "router.select takes 80 experts of a token, but num_experts is 64; use 1 to 64",
        ),
        (lambda: MoE.Config(num_experts=0), "num_experts is 0; it must be greater than or equal to 1"),
        (lambda: MoE.Config(capacity_factor=0.0), "capacity_factor is 0.0; it must be greater than 0"),
        (lambda: MoE.Config(capacity_order="random"), "capacity_order is 'random'; it must be 'token' or 'score'"),
        (
            lambda: MoE.Config(shared_gate=True),
            "shared_gate, shared_weight and shared_hidden_dim need shared_experts of at",
        ),
        (
            lambda: MoE.Config(shared_hidden_dim=8),
            "shared_gate, shared_weight and shared_hidden_dim need shared_experts",
        ),
        (lambda: MoE.Config(shared_weight=0.5), "shared_gate, shared_weight and shared_hidden_dim need shared_experts"),
        (lambda: MoE.Config(shared_experts=1, shared_weight=1.0), "shared_weight is 1.0; it must be less than 1"),
        (lambda: MoE.Config(weight_on="both"), "weight_on is 'both'; it must be 'output' or 'input'"),
        (lambda: MoE.Config(backend="cuda"), "backend is 'cuda'"),
        (
            lambda: sized(num_experts=6, router=Router.Config(select=GroupTopK.Config(top_k=2, num_groups=4))),
            "num_groups is 4, which does not divide 6",
        ),
        (
            lambda: sized(num_experts=6, router=Router.Config(balance=(DeviceLoss.Config(num_devices=4),))),
            "num_devices is 4, which does not divide 6",
        ),
    ],
)
def test_messages(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
