"""WAV files: what a header says, and the samples behind it, of whole numbers or floats.

    form = wav_form(path)               # of the header alone
    sound_T = read_wav(path, form)      # float32 from -1 to 1, a mean over channels

A WAV is RIFF: ``RIFF size WAVE``, then parts of ``name size bytes``, of which ``fmt `` comes before ``data``. Recorders of more than 16
bits or two channels write the extensible header, whose format stands behind it. The standard library's ``wave`` reads that from Python 3.12
on, and floats nowhere, so what is read would depend on the interpreter.
"""
# Shapes: T samples, C channels

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from anabranch.errors import DataError

__all__ = ["WavForm", "read_wav", "wav_form"]

# Tags of formats; that of the extensible header, and how the longer one behind it goes on after the two bytes of a tag.
_WHOLE, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_TAIL = bytes.fromhex("0000 0000 1000 8000 00AA 0038 9B71")
_NAMES = {2: "ADPCM", 6: "A-law", 7: "mu-law", 0x11: "ADPCM", 0x31: "GSM", 0x55: "MP3", 0xFF: "AAC", 0x161: "WMA"}
# Below 1,000 samples a second nothing is left of speech, whose resampling would blow little up to very much; telephones take 8,000, and no
# converter takes more than 768,000.
_LOWEST, _HIGHEST = 1_000, 768_000
# A header has a handful of parts.
_MOST_PARTS = 1_000
# Samples of all channels that are turned into numbers at a time.
_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class WavForm:
    """What the header of a file says.

    Attributes:
        channels, rate: samples of a second are ``rate`` of each channel.
        width: bytes of a sample.
        is_float: else whole numbers, of one byte without a sign.
        first: byte at which samples begin.
        length: samples of each channel that the file has.
    """

    channels: int
    rate: int
    width: int
    is_float: bool
    first: int
    length: int


def wav_form(path: Path) -> WavForm:
    """That of a file. Raises DataError for what is no WAV of whole numbers up to 32 bits, or floats, or whose header cannot be."""
    try:
        # Opening a pipe would wait for somebody who writes.
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"cannot read {path} as a WAV: it is no file")
        with path.open("rb") as file:
            return _form(file, path)
    except OSError as error:
        raise DataError(f"cannot read {path} as a WAV: {error.strerror or error}") from None


def read_wav(path: Path, form: WavForm) -> Tensor:
    """float32 ``[T]``, from -1 to 1, a mean over channels. Raises DataError for floats that are no numbers."""
    frame = form.channels * form.width
    at_once = max(1, _AT_ONCE // form.channels)
    made_T, count = torch.empty(form.length), 0
    try:
        with path.open("rb") as file:
            file.seek(form.first)
            while count < form.length:
                held = file.read(min(at_once, form.length - count) * frame)
                sample_TC = _samples(held[: len(held) // frame * frame], form).reshape(-1, form.channels)
                if not len(sample_TC):
                    break
                made_T[count : count + len(sample_TC)] = torch.from_numpy(sample_TC.mean(1))
                count += len(sample_TC)
    except OSError as error:
        raise DataError(f"cannot read {path} as a WAV: {error.strerror or error}") from None
    made_T = made_T[:count]
    if bool(made_T.isnan().any()):
        raise DataError(f"{path} has samples that are no numbers")
    return made_T


def _form(file: BinaryIO, path: Path) -> WavForm:
    def wrong(why: str) -> DataError:
        return DataError(f"cannot read {path} as a WAV: {why}")

    head = file.read(12)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        raise wrong("it does not begin as one")
    told: tuple[int, int, int, bool] | None = None
    for _ in range(_MOST_PARTS):
        part = file.read(8)
        if len(part) < 8:
            break
        name, size = part[:4], int.from_bytes(part[4:], "little")
        begin = file.tell()
        if name == b"data":
            if told is None:
                raise wrong("its samples come before it says their format")
            channels, rate, width, is_float = told
            # Who writes into a pipe, or stops early, leaves a length that is too large.
            there = min(size, max(0, os.fstat(file.fileno()).st_size - begin))
            return WavForm(channels, rate, width, is_float, begin, there // (channels * width))
        if name == b"fmt ":
            told = _format(file.read(min(size, 40)), wrong)
        # Parts of odd lengths have a byte behind them.
        file.seek(begin + size + size % 2)
    raise wrong("it has no samples" if told is not None else "it does not say the format of its samples")


def _format(told: bytes, wrong: Callable[[str], DataError]) -> tuple[int, int, int, bool]:
    """(channels, rate, bytes of a sample, whether they are floats)."""
    if len(told) < 16:
        raise wrong("the format of its samples is cut off")
    tag, channels, rate, _, align, bits = struct.unpack_from("<HHIIHH", told)
    if tag == _EXTENSIBLE:
        if len(told) < 40:
            raise wrong("its extensible header is cut off")
        tag = int.from_bytes(told[24:26], "little")
        if told[26:] != _TAIL:
            raise wrong(f"its samples are of the format {told[24:].hex()}, which is neither whole numbers nor floats")
    width = (bits + 7) // 8
    if tag not in (_WHOLE, _FLOAT) or width not in ((4, 8) if tag == _FLOAT else (1, 2, 3, 4)):
        name = {_WHOLE: "whole numbers", _FLOAT: "floats"}.get(tag) or _NAMES.get(tag, "another format")
        raise wrong(
            f"its samples are {name} of {bits} bits (tag 0x{tag:04X}); whole numbers of 8 to 32 bits, and floats of 32 and 64, are read"
        )
    if channels < 1 or align != channels * width:
        raise wrong(f"it has {channels} channels of {bits} bits in {align} bytes, which cannot be")
    if not _LOWEST <= rate <= _HIGHEST:
        raise wrong(f"it has {rate:,} samples a second; {_LOWEST:,} to {_HIGHEST:,} are read")
    return channels, rate, width, tag == _FLOAT


def _samples(held: bytes, form: WavForm) -> np.ndarray:
    """float32, from -1 to 1."""
    if form.is_float:
        # What is beyond is cut off, as where ffmpeg hands sound to Whisper as whole numbers.
        with np.errstate(invalid="ignore"):
            return np.frombuffer(held, f"<f{form.width}").clip(-1, 1).astype(np.float32)
    width = form.width
    if width == 1:
        return (np.frombuffer(held, np.uint8).astype(np.float32) - 128) / 128
    if width == 3:
        # Of four bytes, the lowest of which is nought.
        whole = np.zeros((len(held) // 3, 4), np.uint8)
        whole[:, 1:] = np.frombuffer(held, np.uint8).reshape(-1, 3)
        held, width = whole.tobytes(), 4
    return np.frombuffer(held, f"<i{width}").astype(np.float32) / float(2 ** (8 * width - 1))
