"""`Said`: what somebody sends to ``POST /v1/feedback``: a score, a thumb or a preference."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from anabranch.bounds import shown_json
from anabranch.routers.score_scale import unit_score
from anabranch.web.api_error import ApiError, wrong

THUMBS = {"up": 1.0, "down": 0.0}
FIELDS = ("request_id", "score", "thumb", "preferred", "comment")
_WAYS = "score (0 to 1), thumb (up or down) and preferred ([better, worse])"

# Characters of a comment, and of a name.
_COMMENT, _NAME = 2000, 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """One of `score` and `preferred` is there.

    Attributes:
        id: of the request.
        score: 0 to 1; that of a thumb is 1 for up and 0 for down.
        preferred: what is better, what is worse: names of models, or of requests.
        comment: in words.
    """

    id: str
    score: float | None = None
    preferred: tuple[str, str] | None = None
    comment: str = ""


def read(body: Mapping[str, Any]) -> Said:
    """Raises ApiError (400), for a field that there is not too: what is not read must not seem to be."""
    unknown = next((name for name in body if name not in FIELDS), None)
    if unknown is not None:
        raise wrong(unknown[:128], f"there is no field {unknown[:128]!r}; feedback has {', '.join(FIELDS)}")
    id, comment = body.get("request_id"), body.get("comment")
    if not is_id(id):
        raise wrong("request_id", "request_id must be that of an answer (its header x-request-id)")
    if comment is not None and (not isinstance(comment, str) or len(comment) > _COMMENT):
        raise wrong("comment", f"comment must be text of at most {_COMMENT:,} characters")
    ways = [name for name in ("score", "thumb", "preferred") if name in body]
    if len(ways) != 1:
        name = ways[1] if ways else "score"
        raise wrong(name, f"feedback has one of {_WAYS}; this has {' and '.join(ways) or 'none'}")
    given = body[ways[0]]
    if ways[0] == "preferred":
        return Said(id=id, preferred=_pair(given), comment=comment or "")
    return Said(id=id, score=_score(given) if ways[0] == "score" else _thumb(given), comment=comment or "")


def is_id(value: Any) -> TypeGuard[str]:
    """Whether it may be the id of a request."""
    return isinstance(value, str) and 0 < len(value) <= 128 and value.isascii() and value.isprintable()


def scored_before(id: str) -> ApiError:
    """A key says what it thinks of an answer once (409)."""
    message = f"this key has scored {id!r} already; a request is scored once, and compared once"
    return ApiError(409, "scored_before", message, param="request_id")


def _score(score: Any) -> float:
    is_number = isinstance(score, int | float) and not isinstance(score, bool)
    found = unit_score(score) if is_number else None
    if found is None:
        raise wrong("score", f"score is {shown_json(score)}; it must be a number from 0 to 1")
    return found


def _thumb(thumb: Any) -> float:
    if not isinstance(thumb, str) or thumb not in THUMBS:
        raise wrong("thumb", f"thumb must be {' or '.join(THUMBS)}")
    return THUMBS[thumb]


def _pair(pair: Any) -> tuple[str, str]:
    is_pair = isinstance(pair, list) and len(pair) == 2
    if not is_pair or not all(isinstance(one, str) and 0 < len(one) <= _NAME for one in pair):
        raise wrong("preferred", "preferred must be [better, worse]: two names of models, or of requests")
    return pair[0], pair[1]
