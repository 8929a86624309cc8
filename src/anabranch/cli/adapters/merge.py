"""``anabranch adapters merge``: one adapter out of several."""

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from anabranch.cli.options import AsJson, Quiet
from anabranch.cli.output import fact, print_json, quantity, shell_word, size, wrote
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.files import check_apart


def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER...", help="Folders of peft's, each with a LoRA adapter of one base model."),
    ],
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="The new folder.")],
    weights: Annotated[
        str | None,
        typer.Option(metavar="W,W,...", help="What each is multiplied by; negative ones take away. Default: 1 each."),
    ] = None,
    method: Annotated[
        Literal["exact", "svd", "linear"],
        typer.Option(
            help="exact: the weighted sum, of all ranks together. svd: the best of a lower rank. linear: halves summed apart, as by peft.",
        ),
    ] = "exact",
    rank: Annotated[
        int | None, typer.Option(metavar="R", min=1, help="With svd, the rank. Default: the greatest of the adapters.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Make one adapter of several, which any program that reads peft's folders can use.

    Example: anabranch adapters merge french-lora sql-lora --weights 0.5,0.5 --out both && anabranch eval MODEL --adapter both
    """
    require("lm", by="anabranch adapters merge")
    from anabranch.adapters import combine, read_peft, write_peft

    numbers = [1.0] * len(adapters) if weights is None else _read_weights(weights, len(adapters))
    check_apart([out], adapters)
    made = combine([read_peft(folder) for folder in adapters], numbers, method, rank=rank)
    write_peft(out, made.adapter)
    num_bytes = sum(path.stat().st_size for path in Path(out).iterdir())
    ranks = sorted({pair.rank for pair in made.adapter.pairs.values()})
    if as_json:
        print_json(
            {
                "folder": out,
                "adapters": adapters,
                "weights": numbers,
                "method": method,
                "error": made.error,
                "layers": len(made.adapter.pairs),
                "ranks": ranks,
                "parameters": made.adapter.num_parameters,
                "size_bytes": num_bytes,
            }
        )
    elif not quiet:
        of_rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        fact(
            "adapter",
            f"{len(made.adapter.pairs)} layers, {of_rank}, {quantity(made.adapter.num_parameters)} parameters",
        )
        fact("error", "none, this is the sum" if not made.error else f"{made.error:.3g} of the sum")
        wrote(f"{out}   {size(num_bytes)}", f"anabranch eval MODEL --adapter {shell_word(out)}")


def _read_weights(text: str, number: int) -> list[float]:
    """Numbers with commas between them, one for each adapter. Raises ConfigError for anything else."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights is {text!r}; write numbers with commas between them, e.g. 0.5,0.5") from None
    if len(found) != number or not all(map(math.isfinite, found)):
        raise ConfigError(f"--weights is {text!r}; give a finite number for each of the {number} adapters")
    return found
