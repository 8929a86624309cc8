"""``anabranch gateway add-model``: a model of the config joins the fitted routers that a gateway serves."""

from __future__ import annotations

import asyncio
import dataclasses
import http.client
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.gateway.options import ColumnMap, read_data
from anabranch.cli.options import AsJson, only_file
from anabranch.cli.output import fact, print_json, say, shell_word, wrote
from anabranch.errors import DataError, InputError
from anabranch.extras import require
from anabranch.sockets import http_parts

if TYPE_CHECKING:
    from anabranch.gateway.config import GatewayConfig
    from anabranch.routers.contract.dataset import Recorded

# Of a gateway that answers.
PATIENCE_S = 300.0


def add_model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model in the gateway's config.")],
    config_files: Annotated[
        list[Path] | None,
        typer.Option(
            "--config", "-c", metavar="FILE", help="Config of a gateway that is not running or will be reloaded."
        ),
    ] = None,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="Address of a running gateway, which serves the model at once.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="ANABRANCH_ADMIN_KEY",
            show_envvar=False,
            help="The admin key, for --url. Also $ANABRANCH_ADMIN_KEY.",
        ),
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            "--strategy",
            metavar="NAME",
            help="Strategy whose router gets the model. May be repeated. Default: all that serve a fitted router.",
        ),
    ] = None,
    outcomes: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="Outcomes with scores of the new model: .jsonl, .csv, or a store. graph needs none."
        ),
    ] = None,
    columns: ColumnMap = None,
    store: Annotated[
        str | None, typer.Option(metavar="STORE", help="SQLite file or URL. Default: as the config says.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Add a model to fitted routers without fitting them again; what they have learned in service is kept.

    The strategies graph, irt and coe can add models. With --url, a running gateway reads its config and its routers again.

    Example: anabranch gateway add-model newcomer --url http://localhost:8080 --outcomes shots.jsonl
    """
    config = only_file(config_files)
    if (config is None) == (url is None):
        raise InputError("give --config, for a gateway that does not run, or --url, for one that does; one of them")
    if url is not None and store is not None:
        raise InputError("--store goes with --config; a gateway that runs knows its own")
    shots = None if outcomes is None else read_data(outcomes, columns, None)[0]
    if url is not None:
        done = _told(url, key, name, strategy or [], shots)
    else:
        require("gateway", by="anabranch gateway add-model")
        from anabranch.gateway.config.source import told_where
        from anabranch.gateway.http.run import load

        assert config is not None
        held = load(config, store)
        with told_where(config):
            done = asyncio.run(_joined(held, name, strategy or [], shots))
    if as_json:
        print_json({"model": name, **done})
        return
    fact("joined", f"{name} is known to {', '.join(done['strategies'])}")
    for other, why in done["refused"].items():
        say(f"strategy {other}: {why}")
    if url is None:
        wrote(", ".join(done["files"]), f"anabranch gateway serve --config {shell_word(config)}")
    else:
        fact("wrote", f"{', '.join(done['files'])} (of the gateway at {url}, which serves them)")


async def _joined(config: GatewayConfig, name: str, strategies: list[str], shots: Recorded | None) -> dict[str, Any]:
    """In the files of a config, and in its store if there is one."""
    from anabranch.cli.gateway.stores import missing_store
    from anabranch.gateway.learning.joining import join
    from anabranch.gateway.store import open_store

    if missing_store(config.store) is not None:
        return dataclasses.asdict(await join(None, config, name, strategies=strategies, outcomes=shots))
    async with open_store(config.store, serves=False, makes=False) as store:
        return dataclasses.asdict(await join(store, config, name, strategies=strategies, outcomes=shots))


def _told(url: str, key: str | None, name: str, strategies: list[str], shots: Recorded | None) -> dict[str, Any]:
    """By a gateway that runs. Raises InputError for what it refuses, DataError where it does not answer."""
    from urllib.parse import quote

    if http_parts(url) is None:
        raise InputError(f"--url is {url!r}; write http://HOST:PORT of the gateway's admin interface")
    body: dict[str, Any] = {"strategies": strategies}
    if shots is not None:
        if name not in shots.models:
            raise InputError(f"the outcomes hold nothing of {name!r}; they are of {', '.join(shots.models)}")
        body["outcomes"] = _rows(shots, name)
    request = urllib.request.Request(
        f"{url.rstrip('/')}/admin/models/{quote(name, safe='')}",
        json.dumps(body).encode(),
        {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})},
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        raise InputError(f"{url} refuses that ({error.code}): {_reason(error)}") from None
    except urllib.error.URLError as error:
        raise DataError(f"cannot reach {url}: {_plainly(error.reason)}; give --url of a gateway that runs") from None
    except TimeoutError:
        raise DataError(f"{url} did not answer within {PATIENCE_S:g} seconds") from None
    except OSError as error:
        raise DataError(f"{url} broke off: {_plainly(error)}") from None
    except (ValueError, http.client.HTTPException):
        raise DataError(f"{url} does not answer as a gateway does: what it sent is no JSON over HTTP") from None
    if not isinstance(found, dict) or not {"strategies", "refused", "files"} <= found.keys():
        raise DataError(f"{url} does not answer as a gateway does")
    return {field: found[field] for field in ("strategies", "refused", "files")}


def _plainly(error: object) -> str:
    """Why a connection failed, as the system says it."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text[:1].lower() + text[1:]


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (OSError, ValueError, LookupError, TypeError):
        return str(error.reason)


def _rows(data: Recorded, name: str) -> list[dict[str, Any]]:
    """What is known of one model, as lines of a file of outcomes."""
    import numpy as np

    at, rows = data.models.index(name), []
    for row in np.flatnonzero(np.isfinite(data.score_NM[:, at])).tolist():
        line: dict[str, Any] = {"query": data.query[row], "scores": {name: float(data.score_NM[row, at])}}
        if data.task and data.task[row] is not None:
            line["task"] = data.task[row]
        if data.cost_NM is not None and np.isfinite(data.cost_NM[row, at]):
            line["cost"] = {name: float(data.cost_NM[row, at])}
        if data.tokens_NM2 is not None and np.isfinite(data.tokens_NM2[row, at]).all():
            line["tokens"] = {name: [float(one) for one in data.tokens_NM2[row, at]]}
        rows.append(line)
    if not rows:
        raise InputError(f"the outcomes hold no score of {name!r}")
    return rows
