"""The loop over passes: each residual by hand, scales, what is kept for the backward pass, and a design made of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.config import configclass
from anabranch.lm import Decoder
from anabranch.nn import MoE, SelfAttention
from anabranch.nn.count import Count
from anabranch.nn.feed_forward import FeedForward, SwiGLU
from anabranch.nn.pass_loop import PassLoop
from anabranch.registry import BUILTIN
from anabranch.routing import RoutingContext
from anabranch.testing import check_feed_forward


def affine(number, x, context):
    """f_1 = 2 x + 1, f_2 = 3 x + 1, ..."""
    context.carry["seen"] = [*context.carry.get("seen", []), number]
    return (number + 2) * x + 1


# From x_0 = 1: f_1 = 3; then f_2 of what the second pass sees.
BY_HAND = {
    "inner": (3 + 13, True),  # x_1 = 4, f_2 = 13, y - x_0 = 16
    "init": (13, True),  # x_1 = 4, f_2 = 13, y = 1 + 13
    "outer": (10, True),  # x_1 = 3, f_2 = 10, y = 10 + 1
    "none": (10, False),  # y = 10
    "gated": (8.5, True),  # w = 0.5: x_1 = 2.5, f_2 = 8.5
}


@pytest.mark.parametrize("residual", BY_HAND)
def test_two_passes_by_hand(residual):
    loop, context = PassLoop(2, residual), RoutingContext()
    expected, goes_around = BY_HAND[residual]
    made = loop.run(affine, torch.tensor([1.0]), context, torch.tensor([0.5]))
    assert made.tolist() == [expected]
    assert loop.goes_around is goes_around
    assert context.carry["seen"] == [0, 1]


@pytest.mark.parametrize("residual", BY_HAND)
def test_one_pass_is_the_function_alone(residual):
    loop = PassLoop(1, residual)
    assert loop.run(affine, torch.tensor([1.0]), RoutingContext()).tolist() == [3.0]
    assert loop.goes_around
    assert loop.new_scale() is None


@given(st.integers(1, 5), st.sampled_from(sorted(BY_HAND)), st.integers(0, 9))
def test_any_number_of_passes_follows_the_formulas(passes, residual, seed):
    draw = torch.Generator().manual_seed(seed)
    matrix_CDD = torch.randn(passes, 3, 3, generator=draw, dtype=torch.float64)
    start, scale = (torch.randn(count, generator=draw, dtype=torch.float64) for count in (3, max(passes - 1, 1)))
    loop = PassLoop(passes, residual)
    made = loop.run(lambda number, x, context: torch.tanh(matrix_CDD[number] @ x), start, RoutingContext(), scale)
    x = start
    for number in range(passes):
        f = torch.tanh(matrix_CDD[number] @ x)
        last = number == passes - 1
        x = {
            "inner": x + f,
            "init": start + f,
            "outer": f + start if last else f,
            # One pass is the plain layer: its input goes on beside it.
            "none": f if passes > 1 else start + f,
            "gated": start + (1.0 if last else scale[number]) * f,
        }[residual]
    torch.testing.assert_close(start + made if loop.goes_around else made, x)


def test_scales_begin_at_zero_and_only_gated_passes_have_them():
    assert PassLoop(3, "gated").new_scale().tolist() == [0.0, 0.0]
    assert PassLoop(3).new_scale() is None
    assert PassLoop(3).num_scales == 0
    assert not PassLoop(3).recompute


def test_routers_in_order():
    assert PassLoop(3).in_order(["a"]) == ["a", "a", "a"]
    assert PassLoop(3).in_order(["a", "b", "c"]) == ["a", "b", "c"]


def test_recomputed_passes_have_the_same_gradients_and_emit_once():
    weight = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)
    ran = []

    def one_pass(number, x, context):
        ran.append(number)
        context.emit_loss("size", (weight[number] * x).square().sum())
        return torch.sin(weight[number] * x)

    def gradient(recompute):
        context, x = RoutingContext(training=True), torch.ones(4, dtype=torch.float64, requires_grad=True)
        made = PassLoop(2, recompute=recompute).run(one_pass, x, context)
        assert len(context.losses["size"]) == 2
        return torch.autograd.grad(made.sum() + sum(context.losses["size"]), (x, weight))

    plain = gradient(False)
    assert ran == [0, 1]
    ran.clear()
    again = gradient(True)
    assert sorted(ran) == [0, 0, 1, 1]
    for ours, theirs in zip(again, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_scales_are_in_the_type_of_the_passes():
    """A scale in float32 leaves passes in bfloat16, where 1 + 2^-8 is 1: 255 stays 255, and is not 255.996, rounded to 256."""
    seen = []

    def one_pass(number, x, context):
        seen.append(x)
        return torch.full_like(x, 255.0)

    scale = torch.tensor([1 + 2.0**-8])
    made = PassLoop(2, "gated").run(one_pass, torch.zeros(1, dtype=torch.bfloat16), RoutingContext(), scale)
    assert [x.item() for x in seen] == [0, 255]
    assert {made.dtype, *(x.dtype for x in seen)} == {torch.bfloat16}


class Looped(FeedForward, kind="looped_in_a_test"):
    """A dense layer run three times: a design of one loop and one layer."""

    @configclass
    class Config(FeedForward.Config):
        """Attributes: ``hidden_dim``."""

        hidden_dim: int = 8

        def count(self, context):
            once = SwiGLU.Config(hidden_dim=self.hidden_dim).count(context)
            return Count(once.parameters, once.active, 3 * once.flops)

    def __init__(self, config, context):
        super().__init__()
        self.layer = SwiGLU.Config(hidden_dim=config.hidden_dim).build(context)

    def add_to(self, x_BLD, norm, context):
        return x_BLD + PassLoop(3).run(lambda _, x_BLD, context: self.layer(norm(x_BLD), context), x_BLD, context)


def test_a_design_is_a_layer_in_a_loop():
    config = Decoder.Config(
        vocab_size=9, dim=8, num_layers=1, attention=SelfAttention.Config(num_heads=2), feed_forward=Looped.Config()
    )
    model = config.build().eval()
    block = model.blocks[0]
    x_BLD = torch.randn(2, 3, 8)
    expected = x_BLD
    for _ in range(3):
        expected = expected + block.feed_forward.layer(block.feed_forward_norm(expected), RoutingContext())
    made = block.feed_forward.add_to(x_BLD, block.feed_forward_norm, RoutingContext())
    torch.testing.assert_close(made, expected)
    token_BL = torch.randint(0, 9, (2, 6))
    with torch.no_grad():
        cache, whole = model.new_cache(6), model(token_BL).logits_BLV
        parts = [model(token_BL[:, place : place + 1], cache=cache).logits_BLV for place in range(6)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


class Again(MoE, kind="again"):
    """A mixture of experts run three times by one router, as the guide to designs has it."""

    loop = PassLoop(3)

    @configclass
    class Config(MoE.Config):
        """Those of `MoE`."""

        def count(self, context):
            once = MoE.Config.count(self, context)
            return Count(once.parameters, once.active, 3 * once.flops)

    @property
    def routing_order(self):
        return self.loop.in_order([self.router])

    def add_to(self, x_BLD, norm, context):
        return x_BLD + self.loop.run(lambda number, x_BLD, context: self(norm(x_BLD), context), x_BLD, context)


@pytest.mark.slow
def test_routed_layers_of_others_in_a_loop_keep_the_contract(monkeypatch):
    """Training, recompute, padding, cached generation, paths, traces of every pass and their replay."""
    monkeypatch.setitem(BUILTIN["feed_forward"], "again", f"{__name__}:Again")
    check_feed_forward(Again.Config())
