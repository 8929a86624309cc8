"""``anabranch pvchat learn``: a model learns to know a new subject, from one drawing or one clip."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli.options import AsJson, Quiet, read_assignments, setting
from anabranch.cli.output import duration, fact, print_json, say, shell_word, wrote
from anabranch.cli.progress import Progress
from anabranch.cli.pvchat.shared import (
    MODEL,
    AnyDevice,
    ChatModel,
    Groups,
    Resume,
    RunFolder,
    RunSeed,
    model_folder,
    read_groups,
    reference_in,
    shown,
)
from anabranch.cli.train import INTERRUPTED
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.files import check_apart


def learn(
    model: ChatModel,
    drawings: Annotated[
        list[str],
        typer.Argument(
            metavar="REFERENCE...",
            help="A picture of each subject, a clip (an animation, or a folder of frames) in which it alone moves, or SUBJECT:NUMBER for a "
            "drawing in the bank, e.g. cat:0.",
        ),
    ],
    names: Annotated[
        list[str],
        typer.Option(
            "--name", metavar="NAME", help="Name of the subject in angle brackets, e.g. '<Ab>'. One for each reference."
        ),
    ],
    bank: Annotated[
        Path,
        typer.Option(
            metavar="DRAWINGS",
            help="Drawings of other subjects, from which the subject is to be distinguished: a folder or zip file as for "
            "pretrain.",
        ),
    ],
    out: RunFolder,
    groups: Groups = None,
    image_steps: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Steps on first frames, before the clips. Default: 40.")
    ] = None,
    video_steps: Annotated[int | None, typer.Option(metavar="N", min=0, help="Steps on clips. Default: 80.")] = None,
    seed: RunSeed = None,
    resume: Resume = False,
    device: AnyDevice = "auto",
    assignments: Annotated[list[str] | None, setting("data.positives=8")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Learn a new subject from one drawing or one clip, with clips of it and of the most similar drawings in the bank.

    What moves in a clip is cut out of its frames. With several references, several subjects are learned at once. MODEL stays as it is; to
    add more subjects later, start from DIR.

    Example: anabranch pvchat learn runs/base cat.png --name '<cat>' --bank drawings --out runs/cat
    """
    require("lm", "images", "numba", by="anabranch pvchat learn", of="graph")
    from anabranch.config import override
    from anabranch.heads.pvchat import Learning, PVChat, portraits, read_drawings
    from anabranch.heads.pvchat import learn as run
    from anabranch.heads.pvchat.cut_out import views_of

    if len(names) != len(drawings) or len(set(names)) != len(names):
        raise ConfigError(
            f"{len(drawings)} references and {len(set(names))} different names; give a --name for each, in the same order"
        )
    said = {
        "image_steps": image_steps,
        "video_steps": video_steps,
        "seed": seed,
        "data.seed": seed,
    }
    config = override(
        Learning(),
        {**{key: value for key, value in said.items() if value is not None}, **read_assignments(assignments)},
    )
    folder = model_folder(model)
    check_apart([out], [folder, bank, *drawings])
    chat = PVChat.load(folder)
    subjects = read_drawings(bank, groups=read_groups(groups))
    references = {name: reference_in(drawing, subjects, bank) for name, drawing in zip(names, drawings, strict=True)}
    before = {"images": 0, "videos": config.image_steps}
    progress = Progress(config.image_steps + config.video_steps, "step", quiet=quiet)
    with progress, warnings.catch_warnings():
        # They are told below, in a line each.
        warnings.filterwarnings("ignore", message=".* has no (negatives|positives): ", category=UserWarning)
        learned = run(
            chat,
            references,
            portraits(subjects),
            out,
            config,
            resume=resume,
            device=device,
            on_event=shown(progress, before.__getitem__),
        )
    for balance in learned.balance.values():
        for warning in balance.warnings:
            say(f"warning: {warning}")
    last = list(learned.stages.values())[-1]
    told: dict[str, Any] = {
        "folder": str(out),
        "status": last.status,
        "subjects": {
            name: {
                "subject": reference.subject,
                "views": len(views_of(reference)),
                "balance": asdict(learned.balance[name]),
                "look_alikes": [{"subject": subject, "cosine": cosine} for subject, cosine in learned.found[name]],
            }
            for name, reference in references.items()
        },
        "stages": {stage: {"step": result.step, "seconds": result.seconds} for stage, result in learned.stages.items()},
    }
    if learned.is_finished:
        chat.save(out / MODEL)
        told["model"] = str(out / MODEL)
    if as_json:
        print_json(told)
    else:
        _tell(told, out)
    if last.status == "interrupted":
        raise typer.Exit(INTERRUPTED.get(last.signal or "", 130))


def _tell(told: dict[str, Any], out: Path) -> None:
    for name, each in told["subjects"].items():
        balance = each["balance"]
        clips = ", ".join(f"{count} {source}" for source, count in balance["clips"].items())
        cut = f", cut out of {each['views']} frames" if each["views"] > 1 else ""
        fact(
            "subject",
            f"{name}   {each['subject']}{cut}: {clips} clips; {balance['yes_share']:.2f} of the answers are yes",
        )
        near = list(dict.fromkeys(found["subject"] for found in each["look_alikes"]))
        if near:
            fact("near", f"{', '.join(near[:4])}")
    work = [f"{stage} {found['step']} steps in {duration(found['seconds'])}" for stage, found in told["stages"].items()]
    fact("work", ", ".join(work))
    first = f"is {next(iter(told['subjects']))} here ?"
    if told["status"] == "finished":
        wrote(
            told["model"],
            f"anabranch pvchat ask {shell_word(out)} CLIP {shell_word(first)}",
        )
    else:
        wrote(str(out), "the same line with --resume")
