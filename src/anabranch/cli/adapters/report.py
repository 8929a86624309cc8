"""``anabranch adapters report``: which adapter serves which task and layer, as a page with pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anabranch.cli.adapters.placing import check_adapter_apart, first_of_each, passes_of, put_adapter, template_of
from anabranch.cli.options import AsJson, Device, Dtype, named_folder, read_device, read_dtype
from anabranch.cli.output import fact, print_json, table, visible, wrote
from anabranch.errors import ConfigError, DataError
from anabranch.extras import require

if TYPE_CHECKING:
    from anabranch.adapters.use import AdapterUse
    from anabranch.data import Tokenizer
    from anabranch.lm import Decoder

# Adapters that a terminal has room for.
COLUMNS = 8


def report(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The base model of the adapters.")],
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER",
            callback=named_folder,
            help="A pool (a folder of adapters; arrow:POOL or phatgoose:POOL for one kind of router only), or an adapter with a "
            "router: dynmole, lora_mixer, poly or mhr of anabranch adapt, or peft's Poly.",
        ),
    ],
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="Folder for the page and its pictures.")],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Rows of tasks as JSON lines, to run the routers on. Not needed for adapters that route by task.",
        ),
    ] = None,
    rows: Annotated[int, typer.Option(metavar="N", min=1, help="Rows used from each task.")] = 32,
    max_tokens: Annotated[int, typer.Option(metavar="L", min=1, help="Maximum number of tokens in a row.")] = 256,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Show which adapters are used for which task and in which layer: an HTML page, two pictures, and the numbers as JSON.

    Example: anabranch adapters report SmolLM2-135M pool --data rows.jsonl --out pool-report
    """
    require("lm", "plots", by="anabranch adapters report")
    from anabranch.lm import load_model
    from anabranch.report.adapter_use import FILES, check_use_place, explain_use, write_use

    own = [Path(out) / name for name in FILES]
    found = check_adapter_apart(own, model, adapter, *([] if data is None else [data]))
    assert found is not None, "there is an adapter"
    check_use_place(out)
    base, tokenizer = load_model(model, dtype=read_dtype(dtype), device=read_device(device))
    use = _use(base, tokenizer, adapter, data, rows, max_tokens)
    extra = {"model": model, "adapter": adapter, "rows": "none: by its tables" if data is None else data}
    page = write_use(use, out, title=found.name or adapter, extra=extra)
    if as_json:
        print_json({"page": str(page), **extra, **use.to_dict()})
        return
    fact("adapter", f"{visible(adapter)}   on {visible(model)}")
    total_E = use.share_TE.sum(0)
    most = sorted(sorted(range(len(total_E)), key=lambda number: -total_E[number])[:COLUMNS])
    shares = [[f"{row_E[number]:.3f}" for number in most] for row_E in use.share_TE]
    heads = ["task", *(visible(use.adapters[number]) for number in most)]
    table(heads, [[visible(name), *row] for name, row in zip(use.tasks, shares, strict=True)])
    for sentence in explain_use(use):
        fact("", visible(sentence))
    wrote(f"{out}/{{{','.join(FILES)}}}", f"open {page} in a browser")


def _use(
    base: Decoder, tokenizer: Tokenizer | None, adapter: str, data: str | None, most_rows: int, max_tokens: int
) -> AdapterUse:
    """Put what is at ``adapter`` onto the base, and see whom it chooses."""
    from anabranch.adapters.adapt.rows import read_rows
    from anabranch.adapters.mixture_report import routed_layers
    from anabranch.adapters.tasks import goes_by_task
    from anabranch.adapters.use import use_of_rows, use_of_tables

    # Before anything runs.
    rows = [] if data is None else first_of_each(read_rows(data), most_rows)
    pool = put_adapter(base, tokenizer, adapter)
    if goes_by_task(base):
        if data is not None:
            raise ConfigError(f"{adapter} routes by task, so the report needs no rows; leave out --data")
        return use_of_tables(base)
    routers = routed_layers(base)
    if not routers:
        raise ConfigError(
            f"{adapter} has no router: it is one adapter for all rows; give a pool, or a mixture with routers"
        )
    if data is None:
        raise ConfigError(
            f"{adapter} has routers that choose for each token, so the report needs rows; give some with --data"
        )
    if tokenizer is None:
        raise DataError("the model has no tokenizer, so rows cannot be read")
    most = max(len(layer.config.ranks) for layer in routers.values())
    named = {getattr(layer.config, "experts", ()) for layer in routers.values()} if pool is None else {pool.names}
    # Experts of which not all layers have the same, or that have no names, are numbers.
    adapters = next(iter(named)) if len(named) == 1 and all(named) else tuple(map(str, range(most)))
    tasks = list(dict.fromkeys(row.task or "(none)" for row in rows))
    passes = passes_of(base, tokenizer, rows, tasks, pool, max_tokens, template_of(None, adapter))
    return use_of_rows(base, passes, tasks=tasks, adapters=adapters)
