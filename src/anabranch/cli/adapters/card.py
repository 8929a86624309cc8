"""``anabranch adapters card``: what is in an adapter's folder."""

from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli.options import AsJson
from anabranch.cli.output import fact, print_json, quantity, size
from anabranch.extras import require


def card(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A folder of peft's with a LoRA adapter.")],
    as_json: AsJson = False,
) -> None:
    """Show what an adapter changes: which layers, of what rank and scale, and what it brings beside.

    All of its numbers are read, so an adapter that is damaged is told.
    """
    require("lm", by="anabranch adapters card")
    from anabranch.adapters import read_peft

    found = read_peft(adapter)
    layers: list[Any] = [*found.pairs.values(), *found.stacks.values()]
    ranks, alphas = (sorted({getattr(layer, name) for layer in layers}) for name in ("rank", "alpha"))
    targets = sorted({name.rpartition(".")[2] for name in (*found.pairs, *found.stacks)})
    num_bytes = sum(path.stat().st_size for path in Path(adapter).glob("adapter_*"))
    told = {
        "adapter": adapter,
        "base": found.table.get("base_model_name_or_path"),
        "layers": len(found.pairs),
        "stacked_layers": len(found.stacks),
        "targets": targets,
        "ranks": ranks,
        "alphas": alphas,
        "rslora": any(layer.rslora for layer in layers),
        "brings_whole": sorted(found.saved),
        "parameters": found.num_parameters,
        "size_bytes": num_bytes,
    }
    if as_json:
        print_json(told)
        return
    fact("adapter", f"{adapter}   LoRA for {told['base'] or 'a base that it does not name'}")
    stacked = f" and {len(found.stacks)} stacks of experts" if found.stacks else ""
    fact("layers", f"{len(found.pairs)}{stacked}: {', '.join(targets)}")
    scaling = "alpha / sqrt(rank)" if told["rslora"] else "alpha / rank"
    fact("rank", f"{_span(ranks)}   alpha {_span(alphas)}, scale {scaling}")
    if found.saved:
        fact("whole", ", ".join(sorted(found.saved)[:6]) + (" ..." if len(found.saved) > 6 else ""))
    fact("size", f"{quantity(found.num_parameters)} parameters, {size(num_bytes)}")


def _span(values: list[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
