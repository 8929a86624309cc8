import pytest
import torch

from anabranch.config import from_dict, to_dict
from anabranch.errors import ConfigError
from anabranch.nn import BuildContext, FeedForward, SwiGLU
from anabranch.nn.feed_forward import is_fused


def build(dim=6, hidden_dim=4, **context):
    context = BuildContext(dim, init_std=0.5, generator=torch.Generator().manual_seed(0), **context)
    return SwiGLU.Config(hidden_dim=hidden_dim).build(context)


def test_by_hand():
    layer = build(dim=1, hidden_dim=1)
    with torch.no_grad():
        layer.w13.weight.copy_(torch.tensor([[2.0], [3.0]]))  # gate, up
        layer.w2.weight.fill_(5.0)
    # x = 1: silu(2) * 3 * 5 = 2 / (1 + e^-2) * 15
    expected = 2 / (1 + torch.e**-2) * 15
    assert layer(torch.ones(1, 1)).item() == pytest.approx(expected, rel=1e-6)


def test_gate_rows_come_first():
    layer, x_BLD = build(), torch.randn(2, 3, 6)
    gate, up = layer.w13.weight[:4], layer.w13.weight[4:]
    expected = (torch.nn.functional.silu(x_BLD @ gate.T) * (x_BLD @ up.T)) @ layer.w2.weight.T
    torch.testing.assert_close(layer(x_BLD), expected)


def test_sizes():
    context = BuildContext(6)
    count = SwiGLU.Config(hidden_dim=4).count(context)
    assert (count.parameters, count.active, count.flops) == (72, 72, 144)
    assert count.parameters == sum(parameter.numel() for parameter in build().parameters())


def test_the_residual_projection_has_its_own_spread():
    layer = build(dim=64, hidden_dim=64, residual_std=1e-3)
    assert layer.w2.weight.abs().max() <= 3e-3
    assert layer.w13.weight.std() > 0.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_training_one_kernel_does_what_the_matrices_do(dtype):
    layer, x_BLD = build(dim=32, hidden_dim=48).to(dtype), torch.randn(2, 9, 32, dtype=dtype)
    found = []
    for expected in (True, False):
        handle = (
            None if expected else layer.w13.register_forward_hook(lambda *_: None)
        )  # a hook wants to see the matrix at work
        x = x_BLD.clone().requires_grad_()
        assert is_fused(layer.w13, layer.w2, x) == expected
        layer.zero_grad()
        y_BLD = layer(x)
        y_BLD.float().square().sum().backward()
        found.append([y_BLD, x.grad, layer.w13.weight.grad, layer.w2.weight.grad])
        if handle is not None:
            handle.remove()
    for ours, plain in zip(*found, strict=True):
        error = (ours - plain).float().norm() / plain.float().norm()
        assert error <= (1e-5 if dtype == torch.float32 else 1e-2)  # bf16 sums in another order


def test_a_replaced_matrix_is_used():
    layer, x_BLD = build(dim=32, hidden_dim=16), torch.randn(3, 32)
    before = layer(x_BLD)
    layer.w2 = torch.nn.Sequential(layer.w2)
    torch.testing.assert_close(layer(x_BLD), before)
    layer.w2 = torch.nn.Linear(16, 32)  # with a bias
    assert not is_fused(layer.w13, layer.w2, x_BLD)


def test_no_items():
    assert build()(torch.zeros(0, 6)).shape == (0, 6)


def test_a_config_reads_back_by_its_kind():
    config = SwiGLU.Config(hidden_dim=7)
    assert to_dict(config) == {"kind": "swiglu", "hidden_dim": 7}
    assert from_dict(FeedForward.Config, to_dict(config)) == config
    assert not config.is_routed


def test_messages():
    with pytest.raises(ConfigError, match="hidden_dim is 0; it must be greater than or equal to 1"):
        SwiGLU.Config(hidden_dim=0)
    with pytest.raises(ConfigError, match="no feed_forward of kind 'swiglo'; did you mean 'swiglu'"):
        from_dict(FeedForward.Config, {"kind": "swiglo"})
