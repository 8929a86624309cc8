"""What a Whisper writes of sound: the likeliest token each time, and of sound longer than it hears piece by piece.

A piece in which, as the model has it, nobody speaks is left empty, by the rule of Whisper's own code: the sign of no speech is likelier
than 0.6 where the text begins, and the tokens written all the same are on average less likely than e^-1. So is a piece without any sound.
"""
# Shapes: N files, L tokens, M mel bins, F frames, S positions of the encoder, D width, V vocabulary, T samples

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anabranch.heads.whisper.folder import Words
from anabranch.heads.whisper.sound import RATE, feature_of, most_samples, pieces_of

__all__ = ["Piece", "Written", "decoded", "listened", "transcribe", "transcribe_sound", "write"]

# Of Whisper's code: ``no_speech_threshold`` and ``logprob_threshold``.
SILENT, UNSURE = 0.6, -1.0


@dataclass(frozen=True)
class Written:
    """What was written of one piece of sound.

    Attributes:
        text: in words, whether anybody speaks or not.
        logprob: of the tokens and the end, on average; of a text that was cut, of its tokens.
        silence: how likely nobody speaks, as the model has it; None of one whose words have no sign for that.
    """

    text: str
    logprob: float
    silence: float | None

    @property
    def is_silent(self) -> bool:
        """Whether there is nothing to be written down."""
        return self.silence is not None and self.silence > SILENT and self.logprob < UNSURE


@dataclass(frozen=True)
class Piece:
    """A part of a sound that was heard at once.

    Attributes:
        start_s, end_s: where it is.
        text: what is said; empty where nobody speaks.
        silence: as of `Written`.
    """

    start_s: float
    end_s: float
    text: str
    silence: float | None


def listened(model: Any, feature_NMF: Tensor) -> Tensor:
    """``[N, S, D]``: what the encoder makes of sound, one file at a time."""
    with torch.no_grad():
        made = [model.get_encoder()(feature_MF.unsqueeze(0)).last_hidden_state for feature_MF in feature_NMF]
    return torch.cat(made)


def decoded(model: Any, state_BSD: Tensor, token_BL: Tensor, *, cache: Any = None) -> Any:
    """What the decoder makes of tokens, and of those of before that a cache holds."""
    from transformers.modeling_outputs import BaseModelOutput

    heard = BaseModelOutput(last_hidden_state=state_BSD)
    # By its name in the versions of before 5.24, and since.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    more = {} if cache is None else {name: cache}
    return model(encoder_outputs=heard, decoder_input_ids=token_BL, use_cache=cache is not None, **more)


@torch.no_grad()
def write(model: Any, words: Words, feature_MF: Tensor, most: int | None = None) -> Written:
    """The likeliest token each time, with a cache; at most so many tokens.

    Signs, and what the model's ``generation_config`` says is not to be said, are left out, as Whisper does.
    """
    from transformers import DynamicCache, EncoderDecoderCache

    device = next(model.parameters()).device
    state_1SD = listened(model, feature_MF.unsqueeze(0).to(device))
    never, first = _unsaid(model, words)
    tokens, step = list(words.start), list(words.start)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    room = model.config.max_target_positions - len(tokens)
    silence: float | None = None
    logprobs: list[float] = []
    for place in range(room if most is None else min(most, room)):
        logits_LV = decoded(model, state_1SD, torch.tensor([step], device=device), cache=cache).logits[0].float()
        if not place and words.silence is not None:
            silence = float(logits_LV[0].softmax(-1)[words.silence])
        logits_V = logits_LV[-1]
        logits_V[never if place else first] = -torch.inf
        step = [int(logits_V.argmax())]
        logprobs.append(float(logits_V.log_softmax(-1)[step[0]]))
        if step[0] == words.end:
            break
        tokens += step
    text = words.decode(tokens[len(words.start) :])
    return Written(text, sum(logprobs) / max(1, len(logprobs)), silence)


def _unsaid(model: Any, words: Words) -> tuple[list[int], list[int]]:
    """Tokens that are never written, and that are not the first."""
    settings = model.generation_config
    never = [
        *range(words.end + 1, model.config.vocab_size),
        *(each for each in settings.suppress_tokens or () if each >= 0),
    ]
    return never, [*never, *(settings.begin_suppress_tokens or ())]


def transcribe(model: Any, words: Words, feature_MF: Tensor, most: int | None = None) -> str:
    """The text of `write`."""
    return write(model, words, feature_MF, most).text


def transcribe_sound(
    model: Any, words: Words, sound_T: Tensor, *, begin: Callable[[float], None] = lambda start_s: None
) -> list[Piece]:
    """What is said in sound of any length.

    Args:
        model, words: see `open_whisper`.
        sound_T: float32 at 16 kHz, as of `read_sound`.
        begin: is told where a piece starts, in seconds, before it is heard.
    """
    made = []
    for first, behind in pieces_of(sound_T, most_samples(model)):
        begin(first / RATE)
        piece_T = sound_T[first:behind]
        # Whispers are sure that "you" is said where there is no sound at all.
        if bool((piece_T == piece_T[0]).all()):
            found = Written("", 0.0, 1.0)
        else:
            found = write(model, words, feature_of(piece_T, model))
        text = "" if found.is_silent else found.text
        made.append(Piece(first / RATE, behind / RATE, text, found.silence))
    return made
