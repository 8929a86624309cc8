"""`GliderScore`: how well each adapter suits a token, by a vector of its own, and its row, by what the row was told.

z_e(u) = local_e(u) + bias_e          local_e(u) = LayerNorm(u) . v_e / sqrt(C)     (PHATGOOSE, arXiv 2402.05859)
                                      local_e(u) = |u . v_e| / temperature          (Arrow, arXiv 2405.11157)

With clusters of adapters a token first chooses the cluster whose members' mean local score is greatest, and the others are closed to it.
"""
# Shapes: N items, E adapters, G clusters, C inputs, B rows, L positions

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.bounds import Size
from anabranch.config import Field, configclass
from anabranch.errors import InputError
from anabranch.precision import cast, full_precision, wide
from anabranch.routing import OfPass, RoutingContext, Score

__all__ = ["GliderScore", "Local", "bias_rows"]

Local = Literal["phatgoose", "arrow", "none"]
# Of a forward context's state: what `bias_rows` makes, and where scores leave what they found, for whoever asked.
_BIAS, _SEEN = "glider.bias", "glider.seen"


def bias_rows(bias_BE: Tensor, length: int) -> dict[str, Tensor]:
    """The ``state`` of a forward pass whose rows have these global terms, one for each adapter, at every layer and position.

    Args:
        bias_BE: float ``[rows, adapters]``.
        length: L of the pass.

    Raises InputError for another shape, and numbers that are not finite.
    """
    if bias_BE.dim() != 2 or not bias_BE.is_floating_point():
        raise InputError(
            f"the bias has shape {list(bias_BE.shape)} and type {bias_BE.dtype}; it must be float [rows, adapters]"
        )
    if not bool(bias_BE.isfinite().all()):
        raise InputError("the bias has numbers that are not finite")
    return {_BIAS: bias_BE.unsqueeze(1).expand(-1, length, -1)}


def watching(seen: dict[int, Tensor]) -> dict[str, Any]:
    """State by which scores leave their local part in ``seen``, float ``[N, E]``, by the id of the score."""
    return {_SEEN: OfPass(seen)}


def seen_by(score: Score, state: Mapping[str, Any]) -> Tensor | None:
    """What a score left, where the ``state`` of its pass is `watching`; None where it left nothing."""
    return state[_SEEN].value.get(id(score)) if _SEEN in state else None


class GliderScore(Score, kind="glider"):
    """Given vectors, nothing learned: they are put in by `anabranch.adapters.glider.GliderPool`.

    Attributes:
        vectors: parameter [E, C], frozen. Zero for an adapter that this matrix lacks.
        unsigned_E: bool [E], adapters whose vector has no sign, so that the magnitude of its product counts.
        member_GE: bool [G, E], who is in which cluster, of those that this matrix has; only with clusters.
    """

    @configclass
    class Config(Score.Config):
        """How a token is scored.

        Attributes:
            local: see the top of this file; ``none`` leaves it to what rows are told.
            temperature: of ``arrow``.
            clusters: G; None for one choice among all.
        """

        local: Local = "phatgoose"
        temperature: float = Field(default=1.0, gt=0)
        clusters: Size | None = Field(default=None, ge=1)

    config: Config
    unsigned_E: Tensor
    member_GE: Tensor

    def __init__(
        self, config: Config, dim: int, num_destinations: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config)
        self.vectors = nn.Parameter(torch.zeros(num_destinations, dim), requires_grad=False)
        self.register_buffer("unsigned_E", torch.zeros(num_destinations, dtype=torch.bool))
        if config.clusters is not None:
            # All in the first, until a pool says who is where.
            member_GE = torch.zeros(config.clusters, num_destinations, dtype=torch.bool)
            member_GE[0] = True
            self.register_buffer("member_GE", member_GE)

    def project(self, x_ND: Tensor, context: RoutingContext) -> Tensor:
        """logit_NE. Raises InputError where rows were told terms of other adapters, or of another pass."""
        x_ND = wide(x_ND)
        with full_precision(x_ND.device.type):
            local_NE = self.local(x_ND)
            if _SEEN in context.state:
                context.state[_SEEN].value[id(self)] = local_NE
            local_NE = self.within_cluster(local_NE)
        if _BIAS not in context.state:
            return local_NE
        bias_NE = context.state[_BIAS].flatten(0, -2)
        if bias_NE.shape != local_NE.shape:
            raise InputError(
                f"rows were told terms of {bias_NE.shape[1]} adapters for {bias_NE.shape[0]} tokens, in a pass of {len(x_ND)} tokens with "
                f"{len(self.vectors)} adapters"
            )
        return local_NE + bias_NE.to(local_NE)

    def local(self, x_ND: Tensor) -> Tensor:
        """local_NE, without what rows were told."""
        vector_EC = cast(self.vectors, x_ND.dtype)
        if self.config.local == "none":
            return x_ND.new_zeros(len(x_ND), len(vector_EC))
        if self.config.local == "arrow":
            return F.linear(x_ND, vector_EC).abs() / self.config.temperature
        dim = x_ND.shape[1]
        product_NE = F.linear(F.layer_norm(x_ND, (dim,)), vector_EC) / math.sqrt(dim)
        return torch.where(self.unsigned_E, product_NE.abs(), product_NE)

    def within_cluster(self, local_NE: Tensor) -> Tensor:
        """The same, -inf outside of the cluster that each token chooses; as it is without clusters.

        A cluster's score is the mean of its members', which of gates is the score of their mean; the first of equals counts.
        """
        if self.config.clusters is None:
            return local_NE
        share_GE = self.member_GE.to(local_NE)
        count_G = share_GE.sum(1)
        mean_NG = local_NE @ (share_GE / count_G.clamp_min(1).unsqueeze(1)).T
        best_N = mean_NG.masked_fill(count_G == 0, -torch.inf).argmax(1)
        return local_NE.masked_fill(~self.member_GE[best_N], -torch.inf)
