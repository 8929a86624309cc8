"""The loop gate of VersatileFFN in the seam of overrides, layers inside its loops, and feed-forwards with another activation."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from anabranch.config import configclass
from anabranch.errors import ConfigError, DataError
from anabranch.experts.versatile import LoopGate, VersatileFFN, from_dense, loop_gates, record_difficulty, to_dense
from anabranch.lm import Decoder
from anabranch.lm.recipes import start_from
from anabranch.lm.replay_contract import check_replay, check_replayed_training
from anabranch.nn import MLP, BuildContext, Count, Dense, ForwardContext, Linear, MoE, RMSNorm, SelfAttention, SwiGLU
from anabranch.routing import (
    Override,
    Router,
    TopK,
    override_routing,
    record_routing,
    replay_routing,
)
from anabranch.routing.discovery import find_routers

LOOPS, GATE = 3, "blocks.{}.feed_forward.paths.loops"


def model_of(linears=None, *, seed=0, **changes):
    layer = VersatileFFN.Config(**{"hidden_dim": 24, "num_experts": 4, "max_loops": LOOPS, **changes})
    model = Decoder.Config(
        vocab_size=29,
        dim=16,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=layer,
        linears=linears or {},
        max_positions=64,
        init_std=0.3,
    ).build(seed=seed)
    with torch.no_grad():  # so that tokens take all numbers of loops
        for gate in loop_gates(model).values() if layer.gate != "none" and layer.fusion != "width_only" else ():
            gate.score.weight.mul_(5)
    return model.eval()


def tokens(batch=3, length=8):
    return torch.randint(29, (batch, length), generator=torch.Generator().manual_seed(1))


def loops_of(model, run):
    with record_difficulty(model) as recorder:
        output = run()
    trace = recorder.trace()
    return output, [trace.decisions(layer).index_NK[:, 0] + 1 for layer in (0, 1)]


@pytest.mark.parametrize("early_exit", [True, False])
@pytest.mark.parametrize("number", range(1, LOOPS + 1))
def test_forced_numbers_of_loops_are_those_of_a_gate_that_always_says_so(number, early_exit):
    model, token = model_of(early_exit=early_exit), tokens()
    forced = {GATE.format(layer): Override(index_NK=[number - 1]) for layer in (0, 1)}
    with torch.no_grad(), override_routing(model, forced):
        found, loops = loops_of(model, lambda: model(token).logits_BLV)
    assert all((each == number).all() for each in loops)
    always = torch.zeros(LOOPS)
    always[number - 1] = 1e9
    for gate in loop_gates(model).values():
        gate.score.project = lambda x_ND, context: always.expand(len(x_ND), -1)
    with torch.no_grad():
        torch.testing.assert_close(found, model(token).logits_BLV, rtol=0, atol=0)


def test_a_layer_alone_for_some_tokens_and_by_bias_or_what_is_closed():
    model, token = model_of(), tokens()
    with torch.no_grad():
        _, plain = loops_of(model, lambda: model(token))
        only = torch.zeros(token.numel(), dtype=torch.bool)
        only[::2] = True
        index = torch.full((token.numel(), 1), LOOPS - 1)
        changes = {
            "some": Override(index_NK=index, only_N=only),
            "bias": Override(bias_NE=[0.0, 9.0, 0.0]),
            "open": Override(open_NE=[False, True, True]),
            "logit": Override(logit_NE=[0.0, 0.0, 99.0]),
        }
        found = {}
        for name, override in changes.items():
            with override_routing(model, {GATE.format(1): override}):
                _, found[name] = loops_of(model, lambda: model(token))
    assert set(plain[0].tolist()) == set(plain[1].tolist()) == {1, 2, 3}
    assert all((each[0] == plain[0]).all() for each in found.values())  # the other layer decides as ever
    assert (found["some"][1] == torch.where(only, LOOPS, torch.from_numpy(plain[1])).numpy()).all()
    assert (found["bias"][1] == 2).all()
    assert (found["logit"][1] == 3).all()
    assert (found["open"][1][plain[1] > 1] == plain[1][plain[1] > 1]).all()
    assert found["open"][1].min() == 2


@pytest.mark.parametrize("options", [{}, {"gate": "soft"}, {"fusion": "depth_only"}, {"fusion": "average"}])
def test_recorded_loops_are_taken_again_to_the_bit(options):
    model, token = model_of(**options), tokens()
    mask = torch.ones_like(token, dtype=torch.bool)
    mask[0, :3] = False

    def run():
        with torch.no_grad():
            cache = model.new_cache(8)
            found = [model(token, token_mask_BL=mask).logits_BLV]
            return [*found, *(model(token[:, at : at + 4], cache=cache).logits_BLV for at in (0, 4))]

    with record_difficulty(model) as recorder:
        expected = run()
    trace, gates = recorder.trace(), loop_gates(model)
    with torch.no_grad():
        for gate in gates.values():  # another gate, which is not asked
            if options.get("gate") != "soft":
                gate.score.weight.neg_()
        with replay_routing(model, trace), record_difficulty(model) as again:
            replayed = run()
    for ours, wanted in zip(replayed, expected, strict=True):
        assert torch.equal(ours[mask] if ours.shape[1] == 8 else ours, wanted[mask] if ours.shape[1] == 8 else wanted)
    assert again.trace().table.equals(trace.table)


def test_loops_that_were_drawn_in_training_are_replayed_with_the_experts():
    """Noise is drawn anew; what was decided with the old noise stays, and the loss is that of before to the bit."""
    model, token = model_of().train(), tokens()
    routers = {**find_routers(model), **loop_gates(model)}
    torch.manual_seed(0)
    with record_routing(model, routers=routers) as recorder:
        expected = model(token, token.roll(-1, 1)).cross_entropy
    trace = recorder.trace()
    torch.manual_seed(1)
    assert not torch.equal(model(token, token.roll(-1, 1)).cross_entropy, expected)
    for given in (routers, None):  # routers first, then gates, is also the order without
        with replay_routing(model, trace, routers=given):
            assert torch.equal(model(token, token.roll(-1, 1)).cross_entropy, expected)
    with replay_routing(model, trace, weights="own"):
        output = model(token, token.roll(-1, 1))
    torch.testing.assert_close(output.cross_entropy, expected)
    output.loss.backward()
    assert all(gate.score.weight.grad.any() for gate in loop_gates(model).values())  # the gate goes on learning


def test_a_trace_of_the_experts_alone_leaves_the_loops_to_the_gate():
    model, token = model_of(), tokens()
    experts = {name: module for name, module in find_routers(model).items() if isinstance(module, Router)}
    with record_routing(model, routers=experts) as recorder, torch.no_grad():
        expected = model(token).logits_BLV
    with replay_routing(model, recorder.trace()), torch.no_grad():
        found, loops = loops_of(model, lambda: model(token).logits_BLV)
    assert torch.equal(found, expected)
    assert len(set(loops[0].tolist())) > 1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fusion", ["difficulty", "depth_only", "width_only"])
@pytest.mark.parametrize("relaxation", ["straight_through", "soft"])
def test_whatever_is_recorded_by_default_is_replayed_by_default(fusion, training, relaxation):
    model, token = model_of(fusion=fusion, relaxation=relaxation).train(training), tokens()
    # Where training mixes all loops there is no decision.
    decides = fusion != "width_only" and not (training and relaxation == "soft")
    if fusion == "depth_only" and not decides:
        with pytest.raises(ConfigError, match="has no Router to record"), record_routing(model):
            raise AssertionError("a block of nothing to record was entered")
        return
    with record_routing(model) as recorder, torch.no_grad():
        expected = model(token).logits_BLV
    trace = recorder.trace()
    assert [layer.name.rpartition(".")[2] for layer in trace.layers].count("loops") == decides * 2
    with replay_routing(model, trace), record_routing(model) as again, torch.no_grad():
        found = model(token).logits_BLV
    if decides or not training:
        assert torch.equal(found, expected)
    assert again.trace().table.equals(trace.table)


def test_a_trace_of_the_loops_alone_leaves_the_experts_to_their_routers():
    model, token = model_of(), tokens()
    with record_difficulty(model) as recorder, torch.no_grad():
        expected = model(token).logits_BLV
    routers = [module for module in model.modules() if isinstance(module, Router)]
    with torch.no_grad():
        for gate in loop_gates(model).values():  # another gate, and other experts
            gate.score.weight.neg_()
        with replay_routing(model, recorder.trace()):
            assert torch.equal(model(token).logits_BLV, expected)
        for router in routers:
            router.score.weight.neg_()
        with replay_routing(model, recorder.trace()):
            assert not torch.equal(model(token).logits_BLV, expected)


@pytest.mark.parametrize("options", [{}, {"fusion": "depth_only"}, {"fusion": "depth_only", "gate": "soft"}])
def test_the_contract_of_replay_is_of_gates_too(options, monkeypatch):
    model, token = model_of(**options), tokens(length=12)
    check_replay(model, token)
    check_replayed_training(model, token)
    if options.get("gate") == "soft":  # the number that is chosen mixes nothing there
        return
    forward = LoopGate.forward
    monkeypatch.setattr(LoopGate, "forward", lambda self, x, context: forward(self, x, replace(context, routing=[])))
    with pytest.raises(AssertionError, match="a router runs though all is replayed"):
        check_replay(model, token)


def test_what_cannot_be():
    model, token = model_of(), tokens()
    with pytest.raises(ConfigError, match="index_NK has 2 choices; a token takes one number of loops"):
        with override_routing(model, {GATE.format(0): Override(index_NK=[0, 1])}):
            model(token)
    with pytest.raises(ConfigError, match=r"index_NK names destination 3 of the router of layer 0; it has 0 to 2"):
        with override_routing(model, {GATE.format(0): Override(index_NK=[3])}):
            model(token)
    with pytest.raises(ConfigError, match=r"no routed layer 'blocks.9'.*feed_forward.paths.loops"):
        with override_routing(model, {"blocks.9": Override(index_NK=[0])}):
            pass
    soft = model_of(relaxation="soft")
    with override_routing(soft, {GATE.format(0): Override(index_NK=[0])}):
        soft(token)
        with pytest.raises(ConfigError, match="relaxation is 'soft', so in training every token takes all loops"):
            soft.train()(token)
    with record_difficulty(model) as recorder:
        model(token)
    layer = MoE.Config(num_experts=LOOPS, hidden_dim=8, router=Router.Config(select=TopK.Config(top_k=1)))
    experts = model.config.replace(feed_forward=layer).build()
    with pytest.raises(DataError, match="layer 0 is"), replay_routing(experts, recorder.trace()):
        pass
    with pytest.raises(ConfigError, match=r"routers has blocks.0.attention, whose decisions cannot be overridden"):
        with replay_routing(model, recorder.trace(), routers={"blocks.0.attention": model.blocks[0].attention}):
            pass


# Layers inside the loops


class Routed(Linear):
    """What is added depends on the position and on what a router of its own picks: no linear map."""

    @configclass
    class Config(Linear.Config):
        is_added = True

        def count(self, projection, context):
            return Count.dense(2 * projection.in_dim + 3 * projection.out_dim)

    def __init__(self, config, projection, context):
        nn.Module.__init__(self)
        router = Router.Config(select=TopK.Config(top_k=1))
        self.router = router.build(projection.in_dim, 2, layer=context.layer, generator=context.generator)
        self.rows = nn.Parameter(torch.randn(3, projection.out_dim, generator=context.generator))

    def forward(self, x, context):
        assert context.position_BL.numel() == context.token_BL.numel() == x.shape[:-1].numel()
        routing = self.router(x.flatten(0, -2), context)
        picked = self.rows[routing.index_NK[:, 0].clamp_min(0)] * routing.weight_NK
        at = 0.1 * context.position_BL.reshape(-1, 1) + 0.01 * context.token_BL.reshape(-1, 1)
        return (picked + at * self.rows[2]).view(*x.shape[:-1], self.rows.shape[1])


@pytest.mark.parametrize("part", ["down", "up", "*"])
@pytest.mark.parametrize(
    "options", [{}, {"fusion": "average"}, {"norm": "separate"}, {"fusion": "depth_only"}, {"fusion": "width_only"}]
)
def test_layers_inside_the_loops_are_told_which_tokens_they_see(part, options):
    """So leaving early gives what all loops for all give, also where a layer is no linear map and goes by the position."""
    linears, token = {f"*.feed_forward.{part}": Routed.Config()}, tokens()
    mask = torch.ones_like(token, dtype=torch.bool)
    mask[0, :3] = False
    found = []
    for early_exit in (True, False):
        model = model_of(linears, early_exit=early_exit, **options)
        with torch.no_grad():
            found.append(model(token, token_mask_BL=mask).logits_BLV[mask])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


class Counting(Linear):
    """Hands on the sum of what it was given so far, and adds a little of it."""

    @configclass
    class Config(Linear.Config):
        is_added = True

        def count(self, projection, context):
            return Count.dense(projection.out_dim)

    def __init__(self, config, projection, context):
        nn.Module.__init__(self)
        self.row = nn.Parameter(torch.randn(projection.out_dim, generator=context.generator))

    def forward(self, x, context):
        before = context.carry.get("sum", x.new_zeros(*x.shape[:-1], 1))
        context.carry["sum"] = before + x.mean(-1, keepdim=True)
        return 0.1 * context.carry["sum"] * self.row


def test_recomputed_loops_hand_on_what_layers_inside_carry():
    token, found = tokens(), []
    for recompute in (False, True):
        model = model_of({"*.feed_forward.up": Counting.Config()}, recompute=recompute, fusion="depth_only").train()
        torch.manual_seed(0)
        loss = model(token, token.roll(-1, 1)).loss
        found.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_what_layers_inside_recomputed_loops_emit_counts_once():
    token, found = tokens(), []
    for recompute in (False, True):
        model = model_of({"*.feed_forward.down": Routed.Config()}, recompute=recompute).train()
        torch.manual_seed(0)
        output = model(token, token.roll(-1, 1))
        output.loss.backward()
        found.append((output.loss.detach(), {name: one.grad for name, one in model.named_parameters()}))
    (loss, gradients), (other, others) = found
    torch.testing.assert_close(loss, other)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name])


# Other activations


def gelu(value):
    return 0.5 * value * (1 + torch.erf(value / math.sqrt(2)))


def mlp(activation="gelu", dim=16, hidden_dim=24):
    context = BuildContext(dim, init_std=0.3, residual_std=0.3, generator=torch.Generator().manual_seed(0))
    return MLP.Config(hidden_dim=hidden_dim, activation=activation).build(context).double()


def context_of(num_items):
    return ForwardContext(position_BL=torch.zeros(1, num_items), rotary=(torch.ones(1), torch.ones(1)))


@pytest.mark.parametrize("compute", ["masked", "grouped"])
def test_paths_over_a_gelu_feed_forward_against_plain_loops(compute):
    ffn, norm = mlp(), RMSNorm(16).double()
    layer = VersatileFFN.from_ffn(ffn, num_experts=4, max_loops=LOOPS, width_compute=compute)
    assert layer.w13 is ffn.w13
    assert layer.config.activation == "gelu"
    for head in (layer.paths.router, layer.paths.loops):
        head.score.weight.data.mul_(50)
    x_ND, w1, w2 = torch.randn(9, 16, dtype=torch.float64), ffn.w13.weight, ffn.w2.weight
    with torch.no_grad():
        y_ND = layer.eval().add_to(x_ND, norm, context_of(9))
        logit_NE, logit_NT = x_ND @ layer.paths.router.score.weight.T, x_ND @ layer.paths.loops.score.weight.T
        for n, x in enumerate(x_ND):
            gates, chosen = logit_NE[n].topk(2)
            wide = x.clone()
            for gate, expert in zip(gates.softmax(0), chosen.tolist(), strict=True):
                own = slice(6 * expert, 6 * expert + 6)
                wide += gate * (w2[:, own] @ gelu(w1[own] @ norm(x)))
            deep, loops = x.clone(), int(logit_NT[n].argmax()) + 1
            for _ in range(loops):
                deep = deep + w2 @ gelu(w1 @ norm(deep))
            share = (LOOPS - loops) / LOOPS
            torch.testing.assert_close(y_ND[n], share * wide + (1 - share) * deep, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "geglu"])
def test_a_dense_model_becomes_versatile_and_dense_again(activation):
    config = Decoder.Config(
        vocab_size=29,
        dim=16,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=MLP.Config(hidden_dim=24, activation=activation),
        init_std=0.3,
    )
    dense, token = config.build(seed=0).eval(), tokens()
    made = from_dense(dense, num_experts=4, max_loops=2)
    assert made.config.feed_forward.activation == activation
    assert made.config.count().parameters == sum(parameter.numel() for parameter in made.parameters())
    with torch.no_grad():
        with override_routing(made, {GATE.format(layer): Override(index_NK=[0]) for layer in (0, 1)}):
            once = from_dense(dense, num_experts=4, max_loops=1, fusion="depth_only")
            torch.testing.assert_close(once(token).logits_BLV, dense(token).logits_BLV)
            made(token)
        back = to_dense(made)
        assert back.config == config
        assert torch.equal(back(token).logits_BLV, dense(token).logits_BLV)
    wanted = config.replace(feed_forward=VersatileFFN.Config(num_experts=4, max_loops=2))
    started = start_from(dense, wanted, seed=0, sample=tokens)
    assert started.recipe == ("from_dense",)
    assert started.model.config.feed_forward.activation == activation


@pytest.mark.parametrize("options", [{}, {"fusion": "width_only"}, {"norm": "separate"}, {"width_compute": "grouped"}])
def test_sizes_of_a_layer_without_a_gate(options):
    """Two matrices of 16 x 24 instead of three."""
    counts = {}
    for activation in ("swiglu", "gelu"):
        config = VersatileFFN.Config(hidden_dim=24, num_experts=4, activation=activation, **options)
        counts[activation] = config.count(BuildContext(16))
        layer = config.build(BuildContext(16))
        assert counts[activation].parameters == sum(parameter.numel() for parameter in layer.parameters())
    assert counts["swiglu"].parameters - counts["gelu"].parameters == 16 * 24


def test_matrices_that_were_replaced_ask_for_their_rows():
    is_replaced = [
        model_of(linears).blocks[0].feed_forward.branch(nn.Identity()).is_replaced
        for linears in ({}, {"*.up": Dense.Config()})
    ]
    assert is_replaced == [False, True]


def test_overrides_that_reach_nobody_warn():
    model = model_of()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with override_routing(model, {GATE.format(0): Override(index_NK=[0])}):
            pass
    assert "was called, so nothing was overridden" in str(caught[0].message)


def test_a_swiglu_is_taken_as_it_was():
    ffn = SwiGLU.Config(hidden_dim=24).build(BuildContext(16))
    assert VersatileFFN.from_ffn(ffn, num_experts=4).config.activation == "swiglu"


@pytest.mark.parametrize("change", [{"bias_NE": [0.0, 9.0, 0.0]}, {"open_NE": [False, True, True]}])
def test_a_number_that_was_pushed_in_training_was_not_drawn_by_chance(change):
    """The probability of an unbiased draw says nothing of it, so it has none."""
    model, made = model_of().train(), []
    gates = loop_gates(model)
    for gate in gates.values():
        gate.register_forward_hook(lambda gate, given, routing: made.append(routing))
    with override_routing(model, {GATE.format(1): Override(**change)}):
        model(tokens())
    first, second = made
    assert first.propensity_NK is not None
    assert second.propensity_NK is None


def test_a_choice_that_is_not_used_is_one_loop():
    model, token = model_of(), tokens()
    index = torch.full((token.numel(), 1), LOOPS - 1)
    index[::2] = -1
    for weights in ({}, {"weight_NK": (index >= 0).float()}):
        with torch.no_grad(), override_routing(model, {GATE.format(1): Override(index_NK=index, **weights)}):
            _, loops = loops_of(model, lambda: model(token))
        assert (loops[1] == torch.where(index[:, 0] < 0, 1, LOOPS).numpy()).all()


def test_a_gate_is_not_asked_where_all_is_said(monkeypatch):
    model, token = model_of(), tokens()
    forced = Override(index_NK=[1], weight_NK=[1.0])
    for gate in loop_gates(model).values():
        monkeypatch.setattr(gate.score, "project", None)
    with torch.no_grad(), override_routing(model, {GATE.format(layer): forced for layer in (0, 1)}):
        _, loops = loops_of(model, lambda: model(token))
    assert all((each == 2).all() for each in loops)


@pytest.mark.parametrize("number", range(1, LOOPS + 1))
def test_replaced_layers_may_see_tokens_that_all_take_as_many_loops(number):
    found = []
    for early_exit in (True, False):
        model = model_of({"*.up": Dense.Config()}, early_exit=early_exit)
        forced = {GATE.format(layer): Override(index_NK=[number - 1]) for layer in (0, 1)}
        with torch.no_grad(), override_routing(model, forced):
            found.append(model(tokens()).logits_BLV)
    torch.testing.assert_close(*found)
