"""``anabranch adapters merge``: one adapter out of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from anabranch.bounds import MOST_SEED
from anabranch.cli.adapters.placing import check_no_adapter, note_of, noted
from anabranch.cli.option_sets import OptionSet, takes_sets
from anabranch.cli.options import AsJson, Quiet, load, named_folder
from anabranch.cli.output import fact, print_json, quantity, shell_word, size, wrote
from anabranch.cli.progress import Progress
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.files import check_apart

if TYPE_CHECKING:
    from anabranch.adapters import Adapter
    from anabranch.adapters.lorahub import Found


@dataclass(frozen=True)
class How(OptionSet):
    """What some methods ask for."""

    rank: Annotated[
        int | None,
        typer.Option(
            metavar="R",
            min=1,
            help="Rank, for svd and the methods that end in _svd. Default: the largest rank of the adapters.",
        ),
    ] = None
    density: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of weights that TIES, DARE and pruning keep. Default: 0.2 for TIES and pruning by magnitude, 0.5 for "
            "dropping at random.",
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(metavar="SEED", min=0, max=MOST_SEED, help="Seed of the weights that DARE drops. Default: 0."),
    ] = None
    majority: Annotated[
        Literal["total", "frequency"] | None,
        typer.Option(
            help="For TIES: the elected sign is that of the sum (total), or the more frequent one. Default: total."
        ),
    ] = None

    def options(self) -> dict[str, Any]:
        """As `anabranch.adapters.combine` takes them; None for what is not said."""
        return {"rank": self.rank, "density": self.density, "seed": self.seed, "majority": self.majority}


@dataclass(frozen=True)
class Sought(OptionSet):
    """Rows whose answers factors are searched for."""

    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Search, without gradients, for the factors that make the answers of these few rows most likely under --model "
            "(LoRAHub, which uses --method linear).",
        ),
    ] = None
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="With --data, the base model of the adapters.")] = (
        None
    )
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="With --data, how many sets of factors are tried. Default: 40."),
    ] = None


HOW, SOUGHT = How(), Sought()


@takes_sets()
def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER...",
            callback=named_folder,
            help="Folders with LoRA adapters of the same base model, in peft's format. With --method mean, also other adapters "
            "that anabranch adapt made with the same settings.",
        ),
    ],
    out: Annotated[
        str,
        typer.Option("--out", "-o", metavar="DIR", help="The new folder; an existing adapter is not replaced."),
    ],
    weights: Annotated[
        str | None,
        typer.Option(metavar="W,W,...", help="Factor of each adapter; negative factors subtract. Default: 1 each."),
    ] = None,
    method: Annotated[
        Literal[
            "exact",
            "svd",
            "linear",
            "mean",
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
            help="exact: the weighted sum; its rank is the sum of the ranks. svd: its best approximation of a lower rank. "
            "linear: A and B summed separately, as in peft. mean: the averages of A and of B (AdapterSoup). ties, dare (or "
            "dare_linear), dare_ties, magnitude_prune: A and B pruned and summed, as in peft; with _svd appended, the "
            "products B A instead.",
        ),
    ] = "exact",
    how: How = HOW,
    sought: Sought = SOUGHT,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Merge several adapters into one, which any program that reads peft's format can use.

    Example: anabranch adapters merge french-lora sql-lora --weights 0.5,0.5 --out both && anabranch eval MODEL --adapter both
    """
    require("lm", by="anabranch adapters merge")
    from anabranch.adapters import combine, read_peft, write_peft
    from anabranch.adapters.own_folder import is_own

    numbers = [1.0] * len(adapters) if weights is None else read_weights(weights, len(adapters))
    _check_search(weights, sought.data, sought.model, sought.steps)
    check_apart([out], [*adapters, *(path for path in (sought.data, sought.model) if path is not None)])
    check_no_adapter(out)
    options = how.options()
    if any(map(is_own, adapters)):
        _average(adapters, numbers, out, method, {**options, "data": sought.data}, quiet=quiet, as_json=as_json)
        return
    parts, found = [read_peft(folder) for folder in adapters], None
    template = note_of(adapters)
    if sought.data is not None and sought.model is not None:
        # What is wrong with them is said before anything is searched for.
        combine(parts, numbers, method, **options)
        found = _found(parts, sought.model, sought.data, method, options, sought.steps or 40, quiet=quiet or as_json)
        numbers = list(found.weights)
    made = combine(parts, numbers, method, **options)
    with noted(out, template) as place:
        write_peft(place, made.adapter)
    num_bytes = sum(path.stat().st_size for path in Path(out).iterdir())
    ranks = sorted({pair.rank for pair in made.adapter.pairs.values()})
    if as_json:
        print_json(
            {
                "folder": out,
                "adapters": adapters,
                "weights": numbers,
                **({} if found is None else {"loss": found.loss, "base_loss": found.base_loss, "tried": found.tried}),
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
        if found is not None:
            fact("weights", ", ".join(f"{weight:.3g}" for weight in numbers))
            fact(
                "rows",
                f"{found.loss:.3f} nats/token; {found.base_loss:.3f} without adapters; {found.tried} weights were tried",
            )
        told = "none, this is the sum" if not made.error else f"{made.error:.3g} of the sum"
        fact("error", told)
        if method.endswith("_svd"):
            fact("cut", f"{made.cut_off:.3g} of what {method.removesuffix('_svd')} made, which the rank could not hold")
        wrote(f"{out}   {size(num_bytes)}", f"anabranch eval MODEL --adapter {shell_word(out)}")


def _average(
    adapters: Sequence[str],
    weights: Sequence[float],
    out: str,
    method: str,
    options: Mapping[str, Any],
    *,
    quiet: bool,
    as_json: bool,
) -> None:
    """Adapters of our own form, whose numbers have a mean and nothing else."""
    from anabranch.adapters.own_folder import is_own
    from anabranch.adapters.soup import average_own

    # First: advice for adapters of one form is none for those of two.
    others = [folder for folder in adapters if not is_own(folder)]
    if others:
        own = next(folder for folder in adapters if is_own(folder))
        raise ConfigError(
            f"{own} is in anabranch's own form and {others[0]} is not, and what is merged is of one form; anabranch adapters export makes "
            "a plain LoRA of the former"
        )
    used = [f"--{name}" for name, value in options.items() if value is not None]
    if method != "mean" or used:
        said = used[0] if used else f"--method {method}"
        raise ConfigError(
            f"{said} is for LoRA in folders of peft's; of adapters in anabranch's own form there is a mean: --method mean"
        )
    with noted(out, note_of(adapters)) as place:
        made = average_own(adapters, weights, place)
    num_bytes = sum(path.stat().st_size for path in Path(out).iterdir())
    if as_json:
        print_json(
            {
                "folder": out,
                "adapters": list(adapters),
                "weights": list(weights),
                "method": method,
                "layers": made.layers,
                "parameters": made.parameters,
                "size_bytes": num_bytes,
            }
        )
    elif not quiet:
        fact("adapter", f"the mean of {len(adapters)}, {quantity(made.parameters)} numbers")
        wrote(f"{out}   {size(num_bytes)}", f"anabranch eval MODEL --adapter {shell_word(out)}")


def _check_search(weights: str | None, data: str | None, model: str | None, steps: int | None) -> None:
    """Raise ConfigError for options of which one makes no sense with, or without, another."""
    if data is None:
        for name, value in (("--model", model), ("--steps", steps)):
            if value is not None:
                raise ConfigError(
                    f"{name} is {value}, which is only for a search of the weights; give rows with --data, or leave it out"
                )
        return
    if weights is not None:
        raise ConfigError(f"--weights is {weights!r}, but --data searches for them; leave one of the two out")
    if model is None:
        raise ConfigError("--data searches for weights on the base model of the adapters; name it with --model")


def _found(
    parts: Sequence[Adapter], model: str, data: str, method: Any, options: Mapping[str, Any], steps: int, *, quiet: bool
) -> Found:
    """The weights that make the answers of the rows likeliest."""
    from anabranch.adapters.adapt import read_rows
    from anabranch.adapters.lorahub import lorahub_weights

    rows = read_rows(data)
    base, tokenizer = load(model, None, None)
    with Progress(steps, "step", quiet=quiet) as progress:
        return lorahub_weights(
            parts,
            base,
            tokenizer,
            rows,
            method=method,
            steps=steps,
            search_seed=options["seed"] or 0,
            on_step=lambda step, best: progress.update(step, f"{best:.3f} nats/token"),
            **options,
        )


def read_weights(text: str, number: int) -> list[float]:
    """Numbers with commas between them, one for each adapter. Raises ConfigError for anything else."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights is {text!r}; write numbers with commas between them, e.g. 0.5,0.5") from None
    if len(found) != number or not all(map(math.isfinite, found)):
        raise ConfigError(f"--weights is {text!r}; give a finite number for each of the {number} adapters")
    return found
