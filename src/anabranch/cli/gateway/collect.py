"""``anabranch gateway collect``: what the other models would have said to stored questions, and what that is worth."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.gateway.stores import moment, seconds
from anabranch.cli.options import AsJson, Quiet, finite_number, only_file
from anabranch.cli.output import fact, print_json, say, wrote
from anabranch.errors import DataError, InputError
from anabranch.extras import require
from anabranch.files import check_apart

if TYPE_CHECKING:
    from anabranch.gateway.collect import Collected
    from anabranch.gateway.gateway import Gateway
    from anabranch.routers.judges import Judge

RULES = ("exact", "contains")


def collect(
    config_files: Annotated[
        list[Path], typer.Option("--config", "-c", metavar="FILE", help="Config of the gateway whose store is read.")
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Output file of recorded outcomes (.jsonl); an existing one is continued."),
    ],
    judge: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="exact or contains (with --references), human (on the page /ui/label), or the name of a model.",
        ),
    ],
    references: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Correct answers as JSON lines with query and answer, for exact and contains."
        ),
    ] = None,
    anchor: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Model whose answers a judging model compares the others with. Default: the first."
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="MODEL", help="A model to compare. May be repeated. Default: all."),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="USD",
            min=0,
            callback=finite_number,
            help="Maximum cost of collecting, in dollars (the budget of tag:collect).",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Maximum number of questions to add.")] = None,
    share: Annotated[
        float,
        typer.Option(
            metavar="F",
            min=0,
            max=1,
            callback=finite_number,
            help="Share of the questions to use; repeated runs choose the same ones.",
        ),
    ] = 1.0,
    since: Annotated[
        str | None, typer.Option(metavar="WHEN", help="Only from this time on: a date (UTC) or an age, e.g. 24h, 7d.")
    ] = None,
    rate: Annotated[
        float,
        typer.Option(
            metavar="N",
            min=0.01,
            callback=finite_number,
            help="Maximum calls per minute, including those to the judge.",
        ),
    ] = 60.0,
    every: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Look for new questions again at this interval (30s, 10m), until stopped."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Maximum number of tokens in an answer. Default: as the config says for the model."
        ),
    ] = None,
    store: Annotated[
        str | None, typer.Option(metavar="STORE", help="SQLite file or URL. Default: as the config says.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Ask every model what users asked, judge the answers, and write recorded outcomes for gateway fit and eval.

    It needs a store with texts (prompts = true in [log] of the config). Each call is a request to the gateway with the tag collect. After
    an interruption, the same command continues.

    Example: anabranch gateway collect -c gateway.toml --judge gpt-4o --budget 5 --out outcomes.jsonl
    """
    config = only_file(config_files)
    assert config is not None, "an option that must be given"
    require("gateway", by="anabranch gateway collect")
    from anabranch.gateway.collect import for_collecting
    from anabranch.gateway.config.source import told_where
    from anabranch.gateway.gateway import Gateway
    from anabranch.gateway.http.run import load
    from anabranch.gateway.store.opening import store_file

    check_apart([out], [config, references])
    if out.suffix != ".jsonl":
        raise InputError(f"--out is {str(out)!r}; its name must end in .jsonl")
    since_s = moment(since, "--since") or 0.0
    every_s = None if every is None else seconds(every, "--every")
    if every_s == 0:
        raise InputError(f"--every is {every!r}; it must be at least 1s")
    held = load(config, store)
    file = store_file(held.store)
    if file is not None and not file.exists():
        raise DataError(f"no store at {file}; give that of the gateway with --store")
    check_apart([out], [file])
    names = model or [one.name for one in held.models]
    chosen = _judge(judge, references, anchor, names)
    tell = (lambda text: None) if quiet or as_json else _teller()
    settings = {"per_minute": rate, "max_tokens": max_tokens, "told": tell}
    bounds = {"limit": limit, "share_of": share, "since_s": since_s}
    with told_where(config):
        gateway = Gateway(for_collecting(held))
    done = asyncio.run(_run(gateway, names, chosen, out, budget, every_s, settings, bounds))
    if as_json:
        print_json({"out": str(out), "models": names, "judge": chosen.name, **dataclasses.asdict(done)})
    else:
        _print(done, out)
    if done.stopped and not done.questions + done.there:
        raise DataError(f"nothing was collected, and there is no {out}: {done.stopped}")


def _teller() -> Callable[[str], None]:
    """Says where it is now and then: often where somebody looks on, seldom in a log."""
    every_s, last_s = 1.0 if sys.stderr.isatty() else 30.0, time.monotonic()

    def tell(text: str) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= every_s:
            last_s = time.monotonic()
            say(text)

    return tell


def _judge(how: str, references: Path | None, anchor: str | None, names: list[str]) -> Judge:
    from anabranch.routers.judges import HUMAN, HumanJudge, ModelJudge, ReferenceJudge

    if how in RULES:
        if references is None:
            raise InputError(f"--judge {how} needs --references, the right answers")
        return ReferenceJudge.read(references, how)
    if references is not None:
        raise InputError(
            f"--references goes with --judge {' or '.join(RULES)}; {how!r} is taken for a model that judges"
        )
    if anchor is not None and anchor not in names:
        raise InputError(f"--anchor is {anchor!r}, which is not compared; take one of {', '.join(names)}")
    return HumanJudge(anchor or names[0]) if how == HUMAN else ModelJudge(how, anchor or names[0])


async def _run(
    made: Gateway,
    names: list[str],
    judge: Judge,
    out: Path,
    budget: float | None,
    every_s: float | None,
    settings: dict[str, Any],
    bounds: dict[str, Any],
) -> Collected:
    from anabranch.gateway.collect import TAG, Collector
    from anabranch.routers.money import nano_dollars

    async with made as gateway:
        collector = Collector(gateway, names, judge, **settings)
        if budget is not None:
            await gateway.store.set_budget(f"tag:{TAG}", nano_dollars(budget))
        while True:
            done = await collector.run(out, waits=every_s is not None, **bounds)
            enough = bounds["limit"] is not None and done.questions >= bounds["limit"]
            # A budget that has room again later ends a run, not the watch.
            if every_s is None or enough or (done.stopped and done.wait_s is None):
                return done
            await asyncio.sleep(max(every_s, done.wait_s or 0.0))


def _print(done: Collected, out: Path) -> None:
    fact(
        "added",
        f"{done.questions:,} questions ({done.there:,} were there), {done.calls:,} answers asked for, {done.reused:,} reused",
    )
    if done.judge_calls or done.judge_reused:
        fact("judged", f"{done.judge_calls:,} judgements asked for, {done.judge_reused:,} reused")
    fact("cost", f"${done.cost_usd:.6f} in this run, the judge's calls among it")
    left = {
        "that a model did not answer": done.failed,
        "that could not be judged": done.unjudged,
        "of keys that may not use all of the models": done.not_allowed,
    }
    if any(left.values()):
        fact("without", ", ".join(f"{count:,} {why}" for why, count in left.items() if count))
    if done.waiting:
        fact(
            "waiting",
            f"{done.waiting:,} questions for a person: judge them at /ui/label (needs the gateway's [admin] key), and run this again",
        )
    for why, count in done.unanswered.items():
        fact("no answer", f"{count:,} {'time' if count == 1 else 'times'}: {why}")
    for text in done.unreadable:
        fact("unclear", f"a judgement that ends in {text!r}" if text else "the judge gave no answer")
    if done.stopped:
        fact("stopped", done.stopped)
    if done.questions + done.there:
        wrote(str(out), f"anabranch gateway eval {out}")
