"""``anabranch adapters fuse``: a model with an adapter in it, which every command takes as a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.adapters.placing import check_adapter_apart
from anabranch.cli.options import FLAG, AsJson, Device, Dtype, Quiet, load
from anabranch.cli.output import fact, print_json, shell_word, visible, wrote
from anabranch.extras import require


def fuse(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The base of the adapter.")],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A folder of peft's or of anabranch adapt.")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="Folder for the new model.")],
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of an adapter that routes by task: the one task that the model is for."),
    ] = None,
    beside: Annotated[
        bool,
        typer.Option("--beside", metavar=FLAG, help="Leave it beside the matrices, also where they could take it in."),
    ] = False,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write the model with an adapter in it: in its matrices where they can take it in, beside or in front of them otherwise.

    What comes out is a model: generate, eval, serve and convert take it. Its logits are held against those of model and adapter.

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
        fact("logits", f"{done.difference:.2g} from the adapter's at most, whose greatest is {done.greatest:.3g}")
        wrote(out, f"anabranch serve {shell_word(out)}")
