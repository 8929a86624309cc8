"""Grammars on texts by hand: what is let through, what is not, and what is refused by name."""

import functools
import json
import threading
import time

import jsonschema_rs
import pytest

from anabranch.errors import InputError
from anabranch.serving import grammar
from anabranch.serving.core.client import BusyError
from anabranch.serving.grammar import GrammarStore, forms, store, trial, trial_worker
from grammar_walks import store_of, takes
from tokenizers_of_every_make import ALL

TOKENIZER = ALL["bytes"]
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"v": {"type": "integer"}, "kids": {"$ref": "#/$defs/list"}},
            "required": ["v"],
        },
        "list": {"type": "array", "items": {"$ref": "#/$defs/node"}},
    },
    "$ref": "#/$defs/node",
}
POINT = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}, "required": ["x"]}
BASE = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (
            {},
            ["{}", '{"a": [1, {"b": null}]}', '{"": "\\u0000"}'],
            ["[]", "1", "", "{,}", '{"a": 1,}', "{} ", '{"a":  1}'],
        ),
        ({"type": "null"}, ["null"], ["nul", "Null", "null "]),
        ({"type": "boolean"}, ["true", "false"], ["1"]),
        ({"type": ["integer", "null"]}, ["null", "-12", "0"], ["01", "1.0", "--1"]),
        ({"type": "number"}, ["0", "-1.5", "1e5", "2E-07", "9e307"], ["1.", ".5", "1e", "+1", "NaN"]),
        ({"type": "string"}, ['""', '"é"', '"\\n"', '"🎉"'], ['"\n"', '"\\ud83c"', '"\\x"', "''"]),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ['"ab"', '"🎉é\\n"'], ['"a"', '"abcd"']),
        ({"enum": ["a", 1, None, {"k": [1, 2]}]}, ['"a"', "1", "null", '{"k": [1, 2]}', '{"k":[1,2]}'], ['"b"', "2"]),
        ({"type": "string", "enum": ["a", 1]}, ['"a"'], ["1"]),
        ({"const": "ключ"}, ['"ключ"'], ['"ключи"']),
        (
            POINT,
            ['{"x": 1}', '{"x":1,"y":2}', '{\n  "x": 1,\n  "y": 2\n}'],
            ["{}", '{"y": 1}', '{"x":1,"x":2}', '{"x":1,"z":2}'],
        ),
        (
            {**POINT, "additionalProperties": {"type": "null"}},
            ['{"x":1,"z":null,"xx":null}'],
            ['{"x":null}', '{"x":1,"y":null}'],
        ),
        ({"type": "object", "required": ["a"]}, ['{"a": 1, "b": 2}'], ["{}", '{"b": 1}']),
        (
            {"type": "object", "properties": {"a": {"type": "null"}, "b": False}},
            ["{}", '{"a": null}'],
            ['{"b": 1}', '{"c": 1}'],
        ),
        (
            {"type": "object", "properties": {"properties": POINT}},
            ['{"properties": {"x": 1}}'],
            ['{"properties": {"x": 1, "z": 1}}'],
        ),
        ({"type": "array"}, ["[]", "[1, [2]]"], ["[1,]"]),
        (
            {"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 2},
            ["[null]", "[null,null]"],
            ["[]", "[null,null,null]"],
        ),
        (
            {"type": "array", "prefixItems": [{"type": "null"}, {"type": "boolean"}], "items": False},
            ["[]", "[null, true]"],
            ["[true]"],
        ),
        ({"anyOf": [{"type": "null"}, {"type": "integer"}]}, ["null", "3"], ["true"]),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, ["1"], ["true"]),
        ({"allOf": [{"$ref": "#/$defs/n"}], "$defs": {"n": {"type": "null"}}, "title": "T"}, ["null"], ["0"]),
        (TREE, ['{"v": 1, "kids": [{"v": 2}, {"v": 3, "kids": []}]}'], ['{"kids": []}', '{"v": 1, "kids": [{}]}']),
        (
            {"type": "integer", "minimum": -5, "maximum": 120},
            ["-5", "0", "7", "99", "120"],
            ["-6", "121", "007", "1000"],
        ),
        (
            {"type": "number", "minimum": 0.25, "exclusiveMaximum": 2},
            ["0.25", "0.3", "1", "1.999"],
            ["0.2", "0", "2", "0.24999", "-1"],
        ),
        ({"type": "string", "pattern": "^a+$"}, ['"aaa"'], ['""', '"ab"']),
        ({"type": "string", "pattern": "b"}, ['"abc"', '"b"'], ['"ac"']),
        (
            {"type": "string", "pattern": "^(ab)*$", "minLength": 3, "maxLength": 5},
            ['"abab"'],
            ['"ab"', '"ababab"', '""'],
        ),
        # what was once refused
        ({"type": "integer", "multipleOf": 4}, ["0", "4", "128"], ["3", "130"]),
        ({"type": "string", "format": "uri"}, ['"http://a.b/c?d=e"'], ['"a b"', '"x"']),
        ({"type": "integer", "allOf": [{"minimum": 2}, {"maximum": 5}]}, ["2", "5"], ["1", "6"]),
        # llguidance lets the whole number through that such a range leaves out
        ({"exclusiveMinimum": 0, "maximum": 0.5}, ["0.1", "0.5", "0.000001"], ["0", "0.0", "0.51", "1"]),
        ({"type": "number", "exclusiveMaximum": -1, "minimum": -1.5}, ["-1.1", "-1.5"], ["-1", "-1.0", "-2"]),
        (
            {"type": ["number", "null"], "exclusiveMinimum": 10.0, "exclusiveMaximum": 10.1},
            ["10.05"],
            ["10", "10.0", "10.1"],
        ),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, ["0.1", "1"], ["0", "0.0", "1.5"]),
        (
            {"allOf": [BASE, {"properties": {"b": {"type": "null"}}, "required": ["b"]}]},
            ['{"a": null, "b": null}'],
            ['{"a": null}'],
        ),
        (
            {"type": "object", "patternProperties": {"^n": {"type": "null"}}, "additionalProperties": False},
            ['{"n": null}'],
            ['{"n": 1}', '{"a"'],
        ),
        ({"type": "object", "minProperties": 1}, ['{"a": 1}'], ["{}"]),
        # forms
        (grammar.regex("^[a-c]+/\\d$"), ["ab/1"], ["/1", "ab/x", "ab/\u0661"]),
        (grammar.regex("[ab]*b"), ["b", "abab"], ["aba", ""]),
        (grammar.sequence([grammar.regex("[ab]*"), "b"]), ["b", "abab"], ["aba", ""]),
        (grammar.choice(["a the", 'é"\\\n']), ["a the", 'é"\\\n'], ["a", "b"]),
        (grammar.sequence(["<", {"type": "integer"}, ">"]), ["<12>"], ["<>", "12", "<1"]),
        (grammar.repeat(grammar.choice(["ab", "c"]), 1, 3), ["c", "abcab"], ["", "cccc"]),
        (grammar.repeat(grammar.sequence([{"type": "null"}, ";"]), 2), ["null;null;", "null;" * 5], ["null;"]),
        (grammar.sequence([]), [""], ["a"]),
    ],
)
def test_texts_that_are_let_through_and_texts_that_are_not(schema, good, bad):
    assert [text for text in good if not takes(schema, text, TOKENIZER)] == []
    assert [text for text in bad if takes(schema, text, TOKENIZER)] == []


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "array", "uniqueItems": True}, "keyword 'uniqueItems' not supported"),
        ({"properties": {"a": {"not": {}, "if": {}}}}, "keywords 'if', 'not' not supported"),
        ({"not": {}, "x-guidance": {"lenient": True}}, "keyword 'not' not supported"),
        (grammar.choice([{"not": {}, "x-guidance": {"lenient": True}}]), "keyword 'not' not supported"),
        ({"anyOf": []}, "no text matches it: anyOf is empty"),
        ({"type": "date"}, "Invalid type: date"),
        ({"type": "string", "format": "iri"}, "Unknown format: iri"),
        ({"$ref": "http://x/y"}, "'http://x/y' is not present"),
        ({"$ref": "#/$defs/x"}, r"'/\$defs/x' does not exist"),
        ({"minLength": -1, "type": "string"}, "'minLength', got -1"),
        ({"properties": {"a": 3}}, "must be an object or boolean"),
        ({"pattern": "(?=a)"}, "a regular expression in it: look-around"),
        ({"pattern": "[a"}, "unclosed character class"),
        (grammar.regex("a("), "unclosed group"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "no text matches it"),
        ({"type": "string", "minLength": 2, "maxLength": 1}, "no text matches it"),
        ({"type": "array", "items": False, "minItems": 1}, "no text matches it"),
        ({"$ref": "#"}, "no text matches it"),
        (grammar.choice([]), "no text matches"),
        ({"anabranch:repeat": [1, 2]}, "repeat must be a part"),
        ({"anabranch:choice": "ab"}, "choice is str; it must be a list"),
        ({"anabranch:regex": 1}, "regex is int; it must be text"),
        ([], "this is list"),
        ({"a": {1, 2}}, "is no JSON"),
        (functools.reduce(lambda inner, _: {"items": inner}, range(5000), {}), "nested too deeply"),
    ],
)
def test_what_cannot_be_is_refused_by_name(schema, message):
    with pytest.raises(InputError, match=message):
        store_of(TOKENIZER).get(schema)


def properties(count, **more):
    return {"type": "object", "properties": {f"a property that is called {n}": {} for n in range(count)}, **more}


def chain(length):
    """A schema whose reader calls itself for every link."""
    links = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(length)}
    return {"$defs": {**links, f"d{length}": {"type": "object"}}, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (properties(20_005), r"has \d{3},\d{3} characters as JSON; at most 250,000"),
        ({"type": "integer", "multipleOf": 1_234_567}, "more than (128 MiB of memory|1 s of computing)"),
        (chain(4000), "nested too deeply"),
        (
            functools.reduce(lambda inner, _: {"items": inner}, range(forms.MOST_DEPTH), {}),
            "nested too deeply: at most 200 objects",
        ),
        (
            {"anyOf": [functools.reduce(lambda inner, _: {"anyOf": [inner]}, range(99), {})]},
            "nested too deeply: at most 200 objects",
        ),
        (
            {"allOf": [{"anyOf": [{"minimum": n}, {"maximum": n}]} for n in range(20)], "type": "integer"},
            "too large|more than",
        ),
    ],
)
def test_what_takes_too_much_is_refused_in_a_line_and_harms_nobody(schema, message):
    with pytest.raises(InputError, match=message):
        GrammarStore(TOKENIZER).get(schema)
    assert takes({"type": "boolean"}, "true", TOKENIZER)


def test_deep_nesting_that_a_schema_allows_is_followed():
    nested = {"type": "array", "items": {"anyOf": [{"$ref": "#"}, {"type": "array", "items": {"$ref": "#"}}]}}
    assert takes(nested, "[" * 300 + "]" * 300, TOKENIZER)


def test_formats_agree_with_a_validator():
    texts = {
        "date": ["2024-02-29", "2023-12-31", "2023-13-01", "2023-1-1"],
        "time": ["12:30:00Z", "23:59:59.123+05:30", "24:00:00Z", "12:30:00"],
        "date-time": ["2024-02-29T12:30:00Z", "2024-02-29 12:30:00Z"],
        "uuid": ["123e4567-e89b-12d3-a456-426614174000", "123e4567e89b12d3a456426614174000"],
        "ipv4": ["1.2.3.255", "1.2.3.256", "1.2.3"],
        "email": ["a.b@c.de", "@c.de", "a b@c.de"],
    }
    for name, examples in texts.items():
        schema = {"type": "string", "format": name}
        validator = jsonschema_rs.validator_for(schema, validate_formats=True)
        for text in examples:
            assert takes(schema, json.dumps(text), TOKENIZER) == validator.is_valid(text), (name, text)


# -- tokens


def test_special_tokens_are_never_allowed_and_the_end_only_where_a_text_may_end():
    tokenizer = ALL["llama"]
    compiled = GrammarStore(tokenizer, (5,)).get({"type": "integer"})
    matcher = compiled.matcher()
    assert not matcher.allowed_V()[[0, 1, 2, 5]].any()  # unk, bos, eos and another end
    assert matcher.take(3 + ord("7"))
    assert matcher.allowed_V()[[0, 1, 2, 5]].tolist() == [False, False, True, True]
    assert matcher.take(2)
    assert matcher.allowed_V().nonzero()[0].tolist() == [2, 5]
    assert matcher.take(2)
    assert not matcher.take(3 + ord("7"))
    assert "does not fit" in matcher.error
    assert not matcher.allowed_V().any()
    for token in (2, 10**6, -1):
        assert not compiled.matcher().take(token)


def test_tokens_of_sentencepiece_are_blanks_and_bytes_and_any_that_fits_may_come():
    tokenizer = ALL["llama"]
    pieces = [tokenizer.inner_bytes(token) for token in range(tokenizer.vocab_size)]
    assert pieces[:3] == [b"", b"", b""]
    assert pieces[3 : 3 + 256] == [bytes([byte]) for byte in range(256)]
    assert pieces[tokenizer._id_of("▁the")] == b" the"
    matcher = store_of(tokenizer).get(grammar.choice(["a the"])).matcher()
    assert matcher.take(tokenizer._id_of("a"))
    allowed = {pieces[token] for token in matcher.allowed_V().nonzero()[0]}
    assert allowed == {b" ", b" t", b" th", b" the"}


def test_tokens_that_lean_on_their_neighbours_are_refused():
    with pytest.raises(InputError, match="fixed bytes"):
        GrammarStore(ALL["bert"]).get({})
    with pytest.raises(InputError, match="needs the model's tokenizer"):
        GrammarStore(None).get({})


def test_a_character_may_be_split_between_tokens_but_not_broken():
    matcher = store_of(TOKENIZER).get({"type": "string"}).matcher()
    assert matcher.take(ord('"'))
    assert matcher.take(0xE2)
    assert set(matcher.allowed_V().nonzero()[0].tolist()) == set(range(0x80, 0xC0))


def test_outputs_of_one_grammar_do_not_disturb_each_other():
    compiled = store_of(TOKENIZER).get({"enum": ["left", "right"]})
    left, right = compiled.matcher(), compiled.matcher()
    for token in b'"left"':
        assert left.take(token)
    assert right.take(ord('"'))
    assert right.allowed_V().nonzero()[0].tolist() == [ord("l"), ord("r")]
    assert left.is_final
    assert not right.is_final


def test_a_limit_that_is_passed_in_the_middle_is_an_error_of_that_output():
    # So many properties that may follow at any place that a row of the parser has no room for them.
    matcher = store_of(TOKENIZER).get(properties(1500, additionalProperties=True)).matcher()
    for token in b'{"x":1,"y"':
        if not matcher.take(token):
            break
        matcher.allowed_V()
    assert "cannot be followed any further" in matcher.error
    assert not matcher.allowed_V().any()
    assert not matcher.is_final


# -- the store


def test_equal_forms_are_compiled_once_and_the_last_ones_are_kept():
    kept = GrammarStore(TOKENIZER)
    first = kept.get({"type": "null"})
    assert kept.get({"type": "null"}) is first
    for number in range(store._MOST_KEPT + 5):
        kept.get({"const": number})
    assert len(kept._kept) == store._MOST_KEPT
    assert kept.get({"type": "null"}) is first  # as long as somebody has it
    kept.close()


def test_what_was_refused_is_not_tried_again(monkeypatch):
    kept = GrammarStore(TOKENIZER)
    with pytest.raises(InputError, match="'not'"):
        kept.get({"not": {}})
    monkeypatch.setattr(store, "try_out", lambda *_: 1 / 0)
    with pytest.raises(InputError, match="'not'"):
        kept.get({"not": {}})


def test_grammars_together_take_no_more_than_there_is_and_a_source_no_more_than_is_left_free(monkeypatch):
    kept = GrammarStore(TOKENIZER)
    monkeypatch.setattr(store, "MOST_BYTES", 6 << 20)
    monkeypatch.setattr(store, "try_out", lambda *_: 1 << 20)
    for number in range(5):
        kept.get({"const": number})
    assert len(kept._kept) == 3
    matchers = [kept.get({"const": number}).matcher() for number in range(3)]  # which hold theirs
    monkeypatch.setattr(store, "WAIT_S", 0.05)
    with pytest.raises(BusyError, match="take 3 of 6 MiB, yours 3; ask again"):
        kept.get({"const": 9})
    bob = [kept.prepare({"const": number}, "bob").result(60).matcher() for number in (10,)]
    with pytest.raises(BusyError, match="take 4 of 6 MiB, yours 1; ask again"):
        kept.prepare({"const": 11}, "bob").result(60)
    monkeypatch.setattr(store, "WAIT_S", 20)
    bob.clear()
    threading.Timer(0.1, matchers.clear).start()
    assert kept.get({"const": 9}).size_bytes == 1 << 20
    assert kept._reserved == {}
    kept.close()


def test_who_has_most_lets_go_first(monkeypatch):
    kept = GrammarStore(TOKENIZER)
    monkeypatch.setattr(store, "_MOST_KEPT", 4)
    monkeypatch.setattr(store, "try_out", lambda *_: 1)
    first = kept.prepare({"const": "bob's"}, "bob").result(60)
    for number in range(9):
        kept.prepare({"const": number}, "alice").result(60)
    assert [grammar.source for grammar in kept._kept.values()] == ["bob", "alice", "alice", "alice"]
    assert first in kept._kept.values()
    kept.close()


def test_who_asks_for_too_many_at_a_time_is_told_to_ask_again(monkeypatch):
    kept, may_go = GrammarStore(TOKENIZER), threading.Event()
    monkeypatch.setattr(store, "MOST_WAITING", 2)
    monkeypatch.setattr(store, "_AT_ONCE", 1)
    monkeypatch.setattr(store, "try_out", lambda *_: may_go.wait(60) and 1)
    futures = [kept.prepare({"const": 0})]
    while kept._turns._waiting:
        time.sleep(0.001)
    futures += [kept.prepare({"const": number}) for number in (1, 2, 1)]
    with pytest.raises(BusyError, match="2 grammars wait"):
        kept.get({"const": 3})
    others = kept.prepare({"const": 3}, "bob")
    may_go.set()
    made = [future.result(60) for future in (*futures, others)]
    assert made[1] is made[3]
    assert len(set(made)) == 4
    kept.close()


def test_a_source_waits_for_a_few_of_anothers_however_many_they_are_and_none_is_made_for_nobody(monkeypatch):
    """With the processes that try out, as in use: alice sends 300 different schemas, bob one, and then alice hangs up."""
    kept, order, may_go = GrammarStore(TOKENIZER), [], threading.Event()
    work = kept._compile

    def compiled(key, form, source):
        order.append(source)
        # None ends before bob stands in line, however slow the machine is.
        may_go.wait(60)
        return work(key, form, source)

    monkeypatch.setattr(kept, "_compile", compiled)
    alice = [kept.prepare({"enum": [number, number + 0.5]}, "alice") for number in range(store.MOST_WAITING)]
    bob = kept.prepare({"const": "bob's"}, "bob")
    may_go.set()
    assert bob.result(60)
    assert order.index("bob") <= 2 * store._THREADS
    for future in alice:
        future.cancel()
    ran = len(order)
    assert kept.prepare({"enum": ["the last"]}, "alice").result(60)
    assert len(order) <= ran + 1 + store._AT_ONCE
    assert len(kept._under_way) <= store._AT_ONCE
    assert not kept._turns._waiting  # none of those that were cancelled
    kept.close()


def test_one_of_two_who_wait_for_a_grammar_may_leave(monkeypatch):
    kept, may_go = GrammarStore(TOKENIZER), threading.Event()
    monkeypatch.setattr(store, "_AT_ONCE", 1)
    monkeypatch.setattr(store, "try_out", lambda *_: may_go.wait(60) and 1)
    kept.prepare({"const": 0})
    first, second = kept.prepare({"const": 1}), kept.prepare({"const": 1})
    assert first.cancel()
    may_go.set()
    assert second.result(60)
    kept.close()


@pytest.mark.slow
@pytest.mark.parametrize("count", [4000, 9000])
def test_a_flat_object_of_many_properties_is_not_called_deep(count):
    schema = {"type": "object", "properties": {f"a{number}": {"type": "null"} for number in range(count)}}
    with pytest.raises(InputError, match=r"took more than 1 s|MiB of (memory|stack)"):
        trial.try_out(forms.text_of(schema))
    assert trial_worker.LIMITS.stack < 8 << 20  # that of the threads which compile


def test_memory_that_a_grammar_takes_is_counted():
    small, large = (trial.try_out(forms.text_of(schema)) for schema in ({"type": "null"}, properties(500)))
    assert 0 < small < 1 << 20 < large < trial_worker.MOST_SIZE


@pytest.mark.slow
def test_a_grammar_that_would_keep_too_much_is_refused():
    row = {"type": "object", "properties": {f"q{number}": {} for number in range(10)}}
    table = {f"p{number}": {"type": "array", "items": row} for number in range(1100)}
    text = forms.text_of({"type": "object", "properties": table})
    with pytest.raises(InputError, match=r"takes \d+ MiB of memory, and at most 24 can be kept|took more than 1 s"):
        trial.try_out(text)


def test_a_schema_as_large_as_openai_takes_is_followed():
    row = {"type": "object", "properties": {f"q{number}": {"type": "string"} for number in range(50)}}
    schema = {"type": "object", "properties": {f"p{number}": row for number in range(100)}, "required": ["p0"]}
    assert takes(schema, '{"p0": {"q3": "x"}, "p99": {}}', TOKENIZER)
