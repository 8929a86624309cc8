import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.nn.rotary import Rotary, rotate


def build(head_dim=8, **fields):
    return Rotary.Config(**fields).build(head_dim)


def test_angles_by_hand():
    cos, sin = build(4, theta=100.0)(torch.tensor([[0, 3]]), torch.float32)
    # pairs (0, 2) and (1, 3) turn by p and by p / 10
    assert cos.shape == (1, 1, 2, 4)
    expected = torch.tensor([3.0, 0.3, 3.0, 0.3])
    torch.testing.assert_close(cos[0, 0], torch.stack((torch.ones(4), expected.cos())))
    torch.testing.assert_close(sin[0, 0], torch.stack((torch.zeros(4), expected.sin())))


def test_rotation_is_multiplication_of_complex_numbers():
    rotary = build(8)
    x_BHLD = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    position_BL = torch.tensor([[0, 1, 2, 3, 4], [7, 9, 11, 100, 1000]])
    cos, sin = rotary(position_BL, torch.float64)
    angle = position_BL[:, None, :, None].double() * rotary.frequency.double()
    turned = torch.complex(x_BHLD[..., :4], x_BHLD[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
    ours = rotate(x_BHLD, (cos, sin))
    torch.testing.assert_close(ours, torch.cat((turned.real, turned.imag), dim=-1), rtol=1e-4, atol=1e-4)


def test_the_gradient_is_the_rotation_back():
    rotary = build(8)(torch.tensor([[0, 5, 900]]), torch.float64)
    x_BHLD = torch.randn(2, 3, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, rotary), x_BHLD)
    with torch.no_grad():
        plain_BHLD = rotate(x_BHLD, rotary)
    torch.testing.assert_close(rotate(x_BHLD, rotary), plain_BHLD, rtol=1e-12, atol=1e-12)
    strided_BHLD = torch.randn(2, 3, 3, 8, dtype=torch.float64).transpose(1, 2)
    torch.testing.assert_close(rotate(strided_BHLD, rotary), rotate(strided_BHLD.contiguous(), rotary))


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 1000))
def test_products_depend_on_the_distance_alone(p, q, shift):
    rotary = build(16)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 1, 16, generator=generator) for _ in "qk")

    def product(p, q):
        return (
            rotate(query, rotary(torch.tensor([[p]]), torch.float32))
            * rotate(key, rotary(torch.tensor([[q]]), torch.float32))
        ).sum()

    torch.testing.assert_close(product(p, q), product(p + shift, q + shift), rtol=1e-3, atol=2e-3)


def test_length_is_kept_and_position_zero_is_identity():
    rotary, x_BHLD = build(8), torch.randn(1, 2, 3, 8)
    turned = rotate(x_BHLD, rotary(torch.tensor([[0, 50, 999]]), torch.float32))
    torch.testing.assert_close(turned.norm(dim=-1), x_BHLD.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x_BHLD[:, :, 0])


def test_linear_scaling_divides_positions():
    plain, scaled = build(8), build(8, scaling="linear", factor=4.0)
    for ours, wanted in zip(
        scaled(torch.tensor([[8, 40]]), torch.float32), plain(torch.tensor([[2, 10]]), torch.float32), strict=True
    ):
        torch.testing.assert_close(ours, wanted)


def naive_llama3(frequency, factor, low, high, original):
    wavelength = 2 * math.pi / frequency
    if wavelength < original / high:
        return frequency
    if wavelength > original / low:
        return frequency / factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def test_llama3_scaling_is_the_published_rule():
    options = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_positions": 8192}
    plain = build(128, theta=500000.0).frequency.tolist()
    scaled = build(128, theta=500000.0, scaling="llama3", **options).frequency.tolist()
    expected = [naive_llama3(frequency, 8.0, 1.0, 4.0, 8192) for frequency in plain]
    assert scaled == pytest.approx(expected, rel=1e-5)
    assert len({round(ours / p, 6) for ours, p in zip(scaled, plain, strict=True)}) > 3  # kept, ramp, divided


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_scaling_equals_transformers(kind):
    transformers = pytest.importorskip("transformers")
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    parameters = {"rope_type": kind, "factor": 8.0, "rope_theta": 500000.0}
    if kind == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=8192, rope_parameters=parameters
    )
    expected, attention_factor = rope.ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    assert attention_factor == 1.0
    ours = build(64, theta=500000.0, scaling=kind, factor=8.0, original_positions=1024)
    torch.testing.assert_close(ours.frequency, expected)


def test_frequencies_are_not_saved_and_never_rounded():
    rotary = build(64)
    assert rotary.state_dict() == {}
    expected = rotary.frequency.clone()
    for cast in (copy.deepcopy(rotary).bfloat16(), copy.deepcopy(rotary).half(), copy.deepcopy(rotary).double()):
        assert cast.frequency.dtype == torch.float32
        assert torch.equal(cast.frequency, expected)
    cos, _ = copy.deepcopy(rotary).bfloat16()(torch.tensor([[5000]]), torch.bfloat16)
    assert cos.dtype == torch.bfloat16
    assert torch.equal(cos, rotary(torch.tensor([[5000]]), torch.float32)[0].bfloat16())


def test_a_move_takes_the_frequencies_along():
    assert build().to("meta").frequency.is_meta


def test_angles_have_gradients_where_they_ask_for_them():
    """Angles that are learned: their gradient is that of the plain product."""
    x_BHLD = torch.randn(1, 2, 3, 8, requires_grad=True)
    angle = torch.randn(1, 1, 3, 4).repeat(1, 1, 1, 2).requires_grad_()
    weight = torch.randn(1, 2, 3, 8)
    ours = torch.autograd.grad((rotate(x_BHLD, (angle.cos(), angle.sin())) * weight).sum(), (x_BHLD, angle))
    turned = torch.cat((-x_BHLD[..., 4:], x_BHLD[..., :4]), dim=-1)
    plain = torch.autograd.grad(((x_BHLD * angle.cos() + turned * angle.sin()) * weight).sum(), (x_BHLD, angle))
    torch.testing.assert_close(ours, plain)


def test_frequencies_survive_a_build_without_memory():
    with torch.device("meta"):
        rotary = build(8)
    assert torch.equal(rotary.frequency, build(8).frequency)
    assert torch.equal(rotary.to_empty(device="cpu").frequency, build(8).frequency)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"theta": 0.0}, "theta is 0.0; it must be greater than 0"),
        ({"scaling": "dynamic"}, "scaling is 'dynamic'; it must be 'none', 'linear', 'llama3' or 'yarn'"),
        ({"fraction": 1.5}, "fraction is 1.5; it must be less than or equal to 1"),
        ({"factor": -1.0}, "factor is -1.0; it must be greater than 0"),
        (
            {"scaling": "llama3", "low_freq_factor": 4.0},
            "high_freq_factor is 4.0; it must be greater than low_freq_factor=4.0",
        ),
    ],
)
def test_messages(fields, message):
    with pytest.raises(ConfigError, match=message):
        Rotary.Config(**fields)


def test_yarn_keeps_fast_pairs_divides_slow_ones_and_lengthens():
    config = Rotary.Config(
        theta=100.0, scaling="yarn", factor=4.0, original_positions=64, beta_fast=4.0, beta_slow=1.0, truncate=False
    )
    made = config.build(16)
    plain = Rotary.Config(theta=100.0).build(16).frequency
    turns = 64 * plain / (2 * torch.pi)
    # Pair i turns 64 / (2 pi 100^(i / 8)) times: where that is 4 and 1, in pairs.
    low, high = (8 * math.log(64 / (times * 2 * math.pi)) / math.log(100.0) for times in (4.0, 1.0))
    for pair, frequency in enumerate(made.frequency.tolist()):
        share = min(max((pair - low) / (high - low), 0.0), 1.0)
        wanted = float(plain[pair]) * ((1 - share) + share / 4.0)
        assert frequency == pytest.approx(wanted, rel=1e-5)
    assert made.frequency[turns > 4.0].equal(plain[turns > 4.0])
    torch.testing.assert_close(made.frequency[turns < 1.0], plain[turns < 1.0] / 4)
    assert (turns > 4.0).any()
    assert (turns < 1.0).any()
    cos, sin = made(torch.arange(5)[None], torch.float32)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, (0.1 * math.log(4.0) + 1) ** 2))
    assert config.replace(attention_factor=1.0).length_factor == 1.0


def test_a_fraction_of_a_head_is_rotated_and_the_rest_stays():
    x = torch.randn(2, 3, 5, 12, generator=torch.Generator().manual_seed(0))
    angles = Rotary.Config(fraction=0.5).build(12)(torch.arange(5)[None], torch.float32)
    alone = Rotary.Config().build(6)(torch.arange(5)[None], torch.float32)
    y = rotate(x, angles)
    assert angles[0].shape[-1] == 6
    assert y[..., 6:].equal(x[..., 6:])
    torch.testing.assert_close(y[..., :6], rotate(x[..., :6].contiguous(), alone))
    with pytest.raises(ConfigError, match=r"fraction is 0\.25, which rotates 3 numbers of a head of 12"):
        Rotary.Config(fraction=0.25).width(12)
