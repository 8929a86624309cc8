"""Chain-of-Experts: one pass is the plain layer, each residual form by hand, gates apart and tied, counts, traces, warm start, errors."""

import itertools
import logging
import math

import pytest
import torch
import torch.nn.functional as F

from anabranch.errors import CheckpointError, ConfigError
from anabranch.experts.chain import Chain, combinations, from_moe, match_compute, paper_router
from anabranch.experts.rexmoe import ProgressiveScaling, ReXMoE, export_expanded
from anabranch.experts.rmoe import RecurrentScore
from anabranch.lm import Decoder, export_huggingface, load_weights, save_model
from anabranch.nn import ForwardContext, MoE, SelfAttention
from anabranch.presets import PRESETS
from anabranch.routing import (
    BiasBalancer,
    Router,
    SwitchLoss,
    TopK,
    TopP,
    TraceBuilder,
    TraceLayer,
    record_routing,
)
from anabranch.routing.passes import between_passes

TOLERANCE = 1e-5
SIZES = {"num_experts": 4, "hidden_dim": 8}


def model_of(feed_forward, *, num_layers=2, seed=0, **changes):
    config = Decoder.Config(
        vocab_size=31,
        dim=16,
        num_layers=num_layers,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=feed_forward,
    )
    return config.replace(**changes).build(seed=seed)


def chain(**changes):
    return Chain.Config(**{**SIZES, **changes})


def tokens(batch=2, length=9, seed=0):
    return torch.randint(0, 31, (batch, length), generator=torch.Generator().manual_seed(seed))


def items(count=5, dim=16, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


# ---- identities ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["none", "sum"])
@pytest.mark.parametrize("residual", ["inner", "outer", "init", "none"])
@pytest.mark.parametrize("norm", ["each", "once"])
def test_one_iteration_is_the_plain_layer_to_the_bit(residual, norm, normalize):
    options = {"shared_experts": 1, "router": Router.Config(select=TopK.Config(normalize=normalize))}
    plain = model_of(MoE.Config(**SIZES, **options))
    single = model_of(chain(iterations=1, residual=residual, norm=norm, **options))
    assert list(plain.state_dict()) == list(single.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, single.state_dict()[name]), name
    token_BL = tokens()
    ours, theirs = single(token_BL, token_BL), plain(token_BL, token_BL)
    assert ours.loss == theirs.loss
    ours.loss.backward()
    theirs.loss.backward()
    for (name, left), right in zip(single.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(left.grad, right.grad), name


def one_pass(layer, router, x_ND):
    """f_t as a loop over items and experts."""
    score_NE = F.linear(x_ND, router.score.weight).softmax(-1)
    top = score_NE.topk(router.config.select.top_k)
    gate_NK = top.values / top.values.sum(-1, keepdim=True) if router.config.select.normalize == "sum" else top.values
    rows = []
    for item in range(len(x_ND)):
        total_D = torch.zeros_like(x_ND[item])
        for expert, gate in zip(top.indices[item].tolist(), gate_NK[item], strict=True):
            gate_F, up_F = (layer.experts.w13[expert] @ x_ND[item]).chunk(2)
            total_D = total_D + gate * (layer.experts.w2[expert] @ (F.silu(gate_F) * up_F))
        rows.append(total_D)
    return torch.stack(rows)


@pytest.mark.parametrize("norm", ["each", "once", "reference"])
@pytest.mark.parametrize("residual", ["inner", "outer", "init", "none", "gated"])
@pytest.mark.parametrize("passes", [2, 3])
def test_passes_written_out(passes, residual, norm):
    """Two experts, one chosen per pass, in float64: every residual form and every place of the norm."""
    router = Router.Config(select=TopK.Config(top_k=1))
    config = chain(num_experts=2, iterations=passes, residual=residual, norm=norm, router=router)
    block = model_of(config, init_std=0.5).double().eval().blocks[0]
    layer, h_ND = block.feed_forward, items().double()
    if residual == "gated":
        with torch.no_grad():
            layer.scale.copy_(torch.tensor([0.5, -2.0])[: passes - 1])

    def normed(x_ND):
        return block.feed_forward_norm(x_ND) if norm == "each" else x_ND

    start_ND = h_ND if norm == "each" else block.feed_forward_norm(h_ND)
    x_ND = start_ND
    for t, own in enumerate(layer.routers):
        made_ND = one_pass(layer, own, normed(x_ND))
        if residual == "inner":
            x_ND = x_ND + made_ND
        elif residual == "init":
            x_ND = start_ND + made_ND
        elif residual == "gated":
            x_ND = start_ND + (layer.scale[t] if t < passes - 1 else 1.0) * made_ND
        else:
            x_ND = made_ND
    y_ND = x_ND + start_ND if residual == "outer" else x_ND
    expected_ND = h_ND + (y_ND - start_ND) if norm == "once" and residual != "none" else y_ND
    seen_ND = layer.add_to(h_ND[None], block.feed_forward_norm, layer_context())[0]
    torch.testing.assert_close(seen_ND, expected_ND, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("normalize", ["none", "sum"])
@pytest.mark.parametrize("residual", ["inner", "init"])
def test_passes_with_gates_of_either_convention(residual, normalize):
    """Raw gates, as in the paper, and gates whose sum is 1: two of four experts in two passes, written out."""
    router = Router.Config(select=TopK.Config(top_k=2, normalize=normalize))
    config = chain(residual=residual, norm="each", router=router)
    block = model_of(config, init_std=0.5).double().eval().blocks[0]
    layer, h_ND = block.feed_forward, items().double()
    first_ND = one_pass(layer, layer.routers[0], block.feed_forward_norm(h_ND))
    x_ND = h_ND + first_ND
    expected_ND = (x_ND if residual == "inner" else h_ND) + one_pass(
        layer, layer.routers[1], block.feed_forward_norm(x_ND)
    )
    seen_ND = layer.add_to(h_ND[None], block.feed_forward_norm, layer_context())[0]
    torch.testing.assert_close(seen_ND, expected_ND, atol=1e-12, rtol=1e-12)


def test_the_papers_gates_are_raw_by_default_and_in_the_preset():
    assert Chain.Config().router.select.normalize == "none"
    assert PRESETS["chain"]("tiny").model.feed_forward.router.select.normalize == "none"
    assert paper_router(2, num_layers=2, iterations=2).select.normalize == "none"


def layer_context(training=False):
    return ForwardContext(position_BL=torch.zeros(1, 1), rotary=(torch.ones(1), torch.ones(1)), training=training)


def test_gates_are_apart_and_may_be_tied():
    apart, tied = model_of(chain()), model_of(chain(independent_gates=False))
    layer = apart.blocks[0].feed_forward
    first, second = layer.router.score.weight, layer.routers[1].score.weight
    assert not torch.equal(first, second)
    token_BL = tokens()
    apart(token_BL, token_BL).loss.backward()
    assert (first.grad - second.grad).abs().max() > 1e-6
    assert len(tied.blocks[0].feed_forward.routers) == 1
    ours = sum(value.numel() for value in tied.parameters())
    assert sum(value.numel() for value in apart.parameters()) - ours == 2 * 4 * 16


def test_pool_recurrent_router_and_chain_combine():
    """Experts of two layers, a state that moves on in every pass, and a bias for each pass of each layer."""
    router = Router.Config(
        score=RecurrentScore.Config(state_dim=6), balance=(BiasBalancer.Config(rate=0.01), SwitchLoss.Config())
    )
    model = model_of(chain(reuse=2, router=router), num_layers=3)
    routers = [router for block in model.blocks for router in block.feed_forward.routers]
    assert [router.num_destinations for router in routers] == [8, 8, 8, 8, 4, 4]
    assert len({id(router.balance[0]) for router in routers}) == 6
    assert len({id(router.score.recurrence) for router in routers}) == 1
    assert [router.score.is_first for router in routers] == [True, *[False] * 5]
    states = []
    for router in routers:
        router.register_forward_hook(
            lambda module, args, output: states.append(args[1].carry["routing_state"].detach())
        )
    token_BL = tokens()
    output = model(token_BL, token_BL)
    output.loss.backward()
    assert len(states) == 6
    for before, after in itertools.pairwise(states):
        assert (before - after).abs().max() > 1e-6
    loads = torch.stack([router.balance[0].load_E.sum() for router in routers])
    assert loads.tolist() == [2 * 9 * 2] * 6
    assert sum(value.numel() for value in model.parameters()) == model.config.count().parameters


def test_the_papers_loss_is_the_sum_over_routers_of_each_sequences_balance():
    """.001 sum over routers of the mean over sequences of sum_i f_i P_i, f_i = N / (K S) count_i; no z-loss."""
    router = paper_router(2, num_layers=2, iterations=3)
    model = model_of(chain(iterations=3, router=router), init_std=0.3).train()
    token_BL, expected, routings = tokens(batch=3), 0.0, []
    for each in (router for block in model.blocks for router in block.feed_forward.routers):
        each.register_forward_hook(lambda module, args, routing: routings.append(routing))
    output = model(token_BL, token_BL)
    for routing in routings:
        for first in (0, 9, 18):
            here_N = slice(first, first + 9)
            count_E = routing.index_NK[here_N].flatten().bincount(minlength=4)
            expected += 1e-3 * (4 / (2 * 9) * count_E * routing.score_NE[here_N].mean(0)).sum().item() / 3
    assert len(routings) == 6
    assert output.auxiliary.keys() == {"load_balancing"}
    assert output.auxiliary["load_balancing"].item() == pytest.approx(expected, rel=1e-5)


def test_the_papers_routers_begin_kaiming_uniform():
    router = paper_router(1, num_layers=1)
    weight = model_of(chain(num_experts=64, router=router), num_layers=1).blocks[0].feed_forward.router.score.weight
    bound = 1 / math.sqrt(16)  # sqrt(6 / ((1 + 5) D))
    assert 0.9 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize("tied", [False, True])
def test_one_gate_has_one_balancer_for_all_passes(tied):
    router = Router.Config(select=TopK.Config(top_k=1), balance=(BiasBalancer.Config(),))
    model = model_of(chain(iterations=3, independent_gates=not tied, router=router), num_layers=1).train()
    routings = []
    for each in model.blocks[0].feed_forward.routers:
        each.register_forward_hook(lambda module, args, routing: routings.append(routing.load_E()))
    token_BL = tokens()
    model(token_BL, token_BL)
    loads = [each.balance[0].load_E for each in model.blocks[0].feed_forward.routers]
    assert [load_E.tolist() for load_E in loads] == (
        [sum(routings).tolist()] if tied else [load_E.tolist() for load_E in routings]
    )


# ---- counts and traces --------------------------------------------------------------------------------------------------------


def test_flops_equal_what_hooks_count():
    config = chain(iterations=3, shared_experts=1, router=Router.Config(select=TopK.Config(top_k=2)))
    model = model_of(config, num_layers=1).eval()
    layer, seen = model.blocks[0].feed_forward, [0]
    layer.experts.register_forward_hook(
        lambda module, args, output: seen.append(args[1].used_NK.sum().item() * 2 * 3 * 16 * 8)
    )
    layer.shared.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[0] * 2 * 3 * 16 * 8))
    for router in layer.routers:
        router.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[0] * 2 * 16 * 4))
    model(tokens())
    context = next(model.config.contexts())
    assert sum(seen) == 18 * config.count(context).flops


@pytest.mark.parametrize(
    ("num_experts", "top_k", "iterations", "reached"), [(8, 2, 1, 2), (8, 2, 3, 6), (5, 2, 3, 5), (4, 4, 2, 4)]
)
def test_active_parameters_are_those_of_experts_that_an_item_can_reach(num_experts, top_k, iterations, reached):
    router = Router.Config(select=TopK.Config(top_k=top_k))
    config = model_of(chain(num_experts=num_experts, iterations=iterations, router=router)).config
    count = config.feed_forward.count(next(config.contexts()))
    assert count.parameters - count.active == (num_experts - reached) * 3 * 16 * 8


def test_a_trace_has_every_pass():
    token_BL = tokens()
    for config, names in (
        (chain(), ["router", "more_routers.0"]),
        (chain(independent_gates=False), ["router.pass0", "router.pass1"]),
    ):
        model = model_of(config).eval()
        with record_routing(model) as recorder, torch.no_grad():
            model(token_BL)
            model(token_BL[:1])
        trace = recorder.trace()
        assert [layer.layer for layer in trace.layers] == [0, 1, 2, 3]
        assert [layer.name for layer in trace.layers] == [
            f"blocks.{number}.feed_forward.{name}" for number in (0, 1) for name in names
        ]
        assert {name: len(layers) for name, layers in trace.pools.items()} == {"layer_0": 2, "layer_1": 2}
        for layer in trace.layers:
            decisions = trace.decisions(layer.layer)
            assert decisions.item_N.tolist() == [item for item in range(3) for _ in range(9)]


def test_facts_between_passes_by_hand():
    """Two tokens, K = 2: choices 01 then 12, and 01 then 01. Three of four second choices were first ones."""
    builder = TraceBuilder()
    for number, name, index in ((0, "router", [[0, 1], [0, 1]]), (1, "more_routers.0", [[1, 2], [1, 0]])):
        layer = TraceLayer(
            layer=number, name=f"blocks.0.feed_forward.{name}", num_destinations=4, top_k=2, pool="layer_0"
        )
        builder.add(layer, index, [[0.5, 0.5]] * 2, item_N=[0, 1])
    (facts,) = between_passes(builder.trace())
    assert facts.reuse == pytest.approx(0.75)
    assert facts.chance == pytest.approx(0.5)
    assert facts.combinations_seen == 2
    assert facts.coactivation_EE.tolist() == [[1, 2, 1, 0], [1, 2, 1, 0], [0] * 4, [0] * 4]


@pytest.mark.parametrize("tied", [False, True])
def test_passes_of_a_model_are_found(tied):
    model = model_of(chain(reuse=2, iterations=3, independent_gates=not tied)).eval()
    with record_routing(model) as recorder, torch.no_grad():
        model(tokens())
    facts = between_passes(recorder.trace())
    assert len(facts) == 4  # two layers of three passes
    assert all(fact.first.split(".")[1] == fact.second.split(".")[1] for fact in facts)
    assert all(fact.coactivation_EE.sum() == 18 * 2 * 2 for fact in facts)


def test_combinations_are_counted_exactly():
    assert combinations(64, 8) == 4_426_165_368
    assert combinations(64, 4, 2) / combinations(64, 8) == pytest.approx(91.2, abs=0.05)


def test_matched_compute_makes_the_same_calls():
    moe = MoE.Config(num_experts=8, hidden_dim=8, shared_experts=1, router=Router.Config(select=TopK.Config(top_k=4)))
    plain = model_of(moe).config
    match = match_compute(plain, 2)
    assert match.config.feed_forward.router.select.top_k == 2
    assert (match.plain.routed_calls, match.chain.routed_calls) == (4, 4)
    assert (match.plain.shared_calls, match.chain.shared_calls) == (1, 2)
    # A shared call (2 * 3 D F) and a router (2 E D) more in each of two layers; parameters of the router alone.
    assert match.chain.flops - match.plain.flops == 2 * (6 * 16 * 8 + 2 * 8 * 16)
    assert match.chain.parameters - match.plain.parameters == 2 * 8 * 16
    assert sum(value.numel() for value in match.config.build().parameters()) == match.chain.parameters
    with pytest.raises(ConfigError, match=r"^iterations is 3, which does not divide top_k=4; use one of 1, 2, 4$"):
        match_compute(plain, 3)
    with pytest.raises(ConfigError, match=r"^match_compute needs 'moe' or 'rexmoe' layers, this model has 'chain'$"):
        match_compute(match.config, 2)
    with pytest.raises(ConfigError, match=r"^match_compute needs router.select of kind 'top_k', this one is 'top_p'$"):
        match_compute(model_of(moe.replace(router=Router.Config(select=TopP.Config()))).config, 2)


# ---- from a trained model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["once", "each"])
@pytest.mark.parametrize("layer", [MoE.Config(**SIZES, shared_experts=1), ReXMoE.Config(**SIZES, psr=None)])
def test_a_chain_of_a_plain_model_starts_with_its_logits_and_learns(layer, norm):
    plain = model_of(layer, init_std=0.3).eval()
    grown = from_moe(plain, 3, norm=norm)
    token_BL = tokens()
    with torch.no_grad():
        torch.testing.assert_close(grown(token_BL).logits_BLV, plain(token_BL).logits_BLV, atol=1e-6, rtol=1e-6)
    first = grown.blocks[0].feed_forward
    assert torch.equal(first.router.score.weight, first.routers[2].score.weight)
    grown.train()(token_BL, token_BL).loss.backward()
    assert first.scale.grad[1].abs() > 0  # the first pass reaches the output through the second one only
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.1)
    optimizer.step()
    assert (grown.eval()(token_BL).logits_BLV - plain(token_BL).logits_BLV).abs().max() > 1e-4


def test_errors_of_growing_a_chain(tmp_path):
    recurrent = MoE.Config(**SIZES, router=Router.Config(score=RecurrentScore.Config(state_dim=4)))
    with pytest.raises(ConfigError, match=r"^from_moe cannot keep the logits of recurrent routers"):
        from_moe(model_of(recurrent))
    with pytest.raises(ConfigError, match=r"^from_moe needs 'moe' or 'rexmoe' layers, this model has 'chain'$"):
        from_moe(model_of(chain()))
    save_model(tmp_path / "plain", model_of(MoE.Config(**SIZES)))
    with pytest.raises(
        CheckpointError, match=r"has iterations=1, the model iterations=2; to make a chain of a plain model"
    ):
        load_weights(model_of(chain()), tmp_path / "plain")
    load_weights(model_of(chain(iterations=1)), tmp_path / "plain")  # one pass is the plain layer


def test_no_plain_format_holds_a_chain(tmp_path):
    with pytest.raises(CheckpointError, match=r"no Hugging Face family has feed_forward\.kind='chain'"):
        export_huggingface(tmp_path / "out", model_of(chain(reuse=2)))
    with pytest.raises(CheckpointError, match=r"export_expanded needs a 'rexmoe' model, this one is 'chain'"):
        export_expanded(model_of(chain(reuse=2)))


# ---- in training and decoding -------------------------------------------------------------------------------------------------


def test_recompute_of_passes_gives_the_same_gradients_and_counts_once():
    router = Router.Config(
        score=RecurrentScore.Config(state_dim=6), balance=(BiasBalancer.Config(rate=0.01), SwitchLoss.Config())
    )
    token_BL = tokens()
    for outer in (False, True):  # alone, and within the recompute of blocks
        plain, again = (model_of(chain(router=router, recompute_passes=value), init_std=0.3) for value in (False, True))
        again.recompute = outer
        losses = []
        for twin in (plain, again):
            losses.append(twin(token_BL, token_BL).loss)
            losses[-1].backward()
        assert losses[0] == losses[1]
        for (name, left), right in zip(plain.named_parameters(), again.parameters(), strict=True):
            torch.testing.assert_close(left.grad, right.grad, atol=1e-6, rtol=1e-4, msg=name)
        for left, right in zip(plain.blocks, again.blocks, strict=True):
            for ours, theirs in zip(left.feed_forward.routers, right.feed_forward.routers, strict=True):
                assert torch.equal(ours.balance[0].load_E, theirs.balance[0].load_E)


def test_gradients_agree_with_finite_differences():
    router = Router.Config(select=TopK.Config(top_k=2), balance=())
    layer = model_of(chain(num_experts=2, router=router), num_layers=1, init_std=0.3).double().blocks[0].feed_forward
    x_BLD = items(3).double()[None].requires_grad_()
    parameters = (layer.router.score.weight, layer.routers[1].score.weight, layer.experts.w2)

    def run(x_BLD, *values):
        return layer(x_BLD, layer_context())

    assert torch.autograd.gradcheck(run, (x_BLD, *parameters), eps=1e-6, atol=1e-6)


def test_items_are_apart_and_decoding_equals_the_whole():
    model = model_of(chain(), init_std=0.3).eval()
    token_BL = tokens(3)
    with torch.no_grad():
        expected_BLV = model(token_BL).logits_BLV
        torch.testing.assert_close(model(token_BL.flip(0)).logits_BLV, expected_BLV.flip(0), atol=1e-5, rtol=1e-5)
        cache = model.new_cache(9)
        parts = [model(token_BL[:, place : place + 1], cache=cache).logits_BLV for place in range(9)]
    torch.testing.assert_close(torch.cat(parts, 1), expected_BLV, atol=1e-5, rtol=1e-5)


# ---- errors -------------------------------------------------------------------------------------------------------------------


def test_errors_and_warnings(caplog):
    with pytest.raises(ConfigError, match=r"^iterations is 0; it must be greater than or equal to 1$"):
        chain(iterations=0)
    with caplog.at_level(logging.WARNING, "anabranch"):
        model_of(chain(residual="none"))
    assert caplog.messages == ["residual is 'none' with 2 iterations: nothing of a layer's input goes past it"]


def test_over_one_layers_pool_it_is_rexmoe_to_the_bit():
    pooled, single = model_of(ReXMoE.Config(**SIZES, psr=None)), model_of(chain(reuse=2, iterations=1))
    token_BL = tokens()
    assert torch.equal(pooled(token_BL).logits_BLV, single(token_BL).logits_BLV)


def test_names_in_saved_models_are_those_of_before():
    layer = Chain.Config(num_experts=4, hidden_dim=8, reuse=2, psr=ProgressiveScaling.Config(), iterations=3)
    names = Decoder.Config(vocab_size=9, dim=16, num_layers=2, feed_forward=layer).build().state_dict()
    routers = ("router", "more_routers.0", "more_routers.1")
    assert [name for name in names if ".feed_forward." in name or name.startswith("shared.")] == [
        "shared.experts_0.w13",
        "shared.experts_0.w2",
        *(
            f"blocks.{block}.feed_forward.{router}.{part}"
            for block in range(2)
            for router in routers
            for part in ("score.weight", "candidates.open_E", "candidates.step")
        ),
    ]
