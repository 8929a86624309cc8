"""Speech in a folder: ``.wav`` files, each with what is said in it in a ``.txt`` of the same name.

Folders in it (voices, rooms, languages) are domains, by which reports tell heads apart.
"""
# Shapes: T samples, M mel bins, F frames

from __future__ import annotations

import math
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.errors import DataError

__all__ = ["RATE", "Utterance", "features_of", "read_sound", "read_speech", "resampled"]

# Samples of a second, and of a frame of what Whisper sees.
RATE, HOP = 16_000, 160
# Samples on either side that a resampled one is made of, at the lower of both rates.
_REACH = 24


@dataclass(frozen=True)
class Utterance:
    """One file.

    Attributes:
        path: of the sound.
        domain: the first folder that it is in, below that of all; empty for none.
        text: what is said.
    """

    path: Path
    domain: str
    text: str


def read_speech(folder: str | Path) -> list[Utterance]:
    """All of a folder, in order of their paths. Raises DataError for a folder without sound, and for sound without text."""
    place = Path(folder)
    if not place.is_dir():
        raise DataError(
            f"{place} is no folder; speech is a folder of .wav files, each with a .txt of what is said in it"
        )
    found = []
    for path in sorted(place.rglob("*.wav")):
        beside = path.with_suffix(".txt")
        try:
            text = beside.read_text(encoding="utf-8").strip()
        except OSError:
            raise DataError(f"{path} has no {beside.name} beside it, which says what is said") from None
        except UnicodeDecodeError:
            raise DataError(f"{beside} is no text in UTF-8") from None
        if not text:
            raise DataError(f"{beside} is empty; write what is said in {path.name}")
        below = path.relative_to(place).parts
        found.append(Utterance(path, below[0] if len(below) > 1 else "", text))
    if not found:
        raise DataError(f"{place} has no .wav files")
    return found


def read_sound(path: Path) -> Tensor:
    """float32 ``[T]`` at 16 kHz, a mean over channels. Raises DataError for what is no WAV of whole numbers, or has no sound in it."""
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            held = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(f"cannot read {path} as a WAV of whole numbers: {error}") from None
    if width not in (1, 2, 3, 4) or rate < 1 or channels < 1:
        raise DataError(f"{path} has {channels} channels of {8 * width} bits at {rate} Hz, which cannot be read")
    samples = _samples(held[: len(held) // (width * channels) * width * channels], width)
    if not len(samples):
        raise DataError(f"{path} has no sound in it")
    return resampled(torch.from_numpy(samples.reshape(-1, channels).mean(1)), rate)


def _samples(held: bytes, width: int) -> Any:
    """float32, from -1 to 1."""
    if width == 1:
        return (np.frombuffer(held, np.uint8).astype(np.float32) - 128) / 128
    if width == 3:
        # Of four bytes, the lowest of which is nought.
        whole = np.zeros((len(held) // 3, 4), np.uint8)
        whole[:, 1:] = np.frombuffer(held, np.uint8).reshape(-1, 3)
        held, width = whole.tobytes(), 4
    kind = "<i2" if width == 2 else "<i4"
    return np.frombuffer(held, kind).astype(np.float32) / float(2 ** (8 * width - 1))


def resampled(sound_T: Tensor, rate: int, to: int = RATE) -> Tensor:
    """The sound at another rate, by a windowed sinc that lets nothing through above half of the lower rate."""
    if rate == to:
        return sound_T
    lower = min(1.0, to / rate)
    reach = math.ceil(_REACH / lower)
    count = max(1, math.ceil(len(sound_T) * to / rate))
    padded = torch.nn.functional.pad(sound_T, (reach, reach + 1))
    made = torch.empty(count)
    offset_K = torch.arange(-reach, reach + 1, dtype=torch.float64)
    # In pieces, so that a long file takes no memory for all of its windows.
    for first in range(0, count, RATE):
        at_T = torch.arange(first, min(count, first + RATE), dtype=torch.float64) * (rate / to)
        whole_T = at_T.floor()
        away_TK = offset_K - (at_T - whole_T).unsqueeze(1)
        window_TK = torch.cos(math.pi / 2 * away_TK / (reach + 1)).square()
        weight_TK = lower * torch.sinc(lower * away_TK) * window_TK
        place_TK = whole_T.long().unsqueeze(1) + torch.arange(2 * reach + 1)
        made[first : first + len(at_T)] = (padded[place_TK.clamp_max(len(padded) - 1)] * weight_TK).sum(1).float()
    return made


def features_of(utterances: list[Utterance], model: Any) -> Tensor:
    """float32 ``[N, M, F]``: log-mel spectrograms as Whisper sees them, each as long as the model can hear, silence behind the sound.

    Raises DataError for sound that is longer.
    """
    from transformers import WhisperFeatureExtractor

    frames = 2 * model.config.max_source_positions
    extract = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    made = []
    for each in utterances:
        sound_T = read_sound(each.path)
        if len(sound_T) > frames * HOP:
            raise DataError(
                f"{each.path} lasts {len(sound_T) / RATE:.1f} s, and the model hears {frames * HOP / RATE:g} s; cut it, and its text"
            )
        heard = extract(sound_T.numpy(), sampling_rate=RATE, return_tensors="pt").input_features[0]
        made.append(heard[:, :frames].float())
    return torch.stack(made)
