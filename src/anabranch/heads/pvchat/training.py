"""How a model learns: `ClipTask`, on the trainer, in three stages.

    pretrain    clips of many subjects, each with a name of its own, all four kinds of questions; everything learns
    images      first frames of one new subject, existence and appearance; personal tokens, its word, the query former, its routers
                and what stands beside the decoder's attention learn, vision is frozen
    videos      its clips, all four kinds; the upper half of vision and the projector learn too

    loss = mean over questions of (mean over the answer's words of -log p) + what routed heads add

Of the words and the personal tokens only the rows of the new subjects learn: the gradient of all other rows is zero, and nothing
decays them, so they stay as they are to the bit (`rows_learning`).
"""
# Shapes: N items, B of a batch, K questions to each, L positions, F frames, S subjects asked about

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, configclass
from anabranch.errors import ConfigError, DataError
from anabranch.heads.pvchat.clips import fitted
from anabranch.heads.pvchat.model import PartName, PVChat, parts_of
from anabranch.heads.pvchat.one_shot import Part
from anabranch.heads.pvchat.questions import KINDS
from anabranch.heads.pvchat.vocabulary import END, PAD, Vocabulary
from anabranch.lm.tensors import Piece, open_tensors, overwrite, state_once
from anabranch.train.examples import Examples
from anabranch.train.optimizer import Speed
from anabranch.train.task import Losses, Task, TaskContext

__all__ = ["ClipTask", "Questions", "Rates", "rows_learning"]

Stage = Literal["pretrain", "images", "videos"]
# What learns in each stage; in the first everything but what is there for later.
_LEARNS: Mapping[Stage, frozenset[PartName]] = {
    "pretrain": frozenset(("vision", "upper_vision", "projector", "queries", "router", "personal", "words", "decoder")),
    "images": frozenset(("queries", "router", "personal", "words", "lora")),
    "videos": frozenset(("queries", "router", "personal", "words", "lora", "projector", "upper_vision")),
}


@dataclass(frozen=True, eq=False)
class Questions:
    """Rows about clips as tensors, those of one clip and one wording together in an item.

    Attributes:
        frame_CFCHW: uint8, of each clip.
        clip_N: int64, the clip of each item.
        subject_NS: int64, the subject that its questions are about.
        token_NKL: int64, words of questions and answers, padded on the right.
        target_NKL: int64, the next word where that is the answer's; -100 elsewhere.
        kind_NK: int64, places in `KINDS`; -1 where there is no question.
        present_N: bool, whether the subject is in the clip.
    """

    frame_CFCHW: Tensor
    clip_N: Tensor
    subject_NS: Tensor
    token_NKL: Tensor
    target_NKL: Tensor
    kind_NK: Tensor
    present_N: Tensor

    def __len__(self) -> int:
        return len(self.clip_N)

    @classmethod
    def of(cls, parts: Sequence[Part], vocabulary: Vocabulary, frames: int, size: int) -> Questions:
        """The rows of several parts, each about its own subject.

        Args:
            parts: of one set or several; all images, or all clips.
            vocabulary: knows their names.
            frames, size: that clips are fitted to; images stay images.

        Raises DataError if there are no rows, or images and clips together.
        """
        clips = [clip for part in parts for clip in part.clips]
        if not any(part.rows for part in parts):
            raise DataError("there are no questions to learn from; a set needs clips")
        lengths = {min(len(clip.frame_FCHW), frames) for clip in clips}
        if len(lengths) > 1:
            raise DataError(f"clips of {sorted(lengths)} frames; those that are learned together must have as many")
        items: dict[tuple[int, int, int], list[Any]] = {}
        first = 0
        for number, part in enumerate(parts):
            for row in part.rows:
                items.setdefault((first + row.clip, row.wording, number), []).append(row)
            first += len(part.clips)
        coded = [[_coded(row.question, row.answer, vocabulary) for row in rows] for rows in items.values()]
        most = max(len(rows) for rows in coded)
        longest = max(len(token) for rows in coded for token, _ in rows)
        shape = (len(coded), most, longest)
        token_NKL, target_NKL = torch.full(shape, PAD), torch.full(shape, -100)
        kind_NK = torch.full(shape[:2], -1)
        for place, (rows, asked) in enumerate(zip(coded, items.values(), strict=True)):
            for turn, ((token, target), row) in enumerate(zip(rows, asked, strict=True)):
                token_NKL[place, turn, : len(token)] = torch.tensor(token)
                target_NKL[place, turn, : len(target)] = torch.tensor(target)
                kind_NK[place, turn] = KINDS.index(row.kind)
        subjects = [vocabulary.subject(parts[number].name) for _, _, number in items]
        return cls(
            torch.stack([fitted(clip, frames, size) for clip in clips]),
            torch.tensor([clip for clip, _, _ in items]),
            torch.tensor(subjects)[:, None],
            token_NKL,
            target_NKL,
            kind_NK,
            torch.tensor([rows[0].present for rows in items.values()]),
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What an item has."""
        return self.clip_N, self.subject_NS, self.token_NKL, self.target_NKL

    def digest(self) -> str:
        """Names it by content."""
        hashed = hashlib.sha256()
        for tensor in (self.frame_CFCHW, *self.tensors):
            hashed.update(f"{tensor.dtype} {list(tensor.shape)};".encode())
            hashed.update(tensor.contiguous().numpy().tobytes())
        return hashed.hexdigest()[:16]


def _coded(question: str, answer: str, vocabulary: Vocabulary) -> tuple[list[int], list[int]]:
    """(words that go in, what is to come next where that is the answer's)."""
    asked, said = vocabulary.encode(question), [*vocabulary.encode(answer), END]
    return asked + said[:-1], [-100] * (len(asked) - 1) + said


@contextmanager
def rows_learning(parameter: Tensor, rows: Sequence[int]) -> Iterator[None]:
    """Within it, gradients of ``parameter`` are zero but in these rows. Raises ConfigError for a row that there is not.

    With an optimizer that neither decays the parameter nor has moments of before, all other rows stay as they are to the bit.
    """
    outside = [row for row in rows if not 0 <= row < len(parameter)]
    if outside:
        raise ConfigError(f"row {outside[0]} is to learn, and the rows are 0 to {len(parameter) - 1}")
    learns = torch.zeros(len(parameter), dtype=torch.bool)
    learns[list(rows)] = True

    def only_these(gradient: Tensor) -> Tensor:
        # Not times zero: a gradient that is infinite elsewhere would be NaN.
        kept = learns.to(gradient.device).view(-1, *(1,) * (gradient.dim() - 1))
        return gradient.where(kept, torch.zeros_like(gradient))

    was = parameter.requires_grad
    parameter.requires_grad_(True)
    handle = parameter.register_hook(only_these)
    try:
        yield
    finally:
        handle.remove()
        parameter.requires_grad_(was)


@configclass
class Rates(BaseConfig):
    """Times the learning rate, of each part while a new subject is learned. Defaults: the ratios of the paper's code.

    Attributes:
        personal, words: of the new rows.
        queries: of the query former.
        router: of what routes its heads.
        lora: of what stands beside the decoder's attention.
        vision: of the upper half of vision and the projector, in the last stage.
    """

    personal: float = Field(default=1.0, ge=0)
    words: float = Field(default=1.0, ge=0)
    queries: float = Field(default=0.1, ge=0)
    router: float = Field(default=0.01, ge=0)
    lora: float = Field(default=0.1, ge=0)
    vision: float = Field(default=0.1, ge=0)

    def of(self, part: PartName) -> float:
        """That of a part; 1 for what has none."""
        return float({"upper_vision": self.vision, "projector": self.vision}.get(part, getattr(self, part, 1.0)))


class ClipTask(Task, kind="pvchat"):
    """A stage of learning. See the module.

    Args:
        config: which stage.
        model: learns, in place.
        questions: what it learns from.
        held_out: by which it is measured; None for nothing.

    Raises ConfigError without a model or questions, InputError for a name that the model does not know.
    """

    headline: ClassVar[str] = "exact"
    better: ClassVar[Literal["lower", "higher"] | None] = "higher"
    unit: ClassVar[str] = "clips"
    material: ClassVar[str] = "clips"

    @configclass
    class Config(Task.Config):
        """Which stage.

        Attributes:
            stage: see the module.
            names: of the subjects that are learned; all of the model's in the stage ``pretrain``.
            rates: of each part, in the other stages.
        """

        stage: Stage = "pretrain"
        names: tuple[str, ...] = ()
        rates: Rates = Rates()

        def __post_init__(self) -> None:
            if self.stage != "pretrain" and not self.names:
                raise ConfigError(f"names is empty; the stage {self.stage!r} learns subjects, say which")
            if self.stage == "pretrain" and self.names:
                raise ConfigError("names is for the stages that learn a new subject; pretraining learns all of them")

    config: Config

    def __init__(
        self,
        config: Config,
        *,
        model: PVChat | None = None,
        questions: Questions | None = None,
        held_out: Questions | None = None,
    ) -> None:
        super().__init__(config, model=model)
        if model is None or questions is None:
            raise ConfigError("a ClipTask needs a model and questions: Trainer(run, out, model=..., questions=...)")
        self.chat, self.questions, self.held_out = model, questions, held_out
        self.parts = parts_of(model)
        self.new_rows = model.rows_of(config.names)

    # What it learns

    def learns(self, name: str, parameter: nn.Parameter) -> bool:
        """By stage; a part whose rate is 0 does not."""
        part = self.parts[name]
        is_slow = self.config.stage != "pretrain" and not self.config.rates.of(part)
        return part in _LEARNS[self.config.stage] and parameter.numel() > 0 and not is_slow

    def speed(self, name: str, parameter: nn.Parameter) -> Speed | None:
        """The rate of its part; rows of words and of subjects are never decayed."""
        part = self.parts[name]
        decay = 0.0 if part in ("personal", "words") else None
        return Speed(1.0 if self.config.stage == "pretrain" else self.config.rates.of(part), decay)

    # From what

    def training_data(self, context: TaskContext) -> Examples:
        """Items, each once an epoch."""
        place = {"rank": context.rank, "world_size": context.world_size}
        return Examples(*self.questions.tensors, seed=context.settings.seed, **place)

    def validation_data(self, context: TaskContext) -> Questions | None:
        """What is held out."""
        return self.held_out

    def fingerprint(self) -> str:
        """Of what is learned from and measured by."""
        return self.questions.digest() + ("" if self.held_out is None else self.held_out.digest())

    # How

    def step(self, model: nn.Module, batch: tuple[Tensor, ...], context: TaskContext) -> Losses:
        """Nats of answers, and what routed heads add."""
        clip_B, subject_BS, token_BKL, target_BKL = batch
        frame_BFCHW = self.questions.frame_CFCHW[clip_B.cpu()].to(token_BKL.device)
        _, nats_BK = model(frame_BFCHW, subject_BS, token_BKL, target_BKL)
        asked_BK = (target_BKL != -100).any(-1)
        # A mean over the questions of each clip, then over clips: those of which less can be asked count alike.
        nats_B = (nats_BK * asked_BK).sum(-1) / asked_BK.sum(-1).clamp_min(1)
        terms = {"answers": nats_B.mean()}
        if self.chat.routed():
            terms["heads"] = self.chat.head_losses()
        return Losses.of(**terms)

    def evaluate(self, model: nn.Module, data: Questions, context: TaskContext) -> dict[str, Any]:
        """Exact matches of each kind, see `anabranch.heads.pvchat.measure`."""
        from anabranch.heads.pvchat.measure import measure

        return measure(self.chat, data, batch_size=context.batch_size).to_dict()

    # What is kept

    def save(self, folder: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """The whole model, as `PVChat.save` writes it."""
        self.chat.write(folder, dict(tensors))

    def load(self, folder: Path, model: nn.Module) -> None:
        """Put back what `save` wrote."""
        overwrite(model, open_tensors(folder), {name: [Piece(name)] for name in state_once(model)}, where=folder)
