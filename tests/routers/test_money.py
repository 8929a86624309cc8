from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.config import from_dict, to_dict
from anabranch.errors import ConfigError, InputError
from anabranch.routers.money import NANO, PARTS, PER, Price, Tokens, dollars, in_full, nano_dollars

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


# Written in full


@pytest.mark.parametrize(
    ("nano", "text"),
    [
        (0, "$0.00"),
        (1, "$0.000000001"),
        (300_000, "$0.0003"),
        (2 * NANO, "$2.00"),
        (1234 * NANO + 5 * 10**8, "$1,234.50"),
        (-1, "-$0.000000001"),
    ],
)
def test_an_amount_is_written_to_its_last_digit(nano, text):
    assert in_full(nano) == text


@given(st.integers(0, 10**15), st.integers(0, 10**15))
def test_no_two_amounts_are_written_alike(one, other):
    assert (in_full(one) == in_full(other)) == (one == other)
    assert nano_dollars(in_full(one).replace("$", "").replace(",", "")) == one


# All that a price list has

DEAR = Price.of_dollars("3", "15", "0.3").replace(tiers={"priority": Price.of_dollars("6", "30")})


def test_what_is_put_into_a_cache_costs_what_anthropic_bills_where_nothing_else_is_said():
    assert (
        DEAR.cost_of(Tokens(prompt=100_010, completion=5, cache_write=100_000))
        == 10 * 3000 + 100_000 * 3750 + 5 * 15000
    )
    assert DEAR.cost_of(Tokens(prompt=PER, cache_write_1h=PER)) == 6 * NANO
    assert DEAR.replace(cache_write=4 * NANO).cost_of(Tokens(prompt=PER, cache_write=PER)) == 4 * NANO
    assert DEAR.replace(cache_write=9 * NANO).cost_of(Tokens(prompt=PER, cache_write_1h=PER)) == 9 * NANO
    assert DEAR.replace(cache_write_1h=5 * NANO).cost_of(Tokens(prompt=PER, cache_write_1h=PER)) == 5 * NANO


def test_tiers_sound_pictures_searches_calls_and_long_prompts():
    assert DEAR.of_tier("priority").cost(PER, 0) == 6 * NANO
    assert [DEAR.of_tier(name) for name in ("", "auto", "default", "flex", "batch")] == [DEAR] * 5
    assert DEAR.of_tier("scale") is None
    assert Price().of_tier("scale") == Price()
    assert Price().is_free
    assert not DEAR.is_free
    assert not Price(tiers={"priority": Price(input=1)}).is_free
    price = DEAR.replace(
        audio_input=40 * NANO,
        audio_output=80 * NANO,
        image_input=8 * NANO,
        image_output=32 * NANO,
        web_search=10 * NANO,
        request=5 * NANO,
    )
    call = Tokens(prompt=100, completion=50, audio_input=20, image_input=30, audio_output=10, image_output=20)
    by_hand = (
        20 * 40_000 + 30 * 8_000 + 50 * 3_000 + 10 * 80_000 + 20 * 32_000 + 20 * 15_000 + 2 * 10_000_000 + 5_000_000
    )
    assert price.cost_of(call, searches=2) == by_hand
    # Sound that was cached counts once.
    assert (
        DEAR.replace(audio_input=40 * NANO).cost_of(Tokens(prompt=10, cached=10, audio_input=4)) == 4 * 40_000 + 6 * 300
    )
    long = DEAR.replace(long_context=200_000, long=Price.of_dollars("6", "22.5"))
    assert (long.cost(200_000, 1), long.cost(200_001, 1)) == (200_000 * 3_000 + 15_000, 200_001 * 6_000 + 22_500)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"long_context": 5}, "long_context and long go together"),
        ({"tiers": {"a": Price(tiers={"b": Price()})}}, "tiers.a has tiers of its own"),
        ({"long_context": 5, "long": Price(tiers={"b": Price()})}, "long has tiers of its own"),
    ],
)
def test_a_price_that_says_too_little_or_too_much_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Price(**fields)


@given(
    st.builds(Tokens, st.integers(0, 10**6), st.integers(0, 10**6)),
    st.fixed_dictionaries(dict.fromkeys(PARTS, TOKENS)),
    st.integers(0, 9),
)
def test_a_call_never_costs_less_than_its_tokens_at_their_cheapest_nor_more_than_at_their_dearest(
    tokens, parts, searches
):
    parts["cached"] = min(parts["cached"], tokens.prompt)
    price = Price(input=3000, output=5000, cached_input=300, audio_input=9000, audio_output=20_000, web_search=7)
    cost = price.cost_of(Tokens(tokens.prompt, tokens.completion, **parts), searches) * PER - 7000 * searches
    assert (
        tokens.prompt * 300 + tokens.completion * 5000
        <= cost
        <= tokens.prompt * 9000 + tokens.completion * 20_000 + PER
    )


def test_one_of_before_is_still_read():
    assert from_dict(Price, {"input": 1, "output": 2, "cached_input": None}) == Price(input=1, output=2)


def test_a_tier_takes_what_it_does_not_name_from_the_standard_price():
    tier = Price.of_dollars("6", "30").replace(long_context=5, long=Price.of_dollars("12", "60"))
    price = DEAR.replace(audio_input=40 * NANO, web_search=10 * NANO, request=NANO, tiers={"priority": tier})
    found = price.of_tier("priority")
    assert (found.audio_input, found.web_search, found.request, found.cached_input) == (
        40 * NANO,
        10 * NANO,
        NANO,
        None,
    )
    assert (found.long.audio_input, found.long.web_search, found.long.input) == (40 * NANO, 10 * NANO, 12 * NANO)
    assert from_dict(Price, to_dict(price)) == price
