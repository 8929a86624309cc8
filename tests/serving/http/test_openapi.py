"""The description of the routes says of the fields of a request what the server takes, neither more nor less."""

import math

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.bounds import MOST_SIZE
from anabranch.data import ByteTokenizer
from anabranch.errors import ConfigError
from anabranch.serving.core.client import EngineInfo
from anabranch.serving.core.rewires import SETTINGS
from anabranch.serving.http import fields
from anabranch.serving.http.generation_request import read_completion
from anabranch.serving.http.openapi import describe
from anabranch.serving.http.reading import Reader
from anabranch.serving.rewiring import RewiringConfig
from anabranch.web.api_error import ApiError

SCHEMAS = describe("0", 128)["components"]["schemas"]
TABLE = SCHEMAS["Completion"]["properties"]["rewire"]["anyOf"][1]
INFO = EngineInfo(model="m", vocab_size=257, max_positions=100, block_tokens=4, num_blocks=10, rewires=True)
# Each setting alone can be said beside these, and goes as far as it can.
SERVER = RewiringConfig(
    on=True,
    settings={"select": "uncertain", "guard": False},
    limits={"steps": MOST_SIZE, "interval": 1, "window": None},
)


def bounds_of(schema):
    """Numbers at the ends of what a schema allows, and on both sides of them."""
    ends = [schema[name] for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum") if name in schema]
    for end in ends:
        yield from (end, end - 1, end + 1, -end, float(end))
        if isinstance(end, float) or "number" in schema["type"]:
            yield from (math.nextafter(end, math.inf), math.nextafter(end, -math.inf), end / 2, end * 2)


def values_of(schema):
    """Of a field: what its schema names, and what JSON has beside that."""
    words = [*schema.get("enum", ()), "all", "", "true", "1"]
    most = schema.get("maxLength", 0)
    texts = [*words, "x" * most, "x" * (most + 1)]
    named = [None, True, False, [], [1], {}, 0, 1, 2, -1, 10**400, 2**53 + 1, *bounds_of(schema), *texts]
    one = (
        st.sampled_from(named) | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3)
    )
    # To a schema 1.0 is an integer, and to this server in none of its fields.
    return one.filter(lambda value: not (isinstance(value, float) and value.is_integer() and is_whole(schema)))


def is_whole(schema):
    return "integer" in schema.get("type", ())


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_the_schema_allows_of_a_setting_of_rewire_the_server_takes_and_nothing_else(name, data):
    value = data.draw(values_of(TABLE["properties"][name]))
    body = {"model": "m", "prompt": "x", "rewire": {name: value}}
    try:
        asked = read_completion(body, Reader(ByteTokenizer()), INFO, 128).rewires
        SERVER.of_request(asked.settings)
    except (ApiError, ConfigError):
        asked = None
    assert (asked is not None) == jsonschema_rs.is_valid(TABLE, {name: value})
    assert asked is None or (name in asked.settings) == (value is not None)


SCALARS = [
    (kind, name)
    for kind, body in (("chat", "Chat"), ("completions", "Completion"))
    for name, schema in SCHEMAS[body]["properties"].items()
    # What must be said is looked at elsewhere.
    if name not in SCHEMAS[body]["required"]
    and ("enum" in schema or {*schema.get("type", ["array"])}.isdisjoint({"array", "object"}))
]


@pytest.mark.parametrize(("kind", "name"), SCALARS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_what_the_schema_allows_of_a_plain_field_the_server_takes_and_nothing_else(kind, name, data):
    schema = SCHEMAS["Chat" if kind == "chat" else "Completion"]["properties"][name]
    value = data.draw(values_of(schema))
    try:
        is_taken = fields.check({name: value}, kind) == []
    except ApiError:
        is_taken = False
    assert is_taken == jsonschema_rs.is_valid(schema, value)
