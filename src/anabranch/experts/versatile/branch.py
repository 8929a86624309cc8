"""`Branch`: a feed-forward as the paths of VersatileFFN see it, ours or another library's."""
# Shapes: N items, D width, F hidden

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from anabranch.nn.linear import call_linear

__all__ = ["Branch", "Layer", "Weights"]

# Gate [F, D] where there is one, up [F, D], down [D, F].
Weights = tuple[Tensor, ...]

# Called with rows and a forward context of them.
Layer = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Branch:
    """A feed-forward as the paths see it: f(H) = after(down(hidden(norm(H)))).

    Attributes:
        norm: the block's norm before the feed-forward.
        hidden: ``[N, D] -> [N, F]``, the activated hidden units; called with the rows and a forward context of them.
        down: ``[N, F] -> [N, D]``.
        after: the block's norm behind the feed-forward, where it has one (OLMo 2).
        dim: D.
        hidden_dim: F.
        num_inputs: matrices into the hidden layer, 2 with a gate.
        weights: what leads into the hidden units (gate and up, or up alone), and down, without biases; None where they cannot be cut.
        activation: between them, see `anabranch.nn.activation`.
        at_once: down(hidden(h)) in one call, where that is quicker than the two.
        is_replaced: whether a matrix is another layer, which may ask the context for its rows, and need not be a linear map.
    """

    norm: Callable[[Tensor], Tensor]
    hidden: Layer
    down: nn.Module
    dim: int
    hidden_dim: int
    after: Callable[[Tensor], Tensor] | None = None
    num_inputs: int = 2
    weights: Callable[[], Weights] | None = None
    activation: str = "swiglu"
    at_once: Layer | None = None
    is_replaced: bool = False

    def output(self, a_NF: Tensor, context: Any = None) -> Tensor:
        """From hidden units to the change of the stream."""
        y_ND = call_linear(self.down, a_NF, context)
        return y_ND if self.after is None else self.after(y_ND)

    def change(self, x_ND: Tensor, context: Any = None) -> Tensor:
        """f(H) for the stream ``x_ND``."""
        h_ND = self.norm(x_ND)
        if self.at_once is not None and self.after is None:
            return self.at_once(h_ND, context)
        return self.output(self.hidden(h_ND, context), context)

    @property
    def flops(self) -> int:
        """Of one pass, per token."""
        return 2 * self.dim * self.hidden_dim * (self.num_inputs + 1)

    @property
    def output_flops(self) -> int:
        """Of the second matrix alone."""
        return 2 * self.dim * self.hidden_dim
