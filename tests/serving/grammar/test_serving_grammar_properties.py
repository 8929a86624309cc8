"""Random schemas: what the masks let through is valid, and what is valid is let through."""

import json
import random
import re

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch.data.bpe import train_bpe
from anabranch.serving import grammar
from json_schemas import NAMES, schemas
from tokenizers_of_every_make import ALL

SAMPLE = ['{"a": [1, 2], "b": {"ab": null}}', '{"x y": true, "ключ": "foo bar"}\n', '[{"a":-1.5e3}]'] * 3
TOKENIZERS = {"bytes": ALL["bytes"], "bpe": train_bpe(SAMPLE, 320), "llama": ALL["llama"]}
QUOTES = re.compile(rb'(?<!\\)(?:\\\\)*"')
quiet = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


def walk(compiled, tokenizer, rng, room=40):
    """A text by random choices among the allowed tokens; after ``room`` tokens those that lead to an end."""
    state, text = compiled.start(), b""
    for length in range(room + 500):
        mask_V = compiled.mask(state)
        allowed = mask_V.nonzero()[0].tolist()
        assert allowed, f"nothing may follow {text!r}"
        assert bool(mask_V[tokenizer.eos_id]) == compiled.is_final(state)
        is_over = allowed == [tokenizer.eos_id] or length > room or rng.random() < 0.3
        if compiled.is_final(state) and is_over:
            return text.decode("utf-8")
        pieces = {tokenizer.inner_bytes(token): token for token in allowed if token != tokenizer.eos_id}
        chosen = (
            [rng.choice(list(pieces))] if length <= room else closing(compiled, tokenizer, state, pieces, text, rng)
        )
        for piece in chosen:
            state = compiled.advance(state, pieces[piece] if len(chosen) == 1 else single(tokenizer, piece))
            assert state is not None
            text += piece
    raise AssertionError(f"no end: {text!r}")


def single(tokenizer, byte):
    """The token of one byte."""
    return next(token for token in range(tokenizer.vocab_size) if tokenizer.inner_bytes(token) == byte)


def spelled(name):
    """The bytes, one by one, of a key after its opening quote."""
    text = json.dumps(name, ensure_ascii=False).encode()[1:] + b":"
    return [bytes([byte]) for byte in text]


def closing(compiled, tokenizer, state, pieces, text, rng):
    """What to write to get near to an end, given the tokens that may follow by their bytes."""
    if len(QUOTES.findall(text)) % 2:
        for name in rng.sample(NAMES, len(NAMES)) if text.endswith(b'"') else []:
            # a key of the object, perhaps one that is required
            after = state
            for byte in spelled(name):
                after = after if after is None else compiled.advance(after, single(tokenizer, byte))
            if after is not None:
                return spelled(name)
        # what the patterns of `json_schemas` wait for
        plain = [piece for piece in pieces if len(piece) == 1 and piece in b"abx "]
        return [b'"' if b'"' in pieces else rng.choice(plain or list(pieces))]
    return [
        next((bytes([byte]) for byte in b'}],0123456789n"' if bytes([byte]) in pieces), None)
        or rng.choice(list(pieces))
    ]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(pair=schemas(), seed=st.integers(0, 2**32))
@quiet
def test_every_walk_gives_a_valid_instance(name, pair, seed):
    schema, _ = pair
    schema = schema or {"type": "object"}
    text = walk(grammar.compile(schema, TOKENIZERS[name]), TOKENIZERS[name], random.Random(seed))
    jsonschema_rs.validator_for(schema).validate(json.loads(text))


@given(data=st.data(), pair=schemas(), indent=st.sampled_from([None, None, 1, 4]), is_ascii=st.booleans())
@quiet
def test_every_instance_is_let_through(data, pair, indent, is_ascii):
    schema, instances = pair
    value = data.draw(instances)
    for separators in (None, (",", ":")):
        text = json.dumps(value, indent=indent, ensure_ascii=is_ascii, separators=separators)
        tokenizer = TOKENIZERS["bpe"]
        compiled = grammar.compile(schema, tokenizer)
        state = compiled.start()
        for token in tokenizer.encode(text):
            assert compiled.mask(state)[token], (schema, text, tokenizer.decode([token]))
            state = compiled.advance(state, token)
        assert compiled.is_final(state)
        assert compiled.mask(state)[tokenizer.eos_id]


@given(pair=schemas(), seed=st.integers(0, 2**32), data=st.data())
@quiet
def test_masks_are_what_stepping_token_by_token_allows(pair, seed, data):
    tokenizer = TOKENIZERS["bpe"]
    compiled, rng = grammar.compile(pair[0], tokenizer), random.Random(seed)
    state = compiled.start()
    for _ in range(data.draw(st.integers(0, 12))):
        allowed = [token for token in compiled.mask(state).nonzero()[0].tolist() if token != tokenizer.eos_id]
        if not allowed:
            break
        state = compiled.advance(state, rng.choice(allowed))
    stepped = [compiled.advance(state, token) is not None for token in range(tokenizer.vocab_size)]
    assert compiled.mask(state).tolist() == stepped
