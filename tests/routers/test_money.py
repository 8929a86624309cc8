from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError, InputError
from anabranch.routers.money import NANO, PER, Price, dollars, nano_dollars

TOKENS = st.integers(0, 10**7)
RATE = st.integers(0, 10**12)


def test_a_price_list_in_dollars_is_read_exactly():
    price = Price.of_dollars("0.2", 0.6, "0.05")
    assert (price.input, price.output, price.cached_input) == (200_000_000, 600_000_000, 50_000_000)
    assert Price.of_dollars(0.1 + 0.2, 0).input == 300_000_000  # 0.30000000000000004 in floats


def test_cost_by_hand():
    price = Price.of_dollars("0.2", "0.6", "0.05")
    # 1,000 prompt tokens, 400 of them cached, and 250 of an answer: 600 * 0.2 + 400 * 0.05 + 250 * 0.6 dollars a million.
    assert price.cost(1000, 250, cached=400) == 290_000
    assert dollars(290_000) == 0.00029


def test_cached_tokens_cost_what_others_do_where_no_price_is_named():
    assert Price(input=7 * PER, output=0).cost(10, 0, cached=10) == 70


def test_costs_round_up_so_that_no_limit_is_passed():
    assert Price(input=1, output=0).cost(1, 0) == 1
    assert Price(input=1, output=0).cost(PER, 0) == 1
    assert Price(input=1, output=0).cost(PER + 1, 0) == 2


@given(TOKENS, TOKENS, st.floats(0, 1), RATE, RATE, RATE)
def test_cost_is_the_exact_one_rounded_up(prompt, completion, share, per_in, per_out, per_cached):
    cached = int(prompt * share)
    cost = Price(input=per_in, output=per_out, cached_input=per_cached).cost(prompt, completion, cached)
    exact = Fraction((prompt - cached) * per_in + cached * per_cached + completion * per_out, PER)
    assert 0 <= cost - exact < 1


@given(st.integers(-(10**15), 10**15))
def test_nano_dollars_survive_the_way_to_text_and_back(nano):
    sign, rest = ("-" if nano < 0 else ""), abs(nano)
    assert nano_dollars(f"{sign}{rest // NANO}.{rest % NANO:09d}") == nano


@pytest.mark.parametrize("amount", ["", "ten", "nan", "inf", float("nan"), None])
def test_what_is_no_amount_is_refused(amount):
    with pytest.raises(InputError, match="is no amount of dollars"):
        nano_dollars(amount)


@pytest.mark.parametrize(("prompt", "completion", "cached"), [(-1, 0, 0), (1, -1, 0), (1, 0, 2), (1, 0, -1)])
def test_tokens_that_cannot_be_are_refused(prompt, completion, cached):
    with pytest.raises(InputError, match="cannot be"):
        Price().cost(prompt, completion, cached)


def test_a_negative_price_is_refused():
    with pytest.raises(ConfigError, match="input is -1"):
        Price(input=-1)
