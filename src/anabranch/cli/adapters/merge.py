"""``anabranch adapters merge``: one adapter out of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from anabranch.bounds import MOST_SEED
from anabranch.cli.adapters.placing import check_no_adapter
from anabranch.cli.options import AsJson, Quiet, load
from anabranch.cli.output import fact, print_json, quantity, shell_word, size, wrote
from anabranch.cli.progress import Progress
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.files import check_apart

if TYPE_CHECKING:
    from anabranch.adapters import Adapter
    from anabranch.adapters.lorahub import Found


def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER...",
            help="Folders of peft's, each with a LoRA adapter of one base model; with --method mean also adapters of any kind that "
            "anabranch adapt wrote with the same settings.",
        ),
    ],
    out: Annotated[
        str,
        typer.Option("--out", "-o", metavar="DIR", help="The new folder; an adapter that is there is not replaced."),
    ],
    weights: Annotated[
        str | None,
        typer.Option(metavar="W,W,...", help="What each is multiplied by; negative ones take away. Default: 1 each."),
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
            help="exact: the weighted sum, of all ranks together. svd: the best of a lower rank. linear: halves summed apart, as by peft. "
            "mean: the mean of halves (AdapterSoup). ties, dare (or dare_linear), dare_ties, magnitude_prune: halves thinned and summed, "
            "as by peft; with _svd after it, whole matrices.",
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
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Find the weights, without gradients, that make the answers of these few rows likeliest on --model (LoRAHub; its way of "
            "mixing is --method linear).",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="With --data, the base of the adapters.")] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="With --data, how many weights are tried. Default: 40.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Make one adapter of several, which any program that reads peft's folders can use.

    Example: anabranch adapters merge french-lora sql-lora --weights 0.5,0.5 --out both && anabranch eval MODEL --adapter both
    """
    require("lm", by="anabranch adapters merge")
    from anabranch.adapters import combine, read_peft, write_peft
    from anabranch.adapters.own_folder import is_own

    numbers = [1.0] * len(adapters) if weights is None else read_weights(weights, len(adapters))
    _check_search(weights, data, model, steps)
    check_apart([out], [*adapters, *(path for path in (data, model) if path is not None)])
    check_no_adapter(out)
    options: dict[str, Any] = {"rank": rank, "density": density, "seed": seed, "majority": majority}
    if any(map(is_own, adapters)):
        _average(adapters, numbers, out, method, {**options, "data": data}, quiet=quiet, as_json=as_json)
        return
    parts, found = [read_peft(folder) for folder in adapters], None
    if data is not None and model is not None:
        # What is wrong with them is said before anything is searched for.
        combine(parts, numbers, method, **options)
        found = _found(parts, model, data, method, options, steps or 40, quiet=quiet or as_json)
        numbers = list(found.weights)
    made = combine(parts, numbers, method, **options)
    write_peft(out, made.adapter)
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

    used = [f"--{name}" for name, value in options.items() if value is not None]
    if method != "mean" or used:
        said = used[0] if used else f"--method {method}"
        raise ConfigError(
            f"{said} is for LoRA in folders of peft's; of adapters in anabranch's own form there is a mean: --method mean"
        )
    others = [folder for folder in adapters if not is_own(folder)]
    if others:
        own = next(folder for folder in adapters if is_own(folder))
        raise ConfigError(f"{own} is in anabranch's own form and {others[0]} is not; a mean is of adapters of one form")
    made = average_own(adapters, weights, out)
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
                    f"{name} is {value}, which is for weights that are found; give rows with --data, or leave it out"
                )
        return
    if weights is not None:
        raise ConfigError(f"--weights is {weights!r}, and --data has them found; leave one out")
    if model is None:
        raise ConfigError("--data has weights found on the base of the adapters; name it with --model")


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
