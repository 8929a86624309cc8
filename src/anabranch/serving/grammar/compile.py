"""From a schema and a tokenizer to a `Grammar`."""

from collections.abc import Sequence
from typing import Any

from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import InputError
from anabranch.serving.grammar.forms import build
from anabranch.serving.grammar.grammar import Grammar
from anabranch.serving.grammar.machine import Machine
from anabranch.serving.grammar.vocabulary import vocabulary_of

__all__ = ["compile"]


def compile(schema: dict[str, Any], tokenizer: Tokenizer, *, ends: Sequence[int] = ()) -> Grammar:
    """The grammar of texts that match ``schema``: see `anabranch.serving.grammar.schema` for what it may say.

    Args:
        schema: a JSON schema, {} for any JSON object, or what `regex`, `choice` or `sequence` made.
        tokenizer: whose tokens are masked.
        ends: end-of-text tokens beside the tokenizer's own.

    Raises InputError naming a keyword or value that is not supported, or a schema that no text matches.
    """
    machine = Machine()
    try:
        root = build(machine, schema)
        return Grammar(machine, root, vocabulary_of(tokenizer), (*tokenizer.stop_ids, *ends))
    except RecursionError:
        raise InputError("the grammar is nested too deeply") from None
