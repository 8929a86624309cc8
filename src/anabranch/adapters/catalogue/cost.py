"""`estimate`: what a method costs on a model before it is trained: by formulas held against measured numbers, bytes and FLOPs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from anabranch.adapters.catalogue.card import Card, Op
from anabranch.adapters.catalogue.kept import kept_bytes
from anabranch.adapters.catalogue.shape import Matrix, Shape
from anabranch.adapters.catalogue.written import written_bytes
from anabranch.bounds import MOST_SIZE, shown
from anabranch.errors import ConfigError

__all__ = ["Estimate", "estimate", "settings"]

# Of float32: a gradient, and AdamW's two moments.
_FLOAT, _GRADIENT, _MOMENTS = 4, 4, 8


@dataclass(frozen=True)
class Estimate:
    """What a method costs.

    Attributes:
        card: the method.
        options: what was set, with usual values for the rest.
        matched: names of the adapted linear layers.
        skipped: of the others.
        trainable: numbers that learn.
        share: of the model's parameters.
        adapter_bytes: of all that stands beside the base, what is drawn once and stays included.
        gradient_bytes, optimizer_bytes: of training with AdamW.
        file_bytes: of the file that `anabranch adapt` writes, header included: of the adapter, or of the whole model where parameters of
            the base learn. Counted when it is asked for. Of methods that peft runs the header is counted roughly.
        base_bytes: of the model's weights in the type that was asked for.
        activation_bytes: that a training step keeps of its forward pass, by the formula of `anabranch.adapters.catalogue.kept`; without
            recomputation. None where nobody has counted what the method computes.
        base_flops, added_flops: of a token in a forward pass: the model's, and what the adapter adds.
        training_flops: of a token, forward and backward.
        full_flops: the same of full fine-tuning.
        merged_flops: what the adapter adds once it is merged; None where it cannot be.
    """

    card: Card
    options: Mapping[str, Any]
    matched: tuple[str, ...]
    skipped: tuple[str, ...]
    trainable: int
    share: float
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    base_bytes: int
    activation_bytes: int | None
    base_flops: float
    added_flops: float | None
    training_flops: float | None
    full_flops: float
    merged_flops: float | None
    _file: Callable[[], int] = field(repr=False, compare=False)

    @cached_property
    def file_bytes(self) -> int:
        """See above."""
        return self._file()

    @property
    def training_bytes(self) -> int:
        """Base, adapter, gradients and optimizer: all but activations."""
        return self.base_bytes + self.adapter_bytes + self.gradient_bytes + self.optimizer_bytes

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-ready."""
        return {
            "id": self.card.id,
            "name": self.card.name,
            "options": {
                name: list(value) if isinstance(value, tuple) else value for name, value in self.options.items()
            },
            "matched": len(self.matched),
            "skipped": len(self.skipped),
            "trainable": self.trainable,
            "trainable_share": self.share,
            "bytes": {
                "adapter": self.adapter_bytes,
                "gradients": self.gradient_bytes,
                "optimizer": self.optimizer_bytes,
                "file": self.file_bytes,
                "base": self.base_bytes,
                "training": self.training_bytes,
                "activations": self.activation_bytes,
            },
            "flops_per_token": {
                "base_forward": self.base_flops,
                "added_forward": self.added_flops,
                "added_merged": self.merged_flops,
                "training": self.training_flops,
                "full_training": self.full_flops,
            },
        }


def settings(card: Card, options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` of a card with its usual values for what is not said.

    Raises ConfigError for an option that it has not, and for a value of another kind, or below 1 where it counts something.
    """
    unknown = [name for name in options if name not in card.options]
    if unknown:
        known = f"it has {', '.join(card.options)}" if card.options else "it has none"
        raise ConfigError(f"{card.id} has no option {unknown[0]!r}; {known}")
    made = dict(card.options)
    for name, value in options.items():
        made[name] = _checked(f"{name} of {card.id}", value, made[name], card.least.get(name, 1))
    return made


def _checked(what: str, value: Any, usual: Any, least: int) -> Any:
    """The value of an option, of the kind of its usual one. Raises ConfigError."""
    if isinstance(usual, tuple):
        return _words(what, value, usual)
    if isinstance(usual, int) and (type(value) is not int or not least <= value <= MOST_SIZE):
        raise ConfigError(
            f"{what} is {shown(value)}; it must be a whole number, at least {least} and at most {MOST_SIZE}"
        )
    if isinstance(usual, float) and (type(value) not in (int, float) or not abs(value) < 1e30):
        raise ConfigError(f"{what} is {shown(value)}; it must be a finite number")
    if isinstance(usual, str) and not isinstance(value, str):
        raise ConfigError(f"{what} is {shown(value)}; it must be a word, such as {usual}")
    return value


def _words(what: str, value: Any, usual: Sequence[str]) -> tuple[str, ...]:
    """Names or ids of tokens, told as words, by commas, or as numbers. Raises ConfigError."""
    are_ids = _are_ids(usual)
    kind = "ids of tokens, such as 3,17" if are_ids else "names of linear layers, such as q,v"
    words = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    words = [str(word) if are_ids and type(word) is int else word for word in words]
    if not all(isinstance(word, str) for word in words):
        raise ConfigError(f"{what} is {shown(value)}; it must be {kind}")
    if are_ids and not (words and _are_ids(words) and len(set(words)) == len(words)):
        raise ConfigError(f"{what} is {shown(value)}; it must be {kind}, each once")
    return tuple(words)


def _are_ids(words: Sequence[str]) -> bool:
    return all(word.isdecimal() and word.isascii() and len(word) < 10 for word in words)


def estimate(
    card: Card,
    shape: Shape,
    options: Mapping[str, Any] | None = None,
    *,
    batch: int = 1,
    length: int = 512,
    base_width: float = 4,
) -> Estimate:
    """What ``card`` costs on a model.

    Args:
        card: the method.
        shape: of the model.
        options: of the method, see `settings`.
        batch, length: sequences and tokens of a step, over which what is done once per pass is spread, and attention is counted.
        base_width: bytes of one of the base's weights.

    Raises ConfigError: an option that the method has not, targets that name nothing, a method whose trainable parameters cannot be said
    beforehand, one that would train nothing, and a batch or length below 1.
    """
    for name, value in (("batch", batch), ("length", length)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    made = settings(card, options or {})
    if card.count is None:
        raise ConfigError(f"{card.id} trains {card.formula}, which cannot be told beforehand")
    chosen = shape.chosen(made["targets"]) if "targets" in made else []
    if card.takes is not None:
        chosen = [matrix for matrix in chosen if card.takes(matrix, shape, made)]
    trainable = card.count(chosen, shape, made)
    if trainable == 0 and (card.needs_bias or card.backend != "none"):
        why = "no linear layer is left to adapt"
        if card.needs_bias:
            why = "this model has no biases; take ln-tuning, which trains its norms, or a method whose layers stand beside it, such as lora"
        raise ConfigError(f"{card.id} would train nothing: {why}")
    frozen = card.frozen(chosen, shape, made) if card.frozen else 0
    flow = _Flow(card, shape, chosen, made, length, batch * length)
    forward, added = flow.forward()
    parts = {matrix.part for matrix in chosen}
    return Estimate(
        card=card,
        options=made,
        matched=tuple(matrix.part for matrix in chosen),
        skipped=tuple(matrix.part for matrix in shape.matrices if matrix.part not in parts),
        trainable=trainable,
        share=trainable / shape.parameters,
        adapter_bytes=0 if card.trains_base else _FLOAT * (trainable + frozen),
        gradient_bytes=_GRADIENT * trainable,
        optimizer_bytes=_MOMENTS * trainable,
        base_bytes=round(shape.parameters * base_width),
        activation_bytes=None if added is None else flow.kept(base_width),
        base_flops=forward,
        added_flops=added,
        training_flops=None if added is None else flow.training(),
        full_flops=3 * forward,
        merged_flops={"yes": 0.0, "is the base": 0.0}.get(card.merges),
        _file=partial(written_bytes, card, shape, chosen, made, trainable + frozen, base_width),
    )


class _Flow:
    """FLOPs of a token through a model with a method on it, block by block, and back again as far as something learns."""

    def __init__(
        self, card: Card, shape: Shape, chosen: Sequence[Matrix], options: Mapping[str, Any], length: int, tokens: int
    ) -> None:
        self.card, self.shape, self.options = card, shape, options
        self.chosen = {matrix.part: matrix for matrix in chosen}
        self.length, self.tokens = length, tokens
        total = shape.config.count(length).flops
        self.head = (
            0 if any(matrix.word == "head" for matrix in shape.matrices) else 2 * shape.config.vocab_size * shape.dim
        )
        self.attention = 2 * shape.query_width * length
        matrices = sum(2 * matrix.size * matrix.share for matrix in shape.matrices)
        # Of routers, and of what else a design has.
        self.rest = max(0.0, total - matrices - self.head - shape.num_layers * self.attention)
        self.total = float(total)

    def ops(self, matrix: Matrix) -> list[Op]:
        """What is added to one matrix."""
        if matrix.part not in self.chosen or self.card.work is None:
            return []
        return self.card.work.ops(matrix, self.options)

    @property
    def longer(self) -> float:
        """How many times as many tokens there are with those that stand in front."""
        added = self.card.added_tokens(self.options) if self.card.added_tokens else 0
        return (self.length + added) / self.length

    @property
    def prefix(self) -> float:
        """FLOPs of a token with the positions that stand in front of a layer's keys."""
        return (
            4 * self.shape.query_width * (self.card.prefix_positions(self.options) if self.card.prefix_positions else 0)
        )

    def forward(self) -> tuple[float, float | None]:
        """(of the model, of what is added); None where nobody has counted that."""
        if self.card.added_tokens is not None:
            return self.total, self.total * (self.longer - 1)
        if self.card.along is not None:
            return self.total, self.card.along(self.shape, self.options)[0]
        if self.card.work is None and self.card.prefix_positions is None and not self.card.trains_base:
            return self.total, None
        added = sum(
            matrix.share * (op.flops + op.per_call / self.tokens)
            for matrix in self.chosen.values()
            for op in self.ops(matrix)
        )
        return self.total, added + self.prefix * self.shape.num_layers

    def kept(self, base_width: float) -> int:
        """Bytes of activations of a step; numbers are computed in 16 bits at least, whatever weights are stored in."""
        chosen, width = list(self.chosen.values()), max(2.0, base_width)
        batch = self.tokens // self.length
        return kept_bytes(
            self.card, self.shape, chosen, self.options, self.ops, width=width, batch=batch, length=self.length
        )

    def training(self) -> float:
        """Forward and backward: gradients of inputs wherever something below learns, and of what learns."""
        forward, added = self.forward()
        assert added is not None
        if self.card.along is not None:
            fed = self.card.along(self.shape, self.options)[1]
            return forward + added + 2 * added - fed + self._head
        # In front of the first layer only vectors, norms and the embedding learn.
        learns = self.card.added_tokens is not None or self.card.trains_norms
        backward, stream = 0.0, learns
        for layer in range(self.shape.num_layers):
            inside = [matrix for matrix in self.shape.matrices if matrix.layer == layer]
            attention = [matrix for matrix in inside if ".attention." in matrix.part]
            others = [matrix for matrix in inside if ".attention." not in matrix.part]
            flops, stream = self._sublayer(attention, "o", stream or learns, self.attention + self.prefix)
            backward += flops
            flops, stream = self._sublayer(others, "down", stream or learns, 0.0)
            backward += flops
        for matrix in self.shape.matrices:
            if matrix.layer is None:
                backward += self._backward(matrix, stream)[0]
        backward += self.head * (stream + self.card.trains_all) + 2 * self.rest * stream
        return forward + added + backward * self.longer

    @property
    def _head(self) -> float:
        """FLOPs of a gradient through the head."""
        own = sum(2 * matrix.size for matrix in self.shape.matrices if matrix.word == "head")
        return float(self.head or own)

    def _sublayer(self, matrices: Sequence[Matrix], last: str, stream: bool, core: float) -> tuple[float, bool]:
        """(FLOPs backward, whether gradients go on from the stream behind it): all matrices but the last, what is between, the last."""
        total, inner = 0.0, stream or bool(self.card.prefix_positions and core)
        for matrix in matrices:
            if matrix.word != last:
                flops, out = self._backward(matrix, stream)
                total, inner = total + flops, inner or out
        total += 2 * core * inner
        for matrix in matrices:
            if matrix.word == last:
                flops, out = self._backward(matrix, inner)
                total, inner = total + flops, inner or out
        return total, stream or inner

    def _backward(self, matrix: Matrix, takes: bool) -> tuple[float, bool]:
        """(FLOPs backward of one matrix and what is beside it, whether its output needs a gradient), where its input does or not."""
        is_chosen = matrix.part in self.chosen
        trains = self.card.trains_all or (self.card.trains_base and is_chosen)
        total, inner = 2.0 * matrix.size * (takes + trains), takes
        for op in self.ops(matrix):
            needs = takes if op.takes_x else inner
            total += op.flops * (op.trains + needs) + 2 * op.per_call * op.trains / self.tokens
            inner = inner or needs or op.trains
        learns = trains or is_chosen or (self.card.needs_bias and matrix.word in ("q", "k", "v"))
        return total * matrix.share, takes or learns
