"""Seals of thoughts (``thinking_blocks``): whose they are, so that none goes to a model that did not make it.

Anthropic's form has one place for a signature, that of a thinking block, where Google signs a call, a text or a picture. A signature of
Google's goes there under a mark of ours, with what it is of: ``google.WHAT.SIGNATURE``.

    c and an id       a call of a tool
    i and a digest    a picture
    h                 the thought itself
    t                 the text
"""

import hashlib
import re
from collections.abc import Iterable
from typing import Any

from anabranch.web.reasoning_details import is_sealed

Json = dict[str, Any]

# No signature has a dot in it: they are base64.
_SEAL = re.compile(r"google\.(h|t|[ci].*)\.([^.]*)", re.DOTALL)


def sealed(what: str, signature: str) -> str:
    """A signature of Google's with what it is of."""
    return f"google.{what}.{signature}"


def of_call(id: Any) -> str:
    """What a seal of a call says it is of."""
    return f"c{id}"


def of_picture(url: str) -> str:
    """Likewise of a picture, by its address or all of it."""
    return "i" + hashlib.sha256(url.encode("utf-8", "replace")).hexdigest()[:32]


def of_google(blocks: Any) -> list[tuple[str, str, str]]:
    """Of each thinking block that Google's models made: the thought, what its signature is of, the signature."""
    found = []
    for block in _thinking(blocks):
        match = _SEAL.fullmatch(str(block.get("signature") or ""))
        if match is not None:
            found.append((str(block.get("thinking") or ""), match[1], match[2]))
    return found


def unsigned(blocks: Any) -> str:
    """What was thought without any signature: that of models that sign nothing."""
    return "".join(str(block.get("thinking") or "") for block in _thinking(blocks) if not block.get("signature"))


def is_claudes(block: Json) -> bool:
    """Whether a block of thoughts can go to a model of Anthropic, whoever serves it: it is signed, and neither by Google nor by us."""
    if block.get("type") == "redacted_thinking":
        return True
    signature = block.get("signature")
    if block.get("type") != "thinking" or not signature or is_sealed(signature):
        return False
    return _SEAL.fullmatch(str(signature)) is None


def _thinking(blocks: Any) -> Iterable[Json]:
    return [block for block in blocks or () if block.get("type") == "thinking"]
