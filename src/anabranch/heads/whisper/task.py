"""How routed heads of a Whisper are learned: `SpeechTask`, on the trainer.

    loss = mean over files of (mean over the text's tokens of -log p) + what routed heads add

By default heads of the decoder's cross-attention are routed: each token of the text decides by which heads it listens.
"""
# Shapes: N files, L tokens, M mel bins, F frames, S positions of the encoder, D width

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from anabranch.config import Field, configclass
from anabranch.errors import CheckpointError, DataError
from anabranch.files import atomic_write_json, read_json
from anabranch.heads.config import HeadRouting
from anabranch.heads.padding import real_queries
from anabranch.heads.put_on import fingerprint, head_losses, put_heads, routed_heads_of
from anabranch.heads.whisper.folder import Words, open_whisper
from anabranch.heads.whisper.sound import Utterance, features_of, read_speech
from anabranch.heads.whisper.writing import decoded, listened
from anabranch.lm.shards import write_file
from anabranch.lm.tensors import Piece, open_tensors, overwrite, state_once
from anabranch.train.examples import Examples
from anabranch.train.task import Losses, Task, TaskContext

__all__ = ["CROSS", "Speech", "SpeechTask", "measure"]

# Names of what listens.
CROSS = "model.decoder.layers.*.encoder_attn"
GATES, _DECODER = ".gate.", "model.decoder."
IGNORED = -100
_FORMAT = "anabranch-speech-heads"


@dataclass(frozen=True, eq=False)
class Speech:
    """Files, and their texts as tokens.

    Attributes:
        files: what was read.
        feature_NMF: what the model hears of each.
        token_N: of each what goes into the decoder: signs, and the text.
        target_N: what is to come next, `IGNORED` where that is a sign before the text.
    """

    files: tuple[Utterance, ...]
    feature_NMF: Tensor
    token_N: tuple[tuple[int, ...], ...]
    target_N: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.files)

    @classmethod
    def of(cls, files: Sequence[Utterance], model: Any, words: Words) -> Speech:
        """Raises DataError for sound, or text, that is longer than the model takes."""
        token_N, target_N = [], []
        most = model.config.max_target_positions
        for each in files:
            text = words.encode(each.text)
            tokens = [*words.start, *text]
            if len(tokens) > most:
                raise DataError(
                    f"the text of {each.path} has {len(tokens)} tokens with signs, and the model takes {most}"
                )
            token_N.append(tuple(tokens))
            target_N.append((*[IGNORED] * (len(words.start) - 1), *text, words.end))
        return cls(tuple(files), features_of(list(files), model), tuple(token_N), tuple(target_N))

    def padded(self, end: int) -> tuple[Tensor, Tensor]:
        """(token_NL, target_NL), with ``end`` and `IGNORED` behind the shorter ones."""
        longest = max(map(len, self.token_N))
        token_NL, target_NL = (torch.full((len(self), longest), fill) for fill in (end, IGNORED))
        for place, (tokens, targets) in enumerate(zip(self.token_N, self.target_N, strict=True)):
            token_NL[place, : len(tokens)] = torch.tensor(tokens)
            target_NL[place, : len(targets)] = torch.tensor(targets)
        return token_NL, target_NL

    def digest(self) -> str:
        """Names it by content."""
        hashed = hashlib.sha256(repr((self.token_N, self.target_N)).encode())
        hashed.update(self.feature_NMF.contiguous().numpy().tobytes())
        return hashed.hexdigest()[:16]


@torch.no_grad()
def measure(model: Any, speech: Speech, *, begin: Callable[[int], None] = lambda number: None) -> dict[str, Any]:
    """``nats_per_token``, ``accuracy`` (next token, given those before it) and ``tokens`` of the texts, each alone, so without padding.

    ``begin`` is told of each file before it is run.
    """
    device = next(model.parameters()).device
    nats, right, count = 0.0, 0, 0
    files = zip(speech.feature_NMF, speech.token_N, speech.target_N, strict=True)
    for number, (feature_MF, tokens, targets) in enumerate(files):
        begin(number)
        state_1SD = listened(model, feature_MF.unsqueeze(0).to(device))
        logits_LV = decoded(model, state_1SD, torch.tensor([tokens], device=device)).logits[0].float()
        target_L = torch.tensor(targets, device=device)
        nats += float(nn.functional.cross_entropy(logits_LV, target_L, ignore_index=IGNORED, reduction="sum"))
        right += int((logits_LV.argmax(-1) == target_L).sum())
        count += int((target_L != IGNORED).sum())
    return {"nats_per_token": nats / count, "accuracy": right / count, "tokens": count}


class SpeechTask(Task, kind="speech"):
    """Routed heads of a Whisper, learned on files of speech.

    Args:
        config: which model, which speech, which heads.

    Attributes:
        words: of the model.
        learned, held_out: the files; none of both is in the other.
        before: measures of the held-out files before anything is learned, with the heads that were put on; None without such files.

    Raises as `open_whisper`, `read_speech`, `Speech.of` and `put_heads`.
    """

    headline: ClassVar[str] = "nats_per_token"
    better: ClassVar[Literal["lower", "higher"] | None] = "lower"
    unit: ClassVar[str] = "files"
    material: ClassVar[str] = "speech"

    @configclass
    class Config(Task.Config):
        """What is learned on what.

        Attributes:
            model: folder of a Whisper, see `open_whisper`.
            speech: folder, see `read_speech`.
            heads: which are on.
            where: names of the attentions.
            learns: the gates alone, or the model too.
            validation_fraction: of files, at least one where it is not 0, by which it is measured.
        """

        model: str
        speech: str
        heads: HeadRouting
        where: tuple[str, ...] = (CROSS,)
        learns: Literal["all", "gates"] = "all"
        validation_fraction: float = Field(default=0.2, ge=0, lt=1)

    config: Config

    def __init__(self, config: Config, *, model: nn.Module | None = None) -> None:
        super().__init__(config, model=model)
        self.whisper, self.words = open_whisper(config.model)
        self._base = fingerprint(self.whisper)
        learned, held = split(read_speech(config.speech), config.validation_fraction)
        self.learned = Speech.of(learned, self.whisper, self.words)
        self.held_out = Speech.of(held, self.whisper, self.words) if held else None
        # The encoder stays as it is where gates of the decoder alone learn, so it hears once.
        self._state_NSD: Tensor | None = None
        self.before: dict[str, Any] | None = None

    # What it learns

    def build_model(self, context: TaskContext) -> nn.Module:
        """The Whisper, with routed heads."""
        heads = self.config.heads
        fields = {name: getattr(heads, name) for name in type(heads).__dataclass_fields__ if name != "num_shared"}
        put_heads(self.whisper, heads.num_shared, where=self.config.where, seed=context.settings.seed, **fields)
        self.whisper.to(context.device)
        found = routed_heads_of(self.whisper)
        if self.held_out is not None:
            self.before = measure(self.whisper, self.held_out)
            # What is reported is of learning.
            for each in found.values():
                each.forget()
        if self.config.learns == "gates" and all(name.startswith(_DECODER) for name in found):
            self._state_NSD = listened(self.whisper, self.learned.feature_NMF.to(context.device))
        model: nn.Module = self.whisper
        return model

    def learns(self, name: str, parameter: nn.Parameter) -> bool:
        """The gates, and with ``all`` what else a Whisper learns."""
        return parameter.requires_grad and (self.config.learns == "all" or GATES in name)

    # From what

    def training_data(self, context: TaskContext) -> Examples:
        """Files, each once an epoch."""
        token_NL, target_NL = self.learned.padded(self.words.end)
        place = {"rank": context.rank, "world_size": context.world_size}
        return Examples(torch.arange(len(self.learned)), token_NL, target_NL, seed=context.settings.seed, **place)

    def validation_data(self, context: TaskContext) -> Speech | None:
        """What is held out."""
        return self.held_out

    def fingerprint(self) -> str:
        """Of what is learned from and measured by."""
        return self.learned.digest() + ("" if self.held_out is None else self.held_out.digest())

    # How

    def step(self, model: nn.Module, batch: tuple[Tensor, ...], context: TaskContext) -> Losses:
        """Nats of texts, and what routed heads add."""
        from transformers.modeling_outputs import BaseModelOutput

        file_B, token_BL, target_BL = batch
        heard: dict[str, Any]
        if self._state_NSD is not None:
            heard = {"encoder_outputs": BaseModelOutput(last_hidden_state=self._state_NSD[file_B])}
        else:
            heard = {"input_features": self.learned.feature_NMF[file_B.cpu()].to(token_BL.device)}
        with real_queries(_real(target_BL)):
            logits_BLV = model(decoder_input_ids=token_BL, use_cache=False, **heard).logits
        nats_BL = nn.functional.cross_entropy(
            logits_BLV.float().flatten(0, 1), target_BL.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(target_BL)
        # A mean over the tokens of each file, then over files, so that parts of a batch average to that of the whole.
        nats_B = nats_BL.sum(1) / (target_BL != IGNORED).sum(1)
        return Losses.of(text=nats_B.mean(), heads=head_losses(self.whisper))

    def evaluate(self, model: nn.Module, data: Speech, context: TaskContext) -> dict[str, Any]:
        """See `measure`."""
        return measure(self.whisper, data)

    # What is kept

    def save(self, folder: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """What learns: the gates, or all."""
        kept = dict(tensors) if self.config.learns == "all" else {n: t for n, t in tensors.items() if GATES in n}
        write_file(folder / "model.safetensors", kept)
        atomic_write_json(folder / "config.json", {"schema": 1, "format": _FORMAT, "base": self._base})

    def load(self, folder: Path, model: nn.Module) -> None:
        """Put back what `save` wrote. Raises CheckpointError for gates of another Whisper than the config names now."""
        if self.config.learns == "all":
            overwrite(model, open_tensors(folder), {name: [Piece(name)] for name in state_once(model)}, where=folder)
            return
        base = read_json(folder / "config.json").get("base")
        if base != self._base:
            raise CheckpointError(f"the gates in {folder} are of another Whisper than {self.config.model} is now")
        gates = {name: heads.gate for name, heads in routed_heads_of(self.whisper).items() if heads.gate is not None}
        held = nn.ModuleList(gates.values())
        layout = {
            f"{number}.{key}": [Piece(f"{name}{GATES}{key}")]
            for number, (name, gate) in enumerate(gates.items())
            for key in state_once(gate)
        }
        overwrite(held, open_tensors(folder), layout, where=folder)


def _real(target_BL: Tensor) -> Tensor:
    """bool: the text and the signs before it, and not the padding behind."""
    last_B1 = (target_BL != IGNORED).long().cumsum(1).argmax(1, keepdim=True)
    return torch.arange(target_BL.shape[1], device=target_BL.device) <= last_B1


def split(files: Sequence[Utterance], fraction: float) -> tuple[list[Utterance], list[Utterance]]:
    """(to learn from, to measure by), by a hash of their names and texts. Raises DataError where nothing would be left to learn from."""

    def drawn(each: Utterance) -> str:
        return hashlib.sha256(f"{each.domain}/{each.path.name}/{each.text}".encode()).hexdigest()

    held = sorted(files, key=drawn)[: max(1, round(fraction * len(files)))] if fraction else []
    if len(held) >= len(files):
        raise DataError(f"{len(files)} files of speech, of which {len(held)} are held out; give more")
    return [each for each in files if each not in held], held
