from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.sizes import UNITS, parse_bytes


def test_bytes_are_read_with_their_units():
    assert [parse_bytes(text) for text in ("2GiB", "512 MB", "1.5k", "7B", 9)] == [2 << 30, 512 * 10**6, 1500, 7, 9]
    assert parse_bytes("868585792") == 868585792
    assert parse_bytes("1.5 MB") == 1_500_000
    assert parse_bytes(" 3 tib ") == 3 << 40


@pytest.mark.parametrize(
    "text", [0, "0GiB", "-1", "2 gigs", "", "MB", "1e9", "nan", "inf", "1 2", "8", "1048575", " 16 "]
)
def test_what_is_no_size_is_refused_by_the_field_s_name(text):
    with pytest.raises(ConfigError, match=r"^room is .*; give a number of bytes with a unit, such as 2GiB or 512MB$"):
        parse_bytes(text, "room")


# Whole parts, fractions and units from which sizes of every magnitude are made, and what looks like one.
DIGITS = st.text("0123456789", max_size=60) | st.sampled_from(["9" * 400, "9" * 5000, "0" * 30 + "1", "0.0000001"])
LIKE_SIZES = st.tuples(
    DIGITS,
    st.sampled_from(["", "."]),
    DIGITS,
    st.sampled_from(["", *UNITS, "g\u0131", "Kib"]),
    st.sampled_from(["", "B", " "]),
).map("".join)


@given(
    st.text(max_size=40) | LIKE_SIZES | st.integers() | st.sampled_from([10**400, 10**5000, -(10**5000), True, None])
)
def test_every_text_is_a_size_that_fits_or_refused(text):
    try:
        size = parse_bytes(text)
    except ConfigError:
        return
    assert type(size) is int
    assert 1 <= size < 2**63
    number = str(text).strip().rstrip("KMGTikmgtbB ")
    unit = str(text).strip()[len(number) :].strip().rstrip("bB")
    factor = {each.lower(): factor for each, factor in UNITS.items()}[unit.lower()]
    assert size == int(Decimal(number) * factor)


@pytest.mark.parametrize(
    "text", ["9" * 400, "9" * 400 + "GiB", "0.0000001B", "0.0009K", "8388608TiB", 2**63, 10**400, "2G\u0131"]
)
def test_sizes_that_are_none_or_too_large_are_refused(text):
    with pytest.raises(ConfigError, match=r"^room is .*; give a number of bytes with a unit, such as 2GiB or 512MB$"):
        parse_bytes(text, "room")


def test_the_least_and_the_largest_size():
    assert parse_bytes("1B") == parse_bytes(1) == parse_bytes("0.001K") == 1
    assert parse_bytes(2**63 - 1) == parse_bytes(str(2**63 - 1)) == 2**63 - 1
    assert parse_bytes("1.001K") == 1001


@given(
    st.integers(1, 10**6), st.sampled_from(sorted(UNITS)), st.sampled_from(["", "B", "b"]), st.sampled_from(["", " "])
)
def test_every_unit_in_either_case(count, unit, b, space):
    text = f"{count}{space}{unit}{b or 'B' * (not unit)}"
    assert parse_bytes(text) == parse_bytes(text.lower()) == parse_bytes(text.upper()) == count * UNITS[unit]
