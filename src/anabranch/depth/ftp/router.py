"""The router of FTP: one small network for all blocks, from four factors of a token to two scores, to pass over or to compute.

    450 parameters: Linear(4, 64), ReLU, Linear(64, 2)

It decides by the greater score (``threshold``), where how many tokens a block passes over follows from the scores, or computes the
ceil((1 - s) N) tokens of the largest margin (``topk``), where it is given. `RouterConfig.inputs` has what the paper compares with: the
hidden states of tokens instead of their factors, or both.
"""
# Shapes: B prompts, L positions, D width, F = 4 factors; of two scores the first is for passing over, the second for computing

from typing import Literal

import torch
from torch import Tensor, nn

from anabranch.config import Config, Field, configclass
from anabranch.depth.ftp.features import NUM_FACTORS
from anabranch.depth.ftp.static import first_of, keep_best
from anabranch.errors import ConfigError, NotFiniteError

__all__ = ["COMPUTE", "PASS_OVER", "Mode", "RouterConfig", "TokenRouter", "decide", "straight_through"]

PASS_OVER, COMPUTE = 0, 1
Mode = Literal["threshold", "topk"]


@configclass
class RouterConfig(Config):
    """What the router looks at.

    Attributes:
        inputs: the four ``factors``; the ``hidden`` state that goes into the block (RMS-normalised); or ``both``.
        hidden: units of its one hidden layer.
        dim: D, where it looks at hidden states; None otherwise.
    """

    inputs: Literal["factors", "hidden", "both"] = "factors"
    hidden: int = Field(default=64, ge=1, le=4096)
    dim: int | None = Field(default=None, ge=1)

    def __post_init__(self) -> None:
        if (self.dim is None) != (self.inputs == "factors"):
            raise ConfigError(
                f"dim is {self.dim} and inputs {self.inputs!r}; give the model's width where hidden states are looked at, and only there"
            )

    @property
    def num_inputs(self) -> int:
        """Width of what goes in."""
        return (NUM_FACTORS if self.inputs != "hidden" else 0) + (self.dim or 0)


class TokenRouter(nn.Module):
    """Scores of tokens, by one network for all blocks.

    Args:
        config: what it looks at.
        seed: of the initial weights.
    """

    def __init__(self, config: RouterConfig | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config or RouterConfig()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Linear(self.config.num_inputs, self.config.hidden)
        self.second = nn.Linear(self.config.hidden, 2)
        with torch.no_grad():
            for layer in (self.first, self.second):
                # As torch does, from a generator of its own.
                limit = layer.in_features**-0.5
                layer.weight.uniform_(-limit, limit, generator=generator)
                layer.bias.uniform_(-limit, limit, generator=generator)

    @property
    def needs_scores(self) -> bool:
        """Whether it looks at attention."""
        return self.config.inputs != "hidden"

    @property
    def num_parameters(self) -> int:
        """Of the whole network: 450 for four factors and 64 units."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, factor_BLF: Tensor | None, x_BLD: Tensor | None = None) -> Tensor:
        """Scores ``[B, L, 2]`` in float32: to pass over, to compute.

        Args:
            factor_BLF: see `factors_of`; not needed for ``hidden``.
            x_BLD: what goes into the block; needed for ``hidden`` and ``both``.
        """
        parts = [] if self.config.inputs == "hidden" or factor_BLF is None else [factor_BLF]
        if self.config.inputs != "factors":
            assert x_BLD is not None, "this router looks at hidden states"
            x_BLD = x_BLD.float()
            parts.append(x_BLD * torch.rsqrt(x_BLD.square().mean(-1, keepdim=True) + 1e-6))
        return self.second(torch.relu(self.first(torch.cat(parts, dim=-1).to(self.first.weight.dtype))))


def decide(score_BL2: Tensor, real_BL: Tensor, sparsity: float, mode: Mode) -> Tensor:
    """bool: the tokens that a block computes. The first one always is; of equal scores computing wins.

    Args:
        score_BL2: of the router.
        real_BL: False at padding, which is never kept.
        sparsity: of the block, below 1; what ``topk`` passes over.
        mode: see above.

    Raises NotFiniteError for scores that are no numbers, which come of a broken model.
    """
    margin_BL = (score_BL2[..., COMPUTE] - score_BL2[..., PASS_OVER]).detach()
    if not bool(margin_BL[real_BL].isfinite().all()):
        raise NotFiniteError("the router of tokens gives scores that are not numbers: check the model's weights")
    if mode == "topk":
        return keep_best(margin_BL, real_BL, sparsity)
    return real_BL & ((margin_BL >= 0) | first_of(real_BL))


def straight_through(score_BL2: Tensor, keep_BL: Tensor) -> Tensor:
    """(to pass over, to compute) of each token, ``[B, L, 2]``: exactly 0 and 1 as decided, with the gradient of the softmax.

    A decision that the router did not make, as that on the first token, has a gradient all the same; mask it where it should have none.
    """
    soft_BL2 = score_BL2.softmax(-1)
    hard_BL2 = torch.stack((~keep_BL, keep_BL), dim=-1).to(soft_BL2.dtype)
    # The difference is exactly 0, so the sum is exactly what was decided.
    return hard_BL2 + (soft_BL2 - soft_BL2.detach())
