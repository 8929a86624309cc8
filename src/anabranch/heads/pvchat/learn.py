"""The two things that are done with a model: pretrain it on generic clips, and let it learn new subjects in two stages.

model, result = pretrain(subjects, "runs/base")
learn(model, {"<Ab>": portrait}, bank, "runs/ab")     # images first, then videos
model.ask(clip, "where is <Ab> ?")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from anabranch.bounds import Seed, Size
from anabranch.config import Config as BaseConfig
from anabranch.config import Field, configclass
from anabranch.errors import ConfigError, DataError
from anabranch.heads.pvchat.clips import Composer
from anabranch.heads.pvchat.cut_out import views_of
from anabranch.heads.pvchat.drawings import Portrait, Subject, portraits
from anabranch.heads.pvchat.generators import Composed, Embedder, Generator
from anabranch.heads.pvchat.model import PVChat
from anabranch.heads.pvchat.one_shot import Balance, OneShotSet, Part, ask_all, look_alikes
from anabranch.heads.pvchat.questions import KINDS, name_of
from anabranch.heads.pvchat.training import ClipTask, Questions, Rates, rows_learning
from anabranch.heads.pvchat.vocabulary import Vocabulary
from anabranch.train import Event, TaskRunConfig, TrainConfig, Trainer, TrainResult
from anabranch.train.run import check_free, check_new, find_checkpoint

__all__ = ["Learned", "Learning", "Pretraining", "exam", "generic_part", "learn", "pretrain"]

OnEvent = Callable[[str, Event], None]


@configclass
class Pretraining(BaseConfig):
    """How a model is made.

    Attributes:
        model: its sizes.
        clips: that are composed; each is asked about one subject, which is there in every second.
        wordings: of the questions to each.
        steps, batch_size, learning_rate: of AdamW, a batch being so many clips with a question of each kind.
        held_out: clips by which it is measured at the end.
        seed: of everything.
    """

    model: PVChat.Config = PVChat.Config()
    clips: Size = Field(default=4000, ge=2)
    wordings: Size = Field(default=2, ge=1)
    steps: Size = Field(default=2500, ge=1)
    batch_size: Size = Field(default=16, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    held_out: int = Field(default=128, ge=0)
    seed: Seed = 0


@configclass
class Learning(BaseConfig):
    """How subjects are learned.

    Attributes:
        data: clips and questions.
        image_steps, video_steps: of the two stages; 0 leaves one out.
        batch_size: clips of a step.
        learning_rate: of personal tokens and words; other parts learn by ``rates`` of it.
        rates: see `Rates`.
        seed: of the order; that of the clips is ``data.seed``.
    """

    data: OneShotSet.Config = OneShotSet.Config()
    image_steps: int = Field(default=40, ge=0, le=1_000_000)
    video_steps: int = Field(default=80, ge=0, le=1_000_000)
    batch_size: Size = Field(default=8, ge=1)
    learning_rate: float = Field(default=1e-2, gt=0)
    rates: Rates = Rates()
    seed: Seed = 0

    def __post_init__(self) -> None:
        if not self.image_steps + self.video_steps:
            raise ConfigError("image_steps and video_steps are both 0; nothing would be learned")


@dataclass(frozen=True)
class Learned:
    """What came of learning subjects.

    Attributes:
        balance: of what each was learned from, by its name.
        found: (subject, cosine) of the hard negatives of each.
        stages: how each stage ended, by its name; one that was interrupted is the last.
    """

    balance: dict[str, Balance]
    found: dict[str, list[tuple[str, float]]]
    stages: dict[str, TrainResult]

    @property
    def is_finished(self) -> bool:
        """Whether no stage was interrupted."""
        return all(result.status == "finished" for result in self.stages.values())

    @property
    def signal(self) -> str | None:
        """Which one interrupted it, such as SIGTERM."""
        return next((result.signal for result in self.stages.values() if result.signal), None)


def generic_part(
    subjects: Sequence[Subject], count: int, composer: Composer, *, wordings: int, seed: int
) -> list[Part]:
    """Clips of many subjects, each asked about one that is there in every second clip, and in the others is not.

    Raises DataError for fewer than four subjects: a clip shows up to three, and one is to be missing.
    """
    if len(subjects) < 4:
        raise DataError(f"{len(subjects)} subjects; clips of several need at least 4")
    generator = torch.Generator().manual_seed(seed)
    made = Composed(composer, portraits(subjects))
    by_subject: dict[str, list[Any]] = {subject.name: [] for subject in subjects}
    for number in range(count):
        shown = subjects[int(torch.randint(len(subjects), (), generator=generator))]
        drawing = int(torch.randint(len(shown.ink_NSS), (), generator=generator))
        clip = made.clips([shown.portrait(drawing)], 1, generator)[0]
        asked = shown.name
        while number % 2 and clip.actor(asked) is not None:
            asked = subjects[int(torch.randint(len(subjects), (), generator=generator))].name
        by_subject[asked].append(clip)
    return [
        Part(name_of(name), clips, ask_all(clips, name_of(name), name, KINDS, wordings, generator))
        for name, clips in by_subject.items()
        if clips
    ]


def pretrain(
    subjects: Sequence[Subject],
    out: str | Path,
    config: Pretraining | None = None,
    *,
    resume: bool = False,
    device: str = "auto",
    on_event: OnEvent = lambda stage, event: None,
) -> tuple[PVChat, TrainResult]:
    """A new model that knows ``subjects`` by the names of their folders (``<Greek/character01>``), and how its training ended.

    Args:
        subjects: at least four.
        out: folder of the run, as of any `Trainer`.
        config: how.
        resume: go on with the run in ``out``, which must have been of the same subjects and config.
        device: of training.
        on_event: told of the stage and of what the trainer tells.

    Raises as `Trainer` and `generic_part`.
    """
    config = Pretraining() if config is None else config
    sizes = config.model
    composer = Composer(Composer.Config(frames=sizes.frames, size=sizes.size))
    run = TaskRunConfig(
        task=ClipTask.Config(),
        train=_train(config.steps, config.batch_size, config.learning_rate, config.seed, device, weight_decay=0.05),
    )
    # Before clips are composed, which takes a while.
    check_free(Path(out))
    if resume:
        find_checkpoint(Path(out), run)
    else:
        check_new(Path(out))
    model = PVChat(sizes, Vocabulary([name_of(subject.name) for subject in subjects]), seed=config.seed)

    def questions(count: int, seed: int) -> Questions:
        parts = generic_part(subjects, count, composer, wordings=config.wordings, seed=seed)
        return Questions.of(parts, model.vocabulary, sizes.frames, sizes.size)

    # Seeds of the two are far apart, so that no clip is in both.
    held_out = questions(config.held_out, config.seed ^ 2**40) if config.held_out else None
    trainer = Trainer(
        run,
        out,
        resume=resume,
        on_event=lambda event: on_event("pretrain", event),
        model=model,
        questions=questions(config.clips, config.seed),
        held_out=held_out,
    )
    return model, trainer.fit()


def learn(
    model: PVChat,
    references: Mapping[str, Any],
    bank: Sequence[Any],
    out: str | Path,
    config: Learning | None = None,
    *,
    positives: Generator | None = None,
    augmented: Generator | None = None,
    embedder: Embedder | None = None,
    consent: bool = False,
    resume: bool = False,
    device: str = "auto",
    on_event: OnEvent = lambda stage, event: None,
) -> Learned:
    """Let ``model`` learn new subjects, in place: first from images, then from videos.

    Args:
        model: a pretrained one.
        references: one picture of each subject, or what was cut out of a clip of it, by the name that it is to have:
            ``{"<Ab>": portrait}``. Several are learned at once, and each is among the others of the other.
        bank: others, as of `OneShotSet`, which takes ``positives``, ``augmented``, ``embedder`` and ``consent`` too.
        out: folder of the runs: ``images`` and ``videos`` in it.
        config: how.
        resume: go on with runs in ``out`` that were interrupted.
        device: of training.
        on_event: told of the stage and of what the trainer tells.

    Raises as `OneShotSet` and `Trainer`, and ConfigError for no reference; the model has none of the new subjects then, and what a stage
    had taught other parts stays. An interrupted stage leaves the model as it is then; see `Learned.is_finished`.
    """
    config = Learning() if config is None else config
    if not references:
        raise ConfigError("references is empty; give a picture of each subject that is to be learned, by its name")
    for name in references:
        model.vocabulary.check_new(name)
    given: dict[str, Any] = {"positives": positives, "augmented": augmented, "embedder": embedder, "consent": consent}
    made = {
        name: OneShotSet(
            config.data,
            name,
            reference,
            [*bank, *(view for each in references.values() if each is not reference for view in views_of(each))],
            **given,
        )
        for name, reference in references.items()
    }
    for stage in ("images", "videos"):
        check_free(Path(out) / stage)
        if not resume:
            check_new(Path(out) / stage)
    with _taken_up(model, references, config.seed):
        done = _learned(model, list(references), made, Path(out), config, resume, device, on_event)
    return Learned(
        {name: each.report() for name, each in made.items()}, {name: each.found for name, each in made.items()}, done
    )


@contextmanager
def _taken_up(model: PVChat, names: Iterable[str], seed: int) -> Iterator[None]:
    """New subjects of ``model``, which has them no more where learning them fails: who calls again must not find the names taken."""
    before = len(model.vocabulary.names)
    try:
        for name in names:
            model.add_subject(name, seed=seed)
        yield
    except BaseException:
        model.drop_subjects(len(model.vocabulary.names) - before)
        raise


def _learned(
    model: PVChat,
    names: Sequence[str],
    made: Mapping[str, OneShotSet],
    out: Path,
    config: Learning,
    resume: bool,
    device: str,
    on_event: OnEvent,
) -> dict[str, TrainResult]:
    """How each stage ended."""
    words, subjects = model.rows_of(names)
    done: dict[str, TrainResult] = {}
    stages: tuple[tuple[Literal["images", "videos"], int], ...] = (
        ("images", config.image_steps),
        ("videos", config.video_steps),
    )
    with ExitStack() as stack:
        stack.enter_context(rows_learning(model.decoder.embedding.weight, words))
        stack.enter_context(rows_learning(model.personal, subjects))
        for stage, steps in stages:
            if steps and all(result.status == "finished" for result in done.values()):
                parts = [each.part(stage) for each in made.values()]
                questions = Questions.of(parts, model.vocabulary, model.config.frames, model.config.size)
                run = TaskRunConfig(
                    task=ClipTask.Config(stage=stage, names=tuple(names), rates=config.rates),
                    train=_train(
                        steps, min(config.batch_size, len(questions)), config.learning_rate, config.seed, device
                    ),
                )
                trainer = Trainer(
                    run,
                    out / stage,
                    resume=resume and (out / stage / "config.json").is_file(),
                    on_event=partial(on_event, stage),
                    model=model,
                    questions=questions,
                )
                done[stage] = trainer.fit()
    return done


def _train(
    steps: int, batch_size: int, learning_rate: float, seed: int, device: str, weight_decay: float = 0.0
) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        eval_every=None,
        checkpoint_every=250,
        keep_checkpoints=1,
        device=device,
        seed=seed,
    )


def exam(
    model: PVChat,
    name: str,
    shown: Subject,
    bank: Sequence[Portrait],
    *,
    clips: int = 64,
    hard: int | None = None,
    seed: int = 0,
) -> Questions:
    """New clips by which a model is measured: half with ``shown``, who is called ``name``, half without, as many of those of look-alikes.

    Args:
        model: knows the name.
        name: of the subject.
        shown: its drawings; those that it was learned from should not be among them.
        bank: others.
        clips: at least 4.
        hard: how many of the clips without it show look-alikes; None for half of them.
        seed: of the clips; another than that of what was learned from.

    Raises ConfigError for fewer clips, or nobody else.
    """
    others = [portrait for portrait in bank if portrait.subject != shown.name]
    if clips < 4 or not others:
        raise ConfigError(
            f"clips is {clips} and the bank has {len(others)} others; an exam needs at least 4 clips and one other"
        )
    half = clips // 2
    hard = half // 2 if hard is None else hard
    composer = Composer(Composer.Config(frames=model.config.frames, size=model.config.size))
    generator = torch.Generator().manual_seed(seed)
    made = Composed(composer, others)
    drawings = [shown.portrait(number) for number in range(len(shown.ink_NSS))]
    found = [other for other, _ in look_alikes(drawings[0], others, hard, seed=seed)] if hard else []
    others_drawn = torch.randint(len(others), (half - hard,), generator=generator).tolist()
    absent = [
        *made.clips(found, hard, generator),
        *made.clips([others[row] for row in others_drawn], half - hard, generator),
    ]
    clips_all = [*made.clips(drawings, half, generator), *absent]
    rows = ask_all(clips_all, name, shown.name, KINDS, 1, generator)
    return Questions.of([Part(name, clips_all, rows)], model.vocabulary, model.config.frames, model.config.size)
