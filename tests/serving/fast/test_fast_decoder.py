"""The compiled step against the ordinary path: same numbers, same greedy streams, rows that do not depend on each other."""

import gc
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from anabranch.config import configclass
from anabranch.errors import ConfigError, DataError, InputError
from anabranch.experts.chain import Chain
from anabranch.experts.parscale import ParScale
from anabranch.experts.rexmoe import ProgressiveScaling, ReXMoE
from anabranch.experts.rmoe import RecurrentScore
from anabranch.experts.versatile import VersatileFFN, record_difficulty
from anabranch.heads import HeadRouting, RoutedAttention
from anabranch.lm.decoder import Decoder
from anabranch.lm.generate import SamplingConfig, generate
from anabranch.nn import BuildContext, Dense, MoE, SelfAttention, SwiGLU, kernels
from anabranch.nn.description import passes_as
from anabranch.nn.linear import Projection
from anabranch.nn.packed import Packed
from anabranch.nn.parted import PartedLinear
from anabranch.nn.parts import Parts
from anabranch.nn.quantize import FewBitLinear, QuantizedLinear, QuantizedPool, quantize, replace
from anabranch.routing import CosineScore, LinearScore, Router, TopK
from anabranch.routing.bias import BiasBalancer
from anabranch.routing.record import record_routing
from anabranch.serving.expertflow import find_pools, offload
from anabranch.serving.expertflow.tiers import MemoryTier
from anabranch.serving.fast import FastDecoder

pytestmark = pytest.mark.skipif(kernels.load() is None, reason="no compiler")

BLOCK = 4


def moe(activation="softmax", normalize="none", scale=1.0, top_k=2, balance=(), kind=MoE, score=None, **fields):
    router = Router.Config(
        score=score or LinearScore.Config(activation=activation),
        select=TopK.Config(top_k=top_k, normalize=normalize, scale=scale),
        balance=balance,
    )
    return kind.Config(num_experts=6, hidden_dim=64, router=router, **fields)


def recurrent(state_dim=32, **fields):
    return RecurrentScore.Config(state_dim=state_dim, **fields)


OTHERS = Router.Config(
    score=LinearScore.Config(activation="sigmoid"),
    select=TopK.Config(top_k=3, normalize="sum"),
    balance=(BiasBalancer.Config(),),
)


def routed(num_shared, *, routing="relu", top_k=2, init="preserve", **attention):
    heads = HeadRouting(num_shared=num_shared, routing=routing, top_k=top_k, init=init)
    return RoutedAttention.Config(attention=SelfAttention.Config(**attention), heads=heads)


MODELS = {
    "plain": {"attention": SelfAttention.Config(num_heads=4)},
    "grouped, tied": {
        "attention": SelfAttention.Config(num_heads=6, num_kv_heads=2, head_dim=32),
        "tie_embeddings": True,
    },
    "biases, norms of heads": {
        "attention": SelfAttention.Config(num_heads=4, num_kv_heads=2, qk_norm="head", qkv_bias=True, out_bias=True)
    },
    "norms of all, clipped": {"attention": SelfAttention.Config(num_heads=4, qk_norm="full", clip_qkv=0.8)},
    "mixture": {"feed_forward": moe()},
    "mixture, sigmoid": {
        "feed_forward": moe("sigmoid", "sum", 2.5, 3, (BiasBalancer.Config(),), shared_experts=2, shared_gate=True),
        "dense_layers": (0,),
        "dense_feed_forward": SwiGLU.Config(hidden_dim=160),
    },
    "mixture, others": {"feed_forward": moe("sqrt_softplus", "softmax", top_k=1, shared_experts=1)},
    "pools of layers": {
        "feed_forward": moe(
            kind=ReXMoE, reuse=2, depth_embedding=True, pool_bias=True, balance=(BiasBalancer.Config(),)
        )
    },
    "recurrent": {
        "feed_forward": moe(score=recurrent()),
        "dense_layers": (1,),
        "dense_feed_forward": SwiGLU.Config(hidden_dim=160),
    },
    "recurrent, nothing handed on": {"feed_forward": moe(score=recurrent(16, passing=False, shared_projector=True))},
    "chain": {"feed_forward": moe(kind=Chain, iterations=3, shared_experts=1, shared_gate=True)},
    "chain, all at once": {
        "feed_forward": moe(kind=Chain, reuse=3, depth_embedding=True, independent_gates=False, score=recurrent())
    },
    "wide and deep": {"feed_forward": VersatileFFN.Config(hidden_dim=96, num_experts=6)},
    "wide and deep, overlapping": {
        "feed_forward": VersatileFFN.Config(
            hidden_dim=96, num_experts=4, expert_dim=40, overlap=True, max_loops=3, width_threshold=0.5, router=OTHERS
        ),
        "dense_layers": (1,),
        "dense_feed_forward": SwiGLU.Config(hidden_dim=160),
    },
    # The heads of one key head are all routed.
    "routed heads": {"attention": routed(2, num_heads=6, num_kv_heads=2, head_dim=32, qk_norm="head", qkv_bias=True)},
    "routed heads, as many": {
        "attention": routed(1, num_heads=4, qk_norm="full", routing="topk", top_k=2),
    },
    "routed heads, all of them": {"attention": routed(0, num_heads=4, num_kv_heads=1, clip_qkv=0.8, init="released")},
    "routed heads, most": {"attention": routed(1, num_heads=8, head_dim=16, routing="topk", top_k=7)},
}


def build(name, bits=None):
    fields = {"feed_forward": SwiGLU.Config(hidden_dim=96), **MODELS[name]}
    model = Decoder.Config(vocab_size=100, dim=64, num_layers=3, **fields).build(seed=5).eval()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():  # initial weights are so small that nothing shows
            noise = torch.randn(parameter.shape, generator=generator)
            wide = parameter * 4 if parameter.any() else noise  # gates of heads begin at 0
            parameter.copy_(wide if parameter.dim() > 1 else parameter + 0.1 * noise)
        for key, buffer in model.named_buffers():
            if key.endswith("bias_E"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    if bits:
        quantize(model, "int4" if bits == "parts" else bits)
    if bits == "parts":
        in_parts(model, True)
    return model


def in_parts(model, is_mixed):
    """Matrices that are fused of several become parts, in place: the first rows as they are, the last in int8 if ``is_mixed``."""
    for name, module in list(model.named_modules()):
        if name.endswith((".qkv", ".w13")) and isinstance(module, QuantizedLinear):
            replace(model, name, PartedLinear(split(module.packed, is_mixed), module.bias))
        elif isinstance(module, QuantizedPool):
            w13, w2 = module.packed
            replace(model, name, QuantizedPool(Parts.of(split(w13, is_mixed)), w2))


def split(packed, is_mixed):
    panels = packed.rows // 16 - 1
    first = Packed(packed.data[:, :panels].clone(), 16 * panels, packed.depth, packed.kind, packed.group)
    last = Packed(packed.data[:, panels:].clone(), 16, packed.depth, packed.kind, packed.group)
    return [first, Packed.pack(last.unpack(), "int8", group=32) if is_mixed else last]


class Sequences:
    """A store of a model's own, with the blocks of sequences scattered over it."""

    def __init__(self, model, dtype=torch.float32, blocks=64, **options):
        attention = model.blocks[0].attention
        shape = (len(model.blocks), blocks * BLOCK, attention.num_kv_heads, attention.head_dim)
        self.key, self.value = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
        self.fast = FastDecoder(model, self.key, self.value, block_tokens=BLOCK, **options)
        self.free = torch.randperm(blocks, generator=torch.Generator().manual_seed(7)).tolist()
        self.blocks, self.length = {}, {}

    @torch.inference_mode()
    def run(self, chunks, **options):
        """[(id, tokens)] -> (logits of all rows, routes)."""
        sequence, table, positions, first = [], [], [], 0
        for id, tokens in chunks:
            past, own = self.length.get(id, 0), self.blocks.setdefault(id, [])
            self.length[id] = past + len(tokens)
            while len(own) * BLOCK < self.length[id]:
                own.append(self.free.pop())
            sequence.append((first, len(tokens), past, len(table)))
            table += own
            positions += range(past, self.length[id])
            first += len(tokens)
        token_T = torch.tensor([token for _, tokens in chunks for token in tokens])
        x_TD, routes = self.fast.hidden(
            token_T, torch.tensor(positions), np.array(sequence, np.int64), np.array(table, np.int32), **options
        )
        return self.fast.logits(x_TD), routes


OFFLOADED = ["mixture", "mixture, sigmoid", "pools of layers", "recurrent", "chain, all at once"]


@contextmanager
def quarter(model, **options):
    """The model with a quarter of its experts in slots (or the fewest that suffice), the others in memory; the engine."""
    layout = find_pools(model).layout
    least = layout.least_bytes(options.get("policy") == "cache_moe")
    with offload(model, max(layout.total_bytes // 4, least), **options) as engine:
        yield engine


def prompts(*lengths):
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(0, 100, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def ordinary(model, tokens):
    return model(torch.tensor([tokens])).logits_BLV[0].float()


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_ordinary_path(name):
    model = build(name)
    given = prompts(9, 1, 70)
    logits, _ = Sequences(model).run(list(enumerate(given)))
    wanted = torch.cat([ordinary(model, tokens) for tokens in given])
    assert wanted.std() > 0.1
    assert torch.allclose(logits, wanted, atol=1e-4)


@pytest.mark.parametrize("bits", [None, "int8", "int4"])
@pytest.mark.parametrize("name", OFFLOADED)
def test_experts_that_come_when_they_are_wanted_compute_the_same(name, bits):
    model = build(name)
    if bits is not None:
        assert any("experts" in layer for layer in quantize(model, bits))
    given = prompts(9, 1, 40)
    wanted, routes = Sequences(model).run(list(enumerate(given)), with_routes=True)
    with quarter(model) as engine:
        store = Sequences(model)
        engine.begin([])
        logits, found = store.run(list(enumerate(given)), with_routes=True)
        engine.begin([])
        more, none = store.run([(1, [7])])
        assert engine.cache.total().misses > 0
        assert engine.arena.bytes <= engine.budget_bytes
        kinds = {kind.forms and tuple(form[0][1] for form in kind.forms) for kind in engine.arena.kinds}
        assert kinds == {None if bits is None else (bits, bits)}
    assert torch.allclose(logits, wanted, rtol=0, atol=1e-5)
    assert torch.equal(found, routes)
    assert none is None
    # Rows of activations are rounded by other code in the two ways.
    assert torch.allclose(more, ordinary(model, [*given[1], 7])[-1:], atol=1e-4 if bits is None else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_resident_changes_no_bits(dtype):
    model = build("mixture, sigmoid").to(dtype)
    given, found = prompts(33, 5, 14), []
    wanted, _ = Sequences(model, dtype).run(list(enumerate(given)))
    for options in ({}, {"policy": "cache_moe", "predictor": None}, {"policy": "lru", "predictor": "slp"}):
        with quarter(model, **options) as engine:
            store = Sequences(model, dtype)
            engine.begin([])
            found.append(store.run(list(enumerate(given)))[0])
            apart = Sequences(model, dtype, blocks=96)
            pieces = [(id, piece) for id, tokens in enumerate(given) for piece in (tokens[:3], tokens[3:]) if piece]
            engine.begin([])
            found.append(torch.cat([apart.run([piece])[0] for piece in pieces]))
    assert all(torch.equal(one, found[0]) for one in found)
    assert (found[0] - wanted).norm() / wanted.norm() < (1e-5 if dtype == torch.float32 else 2e-2)


def test_an_expert_that_cannot_be_loaded_fails_the_step_and_no_other():
    class Flaky(MemoryTier):
        is_broken = True

        def load(self, expert, slot):
            if self.is_broken:
                raise OSError("the disk has coughed")
            yield from super().load(expert, slot)

    model, tokens = build("mixture"), prompts(9)[0]
    wanted, _ = Sequences(model).run([(0, tokens)])
    tier = Flaky([(pool.w13, pool.w2) for pool in find_pools(model).pools])
    with quarter(model, tier=tier) as engine:
        engine.mover.retry_s = 1e-4
        engine.begin([])
        with pytest.raises(DataError, match="coughed"):
            Sequences(model).run([(0, tokens)])
        tier.is_broken = False
        engine.begin([])
        logits, _ = Sequences(model).run([(0, tokens)])
    assert torch.allclose(logits, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["grouped, tied", "biases, norms of heads", "mixture, sigmoid", "routed heads"])
def test_a_matrix_in_parts_of_one_form_gives_the_bits_of_the_whole(name):
    whole, parts = build(name, "int4"), build(name, "int4")
    in_parts(parts, False)
    assert any(isinstance(module, PartedLinear) for module in parts.modules())
    pools = [module for module in parts.modules() if isinstance(module, QuantizedPool)]
    assert all(isinstance(pool.packed[0], Parts) for pool in pools)
    assert bool(pools) == name.startswith("mixture")
    given = list(enumerate(prompts(9, 1, 40)))
    wanted, _ = Sequences(whole).run(given)
    for takes_weights in (False, True):
        steps = Sequences(parts, takes_weights=takes_weights)
        assert torch.equal(steps.run(given)[0], wanted)
        steps.fast.reread()
        assert torch.equal(steps.run([(f"again {id}", tokens) for id, tokens in given])[0], wanted)


@pytest.mark.parametrize("bits", ["int8", "int4", "parts"])
@pytest.mark.parametrize(
    "name",
    ["grouped, tied", "mixture, sigmoid", "pools of layers", "chain, all at once", "wide and deep", "routed heads"],
)
def test_quantised_models_round_alike(name, bits):
    model = build(name, bits)
    given = prompts(9, 12)
    logits, _ = Sequences(model).run(list(enumerate(given)))
    wanted = torch.cat([ordinary(model, tokens) for tokens in given])
    assert (logits - wanted).norm() / wanted.norm() < 1e-2  # an activation at a half may be rounded either way


def test_halves_are_near():
    model = build("biases, norms of heads")
    tokens = prompts(40)[0]
    wanted = ordinary(model, tokens)
    model.bfloat16()
    logits, _ = Sequences(model, torch.bfloat16).run([(0, tokens)])
    assert (logits - wanted).norm() / wanted.norm() < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("plain", None),
        ("mixture", None),
        ("mixture, sigmoid", "int4"),
        ("biases, norms of heads", "parts"),
        ("recurrent", None),
        ("chain, all at once", "int8"),
        ("routed heads", None),
        ("routed heads, as many", "int8"),
    ],
)
def test_a_row_has_the_same_bits_in_any_company(name, bits, dtype):
    model = build(name, bits)
    if dtype == torch.bfloat16:
        model.to(dtype)
    given = prompts(33, 5, 14, 1, 1, 22, 40, 147)  # the last over several chunks of keys
    together, _ = Sequences(model, dtype, blocks=96).run(list(enumerate(given)))
    apart = Sequences(model, dtype, blocks=96)
    found = []
    for id, tokens in enumerate(given):
        cut = len(tokens) // 3  # in two chunks, then token by token
        pieces = [tokens[:cut], tokens[cut : 2 * cut], *([token] for token in tokens[2 * cut :])]
        found += [apart.run([(id, piece)])[0] for piece in pieces if piece]
    assert torch.equal(together, torch.cat(found))


@pytest.mark.parametrize("name", ["mixture, sigmoid", "chain, all at once", "wide and deep", "routed heads"])
def test_threads_change_nothing(name):
    model, given = build(name), list(enumerate(prompts(13, 3, 5)))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, _ = Sequences(model).run(given)
        torch.set_num_threads(3)
        three, _ = Sequences(model).run(given)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, three)


@pytest.mark.parametrize(
    "name", ["grouped, tied", "mixture", "pools of layers", "chain", "recurrent", "wide and deep", "routed heads"]
)
def test_greedy_streams_are_those_of_generate(name):
    model, given = build(name), prompts(7, 3, 11)
    store, streams = Sequences(model), [list(tokens) for tokens in given]
    pending = list(enumerate(given))
    for _ in range(25):
        logits, _ = store.run(pending)
        ends = np.cumsum([len(tokens) for _, tokens in pending]) - 1
        new = logits[ends].argmax(-1).tolist()
        pending = [(id, [token]) for id, token in enumerate(new)]
        for stream, token in zip(streams, new, strict=True):
            stream.append(token)
    for tokens, stream in zip(given, streams, strict=True):
        wanted = generate(model, [tokens], SamplingConfig(max_tokens=25, temperature=0))[0]
        assert stream[len(tokens) :] == list(wanted)[-25:]


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("routed heads")])
def test_heads_are_weighed_as_by_the_modules(name):
    """Prompts in runs, short ones, and token by token; some heads are off for some tokens."""
    model, given = build(name), prompts(9, 1, 70)
    store = Sequences(model)
    logits = torch.cat([store.run([(id, tokens[:-3])])[0] for id, tokens in enumerate(given) if len(tokens) > 3])
    for _ in range(3):
        rows = [(id, [tokens[store.length.get(id, 0)]]) for id, tokens in enumerate(given) if len(tokens) > 3]
        logits = torch.cat((logits, store.run(rows)[0]))
    whole = [ordinary(model, tokens) for tokens in given if len(tokens) > 3]
    wanted = [*(one[:-3] for one in whole), *(torch.stack([one[at] for one in whole]) for at in (-3, -2, -1))]
    assert torch.allclose(logits, torch.cat(wanted), atol=1e-4)
    with record_routing(model) as recorder:
        ordinary(model, given[2])
    on = torch.as_tensor(recorder.trace().decisions(0).index_NK >= 0)
    assert on.any()
    assert not on.all() or "as many" in name or "most" in name


@pytest.mark.parametrize("threads", [1, 3])
def test_heads_that_are_off_are_not_computed(threads):
    """Neither their queries nor what they attend to: there is nothing but NaN, and nobody sees it."""
    model, tokens = build("routed heads"), prompts(21)[0]
    width, poisoned = 32, []
    with torch.no_grad():
        for block in model.blocks:
            # The last three heads have a key head of their own, whose keys and values are asked for by nobody.
            score, plain = block.attention.gate.router.score, block.attention.attention
            score.weight[1:] = 0
            score.bias[1:] = -1
            for begin, heads in ((3, 3), (6 + 1, 1), (6 + 2 + 1, 1)):
                poisoned.append(plain.qkv.bias[begin * width : (begin + heads) * width])
    wanted = ordinary(model, tokens)
    for part in poisoned:
        part.data.fill_(torch.nan)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        store = Sequences(model)
        logits = torch.cat(
            [store.run([(0, piece)])[0] for piece in (tokens[:13], tokens[13:15], *([t] for t in tokens[15:]))]
        )
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(logits, wanted, atol=1e-4)


def test_routes_of_heads_are_told_by_modules():
    assert not Sequences(build("routed heads, as many")).fast.tells_routes
    assert Sequences(build("mixture")).fast.tells_routes


def test_routes_are_those_of_the_routers():
    model, given = build("mixture, sigmoid"), prompts(6, 2)
    seen = {}
    store = Sequences(model)
    _, routes = store.run(list(enumerate(given)), with_routes=True)
    for number, block in enumerate(model.blocks[1:]):
        block.feed_forward.router.register_forward_hook(
            lambda _, __, routing, number=number: seen.setdefault(number, []).append(routing.index_NK)
        )
    for tokens in given:
        ordinary(model, tokens)
    assert store.fast.routed == [1, 2]
    assert routes.shape == (2, 8, 3)
    for number in range(2):
        assert torch.equal(routes[number].long(), torch.cat(seen[number]))


def test_each_pass_of_a_chain_has_its_routes():
    model, tokens = build("chain"), prompts(6)[0]
    seen = []
    store = Sequences(model)
    _, routes = store.run([(0, tokens)], with_routes=True)
    for block in model.blocks:
        for router in block.feed_forward.routers:
            router.register_forward_hook(lambda _, __, routing: seen.append(routing.index_NK))
    ordinary(model, tokens)
    assert store.fast.routed == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert torch.equal(routes.long(), torch.stack(seen))


def test_tokens_loop_as_often_as_their_gate_says():
    """The model that is tested above has tokens of every number of loops, with and without a width path."""
    model, tokens = build("wide and deep"), prompts(40)[0]
    with record_difficulty(model) as recorder, torch.no_grad():
        model(torch.tensor([tokens]))
    assert set(recorder.trace().decisions(0).index_NK.flatten().tolist()) == {0, 1, 2, 3}
    with record_routing(model) as recorder, torch.no_grad():
        model(torch.tensor([tokens]))
    _, routes = Sequences(model).run([(0, tokens)], with_routes=True)
    for layer, route_TK in enumerate(routes):
        assert torch.equal(route_TK.long(), torch.as_tensor(recorder.trace().decisions(layer).index_NK).long())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"attention": SelfAttention.Config(num_heads=8)}, "heads are 8 wide"),
        ({"feed_forward": SwiGLU.Config(hidden_dim=40)}, "40 inputs"),
        ({"feed_forward": moe(weight_on="input")}, "inputs"),
        ({"feed_forward": moe(score=CosineScore.Config())}, "scores by CosineScore"),
        ({"feed_forward": moe(score=recurrent(cell="lstm"))}, "not a gru"),
        ({"feed_forward": moe(score=RecurrentScore.Config(state_dim=24))}, "24 wide"),
        ({"feed_forward": moe(kind=Chain, residual="outer")}, "'outer'"),
        ({"feed_forward": moe(kind=Chain, norm="once")}, "'once'"),
        ({"feed_forward": VersatileFFN.Config(fusion="average")}, "'average'"),
        ({"streams": ParScale.Config(num_streams=2)}, "streams"),
    ],
)
def test_what_is_not_supported(fields, reason):
    model = Decoder.Config(dim=64, num_layers=1, **fields).build().eval()
    assert reason in FastDecoder.supports(model)
    with pytest.raises(ConfigError, match=reason):
        FastDecoder(model, torch.empty(1, 8, 1, 8), torch.empty(1, 8, 1, 8), block_tokens=4)


class Twice(MoE, kind="twice"):
    """A design that the compiled step has never heard of: the layer run twice by one router."""

    def add_to(self, x_BLD, norm, context):
        for _ in range(2):
            x_BLD = x_BLD + self(norm(x_BLD), context)
        return x_BLD

    def describe(self):
        return passes_as(MoE.describe(self), routers=(self.router, self.router))


class Silent(Twice, kind="silent"):
    """Computes something else and does not say so."""

    def add_to(self, x_BLD, norm, context):
        return x_BLD - self(norm(x_BLD), context)


class Halved(LinearScore, kind="halved"):
    """Computes something else and does not say so."""

    def project(self, x_ND, context):
        return super().project(x_ND, context) / 2


def test_a_design_takes_part_by_what_it_says_of_itself():
    model = Decoder.Config(vocab_size=100, dim=64, num_layers=2, init_std=0.2, feed_forward=moe(kind=Twice)).build()
    given, store = prompts(9, 3), Sequences(model.eval())
    logits, routes = store.run(list(enumerate(given)), with_routes=True)
    assert store.fast.routed == [0, 0, 1, 1]
    assert len(routes) == 4
    assert torch.allclose(logits, torch.cat([ordinary(model, tokens) for tokens in given]), atol=1e-4)


def test_what_a_class_inherits_does_not_describe_it():
    for layer, reason in (
        (moe(kind=Silent), "the feed-forward is a Silent"),
        (moe(score=Halved.Config()), "a router scores by Halved"),
    ):
        model = Decoder.Config(dim=64, num_layers=1, feed_forward=layer).build().eval()
        assert FastDecoder.supports(model) == f"layer 0: {reason}"


def test_candidates_that_stay_closed_when_serving():
    layer = moe(kind=ReXMoE, psr=ProgressiveScaling.Config(evaluate="current"))
    model = Decoder.Config(
        dim=64, num_layers=2, attention=SelfAttention.Config(num_heads=4), feed_forward=layer
    ).build()
    assert "candidates change" in FastDecoder.supports(model.eval())
    for block in model.blocks:
        block.feed_forward.router.candidates.on_step(100, 1.0)
    assert FastDecoder.supports(model) is None


def test_shared_experts_that_are_weighed_against_routed_ones_are_left_to_the_model():
    layer = moe(shared_experts=1, shared_weight=0.5)
    attention = SelfAttention.Config(num_heads=4)
    model = Decoder.Config(dim=64, num_layers=1, attention=attention, feed_forward=layer).build()
    assert "routed and shared experts are weighed against each other" in FastDecoder.supports(model.eval())


def test_a_bias_that_multiplies_scores_is_left_to_the_model():
    layer = MoE.Config(
        num_experts=4, hidden_dim=64, router=Router.Config(balance=(BiasBalancer.Config(form="multiply"),))
    )
    attention = SelfAttention.Config(num_heads=4)
    model = Decoder.Config(dim=64, num_layers=1, attention=attention, feed_forward=layer).build()
    assert "a router's bias depends on the scores" in FastDecoder.supports(model.eval())


def test_a_watched_or_foreign_model_is_not_supported():
    model = build("plain")
    assert FastDecoder.supports(model) is None
    handle = model.blocks[1].register_forward_hook(lambda *_: None)
    assert "blocks.1 is watched" in FastDecoder.supports(model)
    handle.remove()
    model.blocks[0].attention.out = torch.nn.Identity()
    assert "layer 0: a Identity" in FastDecoder.supports(model)


class Named(Dense):
    """A matrix by another name."""

    @configclass
    class Config(Dense.Config):
        pass


class Beside(Dense):
    """A matrix beside the head's own."""

    @configclass
    class Config(Dense.Config):
        is_added = True


class Doubled(Dense):
    """It computes otherwise, and may look at its context."""

    @configclass
    class Config(Dense.Config):
        pass

    def forward(self, x, context=None):
        return 2 * super().forward(x, context)


def model_with_head(kind):
    return Decoder.Config(
        vocab_size=100,
        dim=64,
        num_layers=2,
        init_std=0.2,
        attention=SelfAttention.Config(num_heads=4),
        linears={"head": kind.Config()},
    ).build(seed=1)


@pytest.mark.parametrize("kind", [Named, Beside])
def test_a_head_that_is_not_one_matrix_is_run_by_the_model(kind):
    replaced, put = model_with_head(kind).eval(), model_with_head(Named).eval()
    put.head = kind.Config().build(Projection("head", 64, 100), BuildContext(64, init_std=0.2))
    given = prompts(9, 3)
    for model in (replaced, put):
        assert FastDecoder.supports(model) is None
        logits, _ = Sequences(model).run(list(enumerate(given)))
        assert torch.allclose(logits, torch.cat([ordinary(model, tokens) for tokens in given]), atol=1e-4)


def test_a_head_that_computes_otherwise_is_left_to_the_model():
    assert FastDecoder.supports(model_with_head(Doubled).eval()) == "the head is a Split"


def test_stores_of_another_shape():
    model = build("plain")
    with pytest.raises(ConfigError, match="must be"):
        FastDecoder(model, torch.empty(3, 8, 2, 16), torch.empty(3, 8, 2, 16), block_tokens=4)


@pytest.mark.parametrize(
    ("sequence", "table"),
    [
        ([[0, 3, 0, 0]], [0]),  # more rows than tokens
        ([[0, 1, 0, 0]], [0]),  # fewer
        ([[0, 1, 0, 0], [0, 1, 0, 0]], [0]),  # one row twice
        ([[0, 2, 3, 0]], [0]),  # more blocks than the table
        ([[0, 2, 0, 1]], [0]),
        ([[0, 2, 0, -1]], [0]),
        ([[0, 2, -1, 0]], [0]),
        ([[0, 2, 0, 0]], [64]),  # a block that the store has not
        ([[0, 2, 0, 0]], [-1]),
    ],
)
def test_rows_and_blocks_that_there_are_not(sequence, table):
    own = Sequences(build("plain"))
    with pytest.raises(InputError, match="index out of range"):
        own.fast.hidden(torch.tensor([1, 2]), torch.tensor([0, 1]), np.array(sequence), np.array(table, np.int32))


@pytest.mark.parametrize("wrong", ["positions", "sequence", "table"])
def test_a_step_of_other_shapes_or_types(wrong):
    own = Sequences(build("plain"))
    positions, sequence, table = torch.tensor([0, 1]), np.array([[0, 2, 0, 0]]), np.array([0], np.int32)
    if wrong == "positions":
        positions = positions[:1]
    elif wrong == "sequence":
        sequence = sequence[:, :3]
    else:
        table = table.astype(np.int64)
    with pytest.raises(InputError, match="a kernel was given"):
        own.fast.hidden(torch.tensor([1, 2]), positions, sequence, table)


def test_a_matrix_of_another_size():
    model = build("plain")
    model.blocks[1].attention.out = torch.nn.Linear(32, 64, bias=False)
    with pytest.raises(ConfigError, match=r"a matrix of out in part 1 is \[64, 32\]; the model needs \[64, 64\]"):
        Sequences(model)


# -- weights that are nobody else's


def float_bytes(model):
    return sum(part.nbytes for part in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_no_weight_is_there_twice_where_the_model_is_taken(name, dtype):
    model = build(name).to(dtype)
    given, before = prompts(9, 1, 40), float_bytes(model)
    wanted, _ = Sequences(model, dtype).run(list(enumerate(given)))
    assert float_bytes(model) == before  # what is not taken stays
    reference = ordinary(model, given[2])
    places = {part.data_ptr() for part in model.parameters()}
    taken = Sequences(model, dtype, takes_weights=True)
    logits, _ = taken.run(list(enumerate(given)))
    assert torch.equal(logits, wanted)
    memory = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in model.buffers()}
    own = [part for part in model.parameters() if part.data_ptr() in places]
    # Rows are filled up to 16, matrices to pages; norms and routers are all that is left of before.
    slack = 4096 * 2 * len(list(model.modules()))
    assert sum(part.nbytes for part in own) + sum(memory.values()) < before + slack
    left = [key for key, part in model.named_parameters() if part.dim() > 1]
    assert all(any(part in key for part in ("router", "score", "gate", "embedding")) for key in left), left
    # The model itself computes the same with what has come in their place.
    error = (ordinary(model, given[2]) - reference).norm() / reference.norm()
    assert error < (1e-5 if dtype == torch.float32 else 3e-2)
    assert not Sequences(model, dtype).fast.supports(model)


@pytest.mark.parametrize("bits", ["int8", "int4", "parts"])
@pytest.mark.parametrize("name", ["grouped, tied", "mixture"])
def test_quantised_weights_are_let_go_of_once_they_lie_in_the_packed_memory(name, bits):
    model = build(name, bits)
    layers = [module for module in model.modules() if isinstance(module, FewBitLinear | QuantizedPool)]
    before = [weakref.ref(part) for layer in layers for part in layer.buffers()]
    assert before
    steps = Sequences(model, takes_weights=True)
    gc.collect()
    assert steps.fast is not None
    assert not [one for one in before if one() is not None]


# -- weights that are trained in their places


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_weights_that_have_changed_are_read_again(name, dtype):
    model = build(name).to(dtype)
    given, steps = prompts(9, 1, 20), Sequences(model, dtype)
    before, _ = steps.run(list(enumerate(given)))
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for part in (*model.parameters(), *model.buffers()):
            if part.is_floating_point():
                part.add_(0.1 * torch.randn(part.shape, generator=generator).to(dtype))
    steps.fast.reread()
    after, _ = steps.run([(f"again {id}", tokens) for id, tokens in enumerate(given)])
    wanted, _ = Sequences(model, dtype).run(list(enumerate(given)))
    assert torch.equal(after, wanted)
    assert not torch.equal(after, before)
