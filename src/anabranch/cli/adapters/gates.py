"""``anabranch adapters gates``: gates of an adapter from rows of its task, without training."""

from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.adapters.placing import template_of
from anabranch.cli.options import AsJson, Device, Dtype, named_folder, read_device, read_dtype
from anabranch.cli.output import fact, print_json, visible, wrote
from anabranch.errors import ConfigError, DataError
from anabranch.extras import require
from anabranch.files import read_json

# Rows of a pass.
_BATCH = 8


def gates(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", callback=named_folder, help="An adapter in peft's format, plain LoRA.")
    ],
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="The base model of the adapter.")],
    data: Annotated[str, typer.Option("--data", metavar="DATA", help="Rows of its task as JSON lines.")],
    task: Annotated[str | None, typer.Option(metavar="NAME", help="Only rows of this task.")] = None,
    rows: Annotated[int, typer.Option(metavar="N", min=1, help="Rows used.")] = 32,
    max_tokens: Annotated[int, typer.Option(metavar="L", min=2, help="Maximum number of tokens in a row.")] = 256,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Write gates into an adapter's folder (glider.safetensors) without training: the mean magnitude of what goes into each matrix that
    the adapter adapts, over rows of its task. Instructions are kept, and gates that are there are not replaced.

    To train gates instead: anabranch adapt MODEL DATA --method gate --set method.adapter=ADAPTER --out DIR

    Example: anabranch adapters gates pool/sql --model SmolLM2-135M --data sql.jsonl
    """
    require("lm", by="anabranch adapters gates")
    from anabranch.adapters.adapt.rows import encoded, read_rows
    from anabranch.adapters.base_name import BASE, warn_of_base
    from anabranch.adapters.glider import activations_of_rows, describe_expert
    from anabranch.adapters.glider.folder import GATES
    from anabranch.adapters.peft_place import CONFIG, check_there
    from anabranch.lm import load_model

    place = Path(adapter) / GATES
    check_there(Path(adapter))
    _check_none(place)
    found = [row for row in read_rows(data) if task is None or row.task == task][:rows]
    if not found:
        raise ConfigError(f"--task is {task!r}, of which {data} has no rows")
    template = template_of(None, adapter)
    warn_of_base(f"the adapter {adapter}", read_json(Path(adapter) / CONFIG).get(BASE), model)
    base, tokenizer = load_model(model, dtype=read_dtype(dtype), device=read_device(device))
    if tokenizer is None:
        raise DataError(f"{model} has no tokenizer, so rows cannot be read")
    import torch

    texts = encoded(found, [0] * len(found), tokenizer, template, min(max_tokens, base.config.max_positions))
    passes = texts.passes(torch.arange(len(found)), _BATCH, base.embedding.weight.device)
    made = activations_of_rows(adapter, base, ((token_BL, mask_BL) for token_BL, mask_BL, _ in passes))
    # Computing took its time, and somebody else may have written some.
    _check_none(place)
    describe_expert(adapter, gate={name: gate_C.cpu() for name, gate_C in made.items()})
    if as_json:
        print_json({"adapter": adapter, "model": model, "data": data, "rows": len(found), "layers": sorted(made)})
        return
    fact("gates", f"{len(made)} layers of {visible(adapter)}, from {len(found)} rows of {visible(data)}")
    wrote(str(place), f'anabranch adapters route POOL "QUERY" --model {model}')


def _check_none(place: Path) -> None:
    # A link to nowhere is one, too.
    if place.exists() or place.is_symlink():
        raise DataError(f"{place.parent} has gates already ({place.name}); move them elsewhere first")
