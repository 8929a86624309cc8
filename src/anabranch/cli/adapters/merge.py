"""``anabranch adapters merge``: one adapter out of several."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from anabranch.bounds import MOST_SEED
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
        Literal[
            "exact",
            "svd",
            "linear",
            "ties",
            "dare",
            "dare_linear",
            "dare_ties",
            "magnitude_prune",
            "ties_svd",
            "dare_linear_svd",
            "dare_ties_svd",
            "magnitude_prune_svd",
        ],
        typer.Option(
            metavar="METHOD",
            help="exact: the weighted sum, of all ranks together. svd: the best of a lower rank. linear: halves summed apart, as by peft. "
            "ties, dare (or dare_linear), dare_ties, magnitude_prune: halves thinned and summed, as by peft; with _svd after it, whole "
            "matrices.",
        ),
    ] = "exact",
    rank: Annotated[
        int | None,
        typer.Option(
            metavar="R", min=1, help="With svd and what ends so, the rank. Default: the greatest of the adapters."
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of numbers that TIES, DARE and pruning keep. Default: 0.2 of what is trimmed, 0.5 of what is dropped at random.",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="SEED", min=0, max=MOST_SEED, help="Of what DARE drops. Default: 0."),
    ] = None,
    majority: Annotated[
        Literal["total", "frequency"] | None,
        typer.Option(help="Of TIES: the sign of the total of numbers wins, or the more frequent one. Default: total."),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Make one adapter of several, which any program that reads peft's folders can use.

    Example: anabranch adapters merge french-lora sql-lora --weights 0.5,0.5 --out both && anabranch eval MODEL --adapter both
    """
    require("lm", by="anabranch adapters merge")
    from anabranch.adapters import combine, read_peft, write_peft

    numbers = [1.0] * len(adapters) if weights is None else read_weights(weights, len(adapters))
    check_apart([out], adapters)
    options: dict[str, Any] = {"rank": rank, "density": density, "seed": seed, "majority": majority}
    made = combine([read_peft(folder) for folder in adapters], numbers, method, **options)
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
                **{name: value for name, value in options.items() if value is not None},
                "error": made.error,
                "cut_off": made.cut_off,
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
        told = "none, this is the sum" if not made.error else f"{made.error:.3g} of the sum"
        fact("error", told)
        if method.endswith("_svd"):
            fact("cut", f"{made.cut_off:.3g} of what {method.removesuffix('_svd')} made, which the rank could not hold")
        wrote(f"{out}   {size(num_bytes)}", f"anabranch eval MODEL --adapter {shell_word(out)}")


def read_weights(text: str, number: int) -> list[float]:
    """Numbers with commas between them, one for each adapter. Raises ConfigError for anything else."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights is {text!r}; write numbers with commas between them, e.g. 0.5,0.5") from None
    if len(found) != number or not all(map(math.isfinite, found)):
        raise ConfigError(f"--weights is {text!r}; give a finite number for each of the {number} adapters")
    return found
