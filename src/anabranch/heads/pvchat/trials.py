"""N-way one-shot: of N subjects a model gets ONE drawing each, and says of new clips, each of one of them, which it is.

    all_runs.zip/run01/training/class01.png    one drawing of each of 20 characters, by one person
    all_runs.zip/run01/test/item01.png         one more of each, by another
    all_runs.zip/run01/class_labels.txt        run01/test/item01.png run01/training/class08.png

    odds(clip, n) = log P(yes | clip, "is n in the video ?") - log P(no | ...)
    choice = argmax over n of the mean of odds(clip, n) over clips and wordings

Omniglot's ``python/one-shot-classification/all_runs.zip`` (brendenlake/omniglot, MIT) is read as it is. All N are learned at once, so that
each is among those that the others are told apart from. Beside it stands what drawings alone tell: the nearest by `InkEmbedder`.
"""
# Shapes: N tests, W ways, C clips of a test, B of a batch, L positions

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import DataError
from anabranch.extras import require
from anabranch.files import atomic_write_json, read_json
from anabranch.heads.pvchat.clips import Clip, Composer, fitted
from anabranch.heads.pvchat.drawings import Opened, Portrait, is_picture, read_ink
from anabranch.heads.pvchat.generators import Composed, InkEmbedder
from anabranch.heads.pvchat.learn import Learned, Learning, OnEvent, learn
from anabranch.heads.pvchat.model import PVChat
from anabranch.heads.pvchat.one_shot import OneShotSet
from anabranch.heads.pvchat.questions import question
from anabranch.train.evaluate import evaluation_mode

__all__ = ["LEARNING", "Trial", "Ways", "odds", "read_trials", "ways"]

LABELS, TRAINING, TEST, RESULT = "class_labels.txt", "training", "test", "ways.json"
# Of twenty subjects at once: about as many clips and steps for all of them as for ten that are learned one by one.
LEARNING = Learning(
    data=OneShotSet.Config(positives=5, augmented=15, hard_negatives=10, easy_negatives=10, wordings=2),
    image_steps=200,
    video_steps=400,
    batch_size=32,
)


@dataclass(frozen=True, eq=False)
class Trial:
    """One run of the task.

    Attributes:
        name: its folder, ``run01``.
        references: one drawing of each of W subjects.
        tests: N drawings, each of one of them.
        answer_N: of each test, the place of its subject among the references.
    """

    name: str
    references: tuple[Portrait, ...]
    tests: tuple[Portrait, ...]
    answer_N: tuple[int, ...]

    @property
    def names(self) -> list[str]:
        """What the subjects are called: ``<s01>`` and so on."""
        return [f"<s{number + 1:02}>" for number in range(len(self.references))]


@dataclass(frozen=True)
class Ways:
    """What came of a trial.

    Attributes:
        name: of the trial.
        ways: W.
        answer_N: the right places.
        chosen_N: those that the model chose.
        by_ink_N: those of the drawings that are nearest by `InkEmbedder`: nothing is learned there.
        activation_A: of each attention with routed heads, the share of (token, routed head) pairs that were on meanwhile; empty where
            none are routed.
    """

    name: str
    ways: int
    answer_N: tuple[int, ...]
    chosen_N: tuple[int, ...]
    by_ink_N: tuple[int, ...]
    activation_A: tuple[float, ...] = ()

    @property
    def right(self) -> float:
        """Share of the tests that the model chose right; by chance it is 1 / W."""
        return _right(self.chosen_N, self.answer_N)

    @property
    def right_by_ink(self) -> float:
        """Likewise of the nearest drawing."""
        return _right(self.by_ink_N, self.answer_N)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "name": self.name,
            "ways": self.ways,
            "right": self.right,
            "right_by_ink": self.right_by_ink,
            "answers": list(self.answer_N),
            "chosen": list(self.chosen_N),
            "by_ink": list(self.by_ink_N),
            "activation": list(self.activation_A),
        }


def _right(chosen: Sequence[int], answers: Sequence[int]) -> float:
    return sum(one == other for one, other in zip(chosen, answers, strict=True)) / len(answers)


# Trials


def read_trials(place: str | Path, *, only: Sequence[str] | None = None) -> list[Trial]:
    """The runs in a folder or a zip, by name.

    Args:
        place: see the module.
        only: names of runs; None for all.

    Raises DataError if there is none, or one of ``only`` is not there; for a run without labels, or with ones that do not fit its pictures;
    and as `read_drawings`.
    """
    require("pillow", by="reading drawings", of="images")
    place = Path(place)
    pictures: dict[str, dict[str, dict[str, Callable[[], bytes]]]] = {}
    labels: dict[str, Callable[[], bytes]] = {}
    with Opened(place, takes=lambda path: path.name == LABELS or is_picture(path)) as files:
        for path, read in files:
            if path.name == LABELS:
                labels[path.parent.name] = read
            elif path.parent.name in (TRAINING, TEST):
                run = pictures.setdefault(path.parent.parent.name, {TRAINING: {}, TEST: {}})
                run[path.parent.name][path.name] = read
        missing = [name for name in only or () if name not in pictures]
        if missing:
            raise DataError(f"{place} has no run {missing[0]!r}; it has {', '.join(sorted(pictures)[:4]) or 'none'}")
        chosen = sorted(pictures if only is None else only)
        if not chosen:
            raise DataError(
                f"{place} has no runs: folders with {TRAINING}/, {TEST}/ and {LABELS}, as Omniglot's all_runs.zip has them"
            )
        return [_trial(name, pictures[name], labels.get(name), f"{place}: {name}") for name in chosen]


def _trial(
    name: str, pictures: dict[str, dict[str, Callable[[], bytes]]], labels: Callable[[], bytes] | None, where: str
) -> Trial:
    if labels is None:
        raise DataError(f"{where} has no {LABELS}, which says of whom the drawings in {TEST} are")
    pairs = _pairs(labels(), where)
    training, test = sorted(pictures[TRAINING]), sorted(pictures[TEST])
    for kind, named, there in ((TEST, set(pairs), test), (TRAINING, set(pairs.values()), training)):
        absent = sorted(named - set(there))
        if absent:
            raise DataError(f"{where}/{LABELS} names {kind}/{absent[0]}, which is not there")
    unlabelled = sorted(set(test) - set(pairs))
    if unlabelled or not test:
        raise DataError(f"{where}/{LABELS} says nothing of {TEST}/{unlabelled[0] if unlabelled else '*'}")
    if len(training) < 2:
        raise DataError(f"{where} has {len(training)} drawings in {TRAINING}; to choose, there must be two at least")
    subjects = [f"{name}/{PurePosixPath(file).stem}" for file in training]
    answers = tuple(training.index(pairs[file]) for file in test)
    references = tuple(
        Portrait(subject, read_ink(pictures[TRAINING][file](), f"{where}/{TRAINING}/{file}"))
        for subject, file in zip(subjects, training, strict=True)
    )
    tests = tuple(
        Portrait(subjects[answer], read_ink(pictures[TEST][file](), f"{where}/{TEST}/{file}"))
        for answer, file in zip(answers, test, strict=True)
    )
    return Trial(name, references, tests, answers)


def _pairs(held: bytes, where: str) -> dict[str, str]:
    """Of each test picture, the training picture of the same subject, by the names of the files."""
    try:
        lines = held.decode().splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{where}/{LABELS} is no text in UTF-8") from None
    pairs: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if len(words) not in (0, 2):
            raise DataError(f"{where}/{LABELS}, line {number}: it must name a picture of {TEST} and one of {TRAINING}")
        if words:
            pairs[PurePosixPath(words[0]).name] = PurePosixPath(words[1]).name
    return pairs


# The task


@torch.no_grad()
def odds(
    model: PVChat, clips: Sequence[Clip], names: Sequence[str], *, wordings: int = 2, batch_size: int = 64
) -> Tensor:
    """odds_NW, float32: of each clip and each name log P(yes) - log P(no), a mean over the first ``wordings`` of asking.

    Raises InputError for a name that the model does not know.
    """
    yes, no = (model.vocabulary.encode(word)[0] for word in ("yes", "no"))
    device = model.queries.query.device
    subject_W = torch.tensor(model.rows_of(names)[1])
    frame_NFCHW = torch.stack([fitted(clip, model.config.frames, model.config.size) for clip in clips])
    # A name is one word, so that all ways to ask in one wording are of one length.
    token_KWL = [
        torch.tensor([model.vocabulary.encode(question("existence", name, turn)) for name in names])
        for turn in range(wordings)
    ]
    made = torch.zeros(len(clips) * len(names))
    with evaluation_mode(model):
        for row_B in torch.arange(len(made)).split(batch_size):
            clip_B, way_B = row_B // len(names), row_B % len(names)
            look_BQD = model.look(frame_NFCHW[clip_B].to(device), subject_W[way_B].unsqueeze(1).to(device))
            for token_WL in token_KWL:
                logits_BV = model.logits(look_BQD, token_WL[way_B].unsqueeze(1).to(device))[:, 0, -1]
                made[row_B] += (logits_BV[:, yes] - logits_BV[:, no]).float().cpu() / wordings
    return made.view(len(clips), len(names))


def ways(
    model: PVChat,
    trial: Trial,
    bank: Sequence[Portrait],
    out: str | Path,
    config: Learning = LEARNING,
    *,
    clips: int = 4,
    resume: bool = False,
    device: str = "auto",
    on_event: OnEvent = lambda stage, event: None,
) -> Ways | Learned:
    """Let a copy of ``model`` learn the subjects of a trial, and choose; what was learned so far where that was interrupted.

    Args:
        model: a pretrained one, which stays as it is.
        trial: see `read_trials`.
        bank: drawings of others.
        out: folder of the runs; the result is ``ways.json`` in it.
        config: how the subjects are learned.
        clips: of each test, over which the odds are averaged.
        resume: take the result in ``out`` if it is there, else go on with the runs in it.
        device: of training.
        on_event: as of `learn`.

    Raises as `learn`.
    """
    out = Path(out)
    if resume and (out / RESULT).is_file():
        return _read(out / RESULT, trial)
    known = copy.deepcopy(model)
    references = dict(zip(trial.names, trial.references, strict=True))
    learned = learn(known, references, bank, out, config, resume=resume, device=device, on_event=on_event)
    if not learned.is_finished:
        return learned
    composer = Composed(Composer(Composer.Config(frames=model.config.frames, size=model.config.size)))
    # Far from the seeds of what was learned from.
    generator = torch.Generator().manual_seed(config.seed ^ 2**41)
    seen = [clip for test in trial.tests for clip in composer.clips([test], clips, generator)]
    for module in known.routed():
        module.forget()
    odds_NCW = odds(known, seen, trial.names).view(len(trial.tests), clips, len(trial.references))
    chosen = tuple(odds_NCW.mean(1).argmax(-1).tolist())
    told = [module.report()["activation"] for module in known.routed()]
    on = tuple(rate for rate in told if rate is not None)
    found = Ways(trial.name, len(trial.references), trial.answer_N, chosen, by_ink(trial), on)
    atomic_write_json(out / RESULT, found.to_dict())
    return found


def by_ink(trial: Trial) -> tuple[int, ...]:
    """Of each test the reference that is nearest by the vectors of `InkEmbedder`."""
    embedder = InkEmbedder()
    test_ND, reference_WD = (
        torch.nn.functional.normalize(torch.from_numpy(embedder.embed(list(drawn))), dim=1)
        for drawn in (trial.tests, trial.references)
    )
    return tuple((test_ND @ reference_WD.T).argmax(-1).tolist())


def _read(path: Path, trial: Trial) -> Ways:
    """A result that was written. Raises DataError for one of another trial, or a damaged one."""
    held = read_json(path)
    try:
        answers, chosen, near = (tuple(int(each) for each in held[name]) for name in ("answers", "chosen", "by_ink"))
        # Results of before do not tell it.
        on = tuple(float(each) for each in held.get("activation", ()))
        found = Ways(str(held["name"]), int(held["ways"]), answers, chosen, near, on)
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path} holds no result of a trial; remove it, and the trial is run again") from None
    if (found.name, found.ways, found.answer_N) != (trial.name, len(trial.references), trial.answer_N):
        raise DataError(f"{path} is of another trial than {trial.name}; choose another folder")
    if not len(found.chosen_N) == len(found.by_ink_N) == len(found.answer_N):
        raise DataError(f"{path} holds no result of a trial; remove it, and the trial is run again")
    return found
