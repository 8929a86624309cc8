"""``anabranch pvchat ways``: of twenty subjects, each learned from one drawing, which is it?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli.options import AsJson, Quiet, read_assignments, setting
from anabranch.cli.output import fact, print_json, table, wrote
from anabranch.cli.progress import Progress
from anabranch.cli.pvchat.shared import (
    AnyDevice,
    ChatModel,
    Groups,
    Resume,
    RunSeed,
    model_folder,
    read_groups,
    share,
    shown,
)
from anabranch.cli.train import INTERRUPTED
from anabranch.extras import require
from anabranch.files import check_apart

RESULT = "ways.json"


def ways(
    model: ChatModel,
    trials: Annotated[
        Path,
        typer.Argument(metavar="RUNS", help="Omniglot's all_runs.zip, or a folder or zip file of such runs."),
    ],
    bank: Annotated[
        Path, typer.Option(metavar="DRAWINGS", help="Drawings of other subjects: a folder or zip file as for pretrain.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the runs and ways.json.")],
    only: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Only these runs, such as run01,run02. Default: all.")
    ] = None,
    groups: Groups = None,
    clips: Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="Clips of each drawing to classify.")] = 4,
    image_steps: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Steps on first frames, before the clips. Default: 200.")
    ] = None,
    video_steps: Annotated[int | None, typer.Option(metavar="N", min=0, help="Steps on clips. Default: 400.")] = None,
    seed: RunSeed = None,
    resume: Resume = False,
    device: AnyDevice = "auto",
    assignments: Annotated[list[str] | None, setting("batch_size=16")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """One-shot classification: learn the subjects of each run, each from one drawing, then classify other drawings.

    The baseline is the nearest drawing, without any learning. MODEL stays as it is.

    Example: anabranch pvchat ways runs/base all_runs.zip --bank omniglot_background_small1.zip --only run01 --out runs/ways
    """
    require("lm", "images", "numba", by="anabranch pvchat ways", of="graph")
    from anabranch.config import override
    from anabranch.files import atomic_write_json
    from anabranch.heads.pvchat import Learned, PVChat, portraits, read_drawings, read_trials
    from anabranch.heads.pvchat import ways as run
    from anabranch.heads.pvchat.trials import LEARNING

    said = {"image_steps": image_steps, "video_steps": video_steps, "seed": seed, "data.seed": seed}
    given = {name: value for name, value in said.items() if value is not None}
    config = override(LEARNING, {**given, **read_assignments(assignments)})
    folder = model_folder(model)
    check_apart([out], [folder, bank, trials])
    chat = PVChat.load(folder)
    asked = read_trials(trials, only=read_groups(only, "--only"))
    others = portraits(read_drawings(bank, groups=read_groups(groups)))
    steps = config.image_steps + config.video_steps
    found = []
    with Progress(steps * len(asked), "step", quiet=quiet) as progress:
        for number, trial in enumerate(asked):
            before = {"images": number * steps, "videos": number * steps + config.image_steps}
            result = run(
                chat,
                trial,
                others,
                out / trial.name,
                config,
                clips=clips,
                resume=resume,
                device=device,
                on_event=shown(progress, before.__getitem__),
            )
            if isinstance(result, Learned):
                wrote(str(out), "the same line with --resume")
                raise typer.Exit(INTERRUPTED.get(result.signal or "", 130))
            found.append(result)
    told: dict[str, Any] = {
        "folder": str(out),
        "right": sum(each.right for each in found) / len(found),
        "right_by_ink": sum(each.right_by_ink for each in found) / len(found),
        "chance": sum(1 / each.ways for each in found) / len(found),
        "runs": [each.to_dict() for each in found],
    }
    atomic_write_json(out / RESULT, told)
    if as_json:
        print_json(told)
        return
    rows = [[each.name, str(each.ways), share(each.right), share(each.right_by_ink)] for each in found]
    table(["run", "ways", "right", "nearest drawing"], rows)
    fact(
        "of all",
        f"{share(told['right'])} right; nearest drawing {share(told['right_by_ink'])}, chance {share(told['chance'])}",
    )
    wrote(str(out / RESULT), "anabranch study pvchat --full --arms ways-none,ways-moh,ways-remoh")
