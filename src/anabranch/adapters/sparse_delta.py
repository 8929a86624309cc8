"""`SparseDelta`: a matrix of which few entries are learned, y = (W + M) x where M is zero but for k places (SHiRA, arXiv 2406.13175).

    Decoder.Config(linears={"blocks.*.attention.q": SparseDelta.Config(entries=4096)})

Which places is said once: drawn at random, or by `place` from what somebody measured: the Fisher information of the weights (FISH mask,
arXiv 2111.09839), their size (SHiRA-WM), or how far a training of all of them moved them (lottery tickets, arXiv 2110.07560).
"""
# Shapes: C inputs, O outputs, K entries; x is [..., C], y is [..., O]

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.adapters.scoring import slopes_of
from anabranch.bounds import Size
from anabranch.config import Field, configclass
from anabranch.errors import ConfigError
from anabranch.nn import BuildContext, Count, Linear
from anabranch.nn.linear import Projection

__all__ = ["SparseDelta", "place_by_fisher"]


class SparseDelta(Linear, kind="sparse_delta"):
    """M x, which stands beside the matrix whose entries it changes."""

    index: Tensor

    @configclass
    class Config(Linear.Config):
        """Attributes: ``entries``, K, at most those of the matrix."""

        is_added: ClassVar[bool] = True

        entries: Size = Field(default=256, ge=1)

        def count(self, projection: Projection, context: BuildContext) -> Count:
            """K weights; the product is that of a whole matrix until it is merged."""
            size = projection.in_dim * projection.out_dim
            if self.entries > size:
                raise ConfigError(
                    f"entries is {self.entries}, and {projection.name} has {size}; it must be at most that"
                )
            return Count(self.entries, self.entries, 2 * size)

    def __init__(self, config: Config, projection: Projection, context: BuildContext) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.in_dim, self.out_dim = projection.in_dim, projection.out_dim
        self.value = nn.Parameter(torch.zeros(config.entries))
        self.register_buffer("index", self._drawn(context.generator))
        # Zeros for all entries, while they are scored.
        self._scored_OC: Tensor | None = None

    def _drawn(self, generator: torch.Generator | None) -> Tensor:
        """index_K: places of the flat matrix, each once, ascending."""
        return torch.randperm(self.in_dim * self.out_dim, generator=generator)[: self.config.entries].sort().values

    @property
    def num_weights(self) -> int:
        """Places that there are."""
        return self.in_dim * self.out_dim

    def delta(self) -> Tensor:
        """delta_OC: what it adds to the matrix."""
        if self._scored_OC is not None:
            return self._scored_OC
        flat = self.value.new_zeros(self.out_dim * self.in_dim)
        return flat.index_put((self.index,), self.value).view(self.out_dim, self.in_dim)

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """What is added to y. It is computed in the adapter's type, which may be wider than that of ``x``."""
        return F.linear(x.to(self.value.dtype), self.delta())

    def score(self) -> Tensor:
        """zero_OC, which passes add to the matrix until `unscore`: its gradient is that of the matrix, which may be frozen or quantised."""
        self._scored_OC = self.value.new_zeros(self.out_dim, self.in_dim).requires_grad_()
        return self._scored_OC

    def unscore(self) -> None:
        """Passes add the entries that are learned again."""
        self._scored_OC = None

    @torch.no_grad()
    def place(self, score_OC: Tensor) -> None:
        """Learn the entries of the greatest scores from here on, and add nothing at first."""
        flat = score_OC.reshape(-1)
        if flat.numel() != self.in_dim * self.out_dim:
            raise ConfigError(
                f"there are scores of {list(score_OC.shape)}, and the matrix is {[self.out_dim, self.in_dim]}"
            )
        self.index = flat.topk(self.config.entries).indices.sort().values.to(self.value.device)
        self.value.zero_()

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"in={self.in_dim}, out={self.out_dim}, entries={self.config.entries}"


def place_by_fisher(model: nn.Module, losses: Iterable[Tensor]) -> None:
    """Learn the entries of greatest empirical Fisher information (FISH mask, arXiv 2111.09839): the sum of the squares of dL/dW.

    Args:
        model: that has layers of this kind; each has the k greatest of its own matrix, where the paper takes them of all matrices. One that
            no loss goes through keeps the entries that were drawn.
        losses: of each example -log p(answer), the sum over its tokens; made while this goes over them.

    Raises InputError where nothing can be chosen, see `slopes_of`.
    """
    layers = [module for module in model.modules() if isinstance(module, SparseDelta)]
    for layer, score_OC in zip(layers, slopes_of(layers, losses, power=2), strict=True):
        if score_OC.any():
            layer.place(score_OC)
