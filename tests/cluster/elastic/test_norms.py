"""Norms of what is cut anywhere."""

import json
import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.cluster.elastic.norms import Squares

NUMBERS = st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), max_size=30)


def test_by_hand():
    assert Squares.of(torch.tensor([3.0, 4.0])).root() == 5.0
    assert Squares.of(torch.tensor([])).root() == 0.0
    assert Squares.of(torch.zeros(5)).root() == 0.0


@given(numbers=NUMBERS, cuts=st.lists(st.integers(0, 30), max_size=4))
def test_any_cut_has_the_same_exact_sum(numbers, cuts):
    x = torch.tensor(numbers, dtype=torch.float32)
    exact = sum((Fraction(value) ** 2 for value in x.tolist()), start=Fraction(0))
    edges = [0, *sorted(min(cut, len(x)) for cut in cuts), len(x)]
    parts = [Squares.of(x[a:b]) for a, b in pairwise(edges)]
    total = Squares.sum(parts)
    assert total.total * Fraction(2) ** total.exponent == exact
    assert total.root() == Squares.of(x).root() == Squares.of(x.flip(0)).root()
    assert total.root() == pytest.approx(math.sqrt(exact), rel=1e-15)
    assert Squares(*json.loads(json.dumps(total.told()))) == total


def test_more_than_is_worked_on_at_a_time():
    x = torch.randn(2**20 + 77, generator=torch.Generator().manual_seed(0))
    assert Squares.of(x).root() == pytest.approx(float(x.double().norm()), rel=1e-12)
    parts = [Squares.of(x[:5]), Squares.of(x[5:])]
    assert Squares.sum(parts).root() == Squares.of(x).root()


@pytest.mark.parametrize("count", [1, 2**20])
def test_the_smallest_and_the_largest_numbers_beside_each_other(count):
    """The most bits that a sum has."""
    least, most = 2.0**-149, float(torch.finfo(torch.float32).max)
    one = Squares.of(torch.tensor([least, most]))
    assert one.total * Fraction(2) ** one.exponent == Fraction(least) ** 2 + Fraction(most) ** 2
    many = Squares.sum([one] * count)
    assert many.total.bit_length() < 700
    assert many.root() == pytest.approx(most * math.sqrt(count), rel=1e-15)
    assert Squares.of(torch.tensor([least])).root() == least


@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_told(wrong):
    one = Squares.of(torch.tensor([1.0, wrong]))
    assert Squares.sum([Squares.of(torch.ones(3)), one]).root() == math.inf
    assert not Squares(*json.loads(json.dumps(one.told()))).is_finite
