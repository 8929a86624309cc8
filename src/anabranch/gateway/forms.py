"""multipart/form-data (RFC 7578): the bytes of a form as an object. Each step is linear in them, and holds Python's lock for no longer."""

import re
from typing import Any

from anabranch.gateway.providers.media import Upload
from anabranch.web.api_error import ApiError, wrong

Json = dict[str, Any]

# Parts of a form, and bytes of what stands above each.
MOST_FORM_PARTS = 1000
MOST_HEAD_BYTES = 8192

# None of them can go back over what it has read: a bracket of signs is followed by one that it does not hold.
_NAME = re.compile(r'\bname="([^"]*)"')
_FILENAME = re.compile(r'\bfilename="([^"]*)"')
_TYPE = re.compile(r"[\w.+-]+/[\w.+-]+(?:; ?charset=[\w-]+)?", re.ASCII)
_BOUNDARY = re.compile(r'boundary="?([^";,\s]{1,70})"?')

# Fields that are no text in JSON.
_WORDS = {"true": True, "false": False}


def parse_form(raw: bytes, content_type: str) -> Json:
    """A multipart/form-data body as an object: texts, and under each name of files a list of them.

    ``n`` is a number and ``stream`` true or false, where they say so; a name that ends in ``[]`` and comes twice is a list of texts.
    Of other names the last text counts. Raises ApiError (400) for what is no form, for more than `MOST_FORM_PARTS` parts, and for a
    part whose head has more than `MOST_HEAD_BYTES` bytes.
    """
    boundary = _BOUNDARY.search(content_type)
    if boundary is None:
        raise _invalid("the body is multipart/form-data without a boundary")
    mark, raw = b"\r\n--" + boundary[1].encode("ascii", "replace"), b"\r\n" + raw
    # Before they are made: each costs more memory than it has bytes.
    count = raw.count(mark) - 1
    if count > MOST_FORM_PARTS:
        raise _invalid(f"the form has {count:,} parts; it may have {MOST_FORM_PARTS:,}")
    pieces = raw.split(mark)
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise _invalid("the form has no end")
    texts: dict[str, list[str]] = {}
    files: dict[str, list[Upload]] = {}
    for piece in pieces[1:-1]:
        _add_part(texts, files, piece)
    if both := sorted(texts.keys() & files.keys()):
        raise wrong(both[0][:80], f"{both[0][:80]} is both text and a file")
    return {**{name: _value(name, held) for name, held in texts.items()}, **files}


def _add_part(texts: dict[str, list[str]], files: dict[str, list[Upload]], piece: bytes) -> None:
    # The part's own bytes are not searched where a head has no end.
    end = piece.find(b"\r\n\r\n", 0, MOST_HEAD_BYTES + 4)
    if end < 0 and len(piece) > MOST_HEAD_BYTES:
        raise _invalid(f"the head of a part of the form has more than {MOST_HEAD_BYTES:,} bytes")
    head = piece[: max(end, 0)].decode("utf-8", "replace")
    name = _NAME.search(head)
    if end < 0 or name is None:
        raise _invalid("a part of the form has no name")
    data, filename = piece[end + 4 :], _FILENAME.search(head)
    if filename is None:
        texts.setdefault(name[1], []).append(data.decode("utf-8", "replace"))
    else:
        # OpenAI's clients name several pictures so.
        held = files.setdefault(name[1].removesuffix("[]"), [])
        held.append(Upload(filename[1], _type(head), data))


def _type(head: str) -> str:
    """Of a file, as the head says it, else that of any bytes."""
    for line in head.split("\r\n"):
        name, _, value = line.partition(":")
        if name.strip().lower() == "content-type" and _TYPE.fullmatch(value.strip()):
            return value.strip()
    return "application/octet-stream"


def _value(name: str, held: list[str]) -> Any:
    if name.endswith("[]") and len(held) > 1:
        return held
    last = held[-1]
    if name == "n" and last.isdecimal() and len(last) < 9:
        return int(last)
    return _WORDS.get(last.lower(), last) if name == "stream" else last


def _invalid(message: str) -> ApiError:
    return ApiError(400, "invalid_body", message)
