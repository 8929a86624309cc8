"""VersatileFFN: slices, both paths against plain loops, early exit, gradients, conversion of our models and of transformers', errors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from anabranch.experts.versatile import (
    VersatileFFN,
)
from anabranch.lm import Decoder
from anabranch.nn import Attention, BuildContext, ForwardContext, RMSNorm
from anabranch.routing import Router, RoutingContext, TopK

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
        vocab_size=31, dim=16, num_layers=2, attention=Attention.Config(num_heads=2), feed_forward=feed_forward
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
            best = (paths.router.score.weight @ h_D).topk(config.top_k)
            width = config.slice_width(config.hidden_dim)
            for place, gate in zip(best.indices.tolist(), best.values.softmax(-1), strict=True):
                start = config.slice_starts(config.hidden_dim)[place]
                units, n_D = slice(start, start + width), (norm if paths.width_norm is None else paths.width_norm)(h_D)
                wide_D = wide_D + gate * (down_DF[:, units] @ (F.silu(gate_FD[units] @ n_D) * (up_FD[units] @ n_D)))
        loops = 0
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
        rows.append(share * wide_D + (1 - share) * deep_D)
    return torch.stack(rows).view_as(x_BLD)


VARIANTS = {
    "paper": {},
    "average": {"fusion": "average"},
    "width_only": {"fusion": "width_only"},
    "width_masked": {"fusion": "width_only", "width_compute": "masked"},
    "depth_only": {"fusion": "depth_only"},
    "soft_gate": {"gate": "soft"},
    "grouped": {"width_compute": "grouped"},
    "separate_norm": {"norm": "separate"},
    "gaps": {"expert_dim": 5},
    "strided_rest": {"num_experts": 5},  # 24 units in 5 slices of 4, four units left over
    "overlap": {"expert_dim": 10, "overlap": True},
    "overlap_grouped": {"expert_dim": 10, "overlap": True, "width_compute": "grouped"},
    "contiguous_part": {"expert_dim": 4, "slices": "contiguous", "width_compute": "grouped"},
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
    assert all(second - first >= width for first, second in zip(starts, starts[1:], strict=False))


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
