"""``anabranch convert``: from one model format to another."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.options import FLAG, AsJson, Dtype, Quiet, read_dtype
from anabranch.cli.output import fact, print_json, quantity, shell_word, size, wrote
from anabranch.extras import require


class Bits(enum.StrEnum):
    """What weights can be rounded to."""

    INT8 = "int8"
    INT4 = "int4"


class Format(enum.StrEnum):
    """What can be written."""

    NATIVE = "native"
    HUGGINGFACE = "huggingface"


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A training run, a saved model, a Hugging Face folder or a .gguf file.")
    ],
    target: Annotated[str, typer.Argument(metavar="DST", help="The new folder.")],
    to: Annotated[Format, typer.Option(help="The format to write.")],
    family: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Hugging Face model_type to write. Default: the first that fits.")
    ] = None,
    dtype: Dtype = None,
    quantize: Annotated[
        Bits | None,
        typer.Option(
            help="Save linear layers and experts quantized, so that serve need not quantize them at each start."
        ),
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="With --quantize, the number of weights that share a scale. Default: 32 for int4, a row for int8.",
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            metavar=FLAG,
            help="Write into a folder that holds other files. They stay; a file with the name of a new one becomes NAME.old.",
        ),
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Convert a model to our own format or to a Hugging Face folder.

    Hugging Face has no shared experts between layers, so each layer gets its own copy.

    Example: anabranch convert runs/demo demo-int4 --to native --quantize int4 && anabranch serve demo-int4
    """
    require("lm", by="anabranch convert")
    from anabranch.lm import convert as convert_model
    from anabranch.lm import load_config
    from anabranch.lm.checkpoint import quantization_of

    convert_model(
        source,
        target,
        to=to.value,
        family=family,
        dtype=read_dtype(dtype),
        quantize=None if quantize is None else quantize.value,
        group=group,
        force=force,
    )
    counts = load_config(target).count()
    num_bytes = sum(map(_size, Path(target).iterdir()))
    said = (quantization_of(Path(target)) or {"modules": {}})["modules"].values()
    # A linear layer counts as one matrix, and so do the experts of a layer, whose matrices may be of two kinds.
    kinds = [kind if isinstance(kind, str) else " and ".join(kind) for kind in said]
    quantized = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    if as_json:
        print_json(
            {"folder": target, "format": to.value, "parameters": counts.parameters, "size_bytes": num_bytes}
            | ({"quantized_layers": quantized} if quantized else {})
        )
    elif not quiet:
        bits = " and ".join(
            f"{count} {'matrices' if count != 1 else 'matrix'} in {kind}" for kind, count in quantized.items()
        )
        fact("model", f"{source}   {quantity(counts.parameters)} parameters as {to.value}{bits and f', {bits}'}")
        wrote(f"{target}   {size(num_bytes)}", f"anabranch {'serve' if quantized else 'info'} {shell_word(target)}")


def _size(path: Path) -> int:
    """In bytes; 0 for what cannot be followed: with --force the folder may hold links that lead nowhere."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
