"""What a training step keeps of its forward pass for the backward one: activations, of a token, by formula.

Wherever a gradient goes on through a block, that is: what goes into its norms (2 d); queries, keys and values before their positions and
after, and what attention makes of them (3 d_q + 3 d_kv; behind virtual tokens 2 d_q + 2 d_kv, with theirs); gate and up of a gated
feed-forward layer (2 F), with what goes into it (d) where the kernels do it at once, or with the gate's activation (F) where something
stands beside its matrices. Whatever learns keeps what goes into it, once for all that take the same, and what is between its own matrices;
behind the last block stand the last norm's input and a probability for each token of the vocabulary. A network along the model keeps what
it takes of each block, and its own: no gradient goes through the model then. With recomputation blocks keep their inputs alone, which is
not what is counted here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from anabranch.adapters.catalogue.card import Card, Op, Options
from anabranch.adapters.catalogue.shape import Matrix, Shape
from anabranch.adapters.catalogue.works import ELEMENTWISE

__all__ = ["kept_bytes"]

_WIDE = 4


@dataclass(frozen=True)
class _Pass:
    """One method on one model; numbers are of a token, in the model's type."""

    card: Card
    shape: Shape
    chosen: frozenset[str]
    options: Options
    ops: Callable[[Matrix], list[Op]]
    length: int

    @property
    def front(self) -> int:
        """Virtual positions that attention meets in front of a sequence."""
        counts = self.card.added_tokens, self.card.prefix_positions
        return sum(count(self.options) for count in counts if count is not None)

    @property
    def has_gates(self) -> bool:
        """Whether these positions stand behind a gate of each query."""
        return self.card.front is not None and self.card.front(self.shape, self.options).gated

    @property
    def learns_norms(self) -> bool:
        """Whether norms learn, whose inputs are kept though nothing learns below."""
        return self.card.trains_norms

    def trains(self, matrix: Matrix) -> bool:
        """Whether the matrix itself learns."""
        return self.card.trains_all or (self.card.trains_base and matrix.part in self.chosen)

    def takes(self, matrix: Matrix) -> bool:
        """Whether what goes into a matrix is kept for something that learns by it."""
        return self.trains(matrix) or (
            any(op.trains and op.takes_x for op in self.ops(matrix)) and not self.is_behind(matrix)
        )

    def is_behind(self, matrix: Matrix) -> bool:
        """Whether the adapter takes what comes out of a matrix."""
        return self.card.work is not None and self.card.work.is_behind(matrix)

    def beside(self, matrix: Matrix) -> float:
        """What is kept beside one matrix, but what goes into it."""
        if matrix.part not in self.chosen:
            return 0.0
        if self.card.work is ELEMENTWISE:
            is_input = matrix.word in self.options.get("feedforward", ())
            return 0.0 if is_input else float(matrix.out_dim)
        narrow = sum(op.flops / (2 * matrix.out_dim) for op in self.ops(matrix) if op.trains and not op.takes_x)
        own = 0.0 if self.card.work is None else self.card.work.kept(matrix, self.options)
        return narrow + own + (matrix.out_dim if self.is_behind(matrix) else 0.0)

    def sublayer(self, matrices: Sequence[Matrix], last: str, stream: bool) -> tuple[float, bool]:
        """(what half a block keeps, whether gradients go on behind it)."""
        first = [matrix for matrix in matrices if matrix.word != last]
        final = [matrix for matrix in matrices if matrix.word == last]
        kept = float(self.shape.dim) * (stream or self.learns_norms)
        inner = stream or self.learns_norms or any(self.learns(matrix) for matrix in first)
        is_attention = last == "o"
        inner = inner or (is_attention and self.front > 0)
        hidden = sum(matrix.out_dim * matrix.share for matrix in first)
        is_plain = not any(matrix.part in self.chosen and not self.card.trains_base for matrix in matrices)
        takes = any(self.takes(matrix) for matrix in first)
        if is_attention:
            kept += self.shape.dim * takes
            if inner and self.front:
                # Keys and values are copied behind those in front.
                kept += 2 * (self.shape.query_width + self.shape.kv_width * (1 + self.front / self.length))
                if self.has_gates:
                    # Heads twice as wide, behind each query's gate; and queries as they were.
                    kept += 2 * (self.shape.query_width + self.shape.kv_width * (1 + self.front / self.length))
                    kept += self.shape.query_width
            elif inner:
                kept += 3 * (self.shape.query_width + self.shape.kv_width)
            elif any(self.takes(matrix) for matrix in final):
                kept += self.shape.query_width
        elif is_plain:
            kept += (self.shape.dim + hidden) * (inner or any(self.takes(matrix) for matrix in matrices))
        else:
            # The gate's activation, of as many numbers as go into the last matrix, and their product where that is taken.
            width = sum(matrix.in_dim * matrix.share for matrix in final)
            is_taken = any(self.takes(matrix) or self._scales_input(matrix) for matrix in final)
            kept += self.shape.dim * takes + (hidden + width * (hidden > width)) * inner + width * is_taken
        kept += sum(self.beside(matrix) * matrix.share for matrix in matrices)
        return kept, stream or inner or any(self.learns(matrix) for matrix in final)

    def learns(self, matrix: Matrix) -> bool:
        """Whether what comes out of a matrix has a gradient of its own."""
        is_biased = self.card.needs_bias and matrix.word in ("q", "k", "v")
        return self.trains(matrix) or matrix.part in self.chosen or is_biased

    def _scales_input(self, matrix: Matrix) -> bool:
        return self.card.work is ELEMENTWISE and matrix.part in self.chosen and self.beside(matrix) == 0

    def blocks(self) -> float:
        """What all blocks keep."""
        stream = self.card.trains_all
        total = 0.0
        for layer in range(self.shape.num_layers):
            inside = [matrix for matrix in self.shape.matrices if matrix.layer == layer]
            attention = [matrix for matrix in inside if ".attention." in matrix.part]
            others = [matrix for matrix in inside if ".attention." not in matrix.part]
            for matrices, last in ((attention, "o"), (others, "down")):
                kept, stream = self.sublayer(matrices, last, stream)
                total += kept
        return total


def kept_bytes(
    card: Card,
    shape: Shape,
    chosen: Sequence[Matrix],
    options: Options,
    ops: Callable[[Matrix], list[Op]],
    *,
    width: float,
    batch: int,
    length: int,
) -> int:
    """Bytes that a step of ``batch`` sequences of ``length`` tokens keeps; a number of the model has ``width`` of them, a probability 4.

    ``ops`` says what is added to a matrix. Virtual tokens go through the model once for all sequences.
    """
    tokens, virtual = batch * length, 0 if card.added_tokens is None else card.added_tokens(options)
    if card.along is not None:
        blocks = card.along(shape, options)[2]
    else:
        blocks = _Pass(card, shape, frozenset(matrix.part for matrix in chosen), options, ops, length).blocks()
    head = next((matrix for matrix in shape.matrices if matrix.word == "head"), None)
    vocabulary = shape.config.vocab_size if head is None else head.out_dim
    return round(width * (blocks * (tokens + virtual) + shape.dim * tokens) + _WIDE * vocabulary * tokens)
