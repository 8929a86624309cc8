"""Routed heads of one attention: ours and torch's."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from anabranch.errors import ConfigError, InputError
from anabranch.heads import HeadRouting, RateBalance, RoutedAttention, RoutedHeads
from anabranch.nn import Attention, BuildContext, LatentAttention, SelfAttention
from anabranch.routing import record_routing

WIDTH, HEADS = 32, 8


def multihead(**options):
    torch.manual_seed(0)
    made = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options).eval()
    for parameter in made.parameters():
        # Biases are zeros as they come.
        nn.init.normal_(parameter, std=0.3)
    return made


def inputs(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def open_up(heads, seed=3, std=0.5, start=0.0):
    """Give the gate numbers, so that heads differ from token to token."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in heads.gate.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            if name.endswith("score.bias"):
                parameter.add_(start)
    return heads


# At the start nothing changes


@pytest.mark.parametrize("routing", ["relu", "none"])
@pytest.mark.parametrize("num_shared", [0, 5, 7])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_wrapping_changes_nothing(routing, num_shared, mode):
    attention = multihead()
    x_BLE, other = inputs(2, 5, WIDTH), inputs(2, 7, WIDTH, seed=2)
    plain = [attention(x_BLE, x_BLE, x_BLE), attention(x_BLE, other, other)]
    heads = getattr(RoutedHeads(attention, num_shared, routing=routing), mode)()
    for found, expected in zip([heads(x_BLE, x_BLE, x_BLE), heads(x_BLE, other, other)], plain, strict=True):
        close(found[0], expected[0])
        close(found[1], expected[1])


def test_topk_of_all_routed_heads_is_the_plain_attention_at_the_start():
    attention, x_BLE = multihead(), inputs(2, 5, WIDTH)
    expected, _ = attention(x_BLE, x_BLE, x_BLE)
    close(RoutedHeads(attention, 5, routing="topk", top_k=3)(x_BLE, x_BLE, x_BLE)[0], expected)
    fewer, _ = RoutedHeads(attention, 5, routing="topk", top_k=2)(x_BLE, x_BLE, x_BLE)
    assert (fewer - expected).abs().max() > 1e-3


def test_as_released_shared_heads_begin_halved_and_routed_ones_off():
    attention, x_BLE = multihead(), inputs(2, 5, WIDTH)
    heads = RoutedHeads(attention, 5, init="released")
    scale_BLH = heads.decide(x_BLE).scale_BLH
    close(scale_BLH[..., :5], torch.full((2, 5, 5), 0.5), 1e-3)
    assert scale_BLH[..., 5:].abs().max() < 1e-3
    other = RoutedHeads(attention, 5, init="released", seed=1)
    assert not torch.equal(heads.gate.pair.weight, other.gate.pair.weight)


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 12, "vdim": 20}, {"dropout": 0.5}],
    ids=str,
)
def test_every_form_of_torchs_attention(options):
    attention = multihead(**options)
    heads = RoutedHeads(copy.deepcopy(attention), 5).eval()
    query = inputs(2, 5, WIDTH)
    key, value = inputs(2, 7, options.get("kdim", WIDTH), seed=2), inputs(2, 7, options.get("vdim", WIDTH), seed=3)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 4:] = True
    causal = torch.ones(5, 7, dtype=torch.bool).triu(3)
    each = torch.randn(2 * HEADS, 5, 7, generator=torch.Generator().manual_seed(4))
    for given_ in (
        {},
        {"need_weights": False},
        {"average_attn_weights": False},
        {"key_padding_mask": padding},
        {"key_padding_mask": padding, "attn_mask": causal, "need_weights": False},
        {"attn_mask": each},
        {"attn_mask": torch.zeros(5, 7).masked_fill(causal, -math.inf), "need_weights": False},
    ):
        found, expected = heads(query, key, value, **given_), attention(query, key, value, **given_)
        close(found[0], expected[0], 1e-5)
        assert (found[1] is None) == (expected[1] is None)
        if found[1] is not None:
            close(found[1], expected[1], 1e-5)


def test_a_causal_mask():
    attention, x_BLE = multihead(), inputs(2, 5, WIDTH)
    call = {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1), "is_causal": True, "need_weights": False}
    expected, _ = attention(x_BLE, x_BLE, x_BLE, **call)
    close(RoutedHeads(attention, 5)(x_BLE, x_BLE, x_BLE, **call)[0], expected)


def test_a_batch_second_and_no_batch():
    attention = multihead()
    attention.batch_first = False
    x_LBE, y_LE = inputs(5, 2, WIDTH), inputs(5, WIDTH)
    expected = [attention(x_LBE, x_LBE, x_LBE), attention(y_LE, y_LE, y_LE)]
    heads = RoutedHeads(attention, 5)
    for found, wanted in zip([heads(x_LBE, x_LBE, x_LBE), heads(y_LE, y_LE, y_LE)], expected, strict=True):
        close(found[0], wanted[0])
        close(found[1], wanted[1])
    assert heads(query=x_LBE, key=x_LBE, value=x_LBE)[0].shape == (5, 2, WIDTH)


def test_an_encoder_of_torch_calls_it_and_does_not_compute_beside_it():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=0.0, batch_first=True).eval()
    x_BLE = inputs(2, 5, WIDTH)
    with torch.no_grad():
        expected = layer(x_BLE)
        layer.self_attn = open_up(RoutedHeads(layer.self_attn, 5)).eval()
        assert (layer(x_BLE) - expected).abs().max() > 1e-3
        layer.self_attn = RoutedHeads(layer.self_attn.attention, 5).eval()
        close(layer(x_BLE), expected, 1e-5)


# What routing does


def naive(attention, gate, x_BLE, config):
    """The equations, token by token and head by head."""
    query, key, value = (
        part @ weight.T + bias
        for part, weight, bias in zip(
            [x_BLE] * 3, attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True
        )
    )
    made = torch.zeros(*x_BLE.shape[:2], WIDTH, dtype=x_BLE.dtype)
    size, shared = WIDTH // HEADS, config.num_shared
    for row in range(len(x_BLE)):
        for token in range(x_BLE.shape[1]):
            x = x_BLE[row, token]
            pair = gate.pair.weight @ x
            if config.routing == "relu":
                a1, a2 = pair.clamp(-1, 1).softmax(0)
                z = gate.router.score.weight @ x + gate.router.score.bias
                if config.init == "released":
                    z, factor = z.clamp(-1, 10), 1.0
                else:
                    factor = 2.0
                scales = [factor * a1] * shared + [factor * a2 * min(max(value, 0.0), 10.0) for value in z.tolist()]
            else:
                a1, a2 = pair.softmax(0)
                p = (gate.router.score.weight @ x).softmax(0)
                best = p.argsort(descending=True)[: config.top_k]
                g = torch.zeros_like(p)
                g[best] = config.top_k * p[best] / p[best].sum()
                s = (gate.shared.weight @ x).softmax(0) * shared
                scales = [2 * a1 * each for each in s] + [2 * a2 * each for each in g]
            outputs = []
            for head in range(HEADS):
                own = slice(head * size, (head + 1) * size)
                weight = (key[row, :, own] @ query[row, token, own] / size**0.5).softmax(0)
                outputs.append(scales[head] * (weight @ value[row, :, own]))
            made[row, token] = attention.out_proj.weight @ torch.cat(outputs) + attention.out_proj.bias
    return made


@pytest.mark.parametrize(
    "settings", [{}, {"init": "released"}, {"routing": "topk", "top_k": 2}], ids=["relu", "released", "topk"]
)
@torch.no_grad()
def test_it_is_the_equations(settings):
    attention, x_BLE = multihead(), inputs(2, 4, WIDTH)
    heads = open_up(RoutedHeads(attention, 5, **settings), std=0.4)
    expected = naive(attention, heads.gate, x_BLE, heads.routing)
    close(heads(x_BLE, x_BLE, x_BLE, need_weights=False)[0], expected, 2e-5)
    close(heads.eval()(x_BLE, x_BLE, x_BLE, need_weights=False)[0], expected, 2e-5)


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(0, 50), st.sampled_from(["relu", "topk"]))
def test_heads_that_are_left_out_make_no_difference(batch, length, block, seed, routing):
    heads = open_up(RoutedHeads(multihead(), 3, routing=routing, block=block), seed=seed, start=-0.5).eval()
    x_BLE = inputs(batch, length, WIDTH, seed=seed)
    with torch.no_grad():
        spared = heads(x_BLE, x_BLE, x_BLE, need_weights=False)[0]
        heads.skip = False
        whole = heads(x_BLE, x_BLE, x_BLE, need_weights=False)[0]
    close(spared, whole, 1e-5)


def test_scales_add_up():
    heads = open_up(RoutedHeads(multihead(), 5))
    x_BLE = inputs(2, 4, WIDTH)
    scale_BLH = heads.decide(x_BLE).scale_BLH
    # a1 + a2 = 1, c = 2.
    a1 = scale_BLH[..., 0] / 2
    g_BLM = heads.gate.router.score.activate(heads.gate.router.score.project(x_BLE.flatten(0, 1), None)).view(2, 4, 3)
    close(scale_BLH[..., 5:], 2 * (1 - a1).unsqueeze(-1) * g_BLM)


def test_what_is_off_is_not_computed_and_the_report_says_so():
    heads = RoutedHeads(multihead(), 4, block=16).eval()
    x_BLE = inputs(1, 32, WIDTH)
    with torch.no_grad():
        # Head 4 is off for good, head 5 in the second block, by the first number of a token.
        heads.gate.router.score.bias.copy_(torch.tensor([-1.0, 0.0, 1.0, 1.0]))
        heads.gate.router.score.weight[1, 0] = 1.0
        x_BLE[0, :, 0] = torch.tensor([2.0, -1, 2, 2] * 4 + [-1.0] * 16)
        heads(x_BLE, x_BLE, x_BLE, need_weights=False)
    told = heads.report()
    assert told["by_head"] == [1.0] * 4 + [0.0, 3 / 8, 1.0, 1.0]
    assert told["activation"] == pytest.approx((0 + 3 / 8 + 2) / 4)
    # 8 heads of 32 tokens, less 32 of head 4 and 16 of head 5.
    assert told["computed"] == pytest.approx(208 / 256)
    core, products, stores = 2 * 32 * 32 * WIDTH, 2 * 32 * WIDTH**2, 2 * 32 * WIDTH**2
    assert told["saved"] == pytest.approx(core * 48 / 256 / (core + products + stores), abs=1e-4)
    assert (told["tokens"], told["target"], told["heads"], told["shared"]) == (32, 0.5, 8, 4)
    heads.forget()
    assert (heads.report()["by_head"], heads.report()["saved"]) == (None, None)


def test_products_of_many_tokens_are_spared_too():
    heads = RoutedHeads(multihead(), 2, block=64).eval()
    with torch.no_grad():
        heads.gate.router.score.bias.copy_(torch.tensor([-1.0, -1, -1, 1, 1, 1]))
        x_BLE = inputs(2, 256, WIDTH)
        spared = heads(x_BLE, x_BLE, x_BLE, need_weights=False)[0]
        assert heads.report()["saved"] == pytest.approx(3 / 8 * (1 - 2 * WIDTH / (4 * WIDTH + 512)), abs=0.02)
        heads.skip = False
        close(heads(x_BLE, x_BLE, x_BLE, need_weights=False)[0], spared, 1e-5)


def test_padding_is_not_routed_and_counts_for_nothing():
    heads = RoutedHeads(multihead(), 5).train()
    x_BLE, padding = inputs(2, 5, WIDTH), torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    heads(x_BLE, x_BLE, x_BLE, key_padding_mask=padding)
    assert heads.report()["tokens"] == 8
    assert heads.report()["by_head"] == [1.0] * 8


@torch.no_grad()
def test_wrapping_changes_real_rows_of_a_padded_batch_by_nothing_and_turns_routed_heads_of_padding_off():
    attention = multihead()
    x_BLE, padding = inputs(2, 5, WIDTH), torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    plain = attention(x_BLE, x_BLE, x_BLE, key_padding_mask=padding)[0]
    heads = RoutedHeads(attention, 5).eval()
    routed = heads(x_BLE, x_BLE, x_BLE, key_padding_mask=padding)[0]
    close(routed[~padding], plain[~padding])
    # What the shared heads alone give.
    attention.out_proj.weight[:, 5 * WIDTH // 8 :] = 0
    close(routed[padding], attention(x_BLE, x_BLE, x_BLE, key_padding_mask=padding)[0][padding])


# Losses


def test_losses_are_of_the_passes_since_the_last_call():
    heads = RoutedHeads(multihead(), 5, target=0.2, control=RateBalance.Config(beta0=0.1))
    x_BLE = inputs(2, 5, WIDTH)
    assert heads.train().losses() == 0
    heads(x_BLE, x_BLE, x_BLE)
    # All three are on and weigh 1.
    assert heads.losses().item() == pytest.approx(0.3)
    assert heads.losses() == 0
    heads(x_BLE, x_BLE, x_BLE)
    heads(x_BLE, x_BLE, x_BLE)
    total = heads.losses()
    assert total.item() == pytest.approx(0.6)
    total.backward()
    assert (heads.gate.router.score.bias.grad > 0).all()
    heads.eval()(x_BLE, x_BLE, x_BLE)
    assert heads.losses() == 0


def test_the_balance_loss_of_topk_is_that_of_moh():
    heads = open_up(RoutedHeads(multihead(), 4, routing="topk", top_k=2, balance=0.01)).train()
    x_BLE = inputs(3, 7, WIDTH)
    heads(x_BLE, x_BLE, x_BLE)
    p_NM = (x_BLE.flatten(0, 1) @ heads.gate.router.score.weight.T).softmax(-1)
    chosen_NM = torch.zeros_like(p_NM).scatter(1, p_NM.topk(2).indices, 1.0)
    expected = 0.01 * (p_NM.mean(0) * chosen_NM.mean(0)).mean() * 4**2
    close(heads.losses(), expected)


def test_who_forgets_the_losses_is_told():
    heads, x_BLE = RoutedHeads(multihead(), 5).train(), inputs(1, 2, WIDTH)
    for _ in range(64):
        heads(x_BLE, x_BLE, x_BLE)
    with pytest.warns(UserWarning, match="nobody takes the losses of routed heads in layer 0"):
        heads(x_BLE, x_BLE, x_BLE)


def test_checkpointed_passes_are_counted_once():
    heads, x_BLE = RoutedHeads(multihead(), 5).train(), inputs(2, 5, WIDTH).requires_grad_()
    y = torch.utils.checkpoint.checkpoint(lambda x: heads(x, x, x)[0], x_BLE, use_reentrant=False)
    (y.sum() + heads.losses()).backward()
    assert heads.losses() == 0
    assert heads.report()["tokens"] == 10
    (balance,) = heads.gate.router.balance
    assert float(balance.num_pairs) == 30


# Copies and places


def test_copies_and_files_keep_what_it_knows():
    heads = open_up(RoutedHeads(multihead(), 5)).train()
    x_BLE = inputs(2, 5, WIDTH)
    heads(x_BLE, x_BLE, x_BLE)
    heads.gate.router.balance[0].on_step(1, 1.0)
    heads(x_BLE, x_BLE, x_BLE)
    other = RoutedHeads(multihead(), 5).train()
    other.load_state_dict(heads.state_dict())
    expected = heads(x_BLE, x_BLE, x_BLE)[0]
    for twin in (copy.deepcopy(heads), pickle.loads(pickle.dumps(heads)), other):
        close(twin(x_BLE, x_BLE, x_BLE)[0], expected)
        assert torch.equal(twin.gate.router.balance[0].pressure.beta, heads.gate.router.balance[0].pressure.beta)
    assert float(other.gate.router.balance[0].pressure.beta) != pytest.approx(1e-8)


def test_half_precision():
    heads = RoutedHeads(multihead(), 5).bfloat16().train()
    x_BLE = inputs(2, 5, WIDTH).bfloat16()
    y, _ = heads(x_BLE, x_BLE, x_BLE)
    assert y.dtype == torch.bfloat16
    assert torch.isfinite(heads.losses())
    assert heads.gate.router.balance[0].pressure.beta.dtype == torch.float32


def test_it_is_recorded_as_other_routers_are():
    model = nn.ModuleList([open_up(RoutedHeads(multihead(), 5, layer=number), seed=number) for number in range(2)])
    x_BLE = inputs(2, 3, WIDTH)
    with torch.no_grad(), record_routing(model, scores=True) as recorder:
        for _ in range(2):
            for heads in model:
                heads(x_BLE, x_BLE, x_BLE)
    trace = recorder.trace()
    assert [(layer.name, layer.num_destinations) for layer in trace.layers] == [
        ("0.gate.router", 3),
        ("1.gate.router", 3),
    ]
    for number, heads in enumerate(model):
        decisions = trace.decisions(number)
        assert decisions.item_N.tolist() == [
            row for pass_ in range(2) for row in (2 * pass_,) * 3 + (2 * pass_ + 1,) * 3
        ]
        assert decisions.position_N.tolist() == [0, 1, 2] * 4
        on = (trace.load_E(number) / 12).tolist()
        assert heads.report()["by_head"][5:] == pytest.approx(on)


class Own(nn.Module):
    """Somebody's attention that says what its heads give."""

    def __init__(self):
        super().__init__()
        self.num_heads = 4
        self.into, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def per_head(self, x_BLW, some=None):
        return self.into(x_BLW).unflatten(-1, (4, 2)).transpose(1, 2)

    def forward(self, x_BLW):
        return self.out(self.per_head(x_BLW).transpose(1, 2).flatten(2))


def test_anything_that_says_what_its_heads_give():
    attention, x_BLW = Own(), inputs(2, 3, 8)
    heads = RoutedHeads(attention, 2)
    close(heads(x_BLW), attention(x_BLW))
    with torch.no_grad():
        heads.gate.router.score.bias.fill_(-1.0)
    expected = attention.out(torch.cat([attention.into(x_BLW)[..., :4], torch.zeros(2, 3, 4)], -1))
    close(heads.eval()(x_BLW), expected)


def test_what_others_look_at_is_the_attentions():
    heads = RoutedHeads(multihead(), 5)
    assert (heads.num_heads, heads.embed_dim, heads.batch_first) == (HEADS, WIDTH, True)
    with pytest.raises(AttributeError):
        heads.on_step  # noqa: B018
    assert heads.unwrap() is heads.attention
    assert "5 shared, routing='relu'" in repr(heads)


# Bad input


class NoHeads(Attention):
    """Does not say what its heads give."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RoutedHeads(multihead(), 8), "num_shared is 8, but the attention has 8 heads"),
        (lambda: RoutedHeads(multihead(), 9), "num_shared is 9, but the attention has 8 heads"),
        (lambda: RoutedHeads(multihead(), -1), "num_shared is -1"),
        (lambda: RoutedHeads(multihead(), 2.5), "num_shared is 2.5"),
        (lambda: RoutedHeads(multihead(), 5, routing="softmax"), "routing is 'softmax'; it must be 'relu', 'topk' or"),
        (lambda: RoutedHeads(multihead(), 5, routing="topk", top_k=4), "top_k is 4, but 3 heads are routed"),
        (lambda: RoutedHeads(multihead(), 5, top_k=0), "top_k is 0"),
        (lambda: RoutedHeads(multihead(), 5, target=0.0), "target is 0.0"),
        (lambda: RoutedHeads(multihead(), 5, target=1.0), "target is 1.0"),
        (lambda: RoutedHeads(multihead(), 5, target=math.nan), "target is nan"),
        (lambda: RoutedHeads(multihead(), 5, init="zeros"), "init is 'zeros'"),
        (lambda: RoutedHeads(multihead(), 5, block=0), "block is 0"),
        (lambda: RoutedHeads(multihead(), 5, balance=-1.0), "balance is -1.0"),
        (lambda: RoutedHeads(nn.Linear(4, 4), 1), "a Linear has no heads that can be routed"),
        (lambda: RoutedHeads("attention", 1), "a str has no heads that can be routed"),
        (lambda: RoutedHeads(RoutedHeads(multihead(), 5), 5), "routed heads already"),
        (lambda: RoutedHeads(NoHeads(), 1), "does not say what each of its heads gives"),
        (lambda: RoutedAttention.Config(heads=HeadRouting(num_shared=4)), "num_shared is 4, but the attention has 4"),
        (
            lambda: RoutedAttention.Config(attention=RoutedAttention.Config(heads=HeadRouting(num_shared=2))),
            "routed heads already",
        ),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": inputs(2, 5, 31)}, "query has 31 numbers of each position; the attention takes 32"),
        ({"query": inputs(2, 2, 5, WIDTH)}, "query has shape"),
        ({"query": inputs(5, WIDTH)}, "key has shape"),
        ({"query": inputs(3, 5, WIDTH)}, "query has 3 sequences and key 2"),
        ({"value": inputs(2, 6, WIDTH)}, "they are of the same positions"),
        ({"query": None}, "query is NoneType"),
        ({"attn_mask": torch.zeros(4, 5)}, r"attn_mask has shape \[4, 5\]"),
        ({"attn_mask": torch.zeros(5, 5, dtype=torch.int64)}, "attn_mask is torch.int64"),
        ({"key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)}, r"key_padding_mask has shape \[2, 4\]"),
        ({"is_causal": True}, "is_causal is a hint about attn_mask"),
        ({"mask": None}, "not mask"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:20],
)
def test_bad_calls(change, message):
    heads = RoutedHeads(multihead(), 5)
    x_BLE = inputs(2, 5, WIDTH)
    with pytest.raises(InputError, match=message):
        heads(**{"query": x_BLE, "key": x_BLE, "value": x_BLE, **change})


def test_numbers_that_are_none_are_refused():
    heads = RoutedHeads(multihead(), 5)
    x_BLE = inputs(2, 5, WIDTH)
    x_BLE[1, 2, 3] = math.nan
    with pytest.raises(Exception, match=r"the router of layer 0 has NaN scores.*row 1") as found:
        heads(x_BLE, x_BLE, x_BLE)
    assert type(found.value).__name__ == "NotFiniteError"


# Ours


@pytest.mark.parametrize(
    "config",
    [
        SelfAttention.Config(num_heads=4, num_kv_heads=2),
        SelfAttention.Config(num_heads=4, qk_norm="full"),
        LatentAttention.Config(),
    ],
    ids=["grouped", "normed", "latent"],
)
def test_ours_are_wrapped_alone_too(config):
    context = BuildContext(dim=WIDTH, layer=3, generator=torch.Generator().manual_seed(0))
    heads = RoutedHeads(config.build(context), 3)
    assert (heads.layer, heads.gate.width, heads.gate.router.layer) == (3, WIDTH, 3)
