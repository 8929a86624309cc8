"""FP4 (E2M1) numbers with a power of two for every 32 of them: MXFP4, as the OCP Microscaling Formats have it and gpt-oss stores experts.

The sixteen values, doubled, are whole numbers, so a product is one of integers: w = s t[u], where t are these and s is half the power of
two, exact in bfloat16.
"""

import torch
from torch import Tensor

__all__ = ["TWICE", "half_powers"]

# Twice the value of each code.
TWICE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def half_powers(exponent: Tensor) -> Tensor:
    """2^(e - 128) in bfloat16 of exponents e, uint8: half of the power of two that 127 is added to the exponent of."""
    wide = exponent.to(torch.int32)
    # The last two are below the least normal number.
    bits = torch.where(wide < 2, 0x20 * (1 + wide), (wide - 1) << 7)
    return bits.to(torch.int16).view(torch.bfloat16)
