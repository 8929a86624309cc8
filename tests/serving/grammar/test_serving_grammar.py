"""Grammars on texts by hand: what is let through, what is not, and what is refused by name."""

import functools
import json
import time

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.serving import grammar
from anabranch.serving.grammar.formats import FORMATS
from tokenizers_of_every_make import ALL

TOKENIZER = ALL["bytes"]


def takes(schema, text):
    """Whether a grammar lets the whole of ``text`` through, byte by byte."""
    compiled = grammar.compile(schema, TOKENIZER)
    state = compiled.start()
    for byte in text.encode() if isinstance(text, str) else text:
        if not compiled.mask(state)[byte]:
            assert compiled.advance(state, byte) is None
            return False
        state = compiled.advance(state, byte)
    assert bool(compiled.mask(state)[256]) == compiled.is_final(state)
    return compiled.is_final(state)


TREE = {
    "$defs": {"node": {"type": "object", "properties": {"v": {"type": "integer"}, "kids": {"$ref": "#/$defs/list"}}, "required": ["v"]},
              "list": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
    "$ref": "#/$defs/node",
}  # fmt: skip
POINT = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}, "required": ["x"]}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({}, ["{}", '{"a": [1, {"b": null}]}', ' {"": "\\u0000"}'], ["[]", "1", "", "{,}", '{"a": 1,}', "{} "]),
        ({"type": "null"}, ["null"], ["nul", "Null", "null "]),
        ({"type": "boolean"}, ["true", "false"], ["1"]),
        ({"type": ["integer", "null"]}, ["null", "-12", "0"], ["01", "1.0", "--1"]),
        ({"type": "number"}, ["0", "-1.5", "1e5", "2E-07", "9e307"], ["1.", ".5", "1e", "1e308", "+1", "NaN"]),
        ({"type": "string"}, ['""', '"é"', '"\\u00e9"', '"\\ud83c\\udf89"', '"🎉"'], ['"\n"', '"\\ud83c"', '"\\x"', "''"]),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ['"ab"', '"🎉é\\n"', '"\\ud83c\\udf89a"'], ['"a"', '"abcd"']),
        ({"enum": ["a", 1, None, {"k": [1, 2]}]}, ['"a"', "1", "null", '{"k": [1, 2]}', '{"k":[1,2]}'], ['"b"', "2"]),
        ({"type": "string", "enum": ["a", 1]}, ['"a"'], ["1"]),
        ({"const": "ключ"}, ['"ключ"', json.dumps("ключ")], ['"ключи"']),
        (POINT, ['{"x": 1}', '{"y":2,"x":1}', '{\n  "x": 1,\n  "y": 2\n}'], ["{}", '{"y": 1}', '{"x":1,"x":2}', '{"x":1,"z":2}']),
        ({**POINT, "additionalProperties": {"type": "null"}}, ['{"x":1,"z":null,"xx":null}'], ['{"x":null}', '{"x":1,"y":null}']),
        ({"type": "object", "required": ["a"]}, ['{"a": 1, "b": 2}', '{"b": {}, "a": []}'], ["{}", '{"b": 1}']),
        ({"properties": {"a": {"type": "null"}, "b": False}}, ["{}", '{"a": null}'], ['{"b": 1}']),
        ({"type": "array"}, ["[]", "[1, [2]]"], ["[1,]"]),
        ({"items": {"type": "null"}, "minItems": 1, "maxItems": 2}, ["[null]", "[null,null]"], ["[]", "[null,null,null]"]),
        ({"prefixItems": [{"type": "null"}, {"type": "boolean"}], "items": False}, ["[]", "[null, true]"], ["[true]", "[null,true,1]"]),
        ({"anyOf": [{"type": "null"}, {"type": "integer"}]}, ["null", "3"], ["true"]),
        ({"type": "string", "oneOf": [{"minLength": 2}, {"const": ""}]}, ['""', '"ab"'], ['"a"']),
        ({"allOf": [{"$ref": "#/$defs/n"}], "$defs": {"n": {"type": "null"}}, "title": "T"}, ["null"], ["0"]),
        (TREE, ['{"v": 1, "kids": [{"v": 2}, {"kids": [], "v": 3}]}'], ['{"kids": []}', '{"v": 1, "kids": [{}]}']),
        ({"type": "integer", "minimum": -5, "maximum": 120}, ["-5", "0", "7", "99", "120"], ["-6", "121", "007", "1000"]),
        ({"type": "integer", "exclusiveMinimum": 9.5}, ["10", "11", "100", "99999999999"], ["9", "-10", "0"]),
        ({"type": "integer", "exclusiveMaximum": -10}, ["-11", "-100"], ["-10", "-9", "0", "5"]),
        ({"type": "integer", "minimum": 1, "maximum": 10**40}, ["1", "1" + "0" * 40, "9" * 40], ["0", "1" + "0" * 39 + "1" * 2]),
        ({"minimum": 0.25, "exclusiveMaximum": 2}, ["0.25", "0.3", "1", "1.999"], ["0.2", "0", "2", "2.0", "0.24999", "-1"]),
        ({"exclusiveMinimum": -1.5, "maximum": -0.5}, ["-1.4", "-1.49999", "-0.5", "-1"], ["-1.5", "-0.4", "0", "1", "-2"]),
        ({"minimum": 0, "maximum": 0}, ["0", "0.0", "-0.0"], ["1", "-0.1"]),
        ({"type": "string", "pattern": "^a+$"}, ['"aaa"', '"\\u0061"'], ['""', '"ab"']),
        ({"type": "string", "pattern": "b"}, ['"abc"', '"b"'], ['"ac"']),
        ({"pattern": "^(ab)*$", "minLength": 3, "maxLength": 5}, ['"abab"'], ['"ab"', '"ababab"', '""']),
        ({"pattern": "^(ab)*$", "maxLength": 10**9}, ['"abab"', '""'], ['"aba"']),
        ({"pattern": "^(ab)*$", "minLength": 1001}, ['"' + "ab" * 501 + '"'], ['"' + "ab" * 500 + '"']),
        ({"pattern": "^(ab)*$", "minLength": 1001, "maxLength": 1003}, ['"' + "ab" * 501 + '"'], ['"' + "ab" * 502 + '"']),
        ({"pattern": r"^[^\d\s]\.\u00e9?$"}, ['"x."', '"x.é"', '"é."'], ['"1."', '"xx"']),
        (grammar.regex(r"\d{3}-[A-C]?"), ["123-", "123-C"], ["12-", "123-D", '"123-"']),
        (grammar.choice(["yes", "no", {"type": "null"}]), ["yes", "no", "null"], ["y", "yesno"]),
        (grammar.sequence(["<", POINT, grammar.regex("[>!]")]), ['<{"x": 1}>', '< {"x":1}!'], ['<{"x": 1}', '{"x": 1}>']),
    ],
)  # fmt: skip
def test_texts_that_are_let_through_and_texts_that_are_not(schema, good, bad):
    assert [text for text in good if not takes(schema, text)] == []
    assert [text for text in bad if takes(schema, text)] == []


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "object", "patternProperties": {}}, "'patternProperties' at # is not supported"),
        ({"properties": {"a": {"uniqueItems": True}}}, "'uniqueItems' at #/properties/a"),
        ({"not": {}}, "'not'"),
        ({"multipleOf": 2}, "'multipleOf'"),
        ({"allOf": [{"type": "null"}, {"type": "null"}]}, "'allOf' at # with more than one"),
        ({"anyOf": []}, "anyOf at # must be a list"),
        ({"type": "date"}, "type 'date'"),
        ({"type": "string", "format": "iri"}, "format 'iri'"),
        ({"$ref": "http://x/y"}, r"\$ref 'http://x/y'"),
        ({"$ref": "#/$defs/x"}, "leads nowhere"),
        ({"enum": ["a"], "minLength": 2}, "'minLength' at # beside enum"),
        ({"minLength": -1, "type": "string"}, "minLength at # is -1"),
        ({"minimum": True, "type": "number"}, "minimum at # is True"),
        ({"minimum": 3, "anyOf": [{"minimum": 4}]}, "'minimum' at # and again"),
        ({"properties": {"a": 3}}, "#/properties/a is int"),
        ({"pattern": "(?=a)"}, r"a group \(\?"),
        ({"pattern": r"(a)\1"}, r"the escape \\1"),
        ({"pattern": r"\bword"}, r"the escape \\b"),
        ({"pattern": "a(^b)"}, r"a \^ elsewhere"),
        ({"pattern": "[a"}, "without its ]"),
        ({"pattern": "a**b(", "type": "string"}, "without its"),
        ({"pattern": "[ab]*a[ab]{15}"}, "more than 2000 states"),
        ({"pattern": "(a{1,100}){100}"}, "too long, or repeats too often"),
        ({"pattern": "^(ab|cde)*$", "minLength": 10**7}, "lengths of 10,000,000 and more"),
        (
            {"$defs": {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(600)}, "$ref": "#/$defs/d0"},
            "500 references",
        ),
        (functools.reduce(lambda inner, _: {"items": inner}, range(5000), {}), "nested too deeply"),
        # no text at all
        ({"type": "integer", "minimum": 2, "maximum": 1}, "no text matches"),
        ({"exclusiveMinimum": 1, "exclusiveMaximum": 1}, "no text matches"),
        ({"minLength": 2, "maxLength": 1}, "no text matches"),
        ({"pattern": "^a{5}$", "maxLength": 4}, "no text matches"),
        ({"type": "string", "const": 1}, "no text matches"),
        ({"properties": {}, "additionalProperties": False, "required": ["a"]}, "no text matches"),
        ({"items": False, "minItems": 1}, "no text matches"),
        ({"$ref": "#"}, "no text matches"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "no text matches"),
        (grammar.choice([]), "no text matches"),
    ],
)
def test_what_cannot_be_is_refused_by_name(schema, message):
    with pytest.raises(InputError, match=message):
        grammar.compile(schema, TOKENIZER)


def test_long_chains_of_references():
    chain = {f"d{n}": {"type": "array", "items": {"$ref": f"#/$defs/d{n + 1}"}, "minItems": 1} for n in range(100)}
    schema = {"$defs": {**chain, "d100": {"type": "null"}}, "$ref": "#/$defs/d0"}
    assert takes(schema, "[" * 100 + "null" + "]" * 100)
    assert not takes(schema, "[" * 99 + "null" + "]" * 99)


def test_branches_that_lead_to_no_text_are_left_out():
    # the second branch would need itself for ever
    loop = {"type": "object", "properties": {"a": {"$ref": "#/$defs/loop"}}, "required": ["a"]}
    schema = {
        "$defs": {"loop": loop},
        "type": "array",
        "items": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/loop"}]},
    }
    assert takes(schema, "[null]")
    assert not takes(schema, "[{")
    compiled = grammar.compile(schema, TOKENIZER)
    mask_V = compiled.mask(compiled.advance(compiled.start(), ord("[")))
    assert chr(mask_V[: ord("z")].nonzero()[0][-1]) == "n"  # no brace


@pytest.mark.parametrize("low", [-12, 0, 8])
@pytest.mark.parametrize("size", [0, 3, 150])
def test_every_integer_of_a_range_and_no_other(low, size):
    compiled = {"type": "integer", "minimum": low, "maximum": low + size}
    for number in [*range(low - 12, low + 14), *range(low + size - 12, low + size + 13)]:
        assert takes(compiled, str(number)) == (low <= number <= low + size)


decimals = st.decimals(-20, 20, places=2).map(float)


@given(decimals, decimals, decimals, st.booleans(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_numbers_between_bounds_compare_as_numbers(low, high, value, is_open, is_left_open):
    low, high = min(low, high), max(low, high)
    schema = {
        "exclusiveMinimum" if is_left_open else "minimum": low,
        "exclusiveMaximum" if is_open else "maximum": high,
    }
    inside = (low < value if is_left_open else low <= value) and (value < high if is_open else value <= high)
    if low == high and (is_open or is_left_open):
        with pytest.raises(InputError):
            grammar.compile(schema, TOKENIZER)
    else:
        assert takes(schema, repr(value)) == inside


def test_formats_agree_with_a_validator():
    texts = {
        "date": [
            "2024-02-29",
            "2023-02-29",
            "2000-02-29",
            "1900-02-29",
            "2023-04-31",
            "2023-12-31",
            "2023-13-01",
            "0000-01-01",
        ],
        "time": ["12:30:00Z", "23:59:59.123+05:30", "24:00:00Z", "12:30:00"],
        "date-time": ["2024-02-29T12:30:00Z", "2024-02-30T12:30:00Z", "2024-02-29 12:30:00Z"],
        "uuid": ["123e4567-e89b-12d3-a456-426614174000", "123e4567e89b12d3a456426614174000"],
        "ipv4": ["1.2.3.255", "1.2.3.256", "01.2.3.4", "1.2.3"],
        "email": ["a.b@c.de", "a@b", "@c.de", "a b@c.de"],
    }
    assert texts.keys() == FORMATS.keys()
    for name, examples in texts.items():
        schema = {"type": "string", "format": name}
        validator = jsonschema_rs.validator_for(schema, validate_formats=True)
        for text in examples:
            if text != "a@b":  # ours wants a dot in the domain
                assert takes(schema, json.dumps(text)) == validator.is_valid(text), (name, text)


# -- tokens


def test_special_tokens_are_never_allowed_and_the_end_only_where_a_text_may_end():
    tokenizer = ALL["llama"]
    compiled = grammar.compile({"type": "integer"}, tokenizer, ends=(5,))
    start = compiled.mask(compiled.start())
    assert not start[[0, 1, 2, 5]].any()  # unk, bos, eos and another end
    after = compiled.advance(compiled.start(), 3 + ord("7"))
    assert compiled.mask(after)[[0, 1, 2, 5]].tolist() == [False, False, True, True]
    end = compiled.advance(after, 2)
    assert compiled.mask(end).nonzero()[0].tolist() == [2, 5]
    assert compiled.advance(end, 2) == end
    assert compiled.advance(end, 3 + ord("7")) is None
    assert compiled.advance(compiled.start(), 2) is compiled.advance(compiled.start(), 10**6) is None


def test_tokens_of_sentencepiece_are_blanks_and_bytes():
    tokenizer = ALL["llama"]
    pieces = [tokenizer.inner_bytes(token) for token in range(tokenizer.vocab_size)]
    assert pieces[:3] == [b"", b"", b""]
    assert pieces[3 : 3 + 256] == [bytes([byte]) for byte in range(256)]
    assert pieces[tokenizer._id_of("▁the")] == b" the"
    compiled = grammar.compile(grammar.choice(["a the"]), tokenizer)
    after = compiled.advance(compiled.start(), tokenizer._id_of("a"))
    allowed = {pieces[token] for token in compiled.mask(after).nonzero()[0]}
    assert allowed == {b" ", b" t", b" th", b" the"}


def test_tokens_that_lean_on_their_neighbours_are_refused():
    with pytest.raises(InputError, match="fixed bytes"):
        grammar.compile({}, ALL["bert"])


def test_a_character_may_be_split_between_tokens_but_not_broken():
    compiled = grammar.compile({"type": "string"}, TOKENIZER)
    state = compiled.advance(compiled.advance(compiled.start(), ord('"')), 0xE2)
    assert set(compiled.mask(state).nonzero()[0].tolist()) == set(range(0x80, 0xC0))


def test_masks_are_kept_and_cannot_be_written():
    compiled = grammar.compile({}, TOKENIZER)
    mask_V = compiled.mask(compiled.start())
    assert compiled.mask(compiled.start()) is mask_V
    with pytest.raises(ValueError, match="read-only"):
        mask_V[0] = True
    state = compiled.start()
    for byte in b'{"' + b'a":{"' * 150:
        compiled.mask(state)
        state = compiled.advance(state, byte)
    assert len(compiled._masks) <= 512
    assert not compiled.is_full


@pytest.mark.parametrize("bounds", [{"maxLength": 40}, {"minLength": 30}, {"minLength": 25, "maxLength": 45}])
def test_counters_that_no_token_runs_out_share_a_mask(bounds):
    tokenizer = ALL["bpe"]
    compiled = grammar.compile({"type": "array", "items": {"type": "string", **bounds}}, tokenizer)
    longest = max(len(tokenizer.inner_bytes(token)) for token in range(tokenizer.vocab_size))
    assert longest < 20  # or the lengths above are too short for this test
    state, masks = compiled.start(), []
    for token in tokenizer.encode('["'):
        state = compiled.advance(state, token)
    for _ in range(bounds.get("maxLength", 40)):
        stepped = [compiled.advance(state, token) is not None for token in range(tokenizer.vocab_size)]
        assert compiled.mask(state).tolist() == stepped
        masks.append(compiled.mask(state))
        state = compiled.advance(state, tokenizer.encode("e")[0])
    assert masks[0] is masks[1]
    assert len(set(map(id, masks))) <= 2 * longest + 3


def test_bounds_in_the_thousands_are_not_unrolled():
    start = time.perf_counter()
    schema = {"type": "array", "items": {"type": "string", "maxLength": 10**6}, "minItems": 10**6, "maxItems": 10**7}
    assert not takes(schema, '["' + "a" * 2000 + '","b"]')
    assert time.perf_counter() - start < 5
    assert np.array_equal(grammar.compile(schema, TOKENIZER).mask(0), np.zeros(257, dtype=bool))
