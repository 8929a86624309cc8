"""``reasoning_details`` of a message of chat, as OpenRouter has them: what a model thought, each part as its provider signed or sealed it.

Whoever goes on with a turn of tools gives them back as they came. A chat has a place for them; in Anthropic's form, and in the
Responses API, they are the signature of a thought: ``details.`` and all of them as base64.
"""

import base64
import json
from collections.abc import Iterable
from typing import Any

from anabranch.web.json_text import to_json

Json = dict[str, Any]

# No signature has a dot in it: they are base64.
_SEAL = "details."

# Parts that come in pieces, and the field of each that grows.
_GROWS = {"reasoning.text": "text", "reasoning.summary": "summary"}


def details_in(message: Json) -> list[Any]:
    """Those of a message, or of a piece of one."""
    details = message.get("reasoning_details")
    return details if isinstance(details, list) else []


def joined_details(pieces: Iterable[Any]) -> list[Any]:
    """Whole details of the pieces of a stream: pieces of one text, told apart by their number, come behind one another."""
    made: list[Any] = []
    for piece in pieces:
        held = _of_same(made, piece)
        if held is None:
            made.append(dict(piece) if isinstance(piece, dict) else piece)
            continue
        grows = _GROWS[piece["type"]]
        for name, value in piece.items():
            if name == grows and isinstance(held.get(name), str) and isinstance(value, str):
                held[name] += value
            elif value is not None:
                held[name] = value
    return made


def _of_same(made: list[Any], piece: Any) -> Json | None:
    """The detail that a piece goes on with; None if it is a new one."""
    if not isinstance(piece, dict) or piece.get("type") not in _GROWS:
        return None
    same = [one for one in made if isinstance(one, dict) and one.get("type") == piece["type"]]
    if piece.get("index") is not None:
        return next((one for one in reversed(same) if one.get("index") == piece["index"]), None)
    return same[-1] if same and same[-1] is made[-1] else None


def sealed_blocks(details: list[Any], thought: str | None = None) -> list[Json]:
    """A thinking block that holds them; none where there is nothing in them but text that nobody signed.

    Args:
        details: whole.
        thought: what was thought; None reads that from them.
    """
    is_plain = all(
        isinstance(one, dict) and one.get("type") == "reasoning.text" and not one.get("signature") for one in details
    )
    if is_plain:
        return []
    if thought is None:
        found = [one.get(_GROWS.get(str(one.get("type")), "")) for one in details if isinstance(one, dict)]
        thought = "".join(text for text in found if isinstance(text, str))
    seal = base64.urlsafe_b64encode(to_json(details, (",", ":"))).decode()
    return [{"type": "thinking", "thinking": thought, "signature": _SEAL + seal}]


def is_sealed(signature: Any) -> bool:
    """Whether a signature holds details."""
    return isinstance(signature, str) and signature.startswith(_SEAL)


def details_of(blocks: Any) -> list[Any]:
    """Those that blocks hold, in their order. What was changed on its way is left out."""
    found: list[Any] = []
    for block in blocks if isinstance(blocks, list) else ():
        if not isinstance(block, dict) or not is_sealed(block.get("signature")):
            continue
        try:
            details = json.loads(base64.urlsafe_b64decode(block["signature"].removeprefix(_SEAL)))
        except (ValueError, RecursionError):
            continue
        found += details if isinstance(details, list) else []
    return found
