"""``anabranch gateway serve``: one OpenAI-compatible endpoint in front of many models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anabranch.cli.options import FLAG, AsJson, Quiet, finite_number, only_file
from anabranch.cli.output import fact, print_json, say, shell_word
from anabranch.errors import InputError
from anabranch.extras import require

if TYPE_CHECKING:
    from anabranch.gateway.config import GatewayConfig


def serve(
    config_files: Annotated[
        list[Path] | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE",
            help="Config in TOML or YAML. Default: three scripted test models, and no keys.",
        ),
    ] = None,
    router: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of routers made by gateway fit (auto is then the router that gateway eval recommends), or one router's "
            "file.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0 can be reached from other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="0 takes a free port.")] = 8080,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="SQLite file or database URL for keys, budgets and the ledger. Default: as the config says.",
        ),
    ] = None,
    drain: Annotated[
        float,
        typer.Option(
            metavar="S",
            callback=finite_number,
            help="Seconds that running requests get to finish after a signal to stop.",
        ),
    ] = 30.0,
    workers: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=256,
            help="Number of processes that share the port and the store. Budgets stay exact; rate limits, circuit breakers and "
            "caches are per process, unless [shared] in the config names a Redis.",
        ),
    ] = 1,
    check: Annotated[
        bool, typer.Option("--check", metavar=FLAG, help="Check the config, report what is wrong, and exit.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Serve an OpenAI-compatible endpoint, and send each request to a suitable model.

    POST /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/responses, /v1/feedback; GET /v1/models, /health, /ready, /metrics,
    /openapi.json; /admin/*; the page /ui. The field model takes a model, an alias, or auto/STRATEGY.

    SIGHUP reads the config again; an invalid one changes nothing. SIGTERM and Ctrl-C stop the server once the running requests are
    answered.

    Example: anabranch gateway serve --config gateway.toml --port 8080
    """
    config = only_file(config_files)
    require("gateway", by="anabranch gateway serve")
    from anabranch.gateway.http.run import load, run, try_out

    if check:
        from anabranch.gateway.config.prices import unpriced

        held = load(config, store, router, reads_models=True)
        if workers > 1:
            from anabranch.gateway.config.source import told_where
            from anabranch.gateway.http.workers import check_apart

            with told_where(config):
                check_apart(held, workers)
        try_out(held, config)
        for line in unpriced(held.models):
            say(f"no price  {line}")
        say(f"{config or 'the built-in config'} is right: {len(held.models)} models, {len(held.strategies)} strategies")
        return

    if drain < 0:
        raise InputError(f"--drain is {drain:g}; it must be a number of seconds, 0 or more")

    def ready(url: str, admin_url: str, held: GatewayConfig) -> None:
        import sys

        if as_json:
            print_json({"url": url, "admin_url": admin_url, "page": f"{admin_url}/ui", "pid": os.getpid()})
        else:
            fact("serving", f"{url}/v1   page {admin_url}/ui   (Ctrl-C stops)")
            if router is not None:
                fact("auto", _auto(router))
            key = ' -H "authorization: Bearer $KEY"' if held.require_key else ""
            fact("next", f"curl -s {url}/v1/chat/completions -d '{_EXAMPLE}' -H 'content-type: application/json'{key}")
            if held.require_key:
                fact("keys", f"anabranch gateway keys create NAME --store {shell_word(held.store)} makes a $KEY")
        sys.stdout.flush()

    def loading(url: str, names: list[str]) -> None:
        if not quiet:
            say(f"loading {', '.join(names)}; {url}/v1 answers for other models meanwhile")

    if workers == 1:
        run(
            config,
            host=host,
            port=port,
            store=store,
            router=router,
            drain_s=drain,
            on_ready=ready,
            on_loading=loading,
        )
    else:
        from anabranch.gateway.http.workers import run_workers

        run_workers(
            config, num=workers, host=host, port=port, store=store, router=router, drain_s=drain, on_ready=ready
        )
    if not quiet:
        say("stopped; every request under way was answered")


def _auto(router: Path) -> str:
    """What ``auto`` means, and why."""
    from anabranch.routers.recommendation import pick

    picked = pick(router)
    return "" if picked is None else f"is {picked.name} of {router}: {picked.why}"


_EXAMPLE = '{"model": "auto", "messages": [{"role": "user", "content": "hello"}]}'
