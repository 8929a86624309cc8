"""VersatileFFN: slices, both paths against plain loops, early exit, gradients, statistics, errors."""

import copy
import itertools
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from anabranch.config import from_dict, to_dict
from anabranch.data import DataConfig, Files
from anabranch.errors import ConfigError
from anabranch.experts.versatile import VersatileFFN, record_difficulty
from anabranch.lm import Decoder, SamplingConfig, generate, load_model
from anabranch.nn import BuildContext, ForwardContext, RMSNorm, SelfAttention, SwiGLU
from anabranch.nn.quantize import quantize
from anabranch.routing import BiasBalancer, Router, RoutingContext, SwitchLoss, TopK, record_routing
from anabranch.routing.relax import Temperature
from anabranch.train import RunConfig, TrainConfig, Trainer, checkpoints, read_metrics

FP32_TOLERANCE = 1e-5  # a few roundings of sums over tens of terms of size 1


def versatile(**changes):
    return VersatileFFN.Config(**{"hidden_dim": 24, "num_experts": 4, "max_loops": 3, **changes})


def layer_of(config, dim=16, seed=0):
    """A layer with weights large enough for states to differ, heads too, so that tokens take all numbers of loops."""
    context = BuildContext(dim, init_std=0.3, residual_std=0.3, generator=torch.Generator().manual_seed(seed))
    layer = config.build(context)
    with torch.no_grad():
        for head in (layer.paths.router, layer.paths.loops):
            if head is not None:
                head.score.weight.mul_(50)
    return layer.eval()


def test_a_drawn_number_of_loops_says_its_probability_at_any_temperature():
    gate = layer_of(versatile()).paths.loops
    gate.score.weight.data.mul_(0.1)
    gate.temperature.value.fill_(0.5)
    x_ND = torch.randn(20_000, 16)
    plain = gate(x_ND, RoutingContext())
    assert plain.propensity_NK is None
    drawn = gate(x_ND, RoutingContext(training=True))
    torch.testing.assert_close(drawn.propensity_NK, plain.score_NE.gather(1, drawn.index_NK))
    # The mean of 1 / p over draws is the number of options: what weighing by propensities rests on.
    assert abs(float((1 / drawn.propensity_NK).mean()) - 3) < 0.15


def norm_of(dim=16):
    norm = RMSNorm(dim)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, dim))
    return norm


def stream(batch=3, length=7, dim=16, seed=0):
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed))


def layer_context(training=False, mask_N=None):
    return ForwardContext(
        position_BL=torch.zeros(1, 1), rotary=(torch.ones(1), torch.ones(1)), training=training, item_mask_N=mask_N
    )


def model_of(feed_forward, **changes):
    config = Decoder.Config(
        vocab_size=31, dim=16, num_layers=2, attention=SelfAttention.Config(num_heads=2), feed_forward=feed_forward
    )
    return config.replace(init_std=0.2, **changes).build(seed=0)


def tokens(batch=2, length=9, seed=0):
    return torch.randint(0, 31, (batch, length), generator=torch.Generator().manual_seed(seed))


def naive(layer, norm, x_BLD):
    """The paper's equations outside training, one token after the other, one expert after the other."""
    config, paths = layer.config, layer.paths
    gate_FD, up_FD = layer.w13.weight.chunk(2)
    down_DF = layer.w2.weight
    rows = []
    for h_D in x_BLD.flatten(0, -2):
        wide_D = deep_D = h_D
        if paths.router is not None:
            best = (paths.router.score.weight @ h_D).topk(config.num_choices)
            width = config.slice_width(config.hidden_dim)
            for place, gate in zip(best.indices.tolist(), best.values.softmax(-1), strict=True):
                start = config.slice_starts(config.hidden_dim)[place]
                units, n_D = slice(start, start + width), (norm if paths.width_norm is None else paths.width_norm)(h_D)
                wide_D = wide_D + gate * (down_DF[:, units] @ (F.silu(gate_FD[units] @ n_D) * (up_FD[units] @ n_D)))
        loops = config.loops
        if paths.loops is not None:
            logit_T = paths.loops.score.weight @ h_D
            loops = int(logit_T.argmax()) + 1
        for _ in range(loops):
            n_D = norm(deep_D)
            deep_D = deep_D + down_DF @ (F.silu(gate_FD @ n_D) * (up_FD @ n_D))
        share = {"width_only": 1.0, "depth_only": 0.0, "average": 0.5}.get(config.fusion)
        if share is None:
            count_T = torch.arange(1.0, config.max_loops + 1)
            expected = (logit_T.softmax(-1) * count_T).sum() if config.gate == "soft" else loops
            share = (config.max_loops - expected) / config.max_loops
            share = share if share > config.width_threshold else 0.0
        rows.append(share * wide_D + (1 - share) * deep_D)
    return torch.stack(rows).view_as(x_BLD)


VARIANTS = {
    "paper": {},
    "average": {"fusion": "average"},
    "width_only": {"fusion": "width_only"},
    "width_masked": {"fusion": "width_only", "width_compute": "masked"},
    "depth_only": {"fusion": "depth_only"},
    "soft_gate": {"gate": "soft"},
    "threshold": {"width_threshold": 0.5},  # lambda is 2/3, 1/3 or 0: one loop alone has a width path
    "threshold_met": {"max_loops": 4, "width_threshold": 0.5},  # two loops are at the threshold, and have none
    "threshold_soft": {"width_threshold": 0.4, "gate": "soft"},
    "threshold_grouped": {"width_threshold": 0.5, "width_compute": "grouped"},
    "grouped": {"width_compute": "grouped"},
    "separate_norm": {"norm": "separate"},
    "gaps": {"expert_dim": 5},
    "strided_rest": {"num_experts": 5},  # 24 units in 5 slices of 4, four units left over
    "overlap": {"expert_dim": 10, "overlap": True},
    "overlap_grouped": {"expert_dim": 10, "overlap": True, "width_compute": "grouped"},
    "contiguous_part": {"expert_dim": 4, "slices": "contiguous", "width_compute": "grouped"},
    "fixed_loops": {"fusion": "depth_only", "gate": "none"},
    "fixed_average": {"fusion": "average", "gate": "none"},
    "one_loop": {"max_loops": 1},
    "two_loops": {"max_loops": 2},
    "one_expert": {"num_experts": 1, "router": Router.Config(select=TopK.Config(top_k=1, normalize="softmax"))},
}


# ---- slices -------------------------------------------------------------------------------------------------------------------


def test_slices_by_hand():
    """N = 4, d_e = 6 in 24: blocks. d_e = 5: S = 19 / 3, starts 0, 6, 12, 19. d_e = 10: S = 14 / 3, starts 0, 4, 9, 14, overlapping."""
    assert versatile().slice_starts(24) == (0, 6, 12, 18)
    assert versatile(expert_dim=5).slice_starts(24) == (0, 6, 12, 19)
    assert versatile(expert_dim=10, overlap=True).slice_starts(24) == (0, 4, 9, 14)
    assert versatile(expert_dim=5, slices="contiguous").slice_starts(24) == (0, 5, 10, 15)
    assert versatile(num_experts=1, router=VARIANTS["one_expert"]["router"]).slice_starts(24) == (0,)


@given(num_experts=st.integers(2, 16), extra=st.integers(0, 40), width=st.integers(1, 20))
def test_slices_are_disjoint_and_inside_unless_overlap_is_asked(num_experts, extra, width):
    hidden_dim = num_experts * width + extra
    starts = VersatileFFN.Config(num_experts=num_experts, hidden_dim=hidden_dim, expert_dim=width).slice_starts(
        hidden_dim
    )
    assert starts[0] == 0
    assert starts[-1] + width == hidden_dim
    assert all(second - first >= width for first, second in itertools.pairwise(starts))


@pytest.mark.parametrize("slices", ["strided", "contiguous"])
def test_slices_cover_all_units_when_they_can(slices):
    owner_EF = layer_of(versatile(slices=slices)).paths.owner_EF
    assert torch.equal(owner_EF.sum(0), torch.ones(24))
    assert torch.equal(owner_EF.sum(1), torch.full((4,), 6.0))


@pytest.mark.parametrize("compute", ["masked", "grouped"])
@pytest.mark.parametrize("slices", ["strided", "contiguous"])
def test_all_virtual_experts_together_are_the_full_feed_forward(slices, compute):
    """With all N chosen g sums to 1; sum_j f_j is N times the mean, so equal gates give f / N: blocks of SwiGLU add up."""
    every = Router.Config(select=TopK.Config(top_k=4, normalize="softmax"))
    layer = layer_of(versatile(slices=slices, fusion="width_only", width_compute=compute, router=every))
    nn.init.zeros_(layer.paths.router.score.weight)
    norm, x_BLD = norm_of(), stream()
    change_BLD = layer.add_to(x_BLD, norm, layer_context()) - x_BLD
    torch.testing.assert_close(4 * change_BLD, layer(norm(x_BLD)), atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)


# ---- both paths ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("early_exit", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_output_equals_the_equations_token_by_token(name, early_exit):
    layer, norm, x_BLD = layer_of(versatile(early_exit=early_exit, **VARIANTS[name])), norm_of(), stream()
    with torch.no_grad():
        found = layer.add_to(x_BLD, norm, layer_context())
        torch.testing.assert_close(found, naive(layer, norm, x_BLD), atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)


def test_the_test_stream_takes_every_number_of_loops():
    layer, x_BLD = layer_of(versatile()), stream()
    loops_N = layer.paths.loops(x_BLD.flatten(0, 1), RoutingContext()).index_NK[:, 0] + 1
    assert set(loops_N.tolist()) == {1, 2, 3}


def test_a_token_does_not_depend_on_the_rest_of_the_batch():
    layer, norm, x_BLD = layer_of(versatile()), norm_of(), stream()
    with torch.no_grad():
        whole = layer.add_to(x_BLD, norm, layer_context())
        shuffled = layer.add_to(x_BLD.flip(0, 1), norm, layer_context()).flip(0, 1)
        alone = torch.cat([layer.add_to(x_BLD[:1, n : n + 1], norm, layer_context()) for n in range(7)], dim=1)
    torch.testing.assert_close(shuffled, whole, atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)
    torch.testing.assert_close(alone, whole[:1], atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)


def test_compiled_evaluation_is_the_same():
    layer, norm, x_BLD = layer_of(versatile()), norm_of(), stream()
    torch._dynamo.reset()
    compiled = torch.compile(layer.add_to, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = layer.add_to(x_BLD, norm, layer_context())
        torch.testing.assert_close(
            compiled(x_BLD, norm, layer_context()), expected, atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE
        )


def test_no_tokens():
    layer, norm = layer_of(versatile()), norm_of()
    with torch.no_grad():
        assert layer.add_to(torch.zeros(0, 3, 16), norm, layer_context()).shape == (0, 3, 16)


def test_half_precision_stays_near():
    layer, norm, x_BLD = layer_of(versatile()), norm_of(), stream()
    with torch.no_grad():
        expected = layer.add_to(x_BLD, norm, layer_context())
        with torch.autocast("cpu", torch.bfloat16):
            found = layer.add_to(x_BLD, norm, layer_context())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.05)  # three loops of products rounded to 8 bits


# ---- training -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["masked", "grouped"])
def test_training_mixes_the_sampled_state(compute):
    """A one-hot sample l gives lambda = (L - l) / L and the state after l loops, written out for every token."""
    layer, norm, x_BLD = layer_of(versatile(width_compute=compute)), norm_of(), stream()
    branch, x_ND = layer.branch(norm), x_BLD.flatten(0, 1)
    torch.manual_seed(3)
    loops_N = layer.paths.loops(x_ND, RoutingContext(training=True)).index_NK[:, 0] + 1
    torch.manual_seed(3)
    found = layer.add_to(x_BLD, norm, layer_context(training=True)).flatten(0, 1)
    states, wide = [x_ND], layer.paths.width_change(x_ND, branch, layer.paths.router(x_ND, RoutingContext()))
    for _ in range(3):
        states.append(states[-1] + branch.change(states[-1]))
    deep_ND = torch.stack(states)[loops_N, torch.arange(len(x_ND))]
    share_N1 = (3 - loops_N).unsqueeze(-1) / 3
    expected = share_N1 * (x_ND + wide) + (1 - share_N1) * deep_ND
    torch.testing.assert_close(found, expected, atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)
    assert len(set(loops_N.tolist())) == 3


def test_soft_relaxation_passes_finite_differences():
    """Every gradient of the soft form, the one that reaches the loop head through p among them."""
    config = versatile(
        relaxation="soft", gate="soft", num_experts=2, hidden_dim=6, temperature=Temperature.Config(start=2.0)
    )
    layer, norm = layer_of(config, dim=4).double(), norm_of(4).double()
    layer.paths.router.score.weight.data.mul_(0.1)  # far from a change of the chosen experts
    x_BLD = stream(1, 3, 4).double().requires_grad_()
    names = ["w13.weight", "w2.weight", "paths.loops.score.weight", "paths.router.score.weight"]

    def run(x_BLD, *weights):
        torch.manual_seed(0)  # the same noise in every evaluation
        call = (x_BLD, norm, layer_context(training=True))
        return torch.func.functional_call(
            _AddTo(layer), {f"layer.{n}": w for n, w in zip(names, weights, strict=True)}, call
        )

    weights = [layer.get_parameter(name) for name in names]
    assert torch.autograd.gradcheck(run, (x_BLD, *weights))


class _AddTo(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args):
        return self.layer.add_to(*args)


def test_the_loop_head_learns_through_the_sample_alone():
    """Straight through: the gradient of W_loop is that of sum_l p_l (value of l loops) with p soft and values held fixed."""
    layer, norm, x_BLD = layer_of(versatile()), norm_of(), stream()
    x_ND, head = x_BLD.flatten(0, 1), layer.paths.loops.score.weight
    torch.manual_seed(5)
    layer.add_to(x_BLD, norm, layer_context(training=True)).square().sum().backward()
    with torch.no_grad():
        branch, states_ND = layer.branch(norm), [torch.zeros_like(x_ND)]
        for _ in range(3):
            states_ND.append(states_ND[-1] + branch.change(x_ND + states_ND[-1]))
        wide_ND = layer.paths.width_change(x_ND, branch, layer.paths.router(x_ND, RoutingContext()))
    torch.manual_seed(5)
    routing = layer.paths.loops(x_ND, RoutingContext(training=True))
    soft_NT, loops_N = routing.score_NE, routing.index_NK[:, 0] + 1
    hard_NT = F.one_hot(loops_N - 1, 3).float() + soft_NT - soft_NT.detach()
    share_N1 = (3 - (hard_NT * torch.tensor([1.0, 2.0, 3.0])).sum(-1, keepdim=True)) / 3
    deep_ND = sum(hard_NT[:, n : n + 1] * states_ND[n + 1] for n in range(3))
    surrogate = (x_ND + share_N1 * wide_ND + (1 - share_N1) * deep_ND).square().sum()
    (expected,) = torch.autograd.grad(surrogate, head)
    torch.testing.assert_close(head.grad, expected, atol=1e-4, rtol=1e-4)
    assert head.grad.abs().max() > 1


def gradients(config):
    layer, norm, x_BLD = layer_of(config), norm_of(), stream()
    torch.manual_seed(1)
    layer.add_to(x_BLD, norm, layer_context(training=True)).square().sum().backward()
    return {name: parameter.grad for name, parameter in layer.named_parameters()} | {"norm": norm.weight.grad}


@pytest.mark.parametrize("change", [{"recompute": True}, {"width_compute": "grouped"}, {"slices": "contiguous"}])
def test_gradients_do_not_depend_on_how_it_is_computed(change):
    plain, other = gradients(versatile()), gradients(versatile(**change))
    for name, gradient in plain.items():
        torch.testing.assert_close(
            other[name], gradient, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_balance_loss_and_bias_see_the_virtual_experts():
    balance = (SwitchLoss.Config(alpha=0.5), BiasBalancer.Config(rate=0.1))
    router = Router.Config(select=TopK.Config(top_k=2, normalize="softmax"), balance=balance)
    layer, context = layer_of(versatile(router=router)), layer_context(training=True)
    x_BLD = stream()
    layer.add_to(x_BLD, norm_of(), context)
    routing = layer.paths.router(x_BLD.flatten(0, 1), RoutingContext())
    share, mean = routing.load_E() / (2 * 21), routing.score_NE.mean(0)
    torch.testing.assert_close(context.mean_losses()["load_balancing"], 0.5 * 4 * (share * mean).sum())
    context.commit()
    bias = layer.paths.router.balance[1]
    bias.on_step(1, 0.1)
    assert torch.equal(bias.expert_bias > 0, routing.load_E() < 10.5)
    assert VersatileFFN.Config().router.balance == (SwitchLoss.Config(alpha=5e-5),)


# ---- sizes and statistics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_counts_are_known_before_building(name):
    config = model_of(versatile(**VARIANTS[name])).config
    assert config.count().parameters == sum(parameter.numel() for parameter in config.build().parameters())


def test_the_overhead_is_two_heads():
    """d (N + L_max) a layer."""
    dense, ours = model_of(SwiGLU.Config(hidden_dim=24)).config.count(), model_of(versatile()).config.count()
    assert ours.parameters - dense.parameters == 2 * 16 * (4 + 3)


def counted_flops(layer, norm, x_BLD, context):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer.add_to(x_BLD, norm, context)
    return counter.get_total_flops()


@pytest.mark.parametrize(("top_k", "expert_dim", "used"), [(1, None, 6), (2, None, 12), (4, None, 24), (4, 12, 24)])
def test_without_a_depth_path_a_token_uses_the_slices_it_is_sent_to(top_k, expert_dim, used):
    router = Router.Config(select=TopK.Config(top_k=top_k))
    config = versatile(expert_dim=expert_dim, overlap=expert_dim is not None, fusion="width_only", router=router)
    count = config.count(BuildContext(16))
    assert count.parameters - count.active == 3 * 16 * (24 - used)


@pytest.mark.parametrize("fusion", ["difficulty", "average", "depth_only", "width_only"])
def test_flops_are_the_formula(fusion):
    """By PyTorch's counter: heads, matrices, and the small product that spreads gates over hidden units (2 N F per token)."""
    layer, norm, x_BLD = layer_of(versatile(fusion=fusion, width_compute="masked")), norm_of(), stream()
    per_token = layer.config.count(BuildContext(16)).flops
    spread = 0 if fusion == "depth_only" else 2 * 4 * 24
    assert counted_flops(layer, norm, x_BLD, layer_context(training=True)) == 21 * (per_token + spread)
    context = layer_context()
    spent = counted_flops(layer, norm, x_BLD, context)
    found = context.mean_metrics()
    loops_N = torch.zeros(21)
    if layer.paths.loops is not None:
        loops_N = layer.paths.loops(x_BLD.flatten(0, 1), RoutingContext()).index_NK[:, 0] + 1
    with_width = {"difficulty": loops_N < 3, "depth_only": loops_N < 0}.get(fusion, loops_N >= 0)
    heads = 2 * layer.config.heads(16)
    assert spent == pytest.approx(21 * (found["ffn_flops"].item() + heads) + int(with_width.sum()) * spread)
    if fusion != "width_only":
        extra = (with_width & (loops_N > 1)).float().mean().item()  # one loop and the width path are one product
        assert found["ffn_flops"].item() == pytest.approx(
            layer.config.inference_flops(16, loops_N.float().mean().item(), extra)
        )


@pytest.mark.parametrize(("expert_dim", "cheaper"), [(3, "grouped"), (6, "masked")])
def test_training_takes_the_cheaper_way_of_the_width_path(expert_dim, cheaper):
    """2 experts of 3 units: 18 D a token against 24 D of the last matrix; of 6 units: 36 D. Both ways are the same sum."""
    found = {}
    for way in ("auto", "masked", "grouped"):
        layer, norm = layer_of(versatile(expert_dim=expert_dim, width_compute=way)), norm_of()
        context, x_BLD = layer_context(training=True), stream(4, 64).requires_grad_()
        torch.manual_seed(0)
        y_BLD = layer.add_to(x_BLD, norm, context)
        gradient = torch.autograd.grad(y_BLD.square().sum(), (x_BLD, layer.w13.weight, layer.paths.router.score.weight))
        found[way] = (y_BLD, *gradient)
        assert (
            layer.config.count(BuildContext(16)).flops
            == 2 * layer.config.heads(16) + context.mean_metrics()["ffn_flops"]
        )
        found[way, "flops"] = context.mean_metrics()["ffn_flops"].item()
    assert found["auto", "flops"] == found[cheaper, "flops"] == min(found["masked", "flops"], found["grouped", "flops"])
    for way in ("auto", "grouped"):
        for part, wanted in zip(found[way], found["masked"], strict=True):
            torch.testing.assert_close(part, wanted, rtol=1e-4, atol=1e-4)


def test_the_papers_formula_when_grouped():
    """base mean_loops + base k / N P(l < L): for N = 4, k = 2 the width path is half a base."""
    layer, context = layer_of(versatile(width_compute="grouped")), layer_context()
    with torch.no_grad():
        layer.add_to(stream(), norm_of(), context)
    found, base = context.mean_metrics(), 6 * 16 * 24
    expected = base * found["mean_loops"] + base * 2 / 4 * (1 - found["share_loops_3"])
    torch.testing.assert_close(found["ffn_flops"], expected)


def test_a_threshold_spares_the_width_path():
    """Grouped, with 0.5: only tokens of one loop (lambda = 2/3) take it; in training all do."""
    layer = layer_of(versatile(width_compute="grouped", width_threshold=0.5))
    context, base = layer_context(), 6 * 16 * 24
    with torch.no_grad():
        layer.add_to(stream(), norm_of(), context)
    found = context.mean_metrics()
    torch.testing.assert_close(found["ffn_flops"], base * found["mean_loops"] + base * 2 / 4 * found["share_loops_1"])
    torch.testing.assert_close(found["mean_lambda"], found["share_loops_1"] * 2 / 3)
    plain, with_threshold = (gradients(versatile(width_threshold=value)) for value in (0.0, 0.5))
    for name, gradient in plain.items():
        assert torch.equal(with_threshold[name], gradient), name


def test_statistics_by_hand_leave_padding_out():
    layer, x_BLD = layer_of(versatile()), stream()
    mask_N = torch.arange(21) % 3 > 0
    context = layer_context(mask_N=mask_N)
    with torch.no_grad():
        layer.add_to(x_BLD, norm_of(), context)
    loops_N = (layer.paths.loops(x_BLD.flatten(0, 1), RoutingContext()).index_NK[:, 0] + 1)[mask_N].float()
    found = context.mean_metrics()
    torch.testing.assert_close(found["mean_loops"], loops_N.mean())
    torch.testing.assert_close(found["mean_lambda"], ((3 - loops_N) / 3).mean())
    for number in (1, 2, 3):
        torch.testing.assert_close(found[f"share_loops_{number}"], (loops_N == number).float().mean())


def test_difficulty_is_recorded_per_token():
    model, token_BL = model_of(versatile()).eval(), tokens()
    with torch.no_grad(), record_difficulty(model) as difficulty, record_routing(model) as routing:
        found = model(token_BL).metrics
    trace = difficulty.trace()
    assert [layer.num_destinations for layer in trace.layers] == [3, 3]
    # Loops stand behind the experts where nobody names what is recorded.
    assert [layer.num_destinations for layer in routing.trace().layers] == [4, 4, 3, 3]
    loops_LN = [trace.decisions(layer).index_NK[:, 0] + 1 for layer in (0, 1)]
    assert sum(loops.mean() for loops in loops_LN) / 2 == pytest.approx(found["mean_loops"].item())
    assert trace.decisions(0).position_N.tolist() == [*range(9), *range(9)]
    with pytest.raises(ConfigError, match="Decoder has no loop gate"):
        record_difficulty(model_of(versatile(fusion="width_only")))


# ---- in a model ---------------------------------------------------------------------------------------------------------------


def test_temperature_falls_with_the_steps_and_is_saved(tmp_path, monkeypatch):
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("ab cd efg " * 2000)
    layer = versatile(temperature=Temperature.Config(start=4.0, end=0.1, decay=0.5))
    config = RunConfig(
        model=model_of(layer, vocab_size=257).config,
        data=DataConfig(corpus=Files.Config(paths=(str(tmp_path / "text.txt"),)), sequence_length=16),
        train=TrainConfig(
            steps=4, batch_size=2, device="cpu", log_every=1, eval_tokens=64, checkpoint_every=2, keep_checkpoints=9
        ),
    )
    whole = Trainer(config, tmp_path / "whole")
    whole.fit()
    values = [block.feed_forward.paths.loops.temperature.value.item() for block in whole.model.blocks]
    assert values == [0.25, 0.25]
    logged = [record for record in read_metrics(tmp_path / "whole") if record["kind"] == "train"]
    assert 1 <= logged[0]["mean_loops"] <= 3
    assert logged[0]["auxiliary"].keys() == {"load_balancing"}
    # The checkpoint of step 2 has the temperature of step 3, and a run resumed from it ends where the whole one did.
    middle = load_model(checkpoints(tmp_path / "whole")[0])[0]
    assert middle.blocks[0].feed_forward.paths.loops.temperature.value.item() == 1.0
    shutil.rmtree(checkpoints(tmp_path / "whole")[1])
    resumed = Trainer(config, tmp_path / "whole", resume=True)
    resumed.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_generation_with_a_cache_equals_full_passes():
    model, token_BL = model_of(versatile()).eval(), tokens(length=12)
    cache = model.new_cache(12)
    with torch.no_grad():
        pieces = [model(token_BL[:, :5], cache=cache).logits_BLV]
        pieces += [model(token_BL[:, at : at + 1], cache=cache).logits_BLV for at in range(5, 12)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(token_BL).logits_BLV, atol=1e-4, rtol=1e-4)
    greedy = SamplingConfig(max_tokens=5, temperature=0.0)
    first, second = generate(model, [[1, 2, 3], [4, 5]], greedy), generate(model, [[1, 2, 3]], greedy)
    assert first[0] == second[0]  # neither noise nor the other prompt


def test_copies_share_nothing():
    model = model_of(versatile()).eval()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(tokens()).logits_BLV
        twin.blocks[0].feed_forward.paths.loops.score.weight.add_(1.0)
        assert torch.equal(model(tokens()).logits_BLV, expected)


def test_config_reads_back_equal():
    config = model_of(versatile(expert_dim=5, fusion="average", temperature=Temperature.Config(until=0.8))).config
    assert from_dict(Decoder.Config, to_dict(config)) == config


# ---- errors -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"expert_dim": 10},
            "4 experts of expert_dim=10 need 40 hidden units, there are 24; use expert_dim of at most 6",
        ),
        ({"expert_dim": 25}, "expert_dim is 25, but hidden_dim is 24; use 1 to 24"),
        ({"num_experts": 5, "slices": "contiguous"}, "num_experts is 5, which does not divide hidden_dim=24"),
        (
            {"expert_dim": 7, "slices": "contiguous", "overlap": True},
            "4 contiguous slices of expert_dim=7 need 28 hidden",
        ),
        (
            {"router": Router.Config(select=TopK.Config(top_k=5))},
            "top_k is 5, but there are 4 destinations; use 1 to 4",
        ),
        ({"num_experts": 40}, "40 experts of expert_dim=1 need 40 hidden units, there are 24"),
        ({"gate": "none"}, "gate is 'none', so there is no difficulty to mix by; use fusion 'average' or 'depth_only'"),
        ({"max_loops": 0}, "max_loops is 0; it must be greater than or equal to 1"),
        ({"backend": "fast"}, "backend is 'fast'; use one of auto, native"),
        ({"fusion": "both"}, "fusion is 'both'; it must be 'difficulty', 'average', 'width_only' or 'depth_only'"),
    ],
)
def test_errors_name_the_field_and_the_value(changes, message):
    with pytest.raises(ConfigError) as caught:
        versatile(**changes)
    assert message in str(caught.value)


def test_a_quantised_layer_runs_all_loops_too():
    """Nothing is cut from its weights, which are no matrices of floats."""
    model = model_of(
        versatile(hidden_dim=32, num_experts=8), dim=32, attention=SelfAttention.Config(num_heads=2)
    ).eval()
    quantize(model, "int8")
    token_BL = tokens(4, 64)
    whole = model(token_BL).logits_BLV  # with gradients on, no early exit
    with torch.no_grad():
        error = model(token_BL).logits_BLV - whole
    # Activations are rounded, those of both paths together or apart, and a token on the verge takes another number of loops then.
    assert error.norm() < 0.15 * whole.norm()
