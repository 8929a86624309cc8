"""The loss-free bias: every rule by hand or by a naive loop, and all the ways a step can go. See test_balance.py for sign and magnitude."""

from ast import literal_eval

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from anabranch.errors import AnabranchError, CheckpointError, ConfigError
from anabranch.lm import Decoder
from anabranch.nn import MoE, SwiGLU
from anabranch.routing import (
    BiasBalancer,
    Router,
    RoutingContext,
    TopK,
    discard_loads,
    export_correction_bias,
    export_history,
    import_correction_bias,
)
from anabranch.routing.balance import Observation
from anabranch.routing.bias import BINS
from anabranch.routing.score import LinearScore
from anabranch.testing import check_balancer, check_feed_forward, check_router
from ranks import run_ranks

RULES = ["sign", "magnitude", "inv_n", "inv_sqrt", "quantile"]


def router(rule="sign", *, dim=6, num_destinations=8, top_k=2, layer=0, **options):
    config = Router.Config(
        score=LinearScore.Config(activation="sigmoid", init_std=0.5),
        select=TopK.Config(top_k=top_k),
        balance=(BiasBalancer.Config(rule=rule, **options),),
    )
    return config.build(dim, num_destinations, layer=layer, generator=torch.Generator().manual_seed(0))


def train_step(router, *batches, mask_N=None):
    for x_ND in batches:
        context = RoutingContext(training=True, item_mask_N=mask_N)
        router(x_ND, context)
        context.commit()


def items(num=64, dim=6, seed=0):
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rule", "factors"), [("inv_n", [1, 1 / 2, 1 / 4]), ("inv_sqrt", [1, 0.5**0.5, 0.5])])
def test_decaying_rules_divide_by_the_step(rule, factors):
    balancer = BiasBalancer.Config(rule=rule, rate=0.5, center=False).build(2)
    for step, factor in zip([1, 2, 4], factors, strict=True):
        before_E = balancer.expert_bias.clone()
        balancer.add_load(torch.tensor([1, 3]))  # mean 2: half of it is missing, and too much
        balancer.on_step(step, 0.0)
        assert (balancer.expert_bias - before_E).tolist() == pytest.approx([0.25 * factor, -0.25 * factor])


def test_rates_default_to_what_suits_the_rule():
    assert {rule: BiasBalancer.Config(rule=rule).build(4).rate for rule in RULES} == {
        "sign": 1e-3,
        "magnitude": 1e-3,
        "inv_n": 0.1,
        "inv_sqrt": 0.1,
        "quantile": 1.0,
    }
    assert BiasBalancer.Config(rate=0.25).build(4).rate == 0.25


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_bias_that_multiplies_is_a_factor_of_mean_1_that_takes_the_same_steps(clip):
    balancer = BiasBalancer.Config(form="multiply", rate=0.25, clip=clip).build(4)
    factor_E = np.ones(4)
    for step, load in enumerate([[5, 3, 4, 4], [8, 0, 4, 4], [4, 4, 4, 4]], start=1):
        balancer.add_load(torch.tensor(load))
        balancer.on_step(step, 0.0)
        factor_E = factor_E + 0.25 * np.sign(4 - np.array(load))
        factor_E = factor_E / factor_E.mean()
        if clip is not None:
            factor_E = np.clip(factor_E, 0.9, 1.1)
        assert (1 + balancer.expert_bias).tolist() == pytest.approx(factor_E.tolist())
    assert balancer.bias_E is None


def test_a_factor_stays_above_0():
    balancer = BiasBalancer.Config(form="multiply", rate=0.9, center=False).build(2)
    for step in range(1, 5):
        balancer.add_load(torch.tensor([9, 1]))
        balancer.on_step(step, 0.0)
    assert (1 + balancer.expert_bias).tolist() == pytest.approx([0.01, 4.6])


def test_factors_select_and_do_not_weigh():
    made = router(form="multiply")
    factor_E = 0.5 + torch.rand(8, generator=torch.Generator().manual_seed(1))
    x_ND = items()
    plain = made(x_ND, RoutingContext())
    made.balance[0].expert_bias.copy_(factor_E - 1)
    routing = made(x_ND, RoutingContext())
    score_NE = plain.score_NE
    assert routing.score_NE.equal(score_NE)
    assert not routing.index_NK.equal(plain.index_NK)
    assert routing.index_NK.sort().values.equal((score_NE * factor_E).topk(2).indices.sort().values)
    assert routing.weight_NK.equal(score_NE.gather(1, routing.index_NK))
    made.balance[0].expert_bias.copy_(3 * factor_E - 1)  # a common factor changes no choice
    assert made(x_ND, RoutingContext()).index_NK.equal(routing.index_NK)


def test_factors_balance_skewed_scores():
    score_NE = (torch.randn(1024, 8, generator=torch.Generator().manual_seed(0)) + torch.linspace(-1, 1, 8)).sigmoid()
    balancer, select = BiasBalancer.Config(form="multiply", rate=5e-3).build(8), TopK.Config(top_k=2).build(8)
    loads = []
    for step in range(1, 300):
        routing = select(score_NE, bias_E=balancer.shift(score_NE))
        loads.append(routing.load_E())
        balancer.add_load(loads[-1])
        balancer.on_step(step, 0.0)
    assert loads[0].max() > 2 * 256
    assert loads[-1].max() < 1.1 * 256


def test_a_bias_that_multiplies_has_no_quantiles_and_no_place_in_deepseeks_format():
    told = "form is 'multiply' and rule 'quantile', whose quantiles are of sums; use form 'add'"
    with pytest.raises(ConfigError, match=told):
        BiasBalancer.Config(form="multiply", rule="quantile")
    made = router(form="multiply", layer=3)
    with pytest.raises(CheckpointError, match="the bias of layer 3 multiplies scores"):
        export_correction_bias(made)
    given = {"model.layers.3.mlp.gate.e_score_correction_bias": torch.zeros(8)}
    with pytest.raises(CheckpointError, match="layers with a bias that is added: none"):
        import_correction_bias(made, given)


@pytest.mark.parametrize(
    ("fields", "steps", "expected"),
    [
        ({}, 200, "rule=quantile"),
        ({"form": "multiply"}, 200, "rule=inv_n"),
        ({}, 800, None),
        ({"rate": 1e-2}, 200, None),
        ({"rule": "quantile"}, 2, None),
    ],
)
def test_signs_are_advised_against_where_the_steps_do_not_suffice(fields, steps, expected):
    advice = BiasBalancer.Config(**fields).advice(steps)
    if expected is None:
        assert advice is None
    else:
        assert advice == ("200 steps of signs move a bias by 0.2 at most, and it may have to go 0.3", expected)


def naive_quantile(score_NE, bias_E, top_k):
    """b_e less the margin that divides its L best items from the others, in plain numpy."""
    value_NE = score_NE + bias_E
    threshold_N = np.sort(value_NE, 1)[:, -top_k - 1]
    share = int(len(score_NE) * top_k / score_NE.shape[1])
    margin_NE = np.sort(value_NE - threshold_N[:, None], 0)[::-1]
    return bias_E - margin_NE[share - 1 : share + 1].mean(0)


def test_quantile_puts_the_bias_where_each_gets_its_share():
    generator = np.random.default_rng(0)
    score_NE = generator.random((400, 8)) * 0.5 + np.linspace(0, 0.4, 8)
    balancer, select = BiasBalancer.Config(rule="quantile", center=False).build(8), TopK.Config(top_k=2).build(8)
    bias_E = np.zeros(8)
    for step in range(1, 4):
        step_with(balancer, select, torch.tensor(score_NE, dtype=torch.float32), step)
        bias_E = naive_quantile(score_NE, bias_E, 2)
        assert balancer.expert_bias.numpy() == pytest.approx(bias_E, abs=2e-2)  # a bin is up to 6e-3 wide
        bias_E = balancer.expert_bias.numpy().astype(np.float64)


@pytest.mark.parametrize("wanted", [1, 2.5, 5, 6, 7.5, 9, 20])
def test_a_quantile_is_interpolated_inside_its_bin(wanted):
    """Four items in bin 300, five in bin 700, evenly spread over each bin; what asks for more than there are gets the lowest."""
    balancer = BiasBalancer.Config(rule="quantile").build(2)
    balancer.margins.count_EX[0, [300, 700]] = torch.tensor([4.0, 5.0])
    place = 701 - wanted / 5 if wanted <= 5 else 301 - (min(wanted, 9) - 5) / 4
    expected = (place * 2 / BINS - 1) ** 3
    assert balancer.margins.quantile_E(torch.tensor(float(wanted))).tolist() == pytest.approx([expected, 0.0], abs=1e-6)


def test_of_a_bias_only_the_bias_is_saved():
    for rule in RULES:
        assert list(BiasBalancer.Config(rule=rule).build(4).state_dict()) == ["expert_bias"]


def step_with(balancer, select, score_NE, step=1):
    routing = select(score_NE, bias_E=balancer.expert_bias)
    context = RoutingContext(training=True)
    balancer(Observation(score_NE, routing), context)
    context.commit()
    balancer.on_step(step, 0.0)
    return routing


@pytest.mark.parametrize("seed", range(3))
def test_quantile_balances_a_static_batch_within_ten_steps(seed):
    generator = torch.Generator().manual_seed(seed)
    logit_NE = torch.randn(1024, 16, generator=generator) + 1.5 * torch.randn(16, generator=generator)
    balancer, select = BiasBalancer.Config(rule="quantile").build(16), TopK.Config(top_k=2).build(16)
    loads = [step_with(balancer, select, logit_NE.sigmoid(), step).load_E() for step in range(1, 12)]
    mean = 1024 * 2 / 16
    assert loads[0].max() / mean - 1 > 1.0
    assert loads[-1].max() / mean - 1 <= 16 / mean


@pytest.mark.parametrize("rule", RULES)
def test_micro_batches_equal_one_batch(rule):
    whole, parts = (router(rule) for _ in range(2))
    for step in range(1, 5):
        x_ND = items(12, seed=step)
        train_step(whole, x_ND)
        train_step(parts, *x_ND.split(3))
        for one in (whole, parts):
            one.balance[0].on_step(step, 0.0)
        assert whole.balance[0].expert_bias.any()
        torch.testing.assert_close(whole.balance[0].expert_bias, parts.balance[0].expert_bias, rtol=0, atol=1e-6)


def test_histograms_of_micro_batches_add_up():
    balancer, select = BiasBalancer.Config(rule="quantile").build(8), TopK.Config(top_k=2).build(8)
    score_NE = items(24, 8).sigmoid()
    naive_E = torch.zeros(8, dtype=torch.int64)
    for part_NE in score_NE.split(6):
        context = RoutingContext(training=True)
        balancer(Observation(part_NE, select(part_NE, bias_E=balancer.expert_bias)), context)
        context.commit()
        naive_E += len(part_NE)  # every item has a margin for every destination
    assert torch.equal(balancer.margins.count_EX.sum(-1).long(), naive_E)


@pytest.mark.parametrize("rule", RULES)
def test_padding_does_not_count(rule):
    padded, alone = router(rule), router(rule)
    x_ND, mask_N = items(24), torch.arange(24) % 3 != 0
    train_step(padded, x_ND.masked_fill(~mask_N[:, None], 50.0), mask_N=mask_N)
    train_step(alone, x_ND[mask_N])
    for one in (padded, alone):
        one.balance[0].on_step(1, 0.0)
    assert torch.equal(padded.balance[0].expert_bias, alone.balance[0].expert_bias)
    assert alone.balance[0].expert_bias.any()


@pytest.mark.parametrize("rule", RULES)
def test_k_of_all_skipped_steps_and_evaluation_move_nothing(rule):
    full = router(rule, num_destinations=6, top_k=6)
    skipped, evaluated = router(rule), router(rule)
    for step in range(1, 6):
        train_step(full, items(7, seed=step))
        train_step(skipped, items(7, seed=step))
        discard_loads(skipped)
        context = RoutingContext(training=False)
        evaluated(items(7, seed=step), context)
        context.commit()
        for one in (full, skipped, evaluated):
            one.balance[0].on_step(step, 0.0)
    for one in (full, skipped, evaluated):
        assert not one.balance[0].expert_bias.any()
    if rule == "quantile":
        assert not skipped.balance[0].margins.count_EX.any()


@pytest.mark.parametrize("rule", RULES)
def test_a_constant_added_to_the_bias_changes_nothing(rule):
    one, shifted = router(rule), router(rule)
    shifted.balance[0].expert_bias += 0.25
    for step in range(1, 4):
        routings = []
        for each in (one, shifted):
            context = RoutingContext(training=True)
            routings.append(each(items(seed=step), context))
            context.commit()
            each.balance[0].on_step(step, 0.0)
        assert torch.equal(routings[0].index_NK, routings[1].index_NK)
        assert torch.equal(routings[0].weight_NK, routings[1].weight_NK)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_balances_skewed_scores_and_wakes_a_dead_destination(rule):
    """A destination 0.3 below all others gets its share; the sign rule needs shift / u steps, the others fewer."""
    generator = torch.Generator().manual_seed(0)
    score_NE = torch.rand(512, 8, generator=generator) * 0.4 + 0.3 + 0.1 * torch.rand(8, generator=generator)
    score_NE[:, 3] = torch.rand(512, generator=generator) * 0.2
    rate = {"sign": 0.01, "magnitude": 0.05}.get(rule)
    balancer, select = BiasBalancer.Config(rule=rule, rate=rate).build(8), TopK.Config(top_k=2).build(8)
    assert select(score_NE).load_E()[3] == 0
    for step in range(1, 121):
        step_with(balancer, select, score_NE, step)
    load_E = select(score_NE, bias_E=balancer.expert_bias).load_E()
    assert load_E[3] > 0.7 * 128
    assert load_E.max() < 1.3 * 128


def test_quantile_of_closed_destinations_stays():
    balancer, select = BiasBalancer.Config(rule="quantile", center=False).build(8), TopK.Config(top_k=2).build(8)
    open_E = torch.arange(8) < 5
    score_NE = torch.rand(200, 8, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 1, 8)
    for step in range(1, 8):
        closed_NE = score_NE.masked_fill(~open_E, 0.0)
        routing = select(closed_NE, bias_E=balancer.expert_bias, open_NE=open_E)
        context = RoutingContext(training=True)
        balancer(Observation(score_NE, routing, open_E), context)
        context.commit()
        balancer.on_step(step, 0.0)
    assert balancer.expert_bias[5:].tolist() == [0.0, 0.0, 0.0]
    load_E = routing.load_E()[:5]
    assert load_E.max() - load_E.min() <= 8


class Leaky(nn.Module):
    """Updates the bias inside its forward."""

    def __init__(self, router):
        super().__init__()
        self.router = router

    def forward(self, x_ND):
        train_step(self.router, x_ND)
        self.router.balance[0].on_step(1, 0.0)


def test_the_update_inside_a_forward_is_an_error():
    with pytest.raises(AnabranchError, match=r"updated inside a forward pass.*call on_step after the optimizer's step"):
        Leaky(router())(items())


def test_history_remembers_the_last_steps():
    one = router("sign", history=2)
    for step in range(1, 4):
        train_step(one, items(seed=step))
        load_E = one.balance[0].load_E.clone()
        bias_E = one.balance[0].expert_bias.clone()
        one.balance[0].on_step(step, 0.0)
    (past,) = export_history(one).values()
    assert past["step"].tolist() == [2, 3]
    assert past["load"][-1].tolist() == load_E.tolist()
    assert past["bias"][-1].tolist() == bias_E.tolist()
    assert past["max_violation"][-1] == pytest.approx(load_E.max().item() / 16 - 1)
    assert past["idle_fraction"].shape == (2,)
    assert export_history(router()) == {}


# -- a model with layers of all sorts


def decoder(rule="sign"):
    routed = MoE.Config(num_experts=4, hidden_dim=16, router=router(rule).config)
    config = Decoder.Config(
        vocab_size=32,
        dim=16,
        num_layers=3,
        feed_forward=routed,
        dense_feed_forward=SwiGLU.Config(hidden_dim=16),
        dense_layers=(1,),
        max_positions=16,
    )
    return config.build(seed=0)


@pytest.mark.parametrize("rule", RULES)
def test_recompute_counts_once_and_mixed_layers_each_move(rule):
    """Activation recompute runs every block twice; the loads, and so the biases, are those of one pass."""
    plain, repeated = decoder(rule), decoder(rule)
    token_BL = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(0))
    repeated.load_state_dict(plain.state_dict())
    repeated.recompute = True
    for model in (plain, repeated):
        model.train()
        model(token_BL, token_BL.roll(-1, 1)).loss.backward()
    loads = [[b.load_E.tolist() for b in model.modules() if isinstance(b, BiasBalancer)] for model in (plain, repeated)]
    assert loads[0] == loads[1]
    assert len(loads[0]) == 2  # the middle layer is dense
    assert all(sum(load) == 2 * 8 * 2 for load in loads[0])


def test_biases_travel_under_the_names_of_deepseek_v3():
    model, other = decoder(), decoder()
    for module in model.modules():
        if isinstance(module, BiasBalancer):
            module.expert_bias.uniform_(-1, 1)
    tensors = export_correction_bias(model)
    assert sorted(tensors) == [f"model.layers.{n}.mlp.gate.e_score_correction_bias" for n in (0, 2)]
    assert import_correction_bias(other, {**tensors, "model.norm.weight": torch.ones(16)}) == [0, 2]
    for name, value in export_correction_bias(other).items():
        assert torch.equal(value, tensors[name])
        assert value.dtype == torch.float32


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.norm.weight": torch.ones(4)}, "no tensor is named"),
        (
            {"model.layers.1.mlp.gate.e_score_correction_bias": torch.ones(4)},
            "no place here; layers with a bias that is added: 0, 2",
        ),
        ({"model.layers.0.mlp.gate.e_score_correction_bias": torch.ones(5)}, r"shape \(5,\); the layer has 4 dest"),
    ],
)
def test_biases_that_do_not_fit_are_refused(tensors, message):
    model = decoder()
    with pytest.raises(CheckpointError, match=message):
        import_correction_bias(model, tensors)
    assert not any(value.any() for value in export_correction_bias(model).values())


@given(st.sampled_from(RULES), st.integers(1, 3), st.integers(0, 2**16))
def test_items_only_move_towards_what_gained_bias(rule, top_k, seed):
    """The preference rule holds for every step rule: what is taken rose at least as much as what is dropped."""
    generator = torch.Generator().manual_seed(seed)
    score_NE = torch.rand(64, 6, generator=generator) + torch.linspace(0, 0.5, 6)
    balancer, select = BiasBalancer.Config(rule=rule).build(6), TopK.Config(top_k=top_k).build(6)
    index_NK = step_with(balancer, select, score_NE).index_NK
    for step in range(2, 6):
        before_E = balancer.expert_bias.clone()
        after_NK = select(score_NE, bias_E=before_E).index_NK
        step_with(balancer, select, score_NE, step)
        moved_E = balancer.expert_bias - before_E
        index_NK, after_NK = after_NK, select(score_NE, bias_E=balancer.expert_bias).index_NK
        for old, new in zip(index_NK.tolist(), after_NK.tolist(), strict=True):
            for dropped in set(old) - set(new):
                for taken in set(new) - set(old):
                    assert moved_E[taken] >= moved_E[dropped] - 1e-6


@pytest.mark.slow
def test_quantiles_keep_the_contract_of_routers_and_balancers():
    check_balancer(BiasBalancer.Config(rule="quantile"))
    check_balancer(BiasBalancer.Config(form="multiply"))
    check_router(router("quantile", dim=16), dim=16)
    check_feed_forward(MoE.Config(num_experts=4, hidden_dim=32, router=router("quantile").config))


QUANTILES = """
import torch
from anabranch.routing import BiasBalancer, Router, RoutingContext, TopK, sync_loads
from anabranch.routing.score import LinearScore

def train(rank, world):
    config = Router.Config(
        score=LinearScore.Config(activation="sigmoid", init_std=0.5), select=TopK.Config(top_k=2),
        balance=(BiasBalancer.Config(rule="quantile"),),
    )
    router = config.build(6, 8, generator=torch.Generator().manual_seed(0))
    x_ND = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    for step in range(1, 4):
        context = RoutingContext(training=True)
        router(x_ND.chunk(world)[rank], context)
        context.commit()
        sync_loads(router)
        router.balance[0].on_step(step, step / 3)
    return router.balance[0].expert_bias.tolist()
"""


@pytest.mark.slow
def test_two_ranks_find_the_quantiles_of_the_whole_batch(tmp_path):
    namespace = {}
    exec(QUANTILES, namespace)
    expected = namespace["train"](0, 1)
    first, second = map(literal_eval, run_ranks(QUANTILES + "print(train(rank, world))"))
    assert first == second
    assert first == pytest.approx(expected, abs=1e-6)
    assert any(expected)
