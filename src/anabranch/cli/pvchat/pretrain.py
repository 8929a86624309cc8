"""``anabranch pvchat pretrain``: a model that answers questions about clips of many drawn subjects."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from anabranch.cli.options import AsJson, Quiet, read_assignments, setting
from anabranch.cli.output import duration, fact, print_json, quantity, shell_word, wrote
from anabranch.cli.progress import Progress
from anabranch.cli.pvchat.shared import (
    MODEL,
    AnyDevice,
    Drawings,
    Groups,
    Resume,
    RunFolder,
    RunSeed,
    read_groups,
    share,
    shown,
)
from anabranch.cli.train import INTERRUPTED
from anabranch.extras import require
from anabranch.files import check_apart


def pretrain(
    drawings: Drawings,
    out: RunFolder,
    groups: Groups = None,
    heads: Annotated[
        Literal["relu", "topk", "none"] | None,
        typer.Option(metavar="KIND", help="Routed heads: relu (ReMoH), topk (MoH), none. Default: relu."),
    ] = None,
    clips: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Number of clips to make. Default: 4000.")
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="Optimizer steps. Default: 2500.")] = None,
    seed: RunSeed = None,
    resume: Resume = False,
    device: AnyDevice = "auto",
    assignments: Annotated[list[str] | None, setting("model.dim=96")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a model on clips made from a folder of drawings, to answer questions about each subject.

    Ctrl-C saves; the same command with --resume continues.

    Example: anabranch pvchat pretrain omniglot_background_small1.zip --groups Korean,Latin,Greek --out runs/base
    """
    require("lm", "images", by="anabranch pvchat pretrain")
    from anabranch.config import override
    from anabranch.heads.config import HeadRouting
    from anabranch.heads.pvchat import Pretraining, PVChat, read_drawings
    from anabranch.heads.pvchat import pretrain as run

    routed = HeadRouting(num_shared=5, routing=heads or "relu", target=0.5)
    said = {"clips": clips, "steps": steps, "seed": seed}
    config = override(
        Pretraining(model=PVChat.Config(heads=routed)),
        {**{name: value for name, value in said.items() if value is not None}, **read_assignments(assignments)},
    )
    check_apart([out], [drawings])
    subjects = read_drawings(drawings, groups=read_groups(groups), least=2)
    with Progress(config.steps, "step", quiet=quiet) as progress:
        model, result = run(
            subjects, out, config, resume=resume, device=device, on_event=shown(progress, lambda stage: 0)
        )
    told: dict[str, Any] = {
        "folder": str(out),
        "status": result.status,
        "subjects": len(subjects),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "step": result.step,
        "steps": config.steps,
        "seconds": result.seconds,
        "exact": result.measures.get("exact"),
        "balanced": result.measures.get("balanced"),
        "kinds": result.measures.get("kinds"),
    }
    if result.status == "finished":
        model.save(out / MODEL)
        told["model"] = str(out / MODEL)
    if as_json:
        print_json(told)
    else:
        _tell(told, out)
    if result.status == "interrupted":
        raise typer.Exit(INTERRUPTED.get(result.signal or "", 130))


def _tell(told: dict[str, Any], out: Path) -> None:
    fact("model", f"{told['subjects']} subjects, {quantity(told['parameters'])} parameters")
    fact("work", f"{told['step']} of {told['steps']} steps in {duration(told['seconds'])}")
    if told["exact"] is not None:
        exact, balanced = share(told["exact"]), share(told["balanced"])
        fact("clips", f"held out: {exact} exact, existence {balanced} balanced (chance 0.5)")
    if told["status"] == "finished":
        wrote(
            told["model"],
            f"anabranch pvchat learn {shell_word(out)} DRAWING --name '<Ab>' --bank DRAWINGS --out DIR",
        )
    else:
        wrote(str(out), "the same line with --resume")
