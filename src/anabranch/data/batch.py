"""What a model is fed: sequences, their successors, and where they come from."""
# Shapes: B sequences, L positions

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Sequences, what follows each of their tokens, and where they come from.

    Attributes:
        token_BL: input ids, int64.
        target_BL: the id after each input, int64.
        domain_B: index of each sequence's domain in the names that `TokenStream.domains` or `Windows.domains` gives, int64.
        byte_length_BL: bytes of text under each target, int64; None in training.
    """

    token_BL: Tensor
    target_BL: Tensor
    domain_B: Tensor
    byte_length_BL: Tensor | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The same batch on ``device``."""
        move = [self.token_BL, self.target_BL, self.domain_B]
        token_BL, target_BL, domain_B = (value.to(device, non_blocking=non_blocking) for value in move)
        length_BL = self.byte_length_BL
        return Batch(token_BL, target_BL, domain_B, None if length_BL is None else length_BL.to(device))
