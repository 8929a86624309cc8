import copy
import pickle

import pytest
import torch

from anabranch.config import configclass, from_dict, to_dict
from anabranch.errors import ConfigError, NotFiniteError
from anabranch.routing import (
    UNUSED,
    BiasBalancer,
    Candidates,
    CosineScore,
    ExpertChoice,
    GroupTopK,
    LinearScore,
    Router,
    RoutingContext,
    SwitchLoss,
    Threshold,
    TopK,
    TopP,
    ZLoss,
)
from anabranch.routing.destinations import Destinations
from anabranch.routing.fixed import fix, release
from anabranch.testing import check_router

WIDE = LinearScore.Config(init_std=0.5)


def build(dim=6, num_destinations=8, seed=0, candidates=None, **fields):
    config = Router.Config(**{"score": WIDE, **fields})
    generator = torch.Generator().manual_seed(seed)
    return config.build(dim, num_destinations, destinations=Destinations(candidates=candidates), generator=generator)


class Fixed(Candidates):
    """One mask, for all items or per item."""

    @configclass
    class Config(Candidates.Config):
        """No fields."""

    def __init__(self, open_NE, stage):
        super().__init__()
        self.mask_NE, self.stage = open_NE, stage

    def open_NE(self, num_items, context):
        return self.mask_NE


# -- the three stages, by hand


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", ["none", "sum", "softmax"])
def test_a_router_is_a_naive_loop(activation, normalize):
    router = build(
        score=LinearScore.Config(activation=activation, init_std=0.5),
        select=TopK.Config(top_k=2, normalize=normalize, scale=1.5),
        balance=(BiasBalancer.Config(),),
    )
    router.balance[0].expert_bias.copy_(torch.linspace(0.3, -0.3, 8))
    x_ND = torch.randn(20, 6)
    routing = router(x_ND, RoutingContext())
    for n in range(20):
        logit_E = router.score.weight @ x_ND[n]
        score_E = logit_E.softmax(-1) if activation == "softmax" else logit_E.sigmoid()
        chosen = sorted(range(8), key=lambda e: -(score_E[e] + router.balance[0].expert_bias[e]).item())[:2]
        weight = (logit_E[chosen].softmax(-1) if normalize == "softmax" else score_E[chosen]) * 1.5
        if normalize == "sum":
            weight = weight / score_E[chosen].sum()
        assert routing.index_NK[n].tolist() == chosen
        torch.testing.assert_close(routing.weight_NK[n], weight)
        torch.testing.assert_close(routing.score_NE[n], score_E)


def test_biases_of_several_balancers_add_up():
    router = build(balance=(BiasBalancer.Config(), ZLoss.Config(), BiasBalancer.Config()))
    router.balance[0].expert_bias[3] = 60.0
    router.balance[2].expert_bias[3] = -120.0
    routing = router(torch.randn(20, 6), RoutingContext())
    assert not (routing.index_NK == 3).any()


# -- candidates


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "sqrt_softplus"])
def test_closed_before_the_activation_means_as_if_not_there(activation):
    open_E = torch.tensor([True, False] * 4)
    score = LinearScore.Config(activation=activation, init_std=0.5)
    router = build(score=score, candidates=Fixed(open_E, "pre_softmax"))
    small = build(score=score, num_destinations=4)
    with torch.no_grad():
        small.score.weight.copy_(router.score.weight[open_E])
    x_ND, contexts = torch.randn(10, 6), [RoutingContext(training=True) for _ in range(2)]
    routing, alone = router(x_ND, contexts[0]), small(x_ND, contexts[1])
    assert torch.equal(routing.index_NK, alone.index_NK * 2)
    torch.testing.assert_close(routing.weight_NK, alone.weight_NK)
    torch.testing.assert_close(routing.score_NE[:, open_E], alone.score_NE)
    assert (routing.score_NE[:, ~open_E] == 0).all()
    for name, loss in contexts[1].mean_losses().items():
        torch.testing.assert_close(contexts[0].mean_losses()[name], loss)


def test_closed_after_the_activation_stay_in_the_denominator():
    open_E = torch.tensor([True, False] * 4)
    router = build(candidates=Fixed(open_E, "post_softmax"))
    x_ND = torch.randn(10, 6)
    routing = router(x_ND, RoutingContext())
    score_NE = (x_ND @ router.score.weight.T).softmax(-1)
    torch.testing.assert_close(routing.score_NE, score_NE * open_E)
    torch.testing.assert_close(routing.weight_NK, (score_NE * open_E).topk(2).values)
    routing.weight_NK.sum().backward()
    assert (router.score.weight.grad[~open_E] != 0).any()  # their logits still learn


@pytest.mark.parametrize("stage", ["pre_softmax", "post_softmax"])
def test_closed_destinations_are_not_chosen_by_a_bias(stage):
    open_NE = torch.rand(50, 8) < 0.5
    router = build(balance=(BiasBalancer.Config(),), candidates=Fixed(open_NE, stage))
    router.balance[0].expert_bias.copy_(torch.randn(8) * 100)
    routing = router(torch.randn(50, 6), RoutingContext())
    used_NK = routing.used_NK
    assert open_NE.gather(1, routing.index_NK.clamp_min(0))[used_NK].all()
    assert torch.equal(used_NK.sum(-1), open_NE.sum(-1).clamp_max(2))


@pytest.mark.parametrize("stage", ["pre_softmax", "post_softmax"])
def test_an_item_without_candidates_goes_nowhere_and_leaves_no_nan(stage):
    open_NE = torch.ones(4, 8, dtype=torch.bool)
    open_NE[2] = False
    router = build(balance=(SwitchLoss.Config(),), candidates=Fixed(open_NE, stage))
    context = RoutingContext(training=True)
    routing = router(torch.randn(4, 6), context)
    assert routing.index_NK[2].tolist() == [UNUSED, UNUSED]
    assert (routing.score_NE[2] == 0).all()
    loss = context.mean_losses()["load_balancing"] + routing.weight_NK.sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(router.score.weight.grad).all()


def test_closed_destinations_do_not_gain_bias():
    open_E = torch.tensor([True] * 6 + [False] * 2)
    router = build(balance=(BiasBalancer.Config(center=False),), candidates=Fixed(open_E, "post_softmax"))
    for step in range(5):
        context = RoutingContext(training=True)
        router(torch.randn(11, 6), context)
        context.commit()
        router.balance[0].on_step(step, 0.0)
    assert router.balance[0].expert_bias[6:].tolist() == [0.0, 0.0]
    assert router.balance[0].expert_bias[:6].any()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_the_router_of_a_fixed_base_is_not_balanced(frozen, learns):
    """It stands under what learns: neither biases nor losses move, nor is anything counted, whatever has gradients."""
    router = build(balance=(BiasBalancer.Config(), SwitchLoss.Config(), ZLoss.Config()))
    router.requires_grad_(learns)
    if frozen:
        fix(router, "test")
    context = RoutingContext(training=True)
    x_ND = torch.randn(11, 6, requires_grad=True)
    routing = router(x_ND, context)
    context.commit()
    assert bool(context.mean_losses()) is not frozen
    assert bool(router.balance[0].load_E.any()) is not frozen
    router.balance[0].on_step(0, 0.0)
    assert bool(router.balance[0].expert_bias.any()) is not frozen
    assert torch.equal(routing.index_NK, router(x_ND, RoutingContext(training=False)).index_NK) or not frozen
    release(router, "test")
    router(x_ND, RoutingContext(training=True))
    router.balance[0].on_step(1, 0.0)
    again = RoutingContext(training=True)
    router(x_ND, again)
    assert again.mean_losses()


# -- padding


@pytest.mark.parametrize(
    "select",
    [
        TopK.Config(),
        GroupTopK.Config(top_k=2, num_groups=4, top_groups=2),
        TopP.Config(),
        Threshold.Config(),
        ExpertChoice.Config(),
    ],
    ids=lambda config: config.owner.kind,
)
def test_padding_is_neither_routed_nor_counted(select):
    mask_N = torch.tensor([False, True, True, False, True, True, True, False])
    router = build(select=select, balance=(BiasBalancer.Config(), SwitchLoss.Config(), ZLoss.Config()))
    x_ND = torch.randn(8, 6)
    x_ND[~mask_N] *= 100
    context, alone = RoutingContext(training=True, item_mask_N=mask_N), RoutingContext(training=True)
    routing, real = router(x_ND, context), router(x_ND[mask_N], alone)
    assert (routing.index_NK[~mask_N] == UNUSED).all()
    assert (routing.weight_NK[~mask_N] == 0).all()
    assert torch.equal(routing.index_NK[mask_N], real.index_NK)
    torch.testing.assert_close(routing.weight_NK[mask_N], real.weight_NK)
    for name, loss in alone.mean_losses().items():
        torch.testing.assert_close(context.mean_losses()[name], loss)
    context.commit()
    assert torch.equal(router.balance[0].load_E, real.load_E().float())


# -- what a router is told


def test_finite_check_names_the_layer():
    router = build(check_finite=True)
    router.layer = 5
    x_ND = torch.randn(4, 6)
    x_ND[2, 0] = torch.nan
    with pytest.raises(NotFiniteError, match="router of layer 5 has NaN or infinite logits; lower the learning rate"):
        router(x_ND, RoutingContext())
    router(torch.randn(4, 6), RoutingContext())
    x_ND[2, 0] = 1e38
    build(score=LinearScore.Config(activation="sigmoid"))(
        x_ND, RoutingContext()
    )  # nobody asked: these scores are 0 and 1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "sqrt_softplus"])
def test_scores_that_are_no_numbers_name_the_layer(activation, training):
    router = build(score=LinearScore.Config(activation=activation))
    router.layer = 5
    x_ND = torch.randn(4, 6)
    x_ND[[0, 2], 0] = torch.nan
    message = "the router of layer 5 has NaN scores for 2 of 4 items: what comes into the layer, or the router's weights, are not finite"
    with pytest.raises(NotFiniteError, match=message):
        router(x_ND, RoutingContext(training=training))
    real_N = torch.tensor([False, True, False, True])  # padding may hold anything
    routing = router(x_ND, RoutingContext(training=training, item_mask_N=real_N))
    assert routing.used_NK.any(1).equal(real_N)
    with pytest.raises(NotFiniteError, match="for 1 of 4 items"):
        router(x_ND, RoutingContext(training=training, item_mask_N=torch.tensor([False, True, True, True])))


def test_a_compiled_router_looks_at_no_scores():
    router, x_ND = build(balance=()), torch.randn(4, 6)
    x_ND[2, 0] = torch.nan
    compiled = torch.compile(lambda x_ND: router(x_ND, RoutingContext()).score_NE, backend="eager", fullgraph=True)
    assert compiled(x_ND)[2].isnan().all()


def test_top_k_beyond_the_destinations():
    with pytest.raises(ConfigError, match="top_k is 9, but there are 8 destinations; use 1 to 8"):
        build(select=TopK.Config(top_k=9))


def test_the_default_is_the_olmoe_setting():
    config = Router.Config()
    assert (config.score.activation, config.select.top_k, config.select.normalize) == ("softmax", 2, "none")
    assert [(part.owner.kind) for part in config.balance] == ["switch", "z_loss"]
    assert (config.balance[0].alpha, config.balance[1].beta) == (1e-2, 1e-3)


def test_config_round_trip_keeps_the_kind_of_every_part():
    config = Router.Config(
        score=CosineScore.Config(temperature=0.2),
        select=GroupTopK.Config(top_k=3),
        balance=(BiasBalancer.Config(rule="magnitude"), SwitchLoss.Config(scope="sequence")),
    )
    assert from_dict(Router.Config, to_dict(config)) == config


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"score": CosineScore.Config(activation="sigmoid"), "balance": (BiasBalancer.Config(),)},
        {"select": GroupTopK.Config(top_k=3, num_groups=4, top_groups=2, normalize="sum", scale=2.5)},
        {"select": TopP.Config(top_p=0.6), "balance": (SwitchLoss.Config(scope="global_batch"),)},
        {"select": Threshold.Config(threshold=0.2), "balance": ()},
        {"select": ExpertChoice.Config()},
        {"select": TopK.Config(top_k=8)},
        {"score": LinearScore.Config(jitter=0.1, init="kaiming_uniform"), "check_finite": True},
    ],
    ids=["default", "cosine_bias", "groups", "top_p", "threshold", "expert_choice", "all", "jitter"],
)
def test_contract(fields):
    check_router(build(**fields), dim=6)


def test_contract_holds_with_candidates():
    check_router(build(candidates=Fixed(torch.tensor([True, False] * 4), "pre_softmax")), dim=6)


def test_copies_are_independent_and_equal():
    router = build(balance=(BiasBalancer.Config(),))
    router.balance[0].expert_bias.uniform_()
    x_ND = torch.randn(5, 6)
    expected = router(x_ND, RoutingContext())
    for twin in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        assert torch.equal(twin(x_ND, RoutingContext()).weight_NK, expected.weight_NK)
        twin.balance[0].expert_bias.zero_()
    assert router.balance[0].expert_bias.any()
