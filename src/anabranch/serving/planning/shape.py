"""`ModelShape`: what the calculator needs of a model, of ours or published, dense or routed."""

import difflib
from dataclasses import dataclass, replace
from typing import Any

from anabranch.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FeedForwardShape:
    """The feed-forward of ``num_layers`` layers: E experts of which a token uses K; a dense one has E = K = 1.

    Attributes:
        num_layers: how many layers are of this shape.
        hidden_dim: F, of one expert.
        num_experts: E.
        top_k: K.
        shared_hidden_dim: width of what every token goes through beside the experts.
        router_parameters: of one layer.
        passes: how often a token goes through the weights (chains, loops).
        pools: distinct expert pools over the layers' number; below 1 where layers share theirs (ReXMoE).
    """

    num_layers: int
    hidden_dim: float
    num_experts: int = 1
    top_k: float = 1
    shared_hidden_dim: float = 0
    router_parameters: int = 0
    passes: float = 1
    pools: float = 1

    @property
    def is_routed(self) -> bool:
        """Whether tokens choose."""
        return self.num_experts > 1

    @property
    def active_dim(self) -> float:
        """Hidden width that a token is multiplied through, all passes together."""
        return self.top_k * self.hidden_dim * self.passes + self.shared_hidden_dim

    def touched_dim(self, num_tokens: float) -> float:
        """Hidden width whose weights are read for so many tokens: E (1 - (1 - K/E)^n) experts, if choices are even."""
        share = 1 - (1 - self.top_k / self.num_experts) ** num_tokens
        return self.num_experts * share * self.hidden_dim + self.shared_hidden_dim


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder-only model.

    Attributes:
        dim: D.
        num_heads, num_kv_heads, head_dim: of attention.
        feed_forwards: one entry per kind of layer; their ``num_layers`` add up to the model's.
        weight_bytes: of one weight; kv_bytes: of one stored key or value; activation_bytes: of one activation.
        streams: parallel streams of a token (ParScale).
        tie_embeddings: the head is the embedding.
        other_parameters: what is stored beside the matrices that the formulas know: norms, biases, layers that stand beside matrices, what
            streams and other kinds of attention have more (or less: then it is below 0). Of published shapes it is 0: norms are less than
            a thousandth of those.
        other_bytes: of one of them; None for `weight_bytes`, but 2 at least, as what is no matrix is not stored in few bits.
    """

    name: str
    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    feed_forwards: tuple[FeedForwardShape, ...]
    tie_embeddings: bool = False
    streams: int = 1
    weight_bytes: float = 2
    kv_bytes: float = 2
    activation_bytes: float = 2
    other_parameters: float = 0
    other_bytes: float | None = None

    @property
    def num_layers(self) -> int:
        """L."""
        return sum(part.num_layers for part in self.feed_forwards)

    @property
    def query_dim(self) -> int:
        """Width of all queries together."""
        return self.num_heads * self.head_dim

    @property
    def store_dim(self) -> int:
        """Width of all keys (or values) together."""
        return self.num_kv_heads * self.head_dim

    @property
    def is_routed(self) -> bool:
        """Whether any layer has experts."""
        return any(part.is_routed for part in self.feed_forwards)

    @property
    def attention_parameters(self) -> int:
        """Of one layer."""
        return self.dim * (self.query_dim + 2 * self.store_dim) + self.query_dim * self.dim

    @property
    def parameters(self) -> float:
        """All that is stored."""
        return self.matrix_parameters + self.other_parameters

    @property
    def matrix_parameters(self) -> float:
        """Embedding, head, attention, experts and routers: what the formulas know."""
        table = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        experts = sum(
            part.num_layers
            * (3 * self.dim * (part.num_experts * part.hidden_dim * part.pools + part.shared_hidden_dim))
            + part.num_layers * part.router_parameters
            for part in self.feed_forwards
        )
        return table + self.num_layers * self.attention_parameters + experts

    @property
    def active_parameters(self) -> float:
        """P: weights that a token is multiplied with, the head among them, the embedding look-up not."""
        experts = sum(
            part.num_layers * (3 * self.dim * part.active_dim + part.router_parameters) for part in self.feed_forwards
        )
        layers = self.num_layers * self.attention_parameters + experts
        return self.vocab_size * self.dim + self.streams * layers

    @property
    def kv_bytes_per_token(self) -> float:
        """Of all layers."""
        return 2 * self.store_dim * self.num_layers * self.kv_bytes * self.streams

    @property
    def weights_bytes(self) -> float:
        """Memory of all weights."""
        other = max(self.weight_bytes, 2) if self.other_bytes is None else self.other_bytes
        return self.matrix_parameters * self.weight_bytes + self.other_parameters * other


def shape_of(config: Any, name: str = "model", *, weight_bytes: float = 2, kv_bytes: float = 2) -> ModelShape:
    """The shape of an `anabranch.lm.Decoder.Config` of any design.

    Mixtures give experts and places; any other feed-forward is the dense one of as many parameters, gone through as often as its
    FLOPs say.
    """
    attention = config.attention
    kinds: dict[FeedForwardShape, int] = {}
    for context in config.contexts():
        # What stands beside matrices is no width of theirs.
        part = _feed_forward(config.feed_forward_of(context.layer), replace(context, linears={}))
        kinds[part] = kinds.get(part, 0) + 1
    made = ModelShape(
        name=name,
        dim=config.dim,
        num_heads=attention.num_heads,
        num_kv_heads=attention.kv_heads,
        head_dim=attention.width(config.dim),
        vocab_size=config.vocab_size,
        feed_forwards=tuple(
            FeedForwardShape(**{**_fields(part), "num_layers": number}) for part, number in kinds.items()
        ),
        tie_embeddings=config.tie_embeddings,
        streams=1 if config.streams is None else config.streams.num_streams,
        weight_bytes=weight_bytes,
        kv_bytes=kv_bytes,
        activation_bytes=kv_bytes,
    )
    # Whatever there is beside, the model itself counts it.
    return replace(made, other_parameters=config.count().parameters - made.matrix_parameters)


def _fields(part: FeedForwardShape) -> dict[str, Any]:
    return {name: getattr(part, name) for name in FeedForwardShape.__dataclass_fields__}


def _feed_forward(config: Any, context: Any) -> FeedForwardShape:
    count = config.count(context)
    if not all(hasattr(config, name) for name in ("num_experts", "num_choices", "num_destinations")):  # no mixture
        hidden = count.parameters / (3 * context.dim)
        passes = count.flops / (2 * count.parameters) if count.parameters else 1
        return FeedForwardShape(num_layers=1, hidden_dim=hidden, passes=passes)
    destinations = config.num_destinations(context)
    router = config.router.score.num_parameters(context.dim, destinations)
    rounds = getattr(config, "iterations", 1)
    return FeedForwardShape(
        num_layers=1,
        hidden_dim=config.hidden_dim,
        num_experts=destinations,
        top_k=config.num_choices,
        shared_hidden_dim=config.shared_width,
        router_parameters=router,
        passes=rounds,
        pools=config.num_experts / destinations,
    )


def _dense(
    name: str, dim: int, layers: int, heads: int, kv_heads: int, hidden: int, vocab: int, **more: Any
) -> ModelShape:
    part = FeedForwardShape(num_layers=layers, hidden_dim=hidden)
    return _model(name, dim, heads, kv_heads, vocab, (part,), **more)


def _model(
    name: str, dim: int, heads: int, kv_heads: int, vocab: int, parts: tuple[FeedForwardShape, ...], **more: Any
) -> ModelShape:
    head_dim = more.pop("head_dim", dim // heads)
    return ModelShape(
        name=name,
        dim=dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        feed_forwards=parts,
        **more,
    )


def _experts(layers: int, dim: int, experts: int, top_k: int, hidden: int, shared: int = 0) -> FeedForwardShape:
    return FeedForwardShape(
        num_layers=layers,
        hidden_dim=hidden,
        num_experts=experts,
        top_k=top_k,
        shared_hidden_dim=shared,
        router_parameters=dim * experts,
    )


# Shapes from the models' published configuration files.
PUBLISHED: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _dense("llama-2-7b", 4096, 32, 32, 32, 11008, 32000),
        _dense("llama-2-70b", 8192, 80, 64, 8, 28672, 32000),
        _dense("llama-3-8b", 4096, 32, 32, 8, 14336, 128256),
        _dense("llama-3-70b", 8192, 80, 64, 8, 28672, 128256),
        _dense("qwen2-72b", 8192, 80, 64, 8, 29568, 152064),
        _dense("deepseek-67b", 8192, 95, 64, 8, 22016, 102400),
        _dense("smollm2-135m", 576, 30, 9, 3, 1536, 49152, tie_embeddings=True),
        _model("mixtral-8x7b", 4096, 32, 8, 32000, (_experts(32, 4096, 8, 2, 14336),)),
        _model("olmoe-1b-7b", 2048, 16, 16, 50304, (_experts(16, 2048, 64, 8, 1024),)),
        _model("qwen3-30b-a3b", 2048, 32, 4, 151936, (_experts(48, 2048, 128, 8, 768),), head_dim=128),
        _model(
            "deepseek-moe-16b",
            2048,
            16,
            16,
            102400,
            (FeedForwardShape(num_layers=1, hidden_dim=10944), _experts(27, 2048, 64, 6, 1408, shared=2816)),
        ),
    )
}


def find_shape(name: str) -> ModelShape:
    """A published model. Raises ConfigError, with the nearest name, if there is none."""
    if name in PUBLISHED:
        return PUBLISHED[name]
    near = difflib.get_close_matches(name.lower(), PUBLISHED, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PUBLISHED)}"
    raise ConfigError(f"no published model {name!r}; {hint}")
