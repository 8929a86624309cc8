import math

import pytest
import torch

from anabranch.errors import ConfigError
from anabranch.lm import KeyValueCache
from anabranch.nn import BuildContext, ForwardContext, Rotary, SelfAttention
from anabranch.nn.rotary import rotate

DIM = 12


def build(dim=DIM, **fields):
    context = BuildContext(dim, init_std=0.5, residual_std=0.5, generator=torch.Generator().manual_seed(0))
    attention = SelfAttention.Config(**{"num_heads": 2, **fields}).build(context)
    for module in (attention.q_norm, attention.k_norm):
        if hasattr(module, "weight"):
            torch.nn.init.uniform_(module.weight, 0.5, 2.0, generator=context.generator)
    if attention.qkv.bias is not None:
        torch.nn.init.normal_(attention.qkv.bias, generator=context.generator)
    return attention.double()


def forward_context(attention, length, batch=1, start=0, **fields):
    position_BL = torch.arange(start, start + length).expand(batch, length)
    rotary = Rotary.Config().build(attention.head_dim)(position_BL, torch.float64)
    return ForwardContext(position_BL=position_BL, rotary=rotary, **fields)


def naive(attention, x_LW, visible_LL):
    """One sequence, one query and one head at a time."""
    config, width = attention.config, attention.head_dim
    heads, stores = attention.num_heads, attention.num_kv_heads
    length = len(x_LW)
    context = forward_context(attention, length)
    parts = x_LW @ attention.qkv.weight.T
    if attention.qkv.bias is not None:
        parts = parts + attention.qkv.bias
    query, key, value = parts.split([heads * width, stores * width, stores * width], dim=-1)

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    if config.qk_norm == "full":
        query, key = norm(query, attention.q_norm.weight), norm(key, attention.k_norm.weight)
    if config.clip_qkv is not None:
        query, key, value = (part.clamp(-config.clip_qkv, config.clip_qkv) for part in (query, key, value))
    output_LW = torch.zeros(length, heads * width, dtype=x_LW.dtype)
    for h in range(heads):
        g = h // (heads // stores)
        q, k, v = query[:, h * width :][:, :width], key[:, g * width :][:, :width], value[:, g * width :][:, :width]
        if config.qk_norm == "head":
            q, k = norm(q, attention.q_norm.weight), norm(k, attention.k_norm.weight)
        q, k = (rotate(part[None, None], context.rotary)[0, 0] for part in (q, k))
        if config.temperature_scale:
            steps = [1 + config.temperature_scale * math.log(1 + i // config.temperature_length) for i in range(length)]
            q = q * torch.tensor(steps, dtype=q.dtype)[:, None]
        for i in range(length):
            seen = [j for j in range(length) if visible_LL[i, j]]
            score = torch.stack([q[i] @ k[j] / math.sqrt(width) for j in seen]).softmax(0)
            output_LW[i, h * width : (h + 1) * width] = sum(s * v[j] for s, j in zip(score, seen, strict=True))
    y_LW = output_LW @ attention.out.weight.T
    return y_LW if attention.out.bias is None else y_LW + attention.out.bias


VARIANTS = {
    "plain": {},
    "one_kv_head": {"num_heads": 4, "num_kv_heads": 1, "head_dim": 4},
    "grouped": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6},
    "wide_heads": {"num_heads": 2, "head_dim": 10},
    "head_norm": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "qk_norm": "head"},
    "full_norm": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "qk_norm": "full"},
    "clip": {"clip_qkv": 0.7},
    "full_norm_clip": {"qk_norm": "full", "clip_qkv": 0.7},
    "temperature": {"temperature_scale": 0.8, "temperature_length": 2},
    "biases": {"qkv_bias": True, "out_bias": True},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_causal_attention_is_a_naive_loop(fields):
    attention, x_BLW = build(**fields), torch.randn(2, 5, DIM, dtype=torch.float64)
    causal_LL = torch.ones(5, 5, dtype=torch.bool).tril()
    y_BLW = attention(x_BLW, forward_context(attention, 5, batch=2))
    for ours, x_LW in zip(y_BLW, x_BLW, strict=True):
        # rotary frequencies are fp32: 1e-6 and not 1e-12
        torch.testing.assert_close(ours, naive(attention, x_LW, causal_LL), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "grouped"])
def test_a_mask_says_who_sees_whom(name):
    attention, x_BLW = build(**VARIANTS[name]), torch.randn(1, 5, DIM, dtype=torch.float64)
    mask_LL = torch.rand(5, 5) < 0.5
    mask_LL |= torch.eye(5, dtype=torch.bool)
    y_BLW = attention(x_BLW, forward_context(attention, 5, attention_mask=mask_LL[None, None]))
    torch.testing.assert_close(y_BLW[0], naive(attention, x_BLW[0], mask_LL), rtol=1e-6, atol=1e-6)


def test_without_mask_and_causality_everything_is_seen():
    attention, x_BLW = build(), torch.randn(1, 4, DIM, dtype=torch.float64)
    y_BLW = attention(x_BLW, forward_context(attention, 4, is_causal=False))
    expected = naive(attention, x_BLW[0], torch.ones(4, 4, dtype=torch.bool))
    torch.testing.assert_close(y_BLW[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_gradients_reach_everything(fields):
    attention = build(**fields)
    attention(torch.randn(1, 4, DIM, dtype=torch.float64), forward_context(attention, 4)).square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0 or "bias" in name, name


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_the_count_is_the_number_of_parameters(fields):
    attention = build(**fields)
    count = attention.config.count(BuildContext(DIM), 10)
    assert count.parameters == count.active == sum(parameter.numel() for parameter in attention.parameters())
    matrices = attention.qkv.weight.numel() + attention.out.weight.numel()
    # scores and mixing: 2 multiply-adds per head entry and position, over a mean context of 5
    assert count.flops == 2 * matrices + 2 * 2 * attention.num_heads * attention.head_dim * 5


def test_a_cache_gives_what_the_whole_sequence_gives():
    attention, x_BLW = build(num_heads=4, num_kv_heads=2, head_dim=4), torch.randn(2, 6, DIM, dtype=torch.float64)
    expected_BLW = attention(x_BLW, forward_context(attention, 6, batch=2))
    cache = KeyValueCache(num_layers=1, max_length=6)
    first = attention(x_BLW[:, :4], forward_context(attention, 4, batch=2, cache=cache))
    cache.advance(4)
    parts = [first]
    for place in (4, 5):
        context = forward_context(attention, 1, batch=2, start=place, cache=cache, is_causal=False)
        parts.append(attention(x_BLW[:, place : place + 1], context))
        cache.advance(1)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected_BLW)


def test_moving_all_positions_changes_nothing():
    attention, x_BLW = build(), torch.randn(1, 5, DIM, dtype=torch.float64)
    here, there = (attention(x_BLW, forward_context(attention, 5, start=start)) for start in (0, 40))
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


def test_bf16_autocast_is_close():
    attention, x_BLW = build(qk_norm="head").float(), torch.randn(1, 5, DIM)
    context = forward_context(attention, 5)
    context.rotary = tuple(part.float() for part in context.rotary)
    expected_BLW = attention(x_BLW, context)
    with torch.autocast("cpu", torch.bfloat16):
        context.rotary = tuple(part.bfloat16() for part in context.rotary)
        y_BLW = attention(x_BLW, context)
    assert y_BLW.dtype == torch.bfloat16
    assert (y_BLW - expected_BLW).norm() < 2e-2 * expected_BLW.norm()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SelfAttention.Config(num_heads=4, num_kv_heads=3),
            "num_kv_heads is 3, which does not divide num_heads=4",
        ),
        (lambda: build(dim=10, num_heads=4), "dim 10 is not a multiple of num_heads=4; set head_dim"),
        (lambda: build(dim=12, num_heads=4), "head_dim is 3; rotary positions need an even number"),
        (lambda: build(head_dim=5), "head_dim is 5; rotary positions need an even number"),
        (lambda: SelfAttention.Config(qk_norm="layer"), "qk_norm is 'layer'; it must be 'none', 'head' or 'full'"),
        (lambda: SelfAttention.Config(clip_qkv=0.0), "clip_qkv is 0.0; it must be greater than 0"),
        (lambda: SelfAttention.Config(num_heads=0), "num_heads is 0; it must be greater than or equal to 1"),
    ],
)
def test_messages(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_entries_in_front_are_seen_by_all():
    """Causal attention behind a prefix, without a mask, is attention with one."""
    torch.manual_seed(1)
    attention = SelfAttention.Config(num_heads=2, num_kv_heads=1).build(BuildContext(16))
    x_BLW = torch.randn(2, 5, 16, requires_grad=True)
    front = torch.randn(2, 2, 1, 3, 8)  # keys and values of 3 entries

    class Front:
        def append(self, layer, key_BHLD, value_BHLD, *, visit, rows):
            assert (layer, visit, rows) == (0, 0, None)
            return torch.cat((front[0], key_BHLD), 2), torch.cat((front[1], value_BHLD), 2), None

    rotary = Rotary.Config().build(8)(torch.arange(5).expand(2, 5), torch.float32)
    mask = torch.cat((torch.ones(5, 3), torch.ones(5, 5).tril()), 1).bool()[None, None]
    found = []
    for options in ({"is_causal": True}, {"is_causal": False, "attention_mask": mask}):
        context = ForwardContext(position_BL=torch.arange(5).expand(2, 5), rotary=rotary, cache=Front(), **options)
        y_BLW = attention(x_BLW, context)
        found.append((y_BLW, *torch.autograd.grad(y_BLW.square().sum(), (x_BLW, attention.qkv.weight))))
    for ours, masked in zip(*found, strict=True):
        torch.testing.assert_close(ours, masked, rtol=1e-5, atol=1e-5)
