"""Adapters in the compiled step: what the merged matrices compute, each row its own, to the bit in any company."""

import copy

import numpy as np
import pytest
import torch

from anabranch.errors import ConfigError, InputError
from anabranch.experts.chain import Chain
from anabranch.lm.decoder import Decoder
from anabranch.nn import MoE, SelfAttention, SwiGLU, kernels
from anabranch.nn.quantize import quantize
from anabranch.routing import Router, TopK
from anabranch.serving.fast import FastDecoder
from anabranch.serving.fast.adapters import AdapterUses

pytestmark = pytest.mark.skipif(kernels.load() is None, reason="no compiler")
BLOCK, DIM, HIDDEN, LAYERS = 4, 64, 96, 3
EXPERTS = {"num_experts": 4, "hidden_dim": 64, "router": Router.Config(select=TopK.Config(top_k=2))}
MODELS = {
    "plain": {},
    "grouped, norms, biases": {
        "attention": SelfAttention.Config(num_heads=4, num_kv_heads=2, qk_norm="head", qkv_bias=True, out_bias=True)
    },
    "a dense layer among experts": {
        "feed_forward": MoE.Config(**EXPERTS, shared_experts=1),
        "dense_layers": (1,),
        "dense_feed_forward": SwiGLU.Config(hidden_dim=HIDDEN),
    },
    "chain": {"feed_forward": Chain.Config(**EXPERTS, iterations=2)},
}
# By part: the module whose matrix it is in, and where its rows begin and end (of keys and values for as many heads as queries).
MATRICES = {"q": "attention.qkv", "k": "attention.qkv", "v": "attention.qkv", "o": "attention.out"}
DENSE = {"gate": "feed_forward.w13", "up": "feed_forward.w13", "down": "feed_forward.w2"}


def build(name):
    fields = {
        "attention": SelfAttention.Config(num_heads=4),
        "feed_forward": SwiGLU.Config(hidden_dim=HIDDEN),
        **MODELS[name],
    }
    config = Decoder.Config(vocab_size=100, dim=DIM, num_layers=LAYERS, init_std=0.15, **fields)
    return config.build(seed=5).eval().requires_grad_(False)


def rows_of(model, layer, part):
    """(the matrix, its rows that are the part's)."""
    block = model.blocks[layer]
    matrix = block.get_submodule({**MATRICES, **DENSE}[part])
    query, store = (
        heads * block.attention.head_dim for heads in (block.attention.num_heads, block.attention.num_kv_heads)
    )
    starts = {"q": (0, query), "k": (query, query + store), "v": (query + store, query + 2 * store)}
    starts |= {"gate": (0, HIDDEN), "up": (HIDDEN, 2 * HIDDEN)}
    return matrix, slice(*starts.get(part, (0, matrix.out_features)))


def parts_of(model, words, rank, seed, scale=0.5):
    """An adapter's parts: of all layers that have them, ranks differing from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for layer in range(LAYERS):
        is_dense = isinstance(model.blocks[layer].feed_forward, SwiGLU)
        for word in words:
            if word in DENSE and not is_dense:
                continue
            matrix, rows = rows_of(model, layer, word)
            place = "feed_forward" if word in DENSE else "attention"
            a = torch.randn(rank + layer, matrix.in_features, generator=generator) * 0.1
            b = torch.randn(rank + layer, rows.stop - rows.start, generator=generator) * 0.1
            made[f"blocks.{layer}.{place}.{word}"] = a, b, scale
    return made


def merged(model, mixture):
    """The model whose matrices hold the weighted sum."""
    model = copy.deepcopy(model)
    for parts, weight in mixture:
        for name, (a, b, scale) in parts.items():
            _, layer, _, word = name.split(".")
            matrix, rows = rows_of(model, int(layer), word)
            matrix.weight[rows] += weight * scale * (b.T @ a)
    return model


def fast_of(model, slots=64):
    attention = model.blocks[0].attention
    shape = (LAYERS, slots * BLOCK, attention.num_kv_heads, attention.head_dim)
    return FastDecoder(model, torch.zeros(shape), torch.zeros(shape), block_tokens=BLOCK)


@torch.inference_mode()
def run(fast, sequences, used=None, uses=None):
    """x_TD of sequences that begin, with the adapters of each, [(parts, weight)], or what the step is told of them."""
    rows, table, positions, first = [], [], [], 0
    for tokens in sequences:
        rows.append((first, len(tokens), 0, len(table)))
        table += range(len(table), len(table) - (-len(tokens) // BLOCK))
        positions += range(len(tokens))
        first += len(tokens)
    adapters = uses
    if used is not None:
        tables = [[(fast.adapters.table(parts), weight) for parts, weight in mixture] for mixture in used]
        adapters = AdapterUses(tables, [len(tokens) for tokens in sequences])
    token_T = torch.tensor([token for tokens in sequences for token in tokens])
    return fast.hidden(
        token_T, torch.tensor(positions), np.array(rows, np.int64), np.array(table, np.int32), adapters=adapters
    )[0]


def sequences_of(*lengths):
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(0, 100, (length,), generator=generator).tolist() for length in lengths]


def adapters_of(model):
    return {
        "all": parts_of(model, (*MATRICES, *DENSE), 5, 1),
        "few": parts_of(model, ("q", "v"), 1, 2, scale=-2.0),
        "wide": parts_of(model, ("o", "gate", "down"), 16, 3),
        "none": {},
    }


@pytest.mark.parametrize("name", MODELS)
def test_it_is_what_merged_matrices_compute(name):
    model, given = build(name), sequences_of(9, 1, 30, 12, 7)
    adapters = adapters_of(model)
    used = [
        [],
        [(adapters["few"], 1.0)],
        [(adapters["all"], 0.7), (adapters["few"], -0.3)],
        [(adapters["wide"], 2.0)],
        [(adapters["none"], 1.0)],
    ]
    found = run(fast_of(model), given, used).split([len(tokens) for tokens in given])
    for x_TD, tokens, mixture in zip(found, given, used, strict=True):
        wanted = run(fast_of(merged(model, mixture)), [tokens])
        torch.testing.assert_close(x_TD, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    plain = run(fast_of(model), given).split([len(tokens) for tokens in given])
    assert torch.equal(plain[0], found[0])
    assert torch.equal(plain[4], found[4])
    for number in (1, 2, 3):
        assert (plain[number] - found[number]).abs().max() > 0.01


def rounded(parts):
    """The numbers in bfloat16, and as float32 what they are then."""
    half = {name: (a.bfloat16(), b.bfloat16(), scale) for name, (a, b, scale) in parts.items()}
    return half, {name: (a.float(), b.float(), scale) for name, (a, b, scale) in half.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_in_bfloat16_are_summed_in_float32(dtype):
    """To the bit what the same numbers in float32 give: nothing is rounded but the numbers, once."""
    model, given = build("plain").to(dtype), sequences_of(1, 1, 30, 5)
    half, wide = zip(*(rounded(parts) for parts in adapters_of(model).values()), strict=True)
    used = [[(0, 0.7)], [(1, 1.0), (2, -0.5)], [(0, 1.0)], []]
    found, wanted = (
        run(fast_of(model), given, [[(of[place], weight) for place, weight in mixture] for mixture in used])
        for of in (half, wide)
    )
    assert torch.equal(found, wanted)
    assert not torch.equal(found, run(fast_of(model), given))


def test_one_adapter_twice_in_a_row_counts_as_often():
    model, given = build("plain"), sequences_of(7, 3)
    fast = fast_of(model)
    table = fast.adapters.table(adapters_of(model)["all"])
    lengths = [len(tokens) for tokens in given]
    uses = [AdapterUses(used, lengths) for used in ([[(table, 0.25), (table, 0.5)], []], [[(table, 0.75)], []])]
    assert [one.lows for one in uses] == [uses[0].lows] * 2
    twice, once = (run(fast, given, uses=one) for one in uses)
    assert torch.equal(twice, once)


def test_the_order_in_which_a_mixture_is_named_is_of_no_account():
    model, given = build("plain"), sequences_of(7, 3)
    fast, adapters = fast_of(model), adapters_of(model)
    one, two = (fast.adapters.table(adapters[name], name) for name in ("all", "few"))
    lengths = [len(tokens) for tokens in given]
    orders = ([(one, 0.3), (two, 0.9)], [(two, 0.9), (one, 0.3)])
    found = [run(fast, given, uses=AdapterUses([order, []], lengths)) for order in orders]
    assert torch.equal(*found)


@pytest.mark.parametrize("bits", [None, "int8"])
def test_rows_are_the_same_to_the_bit_in_any_company(bits):
    model, given = build("plain"), sequences_of(9, 1, 30, 12)
    adapters = adapters_of(model)
    huge = {name: (a, b * 1e30, scale) for name, (a, b, scale) in adapters["all"].items()}
    used = [[(adapters["all"], 1.0)], [], [(huge, 1e9)], [(adapters["few"], 0.5), (adapters["wide"], 0.5)]]
    if bits is not None:
        quantize(model, bits)
    fast = fast_of(model)
    found = run(fast, given, used).split([len(tokens) for tokens in given])
    for number, x_TD in enumerate(found):
        if number == 2:
            assert not torch.isfinite(x_TD).all()
        else:
            assert torch.equal(x_TD, run(fast, [given[number]], [used[number]]))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(found[3], run(fast, given, used).split([len(tokens) for tokens in given])[3])
    finally:
        torch.set_num_threads(before)


def test_what_the_step_cannot_add_to():
    fast = fast_of(build("a dense layer among experts"))
    a, b = torch.zeros(2, DIM), torch.zeros(2, DIM)
    for name in ("blocks.0.feed_forward.up", "blocks.0.feed_forward.shared.up", "blocks.3.attention.q", "head"):
        assert not fast.adapters.takes({name: (a, b, 1.0)})
        with pytest.raises(ConfigError, match=f"cannot add to {name}"):
            fast.adapters.table({name: (a, b, 1.0)})
    for wrong in (
        (a[:, :-1], b),
        (a, b[:, :-1]),
        (a, b[:1]),
        (a.double(), b),
        (a, b.bfloat16()),
        (a.T.contiguous().T, b),
    ):
        with pytest.raises(InputError):
            fast.adapters.table({"blocks.0.attention.q": (*wrong, 1.0)})
