"""Linear layers of single experts: what stands beside a stacked matrix, what replaces one, and the context that they get."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anabranch.config import configclass
from anabranch.errors import ConfigError
from anabranch.experts.rexmoe import ReXMoE, export_expanded, from_vanilla
from anabranch.experts.rmoe_measure import expert_similarity
from anabranch.lm import Decoder
from anabranch.lm.upcycle import average, upcycle
from anabranch.nn import Count, Dense, ExpertPool, Linear, MoE, SelfAttention, SwiGLU
from anabranch.nn.context import ForwardContext
from anabranch.nn.items import of_items
from anabranch.nn.quantize import quantize
from anabranch.routing import Router, Routing, RoutingContext, TopK, record_routing, replay_routing
from anabranch.serving.elasticmoe.layout import pool_names
from anabranch.serving.expertflow import find_pools
from anabranch.serving.fast.supported import why_not
from linears import Beside

EXPERTS, DIM, HIDDEN = 4, 16, 8


class Instead(Linear):
    """A matrix times three."""

    @configclass
    class Config(Linear.Config):
        def count(self, projection, context):
            return Count.dense(projection.in_dim * projection.out_dim)

    def __init__(self, config: Any, projection, context) -> None:
        nn.Module.__init__(self)
        self.dense = Dense.Config().build(projection, context)

    def forward(self, x, context=None):
        return 3 * self.dense(x, context)


class Routed(Linear):
    """What is added is one of several rows of numbers, which a router picks."""

    @configclass
    class Config(Linear.Config):
        is_added = True

        def count(self, projection, context):
            return Count.dense(3 * (projection.in_dim + projection.out_dim))

    def __init__(self, config: Any, projection, context) -> None:
        nn.Module.__init__(self)
        router = Router.Config(select=TopK.Config(top_k=1))
        self.router = router.build(projection.in_dim, 3, layer=context.layer, generator=context.generator)
        self.rows = nn.Parameter(torch.randn(3, projection.out_dim, generator=context.generator))

    def forward(self, x, context):
        routing = self.router(x, context)
        return self.rows[routing.index_NK[:, 0].clamp_min(0)] * routing.weight_NK


def decoder(linears, *, dim=DIM, **options):
    layer = MoE.Config(**{"num_experts": EXPERTS, "hidden_dim": HIDDEN, **options})
    return Decoder.Config(
        vocab_size=50,
        dim=dim,
        num_layers=2,
        feed_forward=layer,
        linears=linears,
        attention=SelfAttention.Config(num_heads=2),
        init_std=0.3,
    )


def pool_of(linears, **options):
    pool: Any = decoder(linears, **options).build(seed=1).blocks[0].feed_forward.experts
    assert isinstance(pool, ExpertPool)
    return pool.double()


def case(seed=0, num_items=11):
    """Items of which some choices are unused; nobody goes to the last expert."""
    g = torch.Generator().manual_seed(seed)
    score = torch.rand(num_items, EXPERTS, generator=g, dtype=torch.float64)
    score[:, -1] = -1
    weight, index = score.topk(2, dim=-1)
    routing = Routing(index, weight, score).drop(torch.rand(num_items, 2, generator=g) < 0.3)
    return torch.randn(num_items, DIM, generator=g, dtype=torch.float64), routing


def of_expert(pool, number, x):
    """One expert by its parts, for one item."""

    def product(name, rows, x):
        own = getattr(pool.layers, name)
        layer: Any = own[str(number)] if str(number) in own else None
        stack = getattr(pool, name)
        if stack is None and isinstance(layer, Dense):
            return layer.weight @ x
        if stack is None:  # parts side by side
            parts = layer.parts.items()
            return torch.cat(
                [part.weight @ x if type(part) is Dense else 3 * (part.dense.weight @ x) for _, part in parts]
            )
        y = stack[number] @ x
        for part, beside in {} if layer is None else layer.items():
            where = rows[part]
            y = torch.cat([y[: where.start], y[where] + beside.b @ (beside.a @ x), y[where.stop :]])
        return y

    gate, up = product("w13", {"gate": slice(0, HIDDEN), "up": slice(HIDDEN, 2 * HIDDEN)}, x).chunk(2)
    return product("w2", {"down": slice(0, DIM)}, F.silu(gate) * up)


def naive(pool, x_ND, routing, weight_on):
    rows = []
    for n in range(len(x_ND)):
        y = torch.zeros_like(x_ND[n])
        for expert, weight in zip(routing.index_NK[n].tolist(), routing.weight_NK[n], strict=True):
            if expert >= 0 and weight_on == "input":
                y = y + of_expert(pool, expert, x_ND[n] * weight)
            elif expert >= 0:
                y = y + weight * of_expert(pool, expert, x_ND[n])
        rows.append(y)
    return torch.stack(rows)


PATTERNS = [
    {"*.experts.*.down": Beside.Config()},
    {"*.experts.*": Beside.Config()},
    {"*.experts.1.up": Beside.Config(), "*.experts.3.*": Beside.Config()},
    {"*.experts.*.gate": Instead.Config()},
    {"*.experts.2.*": Instead.Config()},
    {"*.experts.0.down": Instead.Config(), "*.experts.*.up": Beside.Config()},
]


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("linears", PATTERNS, ids=lambda linears: " ".join(linears))
@pytest.mark.parametrize("way", ["gathered", "masked"])
def test_equals_a_naive_loop_in_values_and_gradients(linears, weight_on, way, monkeypatch):
    if way == "masked":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    pool = pool_of(linears)
    x, routing = case()
    x.requires_grad_()
    inputs = [x, *pool.parameters()]
    found = pool(x, routing, weight_on=weight_on)
    expected = naive(pool, x, routing, weight_on)
    torch.testing.assert_close(found, expected)
    dy = torch.randn(found.shape, dtype=torch.float64)
    ours = torch.autograd.grad(found, inputs, dy)
    theirs = torch.autograd.grad(expected, inputs, dy, allow_unused=True)
    for gradient, wanted in zip(ours, theirs, strict=True):  # zero for an expert that nobody goes to, never missing
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) if wanted is None else wanted)
    assert pool(
        x[:0], routing.__class__(*(part[:0] for part in (routing.index_NK, routing.weight_NK, routing.score_NE)))
    ).shape == (0, DIM)


def test_what_stands_beside_leaves_the_stack_and_its_name():
    plain, added = decoder({}).build(seed=1), decoder({"*.experts.2.up": Beside.Config()}).build(seed=1)
    missing = added.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    wanted = [f"blocks.{n}.feed_forward.experts.layers.w13.2.up.{name}" for n in (0, 1) for name in ("a", "b")]
    assert missing.missing_keys == wanted
    token = torch.arange(12).view(2, 6)
    with torch.no_grad():
        for module in added.modules():
            if isinstance(module, Beside):
                module.b.zero_()
        torch.testing.assert_close(added.eval()(token).logits_BLV, plain.eval()(token).logits_BLV)


def test_a_replaced_part_has_no_row_in_a_stack():
    pool = pool_of({"*.experts.*.gate": Instead.Config()})
    assert pool.w13 is None
    assert pool.w2.shape == (EXPERTS, DIM, HIDDEN)
    assert (pool.num_experts, pool.dim, pool.hidden_dim) == (EXPERTS, DIM, HIDDEN)
    with pytest.raises(
        ConfigError, match=r"experts have layers of their own .*, so there is no stack of their matrices"
    ):
        _ = pool.stacks
    beside = pool_of({"*.experts.*.gate": Beside.Config()})
    assert beside.stacks[0] is beside.w13
    assert beside.stacks[1] is beside.w2


@pytest.mark.parametrize("linears", PATTERNS, ids=lambda linears: " ".join(linears))
def test_counts_are_those_of_what_is_built(linears):
    for config in (decoder(linears), decoder(linears, shared_experts=1, activation="swiglu")):
        assert config.count().parameters == sum(parameter.numel() for parameter in config.build().parameters())


def test_active_sizes_are_those_of_the_largest_experts():
    """An expert has 3 x 16 x 8 weights, the second one 2 x (16 + 8) more; a token takes two."""
    plain, added = decoder({}).count(), decoder({"blocks.0.*.experts.1.down": Beside.Config()}).count()
    assert added.parameters == plain.parameters + 48
    assert added.active == plain.active + 2 * 48
    assert added.flops == plain.flops + 2 * 2 * 48


def test_a_pattern_that_fits_no_expert_is_an_error():
    with pytest.raises(ConfigError, match=r"did you mean 'blocks\.0\.feed_forward\.experts\.3\.down'"):
        decoder({"blocks.0.feed_forward.experts.4.down": Beside.Config()}).build()
    with pytest.raises(ConfigError, match="fits no linear layer"):
        decoder({"*.experts.0.gate": Beside.Config()}, activation="gelu").build()


def test_names_of_a_shared_pool_are_those_in_the_model():
    layer = ReXMoE.Config(num_experts=2, hidden_dim=HIDDEN, reuse=2)
    model = decoder({"shared.experts_0.3.*": Beside.Config()}).replace(feed_forward=layer).build()
    found = [module.name for module in model.modules() if isinstance(module, Beside)]
    assert found == [f"shared.experts_0.3.{part}" for part in ("gate", "up", "down")]
    assert model.config.count().parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("padded", [False, True])
def test_layers_are_told_which_tokens_they_see(padded):
    """Each row that an expert is given carries the token, position and sequence of the item it was gathered from."""
    model = decoder({"*.experts.*.up": Beside.Config()}).build(seed=1)
    token = torch.arange(14).view(2, 7)
    mask = torch.ones_like(token, dtype=torch.bool)
    mask[0, :3] = not padded
    seen: dict[int, set[tuple[int, int, int]]] = {}
    with record_routing(model) as recorder:
        model(token, token_mask_BL=mask)
    for number in range(EXPERTS):
        layer: Any = model.blocks[0].feed_forward.experts.layers.w13[str(number)].up
        for x, context in layer.seen:
            assert context.position_BL.shape == context.token_BL.shape == (len(x), 1)
            assert context.rotary[0].shape[:3] == (len(x), 1, 1)
            assert context.cache is None
            rows = zip(context.rows, context.position_BL[:, 0].tolist(), context.token_BL[:, 0].tolist(), strict=True)
            seen[number] = set(rows)
    decided = recorder.trace().decisions(0)
    for number in range(EXPERTS):
        taken = (decided.index_NK == number).any(1)
        rows = zip(decided.item_N[taken].tolist(), decided.position_N[taken].tolist(), strict=True)
        start = 3 if padded else 0
        wanted = {(item, at, 7 * item + at + (start if item == 0 else 0)) for item, at in rows}
        assert seen.get(number, set()) == wanted
    assert sum(map(len, seen.values())) == 2 * int(mask.sum())


def test_what_is_said_of_each_item_is_gathered_and_put_back():
    position = torch.arange(3).expand(2, 3)
    context = ForwardContext(
        position_BL=position,
        rotary=(torch.randn(1, 1, 3, 2),) * 2,
        token_BL=10 + torch.arange(6).view(2, 3),
        item_mask_N=torch.tensor([0, 1, 1, 1, 1, 1]).bool(),
        sequence_length=3,
        sequences=["a", "b"],
        training=True,
        carry={"each": torch.arange(12.0).view(6, 2), "one": torch.tensor(3)},
        state={"bl": position, "word": "x"},
    )
    part = of_items(context, torch.tensor([4, 1]), 6)
    assert part.token_BL.tolist() == [[14], [11]]
    assert part.position_BL.tolist() == part.state["bl"].tolist() == [[1], [1]]
    assert part.item_mask_N.tolist() == [True, True]
    assert [tuple(name) for name in part.sequences] == [("b", 0), ("a", 0)]
    assert part.carry["each"].tolist() == [[8, 9], [2, 3]]
    assert part.carry["one"] == 3
    assert part.state["word"] == "x"
    assert part.training
    assert part.memo is context.memo


def test_routers_inside_experts_are_recorded_and_replayed_to_the_bit():
    model = decoder({"*.experts.*.down": Routed.Config()}).build(seed=1)
    token = torch.randint(50, (3, 8), generator=torch.Generator().manual_seed(2))

    def run():
        with torch.no_grad():
            cache = model.new_cache(8)
            return [model(token).logits_BLV, *(model(token[:, at : at + 4], cache=cache).logits_BLV for at in (0, 4))]

    model.eval()
    with record_routing(model) as recorder:
        expected = run()
    trace = recorder.trace()
    assert len(trace.layers) == 2 + 2 * EXPERTS
    with replay_routing(model, trace), record_routing(model) as again:
        replayed = run()
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(replayed, expected, strict=True))
    assert again.trace().table.equals(trace.table)
    outer, inner = (trace.decisions(layer.layer) for layer in trace.layers if layer.name in _OF_FIRST)
    taken = (outer.index_NK == 0).any(1)
    assert sorted(zip(outer.item_N[taken], outer.position_N[taken], strict=True)) == sorted(
        zip(inner.item_N, inner.position_N, strict=True)
    )
    torch.testing.assert_close(torch.cat(expected[1:], dim=1), expected[0], atol=1e-5, rtol=1e-4)


_OF_FIRST = ("blocks.0.feed_forward.router", "blocks.0.feed_forward.experts.layers.w2.0.down.router")


def test_losses_of_routers_inside_experts_are_losses_of_the_model():
    model = decoder({"*.experts.*.down": Routed.Config()}).build(seed=1)
    token = torch.randint(50, (3, 8))
    output = model.train()(token, token)
    output.loss.backward()
    inner = [module.router.score.weight.grad for module in model.modules() if isinstance(module, Routed)]
    assert any(gradient is not None and gradient.any() for gradient in inner)


ODD = [{"linears": {"*.experts.*.down": Beside.Config()}}, {"linears": {}, "activation": "gelu"}]


@pytest.mark.parametrize("options", ODD, ids=["layers", "gelu"])
def test_what_reads_the_stacks_refuses_or_leaves_them(options):
    model = decoder(**options, dim=32, hidden_dim=32).build(seed=1).eval()
    assert "not plain SwiGLUs" in str(why_not(model))
    replaced = quantize(model, "int8")
    assert "blocks.0.attention.qkv" in replaced
    assert not any("experts" in name for name in replaced)
    if options["linears"]:
        with pytest.raises(ConfigError, match=r"\(linears\), so they cannot be offloaded"):
            find_pools(model)
    with pytest.raises(ConfigError, match=r"\(biases, another activation, or linears\), so they cannot be spread"):
        pool_names(model)
    top_one = {"router": Router.Config(select=TopK.Config(top_k=1, normalize="sum"))}
    model = decoder(**options, **top_one).build(seed=1)
    with pytest.raises(ConfigError, match=r"only stacked matrices become|activation is 'gelu'"):
        average(model)


def test_pools_with_layers_do_not_become_others():
    dense = Decoder.Config(vocab_size=50, dim=DIM, num_layers=2, feed_forward=SwiGLU.Config(hidden_dim=HIDDEN))
    layer = MoE.Config(num_experts=EXPERTS, hidden_dim=HIDDEN, activation="gelu")
    with pytest.raises(ConfigError, match="activation is 'gelu'"):
        upcycle(dense.build(), layer)
    with pytest.raises(ConfigError, match="only stacked matrices become"):
        from_vanilla(decoder({"*experts*.down": Beside.Config()}).build(), reuse=2)
    pool = decoder({"*experts*.down": Beside.Config()}).replace(
        feed_forward=ReXMoE.Config(num_experts=4, hidden_dim=HIDDEN, reuse=2)
    )
    with pytest.raises(ConfigError, match="only stacked matrices become"):
        export_expanded(pool.build())
    with pytest.raises(ConfigError, match="only stacked matrices become"):
        expert_similarity(pool_of({"*.experts.*.gate": Instead.Config()}))


def test_a_kernel_cannot_be_asked_for_where_it_computes_something_else():
    with pytest.raises(ConfigError, match="backend is 'native', whose kernels compute swiglu"):
        MoE.Config(backend="native", activation="geglu")
    with pytest.raises(ConfigError, match="backend is 'native', whose kernels compute stacked matrices"):
        decoder({"*.experts.1.up": Beside.Config()}, backend="native").build()


def _kept(run):
    """(what ``run`` gives, numbers that its backward pass keeps)."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        return run(), sum(kept)


@pytest.mark.parametrize("linears", [{}, *PATTERNS], ids=lambda linears: " ".join(linears) or "stacked")
def test_recompute_keeps_less_and_changes_nothing(linears):
    token, found = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(1)), []
    for recompute in (False, True):
        model = decoder(linears, recompute=recompute, hidden_dim=64).build(seed=1)
        output, kept = _kept(lambda model=model: model(token, token))
        gradients = torch.autograd.grad(output.loss, list(model.parameters()))
        found.append((output.loss, gradients, kept))
    (loss, gradients, kept), (other, others, kept_again) = found
    # In each of two layers, 2 x 64 rows have at least 2 x 64 numbers before the activation.
    assert kept_again <= kept - 2 * (2 * 64) * (2 * 64)
    assert torch.equal(loss, other)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, others, strict=True))


def test_what_routers_inside_experts_emit_counts_once_with_recompute():
    token, losses = torch.randint(50, (3, 8)), []
    for recompute in (False, True):
        model = decoder({"*.experts.*.down": Routed.Config()}, recompute=recompute).build(seed=1).train()
        output = model(token, token)
        output.loss.backward()
        losses.append(output.auxiliary)
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])


@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_a_pool_recomputes_without_a_context(weight_on):
    pool = pool_of({"*.experts.*": Beside.Config()}, recompute=True)
    x, routing = case()
    x.requires_grad_()
    found, expected = pool(x, routing, weight_on=weight_on), naive(pool, x, routing, weight_on)
    torch.testing.assert_close(found, expected)
    (ours,), (theirs,) = (torch.autograd.grad(y.square().sum(), [x]) for y in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_masked_sums_are_of_float32_in_half_precision(monkeypatch):
    """One expert gives 256, the others 1 each: a sum in bfloat16 stays at 256."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    pool = pool_of({"*.experts.*.up": Beside.Config()}).to(torch.bfloat16)
    values = iter([256.0, 1.0, 1.0, 2.0])
    monkeypatch.setattr(
        pool.layers, "_expert", lambda number, w13, w2, x_RD, context: torch.full_like(x_RD, next(values))
    )
    index = torch.arange(4).view(1, 4)
    routing = Routing(index, torch.ones(1, 4, dtype=torch.bfloat16), torch.ones(1, 4, dtype=torch.bfloat16))
    assert pool(torch.zeros(1, DIM, dtype=torch.bfloat16), routing)[0, 0] == 260


@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_an_item_may_choose_one_expert_twice_in_a_compiled_graph(weight_on, monkeypatch):
    pool = pool_of({"*.experts.*.down": Beside.Config()})
    x_ND, index_NK = torch.randn(5, DIM).double(), torch.tensor([[0, 0], [1, 2], [2, 2], [0, 1], [1, 1]])
    routing = Routing(index_NK, torch.rand(5, 2).double(), torch.rand(5, EXPERTS).double())
    gathered = pool(x_ND, routing, weight_on=weight_on)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(pool(x_ND, routing, weight_on=weight_on), gathered)


@pytest.mark.parametrize("compiling", [False, True])
def test_an_item_without_numbers_spoils_the_gradients_of_its_own_experts_alone(compiling, monkeypatch):
    pool = pool_of({"*.experts.*.down": Beside.Config()})
    x_ND = torch.randn(4, DIM).double()
    x_ND[0] = torch.nan
    index_N1 = torch.tensor([[0], [1], [2], [1]])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    y_ND = pool(x_ND, Routing(index_N1, torch.ones(4, 1).double(), torch.rand(4, EXPERTS).double()))
    y_ND[1:].sum().backward()
    assert pool.w13.grad.isfinite().flatten(1).all(1)[1:].all()


class Unit(Linear):
    """Rows of the length one, which is no number where the input is zero."""

    @configclass
    class Config(Linear.Config):
        is_added = True

        def count(self, projection, context):
            return Count()

    def __init__(self, config: Any, projection, context) -> None:
        nn.Module.__init__(self)
        self.out_dim = projection.out_dim

    def forward(self, x, context=None):
        return (x / x.norm(dim=-1, keepdim=True))[..., :1].expand(*x.shape[:-1], self.out_dim)


@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_what_an_expert_makes_of_items_of_others_counts_for_nobody(weight_on, monkeypatch):
    pool = pool_of({"*.experts.*.up": Unit.Config()})
    x, routing = case()
    expected = pool(x, routing, weight_on=weight_on)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert expected.isfinite().all()
    torch.testing.assert_close(pool(x, routing, weight_on=weight_on), expected)


def test_masked_layers_are_told_which_items_are_theirs(monkeypatch):
    """Unused choices and padding are nobody's."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    pool = pool_of({"*.experts.*.up": Beside.Config()})
    x, routing = case()
    real_N = torch.arange(len(x)) % 4 > 0
    assert not routing.used_NK.all()
    for context in (RoutingContext(), RoutingContext(item_mask_N=real_N)):
        pool(x, routing, context=context)
        for number in range(EXPERTS):
            (_, told), *_ = getattr(pool.layers.w13, str(number)).up.seen[-1:]
            own_N = (routing.index_NK == number).any(1)
            assert told.item_mask_N.equal(own_N if context.item_mask_N is None else own_N & real_N)


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("way", ["gathered", "masked"])
def test_experts_compute_in_the_type_of_their_rows_whatever_that_of_the_weights(weight_on, way, monkeypatch):
    if way == "masked":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    pool = pool_of({"*.experts.*.up": Beside.Config()})
    x, routing = case()
    expected = pool(x, routing, weight_on=weight_on)
    half = Routing(routing.index_NK, routing.weight_NK.float(), routing.score_NE.float())
    found = pool.to(torch.bfloat16)(x.to(torch.bfloat16), half, weight_on=weight_on)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("chosen", [[0, 1], [3, 3]])
def test_the_result_has_the_type_that_experts_compute_in(chosen):
    """As stacked experts have it, also where the first expert has no rows."""
    routing = Routing(torch.tensor(chosen).view(2, 1), torch.ones(2, 1), torch.ones(2, EXPERTS))
    for linears in ({}, {"*.experts.*.up": Beside.Config()}):
        with torch.autocast("cpu", torch.bfloat16):
            assert pool_of(linears).float()(torch.randn(2, DIM), routing).dtype == torch.bfloat16
