"""How much of what blocks do is redundant: cos(x_i, x_{i+1}) of each token and block, which FTP rests on.

The paper: on 50 sequences of 64 tokens 89.94% (LLaMA2-7B) and 93.16% (Qwen1.5-7B) of the pairs of token and block exceed 0.8, more than
99% in middle blocks, fewer in the first and last.
"""
# Shapes: I blocks, B sequences, L positions

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from anabranch.depth.influence import Batch, batches_of, block_cosines
from anabranch.depth.stack import stack_of
from anabranch.errors import ConfigError, DataError

__all__ = ["THRESHOLDS", "Redundancy", "redundancy_report"]

THRESHOLDS = (0.5, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Redundancy:
    """Cosines of what goes into blocks and what comes out.

    Attributes:
        thresholds: of cosines.
        share: of each block, for each threshold, the share of tokens whose cosine exceeds it.
        mean: of each block the mean cosine; 1 less it is ShortGPT's block influence.
        tokens: measured.
    """

    thresholds: tuple[float, ...]
    share: tuple[tuple[float, ...], ...]
    mean: tuple[float, ...]
    tokens: int

    @property
    def overall(self) -> tuple[float, ...]:
        """Of all pairs of token and block, for each threshold."""
        return tuple(sum(column) / len(column) for column in zip(*self.share, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "thresholds": list(self.thresholds),
            "share": [list(row) for row in self.share],
            "mean_cosine": list(self.mean),
            "overall": list(self.overall),
            "tokens": self.tokens,
        }

    def __str__(self) -> str:
        """The matrix: a line for each block, and one for all."""
        head = "block  mean cos  " + "  ".join(f"> {limit:<5g}" for limit in self.thresholds)
        lines = [
            f"{block:>5}  {mean:8.4f}  " + "  ".join(f"{share:7.2%}" for share in row)
            for block, (mean, row) in enumerate(zip(self.mean, self.share, strict=True))
        ]
        whole = sum(self.mean) / len(self.mean)
        lines.append(f"  all  {whole:8.4f}  " + "  ".join(f"{share:7.2%}" for share in self.overall))
        return "\n".join([head, *lines])


def redundancy_report(model: Any, batches: Iterable[Batch], thresholds: Iterable[float] = THRESHOLDS) -> Redundancy:
    """The matrix of blocks and thresholds, on tokens that are no padding.

    Args:
        model: or its stack.
        batches: token_BL, or (token_BL, mask_BL).
        thresholds: of cosines, each in (-1, 1).

    Raises DataError where there is no token, ConfigError for a threshold that no cosine could exceed.
    """
    stack, limits = stack_of(model), tuple(float(limit) for limit in thresholds)
    for limit in limits:
        if not -1 < limit < 1:
            raise ConfigError(f"a threshold is {limit}; it must be between -1 and 1")
    above_IT = torch.zeros(stack.num_blocks, len(limits), dtype=torch.float64)
    sum_I, count = torch.zeros(stack.num_blocks, dtype=torch.float64), 0
    limit_T = torch.tensor(limits, dtype=torch.float64)
    for token_BL, mask_BL in batches_of(batches):
        cosine_IBL = block_cosines(stack, token_BL, mask_BL).double().cpu()
        real_BL = torch.ones(token_BL.shape, dtype=torch.bool) if mask_BL is None else mask_BL.cpu()
        cosine_IN = cosine_IBL[:, real_BL]
        above_IT += (cosine_IN.unsqueeze(2) > limit_T).double().sum(1)
        sum_I += cosine_IN.sum(1)
        count += cosine_IN.shape[1]
    if not count:
        raise DataError("there are no tokens to measure blocks on; give at least one")
    share = tuple(tuple(row) for row in (above_IT / count).tolist())
    return Redundancy(limits, share, tuple((sum_I / count).tolist()), count)
