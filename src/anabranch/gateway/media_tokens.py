"""Tokens of what is no text in a prompt, by the rules that providers publish; at most by the dearest of them.

    images  Anthropic, "Vision": width * height / 750, about 1,600 for one, up to 4,784 at high resolution
            OpenAI, "Images and vision": 85 and 170 for each of at most 8 tiles; or 2.46 at most for each of 1,536 patches of 32 pixels
            Gemini, "Understand and count tokens": 258 for each tile of 768 pixels
    audio   OpenAI, "Managing costs": 10 a second; Gemini: 32 a second; how long it is, the frames of a clip say (`sound_frames`),
            or the packets in a container (`sound_containers`)
    files   Anthropic, "PDF support": 1,500 to 3,000 a page for its text, and those of an image of the page; OpenAI: 100 pages a request

What a header says of an image or a clip is believed, as whoever decodes it does: so it is found as they find it, by walking through the
parts that the file is made of, and where it cannot be, the size is not known. One model counts images far beyond these: GPT-4o mini,
2,833 and 5,667 a tile, at a price per token that makes up for it.
"""

import base64
import binascii
import math
import mimetypes
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from anabranch.gateway.sound_containers import contained, is_container
from anabranch.gateway.sound_frames import flac, flac_seconds, framed, notes_end
from anabranch.gateway.sound_others import LOOKED_AT, refuse_others
from anabranch.gateway.sound_packets import ManyPiecesError, OtherSoundError, Pieces
from anabranch.gateway.sound_wave import wave_rate

# Of an image whose size is not known.
IMAGE_TOKENS, IMAGE_MOST = 1_600, 4_784
_OPENAI_MOST = 85 + 8 * 170
_PATCH_MOST = 1_536

# Of a side of an image; larger ones are refused, or made smaller.
_SIDE = 8_000
AUDIO_A_SECOND = 32

# Bytes of a second, as files mostly have them, and the fewest that speech is sent in.
_TYPICAL = {
    "mp3": 16_000,
    "wav": 32_000,
    "flac": 60_000,
    "m4a": 16_000,
    "aac": 16_000,
    "ogg": 6_000,
    "opus": 4_000,
    "webm": 6_000,
}
_FEWEST = 1_000

# Likewise of sound that was counted: silence that takes next to no bytes.
_SPARSEST = 100

# Samples of OpenAI's ``pcm``: 24,000 a second of two bytes.
_PCM = 48_000

# How clips begin that are walked through: with notes, or with a frame.
_FRAMED = (b"ID3", b"\xff")

# Characters of a clip in which its format mostly is.
_FORMAT = 4_096
PAGE_TOKENS, PAGE_MOST = 2_000, 3_000 + IMAGE_TOKENS
PAGES = 100

# Of a film or a clip that is named by its address: as long as any model has room for.
STREAM_TOKENS, STREAM_MOST = 20_000, 1_048_576

# Of a file of which not even the pages are known; less text than this no page has.
_PAGE_BYTES = 1_000

# What is looked at of an image or a clip: pictures within pictures, and notes, may come before the size.
_HEAD = 256 << 10

# Characters of base64 that are decoded at once.
_PIECE = 1 << 20
_TEXTS = (
    "text/",
    "application/json",
    "application/xml",
    "application/yaml",
    "application/x-yaml",
    "application/javascript",
)
_PAGE = re.compile(rb"/Type\s*/Page(?![A-Za-z])")
_ADDRESS = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*://")
_COUNT = re.compile(rb"/Count\s+(\d{1,7})")


@dataclass(frozen=True, slots=True)
class Media:
    """Tokens of an image, a clip or a file.

    Attributes:
        tokens: about.
        at_most: by the rules of any provider.
        kind: ``image``, ``audio`` or ``file``.
    """

    tokens: int
    at_most: int
    kind: str = "file"


def image(url: str, walked: Pieces | None = None) -> Media:
    """Of an image by its URL; the size is known of those that are within it (``data:``).

    What says that it is something else is counted as that: a clip with what is ``walked`` of its request, alone where that is None.
    """
    kind = kind_of_url(url)
    if kind and not kind.startswith("image/") and (found := file({"file_data": url}, walked)) is not None:
        return found
    size = _size(_decoded(url.partition(",")[2][: _HEAD * 4 // 3])) if url.startswith("data:") else None
    if size is None or not all(size):
        return Media(IMAGE_TOKENS, IMAGE_MOST, "image")
    width, height = (min(side, _SIDE) for side in size)
    area = math.ceil(width * height / 750)
    patches = math.ceil(2.46 * min(math.ceil(width / 32) * math.ceil(height / 32), _PATCH_MOST))
    tiles = 258 * math.ceil(width / 768) * math.ceil(height / 768)
    return Media(min(max(area, 85), IMAGE_TOKENS), max(_OPENAI_MOST, min(area, IMAGE_MOST), patches, tiles), "image")


def audio(clip: Mapping[str, Any], walked: Pieces | None = None) -> Media | None:
    """Of an ``input_audio``: its ``format``, and ``data`` in base64, as a ``data:`` URL too, or an address; None if it is none.

    For ``walked`` see `image`.
    """
    data, form = clip.get("data"), str(clip.get("format")).lower()
    if not isinstance(data, str):
        return None
    if is_address(data):
        return elsewhere("audio/")
    if data.startswith("data:"):
        data = data.partition(",")[2]
    # Whatever it is called: who decodes it looks at what it is.
    return _clip(len(data) * 3 // 4, form, lambda size: _decoded(data[: size * 4 // 3 // 4 * 4]), walked)


def sound(data: bytes, form: str, walked: Pieces | None = None) -> Media:
    """Of a clip by its bytes; ``form`` is what it is called (``mp3``). For ``walked`` see `image`."""
    return _clip(len(data), form, lambda size: data[:size], walked)


def _clip(num_bytes: int, form: str, head: Callable[[int], bytes], walked: Pieces | None) -> Media:
    """Of so many bytes; ``head`` gives the first of them."""
    found = _lasts(num_bytes, form, head, Pieces() if walked is None else walked)
    # A few bytes that claim to be hours are no reason to keep others out of a limit that all share; a budget of one's own they may fill.
    seconds = min(found.seconds, num_bytes / (_SPARSEST if found.is_counted else _FEWEST))
    return Media(math.ceil(seconds * AUDIO_A_SECOND), math.ceil(found.at_most_s * AUDIO_A_SECOND), "audio")


@dataclass(frozen=True, slots=True)
class _Lasts:
    """Seconds of a clip, about, and at most; ``is_counted``: by its frames or packets, not by what a field says."""

    seconds: float
    at_most_s: float
    is_counted: bool = False


def _lasts(num_bytes: int, form: str, head: Callable[[int], bytes], walked: Pieces) -> _Lasts:
    first = head(_FORMAT * 3 // 4)
    is_noted = first.startswith(b"ID3")
    refuse_others(head(num_bytes if is_noted else LOOKED_AT), notes_end(head(num_bytes)) if is_noted else 0)
    if (found := framed(head(num_bytes), walked) if first.startswith(_FRAMED) else None) is not None:
        seconds = found.seconds + found.rest / _TYPICAL.get(form, _TYPICAL["mp3"])
        return _Lasts(seconds, found.at_most + found.rest / _FEWEST, True)
    wave = wave_rate(first, walked) or (wave_rate(head(num_bytes), walked) if first.startswith(b"RIFF") else None)
    if (within := contained(head(num_bytes), walked) if is_container(first) or wave is None else None) is not None:
        # What is only told is what it is mostly; what it may be at most, its bytes say.
        at_most = within.at_most if within.is_counted else max(num_bytes / _FEWEST, within.at_most)
        at_most = max(within.seconds, at_most) + within.rest / _FEWEST
        seconds = within.seconds or num_bytes / _TYPICAL.get(form, _TYPICAL["m4a"])
        return _Lasts(seconds, at_most, within.is_counted)
    if (found := flac(head(num_bytes), walked) if first.startswith((b"fLaC", b"ID3")) else None) is not None:
        declared = flac_seconds(head(_HEAD)) or 0.0
        if found.seconds:
            return _Lasts(found.seconds, max(found.seconds, declared), True)
        # Silence takes next to no bytes there.
        return _Lasts(declared or num_bytes / _TYPICAL["flac"], max(declared, num_bytes / _FEWEST))
    seconds = num_bytes / (wave or _TYPICAL.get(form, _TYPICAL["mp3"]))
    at_most = max(seconds, num_bytes / (wave or _FEWEST))
    if wave is None and (found := framed(head(num_bytes), walked, is_sure=False)) is not None:
        # Something stands before what may be frames.
        at_most = max(at_most, found.at_most)
    return _Lasts(seconds, at_most)


def heard_seconds(data: bytes, form: str) -> float:
    """Seconds of sound that a provider has made, about: of WAV, PCM, FLAC, MP3, AAC and Opus, exactly."""
    if form == "pcm":
        return len(data) / _PCM
    try:
        walked = Pieces()
        found = framed(data, walked)
        return found.seconds if found is not None else _lasts(len(data), form, lambda size: data[:size], walked).seconds
    except (ManyPiecesError, OtherSoundError):
        return len(data) / _TYPICAL.get(form, _TYPICAL["mp3"])


def file(given: Mapping[str, Any], walked: Pieces | None = None) -> Media | None:
    """Of a ``file``: ``file_data`` in base64, mostly a ``data:`` URL, or the ``file_id`` or the address of one that the provider gets.

    None for what is no such file, or of a kind whose tokens are not known: then its letters count. For ``walked`` see `image`.
    """
    data, url = given.get("file_data"), given.get("file_url")
    if isinstance(url, str) and not isinstance(data, str):
        data = url
    if not isinstance(data, str):
        return elsewhere() if isinstance(given.get("file_id"), str) else None
    if is_address(data):
        # By its name it may be a picture; what comes may be as many pages as any.
        found, file_most = elsewhere(kind_of_url(data)), elsewhere().at_most
        return Media(found.tokens, max(found.at_most, file_most), found.kind)
    if data.startswith("data:audio/"):
        form, _, text = data.partition(",")
        return audio({"data": text, "format": form[11:].partition(";")[0]}, walked)
    kind, _, text = data.removeprefix("data:").partition(",") if data.startswith("data:") else ("", "", data)
    if kind.startswith(_TEXTS):
        num_bytes = len(text) * 3 // 4
        return Media(-(-num_bytes // 4), num_bytes)
    is_pdf = kind.startswith("application/pdf") or text.startswith("JVBERi0")
    return _pdf(text) if is_pdf else None


def is_address(text: str) -> bool:
    """Of something that is not within the request, whatever gets it from there."""
    return _ADDRESS.match(text) is not None


def elsewhere(kind: str = "") -> Media:
    """Of what is not within the request, of which no more is known than its type (``image/png``), if that."""
    if kind.startswith("image/"):
        return Media(IMAGE_TOKENS, IMAGE_MOST, "image")
    if kind.startswith(("audio/", "video/")):
        return Media(STREAM_TOKENS, STREAM_MOST, "audio" if kind.startswith("audio/") else "file")
    return Media(PAGE_TOKENS, PAGES * PAGE_MOST)


def kind_of_url(url: str) -> str:
    """The type that a URL says: of a ``data:`` URL, or by how its path ends; "" if neither does."""
    if url.startswith("data:"):
        return url[5:300].partition(",")[0].partition(";")[0].strip().lower()
    return mimetypes.guess_type(url[:4096].partition("?")[0].partition("#")[0])[0] or ""


def _pdf(text: str) -> Media:
    raw = b"".join(_decoded(text[at : at + _PIECE]) for at in range(0, len(text), _PIECE))
    # One match at a time: a search through all of it would hold up every other thread.
    counts = [int(match[1]) for at in _places(raw, b"/Count") if (match := _COUNT.match(raw, at))]
    pages = max([sum(_PAGE.match(raw, at) is not None for at in _places(raw, b"/Type")), *counts])
    # Pages may be within parts that are compressed.
    is_known = pages > 0 and b"/ObjStm" not in raw
    most = pages if is_known else max(pages, min(PAGES, len(raw) // _PAGE_BYTES + 1))
    at_most = max(min(most * PAGE_MOST, len(text)), PAGE_MOST)
    return Media(min(max(pages, 1) * PAGE_TOKENS, at_most), at_most)


def _places(raw: bytes, word: bytes) -> Iterator[int]:
    at = raw.find(word)
    while at >= 0:
        yield at
        at = raw.find(word, at + 1)


def _decoded(text: str) -> bytes:
    """What base64 says as far as it is some; empty if it is none."""
    try:
        return base64.b64decode(text[: len(text) // 4 * 4])
    except (binascii.Error, ValueError):
        return b""


def _size(head: bytes) -> tuple[int, int] | None:
    """Width and height that a PNG, GIF, WebP or JPEG says it has."""
    try:
        if head.startswith(b"\x89PNG\r\n\x1a\n"):
            return struct.unpack(">II", head[16:24]) if head[12:16] == b"IHDR" else None
        if head.startswith((b"GIF87a", b"GIF89a")):
            return _gif_size(head)
        if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
            return _webp_size(head)
        return _jpeg_size(head) if head.startswith(b"\xff\xd8") else None
    except (struct.error, IndexError):
        return None


def _gif_size(head: bytes) -> tuple[int, int] | None:
    """Of its first picture, which may be larger than the screen that it is for."""
    width, height, flags = struct.unpack("<HHB", head[6:11])
    at = 13 + _table_bytes(flags)
    while at < len(head):
        if head[at] == 0x2C:
            left, top, across, down = struct.unpack("<HHHH", head[at + 1 : at + 9])
            return max(width, left + across), max(height, top + down)
        if head[at] != 0x21:
            return None
        # A note: pieces of up to 255 bytes, and an empty one.
        at += 2
        while head[at]:
            at += 1 + head[at]
        at += 1
    return None


def _table_bytes(flags: int) -> int:
    """Of a table of colours."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _webp_size(head: bytes) -> tuple[int, int] | None:
    kind = head[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", head[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return None


def _jpeg_size(head: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 9 <= len(head):
        if head[at] != 0xFF:
            return None
        mark = head[at + 1]
        if mark == 0xFF:
            # Filling.
            at += 1
        elif mark in (0x01, 0xD8) or 0xD0 <= mark <= 0xD7:
            # Marks with nothing behind them.
            at += 2
        elif mark in (0x00, 0xD9, 0xDA):
            # No mark, or the picture itself, without a size.
            return None
        elif 0xC0 <= mark <= 0xCF and mark not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", head[at + 5 : at + 9])
            return width, height
        else:
            size = struct.unpack(">H", head[at + 2 : at + 4])[0]
            if size < 2:
                return None
            at += 2 + size
    return None
