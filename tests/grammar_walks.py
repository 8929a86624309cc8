"""Texts against grammars, for tests."""

from functools import lru_cache

from anabranch.serving.grammar import GrammarStore


@lru_cache(maxsize=32)
def store_of(tokenizer, ends=()):
    """One store for each tokenizer."""
    return GrammarStore(tokenizer, ends)


def takes(form, text, tokenizer):
    """Whether a grammar lets the whole of ``text`` through, byte by byte; the tokenizer's first tokens must be bytes."""
    matcher = store_of(tokenizer).get(form).matcher()
    for byte in text.encode() if isinstance(text, str) else text:
        if not matcher.allowed_V()[byte]:
            assert not matcher.take(byte)
            return False
        assert matcher.take(byte), matcher.error
    assert bool(matcher.allowed_V()[tokenizer.eos_id]) == matcher.is_final
    return matcher.is_final
