"""``anabranch depth prune-eval``: what skipping tokens costs, beside baselines at as much work."""

from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli.depth.prune import AFTER
from anabranch.cli.depth.shared import Context, Data, Limit, questions_of, stack_at
from anabranch.cli.graph.waiting import waiting
from anabranch.cli.options import AsJson, Device, Dtype, Model, Quiet, Seed
from anabranch.cli.output import fact, print_json, table
from anabranch.extras import require


def prune_eval(
    model: Model,
    skipper: Annotated[Path, typer.Argument(metavar="SKIPPER", help="Output file of anabranch depth prune.")],
    data: Data = None,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines/--no-baselines",
            help="Also measure random tokens, positions alone, shortened prompts, and ShortGPT, with the same amount of work.",
        ),
    ] = True,
    limit: Limit = None,
    context: Context = 64,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure a skipper on what follows prompts. Tokens of the prompt are skipped; each following token runs as in decoding.

    Agreement is how often the most likely next token is that of the whole model. Saved is the share of multiply-adds in blocks that are
    not computed.

    Example: anabranch depth prune-eval SmolLM2-135M skipper.safetensors --data test.jsonl
    """
    require("lm", by="anabranch depth prune-eval")
    from anabranch.depth.ftp import Contestant, TokenSkipper, compare, evaluate_items, evaluate_path
    from anabranch.depth.influence import block_influence

    stack, tokenizer = stack_at(model, dtype, device)
    loaded = TokenSkipper.load(skipper, stack)
    questions, name = questions_of(model, stack, tokenizer, data, context=context, after=AFTER, limit=limit)
    items = [(one.prompt, one.answer) for one in questions]
    with waiting("measuring", quiet):
        if baselines:
            import torch

            influence = block_influence(stack, (torch.tensor([[*prompt, *answer]]) for prompt, answer in items))
            rows = compare(loaded, items, influence, seed=seed)
        else:
            dense = Contestant("dense", "the model as it is", evaluate_path(stack, items))
            rows = [dense, Contestant("ours", "the skipper", evaluate_items(loaded, items))]
    found = {row.name: row.found for row in rows}
    dense_nats = found["dense"].nats_per_token
    told: dict[str, Any] = {
        row.name: {
            "about": row.about,
            **row.found.to_dict(),
            "gap": row.found.nats_per_token - dense_nats,
            "agreement": row.found.agreement(found["dense"]),
        }
        for row in rows
    }
    if as_json:
        print_json({"model": model, "skipper": str(skipper), "data": name, "contestants": told})
        return
    fact("model", f"{model}   {stack.num_blocks} blocks")
    fact("data", f"{name}   {len(items)} prompts, {found['dense'].tokens:,} tokens behind them")
    report = found["ours"].report
    assert report is not None, "a skipper reports what it skipped"
    fact(
        "skipped",
        f"{report.sparsity:.3f} of the prompts' tokens on average over blocks; {report.target_sparsity:.3f} were asked for",
    )
    shown = [
        [
            row.name,
            row.about,
            f"{row.found.nats_per_token:.4f}",
            f"{told[row.name]['gap']:+.4f}",
            f"{told[row.name]['agreement']:.1%}",
            f"{row.found.saved:.1%}",
        ]
        for row in rows
    ]
    table(["", "what", "nats/token", "gap", "agreement", "saved"], shown, text_columns=2)
