import itertools
import math

import pytest
import torch

from anabranch.config import configclass
from anabranch.depth.duo_llm import (
    BIG,
    SKIP,
    SMALL,
    DuoFFN,
    Routed,
    RouteSpace,
    duo_layers,
    learned_router,
    oracle,
    take,
    with_router,
)
from anabranch.errors import ConfigError, DataError
from anabranch.experts.parscale import ParScale
from anabranch.lm import Decoder
from anabranch.nn import Count, Linear, SwiGLU
from anabranch.nn.context import BuildContext, ForwardContext
from anabranch.routing import Override, Router, TopK, override_routing, record_routing
from duo import all_one, decoder, losses, tokens

SAME = 1e-6  # the same sums in another order


def routes_of(model, batch, length, seed=0, options=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, options, (batch, length, len(duo_layers(model))), generator=generator)


# The layer


@pytest.mark.parametrize("compute", ["gather", "dense"])
def test_each_token_gets_its_module_and_skip_adds_nothing(compute):
    layer = DuoFFN.Config(big=8, small=2, allow_skip=True, compute=compute).build(BuildContext(dim=4, init_std=1.0))
    x_BLD = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    route = torch.tensor([[[BIG], [SKIP], [SMALL]]])
    context = ForwardContext(position_BL=route[..., 0], rotary=(x_BLD, x_BLD), state=take(route))
    y_BLD = layer(x_BLD, context)
    torch.testing.assert_close(y_BLD[0, 0], layer.big(x_BLD[0, 0]))
    assert torch.equal(y_BLD[0, 1], torch.zeros(4))
    torch.testing.assert_close(y_BLD[0, 2], layer.small(x_BLD[0, 2]))


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu"])
def test_sizes_of_a_layer_by_its_activation(activation):
    """Matrices of 16 x 24 and of 16 x 8: two each, or three with a gate."""
    config, matrices = DuoFFN.Config(big=24, small=8, activation=activation), 2 if activation == "gelu" else 3
    count = config.count(BuildContext(dim=16))
    assert count.parameters == matrices * 16 * 32
    assert count.flops == 2 * matrices * 16 * 24 == config.flops(16, big=1.0)
    layer = config.build(BuildContext(dim=16))
    assert sum(parameter.numel() for parameter in layer.parameters()) == count.parameters


def test_modules_with_gelu():
    layer = DuoFFN.Config(big=8, small=2, activation="gelu").build(BuildContext(dim=4, init_std=1.0))
    x_BLD = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(0))
    route = torch.tensor([[[BIG], [SMALL]]])
    y_BLD = layer(x_BLD, ForwardContext(position_BL=route[..., 0], rotary=(x_BLD, x_BLD), state=take(route)))
    for place, module in ((0, layer.big), (1, layer.small)):
        z_F = module.w13.weight @ x_BLD[0, place]
        wanted = module.w2.weight @ (0.5 * z_F * (1 + torch.erf(z_F / math.sqrt(2))))
        torch.testing.assert_close(y_BLD[0, place], wanted)


class ByPosition(Linear):
    """What is added depends on the position and on what a router of its own picks, from the context of the rows."""

    @configclass
    class Config(Linear.Config):
        is_added = True

        def count(self, projection, context):
            return Count.dense(2 * projection.in_dim + 3 * projection.out_dim)

    def __init__(self, config, projection, context):
        torch.nn.Module.__init__(self)
        router = Router.Config(select=TopK.Config(top_k=1))
        self.router = router.build(projection.in_dim, 2, layer=context.layer, generator=context.generator)
        self.rows = torch.nn.Parameter(torch.randn(3, projection.out_dim, generator=context.generator))

    def forward(self, x, context):
        assert context.position_BL.numel() == x.shape[:-1].numel()
        routing = self.router(x.flatten(0, -2), context)
        picked = self.rows[routing.index_NK[:, 0].clamp_min(0)] * routing.weight_NK.to(x.dtype)
        at = context.position_BL.reshape(-1, 1).to(x.dtype)
        return (picked + 0.1 * at * self.rows[2]).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("padded", [False, True])
def test_layers_inside_a_module_are_told_which_tokens_they_see(padded):
    """Gathered rows carry their positions, routers inside them are recorded by item, and all is as if every token had been computed."""
    results = []
    mask_BL = torch.ones_like(tokens(), dtype=torch.bool)
    mask_BL[0, :3] = not padded
    for compute in ("gather", "dense"):
        config = decoder(allow_skip=True, compute=compute).config.replace(linears={"*.big.*": ByPosition.Config()})
        model, token_BL = config.build(seed=0).double(), tokens()
        route = routes_of(model, *token_BL.shape, options=3)
        with record_routing(model) as recorder:
            output = model(token_BL, token_BL.roll(-1, 1), token_mask_BL=mask_BL, state=take(route))
        output.loss.backward()
        trace = recorder.trace()
        inner = {
            name: decided
            for layer in trace.layers
            if "big" in (name := layer.name)
            for decided in [trace.decisions(layer.layer)]
        }
        chosen = {
            (name, item, position): expert
            for name, one in inner.items()
            for item, position, (expert,) in zip(one.item_N, one.position_N, one.index_NK, strict=True)
            if expert >= 0
        }
        for layer in trace.layers:  # who took the big module of a layer is who was routed inside it
            if layer.name.endswith("feed_forward.router"):
                decided = trace.decisions(layer.layer)
                big = {
                    (i, p)
                    for i, p, (e,) in zip(decided.item_N, decided.position_N, decided.index_NK, strict=True)
                    if e == BIG
                }
                inside = {
                    (item, position)
                    for name, item, position in chosen
                    if name == layer.name.replace("router", "big.w2.beside.down.router")
                }
                assert inside == big
        results.append((output.loss.detach(), {name: p.grad for name, p in model.named_parameters()}, chosen))
    (loss, gradients, chosen), (other, others, other_chosen) = results
    assert chosen == other_chosen
    torch.testing.assert_close(loss, other, rtol=SAME, atol=SAME)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=SAME, atol=SAME)


@pytest.mark.parametrize("pattern", ["*.big.down", "*.attention.q", "head"])
def test_oracles_give_layers_that_route_the_context_of_their_rows(pattern):
    config = decoder(num_layers=2).config.replace(linears={pattern: ByPosition.Config()})
    model, ids = config.build(seed=0), tokens()
    best = oracle(model, ids, budget=2)
    with torch.no_grad():
        wanted = losses(model, ids, "big")
    torch.testing.assert_close(best.loss_GBL[0], wanted, atol=1e-5, rtol=1e-5)
    consistent = oracle(model, ids, budget=2, mode="self_consistent")
    torch.testing.assert_close(consistent.loss_GBL[0], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("route_seed", range(3))
def test_gathering_equals_masking_in_values_and_gradients(route_seed, activation):
    results = []
    for compute in ("gather", "dense"):
        model = decoder(allow_skip=True, compute=compute, activation=activation).double()
        token_BL = tokens()
        route = routes_of(model, *token_BL.shape, seed=route_seed, options=3)
        output = model(token_BL, token_BL.roll(-1, 1), state=take(route))
        output.loss.backward()
        results.append((output.loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(*(loss for loss, _ in results), rtol=SAME, atol=SAME)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=SAME, atol=SAME)


def test_tokens_of_the_small_module_give_no_gradient_to_the_big_one():
    model = decoder()
    token_BL = tokens()
    model(token_BL, token_BL.roll(-1, 1), state=take("small")).loss.backward()
    for layer in duo_layers(model):
        assert all(p.grad is None or not p.grad.any() for p in layer.big.parameters())
        assert all(p.grad.any() for p in layer.small.parameters())


def test_random_routing_takes_each_option_as_often_as_it_says():
    model = decoder(num_layers=2, allow_skip=True, p_big=0.3, p_skip=0.2)
    seen = []
    for layer in duo_layers(model):
        layer.router.register_forward_hook(lambda module, args, routing: seen.append(routing.index_NK))
    torch.manual_seed(0)
    model(tokens(64, 50))
    index_X = torch.cat(seen).flatten()
    for option, p in ((SMALL, 0.5), (BIG, 0.3), (SKIP, 0.2)):
        share = (index_X == option).double().mean()
        assert abs(share - p) < 3 * math.sqrt(p * (1 - p) / index_X.numel())
    assert not torch.equal(seen[0], seen[1])  # each layer draws for itself


def test_a_route_may_be_a_name_a_tensor_or_a_callable():
    model = decoder().eval()
    token_BL = tokens()
    route = all_one([BIG, SMALL, BIG], tokens(3, 8))
    with torch.no_grad():
        expected = model(token_BL, state=take(route)).logits_BLV
        called = model(token_BL, state=take(lambda layer, x_ND, context: "small" if layer == 1 else "big")).logits_BLV
        assert torch.equal(called, expected)
        given = take(lambda layer, x_ND, context: route[..., layer])
        assert torch.equal(model(token_BL, state=given).logits_BLV, expected)
        assert torch.equal(model(token_BL).logits_BLV, Routed(model, "big")(token_BL).logits_BLV)
        assert not torch.equal(expected, Routed(model, "big")(token_BL).logits_BLV)


def test_overrides_go_before_any_route_and_select_only_for_the_learned_router():
    model, token_BL = decoder(num_layers=2).eval(), tokens(2, 5)
    first = "blocks.0.feed_forward.router"
    with torch.no_grad():
        expected = model(token_BL, state=take(torch.stack((torch.zeros(2, 5), torch.ones(2, 5)), -1).long())).logits_BLV
        with override_routing(model, {first: Override(index_NK=[0])}):
            assert torch.equal(model(token_BL, state=take("big")).logits_BLV, expected)
        learned = with_router(model, learned_router()).eval()
        for layer in (0, 1):
            open_NE = [True, False] if layer == 0 else [False, True]
            with override_routing(learned, {layer: Override(open_NE=open_NE), 1 - layer: Override(index_NK=[1])}):
                given = [0, 1] if layer == 0 else [1, 1]
                route = torch.tensor(given).expand(2, 5, 2)
                assert torch.equal(model(token_BL, state=take(route)).logits_BLV, learned(token_BL).logits_BLV)
        with (
            override_routing(learned, {0: Override(open_NE=[True, False])}),
            pytest.raises(ConfigError, match="not selected by the learned router"),
        ):
            learned(token_BL, state=take("big"))


def test_a_drawn_option_says_with_what_probability_it_was_drawn():
    model, token_BL = decoder(num_layers=2, p_big=0.25).eval(), tokens(3, 7)
    only_N = torch.arange(21) < 7
    with (
        record_routing(model, scores=True) as recorder,
        override_routing(model, {1: Override(index_NK=[1], only_N=only_N)}),
    ):
        model(token_BL, state=take("random"))
        model(token_BL, state=take("big"))
    for layer in (0, 1):
        decisions = recorder.trace().decisions(layer)
        propensity_N, index_N = decisions.propensity_NK[:, 0], torch.from_numpy(decisions.index_NK[:, 0].copy())
        drawn_N = torch.arange(42) < 21  # the second pass was given
        drawn_N[:7] &= layer == 0  # and of the first what was forced
        expected_N = torch.where(drawn_N, torch.tensor([0.75, 0.25])[index_N.long()], torch.nan)
        torch.testing.assert_close(torch.from_numpy(propensity_N), expected_N, equal_nan=True)


def test_a_forced_option_is_not_taught_to_the_router():
    model, token_BL = with_router(decoder(num_layers=2), learned_router()), tokens(2, 5)
    state = take("big", supervision=torch.ones(2))
    only_N = torch.arange(10) < 5
    taught = model(token_BL, token_BL, state=state).auxiliary["focal"]
    with override_routing(model, {0: Override(index_NK=[1]), 1: Override(index_NK=[1])}):
        assert model(token_BL, token_BL, state=state).auxiliary["focal"] == 0
    with override_routing(model, {layer: Override(index_NK=[1], only_N=only_N) for layer in (0, 1)}):
        half = model(token_BL, token_BL, state=state).auxiliary["focal"]
    assert 0 < half != taught


def test_weights_of_options_are_not_taken_for_those_of_as_many_tokens():
    """Two tokens, two options: each block runs for one of the tokens, and its router is taught with both weights."""
    model = with_router(decoder()).train()
    token_BL = torch.tensor([[1], [2]])
    for weight_E, is_taught in (([1.0, 0.0], False), ([0.0, 1.0], True)):
        state = take("big", supervision=torch.tensor(weight_E))
        output = model(token_BL, target_BL=token_BL, state=state, path=[(0,), (1,)])
        assert bool(output.auxiliary["focal"] > 0) is is_taught


def test_flops_of_a_route_follow_the_formula():
    config = DuoFFN.Config(big=64, small=4, allow_skip=True)
    # 3 matrices of D F, 2 FLOPs a weight: 6 * 8 * (0.25 * 64 + 0.5 * 4) = 864
    assert config.flops(8, big=0.25, skip=0.25) == 864
    context = BuildContext(dim=8)
    assert config.count(context).flops == config.flops(8, big=1.0)
    rows = []
    layer = config.build(context)
    for module in (layer.small, layer.big):
        module.register_forward_hook(
            lambda module, args, y: rows.append(args[0].shape[0] * 6 * 8 * module.config.hidden_dim)
        )
    route = torch.tensor([BIG, SMALL, SMALL, SKIP] * 4).view(2, 8, 1)
    x_BLD = torch.randn(2, 8, 8)
    layer(x_BLD, ForwardContext(position_BL=route[..., 0], rotary=(x_BLD, x_BLD), state=take(route)))
    assert sum(rows) == 16 * config.flops(8, big=0.25, skip=0.25)  # each token pays for its own module only


@pytest.mark.parametrize(
    ("route", "message"),
    [
        ("skip", "allow_skip=True"),
        ("huge", "route is 'huge'; use one of small, big"),
        ("router", "no learned router"),
        (torch.full((3, 7, 3), 2), "allow_skip=True"),
        (torch.full((3, 7, 3), -1), "option -1"),
        (torch.zeros(3, 7, 2, dtype=torch.int64), r"\[3, 7, 2\]; it must be \[B, L, 3\]"),
        (torch.zeros(3, 6, 3, dtype=torch.int64), "B L = 21"),
    ],
)
def test_bad_routes_are_refused(route, message):
    with pytest.raises(ConfigError, match=message):
        decoder()(tokens(), state=take(route))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p_skip": 0.1}, "allow_skip is False"),
        ({"default": "skip"}, "allow_skip"),
        ({"p_big": 0.8, "p_skip": 0.4, "allow_skip": True}, "at most 1"),
    ],
)
def test_bad_configs_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        DuoFFN.Config(**options)


# The oracle


def test_how_many_routes_there_are():
    space = RouteSpace(12)
    assert space.count(6) == 924
    assert space.count() == 2**12
    assert RouteSpace(12, (0, 1, 2)).count() == 3**12
    assert RouteSpace(12, (0, 1, 2)).count(2) == math.comb(12, 2) * 2**10
    assert space.tree_passes == 8190  # sum_l 2^l for 12 layers; a pass per route would take 12 * 4096 = 49152


@pytest.mark.parametrize("budgets", [None, (0,), (2,), (1, 3), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("options", [("small", "big"), ("big", "skip"), ("small", "big", "skip")])
def test_the_walk_visits_every_route_once_at_the_predicted_cost(budgets, options):
    model = decoder(4, allow_skip=True, dim=4)
    result = oracle(model, tokens(1, 3), budgets, options=options)
    assert result.report.layer_passes == result.space.tree_passes
    assert result.report.routes == result.space.num_routes
    assert result.report.naive_layer_passes == 4 * result.space.num_routes


@pytest.mark.parametrize("options", [("small", "big"), ("small", "big", "skip")])
def test_uniform_agrees_with_one_forward_pass_per_route(options):
    model, ids_BL = decoder(3, allow_skip=True), tokens(5, 7)
    budgets = (0, 1, 2, 3)
    result = oracle(model, ids_BL, budgets, options=options, chunk=2, num_random=2)
    free = oracle(model, ids_BL, options=options)
    by_budget = {budget: [] for budget in budgets}
    for route in itertools.product(range(len(options)), repeat=3):
        by_budget[route.count(BIG)].append((route, losses(model, ids_BL, all_one(route, ids_BL))))
    for row, found in enumerate(by_budget.values()):
        loss_RBL = torch.stack([loss_BL for _, loss_BL in found])
        torch.testing.assert_close(result.loss_GBL[row], loss_RBL.min(0).values, rtol=1e-5, atol=1e-5)
        means = loss_RBL.double().mean((1, 2))
        torch.testing.assert_close(result.fixed_G[row], means.min(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result.mean_G[row], means.mean(), rtol=1e-5, atol=1e-5)
        assert tuple(result.space.decode(result.fixed_code_G[row]).tolist()) == found[int(means.argmin())][0]
        chosen_BLY = result.route_BLY(budgets[row])
        assert (chosen_BLY.eq(BIG).sum(-1) == budgets[row]).all()
        for route, loss_BL in found:
            mine_BL = (chosen_BLY == torch.tensor(route)).all(-1)
            torch.testing.assert_close(result.loss_GBL[row][mine_BL], loss_BL[mine_BL], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(free.loss_GBL[0], result.loss_GBL.min(0).values)
    # oracle <= best of k random, oracle <= fixed <= mean
    assert (result.oracle_G <= result.fixed_G + 1e-9).all()
    assert (result.fixed_G <= result.mean_G + 1e-9).all()
    assert (result.oracle_G <= result.random_G + 1e-9).all()


def test_the_random_control_is_the_best_of_as_many_routes_of_the_budget():
    model, ids_BL = decoder(3), tokens(5, 7)
    result = oracle(model, ids_BL, (0, 1), chunk=2, num_random=2)
    by_budget = {budget: [] for budget in (0, 1)}
    for route in itertools.product((0, 1), repeat=3):
        if sum(route) in by_budget:
            by_budget[sum(route)].append(losses(model, ids_BL, all_one(route, ids_BL)))
    assert [len(found) for found in by_budget.values()] == [1, 3]
    only, (first, second, third) = by_budget[0][0], by_budget[1]
    assert result.random_G[0] == pytest.approx(float(only.double().mean()), abs=1e-6)
    pairs = [torch.minimum(*pair).double().mean().item() for pair in ((first, second), (first, third), (second, third))]
    assert min(abs(float(result.random_G[1]) - pair) for pair in pairs) < 1e-6
    # Close pairs would let any of them pass.
    assert min(abs(one - other) for one, other in itertools.combinations(pairs, 2)) > 1e-4
    assert float(by_budget[1][0].double().mean()) not in pairs


def test_the_ends_of_the_budget_are_all_small_and_all_big_exactly():
    model, ids_BL = decoder(3), tokens()
    result = oracle(model, ids_BL, (0, 3))
    for row, name in enumerate(("small", "big")):
        with torch.no_grad():
            logits_BLV = model.eval()(ids_BL[:, :-1], state=take(name)).logits_BLV
        expected_BL = -logits_BLV.log_softmax(-1).gather(-1, ids_BL[:, 1:, None]).squeeze(-1)
        assert torch.equal(result.loss_GBL[row], expected_BL)


def test_a_control_runs_against_shuffled_targets():
    model, ids_BL = decoder(3), tokens(4, 9)
    result = oracle(model, ids_BL, (0, 1, 2), shuffle_seed=3)
    order_N = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    shuffled_BL = ids_BL[:, 1:].flatten()[order_N].view(4, 8)
    with torch.no_grad():
        log_p_BLV = Routed(model, "small")(ids_BL[:, :-1]).logits_BLV.log_softmax(-1)
    expected_BL = -log_p_BLV.gather(-1, shuffled_BL.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(result.control.loss_GBL[0], expected_BL)
    assert torch.equal(result.loss_GBL, oracle(model, ids_BL, (0, 1, 2)).loss_GBL)


@pytest.mark.parametrize("budget", [None, 1, 2])
def test_self_consistent_routes_replay_to_the_same_loss(budget):
    model, ids_BL = decoder(3, allow_skip=True), tokens(3, 6)
    result = oracle(model, ids_BL, budget, options=("small", "big", "skip"), mode="self_consistent", chunk=2)
    assert result.report.bound == "exact"
    replayed_BL = losses(model, ids_BL, result.route_BLY(budget))
    torch.testing.assert_close(result.loss_GBL[0], replayed_BL, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["uniform", "self_consistent"])
def test_dense_layers_may_stand_between(mode):
    mixed = {"dense_layers": (1,), "dense_feed_forward": SwiGLU.Config(hidden_dim=8)}
    model, ids_BL = decoder(4).config.replace(**mixed).build(seed=2), tokens(2, 5)
    result = oracle(model, ids_BL, 2, mode=mode)
    route_BLY = result.route_BLY(2)
    assert route_BLY.shape == (2, 4, 3)  # routes count duo layers only
    if mode == "self_consistent":
        replayed_BL = losses(model, ids_BL, route_BLY)
        torch.testing.assert_close(result.loss_GBL[0], replayed_BL, rtol=1e-4, atol=1e-4)
    else:
        best_BL = torch.stack(
            [losses(model, ids_BL, all_one(route, ids_BL)) for route in ([1, 1, 0], [1, 0, 1], [0, 1, 1])]
        ).amin(0)
        torch.testing.assert_close(result.loss_GBL[0], best_BL, rtol=1e-5, atol=1e-5)


def test_self_consistent_takes_the_best_route_given_the_past():
    model, ids_BL = decoder(3), tokens(1, 5)
    result = oracle(model, ids_BL, 1, mode="self_consistent")
    chosen_BLY = result.route_BLY(1)
    for position in range(4):
        trials = []
        for big in range(3):
            route = chosen_BLY.clone()
            route[0, position] = torch.eye(3, dtype=torch.int64)[big]
            trials.append(float(losses(model, ids_BL, route)[0, position]))
        assert float(result.loss_GBL[0, 0, position]) == pytest.approx(min(trials), abs=1e-5)


def test_descent_finds_a_bound_between_oracle_and_its_starts():
    model, ids_BL = decoder(6, dim=8), tokens(2, 6)
    exact = oracle(model, ids_BL, 3)
    search = oracle(model, ids_BL, 3, mode="descent", width=2)
    assert search.report.bound == "lower bound"
    assert (search.loss_GBL >= exact.loss_GBL - SAME).all()
    assert search.oracle_G < search.random_G  # better than the routes it began with
    assert (search.route_BLY(3) == BIG).sum(-1).eq(3).all()
    assert search.report.routes <= exact.report.routes


def test_an_oracle_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    model, ids_BL = decoder(3), tokens(5, 6)
    whole = oracle(model, ids_BL, (1, 2), chunk=2, shuffle_seed=0)
    path = tmp_path / "oracle.npz"
    original, calls = Decoder.context, []

    def stop_at_third(self, *args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "context", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            oracle(model, ids_BL, (1, 2), chunk=2, shuffle_seed=0, resume=path)
    walked = []
    monkeypatch.setattr(Decoder, "context", lambda self, *a, **k: walked.append(1) or original(self, *a, **k))
    again = oracle(model, ids_BL, (1, 2), chunk=2, shuffle_seed=0, resume=path)
    assert len(walked) == 1  # two of three chunks were there
    for name in ("loss_GBL", "code_GBL", "fixed_G", "mean_G", "random_G"):
        assert torch.equal(getattr(again, name), getattr(whole, name)), name
        assert torch.equal(getattr(again.control, name), getattr(whole.control, name)), name
    assert again.report.layer_passes == whole.report.layer_passes
    with pytest.raises(DataError, match="another model, text or settings"):
        oracle(model, ids_BL, (1, 3), chunk=2, shuffle_seed=0, resume=path)


@pytest.mark.parametrize(
    ("layers", "arguments", "message"),
    [
        (3, {"budget": 4}, "budget is 4 big layers; the model has 3, use 0 to 3"),
        (3, {"budget": -1}, "budget is -1"),
        (3, {"options": ("big", "skip")}, "built without it"),
        (3, {"options": ("small", "huge")}, "option is 'huge'"),
        (3, {"options": ("small",)}, "two or three"),
        (3, {"mode": "magic"}, "mode is 'magic'"),
        (21, {"budget": 2}, "210 forward passes"),  # C(21, 2)
        (21, {}, "2,097,152 forward passes"),
    ],
)
def test_an_oracle_refuses_what_it_cannot_do(layers, arguments, message):
    with pytest.raises(ValueError, match=message):
        oracle(decoder(layers, dim=4), tokens(), **arguments)


def test_an_oracle_refuses_parallel_streams():
    model = decoder(2).config.replace(streams=ParScale.Config()).build()
    with pytest.raises(ConfigError, match="parallel streams"):
        oracle(model, tokens())
