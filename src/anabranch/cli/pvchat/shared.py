"""What the commands of ``anabranch pvchat`` share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.bounds import MOST_SEED
from anabranch.cli.options import FLAG
from anabranch.cli.output import table
from anabranch.cli.progress import Progress
from anabranch.errors import ConfigError, DataError

if TYPE_CHECKING:
    from anabranch.heads.pvchat import Portrait, Score, Subject
    from anabranch.train import Event

MODEL = "model"
Drawings = Annotated[
    Path,
    typer.Argument(metavar="DRAWINGS", help="A folder or zip file with a folder of pictures for each subject."),
]
Groups = Annotated[
    str | None,
    typer.Option(metavar="NAME,...", help="Only the subjects in these folders, such as alphabets. Default: all."),
]
ChatModel = Annotated[Path, typer.Argument(metavar="MODEL", help="A model that pretrain or learn made.")]
RunFolder = Annotated[
    Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the run; the model is DIR/model.")
]
RunSeed = Annotated[
    int | None, typer.Option(metavar="S", min=0, max=MOST_SEED, help="Seed of all random choices. Default: 0.")
]
Resume = Annotated[
    bool, typer.Option("--resume", metavar=FLAG, help="Continue the run in DIR that the same command started.")
]
AnyDevice = Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, auto.")]
Name = Annotated[str, typer.Option(metavar="NAME", help="Name of the subject in angle brackets, e.g. '<Ab>'.")]


def read_groups(text: str | None, option: str = "--groups") -> list[str] | None:
    """The names in ``A,B``. Raises ConfigError for an empty one."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ConfigError(f"{option} is {text!r}; write names with commas between them, such as Greek,Latin")
    return names


def model_folder(path: Path) -> Path:
    """Where a model lies: the folder itself, or ``model`` in that of a run. Raises DataError where there is none yet."""
    inner = path / MODEL
    if (inner / "config.json").is_file():
        return inner
    if (path / "checkpoints").is_dir() or (path / "images").is_dir() or (path / "videos").is_dir():
        raise DataError(f"the run in {path} has not finished, so it holds no model yet; go on with --resume")
    if not (path / "config.json").is_file():
        raise DataError(f"there is no model in {path}; make one with anabranch pvchat pretrain")
    return path


def reference_in(text: str, subjects: Sequence[Subject], bank: Path) -> Portrait:
    """What is meant: a picture or a clip, or ``SUBJECT`` or ``SUBJECT:NUMBER`` of the bank. Raises DataError for what is neither."""
    from anabranch.heads.pvchat import read_reference

    named = {subject.name: subject for subject in subjects}
    found = re.fullmatch(r"(.+?)(?::(\d{1,6}))?", text, re.DOTALL)
    if found and found[1] in named:
        return named[found[1]].portrait(int(found[2] or 0))
    path = Path(text)
    if not path.exists():
        near = ", ".join(list(named)[:3])
        raise DataError(f"{text} is neither a picture or clip nor a subject of {bank}, which has {near}, ...")
    # One of the bank's own drawings is of that subject.
    places = {(bank / name).resolve(): name for name in named if (bank / name).is_dir()}
    if path.resolve() in places:
        own = places[path.resolve()]
        raise DataError(f"{text} holds drawings of {own} in the bank; name one, as {own}:0")
    whose = places.get(path.resolve().parent)
    return read_reference(path, whose)


def shown(progress: Progress, total: Callable[[str], int]) -> Callable[[str, Event], None]:
    """What tells a progress bar of the events of several stages; ``total`` is how many steps were done before a stage."""

    def tell(stage: str, event: Event) -> None:
        if event.kind == "step":
            progress.update(total(stage) + event.step, f"{stage}  loss {event.values['loss']:.3f}")
        elif event.kind == "evaluation":
            found: Any = event.values
            exact, balanced = share(found["exact"]), share(found["balanced"])
            progress.note(f"held-out clips: {exact} exact, existence {balanced} balanced")

    return tell


def share(value: float | None) -> str:
    """``0.250``, or a dash for what is not known."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def print_score(score: Score) -> None:
    """A row for each kind of question."""
    rows = [
        [kind, share(found.exact), share(found.present), share(found.absent), str(found.count)]
        for kind, found in score.kinds.items()
    ]
    table(["question", "exact", "it is there", "it is not", "asked"], rows)
