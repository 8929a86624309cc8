"""``anabranch adapters fuse``: a model with an adapter in it, which every command takes as a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.adapters.placing import check_adapter_apart
from anabranch.cli.options import FLAG, AsJson, Device, Dtype, Quiet, load, named_folder
from anabranch.cli.output import fact, print_json, shell_word, visible, wrote
from anabranch.extras import require


def fuse(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The base model of the adapter.")],
    adapter: Annotated[
        str,
        typer.Argument(metavar="ADAPTER", callback=named_folder, help="An adapter that peft or anabranch adapt saved."),
    ],
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="Folder for the new model.")],
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="For an adapter that routes by task: the task the model is for."),
    ] = None,
    beside: Annotated[
        bool,
        typer.Option("--beside", metavar=FLAG, help="Keep it as extra layers everywhere; merge nothing."),
    ] = False,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write a model that contains the adapter: merged into its weights where that is possible, else as extra layers.

    The result is a model for generate, eval, serve and convert. Its logits are compared with those of the model with the adapter.

    Example: anabranch adapters fuse SmolLM2-135M runs/mine/adapter --out mine && anabranch serve mine
    """
    require("lm", by="anabranch adapters fuse")
    from anabranch.adapters.fusing import fuse_adapter
    from anabranch.lm import save_model

    check_adapter_apart([Path(out)], model, adapter)
    base, tokenizer = load(model, dtype, device)
    done = fuse_adapter(base, adapter, task=task, beside=beside)
    save_model(out, base, tokenizer)
    if as_json:
        told = {"folder": out, "model": model, "adapter": adapter, "task": task, "merged": done.merged}
        print_json({**told, "difference": done.difference, "greatest_logit": done.greatest})
        return
    if not quiet:
        where = "in its matrices" if done.merged else "beside its matrices, which cannot take it in"
        fact("model", f"{visible(model)} with {visible(adapter)}   {where if not beside else 'beside its matrices'}")
        fact(
            "logits",
            f"differ from the adapted model's by at most {done.difference:.2g}   (the largest is {done.greatest:.3g})",
        )
        wrote(out, f"anabranch serve {shell_word(out)}")
