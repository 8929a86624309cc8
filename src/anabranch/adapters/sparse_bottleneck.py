"""`SparseBottleneck`: a wide adapter of which most weights are pruned before it trains (SparseAdapter, He et al. 2022, arXiv 2210.04284).

    y <- y + (m_U * U) act((m_D * D) y + e) + f         m: 1 for the share 1 - s of weights whose score z is greatest, for good

    z = |w dL/dw| of a batch before the first step        SNIP (Lee et al. 2019, arXiv 1810.02340), the paper's choice

Weights are drawn from N(0, 0.02^2), so that both matrices have a gradient to be scored by; what is pruned is not stored. The greatest
scores are taken of D and U of one adapter together, where the paper takes them of all adapters. Before anything is scored those stay whose
size is greatest, which is its criterion without data.
"""
# Shapes: O outputs, M width, W weights of both matrices, K that are kept; y is [..., O]

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.adapters.after import SerialBottleneck
from anabranch.adapters.bottleneck import ACTIVATIONS
from anabranch.adapters.scoring import slopes_of
from anabranch.config import Field, configclass
from anabranch.errors import ConfigError
from anabranch.nn import BuildContext, Count
from anabranch.nn.linear import Projection

__all__ = ["SparseBottleneck", "kept_weights", "settle", "snip"]

_DEVIATION = 0.02


def kept_weights(width: int, outputs: int, sparsity: float) -> int:
    """K: how many of 2 M O weights are kept, one at least."""
    return max(1, round((1 - sparsity) * 2 * width * outputs))


class SparseBottleneck(SerialBottleneck, kind="sparse_bottleneck"):
    """y + U act(D y + e) + f, with few entries of U and D.

    Attributes:
        value: parameter [K].
        index: buffer [K], their places in D and then U, each flat; ascending.
    """

    index: Tensor

    @configclass
    class Config(SerialBottleneck.Config):
        """As of `SerialBottleneck`, and ``sparsity``, the share of weights that is pruned."""

        sparsity: float = Field(default=0.8, ge=0, lt=1)

        def count(self, projection: Projection, context: BuildContext) -> Count:
            """K weights, and M + O of biases; the products are those of whole matrices."""
            size = 2 * self.width * projection.out_dim
            learned = kept_weights(self.width, projection.out_dim, self.sparsity) + self.width + projection.out_dim
            return Count(learned, learned, 2 * size)

    config: Config

    def __init__(self, config: Config, projection: Projection, context: BuildContext) -> None:
        nn.Module.__init__(self)
        self.config, self.out_dim = config, projection.out_dim
        self.down_bias = nn.Parameter(torch.zeros(config.width))
        self.up_bias = nn.Parameter(torch.zeros(projection.out_dim))
        kept = kept_weights(config.width, projection.out_dim, config.sparsity)
        self.value = nn.Parameter(torch.zeros(kept))
        self.register_buffer("index", torch.arange(kept))
        # All weights, until they are pruned by a score.
        self._drawn_W: Tensor | None = None
        self._scored_W: Tensor | None = None
        if not self.value.is_meta:
            drawn_W = torch.empty(2 * config.width * projection.out_dim).normal_(
                0, _DEVIATION, generator=context.generator
            )
            self._drawn_W = drawn_W
            self._keep(drawn_W.abs())

    @property
    def num_weights(self) -> int:
        """W: places that there are."""
        return 2 * self.config.width * self.out_dim

    def made(self, y: Tensor) -> Tensor:
        """U act(D y + e) + f."""
        weight_W = self._scored_W
        if weight_W is None:
            weight_W = self.value.new_zeros(self.num_weights).index_put((self.index,), self.value)
        down_MO, up_OM = (half.view(size) for half, size in zip(weight_W.chunk(2), self._sizes, strict=True))
        low = ACTIVATIONS[self.config.activation](F.linear(y, down_MO, self.down_bias))
        return F.linear(low, up_OM, self.up_bias)

    @property
    def _sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        width = self.config.width
        return (width, self.out_dim), (self.out_dim, width)

    @torch.no_grad()
    def score(self) -> Tensor:
        """All weights, which passes from now on compute with and have gradients of. Raises ConfigError once they are pruned."""
        self._scored_W = self.drawn_W.to(self.value.device).requires_grad_()
        return self._scored_W

    @property
    def drawn_W(self) -> Tensor:
        """All weights. Raises ConfigError once they are pruned."""
        if self._drawn_W is None:
            raise ConfigError("this adapter has been pruned, and what was pruned is gone; make a new one")
        return self._drawn_W

    def unscore(self) -> None:
        """Passes compute with the weights that are kept again."""
        if self._scored_W is not None:
            self._scored_W.requires_grad_(False)
        self._scored_W = None

    @torch.no_grad()
    def prune(self, score_W: Tensor) -> None:
        """Keep the weights of the greatest scores from here on, as they were drawn."""
        if self._drawn_W is None or score_W.shape != (self.num_weights,):
            raise ConfigError(
                f"there are scores of {list(score_W.shape)}, and {self.num_weights} weights to prune, once"
            )
        self._keep(score_W)
        self.settle()

    def settle(self) -> None:
        """Prune no more: its numbers are those of a file."""
        self._drawn_W = self._scored_W = None

    @torch.no_grad()
    def _keep(self, score_W: Tensor) -> None:
        assert self._drawn_W is not None, "asked before"
        index_K = score_W.topk(len(self.value)).indices.sort().values
        self.index = index_K.to(self.value.device)
        self.value.copy_(self._drawn_W.to(self.value.device)[self.index])

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"out={self.out_dim}, width={self.config.width}, {self.config.activation}, kept={len(self.value)} of {self.num_weights}"


def snip(model: nn.Module, losses: Iterable[Tensor]) -> None:
    """Prune the adapters of ``model`` by |w dL/dw| over ``losses``, which are made while this goes over them.

    One that no loss goes through keeps the largest weights that were drawn. Raises InputError where nothing can be chosen, see `slopes_of`.
    """
    layers = [module for module in model.modules() if isinstance(module, SparseBottleneck)]
    for layer, slope_W in zip(layers, slopes_of(layers, losses, power=1), strict=True):
        if slope_W.any():
            layer.prune((layer.drawn_W.to(slope_W.device) * slope_W).abs())
        else:
            layer.settle()


def settle(model: nn.Module) -> None:
    """See `SparseBottleneck.settle`, of all that there are."""
    for module in model.modules():
        if isinstance(module, SparseBottleneck):
            module.settle()
