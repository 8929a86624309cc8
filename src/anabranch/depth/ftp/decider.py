"""Who computes what: the decisions of one pass over a prompt, by whichever router, block by block or all at once after the first."""
# Shapes: B prompts, L positions, I blocks, D width

from typing import Literal

import torch
from torch import Tensor

from anabranch.depth.ftp.features import FactorConfig, ScoreTable, factors_of
from anabranch.depth.ftp.router import Mode, TokenRouter, decide
from anabranch.depth.ftp.static import random_keep, static_keep

__all__ = ["ByPlace", "Decider", "Schedule"]

# The sparsity of each block.
Schedule = tuple[float, ...]
# Routers without weights: places alone, and chance.
ByPlace = Literal["static", "random"]


class Decider:
    """Decides for each block which tokens of the prompts it computes.

    Args:
        router: that learned, or one by name.
        schedule: of the blocks.
        real_BL: False at padding.
        mode: of a router that learned.
        factors: constants of what it looks at.
        one_pass: it looks once, behind the first block, for all blocks.
        seed: of ``random``.
    """

    def __init__(
        self,
        router: TokenRouter | ByPlace,
        schedule: Schedule,
        real_BL: Tensor,
        *,
        mode: Mode = "topk",
        factors: FactorConfig | None = None,
        one_pass: bool = False,
        seed: int = 0,
    ) -> None:
        self.router, self.schedule, self.real_BL = router, schedule, real_BL
        self.mode, self.factors, self.one_pass = mode, factors or FactorConfig(), one_pass
        self._generator = torch.Generator().manual_seed(seed)
        self._seen: tuple[Tensor, Tensor | None] | None = None

    def __call__(self, layer: int, x_BLD: Tensor, table: ScoreTable) -> Tensor:
        """bool: the tokens that the block computes."""
        sparsity = self.schedule[layer]
        if sparsity <= 0:
            return self.real_BL
        if sparsity >= 1 or self.router == "static":
            return static_keep(self.real_BL, sparsity)
        if isinstance(self.router, TokenRouter):
            return decide(self.scores(layer, x_BLD, table), self.real_BL, sparsity, self.mode)
        return random_keep(self.real_BL, sparsity, self._generator)

    def scores(self, layer: int, x_BLD: Tensor, table: ScoreTable) -> Tensor:
        """Of a router that learned: its scores ``[B, L, 2]``."""
        assert isinstance(self.router, TokenRouter), "routers by place have no scores"
        if not self.one_pass:
            seen = x_BLD, table.score_BL
        else:
            seen = self._seen = self._seen or (x_BLD, table.score_BL)
        x_BLD, score_BL = seen
        factor_BLF = None
        if self.router.needs_scores:
            assert score_BL is not None, "the first block is not pruned, so there is a table"
            factor_BLF = factors_of(score_BL, self.real_BL, self.schedule[layer], self.factors)
        device = self.router.first.weight.device
        if factor_BLF is not None:
            factor_BLF = factor_BLF.to(device)
        return self.router(factor_BLF, x_BLD.to(device)).to(self.real_BL.device)

    def wants_scores(self, layer: int) -> bool:
        """Whether a later block is decided about by the attention of this one."""
        if not (isinstance(self.router, TokenRouter) and self.router.needs_scores):
            return False
        if layer and (self.one_pass or layer % self.factors.refresh):
            return False
        return any(0 < sparsity < 1 for sparsity in self.schedule[layer + 1 :])

    def removed(self, layer: int) -> bool:
        """Whether the block does not run at all."""
        return self.schedule[layer] >= 1
