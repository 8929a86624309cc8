"""Blocks with scales of small integers: kept as the gguf package reads them, and computed with as they are."""

import numpy as np
import pytest
import torch

from anabranch.lm.gguf_blocks import pieces_of
from anabranch.nn import kernels
from anabranch.nn.kernels import packed as native
from anabranch.nn.packed import Packed
from anabranch.nn.superblocks import BLOCK, arranged

gguf = pytest.importorskip("gguf")
KINDS = {"q4_k": 144, "q5_k": 176, "q6_k": 210}


def stored(kind, rows, depth, seed=0):
    """Random bytes of blocks, with scales that are numbers: (bytes, the weights that the package makes of them)."""
    blocks = np.random.default_rng(seed).integers(0, 256, (rows * depth // BLOCK, KINDS[kind]), dtype=np.uint8)
    scale = np.random.default_rng(seed + 1).uniform(0.001, 0.02, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    blocks[:, slice(-2, None) if kind == "q6_k" else slice(0, 4)] = scale[:, : 2 if kind == "q6_k" else 4]
    data = blocks.reshape(rows, -1)
    return data, torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind.upper()])).view(rows, depth)


def packed(kind, data, rows, depth):
    panels = arranged(pieces_of(kind.upper(), torch.from_numpy(data)))
    made = Packed.empty(1, rows, depth, kind, BLOCK)
    assert made.data[0].shape == panels.shape
    return made.with_data(panels.unsqueeze(0))


@pytest.mark.parametrize(("rows", "depth"), [(16, 256), (40, 512)])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_package_to_the_bit(kind, rows, depth):
    data, wanted = stored(kind, rows, depth)
    assert wanted.std() > 0.1
    assert torch.equal(packed(kind, data, rows, depth).unpack()[0], wanted)


@pytest.mark.skipif(kernels.load() is None, reason="no compiler")
@pytest.mark.parametrize("count", [1, 3, 12, 29])
@pytest.mark.parametrize("kind", KINDS)
def test_products(kind, count):
    data, weight = stored(kind, 40, 512)
    matrix, x = packed(kind, data, 40, 512), torch.randn(count, 512, generator=torch.Generator().manual_seed(2))
    scale = x.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
    rounded = ((x.unflatten(1, (-1, 32)) / scale).round() * scale).flatten(1)
    found, bias = native.linear(matrix, x), torch.arange(40.0)
    wanted = rounded.double() @ weight.double().t()
    assert (found - wanted).abs().max() / wanted.std() < 3e-3
    # A row does not depend on the others, nor on how many there are.
    assert torch.equal(torch.cat([native.linear(matrix, row[None]) for row in x]), found)
    torch.testing.assert_close(native.linear(matrix, x, bias), found + bias)


@pytest.mark.parametrize("kind", KINDS)
def test_single_rows_are_those_of_the_matrix(kind):
    data, wanted = stored(kind, 40, 512)
    index_T = torch.tensor([0, 39, 17, 17, 16, 3])
    assert torch.equal(packed(kind, data, 40, 512).rows_at(index_T), wanted[index_T])
    assert packed(kind, data, 40, 512).rows_at(index_T[:0]).shape == (0, 512)
