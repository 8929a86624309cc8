"""Values of parameters as JSON."""

import pytest

from anabranch.serving.chat.values import json_value

DEFS = {
    "P": {"type": "object"},
    "N": {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "integer"}]},
    "a/b": {"type": "number"},
}


@pytest.mark.parametrize(
    ("schema", "text", "wanted"),
    [
        ({"type": "integer"}, "3", "3"),
        ({"type": "string"}, "3", '"3"'),
        ({}, "3", '"3"'),
        (None, "3", '"3"'),
        ([], "3", '"3"'),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "3", "3"),
        ({"oneOf": [{"type": "array"}, {"type": "null"}]}, "[1]", "[1]"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "None", "null"),
        ({"anyOf": [{"type": "integer"}, {}]}, "3", '"3"'),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "3", '"3"'),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", "null"),
        ({"$ref": "#/$defs/P"}, '{"x": 1}', '{"x": 1}'),
        ({"allOf": [{"$ref": "#/$defs/P"}]}, "{}", "{}"),
        ({"$ref": "#/$defs/no"}, "3", '"3"'),
        ({"$ref": "#/$defs/a~1b"}, "3", "3"),
        ({"$ref": "#/$defs/N"}, "3", '"3"'),
        ({"$ref": "http://x"}, "3", '"3"'),
        ({"$ref": 5}, "3", '"3"'),
        ({"properties": {}}, "{}", "{}"),
        ({"items": {}}, "[]", "[]"),
        ({"enum": [1, 2]}, "1", "1"),
        ({"enum": ["1", 2]}, "1", '"1"'),
        ({"const": 1}, "1", "1"),
        ({"enum": ["a", None]}, "None", "null"),
        ({"type": ["integer", "null"]}, "True", "true"),
        ({"type": "integer"}, "three", '"three"'),
        ({"type": "integer"}, "NaN", '"NaN"'),
        ({"type": "string"}, "\na\n\n", '"a\\n"'),
    ],
)
def test_the_schema_says_what_is_json(schema, text, wanted):
    assert json_value(text, "a", {"properties": {"a": schema}, "$defs": DEFS}) == wanted


def test_a_schema_without_end_says_nothing():
    schema = {"type": "integer"}
    for _ in range(10_000):
        schema = {"anyOf": [schema]}
    assert json_value("3", "a", {"properties": {"a": schema}}) == '"3"'
