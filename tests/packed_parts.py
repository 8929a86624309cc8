"""Random matrices in every kind of integers."""

import torch

from anabranch.nn.fp4 import half_powers
from anabranch.nn.packed import Packed
from anabranch.nn.superblocks import block_bytes

DEPTH = 512
FORMS = ("int8", "int4", "fp4", "q4_k", "q5_k", "q6_k")


def part_of(rows, form, seed=0, depth=DEPTH):
    """Random weights; bytes of superblocks are random but for scales over scales, which are small numbers."""
    g = torch.Generator().manual_seed(seed)
    if form in ("int8", "int4", "float32"):
        return Packed.pack(torch.randn(rows, depth, generator=g), form)
    if form == "fp4":
        codes = torch.randint(0, 16, (rows, depth), generator=g, dtype=torch.uint8)
        return Packed.of_integers(
            codes, half_powers(torch.randint(118, 128, (rows, depth // 32), generator=g)), None, form
        )
    made = Packed.empty(1, rows, depth, form, 256)
    made.data.copy_(torch.randint(0, 256, made.data.shape, generator=g, dtype=torch.uint8))
    sides = 16 * (2 if form == "q6_k" else 4)
    blocks = made.data.unflatten(-1, (-1, block_bytes(form)))
    scale = torch.rand(*blocks.shape[:-1], sides // 2, generator=g) * 1e-3
    blocks[..., -sides:] = scale.half().view(torch.uint8)
    return made
