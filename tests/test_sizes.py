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


@given(
    st.integers(1, 10**6), st.sampled_from(sorted(UNITS)), st.sampled_from(["", "B", "b"]), st.sampled_from(["", " "])
)
def test_every_unit_in_either_case(count, unit, b, space):
    text = f"{count}{space}{unit}{b or 'B' * (not unit)}"
    assert parse_bytes(text) == parse_bytes(text.lower()) == parse_bytes(text.upper()) == count * UNITS[unit]
