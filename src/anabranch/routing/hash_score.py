"""Hash layers (Roller et al. 2021, arXiv 2106.04426): which destinations a token takes follows from its id, and nothing is learned."""
# Shapes: N items, E destinations, D width

import torch
from torch import Tensor

from anabranch.config import Field, Seed, configclass
from anabranch.errors import ConfigError
from anabranch.precision import wide
from anabranch.routing.context import RoutingContext
from anabranch.routing.score import Score

# Products of two such numbers fit int64.
_WORD = (1 << 31) - 1


def _mixed(value: Tensor) -> Tensor:
    """An integer of 31 bits that depends on all bits of another."""
    for factor in (0x45D9F3B, 0x3C6EF372):
        value = ((value ^ (value >> 16)) * factor) & _WORD
    return value ^ (value >> 15)


class HashScore(Score, kind="hash"):
    """z_e = spread u(token, e), u a fixed hash in [0, 1): each token id has an order of the destinations, the same in all text.

    The best K are K different hashes of the token (the paper's MultiHash). Logits differ by at most ``spread``, so weights are about
    equal; take ``normalize="sum"`` for a sum of 1. Tokens come from the forward context (``token_BL`` of a language model), else from
    ``context.state["token_N"]``.
    """

    @configclass
    class Config(Score.Config):
        """Attributes: ``seed`` of the hash (each layer may have its own), ``spread`` of the logits."""

        seed: Seed = Field(default=0, ge=0)
        spread: float = Field(default=0.01, gt=0)

        def num_parameters(self, dim: int, num_destinations: int) -> int:
            """None."""
            return 0

        def num_flops(self, dim: int, num_destinations: int) -> int:
            """None that floats take."""
            return 0

    config: Config

    def __init__(
        self, config: Config, dim: int, num_destinations: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config)
        self.num_destinations = num_destinations

    def project(self, x_ND: Tensor, context: RoutingContext) -> Tensor:
        """logit_NE. Raises ConfigError where the context does not say the token of each item."""
        token = context.state.get("token_N")
        token = getattr(context, "token_BL", None) if token is None else token
        if token is None or token.numel() != len(x_ND):
            known = "none" if token is None else f"{token.numel()}"
            raise ConfigError(
                f"a 'hash' score routes by token ids, and of {len(x_ND)} items the forward pass names {known}; it routes the tokens of "
                "a language model, or those of state['token_N']"
            )
        token_N1 = _mixed(token.to(x_ND.device).reshape(-1, 1).long() + 1 + self.config.seed % _WORD)
        place_E = _mixed(torch.arange(1, self.num_destinations + 1, device=x_ND.device) * 0x9E3779B1 & _WORD)
        hash_NE = _mixed(_mixed(token_N1 ^ place_E) + token_N1 & _WORD)
        return hash_NE.to(wide(x_ND).dtype) * (self.config.spread / (_WORD + 1))
