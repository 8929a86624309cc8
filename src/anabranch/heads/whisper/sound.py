"""Sound as a Whisper hears it, and speech in a folder: ``.wav`` files, each with what is said in it in a ``.txt`` of the same name.

Folders in it (voices, rooms, languages) are domains, by which reports tell heads apart. Hidden files are left out; other sound is not read,
and `unread_in` tells of it.
"""
# Shapes: T samples, M mel bins, F frames; of resampling, M periods, P phases, K samples of a window

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import DataError
from anabranch.heads.whisper.wav import WavForm, read_wav, wav_form

__all__ = [
    "RATE",
    "Utterance",
    "check_sound",
    "feature_of",
    "features_of",
    "most_samples",
    "pieces_of",
    "read_sound",
    "read_speech",
    "resampled",
    "sounds_in",
    "told_unread",
    "unread_in",
]

# Samples of a second, and of a frame of what Whisper sees.
RATE, HOP = 16_000, 160
# Samples on either side that a resampled one is made of, at the lower of both rates; and of how many products as many as fit are summed.
_REACH, _AT_ONCE = 24, 1 << 22
# Of one file: its samples at 16 kHz take 2.8 GB.
_LONGEST_S = 12 * 3600
# Endings of files that are read, and of sound that is not; in capitals, too, as Windows and recorders write them.
_WAVS = (".wav", ".wave")
_OTHERS = (
    ".aac",
    ".aif",
    ".aifc",
    ".aiff",
    ".amr",
    ".au",
    ".caf",
    ".flac",
    ".m4a",
    ".m4b",
    ".mka",
    ".mkv",
    ".mov",
    ".mp3",
    ".mp4",
    ".oga",
    ".ogg",
    ".opus",
    ".rf64",
    ".snd",
    ".w64",
    ".webm",
    ".wma",
)
# Samples among which a cut is made where they are quietest, and the share at the end of a piece where that is looked for.
_PAUSE, _TAIL = RATE // 5, 6


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
    for path in sounds_in(place):
        beside = _text_of(path)
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
    return found


def sounds_in(place: Path) -> list[Path]:
    """WAV files below a folder, in order of their paths, but for hidden ones. Raises DataError where there is none."""
    found = [path for path in _files_below(place) if path.suffix.lower() in _WAVS]
    if not found:
        told = told_unread(unread_in(place))
        raise DataError(f"{place} has no .wav files" + (f"; {told}" if told else ""))
    return found


def unread_in(place: Path, *, texts: bool = False) -> list[Path]:
    """What nobody reads below a folder, though it is sound by its ending, and has no WAV of its name beside it; so, too, ``texts``."""
    named: dict[Path, list[Path]] = {}
    for path in _files_below(place):
        named.setdefault(path.with_suffix(""), []).append(path)
    made = []
    for paths in named.values():
        endings = [path.suffix.lower() for path in paths]
        if not any(ending in _WAVS for ending in endings):
            wanted = [path for path, ending in zip(paths, endings, strict=True) if ending in _OTHERS]
            alone = [path for path, ending in zip(paths, endings, strict=True) if texts and ending == ".txt"]
            made += wanted or alone
    return made


def told_unread(paths: list[Path]) -> str:
    """Of `unread_in`, and what to do about it, in a line; empty for none."""
    if not paths:
        return ""
    names = ", ".join(path.name for path in paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    sound = next((path for path in paths if path.suffix.lower() in _OTHERS), None)
    if sound is None:
        return f"{names}: no .wav of that name"
    return f"{names}: not read, as no WAV; make them one each, as by ffmpeg -i {sound.name} {sound.stem}.wav"


def _files_below(place: Path) -> list[Path]:
    """In order of their paths; hidden ones, such as copies leave behind, are none."""
    found = []
    for path in sorted(place.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(place).parts)
        if not hidden and not path.is_dir():
            found.append(path)
    return found


def _text_of(path: Path) -> Path:
    """The text beside a sound; its ending may be in capitals, as that of the sound may."""
    beside = path.with_suffix(".txt")
    shouted = path.with_suffix(".TXT")
    return shouted if shouted.exists() and not beside.exists() else beside


def read_sound(path: Path) -> Tensor:
    """float32 ``[T]`` at 16 kHz, a mean over channels. Raises DataError for what `check_sound` refuses."""
    form = check_sound(path)
    sound_T = read_wav(path, form)
    if not len(sound_T):
        raise DataError(f"{path} has no sound in it")
    return resampled(sound_T, form.rate)


def check_sound(path: Path) -> WavForm:
    """What the head of a file says, before anything is read of it. Raises DataError for what is no WAV (`wav_form`), empty or too long."""
    form = wav_form(path)
    if not form.length:
        raise DataError(f"{path} has no sound in it")
    if form.length > _LONGEST_S * form.rate:
        raise DataError(
            f"{path} lasts {form.length / form.rate / 3600:,.1f} h; up to {_LONGEST_S // 3600} h are read at once, so cut it"
        )
    return form


def resampled(sound_T: Tensor, rate: int, to: int = RATE) -> Tensor:
    """The sound at another rate, by a windowed sinc that lets nothing through above half of the lower rate."""
    if rate == to:
        return sound_T
    lower = min(1.0, to / rate)
    reach = math.ceil(_REACH / lower)
    count = max(1, -(-len(sound_T) * to // rate))
    # Made samples lie between those that are there in as many ways as there are ``phases``, and again so ``stride`` samples later.
    common = math.gcd(rate, to)
    stride, phases = rate // common, to // common
    periods = -(-count // phases)
    # Of each sample the window around it.
    window_TK = torch.nn.functional.pad(sound_T, (reach, reach)).unfold(0, 2 * reach + 1, 1)
    made_MP = torch.empty(periods, phases)
    offset_K = torch.arange(-reach, reach + 1, dtype=torch.float64)
    # In pieces, so that a long file takes no memory for all of its windows.
    at_once = max(1, _AT_ONCE // len(offset_K))
    for first in range(0, phases, at_once):
        phase_P = torch.arange(first, min(phases, first + at_once))
        whole_P, rest_P = phase_P * rate // to, (phase_P * rate % to).double() / to
        away_PK = offset_K - rest_P.unsqueeze(1)
        weight_PK = lower * torch.sinc(lower * away_PK) * torch.cos(math.pi / 2 * away_PK / (reach + 1)).square()
        weight_PK = weight_PK.float()
        step = max(1, at_once // len(phase_P))
        for begin in range(0, periods, step):
            period_M = torch.arange(begin, min(periods, begin + step))
            # Behind the last sample there is nothing that is kept.
            place_MP = (period_M.unsqueeze(1) * stride + whole_P).clamp_max(len(window_TK) - 1)
            made_MP[begin : begin + step, first : first + at_once] = torch.einsum(
                "mpk,pk->mp", window_TK[place_MP], weight_PK
            )
    return made_MP.flatten()[:count]


def most_samples(model: Any) -> int:
    """Samples that a Whisper hears at once."""
    return 2 * int(model.config.max_source_positions) * HOP


def pieces_of(sound_T: Tensor, most: int) -> list[tuple[int, int]]:
    """(first sample, that behind the last) of pieces that follow each other, none of more than ``most`` samples.

    A piece ends where the last sixth of ``most`` is quietest for a fifth of a second, so that few words are cut.
    """
    made, first = [], 0
    while len(sound_T) - first > most:
        tail = max(1, most // _TAIL)
        start = first + most - tail
        pause = min(_PAUSE, tail)
        power_T = sound_T[start : first + most].double().square()
        sum_T = torch.nn.functional.pad(power_T.cumsum(0), (1, 0))
        window_W = sum_T[pause:] - sum_T[:-pause]
        # The last of the quietest; sums of a silence differ by rounding.
        quietest = window_W <= window_W.min() + 1e-9
        behind = start + int(quietest.nonzero().max()) + (pause + 1) // 2
        made.append((first, behind))
        first = behind
    return [*made, (first, len(sound_T))]


def feature_of(sound_T: Tensor, model: Any) -> Tensor:
    """float32 ``[M, F]``: the log-mel spectrogram as Whisper sees it, as long as the model can hear, silence behind the sound."""
    from transformers import WhisperFeatureExtractor

    extract = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    heard = extract(sound_T.numpy(), sampling_rate=RATE, return_tensors="pt").input_features[0]
    made: Tensor = heard[:, : most_samples(model) // HOP].float()
    return made


def features_of(utterances: list[Utterance], model: Any) -> Tensor:
    """float32 ``[N, M, F]``: `feature_of` of each. Raises DataError for sound that is longer than the model hears."""
    most, made = most_samples(model), []
    for each in utterances:
        form = check_sound(each.path)
        if form.length * RATE > most * form.rate:
            raise DataError(
                f"{each.path} lasts {form.length / form.rate:.1f} s, and the model hears {most / RATE:g} s; cut it, and its text"
            )
        made.append(feature_of(read_sound(each.path), model))
    return torch.stack(made)
