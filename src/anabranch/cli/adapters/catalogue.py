"""``anabranch adapters list``, ``estimate`` and ``recommend``: the catalogue of methods, what each costs on a model, and which to take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.options import AsJson, read_assignments, read_dtype
from anabranch.cli.output import binary_size, fact, print_json, quantity, say, size, table
from anabranch.errors import ConfigError
from anabranch.extras import require

if TYPE_CHECKING:
    from anabranch.adapters.catalogue import Card, Estimate, Shape

# Of methods that a terminal shows; --json has all.
_SHOWN = 12
# What rows of one batch may do, by `Card.mixed`.
_BATCH = {
    "pool": "rows may use different adapters: in serve, and by load_pool",
    "server": "rows may use different adapters: in serve",
    "no": "all rows use one adapter",
}

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model, or the name of a preset. No weights are read.")]
SizeDial = Annotated[str, typer.Option("--size", metavar="SIZE", help="Size of a preset: tiny, small or base.")]
Rank = Annotated[
    int | None, typer.Option(metavar="R", min=1, help="Rank, for methods that have one. Default: that of the method.")
]
Targets = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="Linear layers, such as q,v or q_proj,v_proj, attention, mlp or all. Default: those of the method.",
    ),
]
Length = Annotated[
    int | None,
    typer.Option("--sequence-length", metavar="L", min=1, help="Tokens of a sequence. Default: as in training."),
]
DtypeOfBase = Annotated[
    str, typer.Option("--dtype", metavar="TYPE", help="Type of the base model's weights, for counting bytes.")
]


def list_methods(
    family: Annotated[
        str | None,
        typer.Option(
            metavar="WORD", help="Only methods of this family: additive, selective, reparameterised, prompt, ..."
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="WHO",
            help="Only methods that Anabranch runs itself (own), that peft runs (peft), or that neither puts onto a model (none): "
            "settings of training, what another command does, and what is only described.",
        ),
    ] = None,
    merges: Annotated[
        bool | None,
        typer.Option("--merges/--stays", help="Only methods that can be merged into the weights, or that cannot."),
    ] = None,
    mixed: Annotated[
        bool | None,
        typer.Option(
            "--mixed/--alone",
            help="Only methods where rows of one batch can use different adapters, or where they cannot.",
        ),
    ] = None,
    needs_bias: Annotated[
        bool | None,
        typer.Option("--biases/--no-biases", help="Only methods that need a model with biases, or that do not."),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option("--on", metavar="MODEL", help="A model, or the name of a preset, for --max-parameters."),
    ] = None,
    max_parameters: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Only methods with at most N trained parameters on that model."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods of parameter-efficient fine-tuning in the catalogue.

    Example: anabranch adapters list --family prompt
    """
    require("lm", by="anabranch adapters list")
    from anabranch.adapters.catalogue import listed

    if (on is None) != (max_parameters is None):
        raise ConfigError(
            "the number of trained parameters depends on the model: give both --on MODEL and --max-parameters N, or neither"
        )
    cards = listed(
        family=family,
        backend=backend,
        merges=merges,
        mixed=mixed,
        needs_bias=needs_bias,
        max_parameters=max_parameters,
        shape=None if on is None else _shape(on, "tiny", None)[0],
    )
    if as_json:
        print_json({"methods": [card.to_dict() for card in cards]})
        return
    rows = [(card.id, card.family, card.backend, card.merges, card.mixed, card.formula) for card in cards]
    table(["method", "family", "run by", "merges", "mixed batch", "learns"], rows, text_columns=6)
    say(f"{len(cards)} methods; anabranch adapters card METHOD shows one")


def show_card(card: Card, as_json: bool) -> None:
    """One card, for ``anabranch adapters card``."""
    told = card.to_dict()
    if as_json:
        print_json(told)
        return
    fact("method", f"{card.name}   {card.family}")
    fact("rule", card.rule)
    fact("where", card.where)
    fact("learns", card.formula)
    flops = told["added_flops"]
    fact("FLOPs", f"{flops['forward']} of a token and layer; merged: {flops['merged']}")
    fact("run by", card.run_by)
    fact("merges", f"{card.merges}   starts as the base: {'yes' if card.starts_as_base else 'no'}")
    fact("batch", _BATCH[card.mixed])
    usual = ", ".join(
        f"{name}={','.join(value) if isinstance(value, tuple) else value}" for name, value in card.options.items()
    )
    fact("options", usual or "none")
    for label, text in (("memory", card.memory), ("limits", card.limits)):
        if text:
            fact(label, text)
    for paper in card.papers:
        fact("paper", f"{paper.name} ({paper.year}{f', arXiv {paper.arxiv}' if paper.arxiv else ''})")


def card_of(method: str) -> Any:
    """The card of a method. Raises ConfigError for a word that is none, and for a method of `anabranch adapt` without a card."""
    from anabranch.adapters.adapt import method_names
    from anabranch.adapters.catalogue import CARDS, find

    if method not in CARDS and method in method_names():
        raise ConfigError(
            f"{method!r} has no card and no formula of its cost; anabranch adapt MODEL DATA --method {method} --steps 1 shows how many "
            "parameters learn"
        )
    return find(method)


def estimate(
    model: Model,
    method: Annotated[str, typer.Argument(metavar="METHOD", help="A method of anabranch adapters list.")],
    rank: Rank = None,
    targets: Targets = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Another option of the method, e.g. --set width=8. May be repeated."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences per step.")] = 1,
    sequence_length: Length = None,
    size_dial: SizeDial = "tiny",
    dtype: DtypeOfBase = "float32",
    as_json: AsJson = False,
) -> None:
    """Calculate what a method costs on a model: trained parameters, bytes, and FLOPs of training and inference. Nothing is trained.

    Example: anabranch adapters estimate SmolLM2-135M lora --rank 16 --targets all
    """
    require("lm", by="anabranch adapters estimate")
    from anabranch.adapters.catalogue import estimate as estimate_cost

    card = card_of(method)
    given, assigned = _options(rank, targets), read_assignments(assignments)
    for name in given.keys() & assigned.keys():
        raise ConfigError(f"{name} is given by --{name} and by --set {name}=...; give it once")
    given |= assigned
    shape, length = _shape(model, size_dial, sequence_length)
    found = estimate_cost(card, shape, given, batch=batch, length=length, base_width=_width(dtype))
    if as_json:
        print_json({"model": model, "batch": batch, "sequence_length": length, "dtype": dtype, **found.to_dict()})
        return
    fact(
        "method",
        f"{card.name} on {model}   {len(found.matched)} linear layers of {len(found.matched) + len(found.skipped)}",
    )
    fact("learns", f"{found.trainable:,} numbers, {found.share:.3%} of the model's {shape.parameters:,}")
    fact(
        "memory",
        f"{binary_size(found.training_bytes)} to train: base {binary_size(found.base_bytes)} ({dtype}), adapter "
        f"{binary_size(found.adapter_bytes)}, gradients {binary_size(found.gradient_bytes)}, AdamW {binary_size(found.optimizer_bytes)}; "
        f"{_activations_told(found.activation_bytes, batch, length)}",
    )
    fact("file", size(found.file_bytes))
    fact("FLOPs", _flops_told(found))


def _activations_told(num_bytes: int | None, batch: int, length: int) -> str:
    if num_bytes is None:
        return "activations not counted"
    return f"and {binary_size(num_bytes)} of activations in a step of {batch} x {length} tokens"


def recommend(
    model: Model,
    max_parameters: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Maximum number of trained parameters.")
    ] = None,
    max_share: Annotated[
        float | None, typer.Option(metavar="SHARE", help="The same as a share of the model's parameters, e.g. 0.005.")
    ] = None,
    max_file: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Maximum file size of an adapter, such as 10MB.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory limit for base model, adapter, gradients and optimizer; activations come on top.",
        ),
    ] = None,
    max_added_flops: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Maximum additional FLOPs per served token, as a share; merged adapters add none.",
        ),
    ] = None,
    merges: Annotated[
        bool, typer.Option("--merges", metavar=" ", help="It must be possible to merge the adapter into the weights.")
    ] = False,
    mixed: Annotated[
        bool, typer.Option("--mixed", metavar=" ", help="Rows of one batch must be able to use different adapters.")
    ] = False,
    starts_as_base: Annotated[
        bool, typer.Option("--starts-as-base", metavar=" ", help="A new adapter must leave the model as it was.")
    ] = False,
    own: Annotated[
        bool, typer.Option("--own", metavar=" ", help="Only methods that run without the package peft.")
    ] = False,
    measurements: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="JSON list of your own measurements (method, accuracy, ...), in place of the published ones.",
        ),
    ] = None,
    measured_table: Annotated[
        str | None,
        typer.Option(
            "--table",
            metavar="NAME",
            help="Which table of --measurements ranks methods. Default: the first in the file.",
        ),
    ] = None,
    rank: Rank = None,
    targets: Targets = None,
    sequence_length: Length = None,
    size_dial: SizeDial = "tiny",
    dtype: DtypeOfBase = "float32",
    as_json: AsJson = False,
) -> None:
    """Recommend methods that stay within limits on a model, the best measured first, with the measurements.

    Example: anabranch adapters recommend SmolLM2-135M --max-share 0.01 --merges --own
    """
    require("lm", by="anabranch adapters recommend")
    from anabranch.adapters.catalogue import CARDS, MEASURED, Limits, read_measurements
    from anabranch.adapters.catalogue import recommend as find_methods
    from anabranch.sizes import parse_bytes

    if max_share is not None and max_share > 1:
        raise ConfigError(
            f"--max-share is {max_share:g}; it is a share of the model's parameters, from 0 to 1 (0.01 is 1%)"
        )
    for name, value in (("--max-share", max_share), ("--max-added-flops", max_added_flops)):
        if value is not None and not 0 <= value < float("inf"):
            raise ConfigError(f"{name} is {value}; it must be a finite number, at least 0")
    limits = Limits(
        max_parameters=max_parameters,
        max_share=max_share,
        max_file_bytes=None if max_file is None else parse_bytes(max_file, "--max-file"),
        max_training_bytes=None if memory is None else parse_bytes(memory, "--memory"),
        max_added_flops=max_added_flops,
        merges=merges,
        mixed=mixed,
        starts_as_base=starts_as_base,
        backends=("own",) if own else None,
    )
    if measured_table is not None and measurements is None:
        raise ConfigError("--table is of the measurements of a file: give --measurements FILE too")
    measured = MEASURED if measurements is None else read_measurements(measurements, list(CARDS))
    shape, length = _shape(model, size_dial, sequence_length)
    options = _options(rank, targets)
    if targets is not None:
        shape.chosen(options["targets"])
    found = find_methods(
        shape,
        limits,
        measurements=measured,
        table=measured_table,
        options=options,
        length=length,
        base_width=_width(dtype),
    )
    if as_json:
        print_json({"model": model, **found.to_dict()})
        return
    if not found.choices:
        raise ConfigError(
            f"no method keeps to these limits on {model}; of {len(found.rejected)}, e.g. lora: {found.rejected.get('lora', '-')}"
        )
    rows = [_row(choice) for choice in found.choices[:_SHOWN]]
    heads = ["method", "measured", "seeds", "measured with", "counted with", "learns", "file", "adds FLOPs", "run by"]
    table(heads, rows, text_columns=5)
    if found.unit:
        fact("unit", found.unit)
    for source in found.sources:
        fact("by", source)
    if found.other_tables:
        fact("not by", f"{', '.join(found.other_tables)}: other tables of the same file, see --table")
    lacking = sum("is not installed" in why for why in found.rejected.values())
    if lacking:
        say(f"{lacking} more methods run with the package peft, which is not installed: pip install 'anabranch[peft]'")
    rest = len(found.choices) - len(rows)
    more = f", {rest} more fit" if rest > 0 else ""
    say(
        f"{len(found.rejected)} methods exceed the limits or cannot run here{more}; --json has the reasons. The learning rate and the "
        "initialisation change results more than the method does: try several."
    )


# Options that say how much a method learns.
_SIZES = ("rank", "tokens", "width")


def _row(choice: Any) -> tuple[str, ...]:
    found, measured = choice.estimate, choice.measurement
    added = found.merged_flops if found.merged_flops is not None else found.added_flops
    return (
        found.card.id,
        "-" if measured is None else f"{measured.score:.3f}",
        "" if measured is None or measured.seeds is None else str(measured.seeds),
        "" if measured is None else measured.variant,
        # What was measured was often greater than what a method is usually given, which is what is counted here.
        " ".join(f"{name} {value}" for name, value in found.options.items() if name in _SIZES),
        quantity(found.trainable),
        size(found.file_bytes),
        "?" if added is None else f"{added / found.base_flops:.1%}",
        found.card.backend,
    )


def _options(rank: int | None, targets: str | None) -> dict[str, Any]:
    given = {"rank": rank, "targets": None if targets is None else tuple(targets.split(","))}
    return {name: value for name, value in given.items() if value is not None}


def _shape(model: str, size_dial: str, length: int | None) -> tuple[Shape, int]:
    from anabranch.adapters.catalogue import Shape
    from anabranch.cli.info import config_of

    config, usual = config_of(model, size_dial)
    return Shape.of(config), length or usual


def _width(dtype: str) -> int:
    found = read_dtype(dtype)
    assert found is not None
    return found.itemsize


def _flops_told(found: Estimate) -> str:
    base = quantity(found.base_flops)
    if found.added_flops is None:
        return f"{base} per token forward; what the method adds nobody has counted"
    merged = "" if found.merged_flops is None else " (none once merged)"
    training = (
        ""
        if found.training_flops is None
        else f", {quantity(found.training_flops)} to train (full: {quantity(found.full_flops)})"
    )
    return f"{base} per token forward, {quantity(found.added_flops)} more{merged}{training}"
