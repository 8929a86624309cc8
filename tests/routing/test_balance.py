import math
from ast import literal_eval

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.routing import (
    UNUSED,
    BiasBalancer,
    DeviceLoss,
    EntropyLoss,
    ImportanceLoss,
    PoolLoss,
    Router,
    Routing,
    RoutingContext,
    SwitchLoss,
    TopK,
    ZLoss,
    discard_loads,
    sync_loads,
)
from anabranch.routing.balance import Observation, masked_mean
from anabranch.routing.score import LinearScore
from ranks import run_ranks


def observe(logit_NE, top_k=2, open_NE=None, mask_N=None, activation="softmax"):
    """What a router of these logits shows its balancers, with the mask acting before the activation."""
    masked_NE = logit_NE if open_NE is None else logit_NE.masked_fill(~open_NE, -torch.inf)
    score_NE = masked_NE.softmax(-1) if activation == "softmax" else masked_NE.sigmoid()
    routing = TopK.Config(top_k=top_k).build(logit_NE.shape[1])(score_NE, open_NE=open_NE)
    if mask_N is not None:
        routing = routing.drop(~mask_N.unsqueeze(-1))
    return Observation(logit_NE, routing, open_NE)


def emitted(balancer, seen, **context):
    """The one loss that the balancer emits."""
    context = RoutingContext(training=True, **context)
    balancer(seen, context)
    (loss,) = context.mean_losses().values()
    return loss


def logits(num_items=12, num_destinations=8, seed=0, **options):
    return torch.randn(num_items, num_destinations, generator=torch.Generator().manual_seed(seed), **options)


def balanced(num_destinations=8, top_k=2):
    """Items that choose every destination equally often, with scores that sum to the same for each."""
    index_NK = (torch.arange(num_destinations).unsqueeze(-1) + torch.arange(top_k)) % num_destinations
    score_NE = torch.full((num_destinations, num_destinations), 1 / num_destinations)
    return Observation(score_NE.log(), Routing(index_NK, score_NE.gather(1, index_NK), score_NE))


LOSSES = [
    SwitchLoss.Config(),
    SwitchLoss.Config(scope="global_batch"),
    SwitchLoss.Config(scope="sequence"),
    PoolLoss.Config(),
    ZLoss.Config(),
    ImportanceLoss.Config(),
    DeviceLoss.Config(num_devices=4),
    EntropyLoss.Config(beta=0.02),
]
NAMES = ["switch", "switch_global", "switch_sequence", "pool", "z_loss", "importance", "device", "entropy"]


# -- by hand and against naive loops


def test_switch_by_hand():
    # 2 items, top 1 of 2, scores (0.75, 0.25) and (0.6, 0.4): f = (1, 0), P = (0.675, 0.325)
    score_NE = torch.tensor([[0.75, 0.25], [0.6, 0.4]])
    routing = Routing(torch.zeros(2, 1, dtype=torch.int64), score_NE[:, :1], score_NE)
    loss = emitted(SwitchLoss.Config(alpha=0.1).build(2), Observation(score_NE.log(), routing))
    assert loss.item() == pytest.approx(0.1 * 2 * 0.675)


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_balanced_routing_costs_alpha(scope, top_k):
    loss = emitted(SwitchLoss.Config(alpha=0.3, scope=scope).build(8), balanced(top_k=top_k), sequence_length=8)
    assert loss.item() == pytest.approx(0.3)


def test_balanced_devices_cost_alpha_and_balanced_importance_nothing():
    assert emitted(DeviceLoss.Config(alpha=0.3, num_devices=4).build(8), balanced()).item() == pytest.approx(0.3)
    assert emitted(PoolLoss.Config(alpha=0.3).build(8), balanced()).item() == pytest.approx(0.3)
    assert emitted(ImportanceLoss.Config().build(8), balanced()).item() == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("config", LOSSES, ids=NAMES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_one_item_costs_what_it_costs_several_times_or_among_padding(config, top_k):
    """Losses are means over items, of one alone as of many."""
    logit_NE = logits(1)
    several = observe(logit_NE.repeat(3, 1), top_k)
    expected = emitted(config.build(8), several, sequence_length=1)
    assert expected > 0
    torch.testing.assert_close(emitted(config.build(8), observe(logit_NE, top_k), sequence_length=1), expected)
    mask_N = torch.tensor([False, True, False])
    padded = observe(torch.cat((logits(1, seed=1), logit_NE, logits(1, seed=2))), top_k, mask_N=mask_N)
    found = emitted(config.build(8), padded, sequence_length=1, item_mask_N=mask_N)
    torch.testing.assert_close(found, expected)


def naive_switch(seen, items, num_open):
    """E sum_e f_e P_e over some items."""
    counts = [0] * seen.routing.num_destinations
    mean_E = torch.zeros(seen.routing.num_destinations)
    for n in items:
        for e in seen.routing.index_NK[n].tolist():
            if e != UNUSED:
                counts[e] += 1
        score_E = seen.routing.score_NE[n]
        mean_E = mean_E + score_E / score_E.sum() / len(items)
    return num_open * sum(count / sum(counts) * p for count, p in zip(counts, mean_E, strict=True))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("masked", [False, True])
def test_scopes_are_what_naive_loops_say(activation, masked):
    mask_N = torch.rand(12, generator=torch.Generator().manual_seed(1)) < 0.7 if masked else None
    logit_NE = logits().requires_grad_()
    seen = observe(logit_NE, mask_N=mask_N, activation=activation)
    real = [n for n in range(12) if mask_N is None or mask_N[n]]
    sequences = [[n for n in real if n // 4 == s] for s in range(3)]
    expected = {
        "micro_batch": naive_switch(seen, real, 8),
        "sequence": sum(naive_switch(seen, items, 8) for items in sequences) / 3,
    }
    for scope, value in expected.items():
        balancer = SwitchLoss.Config(alpha=0.1, scope=scope).build(8)
        loss = emitted(balancer, seen, item_mask_N=mask_N, sequence_length=4)
        torch.testing.assert_close(loss, 0.1 * value)
        ours, naive = (torch.autograd.grad(result, logit_NE, retain_graph=True)[0] for result in (loss, 0.1 * value))
        torch.testing.assert_close(ours, naive)


def test_a_sequence_of_padding_does_not_count():
    mask_N = torch.tensor([True] * 4 + [False] * 4)
    seen = observe(logits(8), mask_N=mask_N)
    balancer = SwitchLoss.Config(alpha=1.0, scope="sequence").build(8)
    loss = emitted(balancer, seen, item_mask_N=mask_N, sequence_length=4)
    torch.testing.assert_close(loss, naive_switch(seen, range(4), 8))


def test_global_scope_counts_the_micro_batches_of_the_step_so_far():
    balancer = SwitchLoss.Config(alpha=1.0, scope="global_batch").build(8)
    seen = [observe(logits(seed=seed)) for seed in range(3)]
    total_E = torch.zeros(8)
    for one in seen:
        context = RoutingContext(training=True)
        balancer(one, context)
        context.commit()
        total_E += one.routing.load_E()
        expected = 8 * (total_E / total_E.sum() * one.routing.score_NE.mean(0)).sum()
        torch.testing.assert_close(context.mean_losses()["load_balancing"], expected)
    balancer.on_step(0, 0.0)
    torch.testing.assert_close(emitted(balancer, seen[0]), naive_switch(seen[0], range(12), 8))


def test_global_scope_recomputed_in_the_backward_pass_is_the_same():
    """The loads of the forward pass have been committed by then, and must not count twice."""
    balancer = SwitchLoss.Config(scope="global_batch").build(8)
    for seed in range(2):  # the second micro-batch is the one where it shows
        context = RoutingContext(training=True)
        seen = observe(logits(seed=seed))
        balancer(seen, context)
        context.commit()
        again = context.fork()
        balancer(seen, again)
        assert torch.equal(again.losses["load_balancing"][0], context.losses["load_balancing"][0])


def test_z_loss_is_the_mean_squared_logsumexp():
    logit_NE = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])  # logsumexp: ln 4, ln 2
    loss = emitted(ZLoss.Config(beta=0.5).build(2), observe(logit_NE, top_k=1))
    assert loss.item() == pytest.approx(0.5 * (math.log(4) ** 2 + math.log(2) ** 2) / 2)


def test_importance_is_the_squared_coefficient_of_variation():
    score_NE = torch.tensor([[0.5, 0.25, 0.25], [0.7, 0.2, 0.1]])  # sums 1.2, 0.45, 0.35, mean 2 / 3
    routing = Routing(torch.zeros(2, 1, dtype=torch.int64), score_NE[:, :1], score_NE)
    loss = emitted(ImportanceLoss.Config(alpha=1.0).build(3), Observation(score_NE.log(), routing))
    variance = sum((value - 2 / 3) ** 2 for value in (1.2, 0.45, 0.35)) / 3
    assert loss.item() == pytest.approx(variance / (2 / 3) ** 2, rel=1e-5)


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.0), (0.0, 0.3), (0.5, -0.3)])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_entropy_is_that_of_the_mean_and_of_each_item(alpha, beta, activation):
    def entropy(shares):
        return -sum(share * math.log(share) for share in shares if share > 0)

    seen = observe(logits(5), activation=activation)
    shares = [[value / sum(row) for value in row] for row in seen.routing.score_NE.tolist()]
    mean = [sum(column) / 5 for column in zip(*shares, strict=True)]
    expected = alpha * (math.log(8) - entropy(mean)) + beta * sum(map(entropy, shares)) / 5
    found = emitted(EntropyLoss.Config(alpha=alpha, beta=beta).build(8), seen)
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_entropy_of_open_destinations_alone():
    open_E = torch.tensor([True] * 4 + [False] * 4)
    alone = emitted(EntropyLoss.Config(beta=0.1).build(4), observe(logits()[:, :4]))
    masked = emitted(EntropyLoss.Config(beta=0.1).build(8), observe(logits(), open_NE=open_E))
    torch.testing.assert_close(masked, alone)
    assert emitted(EntropyLoss.Config().build(8), balanced()).item() == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize(
    ("alpha", "beta", "evener", "surer"), [(1.0, 0.0, True, None), (0.0, 1.0, None, True), (0.0, -1.0, True, False)]
)
def test_entropy_losses_even_scores_out_and_make_items_decide_or_not(alpha, beta, evener, surer):
    logit_NE = (logits(64) + torch.linspace(-1, 1, 8)).requires_grad_()
    optimizer, start = torch.optim.Adam([logit_NE], 0.1), logit_NE.detach().softmax(-1)
    for _ in range(60):
        optimizer.zero_grad()
        emitted(EntropyLoss.Config(alpha=alpha, beta=beta).build(8), observe(logit_NE)).backward()
        optimizer.step()
    end = logit_NE.detach().softmax(-1)
    assert start.mean(0).max() > 1.5 / 8
    assert 0.25 < start.amax(-1).mean() < 0.5
    if evener:
        assert end.mean(0).max() < 1.1 / 8
    if surer is not None:
        assert end.amax(-1).mean() > 0.9 if surer else end.amax(-1).mean() < 0.2


def test_device_loss_is_the_papers_double_sum():
    seen = observe(logits(), top_k=3)
    share = [count / 36 * 8 for count in seen.routing.load_E().tolist()]  # f_i = E / (K T) count
    mean_E = seen.routing.score_NE.mean(0)
    expected = sum(sum(share[g : g + 4]) / 4 * mean_E[g : g + 4].sum() for g in (0, 4))
    torch.testing.assert_close(emitted(DeviceLoss.Config(alpha=1.0, num_devices=2).build(8), seen), expected)


def test_pool_loss_averages_loads_and_scores_over_layers_before_the_product():
    balancer, context = PoolLoss.Config(alpha=1.0).build(8), RoutingContext(training=True)
    seen = [observe(logits(seed=seed)) for seed in range(2)]
    for one in seen:
        balancer(one, context)
    share_E = sum(one.routing.load_E() / 24 for one in seen) / 2
    mean_E = sum(one.routing.score_NE.mean(0) for one in seen) / 2
    torch.testing.assert_close(context.mean_losses()["pool_balancing"], 8 * (share_E * mean_E).sum())


def test_losses_are_per_layer_and_never_pooled():
    """Two layers, each sending all to one destination, but not the same one: balanced together, and each as bad as can be."""
    context, balancer = RoutingContext(training=True), SwitchLoss.Config(alpha=1.0).build(2)
    for e in range(2):
        score_NE = torch.zeros(4, 2)
        score_NE[:, e] = 1.0
        routing = Routing(torch.full((4, 1), e), torch.ones(4, 1), score_NE)
        balancer(Observation(score_NE, routing), context)
    assert [loss.item() for loss in context.losses["load_balancing"]] == [2.0, 2.0]
    assert context.mean_losses()["load_balancing"].item() == 2.0


# -- what all losses share


@pytest.mark.parametrize("config", LOSSES, ids=NAMES)
def test_no_items_cost_nothing(config):
    for open_NE in (None, torch.ones(0, 8, dtype=torch.bool)):
        logit_NE = torch.zeros(0, 8, requires_grad=True)
        loss = emitted(config.build(8), observe(logit_NE, open_NE=open_NE), sequence_length=4)
        assert loss.item() == 0.0
        loss.backward()


@pytest.mark.parametrize("config", LOSSES, ids=NAMES)
def test_padding_is_not_counted(config):
    """Losses of real items alone, whatever stands in padding; padding that sits between them changes nothing."""
    mask_N = torch.tensor([True, False, True, True] * 3)
    logit_NE = logits()
    padded_NE = logit_NE.masked_fill(~mask_N.unsqueeze(-1), 1e4)
    padded = emitted(config.build(8), observe(padded_NE, mask_N=mask_N), item_mask_N=mask_N, sequence_length=4)
    alone = emitted(config.build(8), observe(logit_NE[mask_N]), sequence_length=3)
    torch.testing.assert_close(padded, alone)


@pytest.mark.parametrize("config", LOSSES, ids=NAMES)
def test_all_padding_costs_nothing_and_has_zero_gradients(config):
    logit_NE = logits().requires_grad_()
    mask_N = torch.zeros(12, dtype=torch.bool)
    loss = emitted(config.build(8), observe(logit_NE, mask_N=mask_N), item_mask_N=mask_N, sequence_length=4)
    loss.backward()
    assert loss.item() == 0.0
    assert (logit_NE.grad == 0).all()


@pytest.mark.parametrize("config", LOSSES, ids=NAMES)
@pytest.mark.parametrize("per_item", [False, True])
def test_only_open_candidates_are_looked_at(config, per_item):
    """Closed destinations are as if they were not there: same loss, and no gradient into them."""
    # 4 of 8 stay, in 2 of 4 device groups
    open_E = torch.tensor([True, True, False, False, False, False, True, True])
    open_NE = open_E.expand(12, 8) if per_item else open_E
    logit_NE = logits().requires_grad_()
    loss = emitted(config.build(8), observe(logit_NE, open_NE=open_NE), sequence_length=4)
    small = config.replace(num_devices=2) if isinstance(config, DeviceLoss.Config) else config
    alone = emitted(small.build(4), observe(logit_NE[:, open_E]), sequence_length=4)
    torch.testing.assert_close(loss, alone)
    loss.backward()
    assert torch.isfinite(logit_NE.grad).all()
    assert (logit_NE.grad[:, ~open_E] == 0).all()


def test_masks_per_item_weigh_each_destination_by_how_often_it_is_open():
    open_NE = torch.tensor([[True, True, False], [True, False, False]])
    mask_N = torch.tensor([True, False])
    seen = observe(logits(2, 3), top_k=1, open_NE=open_NE, mask_N=mask_N)
    assert seen.openness_E(None).tolist() == [1.0, 0.5, 0.0]
    assert seen.num_open(None).item() == 1.5
    assert seen.num_open(mask_N).item() == 2.0  # the padding item's mask does not count


@pytest.mark.parametrize("config", LOSSES, ids=NAMES)
def test_losses_compile_into_one_graph(config):
    open_E = torch.tensor([True] * 6 + [False] * 2)

    balancer, routing = config.build(8), observe(logits(), open_NE=open_E).routing

    def loss(logit_NE):
        score_NE = logit_NE.masked_fill(~open_E, -torch.inf).softmax(-1)
        context = RoutingContext(training=True, sequence_length=4)
        balancer(Observation(logit_NE, Routing(routing.index_NK, routing.weight_NK, score_NE), open_E), context)
        return sum(context.mean_losses().values())

    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="eager")(logits()), loss(logits()))


def test_masked_mean_ignores_what_padding_holds():
    value_NX = torch.tensor([[1.0], [torch.inf], [3.0]])
    assert masked_mean(value_NX, torch.tensor([True, False, True])).item() == 2.0
    assert masked_mean(value_NX[:0], None).item() == 0.0


# -- the loss-free bias


def moved(config, *loads, open_E=None):
    balancer = config.build(len(loads[0]))
    for load in loads:
        balancer.add_load(torch.tensor(load), open_E)
    balancer.on_step(0, 0.0)
    return balancer.expert_bias


def test_sign_moves_by_exactly_u():
    config = BiasBalancer.Config(rate=0.25, center=False)
    # mean 4: below, above, at the mean, far below
    assert moved(config, [3, 9, 4, 0]).tolist() == [0.25, -0.25, 0.0, 0.25]


def test_magnitude_moves_in_proportion_to_what_is_missing():
    config = BiasBalancer.Config(rule="magnitude", rate=0.25, center=False)
    assert moved(config, [3, 9, 4, 0]).tolist() == [0.0625, -0.3125, 0.0, 0.25]  # 0.25 (4 - A) / 4


def test_centring_takes_the_mean_out():
    config = BiasBalancer.Config(rate=0.25)
    assert moved(config, [3, 9, 4, 0]).tolist() == [0.1875, -0.3125, -0.0625, 0.1875]  # the sum of the moves was 0.25


def test_clip_limits_the_bias():
    balancer = BiasBalancer.Config(rate=0.25, center=False, clip=0.5).build(2)
    for step in range(5):
        balancer.add_load(torch.tensor([1, 3]))
        balancer.on_step(step, 0.0)
    assert balancer.expert_bias.tolist() == [0.5, -0.5]


def test_the_load_is_forgotten_after_the_step():
    balancer = BiasBalancer.Config(center=False, rate=0.25).build(2)
    balancer.add_load(torch.tensor([1, 3]))
    balancer.on_step(0, 0.0)
    assert balancer.load_E.tolist() == [0.0, 0.0]
    balancer.on_step(1, 0.0)  # nothing was routed: nothing moves
    assert balancer.expert_bias.tolist() == [0.25, -0.25]


def test_freezing():
    balancer = BiasBalancer.Config(center=False, rate=0.25, freeze_after=0.5).build(2)
    for fraction in (0.5, 0.6, 1.0):
        balancer.add_load(torch.tensor([1, 3]))
        balancer.on_step(0, fraction)
    assert balancer.expert_bias.tolist() == [0.25, -0.25]  # moved at 0.5, then stayed
    assert balancer.load_E.tolist() == [0.0, 0.0]


def test_the_mean_load_need_not_be_whole():
    assert moved(BiasBalancer.Config(rate=1.0, center=False), [1, 1, 2]).tolist() == [1.0, 1.0, -1.0]


def test_closed_destinations_keep_their_bias_and_do_not_lower_the_mean():
    open_E = torch.tensor([1.0, 1.0, 0.0])
    assert moved(BiasBalancer.Config(rate=1.0, center=False), [1, 3, 0], open_E=open_E).tolist() == [1.0, -1.0, 0.0]
    magnitude = BiasBalancer.Config(rate=1.0, center=False, rule="magnitude")
    assert moved(magnitude, [1, 3, 0], open_E=open_E).tolist() == [0.5, -0.5, 0.0]


def router(balance, *, dim=6, num_destinations=8, top_k=2, **options):
    config = Router.Config(
        score=LinearScore.Config(activation="sigmoid", init_std=0.5),
        select=TopK.Config(top_k=top_k),
        balance=balance if isinstance(balance, tuple) else (balance,),
    )
    return config.build(dim, num_destinations, generator=torch.Generator().manual_seed(0), **options)


def train_step(router, *batches):
    """One step of training, in micro-batches."""
    for x_ND in batches:
        context = RoutingContext(training=True)
        router(x_ND, context)
        context.commit()


@pytest.mark.parametrize("rule", ["sign", "magnitude"])
def test_micro_batches_equal_one_batch(rule):
    whole, parts = (router(BiasBalancer.Config(rule=rule, rate=0.01)) for _ in range(2))
    for step in range(5):
        x_ND = torch.randn(12, 6)
        train_step(whole, x_ND)
        train_step(parts, *x_ND.split(3))
        for one in (whole, parts):
            one.balance[0].on_step(step, 0.0)
    assert torch.equal(whole.balance[0].expert_bias, parts.balance[0].expert_bias)
    assert whole.balance[0].expert_bias.any()


@pytest.mark.parametrize("rule", ["sign", "magnitude"])
def test_with_k_of_all_the_bias_stays_zero(rule):
    one = router(BiasBalancer.Config(rule=rule, rate=0.1), num_destinations=6, top_k=6)
    for step in range(20):
        train_step(one, torch.randn(7, 6))
        one.balance[0].on_step(step, 0.0)
    assert not one.balance[0].expert_bias.any()


def test_evaluation_neither_counts_nor_emits():
    one = router((BiasBalancer.Config(), SwitchLoss.Config(scope="global_batch"), ZLoss.Config()))
    context = RoutingContext(training=False)
    one(torch.randn(5, 6), context)
    context.commit()
    assert context.losses == {}
    assert not one.balance[0].load_E.any()
    assert not one.balance[1].load_E.any()


def test_a_skipped_step_forgets_its_loads():
    one = router((BiasBalancer.Config(), SwitchLoss.Config(scope="global_batch")))
    train_step(one, torch.randn(5, 6))
    assert one.balance[0].load_E.sum() == 10
    discard_loads(one)
    assert not one.balance[0].load_E.any()
    assert not one.balance[1].load_E.any()
    one.balance[0].on_step(0, 0.0)
    assert not one.balance[0].expert_bias.any()


def test_the_bias_balances_skewed_scores():
    """Loads even out and stay even; without the bias one destination takes most."""
    generator = torch.Generator().manual_seed(0)
    skew_E = torch.linspace(0, 0.4, 8)
    balancer, select = BiasBalancer.Config(rate=1e-3).build(8), TopK.Config(top_k=2).build(8)

    def max_vio(bias_E):
        score_NE = torch.rand(2048, 8, generator=generator) * 0.5 + skew_E
        load_E = select(score_NE, bias_E=bias_E).load_E()
        balancer.add_load(load_E)
        return load_E.max().item() / (2 * 2048 / 8) - 1

    before = max_vio(None)
    for step in range(600):
        max_vio(balancer.expert_bias)
        balancer.on_step(step, 0.0)
    after = sum(max_vio(balancer.expert_bias) for _ in range(10)) / 10
    assert before > 1.0
    assert after < 0.15


@pytest.mark.parametrize("shift", [0.3, 3.0])
def test_a_dead_destination_recovers_within_shift_over_u_steps(shift):
    rate, generator = 0.02, torch.Generator().manual_seed(0)
    score_NE = torch.rand(512, 8, generator=generator)
    score_NE[:, 3] -= shift + 1.0  # below all others by at least `shift`, so no one chooses it
    balancer, select = BiasBalancer.Config(rate=rate).build(8), TopK.Config(top_k=2).build(8)
    assert select(score_NE).load_E()[3] == 0
    for step in range(math.ceil((shift + 2.0) / rate)):  # 2.0: the width of the scores, and of the shift beyond them
        balancer.add_load(select(score_NE, bias_E=balancer.expert_bias).load_E())
        balancer.on_step(step, 0.0)
    share = select(score_NE, bias_E=balancer.expert_bias).load_E()[3] / (512 * 2 / 8)
    assert 0.8 < share < 1.2


@given(
    st.sampled_from(["sign", "magnitude"]), st.integers(1, 3), st.integers(0, 2**16), st.sampled_from([1e-3, 0.02, 0.3])
)
def test_items_only_move_towards_what_gained_bias(rule, top_k, seed, rate):
    """The preference rule: an item that drops a and takes b has seen b's bias rise at least as much as a's."""
    generator = torch.Generator().manual_seed(seed)
    score_NE = torch.rand(64, 6, generator=generator, dtype=torch.float64) + torch.linspace(0, 0.5, 6)
    balancer = BiasBalancer.Config(rule=rule, rate=rate).build(6).double()
    select = TopK.Config(top_k=top_k).build(6)
    routing = select(score_NE)
    for step in range(8):
        before_E = balancer.expert_bias.clone()
        balancer.add_load(routing.load_E())
        balancer.on_step(step, 0.0)
        moved_E = balancer.expert_bias - before_E
        routing_after = select(score_NE, bias_E=balancer.expert_bias)
        for old, new in zip(routing.index_NK.tolist(), routing_after.index_NK.tolist(), strict=True):
            for dropped in set(old) - set(new):
                for taken in set(new) - set(old):
                    assert moved_E[taken] >= moved_E[dropped] - 1e-6
        routing = routing_after


def test_counts_and_bias_stay_fp32_when_the_model_is_cast():
    one = router(BiasBalancer.Config(rate=1e-3)).bfloat16()
    balancer = one.balance[0]
    assert (balancer.expert_bias.dtype, balancer.load_E.dtype) == (torch.float32, torch.float32)
    assert one.score.weight.dtype == torch.bfloat16
    for _ in range(3):
        balancer.add_load(torch.tensor([1, 257, *[5] * 6]))
    assert balancer.load_E[:2].tolist() == [3.0, 771.0]  # bf16 would have said 768
    assert balancer.half().load_E.dtype == torch.float32


def test_only_the_bias_is_saved():
    assert set(router((BiasBalancer.Config(), SwitchLoss.Config())).state_dict()) == {
        "score.weight",
        "balance.0.expert_bias",
    }


# -- ranks


RANKS = """
import torch
import torch.distributed as dist
from anabranch.routing import BiasBalancer, Router, RoutingContext, SwitchLoss, TopK, sync_loads
from anabranch.routing.score import LinearScore

def train(rank, world, scope="global_batch"):
    config = Router.Config(
        score=LinearScore.Config(init_std=0.5), select=TopK.Config(top_k=2),
        balance=(BiasBalancer.Config(rule="magnitude", rate=0.1), SwitchLoss.Config(scope=scope)),
    )
    router = config.build(6, 8, generator=torch.Generator().manual_seed(0))
    x_MND = torch.randn(3, 2, 10, 6, generator=torch.Generator().manual_seed(1))  # 3 steps of 2 micro-batches of 10 items
    losses = []
    for step in range(3):
        for micro in range(2):
            context = RoutingContext(training=True)
            router(x_MND[step, micro].chunk(world)[rank], context)
            context.commit()
            loss = context.mean_losses()["load_balancing"].detach()
            if world > 1:
                dist.all_reduce(loss)
            losses.append(loss.item() / world)
        sync_loads(router)
        assert router.balance[0].load_E.sum() == 2 * 10 * 2
        for part in router.balance:
            part.on_step(step, step / 3)
    return losses, router.balance[0].expert_bias.tolist()
"""


@pytest.mark.slow
def test_two_ranks_with_half_batches_equal_one_with_the_whole(tmp_path):
    namespace = {}
    exec(RANKS, namespace)
    losses, bias = namespace["train"](0, 1)
    both = "print([train(rank, world), train(rank, world, 'micro_batch')])"
    (first, apart), (second, _) = map(literal_eval, run_ranks(RANKS + both))
    assert first == second
    assert first[0] == pytest.approx(losses, rel=1e-5)
    assert first[1] == pytest.approx(bias, rel=1e-5, abs=1e-7)
    assert any(bias)
    # A micro-batch is that of a process, so the loss over it is not that of the whole; the bias, which is moved by sums, is.
    whole = namespace["train"](0, 1, "micro_batch")
    assert apart[0][0] != pytest.approx(whole[0][0], rel=1e-3)
    assert apart[1] == pytest.approx(whole[1], rel=1e-5, abs=1e-7)


def test_without_ranks_nothing_is_summed():
    one = router(BiasBalancer.Config())
    train_step(one, torch.randn(5, 6))
    sync_loads(one)
    assert one.balance[0].load_E.sum() == 10


# -- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BiasBalancer.Config(rate=0.0), "rate is 0.0; it must be greater than 0"),
        (
            lambda: BiasBalancer.Config(rule="pid"),
            "rule is 'pid'; it must be 'sign', 'magnitude', 'inv_n', 'inv_sqrt' or 'quantile'",
        ),
        (lambda: BiasBalancer.Config(freeze_after=1.5), "freeze_after is 1.5; it must be less than or equal to 1"),
        (lambda: BiasBalancer.Config(clip=0.0), "clip is 0.0; it must be greater than 0"),
        (lambda: SwitchLoss.Config(alpha=-1.0), "alpha is -1.0; it must be greater than or equal to 0"),
        (lambda: SwitchLoss.Config(scope="step"), "scope is 'step'; it must be 'micro_batch', 'sequence' or 'global"),
        (lambda: ZLoss.Config(beta=-1.0), "beta is -1.0; it must be greater than or equal to 0"),
        (lambda: DeviceLoss.Config(num_devices=3).build(8), "num_devices is 3, which does not divide 8 destinations"),
        (
            lambda: emitted(SwitchLoss.Config(scope="sequence").build(8), observe(logits())),
            "balance scope is 'sequence', but the items are not sequences; use 'micro_batch'",
        ),
    ],
)
def test_messages(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_bias_of_another_length_does_not_load():
    with pytest.raises(RuntimeError, match="expert_bias"):
        BiasBalancer.Config().build(8).load_state_dict(BiasBalancer.Config().build(4).state_dict())


def test_a_move_takes_the_counters_along_and_a_cast_leaves_them():
    for config in (SwitchLoss.Config(scope="global_batch"), BiasBalancer.Config()):
        counters = config.build(4).bfloat16()
        assert {buffer.dtype for buffer in counters.buffers()} == {torch.float32}
        assert all(buffer.is_meta for buffer in counters.to("meta").buffers())
