"""Random schemas: what the masks let through is valid, and what is valid and in their order is let through."""

import json
import random
import re
import sys

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch.data.bpe import train_bpe
from anabranch.errors import InputError
from grammar_walks import store_of
from json_schemas import NAMES, schemas
from tokenizers_of_every_make import ALL

SAMPLE = ['{"a": [1, 2], "b": {"ab": null}}', '{"x y": true, "ключ": "foo bar"}\n', '[{"a":-1.5e3}]'] * 3
TOKENIZERS = {"bytes": ALL["bytes"], "bpe": train_bpe(SAMPLE, 320), "llama": ALL["llama"]}
QUOTES = re.compile(rb'(?<!\\)(?:\\\\)*"')
quiet = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


def at(compiled, tokens):
    """A matcher after ``tokens``; None if they do not fit."""
    matcher = compiled.matcher()
    return matcher if all(map(matcher.take, tokens)) else None


def walk(compiled, tokenizer, rng, room=40):
    """A text by random choices among the allowed tokens; after ``room`` tokens those that lead to an end."""
    matcher, taken, text = compiled.matcher(), [], b""
    for length in range(room + 500):
        mask_V = matcher.allowed_V()
        allowed = mask_V.nonzero()[0].tolist()
        assert allowed, f"nothing may follow {text!r}: {matcher.error}"
        assert bool(mask_V[tokenizer.eos_id]) == matcher.is_final
        is_over = allowed == [tokenizer.eos_id] or length > room or rng.random() < 0.3
        if matcher.is_final and is_over:
            return text.decode("utf-8")
        pieces = {tokenizer.inner_bytes(token): token for token in allowed if token != tokenizer.eos_id}
        chosen = (
            [rng.choice(list(pieces))] if length <= room else closing(compiled, tokenizer, taken, pieces, text, rng)
        )
        for piece in chosen:
            taken.append(pieces[piece] if len(chosen) == 1 else single(tokenizer, piece))
            assert matcher.take(taken[-1])
            text += piece
    raise AssertionError(f"no end: {text!r}")


def single(tokenizer, byte):
    """The token of one byte."""
    return next(token for token in range(tokenizer.vocab_size) if tokenizer.inner_bytes(token) == byte)


def spelled(name):
    """The bytes, one by one, of a key after its opening quote."""
    text = json.dumps(name, ensure_ascii=False).encode()[1:] + b":"
    return [bytes([byte]) for byte in text]


def closing(compiled, tokenizer, taken, pieces, text, rng):
    """What to write to get near to an end, given the tokens that may follow by their bytes."""
    if len(QUOTES.findall(text)) % 2:
        for name in rng.sample(NAMES, len(NAMES)) if text.endswith(b'"') else []:
            # a key of the object, perhaps one that is required
            if at(compiled, [*taken, *(single(tokenizer, byte) for byte in spelled(name))]) is not None:
                return spelled(name)
        # what the patterns of `json_schemas` wait for
        plain = [piece for piece in pieces if len(piece) == 1 and piece in b"abx "]
        return [b'"' if b'"' in pieces else rng.choice(plain or list(pieces))]
    # A zero comes last: behind the point of a number that must be greater than 0 it leads nowhere, and so many make a float 0.
    return [
        next((bytes([byte]) for byte in b'}],1234567890n"' if bytes([byte]) in pieces), None)
        or rng.choice(list(pieces))
    ]


def compiled_of(schema, tokenizer):
    """The grammar; None where its numbers have bounds that llguidance makes no expression for."""
    future = store_of(tokenizer).prepare(schema)
    error = future.exception()
    assert error is None or (isinstance(error, InputError) and "range" in str(error)), (schema, error)
    return future.result() if error is None else None


@pytest.mark.parametrize("name", TOKENIZERS)
@given(pair=schemas(), seed=st.integers(0, 2**32))
@quiet
def test_every_walk_gives_a_valid_instance(name, pair, seed):
    schema, _ = pair
    compiled = compiled_of(schema, TOKENIZERS[name])
    if compiled is not None:
        text = walk(compiled, TOKENIZERS[name], random.Random(seed))
        jsonschema_rs.validator_for(schema or {"type": "object"}).validate(json.loads(text, parse_float=as_float))


def as_float(digits):
    """A number of JSON, which may be beyond the largest float, or nearer to 0 than the smallest."""
    value = max(min(float(digits), sys.float_info.max), -sys.float_info.max)
    if value == 0 and any(digit in digits.lower().partition("e")[0] for digit in "123456789"):
        return -sys.float_info.min if digits.startswith("-") else sys.float_info.min
    return value


@given(data=st.data(), pair=schemas(), indent=st.sampled_from([None, None, 1, 4]))
@quiet
def test_every_instance_is_let_through(data, pair, indent):
    schema, instances = pair
    value, tokenizer = data.draw(instances), TOKENIZERS["bpe"]
    compiled = compiled_of(schema, tokenizer)
    for separators in (None, (",", ":")) if compiled is not None else ():
        text = json.dumps(value, indent=indent, ensure_ascii=False, separators=separators)
        matcher = compiled.matcher()
        for token in tokenizer.encode(text):
            assert matcher.allowed_V()[token], (schema, text, tokenizer.decode([token]))
            assert matcher.take(token)
        assert matcher.is_final
        assert matcher.allowed_V()[tokenizer.eos_id]


@given(pair=schemas(), seed=st.integers(0, 2**32), data=st.data())
@settings(quiet, max_examples=15)
def test_masks_are_what_stepping_token_by_token_allows(pair, seed, data):
    tokenizer, rng = TOKENIZERS["bpe"], random.Random(seed)
    compiled, taken = compiled_of(pair[0], tokenizer), []
    matcher = compiled.matcher() if compiled is not None else None
    for _ in range(data.draw(st.integers(0, 12)) if matcher is not None else 0):
        allowed = [token for token in matcher.allowed_V().nonzero()[0].tolist() if token != tokenizer.eos_id]
        if not allowed:
            break
        taken.append(rng.choice(allowed))
        assert matcher.take(taken[-1])
    if matcher is not None:
        stepped = [at(compiled, [*taken, token]) is not None for token in range(tokenizer.vocab_size)]
        assert matcher.allowed_V().tolist() == stepped
