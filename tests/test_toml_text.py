"""TOML that is written: `tomllib` reads the same, whatever texts and tables it is."""

import datetime
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.toml_text import toml_text

# No half of a surrogate pair: TOML has none.
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    [
        "",
        "\U0001f680",
        "\x7f",
        "\x00",
        "\r\n",
        '"',
        "\\",
        "'''",
        "\u2028",
        "\ufeff",
        "a.b",
        " # no comment",
        "true",
        "1",
    ]
)
PLAIN = (
    TEXTS
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.dates()
    | st.times()
    | st.datetimes()
    | st.datetimes(timezones=st.just(datetime.timezone(datetime.timedelta(hours=-3, minutes=-30))))
)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=12
)


def test_a_config_as_it_is_read():
    models = [{"name": "a", "price": {"usd": 0.5}, "at": [{"engine": {"load": ["a=b"]}}]}, {"name": "b c"}]
    table = {
        "key": False,
        "models": models,
        "strategies": {"router-r1": {"n": 3, "about": {"a.b": 'x "y"\n'}, "no": {}}},
    }
    assert toml_text(table) == (
        "key = false\n"
        '\n[[models]]\nname = "a"\nprice = { usd = 0.5 }\nat = [{ engine = { load = ["a=b"] } }]\n'
        '\n[[models]]\nname = "b c"\n'
        "\n[strategies.router-r1]\nn = 3\n"
        '\n[strategies.router-r1.about]\n"a.b" = "x \\"y\\"\\n"\n'
        "\n[strategies.router-r1.no]\n"
    )
    assert tomllib.loads(toml_text(table)) == table


@given(table=st.dictionaries(TEXTS, VALUES, max_size=5))
def test_what_was_written_is_read_back(table):
    text = toml_text(table)
    found = tomllib.loads(text)
    assert found == table
    # 1 == 1.0 == True, and only their kinds tell them apart.
    assert repr(found) == repr({name: found[name] for name in found})
    assert sorted(map(str, map(type, found.values()))) == sorted(map(str, map(type, table.values())))
    # As a file, and by whoever cuts it at any line's end.
    assert tomllib.loads(text.encode().decode()) == table
    assert text.splitlines() == text.split("\n")[:-1]


def test_no_number_is_told_apart_from_itself():
    text = toml_text({"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 1e16, "e": -0.0})
    assert repr(tomllib.loads(text)) == "{'a': nan, 'b': inf, 'c': -inf, 'd': 1e+16, 'e': -0.0}"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": "half \ud83d"}, "half of a surrogate pair"),
        ({"\udc00": 1}, "half of a surrogate pair"),
        ({"a": None}, "None is a NoneType"),
        ({"a": [b"x"]}, "is a bytes"),
        ({1: 2}, "the name 1 is a int"),
    ],
)
def test_what_toml_does_not_have(table, message):
    with pytest.raises(InputError, match=message):
        toml_text(table)


def test_what_is_nested_too_deeply():
    table = {}
    for _ in range(200):
        table = {"a": table}
    with pytest.raises(InputError, match="nested too deeply"):
        toml_text(table)
