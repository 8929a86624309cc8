"""``anabranch depth report``: how routers use depth, and what that is worth, as a table and a picture."""

from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli.depth.evaluate import NAMES
from anabranch.cli.depth.shared import After, Context, Data, Limit, Source, one_of, questions_of, stack_at
from anabranch.cli.options import AsJson, Device, Dtype, Model, Quiet, Seed
from anabranch.cli.output import fact, print_json, say, table, wrote
from anabranch.extras import require
from anabranch.files import check_apart

_TABLE, _PICTURE = "report.json", "depth"


def report(
    model: Model,
    routers: Annotated[Path, typer.Option(metavar="DIR", help="Routers of anabranch depth train.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the table and the picture.")],
    source: Source = None,
    data: Data = None,
    limit: Limit = None,
    context: Context = 64,
    after: After = 16,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show which blocks the routers skip and repeat, and compare them with methods that need no routers.

    The control value goes from fewer layers to the whole model. At each value, random skipping, fixed removal of blocks and early exit
    are measured with the same number of layers. Half of the questions rank the blocks to remove; the other half is for measuring.
    """
    require("lm", "plots", by="anabranch depth report")
    from anabranch.depth.dr_llm import RouterBank, compare
    from anabranch.errors import DataError
    from anabranch.files import atomic_write_json
    from anabranch.lm.folder import files_of, run_steps
    from anabranch.report.depth import depth_files, draw_depth

    text = one_of(source, data)
    files = [out / _TABLE, *depth_files(out / _PICTURE)]
    check_apart(files, [text, routers, *files_of(model)])
    if run_steps(out):
        raise DataError(f"{out} is the folder of a training run, so no report is written there; choose another folder")
    stack, tokenizer = stack_at(model, dtype, device)
    bank = RouterBank.load(routers, stack)
    questions, name = questions_of(model, stack, tokenizer, text, context=context, after=after, limit=limit)
    half = len(questions) // 2
    measured, ranking = (questions[half:], questions[:half]) if half else (questions, questions)
    found = compare(
        stack, measured, bank, ranking, seed=seed, progress=(lambda told: None) if quiet else (lambda told: say(told))
    )
    told: dict[str, Any] = {
        "model": model,
        "data": name,
        "routers": str(routers),
        "num_blocks": stack.num_blocks,
        **found,
    }
    out.mkdir(parents=True, exist_ok=True)
    draw_depth(told, out / _PICTURE)
    atomic_write_json(out / _TABLE, told)
    if as_json:
        print_json(told)
        return
    fact("model", f"{model}   {stack.num_blocks} blocks")
    fact("data", f"{name}   {len(measured)} prompts")
    headers = ["control", "layers/token", *(f"{label}\nagreement" for label in NAMES.values())]
    table(
        headers,
        [
            [
                f"{row['control']:g}",
                f"{row['routed']['layers_per_token']:.2f}",
                *(f"{row[key]['agreement']:.1%}" for key in NAMES),
            ]
            for row in found["curve"]
        ],
    )
    wrote(f"{out}/{{{_TABLE}, {_PICTURE}.png, {_PICTURE}.svg}}", f"open {out / _PICTURE}.png")
