"""Chunks of numbers as small whole numbers, and back."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.cluster.pccl import Quantiser

KINDS = [Quantiser(kind, bits) for kind in ("min_max", "zero_point") for bits in (8, 16)]


def test_by_hand():
    data = Quantiser("min_max").write(torch.tensor([-1.0, 0.0, 1.55]))
    assert list(data[16:]) == [0, 100, 255]
    assert Quantiser("min_max").read(data, torch.float32).tolist() == pytest.approx([-1.0, 0.0, 1.55], abs=1e-6)
    data = Quantiser("zero_point").write(torch.tensor([-1.0, 0.0, 1.55]))
    assert list(data[16:]) == [0, 100, 255]
    assert np.frombuffer(data, np.float64, 2).tolist() == pytest.approx([100.0, 0.01])
    assert Quantiser("zero_point", 16).read(
        Quantiser("zero_point", 16).write(torch.tensor([2.0])), torch.float32
    ).tolist() == [2.0]


@pytest.mark.parametrize("quantiser", KINDS, ids=str)
@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_what_is_read_is_within_half_a_step(quantiser, values, dtype):
    value = torch.tensor(values, dtype=dtype)
    data = quantiser.write(value)
    assert len(data) == quantiser.size_of(len(values)) == 16 + len(values) * quantiser.bits // 8
    low, high = float(value.min()), float(value.max())
    if quantiser.kind == "zero_point":
        low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / quantiser.steps
    # A zero that is rounded to a whole number moves the range by half a step more.
    allowed = step * (0.5 if quantiser.kind == "min_max" else 1.0)
    off = (quantiser.read(data, dtype).double() - value.double()).abs().max()
    assert off <= allowed * (1 + 1e-3) + max(abs(low), abs(high)) * 2e-6 + 1e-30


@pytest.mark.parametrize("quantiser", KINDS, ids=str)
def test_negative_numbers_are_as_exact_as_positive_ones(quantiser):
    """The reference begins its search of the largest at the smallest positive number, and cuts off: at least 4 times our error."""
    value = -5.0 - torch.rand(1000, generator=torch.Generator().manual_seed(0))
    ours = (quantiser.read(quantiser.write(value), torch.float32) - value).abs().max()
    low, high = float(value.min()), torch.finfo(torch.float32).tiny
    theirs = ((value - low) / (high - low) * 255).floor() / 255 * (high - low) + low
    if quantiser.kind == "min_max":
        assert 4 * ours <= (theirs - value).abs().max()


@pytest.mark.parametrize("quantiser", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_edges(quantiser, dtype):
    def through(*values):
        return quantiser.read(quantiser.write(torch.tensor(values, dtype=dtype)), dtype)

    assert through(0.0, 0.0).tolist() == [0.0, 0.0]
    assert through(3.0).tolist() == pytest.approx([3.0], rel=1e-2)
    assert quantiser.write(torch.empty(0, dtype=dtype)) == b""
    assert quantiser.read(bytearray(), dtype).shape == (0,)
    for bad in (math.nan, math.inf, -math.inf):
        assert through(1.0, bad).isnan().all()
    largest = torch.finfo(dtype).max
    ends = through(-largest, largest, 0.25 * largest, 0.0)
    assert ends.isfinite().all()
    assert (ends.double() / largest - torch.tensor([-1.0, 1.0, 0.25, 0.0])).abs().max() < 0.02


def test_zero_stays_zero_in_zero_point():
    value = torch.tensor([-0.3, 0.0, 1.7, 0.0])
    assert Quantiser("zero_point").read(Quantiser("zero_point").write(value), torch.float32)[1::2].tolist() == [
        0.0,
        0.0,
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("quantiser", KINDS, ids=str)
def test_ends_next_to_the_largest_number_are_read_as_numbers(quantiser, dtype):
    """They are rounded, and a little more than the largest would be none."""
    most, eps = torch.finfo(dtype).max, torch.finfo(dtype).eps
    for place in range(64):
        for low in (0.0, 1.0, most / 2, most * (1 - 2**-8)):
            value = torch.tensor([low, most * (1 - place * eps)], dtype=dtype)
            assert quantiser.read(quantiser.write(value), dtype).isfinite().all()
