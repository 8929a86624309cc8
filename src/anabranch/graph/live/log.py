"""A log of changes: frames with checksums in one file, written before a change is made and read back after a crash.

    magic     8 bytes, b"ANABLOG1"
    length    uint32, bytes of the header
    header    JSON: ``dim``, ``base`` (which index it changes), ``segment`` (its number), ``first`` (number of its first frame), ``salt``,
              ``row`` where vectors are no float32;
              spaces behind it, so that frames begin at a multiple of 512 bytes
    crc       uint32, CRC-32 of length and header
    frames    one after the other

A frame is what one write to the disk brings: the changes of one or more requests.

    head      mark (4 bytes), length of the payload (uint32), number (uint64, one more than that of the frame before), their CRC-32
    payload   changes (`anabranch.graph.live.changes`), all of it xor the salt, again and again
    crc       uint32, CRC-32 of the payload as it is in the file
    padding   0 to 15 bytes b"\xa7": a frame has at least 16 bytes in each piece of the disk (512 bytes) where it has any

Checksums begin with the header's salt, so that no client can send numbers that look like a frame.

When a process or the power ends in the middle of a write, the last frame is torn: it ends before its length says, or has pieces of the
disk that were never written, which are zeros. Such a tail is cut off: nobody was told that it was there. Whatever else is wrong, a byte
that changed in a frame or one that is missing in between, is damage, and an error that says where. So that the two are never taken for
each other, no piece of a frame that was written is zeros, whatever vectors hold: that is what salt and padding are for. What cannot be
told from a torn tail is a disk that later gives zeros for a whole piece of the last frame, or a file that something cut short.
"""
# Shapes: N ids, D dimension

import json
import os
import secrets
import struct
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from anabranch.errors import CapacityError, DataError, InputError
from anabranch.files import atomic_file, explained, is_full, parse_json
from anabranch.graph.live.changes import BYTES, FLOATS, Change, decode, payload_bytes

MAGIC = b"ANABLOG1"
MARK = b"\xa7anb"
HEAD = struct.Struct("<4sIQ")
CRC = struct.Struct("<I")
HEAD_BYTES = HEAD.size + CRC.size
# What a disk writes whole or not at all.
SECTOR = 512
# Fewer bytes may be zeros by chance, or after one of them changed.
LEAST_PIECE = 16
PAD = b"\xa7"
MOST_HEADER = 1 << 16
# Frames are read into memory whole. Nothing larger is written.
MOST_PAYLOAD = 1 << 31


@dataclass(frozen=True)
class Header:
    """What a log says about itself.

    Attributes:
        dim: numbers of a vector.
        base: fingerprint of the index file that its changes began with.
        segment: its number among the logs of an index, from 1.
        first: number of its first frame.
        salt: of its checksums, hexadecimal.
        row: type of these numbers, "f4", or "u1" for packed bits.
    """

    dim: int
    base: str
    segment: int
    first: int
    salt: str
    row: str = FLOATS

    def seed(self) -> int:
        """What checksums begin with."""
        return zlib.crc32(bytes.fromhex(self.salt))

    def masked(self, payload: bytes) -> bytes:
        """A payload as it is in the file, or one that is there as it was."""
        mask = np.frombuffer(bytes.fromhex(self.salt), np.uint8)
        # Long rows for long payloads.
        mask = np.tile(mask, max(1, min(256, -(-len(payload) // len(mask)))))
        content = np.zeros((-(-len(payload) // len(mask)), len(mask)), np.uint8)
        content.reshape(-1)[: len(payload)] = np.frombuffer(payload, np.uint8)
        content ^= mask
        return content.reshape(-1)[: len(payload)].tobytes()


@dataclass(frozen=True)
class Frame:
    """A frame that was read. ``end`` is the place behind it in the file."""

    number: int
    changes: list[Change]
    end: int


@dataclass(frozen=True)
class Read:
    """What a log holds. ``size`` is where its last whole frame ends, ``torn`` how many bytes lie behind that."""

    header: Header
    frames: list[Frame]
    size: int
    torn: int


def check_size(change: Change) -> None:
    """Raise InputError for a change that no frame can hold."""
    size = payload_bytes(change)
    if size > MOST_PAYLOAD:
        raise InputError(
            f"the change of {len(change.ids):,} elements has {size:,} bytes, and one may have {MOST_PAYLOAD:,}; send fewer at once"
        )


def padding(end: int) -> int:
    """How many bytes come behind a frame whose checksum ends there."""
    beyond = end % SECTOR
    if 0 < beyond < LEAST_PIECE:
        return LEAST_PIECE - beyond
    return SECTOR - beyond if beyond > SECTOR - LEAST_PIECE else 0


class Log:
    """A log that is written. One thread writes at a time; `sync` may be called beside it.

    Attributes:
        path: its file.
        header: see `Header`.
        size: bytes.
        number: of the last frame; one less than ``header.first`` where there is none.
        failure: why nothing can be written any more, or None.
    """

    def __init__(self, path: Path, header: Header, size: int, number: int) -> None:
        self.path, self.header, self.size, self.number = path, header, size, number
        self.failure: str | None = None
        self.is_dirty = False
        # Who finds nothing to bring to the disk must know that another has brought it, not only begun to.
        self._syncing = threading.Lock()
        with explained(path):
            self._handle: int | None = os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))

    @classmethod
    def create(cls, path: Path, *, dim: int, base: str, segment: int, first: int, row: str = FLOATS) -> Self:
        """Begin a file, which is there whole or not at all. Raises as `anabranch.files.atomic_file`."""
        header = Header(dim, base, segment, first, secrets.token_hex(16), row)
        # As earlier releases wrote it, and read it, where they could have.
        said = {name: value for name, value in header.__dict__.items() if name != "row" or value != FLOATS}
        text = json.dumps(said).encode()
        text += b" " * (-(len(MAGIC) + 2 * CRC.size + len(text)) % SECTOR)
        start = CRC.pack(len(text)) + text
        with atomic_file(path, mode=0o600) as temporary:
            temporary.write_bytes(MAGIC + start + CRC.pack(zlib.crc32(start)))
        return cls(path, header, len(MAGIC) + len(start) + CRC.size, first - 1)

    @classmethod
    def resume(cls, path: Path, found: Read) -> Self:
        """Go on behind what was read; a torn tail is cut off first. Raises DataError or CapacityError where that cannot be done."""
        number = found.frames[-1].number if found.frames else found.header.first - 1
        log = cls(path, found.header, found.size, number)
        if found.torn:
            assert log._handle is not None
            with explained(path):
                os.ftruncate(log._handle, found.size)
                os.fsync(log._handle)
        return log

    def append(self, payload: bytes) -> int:
        """Write a frame; its number. It need not be on the disk yet (`sync`).

        Raises CapacityError or DataError where it cannot be written: then it is not there, or ``failure`` says that nothing can be written.
        One that is larger than what is read again is not written.
        """
        self.check()
        assert self._handle is not None
        if len(payload) > MOST_PAYLOAD:
            raise CapacityError(
                f"a write of {len(payload):,} bytes is too large for {self.path}: at most {MOST_PAYLOAD:,}"
            )
        seed, head, payload = (
            self.header.seed(),
            HEAD.pack(MARK, len(payload), self.number + 1),
            self.header.masked(payload),
        )
        pad = PAD * padding(self.size + HEAD_BYTES + len(payload) + CRC.size)
        frame = b"".join((head, CRC.pack(zlib.crc32(head, seed)), payload, CRC.pack(zlib.crc32(payload, seed)), pad))
        done, left = self.size, memoryview(frame)
        try:
            while left:
                written = os.pwrite(self._handle, left, done)
                done, left = done + written, left[written:]
        except OSError as error:
            self._take_back(error)
            raise _told(self.path, error) from error
        self.size, self.number, self.is_dirty = done, self.number + 1, True
        return self.number

    def _take_back(self, error: OSError) -> None:
        """Cut off what was written of a frame. Where that fails too, a frame behind it would stand behind a torn one."""
        assert self._handle is not None
        try:
            os.ftruncate(self._handle, self.size)
        except OSError:
            self.failure = f"{self.path} could not be written ({error.strerror}) nor cut back"

    def sync(self) -> None:
        """Wait until all that was written is on the disk.

        Raises DataError or CapacityError if it cannot be brought there. What the system then holds of the file is not known, so nothing
        is written any more.
        """
        with self._syncing:
            self.check()
            if not self.is_dirty or self._handle is None:
                return
            self.is_dirty = False
            try:
                getattr(os, "fdatasync", os.fsync)(self._handle)
            except OSError as error:
                self.failure = f"{self.path} could not be brought to the disk ({error.strerror})"
                raise _told(self.path, error) from error

    def is_there(self) -> bool:
        """Whether its name still leads to it: who removes or renames the file, or the folder, would lose what comes."""
        try:
            return self._handle is not None and os.path.samestat(os.fstat(self._handle), os.stat(self.path))
        except OSError:
            return False

    def check(self) -> None:
        """Raise DataError if nothing can be written any more."""
        if self.failure is not None:
            raise DataError(f"no changes are taken any more: {self.failure}; start again once the disk is well")

    def close(self) -> None:
        """Let go of the file; what was written stays."""
        with self._syncing:
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None


def _told(path: Path, error: OSError) -> CapacityError | DataError:
    if is_full(error):
        return CapacityError(f"no room left on disk for {path}")
    return DataError(f"cannot write {path}: {(error.strerror or str(error)).lower()}")


def read_log(path: Path, *, is_last: bool) -> Read:
    """All of a log.

    Args:
        path: the file.
        is_last: whether it is the one that was being written; only its tail may be torn.

    Raises DataError for a file that is missing, foreign or damaged; the message names the place.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    header, place = _read_header(path, content)
    seed, frames, number = header.seed(), [], header.first
    while place < len(content):
        payload = _frame(content, place, number, seed)
        if payload is None:
            if is_last and _is_torn(content, place, number, seed):
                break
            raise DataError(
                f"{path} is damaged at byte {place:,}, in change {number:,}: what it holds is not what was written; bring a copy of "
                f"the folder back, or cut the file there (truncate -s {place}), which loses that change and all behind it"
            )
        end, payload = _end(place, len(payload)), header.masked(payload)
        try:
            frames.append(Frame(number, decode(payload, header.dim, header.row), end))
        except (ValueError, struct.error) as error:
            # Its sum is right: written so by something else.
            raise DataError(f"{path} holds what this release cannot read, at byte {place:,}: {error}") from error
        place, number = end, number + 1
    return Read(header, frames, place, len(content) - place)


def _read_header(path: Path, content: bytes) -> tuple[Header, int]:
    if not content.startswith(MAGIC):
        raise DataError(f"{path} is not a log of changes (it does not start with {MAGIC.decode()})")
    start = len(MAGIC)
    damaged = DataError(f"{path} is damaged: its header is not what was written; bring a copy of the folder back")
    if len(content) < start + 2 * CRC.size:
        raise damaged
    (length,) = CRC.unpack_from(content, start)
    end = start + CRC.size + length
    if length > MOST_HEADER or end + CRC.size > len(content):
        raise damaged
    if zlib.crc32(content[start:end]) != CRC.unpack_from(content, end)[0]:
        raise damaged
    try:
        found: Any = parse_json(content[start + CRC.size : end])
        header = Header(**found)
        header.seed()
        is_known = header.row in (FLOATS, BYTES)
        if not (is_known and header.dim > 0 and header.segment > 0 and header.first > 0 and header.salt):
            raise ValueError(f"{found}")
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} has a header that this release cannot read: {error}") from error
    return header, end + CRC.size


def _head(content: bytes, place: int, seed: int) -> tuple[int, int] | None:
    """Length and number of the frame that begins at a place; None where none does."""
    if place + HEAD_BYTES > len(content):
        return None
    mark, length, number = HEAD.unpack_from(content, place)
    (crc,) = CRC.unpack_from(content, place + HEAD.size)
    if mark != MARK or length > MOST_PAYLOAD or zlib.crc32(content[place : place + HEAD.size], seed) != crc:
        return None
    return length, number


def _end(place: int, length: int) -> int:
    """Where a frame with a payload of this length ends that begins at a place."""
    end = place + HEAD_BYTES + length + CRC.size
    return end + padding(end)


def _frame(content: bytes, place: int, number: int, seed: int) -> bytes | None:
    """The payload of a whole frame of this number at a place, as it is in the file; None where there is none."""
    found = _head(content, place, seed)
    if found is None or found[1] != number:
        return None
    begin = place + HEAD_BYTES
    end, behind = begin + found[0], _end(place, found[0])
    if behind > len(content):
        return None
    payload, pad = content[begin:end], content[end + CRC.size : behind]
    is_whole = zlib.crc32(payload, seed) == CRC.unpack_from(content, end)[0] and pad == PAD * len(pad)
    return payload if is_whole else None


def _is_torn(content: bytes, place: int, number: int, seed: int) -> bool:
    """Whether what begins at a place can be what a broken-off write left: it ends too soon, or misses pieces; and no frame follows."""
    follows = content.find(MARK, place + 1)
    while follows >= 0:
        if _head(content, follows, seed) is not None:
            return False
        follows = content.find(MARK, follows + 1)
    if len(content) - place < HEAD_BYTES:
        return True
    found = _head(content, place, seed)
    if found is not None and found[1] != number:
        return False
    # A head that is not whole lies in a piece that is missing; what else is missing says nothing about it.
    end = place + HEAD_BYTES if found is None else _end(place, found[0])
    return end > len(content) or _has_missing(content, place, end)


def _has_missing(content: bytes, begin: int, end: int) -> bool:
    """Whether one of the pieces of the disk that a part of the file lies in was never written."""
    while begin < end:
        behind = min(begin - begin % SECTOR + SECTOR, len(content))
        if not any(content[begin:behind]):
            return True
        begin = behind
    return False
