"""Grammars: an output that must match a JSON schema, a regular expression or a sequence of these, as masks over tokens.

llguidance reads them and makes the masks. What a grammar costs is found out in another process before this one compiles it (`trial`).

    form (`forms`) -> text of a grammar -> tried out (`trial`) -> compiled, kept and counted (`store`) -> a `Matcher` for each request
"""

from anabranch.extras import require

require("lm", by=__name__)

from anabranch.serving.grammar.forms import choice, regex, repeat, sequence
from anabranch.serving.grammar.grammar import Grammar, Matcher
from anabranch.serving.grammar.store import GrammarStore
from anabranch.serving.grammar.trial import try_out

__all__ = ["Grammar", "GrammarStore", "Matcher", "choice", "regex", "repeat", "sequence", "try_out"]
