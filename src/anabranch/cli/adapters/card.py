"""``anabranch adapters card``: what is in an adapter's folder, or what the catalogue knows of a method."""

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.adapters.catalogue import card_of, show_card
from anabranch.cli.options import AsJson, named_folder
from anabranch.cli.output import fact, print_json, quantity, shell_word, size, visible
from anabranch.extras import require

if TYPE_CHECKING:
    from anabranch.adapters import Adapter


def card(
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER|METHOD",
            callback=named_folder,
            help="An adapter that peft or anabranch adapt saved, or a method of anabranch adapters list.",
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Show what an adapter is: its kind, the layers it changes, and what else it contains. Or describe a method.

    All weights of the adapter are read, so a damaged one is reported. A folder takes precedence over a method of the same name.
    """
    require("lm", by="anabranch adapters card")
    from anabranch.adapters import read_peft
    from anabranch.adapters.adapt import method_names
    from anabranch.adapters.catalogue import CARDS
    from anabranch.adapters.own_folder import is_own
    from anabranch.adapters.peft_tables import is_by_peft
    from anabranch.lm.tensors import some

    if not Path(adapter).exists() and (adapter in CARDS or adapter in method_names() or _is_word(adapter)):
        show_card(card_of(adapter), as_json)
        return
    if is_own(adapter):
        _show_own(adapter, as_json)
        return
    if is_by_peft(adapter):
        _show_by_peft(adapter, as_json)
        return
    found = read_peft(adapter)
    num_bytes = sum(path.stat().st_size for path in Path(adapter).glob("adapter_*") if path.is_file())
    told = {
        "adapter": adapter,
        "kind": found.what,
        "base": found.table.get("base_model_name_or_path"),
        "layers": len(found.layers),
        "stacked_layers": len(found.stacks),
        "targets": sorted({name.rpartition(".")[2] for name in (*found.layers, *found.stacks)}),
        **_sizes(found),
        "brings_whole": sorted(found.saved),
        "copies": sorted(found.copies),
        "parameters": found.num_parameters,
        "size_bytes": num_bytes,
    }
    if as_json:
        print_json(told)
        return
    base = (
        shell_word(told["base"]) if isinstance(told["base"], str) and told["base"] else "a base that it does not name"
    )
    fact("adapter", f"{adapter}   {found.what} for {base}")
    if found.prompt_MW is None:
        stacked = f" and {len(found.stacks)} stacks of experts" if found.stacks else ""
        fact("layers", f"{len(found.layers)}{stacked}: {', '.join(told['targets'])}")
    for name, line in _lines(told):
        fact(name, line)
    if found.saved:
        fact("whole", ", ".join(sorted(found.saved)[:6]) + (" ..." if len(found.saved) > 6 else ""))
    if found.copies:
        fact("copies", f"{some(sorted(found.copies))}, of the base")
    fact("size", f"{quantity(found.num_parameters)} parameters, {size(num_bytes)}")


def _show_by_peft(adapter: str, as_json: bool) -> None:
    """One of a kind that peft computes, by its files alone."""
    from anabranch.adapters.peft_tables import described_by_peft

    found = described_by_peft(adapter)
    if as_json:
        print_json({"adapter": adapter, **found})
        return
    base = (
        shell_word(found["base"])
        if isinstance(found["base"], str) and found["base"]
        else "a base that it does not name"
    )
    fact("adapter", f"{visible(adapter)}   {found['kind']} for {base}, computed by peft (the extra peft)")
    fact("layers", _some_names(found["targets"]))
    fact("size", f"{quantity(found['parameters'])} numbers, {size(found['size_bytes'])}")


def _show_own(adapter: str, as_json: bool) -> None:
    """One of our own form, of which base and sizes stand in its own files."""
    from anabranch.adapters.own_folder import described_in

    found = described_in(adapter)
    if as_json:
        print_json({"adapter": adapter, **found})
        return
    base = shell_word(found["base"]) if found["base"] else "a base that it does not name"
    fact("adapter", f"{visible(adapter)}   {', '.join(found['kinds'])} for {base}")
    for pattern, kind in found["layers"].items():
        fact("layers", f"{visible(pattern)}   {kind}")
    if found["tasks"]:
        fact("tasks", f"{len(found['tasks'])}: {_some_names(found['tasks'])}")
    fact("size", f"{quantity(found['parameters'])} numbers, {size(found['size_bytes'])}")


def _some_names(names: list[str]) -> str:
    """The first of them, as a terminal may show them."""
    return ", ".join(map(visible, names[:6])) + (", ..." if len(names) > 6 else "")


def _is_word(adapter: str) -> bool:
    """Whether it looks like a method's id, and not like a place."""
    from anabranch.adapters.catalogue import CARDS

    return bool(difflib.get_close_matches(adapter, CARDS, n=1, cutoff=0.6))


def _sizes(found: "Adapter") -> dict[str, Any]:
    """What there is to say of the numbers of its kind."""
    layers: list[Any] = [*found.layers.values(), *found.stacks.values()]
    if found.prompt_MW is not None:
        return {"virtual_tokens": len(found.prompt_MW)}
    if found.what == "IA3":
        inputs = sum(one.is_input for one in layers)
        return {"of_inputs": inputs, "of_outputs": len(layers) - inputs}
    if found.what == "Poly":
        first = layers[0]
        splits, skills, _, rank = first.a_SKPR.shape
        return {"ranks": [rank], "tasks": len(first.logit_TX), "skills": skills, "splits": splits}
    ranks, alphas = (sorted({getattr(layer, name) for layer in layers}) for name in ("rank", "alpha"))
    return {"ranks": ranks, "alphas": alphas, "rslora": any(layer.rslora for layer in layers)}


def _lines(told: dict[str, Any]) -> list[tuple[str, str]]:
    """`_sizes`, for people."""
    if "virtual_tokens" in told:
        return [("tokens", f"{told['virtual_tokens']} virtual ones in front of every sequence")]
    if "of_inputs" in told:
        return [("factors", f"of what {told['of_inputs']} layers get and {told['of_outputs']} give")]
    if "tasks" in told:
        mixed = f"{told['tasks']} tasks mix {told['skills']} skills of rank {told['ranks'][0]}"
        return [("tasks", mixed + (f" in {told['splits']} splits" if told["splits"] > 1 else ""))]
    scaling = "alpha / sqrt(rank)" if told["rslora"] else "alpha / rank"
    return [("rank", f"{_span(told['ranks'])}   alpha {_span(told['alphas'])}, scale {scaling}")]


def _span(values: list[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
