"""Linear layers as parts: patterns, fused matrices, what replaces a part, what stands beside one, and layers that route."""

from typing import Any

import pytest
import torch
from torch import nn

from anabranch.adapters import RoutedLowRank
from anabranch.adapters.low_rank import LowRank as PlainLoRA
from anabranch.adapters.mhr import MultiHeadRouted
from anabranch.config import configclass, from_dict, to_dict
from anabranch.depth.duo_llm import DuoFFN
from anabranch.errors import ConfigError
from anabranch.experts.versatile import VersatileFFN
from anabranch.lm import Decoder
from anabranch.nn import BuildContext, Count, Dense, Linear, MoE, SelfAttention, SwiGLU
from anabranch.nn.linear import Added, Product, Projection, Rows, Split, check_patterns, is_plain, takes_context
from anabranch.nn.quantize import quantize
from anabranch.registry import kinds, resolve
from anabranch.routing import RoutingContext
from linears import LowRank


class Scaled(Linear):
    """A matrix times a number, which says by which name it was built."""

    @configclass
    class Config(Linear.Config):
        scale: float = 2.0

        def count(self, projection, context):
            return Count.dense(projection.in_dim * projection.out_dim) + Count(1, 1, 1)

    def __init__(self, config: Any, projection, context) -> None:
        nn.Module.__init__(self)
        self.config, self.name = config, projection.name
        self.dense = Dense.Config().build(projection, context)
        self.scale = nn.Parameter(torch.tensor(config.scale))

    def forward(self, x, context=None):
        return self.dense(x, context) * self.scale


def decoder(linears, **options):
    values = {"vocab_size": 50, "dim": 32, "num_layers": 2, "feed_forward": SwiGLU.Config(hidden_dim=48)}
    attention = SelfAttention.Config(num_heads=4, num_kv_heads=2)
    return Decoder.Config(**{**values, "attention": attention, **options}, linears=linears)


def test_one_part_of_a_fused_matrix_is_replaced_and_the_others_stay():
    context = BuildContext(32, linears={"*.v": Scaled.Config(scale=3.0)}).at("attention")
    made = context.linear(32, 20, name="qkv", parts={"q": 12, "k": 4, "v": 4})
    assert type(made) is Split
    assert [type(part) for part in made.parts.values()] == [Dense, Dense, Scaled]
    x = torch.randn(3, 32)
    parts: Any = made.parts
    wanted = torch.cat([x @ parts.q.weight.T, x @ parts.k.weight.T, 3 * (x @ parts.v.dense.weight.T)], dim=-1)
    torch.testing.assert_close(made(x, None), wanted)
    assert parts.v.name == "attention.v"


def test_what_stands_beside_a_part_is_added_to_its_rows():
    context = BuildContext(8, linears={"w13": LowRank.Config(), "up": LowRank.Config()})
    made: Any = context.linear(8, 6, name="w13", parts={"gate": 2, "up": 4})
    assert type(made) is Added
    assert list(made.beside) == ["up"]
    layer = made.beside["up"]
    nn.init.normal_(layer.b)
    x, given = torch.randn(5, 8), object()
    wanted = x @ made.matrix.weight.T
    wanted[:, 2:] += x @ layer.a.T @ layer.b.T
    torch.testing.assert_close(made(x, given), wanted)
    assert [context for _, context in layer.seen] == [given]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("blocks.*.attention.q", ["blocks.0.attention.q", "blocks.1.attention.q"]),
        (
            "blocks.1.*",
            [
                f"blocks.1.{name}"
                for name in (
                    "attention.k",
                    "attention.o",
                    "attention.q",
                    "attention.v",
                    "feed_forward.down",
                    "feed_forward.gate",
                    "feed_forward.up",
                )
            ],
        ),
        ("*.gate", ["blocks.0.feed_forward.gate", "blocks.1.feed_forward.gate"]),
        ("head", ["head"]),
    ],
)
def test_patterns_name_parts(pattern, names):
    model = decoder({pattern: Scaled.Config()}).build()
    assert sorted(module.name for module in model.modules() if isinstance(module, Scaled)) == names


def test_shared_experts_of_a_mixture_have_names_too():
    feed_forward = MoE.Config(num_experts=4, hidden_dim=16, shared_experts=1, shared_gate=True)
    model = decoder({"*.shared.up": Scaled.Config(), "*.shared_gate": Scaled.Config()}, feed_forward=feed_forward)
    found = [module.name for module in model.build().modules() if isinstance(module, Scaled)]
    assert found == [f"blocks.{layer}.feed_forward.{name}" for layer in (0, 1) for name in ("shared.up", "shared_gate")]


def test_the_first_pattern_that_fits_counts():
    model = decoder({"*.q": Scaled.Config(scale=1.0), "*.attention.*": Scaled.Config(scale=5.0)}).build()
    scales = {module.name: module.config.scale for module in model.modules() if isinstance(module, Scaled)}
    assert scales["blocks.0.attention.q"] == 1.0
    assert scales["blocks.0.attention.k"] == 5.0


def test_a_pattern_that_earlier_ones_leave_nothing_to_is_an_error():
    names = ["blocks.0.q", "blocks.1.q", "head"]
    check_patterns({"blocks.0.q": None, "*.q": None}, names)
    with pytest.raises(
        ConfigError, match=r"linears has 'blocks\.1\.q', .* \('\*\.q' takes blocks\.1\.q\), and the first"
    ):
        check_patterns({"*.q": None, "blocks.1.q": None}, names)
    with pytest.raises(ConfigError, match=r"linears has '\*\.q', but earlier patterns"):
        check_patterns({"*.0.q": None, "*.1.q": None, "*.q": None}, names)
    with pytest.raises(ConfigError, match="linears has 'head', but earlier"):
        decoder({"*": Dense.Config(), "head": Scaled.Config()}).build()


def test_a_pattern_that_fits_nothing_is_an_error():
    with pytest.raises(
        ConfigError, match=r"linears has 'blocks\.0\.attention\.qq', .* did you mean 'blocks\.0\.attention\.q'"
    ):
        decoder({"blocks.0.attention.qq": Scaled.Config()}).build()
    with pytest.raises(ConfigError, match="one of q, k"):
        check_patterns({"zzzzzz": None}, ["a.q", "b.k"])
    # What a projection is called counts more than the words before it.
    names = [f"blocks.{n}.{name}" for n in range(2) for name in ("attention.v", "attention.q", "feed_forward.down")]
    with pytest.raises(ConfigError, match=r"did you mean 'blocks\.\d\.feed_forward\.down'"):
        check_patterns({"blocks.9.down": None}, names)
    with pytest.raises(ConfigError, match=r"did you mean 'blocks\.1\.attention\.q'"):
        check_patterns({"blocks.1.attn.[qx]": None}, names)


@pytest.mark.parametrize(
    "linears",
    [
        {},
        {"*.q": Scaled.Config()},
        {"*": Scaled.Config()},
        {"*.v": LowRank.Config(), "*.q": Scaled.Config()},
        {"head": LowRank.Config()},
    ],
)
def test_counts_are_those_of_what_is_built(linears):
    config = decoder(linears)
    assert config.count().parameters == sum(parameter.numel() for parameter in config.build().parameters())


VERSATILE = [
    {"fusion": fusion, "width_compute": way, "norm": norm}
    for fusion in ("difficulty", "width_only", "depth_only")
    for way in ("auto", "masked", "grouped")
    for norm in ("shared", "separate")
]
DESIGNS = [
    *(resolve("feed_forward", kind).Config() for kind in kinds("feed_forward")),
    *(VersatileFFN.Config(hidden_dim=32, num_experts=4, **options) for options in VERSATILE),
    MoE.Config(num_experts=4, hidden_dim=16, shared_experts=1, shared_gate=True),
    DuoFFN.Config(big=48, small=16, compute="dense"),
]


@pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.owner.kind)
@pytest.mark.parametrize("layer", [Scaled.Config(scale=1.0), LowRank.Config()])
def test_every_design_runs_on_replaced_layers_and_counts_them(design, layer):
    """A matrix times one is the matrix, and what adds zero adds nothing: the outputs are those of the plain model."""
    plain = decoder({}, feed_forward=design).build(seed=1)
    config = decoder({"*": layer}, feed_forward=design)
    made = config.build(seed=1)
    assert config.count().parameters == sum(parameter.numel() for parameter in made.parameters())
    token = torch.arange(14).view(2, 7)
    _copy(plain, made)
    for mode in (False, True):
        torch.manual_seed(0)
        wanted = plain.train(mode)(token).logits_BLV
        torch.manual_seed(0)
        torch.testing.assert_close(made.train(mode)(token).logits_BLV, wanted, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(made.eval()(token).logits_BLV, plain.eval()(token).logits_BLV, atol=1e-5, rtol=1e-4)
    made.train()(token, token).loss.backward()


@pytest.mark.parametrize(
    ("fusion", "down", "others"), [("difficulty", 4, 3), ("depth_only", 3, 3), ("width_only", 1, 1)]
)
def test_flops_of_what_stands_beside_a_looped_layer(fusion, down, others):
    """3 loops; the width path masks the first one's units, or without loops all, since experts cannot be cut from sums of layers."""
    design = VersatileFFN.Config(hidden_dim=24, num_experts=4, max_loops=3, fusion=fusion)
    context = BuildContext(16, linears={"down": LowRank.Config(rank=2)})
    # gate and up are 2 x 16 x 24 weights, down 16 x 24, and 2 x (16 + 24) beside it; a weight is 2 FLOPs
    assert design.count(context).flops == 2 * (others * 768 + down * (384 + 80) + design.heads(16))


def test_sizes_of_a_pair_of_layers():
    """The big one, 3 x 16 x 24 weights and 2 x (16 + 24) beside the last matrix, is what a token uses; the small one is 3 x 16 x 8."""
    count = DuoFFN.Config(big=24, small=8).count(BuildContext(16, linears={"big.down": LowRank.Config(rank=2)}))
    assert count == Count(1152 + 80 + 384, 1152 + 80, 2 * (1152 + 80))


def _copy(plain: nn.Module, made: nn.Module) -> None:
    """The weights of ``plain`` in a model whose linear layers were replaced."""
    for name, module in made.named_modules():
        if not isinstance(module, (Split, Added)) or name.endswith(".matrix"):
            continue
        if ".layers." in name:  # of one expert
            pool, _, place = name.partition(".layers.")
            matrix, _, expert = place.partition(".")
            weight = getattr(plain.get_submodule(pool), matrix).data[int(expert)]
        else:
            weight = plain.get_submodule(name).weight.data
        if isinstance(module, Added):
            module.matrix.weight.data.copy_(weight)
            continue
        parts = list(module.parts.values())
        for part, rows in zip(parts, weight.split([part.dense.weight.shape[0] for part in parts]), strict=True):
            part.dense.weight.data.copy_(rows)
    state = plain.state_dict()
    made.load_state_dict({name: state[name] for name in made.state_dict() if name in state}, strict=False)


def test_layers_beside_the_matrices_change_nothing_at_first_and_get_the_context():
    plain, added = decoder({}).build(seed=1), decoder({"*": LowRank.Config()}).build(seed=1)
    state = {name.replace(".matrix.", "."): value for name, value in added.state_dict().items()}
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    token = torch.randint(50, (2, 7))
    torch.testing.assert_close(added(token).logits_BLV, plain(token).logits_BLV)
    contexts = [module.seen for module in added.modules() if isinstance(module, LowRank)]
    assert all(len(seen) == 1 and seen[0][1].token_BL is token for seen in contexts[:-1])


def test_a_model_with_replaced_layers_learns_generates_and_is_quantised():
    model = decoder({"*.v": Scaled.Config(), "*.down": LowRank.Config()}, dim=64).build()
    token = torch.randint(50, (2, 9))
    model(token, token).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    cache = model.new_cache(9)
    with torch.no_grad():
        whole = model(token).logits_BLV
        steps = [model(token[:, at : at + 1], cache=cache).logits_BLV for at in range(9)]
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=1e-5)
        quantize(model, "int8")
        torch.testing.assert_close(model(token).logits_BLV, whole, atol=0.05, rtol=0.1)


def test_configs_read_back_equal_and_a_kind_is_not_needed_where_there_is_a_default():
    config = decoder({"*.q": Dense.Config()})
    assert from_dict(Decoder.Config, to_dict(config)) == config
    assert from_dict(Decoder.Config, {"attention": {"num_heads": 2}}).attention == SelfAttention.Config(num_heads=2)
    older = to_dict(config)
    del older["linears"], older["block"]
    assert from_dict(Decoder.Config, older) == config.replace(linears={})


def test_what_is_made_of_a_plain_layer_is_not_quantised_as_one():
    class Tripled(Dense):
        def forward(self, x, context=None):
            return 3 * super().forward(x, context)

    class Config(Dense.Config):
        def build(self, projection, context):
            return Tripled(self, projection, context)

    model = decoder({"*.v": Config()}, dim=64).build().eval()
    token = torch.randint(50, (2, 9))
    with torch.no_grad():
        whole = model(token).logits_BLV
        quantize(model, "int8")
        torch.testing.assert_close(model(token).logits_BLV, whole, atol=0.05, rtol=0.1)
    assert sum(isinstance(module, Tripled) for module in model.modules()) == 2


def test_the_head_gets_the_context():
    model = decoder({"head": LowRank.Config()}).build()
    token = torch.randint(50, (2, 7))
    model(token)
    assert model.head.beside["head"].seen[0][1].token_BL is token


@pytest.mark.parametrize("watch", ["forward", "backward hook", "backward pre hook"])
def test_a_watched_layer_is_called(watch):
    model, seen = decoder({}).build(), []
    layer = model.blocks[0].feed_forward.w2
    if watch == "forward":
        before = layer.forward
        layer.forward = lambda x, *rest: seen.append(1) or before(x)
    elif watch == "backward hook":
        layer.register_full_backward_hook(lambda *_: seen.append(1))
    else:
        layer.register_full_backward_pre_hook(lambda *_: seen.append(1))
    token = torch.randint(50, (2, 7))
    model(token, token).loss.backward()
    assert seen


def test_what_takes_a_context():
    class Twice(Dense):
        def forward(self, x, context=None):
            return 2 * super().forward(x, context)

    def of(kind):
        return kind(Dense.Config(), Projection("head", 4, 4), BuildContext(4))

    class Named(Dense):
        """It computes as `Dense` does."""

    dense, twice, other = of(Dense), of(Twice), Scaled.Config().build(Projection("head", 4, 4), BuildContext(4))
    named, routed = of(Named), of(Named)
    routed.router = nn.Identity()
    rows = {"head": 4}
    for plain in (None, nn.Linear(4, 4), dense, named, Split({"head": named}), Added(dense, {"head": named}, rows)):
        assert not takes_context(plain)
    # One that computes otherwise may look.
    for one in (other, routed, twice):
        for layer in (one, Split({"a": dense, "b": one}), Added(one, {"head": dense}, rows)):
            assert takes_context(layer)
        assert takes_context(Added(dense, {"head": one}, rows))


def test_what_is_plain():
    context = BuildContext(8)
    layer = context.linear(8, 8)
    assert is_plain(layer)
    assert is_plain(nn.Linear(2, 2))
    assert not is_plain(LowRank.Config().build(context.projection("a", 8, 8), context))
    layer.register_forward_hook(lambda *_: None)
    assert not is_plain(layer)


def test_a_product_may_be_made_by_others_only_of_a_whole_frozen_matrix_that_nobody_watches():
    x, matrix = torch.randn(2, 4), nn.Linear(4, 6).requires_grad_(False)

    def rows(layer: Any, *part: int) -> Rows:
        return Rows(Product(x, layer, lambda: (matrix.weight, None), layer), *part)

    assert rows(matrix).frozen() == (matrix.weight, matrix.bias)
    assert rows(matrix, 0, 3).frozen() is None
    assert rows(nn.Sequential(matrix)).frozen() is None
    assert Rows(Product(x, matrix, lambda: (matrix.weight, None))).frozen() is None
    matrix.bias.requires_grad_()
    assert rows(matrix).frozen() is None
    with torch.no_grad():
        assert rows(matrix).frozen() is not None
    handle = matrix.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        assert rows(matrix).frozen() is None
    handle.remove()


PARTS = {"q": 6, "k": 3, "v": 4}


def beside_qkv(kind: Any, dtype: torch.dtype = torch.float32) -> Added:
    """A fused matrix of three parts with layers beside the first and the last."""
    generator = torch.Generator().manual_seed(0)
    context = BuildContext(8, generator=generator)
    projection = Projection("blocks.0.attention.qkv", 8, sum(PARTS.values()), parts=PARTS)
    layers = {part: kind.build(projection.part(part), context) for part in ("q", "v")}
    for layer in layers.values():
        for name, parameter in layer.named_parameters():
            if name.endswith("b"):
                parameter.data.normal_(generator=generator)
    return Added(Dense(Dense.Config(), projection, context), layers, PARTS).to(dtype)


KINDS = {
    "low rank": PlainLoRA.Config(rank=2, alpha=3.0),
    "routed": RoutedLowRank.Config(ranks=(2, 3)),
    "by task": MultiHeadRouted.Config(heads=1, skills=3, rank=2, unknown="average"),
    "of a test": LowRank.Config(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_what_is_added_is_added_in_place_and_is_the_same(kind, dtype):
    layer = beside_qkv(KINDS[kind], dtype)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)
    wanted = layer(x, RoutingContext())
    with torch.no_grad():
        found = layer(x, RoutingContext())
        matrix = layer.matrix(x)
    torch.testing.assert_close(found, wanted.detach())
    # The part that nothing stands beside is the matrix's, to the bit, and the others are not.
    assert torch.equal(found[..., 6:9], matrix[..., 6:9])
    for part in (slice(0, 6), slice(9, 13)):
        assert float((found - matrix)[..., part].abs().max()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_somebody_listens_to_is_called_without_gradients_too(kind):
    layer, calls = beside_qkv(KINDS[kind]), []
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        plain = layer(x, RoutingContext())
        handle = layer.beside["q"].register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(layer(x, RoutingContext()), plain)
        assert calls == [1]
        handle.remove()
        # What listens to the matrix is given what the matrix made, and keeps it.
        kept = []
        layer.matrix.register_forward_hook(lambda module, args, y: kept.append((y, y.clone())))
        torch.testing.assert_close(layer(x, RoutingContext()), plain)
    assert torch.equal(*kept[0])
