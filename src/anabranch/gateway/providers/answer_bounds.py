"""How long an answer may be: 32 MiB, or as long as what was asked for takes, if that is longer."""

from anabranch.gateway.providers.provider import BODY_BYTES, UpstreamRequest

# The longest of all, whatever is asked for.
MOST_BYTES = 256 << 20

# Dimensions of a vector where the request names none: as many as the usual models have at most.
DIMENSIONS = 4096

# Of one number of a vector, as text (-0.012345678901234567 and a comma and a space), which upstreams write whose form is not OpenAI's.
NUMBER_BYTES = 24

# Around one vector.
VECTOR_BYTES = 256

# A picture as base64, at most.
PICTURE_BYTES = 32 << 20


def most_bytes(request: UpstreamRequest) -> int:
    """Bytes of a whole answer that are read: at least `BODY_BYTES`, at most `MOST_BYTES`."""
    body, asked = request.body, 0
    if request.endpoint == "embeddings":
        asked = _num_inputs(body.get("input")) * (
            _count(body.get("dimensions"), DIMENSIONS) * NUMBER_BYTES + VECTOR_BYTES
        )
    elif request.endpoint in ("images", "image_edits"):
        asked = _count(body.get("n"), 1) * PICTURE_BYTES
    return min(max(asked, BODY_BYTES), MOST_BYTES)


def _num_inputs(given: object) -> int:
    """Texts that are embedded; a list of token ids is one."""
    return len(given) if isinstance(given, list) and given and type(given[0]) is not int else 1


def _count(given: object, usual: int) -> int:
    """Fields of forms come as text."""
    if isinstance(given, str) and given.isascii() and given.isdigit() and len(given) < 10:
        return int(given)
    return given if type(given) is int and given > 0 else usual
