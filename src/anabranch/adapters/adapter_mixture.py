"""`AdapterMixture`: several adapters behind a matrix, one at random in each step, their average afterwards (AdaMix, Wang et al. 2022,
arXiv 2205.12410).

    y <- y + U_j act(D_i y + e_i) + f_j         i, j drawn anew for each layer and step, each of K (section 3.1, stochastic routing)
    y <- y + U act(D y + e) + f                 outside of training: each the mean of its K (section 3.3, merging)

    L = CE(z_A) + c (KL(z_A || z_B) + KL(z_B || z_A)) / 2       A, B: two random choices for the same rows (section 3.2, consistency)

Both choices are made in one pass, over rows that stand there twice (`twice_told`). What is written after training is one adapter, the
average (`averaged`).
"""
# Shapes: K adapters, O outputs, M width, P passes side by side, N rows and positions; y is [..., O]

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.adapters.after import SerialBottleneck
from anabranch.adapters.bottleneck import ACTIVATIONS
from anabranch.adapters.low_rank import draw_a
from anabranch.adapters.own_folder import OwnAdapter
from anabranch.bounds import Size
from anabranch.config import Field, configclass, to_dict
from anabranch.errors import ConfigError
from anabranch.nn import BuildContext, Count, Linear
from anabranch.nn.linear import Projection, Rows
from anabranch.routing import OfPass

__all__ = ["AdapterMixture", "averaged", "twice_told"]

# Of a forward context's state: of each item, whether it is of the second half of a pass whose rows stand there twice; and the same of the
# whole pass, with its number of streams.
_HALF, _WHOLE = "adapter_mixture.half", "adapter_mixture.whole"


def twice_told(rows: int, length: int, *, num_streams: int = 1, device: torch.device | None = None) -> dict[str, Any]:
    """The ``state`` of a pass of ``rows``, of which the second half are those of the first again, and go through other adapters.

    Of a model with streams all of a row's go through the same; ``num_streams`` is theirs.
    """
    half_R = torch.arange(rows, device=device) >= rows // 2
    half_RL = half_R.repeat(num_streams).unsqueeze(1).expand(-1, length)
    return {_HALF: half_RL, _WHOLE: OfPass((half_RL, num_streams))}


class AdapterMixture(SerialBottleneck, kind="adapter_mixture"):
    """K bottlenecks of which one works in a step of training, and their average afterwards. Every U and f is zero at first."""

    @configclass
    class Config(SerialBottleneck.Config):
        """As of `SerialBottleneck`, and ``number``, K."""

        number: Size = Field(default=4, ge=1)

        def count(self, projection: Projection, context: BuildContext) -> Count:
            """K times 2 M O weights, and M + O of biases; those of one are active."""
            size, biases = 2 * self.width * projection.out_dim, self.width + projection.out_dim
            return Count(self.number * (size + biases), size + biases, 2 * size)

    config: Config

    def __init__(self, config: Config, projection: Projection, context: BuildContext) -> None:
        nn.Module.__init__(self)
        self.config = config
        number, width, outputs = config.number, config.width, projection.out_dim
        self.down = nn.Parameter(torch.empty(number, width, outputs))
        self.down_bias = nn.Parameter(torch.zeros(number, width))
        self.up = nn.Parameter(torch.zeros(number, outputs, width))
        self.up_bias = nn.Parameter(torch.zeros(number, outputs))
        draw_a(self.down.data, context.generator)

    def around(self, rows: Rows, context: Any = None) -> Tensor:
        """y. It is computed in the adapter's type, which may be wider than that of the matrix."""
        y = rows.y.to(self.down_bias.dtype)
        return (y + self._of_pass(y, {} if context is None else context.state)).to(rows.y.dtype)

    def _of_pass(self, y: Tensor, state: Mapping[str, Any]) -> Tensor:
        """`made`, with a choice for each half of a pass whose rows stand there twice; raises ConfigError where nobody knows these."""
        if not self.training or _HALF not in state:
            return self.made(y)
        half_NL, (whole_RL, num_streams) = state[_HALF], state[_WHOLE].value
        if half_NL is whole_RL and y.shape[:-1].numel() == half_NL.numel():
            return self.made(y, 2, num_streams)
        if half_NL.numel() != y.shape[:-1].numel():
            raise ConfigError(
                f"a mixture of adapters sees {y.shape[:-1].numel()} items where the rows of a pass, which stand there twice, are of "
                f"{half_NL.numel()}: what is around it merges some, and nobody knows which half each is of; set method.consistency to 0, "
                "which computes each row once"
            )
        # Some rows of the pass, in some order: both choices for all, which are narrow.
        y_2NO = y.reshape(1, -1, y.shape[-1]).expand(2, -1, -1)
        first_NO, second_NO = self._through(y_2NO, *torch.randint(self.config.number, (2, 2)).unbind())
        return torch.where(half_NL.reshape(-1, 1), second_NO, first_NO).view_as(y)

    def made(self, y: Tensor, passes: int = 1, num_streams: int = 1) -> Tensor:
        """U act(D y + e) + f: of the average, or in training of what is drawn for each of ``passes`` equal parts of the rows.

        With streams these parts stand there once for each stream, and have the same adapters in all.
        """
        if not self.training:
            return self._through(y.reshape(1, -1, y.shape[-1]), None, None).view_as(y)
        down_P, up_P = torch.randint(self.config.number, (2, passes)).repeat(1, num_streams).unbind()
        return self._through(y.reshape(passes * num_streams, -1, y.shape[-1]), down_P, up_P).view_as(y)

    def _through(self, y_PNO: Tensor, down_P: Tensor | None, up_P: Tensor | None) -> Tensor:
        """[P, N, O]: each part through its halves; None for the average of all."""
        down_PMO, e_PM = _of(self.down, down_P), _of(self.down_bias, down_P)
        up_POM, f_PO = _of(self.up, up_P), _of(self.up_bias, up_P)
        low_PNM = ACTIVATIONS[self.config.activation](torch.baddbmm(e_PM[:, None], y_PNO, down_PMO.transpose(1, 2)))
        return torch.baddbmm(f_PO[:, None], low_PNM, up_POM.transpose(1, 2))

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return (
            f"number={self.config.number}, out={self.up.shape[1]}, width={self.config.width}, {self.config.activation}"
        )


def _of(stack: Tensor, index_P: Tensor | None) -> Tensor:
    """Those of ``index_P``, or the average, ``[1, ...]``."""
    return stack.mean(0, keepdim=True) if index_P is None else stack[index_P.to(stack.device)]


def averaged(adapter: OwnAdapter) -> OwnAdapter:
    """The adapter of such layers with the average in place of each: plain bottlenecks, which compute what they did."""
    linears: dict[str, Linear.Config] = {
        pattern: SerialBottleneck.Config(width=config.width, activation=config.activation)
        for pattern, config in adapter.parts.linears.items()
        if isinstance(config, AdapterMixture.Config)
    }
    assert len(linears) == len(adapter.parts.linears), "adamix puts on nothing else"
    parts = replace(adapter.parts, linears=linears)
    numbers = {name: stack.mean(0) for name, stack in adapter.numbers.items()}
    return OwnAdapter({**adapter.table, **to_dict(parts)}, parts, numbers)
