"""``anabranch adapters route``: which adapters of a pool a query is for, and why."""

from typing import Annotated, Any, Literal

import typer

from anabranch.cli.adapters.endpoints import (
    Embedder,
    EmbedderModel,
    KeyEnv,
    Writer,
    WriterModel,
    embedder_of,
    writer_of,
)
from anabranch.cli.options import AsJson, Device, Dtype, named_folder, read_device, read_dtype
from anabranch.cli.output import fact, print_json, table, visible
from anabranch.errors import ConfigError
from anabranch.extras import require


def route(
    pool: Annotated[
        str,
        typer.Argument(
            metavar="POOL",
            callback=named_folder,
            help="A folder of adapters, each with an instruction in glider.json; how it chooses is in its pool.json. Also arrow:DIR and "
            "phatgoose:DIR.",
        ),
    ],
    query: Annotated[str, typer.Argument(metavar="QUERY", help="The query.")],
    instruction: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Text to compare with the adapters' instructions. Default: the query."),
    ] = None,
    top: Annotated[int, typer.Option(metavar="K", min=1, help="Adapters to show.")] = 5,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The base model; it runs on the query to score each adapter by tokens."),
    ] = None,
    local: Annotated[
        Literal["phatgoose", "arrow", "none"] | None,
        typer.Option(
            help="With --model, how tokens choose adapters: by gates, by prototypes, or not at all. Default: as the pool says, else "
            "phatgoose.",
            show_default=False,
        ),
    ] = None,
    clusters: Annotated[
        int | None,
        typer.Option(
            metavar="G",
            min=1,
            help="With --model, tokens choose one of G clusters of adapters first, then an adapter in it.",
        ),
    ] = None,
    writer: Writer = None,
    writer_model: WriterModel = None,
    embedder: Embedder = None,
    embedder_model: EmbedderModel = None,
    key_env: KeyEnv = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Show which adapters of a pool suit a query: by its instruction, and with --model also by its tokens.

    Example: anabranch adapters route adapters "how many users signed up in May?"
    """
    require("lm", by="anabranch adapters route")
    from anabranch.adapters.base_name import warn_of_base
    from anabranch.adapters.glider import GliderPool, HiddenStates, Plugins, PoolSettings, explain
    from anabranch.adapters.glider.folder import expert_folders
    from anabranch.adapters.glider.pool_file import named_by
    from anabranch.serving.engine.adapter_place import folder_of
    from anabranch.serving.engine.layer_reader import settings_of

    if not (query if instruction is None else instruction).strip():
        raise ConfigError("there is nothing to route: the query (or --instruction) is empty")
    if clusters is not None and model is None:
        raise ConfigError(
            f"--clusters is {clusters}, which tokens choose among, and there are none; give the base with --model"
        )
    if key_env is not None and writer is None and embedder is None:
        raise ConfigError("--key-env is for --writer and --embedder, and neither is given; leave it out")
    found_pool = folder_of(pool, None)
    if found_pool.kind is not None and local is not None:
        raise ConfigError(f"--local is {local!r}, and {pool} says itself how tokens choose; leave one of them out")
    given = Plugins(embedder_of(embedder, embedder_model, key_env), writer_of(writer, writer_model, key_env))
    # Reading a folder that is no pool tells why.
    expert_folders(found_pool.path)
    settings = settings_of(found_pool) if found_pool.experts else PoolSettings()
    needs_model = settings.needs_model and given.embedder is None
    opened = _opened(model, dtype, device) if model is not None and needs_model else None
    with named_by(found_pool.settings):
        if needs_model and opened is None:
            raise ConfigError("embedder is 'hidden-states', of the base model; name it with --model")
        plugins = settings.plugins(None if opened is None else HiddenStates(*opened), given)
    said = {"local": local, "clusters": clusters}
    made = GliderPool.load(
        found_pool.path,
        settings.choice.replace(**{name: value for name, value in said.items() if value is not None}),
        embedder=plugins.embedder,
        writer=plugins.writer,
    )
    ids = None
    if model is not None:
        warn_of_base(f"the pool {pool}", made.base, model)
        base, tokenizer = opened or _opened(model, dtype, device)
        ids = tokenizer.encode_prompt(query)
        if not ids:
            raise ConfigError("the query has no tokens; leave out --model")
        made.onto(base)
    found = explain(made, query, ids, instruction=instruction)
    is_sure = made.has_task({one.name: one.cosine for one in found.experts})
    threshold = None if _members(made) < 2 else made.calibrate()
    told: dict[str, Any] = {"pool": pool, "query": query, **found.to_dict(), "known_task": is_sure}
    told["experts"] = told["experts"][:top]
    told["retrieved"] = [dict(one.__dict__) for one in made.retrieve(query, top, instruction=instruction)]
    told["calibration"] = None if threshold is None else threshold.to_dict()
    if as_json:
        print_json(told)
        return
    fact("query", " ".join(visible(found.instruction).split()))
    if threshold is not None:
        says = "one that the pool has" if is_sure else "perhaps none of the pool: no adapter is close enough"
        fact("task", f"{says}   (threshold {made.threshold:.3f}, AUROC {threshold.auroc:.3f} with members left out)")
    columns = ["adapter", "cosine"] + (["weight", "by tokens", "global share"] if ids else [])
    rows = [
        [visible(one.name), f"{one.cosine:.3f}"]
        + ([f"{one.weight:.3f}", f"{one.local_logit:.3f}", f"{one.global_share:.0%}"] if ids else [])
        for one in found.experts[:top]
    ]
    table(columns, rows)
    if not any(one.cosine for one in found.experts):
        fact(
            "note",
            "no instruction here has anything in common with the query; give each adapter one that does: anabranch adapters describe "
            f"{pool}/{visible(found.experts[0].name)} --instruction TEXT",
        )


def _opened(model: str, dtype: str | None, device: str | None) -> tuple[Any, Any]:
    from anabranch.lm import load_model

    base, tokenizer = load_model(model, dtype=read_dtype(dtype), device=read_device(device))
    if tokenizer is None:
        raise ConfigError(f"{model} has no tokenizer, so that the query has no tokens; leave out --model")
    return base, tokenizer


def _members(made: Any) -> int:
    return len(made.matcher.members()[0])
