"""Latent attention: as the paper writes it, by both of its forms, and through layers that are no plain matrices."""

import pytest
import torch

from anabranch.errors import ConfigError
from anabranch.lm import Decoder
from anabranch.nn import LatentAttention, Rotary, SwiGLU
from anabranch.nn.context import BuildContext, ForwardContext
from anabranch.nn.quantize import quantize
from anabranch.nn.rotary import rotate

SIZES = {"num_heads": 3, "kv_rank": 10, "head_dim": 6, "rotary_dim": 4, "value_dim": 5}


def decoder(**changes):
    attention = LatentAttention.Config(**{**SIZES, **changes})
    config = Decoder.Config(
        vocab_size=50,
        dim=32,
        num_layers=2,
        attention=attention,
        feed_forward=SwiGLU.Config(hidden_dim=40),
        init_std=0.3,
        max_positions=64,
    )
    return config.build(seed=0).eval()


@pytest.mark.parametrize("q_rank", [None, 7])
def test_it_is_the_paper(q_rank):
    config = LatentAttention.Config(**SIZES, q_rank=q_rank, bias=True, mscale=0.7, mscale_factor=4.0)
    context = BuildContext(16, init_std=0.5, residual_std=0.5, generator=torch.Generator().manual_seed(0))
    layer = config.build(context).double()
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    angles = tuple(part.double() for part in Rotary.Config().build(4)(torch.arange(5)[None], torch.float32))
    y = layer(x, ForwardContext(position_BL=torch.arange(5)[None], rotary=angles))
    latent = layer.kv_down(x)
    c, turned = layer.kv_norm(latent[..., :10]), rotate(latent[..., 10:].unsqueeze(1), angles)
    q = layer.q(x) if q_rank is None else layer.q_up(layer.q_norm(layer.q_down(x)))
    heads = []
    scale = (6 + 4) ** -0.5 * (0.1 * 0.7 * torch.log(torch.tensor(4.0, dtype=torch.float64)) + 1) ** 2
    for head in range(3):
        own = layer.kv_up.weight[head * 11 : (head + 1) * 11]
        key, value = c @ own[:6].T, c @ own[6:].T
        query = q[..., head * 10 : (head + 1) * 10]
        score = query[..., :6] @ key.transpose(1, 2)
        score = score + rotate(query[..., 6:].unsqueeze(1), angles)[:, 0] @ turned[:, 0].transpose(1, 2)
        score = (score * scale).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
        heads.append(score.softmax(-1) @ value)
    torch.testing.assert_close(y, layer.out(torch.cat(heads, dim=-1)))
    sizes = config.count(context, 8)
    assert sizes.parameters == sum(parameter.numel() for parameter in layer.parameters())


@torch.no_grad()
@pytest.mark.parametrize("bits", [None, "int8"])
def test_a_cache_of_latents_gives_what_a_whole_pass_gives(bits):
    model = decoder(kv_rank=32, value_dim=8)
    if bits:
        assert any("kv_up" in name for name in quantize(model, bits))
    tokens = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(0))
    whole = model(tokens).logits_BLV
    cache, made, start = model.new_cache(64), [], 0
    for count in (9, 3, *[1] * 28):
        made.append(model(tokens[:, start : start + count], cache=cache).logits_BLV)
        start += count
    error = (torch.cat(made, 1) - whole).abs()
    if bits is None:
        assert error.max() < 1e-4
    else:  # activations are rounded before either product
        assert error.mean() < 0.05 * whole.std()
    assert cache.size_bytes == 2 * 2 * 64 * (32 + 4) * 4  # layers, sequences, positions, numbers of a position


def test_an_odd_number_cannot_be_rotated():
    with pytest.raises(ConfigError, match="rotary_dim is 5; rotary positions need an even number"):
        decoder(rotary_dim=5)
