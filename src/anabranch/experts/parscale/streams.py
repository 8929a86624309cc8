"""`ParScale`, the part of a decoder: prefixes that tell the streams apart, and the gate that merges them."""
# Shapes: B sequences, P streams, L positions, H key-value heads, M prefix entries, D head width, W model width, C embedding of a stream

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anabranch.config import Field, Repeats, Size, configclass
from anabranch.errors import ConfigError
from anabranch.nn.context import BuildContext, Count
from anabranch.nn.streams import Streams
from anabranch.routing import RoutingContext

logger = logging.getLogger(__name__)


class ParScale(Streams, kind="parscale"):
    """P streams of one decoder. With one stream it has no parameters, and the model is the plain one to the bit."""

    @configclass
    class Config(Streams.Config):
        """The streams.

        Attributes:
            num_streams: P.
            switchable: other numbers of streams, each with a gate of its own, that `set_streams` may choose later; they use the first
                prefixes. Training takes turns, step by step, see `of_step`.
            prefix_len: m, entries in front of each layer's keys and values; with 0 the streams are copies of each other (a control).
            smoothing: eps; every stream weighs at least eps / P.
            train: ``all`` parameters learn, or as an ``adapter`` the prefixes and gates alone.
            prefix: ``mlp`` makes each layer's prefix of one embedding per stream by a small network (`fold` does away with it);
                ``direct`` has the prefixes as parameters, as released weights do.
            embedding_dim: c, width of a stream's embedding.
            mlp_dim: hidden width of that network.
            prefix_std: standard deviation of the initial prefix where it is ``direct``.
            prefix_alone: keep prefix and parameters with one stream too (a control; the paper's P = 1 is the plain model).
            in_use: streams of a forward pass that does not say how many, 1 or a number with a gate; None for ``num_streams``.
        """

        num_streams: Repeats = Field(default=4, ge=1)
        switchable: tuple[int, ...] = ()
        prefix_len: int = Field(default=48, ge=0)
        smoothing: float = Field(default=0.01, ge=0, lt=1)
        train: Literal["all", "adapter"] = "all"
        prefix: Literal["mlp", "direct"] = "mlp"
        embedding_dim: Size = Field(default=128, ge=1)
        mlp_dim: Size = Field(default=512, ge=1)
        prefix_std: float = Field(default=0.02, gt=0)
        prefix_alone: bool = False
        in_use: Repeats | None = Field(default=None, ge=1)

        def __post_init__(self) -> None:
            wrong = [number for number in self.switchable if not 2 <= number < self.num_streams]
            if wrong:
                raise ConfigError(
                    f"switchable has {wrong[0]}, but num_streams is {self.num_streams}; use numbers from 2 to "
                    f"{self.num_streams - 1} (1, the plain model, can always be chosen)"
                )
            self.check_gate(self.in_use or self.num_streams)

        @property
        def freezes_model(self) -> bool:
            """Whether the backbone stays as it is."""
            return self.train == "adapter"

        @property
        def has_prefix(self) -> bool:
            """Whether there are prefixes at all."""
            return self.prefix_len > 0 and (self.num_streams > 1 or self.prefix_alone)

        def check_gate(self, num_streams: int) -> None:
            """Raise ConfigError for a number of streams that has no gate."""
            if num_streams not in self.choices:
                raise ConfigError(
                    f"num_streams is {num_streams}, but the model has gates for {', '.join(map(str, self.choices))}; list it in "
                    "switchable and train"
                )

        @property
        def choices(self) -> tuple[int, ...]:
            """One, the plain model, and the numbers that have a gate."""
            return tuple(sorted({1, *self.gated}))

        @property
        def gated(self) -> list[int]:
            """The numbers of streams that have a gate, ascending."""
            return sorted(number for number in {*self.switchable, self.num_streams} if number > 1)

        def essence(self) -> dict[str, Any]:
            """All but what only training, or a network that makes prefixes, needs."""
            training = {"train", "embedding_dim", "mlp_dim", "prefix_std"}
            return {name: value for name, value in super().essence().items() if name not in training}

        def of_step(self, step: int) -> int | None:
            """The numbers that have a gate take turns, in ascending order; None where there is but one."""
            return self.gated[step % len(self.gated)] if self.switchable else None

        def count(self, layers: Count, dim: int, num_layers: int, attention: Any) -> Count:
            """Blocks run P times; prefixes and gates add parameters, and each query meets m more keys per layer and stream."""
            streams, head_dim = self.num_streams, attention.width(dim)
            # Of a layer's prefix.
            width = 2 * attention.kv_heads * head_dim * self.prefix_len * self.has_prefix
            folded = num_layers * width * streams
            stored = folded
            if self.has_prefix and self.prefix == "mlp":
                stored = streams * self.embedding_dim + num_layers * (
                    (self.embedding_dim + 1) * self.mlp_dim + (self.mlp_dim + 1) * width
                )
            gates = {number: _gate_parameters(number, dim) for number in self.gated}
            gate = gates.get(streams, 0)
            met = 4 * attention.num_heads * head_dim * self.prefix_len * self.has_prefix * num_layers
            return Count(
                layers.parameters + stored + sum(gates.values()),
                layers.active + folded + gate,
                streams * (layers.flops + met) + (2 * (gate + streams * dim) if streams > 1 else 0),
            )

    def __init__(self, config: Config, context: BuildContext, attention: Any) -> None:
        super().__init__()
        self.config = config
        self.chosen = config.in_use or config.num_streams
        self.prefix: PrefixMLP | PrefixTable | None = None
        if config.has_prefix:
            shape = (attention.kv_heads, config.prefix_len, attention.width(context.dim))
            self.prefix = (PrefixMLP if config.prefix == "mlp" else PrefixTable)(config, context, shape)
        elif config.num_streams > 1:
            logger.warning(
                "prefix_len is 0, so all %d streams compute the same; set prefix_len to at least 1 unless this is a control",
                config.num_streams,
            )
        self.gates = nn.ModuleDict(
            # A name must be text.
            {str(number): _gate(number, context) for number in config.gated}
        )

    @property
    def num_streams(self) -> int:
        """P of a forward pass that does not say it."""
        return self.chosen

    @property
    def config_in_use(self) -> Any:
        """The config, with the number that `set_streams` chose."""
        chosen = None if self.chosen == self.config.num_streams else self.chosen
        return self.config if chosen == self.config.in_use else self.config.replace(in_use=chosen)

    def num_prefix_of(self, num_streams: int) -> int:
        """M; none where one stream is the plain model."""
        is_special = num_streams > 1 or self.config.prefix_alone
        return self.config.prefix_len if self.prefix is not None and is_special else 0

    @property
    def has_idle_parameters(self) -> bool:
        """Whether a training step leaves parameters out: gates of other numbers of streams."""
        return bool(self.config.switchable)

    def set_streams(self, num_streams: int) -> None:
        """Run with this many streams where a call does not say it, also when saved and loaded.

        Raises ConfigError for a number that has no gate.
        """
        self.check(num_streams)
        self.chosen = num_streams

    def check(self, num_streams: int) -> None:
        """Raise ConfigError for a number of streams that has no gate."""
        self.config.check_gate(num_streams)

    def prefixes(self, num_streams: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """(key_PHMD, value_PHMD) of each layer, of so many streams; None for those in use."""
        count = self.num_streams if num_streams is None else num_streams
        if self.prefix is None or self.num_prefix_of(count) == 0:
            return []
        return [(key_PHMD[:count], value_PHMD[:count]) for key_PHMD, value_PHMD in self.prefix()]

    def merge(self, x_BLW: Tensor, context: RoutingContext) -> Tensor:
        """H = sum over streams of w_p H_p, w from the gate; ``x_BLW`` itself with one stream."""
        streams = context.num_streams
        if streams == 1:
            return x_BLW
        x_PBLW = x_BLW.unflatten(0, (streams, x_BLW.shape[0] // streams))
        weight_BLP = self.weights(x_PBLW)
        if context.is_measured:
            context.emit_metric("stream_weight_min", weight_BLP.flatten(0, 1).mean(0).min())
            context.emit_metric("stream_entropy", -(weight_BLP * weight_BLP.clamp_min(1e-9).log()).sum(-1).mean())
        weight_PBL1 = weight_BLP.movedim(-1, 0).unsqueeze(-1)
        return (x_PBLW * weight_PBL1.to(x_PBLW.dtype)).sum(0)

    def weights(self, x_PBLW: Tensor) -> Tensor:
        """w_BLP in fp32: softmax of the gate's logits, smoothed. Features interleave as (feature, stream), index = f P + p."""
        streams = x_PBLW.shape[0]
        logit_BLP = self.gates[str(streams)](x_PBLW.permute(1, 2, 3, 0).flatten(2))
        weight_BLP = logit_BLP.float().softmax(-1)
        return (1 - self.config.smoothing) * weight_BLP + self.config.smoothing / streams


class PrefixTable(nn.Module):
    """Prefixes as parameters, from N(0, prefix_std): ``key[l]`` and ``value[l]``, each ``[P, H, M, D]``."""

    def __init__(self, config: ParScale.Config, context: BuildContext, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.key, self.value = nn.ParameterList(), nn.ParameterList()
        for _ in range(context.num_layers):
            for part in (self.key, self.value):
                weight = torch.empty(config.num_streams, *shape)
                part.append(nn.Parameter(nn.init.normal_(weight, std=config.prefix_std, generator=context.generator)))

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """(key_PHMD, value_PHMD) of each layer."""
        return list(zip(self.key, self.value, strict=True))


class PrefixMLP(nn.Module):
    """Prefixes made by one network per layer from an embedding e_p of each stream: W_2 tanh(W_1 e_p + b_1) + b_2."""

    def __init__(self, config: ParScale.Config, context: BuildContext, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape
        heads, length, width = shape
        embedding = torch.empty(config.num_streams, config.embedding_dim)
        self.embedding_PC = nn.Parameter(nn.init.normal_(embedding, generator=context.generator))
        self.layers = nn.ModuleList(
            nn.Sequential(
                context.linear(config.embedding_dim, config.mlp_dim, bias=True),
                nn.Tanh(),
                context.linear(config.mlp_dim, 2 * heads * length * width, bias=True),
            )
            for _ in range(context.num_layers)
        )

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """(key_PHMD, value_PHMD) of each layer."""
        made = [layer(self.embedding_PC).unflatten(-1, (2, *self.shape)) for layer in self.layers]
        return [(prefix[:, 0], prefix[:, 1]) for prefix in made]


def _gate(streams: int, context: BuildContext) -> nn.Sequential:
    return nn.Sequential(
        context.linear(streams * context.dim, context.dim, bias=True),
        nn.SiLU(),
        context.linear(context.dim, streams, bias=True),
    )


def _gate_parameters(streams: int, dim: int) -> int:
    return (streams * dim + 1) * dim + (dim + 1) * streams
