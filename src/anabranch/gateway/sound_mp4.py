"""Seconds of sound in M4A (ISO/IEC 14496-12, -14; fragments too), by its samples; see `sound_containers`."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from anabranch.gateway.sound_aac import aac_rate, alac_frame_s, flac_within
from anabranch.gateway.sound_frames import FlacFrames
from anabranch.gateway.sound_packets import (
    AAC_BLOCK,
    AAC_FEWEST,
    ELEMENT,
    FLAC_LEAST,
    STREAM,
    Contained,
    Pieces,
)
from anabranch.gateway.sound_places import SamplePlaces

# Boxes with boxes in them, and how deep they are walked through.
_BOXES = (
    b"moov",
    b"trak",
    b"mdia",
    b"minf",
    b"stbl",
    b"moof",
    b"traf",
    b"edts",
    b"udta",
    b"dinf",
    b"mvex",
    b"gmhd",
    b"tref",
)
_DEEPEST = 8

# What says how many samples there are, and of what rate.
_TABLES = (b"stsz", b"stz2", b"trun", b"esds")

# A head that is packed: decoders that unpack it find tables of which nothing is seen here.
_PACKED = b"cmov"

# Kinds of tracks that make no sound.
_SILENT = (b"vide", b"auxv", b"pict", b"text", b"sbtl", b"subt", b"clcp", b"tmcd", b"hint", b"meta")

# Codecs of which no sample is longer than one block: of one value each, as it is; and the longest block of ALAC, with that of Opus.
_PLAIN = (
    b"sowt",
    b"twos",
    b"lpcm",
    b"ipcm",
    b"fpcm",
    b"in24",
    b"in32",
    b"fl32",
    b"fl64",
    b"raw ",
    b"NONE",
    b"ulaw",
    b"alaw",
)
_PLAIN_S = 1 / 8_000
_WHOLE = (b"alac", b"Opus")

# Seconds at most of a sample of any other, and of each of its bytes, of which speech has no fewer.
_OTHER = (0.512, 1e-3)

# Units of time that are negative, for those who read them so.
_NEGATIVE = 1 << 31

# Samples that a decoder may take at both ends of a piece, to get into it.
_AROUND = 2


@dataclass(slots=True)
class _Track:
    """Of one track.

    Attributes:
        scale: units of a second of its clock.
        length, told: how long it says it is, by that: in its head, and in its table of times.
        each: the shortest that a sample lasts by that table; 0 where they may be at any time.
        listed: samples that have a size of their own.
        alike: of those that are all alike, how many are claimed, and their size.
        chunks: places that samples lie at, one behind the other; places may be the same.
        edits: how long the pieces are that it is played as, by the clock of the film, and whether there is sound in them.
        codecs: that its samples may be of.
        rate: of its AAC, the lowest that is told; 0 for another codec.
        alac_s: seconds of the longest frame of its ALAC; 0 for another codec.
        is_sound, is_silent: it says that it is sound; that it is pictures or words.
        rates: configs that were read.
        places: where its samples lie.
    """

    scale: int = 0
    length: int = 0
    told: int = 0
    each: int | None = None
    listed: "_Samples" = field(default_factory=lambda: _Samples())
    alike: list[tuple[int, int]] = field(default_factory=list)
    chunks: int = 0
    edits: list[tuple[int, bool]] = field(default_factory=list)
    codecs: set[bytes] = field(default_factory=set)
    rate: int = 0
    alac_s: float = 0.0
    is_sound: bool = False
    is_silent: bool = False
    rates: int = 0
    places: SamplePlaces = field(default_factory=SamplePlaces)

    def samples(self, most: int) -> "_Samples":
        """Those that it has at most, in a file of ``most`` bytes."""
        found = [self.listed]
        for count, size in self.alike:
            # One chunk lies within the file, its samples side by side.
            num = min(count, max(1, self.chunks) * -(-most // size))
            found.append(_Samples(num, num * min(size, most), min(size, most)))
        return _most(found)

    def played(self, samples: "_Samples", film: int, is_whole: bool) -> "_Samples":
        """How many of these samples are played at most: each edit may play all of them again.

        Args:
            samples: that it has.
            film: units of a second of the film's clock; 0 if it does not say.
            is_whole: nobody knows when its samples are.
        """
        count = num_bytes = 0
        for length, has_sound in self.edits:
            fits = samples.num
            if film and self.each and length and not is_whole:
                fits = min(fits, length * max(self.scale, 1) // (film * self.each) + _AROUND)
            count += fits if has_sound else 0
            num_bytes += min(samples.num_bytes, fits * samples.longest) if has_sound else 0
        return _Samples(max(samples.num, count), max(samples.num_bytes, num_bytes), samples.longest)

    def seconds(self, samples: "_Samples", film: int, flac: FlacFrames, is_apart: bool) -> tuple[float, float, float]:
        """What it says, what was counted (0 for what cannot be), and what it is believed to last at most.

        Args:
            samples: that are played.
            film: as in `played`.
            flac: what the file has of it.
            is_apart: no table puts samples at places that were not looked at.
        """
        told = max(self.length, self.told) / max(self.scale, 1)
        silence = sum(length for length, has_sound in self.edits if not has_sound) / film if film else 0.0
        in_edits = sum(min(told, length / film) if film and length else told for length, sound in self.edits if sound)
        counted = samples.num * AAC_BLOCK / self.rate if self.rate else 0.0
        is_alac = self.codecs == {b"alac"} and self.rates == 1 and self.alac_s > 0
        if is_alac:
            counted = samples.num * self.alac_s
        is_flac = self.codecs == {b"fLaC"} and self.rates == 1 and is_apart and self.places.lie_apart()
        if is_flac:
            # Each frame of the file is played once for each edit.
            counted = flac.seconds * max(1, sum(has_sound for _, has_sound in self.edits))
        told = max(told, in_edits, counted) + silence
        if is_flac or is_alac:
            return told, counted, told
        sample_s, byte_s = self._lasts(flac.longest_s)
        return told, counted, max(told, max(samples.num * sample_s, samples.num_bytes * byte_s) + silence)

    def _lasts(self, flac_s: float) -> tuple[float, float]:
        """Seconds of a sample, and of each of its bytes, at most, of the codec that lasts longest."""
        if self.rate:
            return AAC_BLOCK / self.rate, 1 / AAC_FEWEST
        lasts = [*(_lasts(codec, flac_s) for codec in self.codecs), (self.alac_s, 0.0)] if self.codecs else [_OTHER]
        return max(one[0] for one in lasts), max(one[1] for one in lasts)


class _Samples(NamedTuple):
    """How many samples, their bytes together, and those of the longest."""

    num: int = 0
    num_bytes: int = 0
    longest: int = 0


def _most(found: Sequence[_Samples]) -> _Samples:
    return _Samples(*(max(one[place] for one in found) for place in range(3)))


def _sized(sizes_N: np.ndarray, most: int) -> _Samples:
    """Of samples of these sizes in a file of ``most`` bytes."""
    sizes_N = np.minimum(sizes_N.astype(np.int64), most)
    return _Samples(len(sizes_N), int(sizes_N.sum()), int(sizes_N.max(initial=0)))


def _lasts(codec: bytes, flac_s: float) -> tuple[float, float]:
    if codec in _PLAIN:
        return _PLAIN_S, 0.0
    if codec == b"fLaC":
        return flac_s, flac_s / FLAC_LEAST
    return (0.512, 0.0) if codec in _WHOLE else _OTHER


def mp4(data: bytes, walked: Pieces) -> Contained | None:
    """Of all its tracks of sound, and of those that do not say that they are none. Raises ManyPiecesError."""
    tracks: list[_Track] = []
    fragments, film, seen, is_cut = _Samples(), 0, 0, False
    for name, begin, end, is_longer in _boxes(data, walked):
        # Decoders do not agree on what is in a box that is longer than what it is in.
        is_cut |= is_longer and name != b"mdat"
        if name == b"trak":
            walked.add(STREAM)
            tracks.append(_Track())
        elif name == b"trun":
            # All sound, as a rule, in a file of sound.
            run = _run(data[begin:end], len(data))
            fragments = _Samples(
                fragments.num + run.num, fragments.num_bytes + run.num_bytes, max(fragments.longest, run.longest)
            )
            seen += 1
        elif name == b"mvhd":
            film = max(film, _film(data[begin:end]))
        elif tracks and name in _LEARNT:
            try:
                seen += _learn(tracks[-1], name, data[begin:end], len(data))
            except (IndexError, struct.error):
                # It ends too early: what others read of it nobody knows.
                is_cut = True
    sounds = [track for track in tracks if track.is_sound or not track.is_silent]
    if not sounds:
        return None
    is_whole = fragments.num > 0 or b"ctts" in data
    has_flac = any(b"fLaC" in track.codecs for track in sounds)
    flac = flac_within(data, walked) if has_flac else FlacFrames(0, 0.0, 0.0)
    is_apart = not fragments.num and all(
        sum(map(data.count, names)) == len(tracks) for names in ((b"stsc",), (b"stco", b"co64"))
    )
    found = []
    for track in sounds:
        own = track.samples(len(data))
        samples = _Samples(
            own.num + fragments.num,
            own.num_bytes + fragments.num_bytes,
            max(own.longest, fragments.longest),
        )
        found.append(track.seconds(track.played(samples, film, is_whole), film, flac, is_apart))
    told, counted, longest = zip(*found, strict=True)
    # Where a table stands that was not walked to, another may find it; of a track that does not say what it is, others find that.
    hidden = is_cut or _PACKED in data or sum(data.count(name) for name in _TABLES) > seen
    hidden |= not all(track.is_sound and track.scale for track in sounds)
    return Contained(sum(told), not hidden and all(counted), at_most=sum(longest))


def _run(body: bytes, most: int) -> _Samples:
    """Of a run of samples (``trun``), in a file of ``most`` bytes: they lie side by side, each with a byte at least."""
    flags, count = int.from_bytes(body[1:4], "big"), min(int.from_bytes(body[4:8], "big"), most)
    # Each of the fields of a sample that are there has four bytes; its size comes behind its length.
    fields, head = (flags >> 8 & 15).bit_count(), 8 + 4 * (flags & 1) + (flags & 4)
    if flags & 0x200 and len(body) >= head + 4 * fields * count:
        table = np.frombuffer(body, ">u4", fields * count, head).reshape(count, fields)
        return _sized(table[:, flags >> 8 & 1], most)
    return _Samples(count, most, most)


def _film(body: bytes) -> int:
    """Units of a second of the clock of all tracks, by the head of the film; 0 if it does not say."""
    at = 20 if body[:1] == b"\x01" else 12
    return int.from_bytes(body[at : at + 4], "big")


def _boxes(data: bytes, walked: Pieces) -> Iterator[tuple[bytes, int, int, bool]]:
    """Each box's name, where its content begins and ends, and whether it says that it is longer; its own boxes behind it."""
    at = 0
    ends = [len(data)]
    while ends:
        end = ends[-1]
        if at + 8 > end:
            ends.pop()
            at = end
            continue
        walked.add(ELEMENT)
        size, name, head = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        stop = end if size == 0 else min(at + size, end)
        if stop < at + head:
            ends.pop()
            at = end
            continue
        yield name, at + head, stop, at + size > end
        if name in _BOXES and len(ends) <= _DEEPEST:
            ends.append(stop)
            at += head
        else:
            at = stop


_LEARNT = frozenset({b"hdlr", b"mdhd", b"stts", b"stsz", b"stz2", b"stsd", b"stsc", b"stco", b"co64", b"elst"})


def _learn(track: _Track, name: bytes, body: bytes, most: int) -> int:
    """What a box says of a track, in a file of ``most`` bytes. Gives how many tables of samples or configs were read."""
    if name == b"hdlr":
        track.is_sound |= body[8:12] == b"soun"
        track.is_silent |= body[8:12] in _SILENT
    elif name == b"mdhd":
        is_long = body[0] == 1
        track.scale, track.length = struct.unpack_from(">IQ" if is_long else ">II", body, 20 if is_long else 12)
        if track.length == (1 << 64 if is_long else 1 << 32) - 1:
            # It does not say.
            track.length = 0
    elif name == b"stts":
        times = list(struct.iter_unpack(">II", body[8 : 8 + 8 * _rows(body, 8)]))
        track.told = max(track.told, sum(num * each for num, each in times))
        least = min((each if each < _NEGATIVE else 0 for num, each in times if num), default=0)
        track.each = least if track.each is None else min(track.each, least)
    elif name in (b"stco", b"co64"):
        size = 4 if name == b"stco" else 8
        track.chunks += _rows(body, size)
        track.places.chunks.append(_numbers(body, size, 1)[:, 0])
    elif name == b"stsc":
        track.places.runs.append(_numbers(body, 4, 3))
    elif name == b"elst":
        row = ">Qq4x" if body[0] == 1 else ">Ii4x"
        size = struct.calcsize(row)
        edits = struct.iter_unpack(row, body[8 : 8 + size * _rows(body, size)])
        # A gap stands before all else; elsewhere some play the track there.
        track.edits += [(length, at >= 0 or place > 0) for place, (length, at) in enumerate(edits)]
    elif name == b"stsz":
        size, count = struct.unpack_from(">II", body, 4)
        if size:
            track.alike.append((count, size))
            track.places.is_odd |= count * size > most or size < FLAC_LEAST
            track.places.sizes.append(np.broadcast_to(np.int64(size), 0 if track.places.is_odd else count))
        else:
            # There are no more than have a size.
            sizes_N = np.frombuffer(body, ">u4", min(count, (len(body) - 12) // 4), 12)
            track.listed = _most([track.listed, _sized(sizes_N, most)])
            track.places.sizes.append(sizes_N)
        return 1
    elif name == b"stz2":
        track.places.is_odd = True
        bits, count = struct.unpack_from(">BI", body, 7)
        num = min(count, (len(body) - 12) * 8 // bits if bits else 0)
        if bits in (8, 16):
            sized = _sized(np.frombuffer(body, f">u{bits // 8}", num, 12), most)
        else:
            # As long as each may say that it is.
            longest = min((1 << min(bits, 32)) - 1, most)
            sized = _Samples(num, num * longest, longest)
        track.listed = _most([track.listed, sized])
        return 1
    else:
        rate, found = aac_rate(body)
        is_first = not track.rates
        # Behind the first another may stand, which is not read.
        track.rates += 1 if int.from_bytes(body[4:8], "big") == 1 else 2
        # One that is no AAC, or of another rate, may be the one that is played.
        track.rate = rate if is_first else min(track.rate, rate)
        track.alac_s = max(track.alac_s, alac_frame_s(body))
        track.codecs.add(body[12:16])
        return found
    return 0


def _rows(body: bytes, size: int) -> int:
    """Of a table, those that it says it has and that are there."""
    return min(int.from_bytes(body[4:8], "big"), (len(body) - 8) // size)


def _numbers(body: bytes, size: int, width: int) -> np.ndarray:
    """Of a table of rows of ``width`` numbers of ``size`` bytes."""
    rows = max(_rows(body, size * width), 0)
    return np.frombuffer(body[8 : 8 + rows * size * width], f">u{size}", rows * width).reshape(rows, width)
