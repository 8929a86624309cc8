"""Seconds of sound within a container: Ogg, WebM (Matroska), M4A (ISO base media, fragments too).

As with frames (`sound_frames`), what a decoder would play is counted, not what a field says of the length: packets of Opus, each of
which says how long it is, and samples of AAC, of 1,024 at the rate of its own config. Of other codecs the length is read where the
container tells it, and that is believed as an estimate alone.

Decoders do not agree on damaged files: some stop, some look on for the next part that is whole. So whatever is walked past is told too
(`Contained.rest`), and what may hide a table that another finds is not counted at all.
"""

import struct
from dataclasses import replace

from anabranch.gateway.sound_mp4 import mp4
from anabranch.gateway.sound_ogg import ogg
from anabranch.gateway.sound_packets import LONGEST_S, Contained, Pieces
from anabranch.gateway.sound_webm import webm


def is_container(head: bytes) -> bool:
    """Whether a clip begins as one."""
    return head.startswith((b"OggS", b"\x1aE\xdf\xa3")) or head[4:8] in (b"ftyp", b"styp", b"moov")


def contained(data: bytes, walked: Pieces) -> Contained | None:
    """Of a whole clip; None for what is no such container, or tells nothing. Takes time in proportion to the clip.

    Raises ManyPiecesError.
    """
    try:
        if data.startswith(b"OggS"):
            found = ogg(data, walked)
        elif data.startswith(b"\x1aE\xdf\xa3"):
            found = webm(data, walked)
        else:
            # Whatever stands before it: a box of any name is passed over.
            found = mp4(data, walked) if is_container(data[:8]) or b"moov" in data else None
    except (IndexError, ValueError, OverflowError, struct.error):
        # It ends in the middle of something that says how long it is, or is not made as such containers are.
        return None
    if found is None or not max(found.seconds, found.at_most) > 0:
        return None
    return replace(found, seconds=min(found.seconds, LONGEST_S), at_most=min(found.at_most, LONGEST_S))
