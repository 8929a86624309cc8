"""Grammars: an output that must match a JSON schema, as masks over tokens.

schema -> nodes of a pushdown automaton over bytes (`machine`) -> states, made as they are reached -> masks, kept per state
"""

from anabranch.extras import require

require("lm", by=__name__)

from anabranch.serving.grammar.compile import compile
from anabranch.serving.grammar.forms import choice, regex, repeat, sequence
from anabranch.serving.grammar.grammar import Grammar

__all__ = ["Grammar", "choice", "compile", "regex", "repeat", "sequence"]
