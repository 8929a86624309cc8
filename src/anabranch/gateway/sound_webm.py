"""Seconds of sound in WebM (RFC 8794, RFC 9559), by its blocks; see `sound_containers`."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from anabranch.gateway.sound_aac import config_rate, flac_within
from anabranch.gateway.sound_frames import FlacFrames
from anabranch.gateway.sound_packets import (
    AAC_BLOCK,
    AAC_FEWEST,
    AAC_RATES,
    ELEMENT,
    FIRST_MS,
    FLAC_LEAST,
    PACKET_MS,
    STREAM,
    Contained,
    NoContainerError,
    Pieces,
    opus_ms,
)

_SEGMENT, _INFO, _SCALE, _DURATION = 0x18538067, 0x1549A966, 0x2AD7B1, 0x4489
_TRACKS, _TRACK, _NUMBER, _CODEC, _PRIVATE, _CODING = 0x1654AE6B, 0xAE, 0xD7, 0x86, 0x63A2, 0x6D80
_CLUSTER, _TIME, _SIMPLE, _GROUP, _BLOCK = 0x1F43B675, 0xE7, 0xA3, 0xA0, 0xA1
_WITHIN = (_SEGMENT, _INFO, _TRACKS, _TRACK, _CLUSTER, _GROUP)
_CLUSTER_MARK = _CLUSTER.to_bytes(4, "big")

_BLOCKS = (_SIMPLE, _BLOCK)
_SAID = frozenset({_SCALE, _DURATION, _NUMBER, _CODEC, _PRIVATE, _TIME})

# Bytes of an element that may say something; decoders take a much longer one for damage.
_SAYING = 64

# A block says its track, its time and how it is made of frames.
_BLOCK_HEAD = 4

# No integer has more bytes (RFC 8794, 7.1 and 7.2).
_INTEGER = 8

# Seconds that a frame lasts at most, and each of its bytes, by the codec: what has one packet in a frame, or is never sparse; MPEG's audio
# has 1,000 bytes a second or more, and so has speech of any other.
_LASTS = {b"MPE": (0.15, 1e-3), b"PCM": (1e-3, 0.0), b"VOR": (0.512, 0.0), b"ALA": (0.512, 0.0), b"OPU": (0.12, 0.0)}
_OTHER = (0.512, 1e-3)

# How codecs of pictures, words and buttons begin.
_SILENT = (b"V_", b"S_", b"B_")


def webm(data: bytes, walked: Pieces) -> Contained | None:
    """Of all its tracks that are no pictures: of those that it does not tell of, too. Raises ManyPiecesError."""
    found, walk = _Found(walked), _Walk(data, walked)
    for id, begin, end in walk:
        try:
            found.take(data, id, begin, end)
        except (IndexError, NoContainerError, struct.error):
            # Decoders pass over it, or look for the next cluster.
            walk.rest += end - begin
    found.entries.append(found.entry)
    return found.result(data, walk.rest)


@dataclass(slots=True)
class _Entry:
    """One entry of the list of tracks, whatever order it tells of itself in.

    Attributes:
        numbers: of the track.
        is_opus, is_silent, is_other: what it says that it is: Opus, no sound, or another codec.
        codecs, configs: of the latter, three letters of each, and what each has for its decoder.
    """

    numbers: list[int] = field(default_factory=list)
    is_opus: bool = False
    is_silent: bool = False
    is_other: bool = False
    codecs: list[bytes] = field(default_factory=list)
    configs: list[bytes] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Opus or another codec, as it says."""
        return self.is_opus or self.is_other

    @property
    def rate(self) -> int:
        """Samples a second of its AAC; 0 where a config does not say it."""
        return min(map(config_rate, self.configs), default=0)

    def lasts(self, codec: bytes, flac_s: float) -> tuple[float, float]:
        """Seconds of a frame, and of a byte, at most, if it is of this codec; ``flac_s``: of a frame of FLAC."""
        if codec == b"AAC":
            # Without a config that says its rate it may be the lowest.
            return AAC_BLOCK / (self.rate or AAC_RATES[-1]), 1 / AAC_FEWEST
        if codec == b"FLA":
            return flac_s, flac_s / FLAC_LEAST
        return _LASTS.get(codec, _OTHER)


@dataclass(slots=True)
class _Blocks:
    """The blocks of one track: milliseconds as Opus, frames, and bytes of those."""

    ms: float = 0.0
    frames: int = 0
    num_bytes: int = 0
    num: int = 0


@dataclass(slots=True)
class _Found:
    """What the elements say.

    Attributes:
        walked: what is read of the request's clips.
        scale: nanoseconds of a unit of time.
        told, time_at, last: the length that is told, when the cluster begins, and the last block, in units.
        entry, entries: of the list of tracks, the one that is read, and those before.
        blocks: of each track.
        is_coded: packets do not stand there as they are.
    """

    walked: Pieces
    scale: int = 1_000_000
    told: float = 0.0
    time_at: int = 0
    last: int = 0
    entry: _Entry = field(default_factory=_Entry)
    entries: list[_Entry] = field(default_factory=list)
    blocks: dict[int, _Blocks] = field(default_factory=dict)
    is_coded: bool = False

    def take(self, data: bytes, id: int, begin: int, end: int) -> None:
        if id in _BLOCKS:
            self._block(data, begin, end)
        elif id == _TRACK:
            # Of one that says nothing nothing is kept.
            if self.entry.numbers or _says(self.entry):
                self.walked.add(STREAM)
                self.entries.append(self.entry)
                self.entry = _Entry()
        elif id == _NUMBER:
            self.entry.numbers.append(_integer(data, begin, end))
        elif id == _CODEC:
            codec = data[begin : min(end, begin + _INTEGER)]
            self.entry.is_opus |= codec.startswith(b"A_OPUS")
            self.entry.is_silent |= codec.startswith(_SILENT)
            if not codec.startswith((b"A_OPUS", *_SILENT)):
                self.entry.is_other = True
                self.entry.codecs.append(codec[2:5])
        elif id == _PRIVATE:
            self.entry.configs.append(data[begin : min(end, begin + _INTEGER)])
        elif id == _CODING:
            self.is_coded = True
        elif id == _SCALE:
            self.scale = _integer(data, begin, end)
        elif id == _DURATION:
            self.told = _float(data[begin : min(end, begin + _INTEGER + 1)])
        elif id == _TIME:
            self.time_at = _integer(data, begin, end)

    def _block(self, data: bytes, begin: int, end: int) -> None:
        if end - begin < _BLOCK_HEAD:
            raise NoContainerError(f"a block of {end - begin} bytes; its head has {_BLOCK_HEAD}")
        first = data[begin]
        track, head = (first & 0x7F, begin + 1) if first & 0x80 else _tracked(data, begin)
        self.last = max(self.last, self.time_at + struct.unpack_from(">h", data, head)[0])
        # Of several in one block it is not looked at where each begins.
        frames = data[head + 3] + 1 if data[head + 2] & 6 else 0
        if frames:
            ms = PACKET_MS * frames
        else:
            ms = (head + 3 < end and FIRST_MS[data[head + 3]]) or opus_ms(data[head + 3 : min(head + 5, end)])
        if (blocks := self.blocks.get(track)) is None:
            self.walked.add(STREAM)
            blocks = self.blocks[track] = _Blocks()
        blocks.ms += ms
        blocks.frames += frames or 1
        blocks.num_bytes += max(0, end - head - 3)
        blocks.num += 1

    def result(self, data: bytes, rest: int) -> Contained:
        """In all; ``rest`` are the bytes of ``data`` that were walked past."""
        silent, sounds = set[int](), set[int]()
        for entry in self.entries:
            (sounds if entry.is_sound else silent).update(entry.numbers if _says(entry) else ())
        heard = {track: blocks for track, blocks in self.blocks.items() if track in sounds or track not in silent}
        # Of a track that it does not tell of nobody knows what it is.
        unknown = sum(one.num_bytes + _BLOCK_HEAD * one.num for track, one in heard.items() if track not in sounds)
        ms = sum(PACKET_MS * one.frames if self.is_coded else one.ms for one in heard.values())
        if any(entry.is_opus for entry in self.entries) and not any(entry.is_other for entry in self.entries):
            return Contained(ms / 1e3, True, rest + unknown)
        has_flac = any(b"FLA" in entry.codecs for entry in self.entries)
        flac = flac_within(data, self.walked) if has_flac else FlacFrames(0, 0.0, 0.0)
        told = max(self.told, self.last) * self.scale / 1e9
        if (counted := self._counted(heard, flac)) is not None:
            return Contained(counted[0], True, rest + unknown, max(*counted, told))
        lasts = [entry.lasts(codec, flac.longest_s) for entry in self.entries for codec in entry.codecs] or [_OTHER]
        frame_s, byte_s = (max(one[place] for one in lasts) for place in range(2))
        longest = sum(max(frame_s * one.frames, byte_s * one.num_bytes) for one in heard.values())
        return Contained(told, False, rest, max(ms / 1e3, longest))

    def _counted(self, heard: dict[int, _Blocks], flac: FlacFrames) -> tuple[float, float] | None:
        """Seconds, and seconds at most, of a file of nothing but FLAC and AAC of a rate that is told; None of others."""
        tracks = [entry for entry in self.entries if entry.is_sound]
        is_known = not self.is_coded and all(
            len(entry.codecs) == 1
            and not entry.is_opus
            and (entry.codecs[0] == b"FLA" or (entry.codecs[0] == b"AAC" and entry.rate > 0))
            for entry in tracks
        )
        if not is_known or not any(entry.numbers for entry in tracks):
            return None
        rates: dict[int, int] = {}
        for entry in tracks:
            for number in entry.numbers if entry.codecs[0] == b"AAC" else ():
                rates[number] = min(rates.get(number, entry.rate), entry.rate)
        aac = [(AAC_BLOCK / rates[track] * one.frames, one.num_bytes) for track, one in heard.items() if track in rates]
        seconds = flac.seconds + sum(lasts_s for lasts_s, _ in aac)
        if not seconds:
            return None
        # The frames of FLAC are all of those that there are, whatever block they stand in: each block is played once.
        return seconds, flac.seconds + sum(max(lasts_s, num_bytes / AAC_FEWEST) for lasts_s, num_bytes in aac)


def _tracked(data: bytes, at: int) -> tuple[int, int]:
    """The number of a track in more than one byte, and where it ends."""
    track, size = _number(data, at)
    return track, at + size


def _says(entry: _Entry) -> bool:
    return entry.is_opus or entry.is_other or entry.is_silent


class _Walk:
    """Each element's number, and where its content begins and ends; those with elements in them come first, and are gone into.

    Where one says that it is longer than what it is in, decoders look for the next cluster, and so is it done here.

    Attributes:
        rest: bytes that were walked past, up to here.
    """

    def __init__(self, data: bytes, walked: Pieces) -> None:
        self._data, self._walked, self.rest = data, walked, 0

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        data, walked, at = self._data, self._walked, 0
        # Where what it is in ends, from the outermost on.
        ends = [len(data)]
        while at < len(data):
            walked.add(ELEMENT)
            while at >= ends[-1] and len(ends) > 1:
                ends.pop()
            try:
                id, width = _number(data, at, keeps_mark=True)
                size, more = _number(data, at + width)
            except IndexError:
                at, ends = self._lost(at), [len(data)]
                continue
            begin = at + width + more
            is_endless = size == (1 << 7 * more) - 1
            end = begin + size
            if id in _WITHIN:
                if not is_endless and end <= ends[-1]:
                    ends.append(end)
                yield id, begin, begin
                at = begin
                continue
            if is_endless or end > ends[-1]:
                if id == _CODING or (end <= len(data) and not is_endless):
                    yield id, begin, end
                at, ends = self._lost(at), [len(data)]
                continue
            yield id, begin, end
            if id not in _BLOCKS and data.find(_CLUSTER_MARK, at + 1, end) >= 0:
                # Of one that they do not know decoders pass over no more than they have to.
                at, ends = self._lost(at), [len(data)]
                continue
            if id not in _BLOCKS and (id not in _SAID or end - at > _SAYING):
                self.rest += end - at
            at = end

    def _lost(self, at: int) -> int:
        """Where decoders go on: at the next cluster, or nowhere."""
        again = self._data.find(_CLUSTER_MARK, at + 1)
        again = len(self._data) if again < 0 else again
        self.rest += again - at
        return again


def _number(data: bytes, at: int, keeps_mark: bool = False) -> tuple[int, int]:
    """A number of which the first bits say how long it is, and its length. Raises IndexError at the end."""
    first = data[at]
    width = 9 - first.bit_length()
    if width > _INTEGER or at + width > len(data):
        raise IndexError
    value = int.from_bytes(data[at : at + width], "big")
    return value if keeps_mark else value & (1 << 7 * width) - 1, width


def _integer(data: bytes, begin: int, end: int) -> int:
    if end - begin > _INTEGER:
        raise NoContainerError(f"an integer of {end - begin:,} bytes; they have at most {_INTEGER}")
    return int.from_bytes(data[begin:end], "big")


def _float(raw: bytes) -> float:
    made = struct.unpack(">f" if len(raw) == 4 else ">d", raw)[0] if len(raw) in (4, 8) else 0.0
    return made if 0 < made < 1e18 else 0.0
