"""The four numbers by which the router of FTP tells tokens of a prompt apart, and the table that two of them come from.

    f1  place in the prompt             j / (N - 1)
    f2  attention that it gets          N a_j, so that 1 is what all would get alike; at most ``most_score``
    f3  rank of that attention          rank / (N - 1), from 0 for the least to 1 for the most
    f4  what the block is to pass over  s_i

a is a table of the *latest* scores: after each block the tokens that took part have new ones, those that were passed over keep their old.

f1, f2 and f3 of a token depend on later tokens of the prompt, and on how many there are. That is right for a given prompt, and wrong for
text whose likelihood is measured while it is pruned. ``causal`` ones know earlier tokens only: j / positions, (j + 1) A[j, j], and the rank
among tokens up to j.
"""
# Shapes: B prompts, L positions, padding among them

from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.config import Config, Field, configclass
from anabranch.depth.ftp.static import places_of

__all__ = ["NUM_FACTORS", "FactorConfig", "ScoreTable", "factors_of"]

NUM_FACTORS = 4


@configclass
class FactorConfig(Config):
    """The constants of the factors, which are saved with a router.

    Attributes:
        most_score: what f2 is cut at.
        causal: factors of earlier tokens alone.
        positions: what causal f1 is a share of.
        refresh: the table is made anew in every so-manieth block (ours; the paper does in each). What it costs is one product of queries
            and keys.
    """

    most_score: float = Field(default=10.0, gt=0)
    causal: bool = False
    positions: int = Field(default=2048, ge=1)
    refresh: int = Field(default=1, ge=1)


@dataclass
class ScoreTable:
    """The latest attention that each token of a prompt got.

    Attributes:
        score_BL: a, float32; 0 at padding. None before the first block.
    """

    score_BL: Tensor | None = None

    def update(self, score_BL: Tensor, took_part_BL: Tensor) -> None:
        """Take new scores of the tokens that took part; others keep theirs."""
        score_BL = score_BL.detach()
        if self.score_BL is None:
            self.score_BL = score_BL.masked_fill(~took_part_BL, 0.0)
        else:
            self.score_BL = torch.where(took_part_BL, score_BL, self.score_BL)


def factors_of(score_BL: Tensor, real_BL: Tensor, sparsity: float, config: FactorConfig) -> Tensor:
    """``[B, L, 4]`` in float32, zero at padding.

    Args:
        score_BL: the table.
        real_BL: False at padding.
        sparsity: s_i of the block that is decided about.
        config: the constants.
    """
    place_BL = places_of(real_BL).float()
    count_B1 = real_BL.sum(1, keepdim=True).float()
    span_B1 = (count_B1 - 1).clamp_min(1)
    if config.causal:
        first_BL = (place_BL / config.positions).clamp_max(1.0)
        share_BL = (place_BL + 1) * score_BL
        rank_BL = _causal_rank(score_BL, real_BL) / place_BL.clamp_min(1)
    else:
        first_BL = place_BL / span_B1
        share_BL = count_B1 * score_BL
        rank_BL = _rank(score_BL, real_BL) / span_B1
    sparsity_BL = torch.full_like(first_BL, sparsity)
    factor_BLF = torch.stack((first_BL, share_BL.clamp(0.0, config.most_score), rank_BL, sparsity_BL), dim=-1)
    return factor_BLF.masked_fill(~real_BL.unsqueeze(-1), 0.0)


def _rank(score_BL: Tensor, real_BL: Tensor) -> Tensor:
    """Place of each token when they stand by rising score, of equals the earlier first; 0 at padding."""
    order_BL = score_BL.masked_fill(~real_BL, torch.inf).argsort(dim=1, stable=True)
    place_L = torch.arange(score_BL.shape[1], device=score_BL.device, dtype=torch.float32)
    rank_BL = torch.zeros_like(score_BL).scatter(1, order_BL, place_L.expand_as(score_BL).contiguous())
    return rank_BL.masked_fill(~real_BL, 0.0)


def _causal_rank(score_BL: Tensor, real_BL: Tensor) -> Tensor:
    """How many real tokens before each have a score that is not above its own."""
    rank_BL = torch.zeros_like(score_BL)
    for column in range(1, score_BL.shape[1]):
        lower_BL = (score_BL[:, :column] <= score_BL[:, column : column + 1]) & real_BL[:, :column]
        rank_BL[:, column] = lower_BL.sum(1).float()
    return rank_BL.masked_fill(~real_BL, 0.0)
