"""``anabranch adapters card``: what is in an adapter's folder, or what the catalogue knows of a method."""

import difflib
from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli.adapters.catalogue import show_card
from anabranch.cli.options import AsJson
from anabranch.cli.output import fact, print_json, quantity, size
from anabranch.extras import require


def card(
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER|METHOD", help="A folder of peft's with an adapter, or a method of anabranch adapters list."
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Show what an adapter changes: which layers, of what rank and scale, and what it brings beside; or what a method is.

    All numbers of an adapter are read, so one that is damaged is told. A folder goes before a method of the same name.
    """
    require("lm", by="anabranch adapters card")
    from anabranch.adapters import read_peft
    from anabranch.adapters.catalogue import CARDS, find

    if not Path(adapter).exists() and (adapter in CARDS or _is_word(adapter)):
        show_card(find(adapter), as_json)
        return
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


def _is_word(adapter: str) -> bool:
    """Whether it looks like a method's id, and not like a place."""
    from anabranch.adapters.catalogue import CARDS

    return bool(difflib.get_close_matches(adapter, CARDS, n=1, cutoff=0.6))


def _span(values: list[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
