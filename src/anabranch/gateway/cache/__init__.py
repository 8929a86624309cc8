"""Answers kept for the next who asks the same: to the letter, or in other words, or at this very moment.

exact      same tenant, model or strategy, messages and sampling fields
named      same tenant, and the same name that the sender gave it
semantic   same tenant and context, and a last message that means the same (opt-in)
abroad     likewise, of what other processes kept
flight     identical requests under way at once make one call upstream
retold     those who read the same kept answer at a time have it, and its chunks as a stream, together
"""

from anabranch.gateway.cache.abroad import Abroad
from anabranch.gateway.cache.entry import Entry
from anabranch.gateway.cache.exact import ExactCache, SharedEntries, exact_key
from anabranch.gateway.cache.flight import SingleFlight, Ticket
from anabranch.gateway.cache.named import LONGEST_NAME, Named, NameKey, OtherRequestError
from anabranch.gateway.cache.retold import Retold, ToldChunks
from anabranch.gateway.cache.semantic import SemanticCache, SharedTexts, context_key

__all__ = [
    "LONGEST_NAME",
    "Abroad",
    "Entry",
    "ExactCache",
    "NameKey",
    "Named",
    "OtherRequestError",
    "Retold",
    "SemanticCache",
    "SharedEntries",
    "SharedTexts",
    "SingleFlight",
    "Ticket",
    "ToldChunks",
    "context_key",
    "exact_key",
]
