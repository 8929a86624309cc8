"""``anabranch gateway eval``: judge routers on recorded outcomes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.gateway.off_policy import is_log, show_log
from anabranch.cli.gateway.options import (
    AllowLeak,
    ColumnMap,
    Data,
    EmbedderKind,
    Fields,
    Named,
    Prices,
    Unseen,
    check_ending,
    embed,
    make_embedder,
    measured,
    read_data,
    read_strategies,
    rest,
    say_read,
)
from anabranch.cli.gateway.verdict import Ending, print_verdict
from anabranch.cli.graph.waiting import waiting
from anabranch.cli.options import AsJson, Quiet, Seed, finite_number
from anabranch.cli.output import fact, print_json, print_line, say, table
from anabranch.errors import DataError, InputError
from anabranch.extras import require
from anabranch.files import check_apart

if TYPE_CHECKING:
    from anabranch.routers.contract.dataset import Recorded
    from anabranch.routers.contract.query import Pool
    from anabranch.routers.referee import Report


def evaluate(
    data: Data,
    router: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Evaluate these routers (made by fit) instead of fitting new ones."),
    ] = None,
    strategy: Named = None,
    fields: Fields = None,
    embedder: EmbedderKind = "hashed",
    test: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Outcomes to evaluate on. Default: a share of DATA, stratified by task."),
    ] = None,
    test_share: Annotated[
        float, typer.Option(metavar="F", min=0.01, max=0.99, callback=finite_number, help="Size of that share.")
    ] = 0.2,
    seeds: Annotated[
        int,
        typer.Option(metavar="N", min=1, max=10_000, help="How often each strategy is fitted, with different seeds."),
    ] = 3,
    seed: Seed = 0,
    dollar: Annotated[
        float,
        typer.Option(
            metavar="F",
            min=0,
            callback=finite_number,
            help="For the regret: how much score a dollar (or unit of --budget) is worth.",
        ),
    ] = 0.0,
    unit: Annotated[
        str,
        typer.Option(
            "--budget",
            metavar="UNIT",
            help="Unit of costs: dollars, seconds, tokens or joules (from the price file).",
        ),
    ] = "dollars",
    columns: ColumnMap = None,
    prices: Prices = None,
    unseen: Unseen = False,
    allow_leak: AllowLeak = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write an HTML page with a picture and tables.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw cost against quality (.png, .svg).")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the tables as Markdown.")] = None,
    margin: Annotated[
        float,
        typer.Option(
            metavar="F",
            min=0,
            max=1,
            help="Difference, as a share of the range of scores, below which qualities count as equal.",
        ),
    ] = 0.02,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate routers on recorded outcomes, against random choice, each single model, the best model for each task, and the oracle.

    It ends in a verdict: which router is better than the best single model, or saves money at equal quality, or that neither is resolved;
    and what to serve. With --router, the verdict is stored with the routers, for route and gateway serve.

    Without --router, each strategy is fitted to a part of DATA and evaluated on the rest. In a log, where few questions were answered by
    every model, scores are estimated from randomised choices, as in replay.

    Example: anabranch gateway eval outcomes.jsonl.gz --strategy knn --html report.html
    """
    check_ending(picture, "--picture", (".png", ".svg"))
    check_ending(html, "--html", (".html",))
    check_ending(markdown, "--markdown", (".md",))
    check_apart([html, picture, markdown], [data, test, prices, *_read_of(router)])
    if html is not None or picture is not None:
        require("plots", by=f"drawing {html or picture}")
    with waiting(f"reading {data}", quiet):
        recorded, pool = read_data(data, columns, prices)
    recorded = measured(recorded, unit, prices)
    settings: dict[str, Any] = {"pool": pool, "dollar": dollar, "allow_leak": allow_leak, "margin": margin}

    def read_copies() -> tuple[Recorded, Pool]:
        log, pool = read_data(data, columns, prices, keep_copies=True, tell=False)
        return measured(log, unit, prices), pool

    if test is None and is_log(recorded, lambda: read_copies()[0]):
        if wanted := [str(path) for path in (html, picture, markdown) if path is not None]:
            raise InputError(
                f"{wanted[0]} needs questions that every model answered, to compare them on; of {data} most have the answers of some. "
                "What can be told of such a log is printed, or --json"
            )
        ending = Ending(data, router, strategy, allow_leak)
        show_log(*read_copies(), ending, fields, embedder, test_share, seed, margin, quiet, as_json)
        return
    if router is None:
        other = None if test is None else measured(read_data(test, columns, prices)[0], unit, prices)
        parts = _parts(recorded, other, test_share, seed)
        chosen = read_strategies(strategy, fields)
        report = _learn_and_judge(chosen, *parts, embedder, range(seed, seed + seeds), settings, quiet)
    else:
        report = _judge(router, strategy, recorded, unseen, settings, quiet)
    assert report.verdict is not None
    ending = Ending(data, router, strategy, allow_leak)
    report = report.replace(unit=unit, verdict=ending.of(report.verdict))
    written = _write(report, data, html, picture, markdown)
    if as_json:
        print_json({**report.to_dict(), "wrote": written, "read": recorded.what_was_read()})
        return
    say_read(recorded)
    _print(report, written)
    print_verdict(report.verdict)


def _read_of(router: Path | None) -> list[Path]:
    if router is None or not router.is_dir():
        return [] if router is None else [router]
    from anabranch.routers.fitted import files_of

    return files_of(router)


def _parts(data: Recorded, test: Recorded | None, share: float, seed: int) -> tuple[Recorded, Recorded]:
    """What to learn from and what to judge on."""
    from anabranch.routers.data import split

    if test is not None:
        return data, test
    train, held_out = split(data, (1 - share, share), seed=seed)
    return train, held_out


def _learn_and_judge(
    chosen: dict[str, Any],
    train: Recorded,
    test: Recorded,
    embedder: str,
    seeds: range,
    settings: dict[str, Any],
    quiet: bool,
) -> Report:
    from anabranch.routers.data import check_disjoint
    from anabranch.routers.embed import embed_of
    from anabranch.routers.referee import evaluate as judge

    if not settings["allow_leak"]:
        # Before the work.
        check_disjoint(train, test)

    def tell(text: str) -> None:
        if not quiet:
            say(text)

    if any(one.needs_vector or one.learns_vectors for one in chosen.values()):
        made = make_embedder(embedder).fit(train.query)
        settings["embed"] = embed_of(made)
        train, test = embed(made, train, tell), embed(made, test, tell)
    with waiting("judging", quiet):
        return judge(chosen, train=train, test=test, seeds=seeds, **settings)


def _judge(
    folder: Path, names: list[str] | None, data: Recorded, unseen: bool, settings: dict[str, Any], quiet: bool
) -> Report:
    """Fitted routers on what they did not learn from. Of the very outcomes they were fitted on, that is the part held out."""
    from anabranch.routers.embed.cache import fingerprint
    from anabranch.routers.fitted import load_folder
    from anabranch.routers.referee import evaluate as judge
    from anabranch.routers.referee.evaluate import digest

    found = load_folder(folder, names)
    if not settings["allow_leak"]:
        if unseen or digest(data) == found.manifest.get("data"):
            data = rest(found, data)
        found.check_unseen(data)
    data = data.only([name for name in found.manifest["models"] if name in data.models] or data.models)
    embedded: dict[str, Recorded] = {}
    for router in found.routers.values():
        if router.embedder is not None:
            embedded.setdefault(
                fingerprint(router.embedder), embed(router.embedder, data, say if not quiet else _nothing)
            )
    if len(embedded) > 1:
        raise DataError(f"the routers in {folder} were fitted with different embedders; judge them one at a time")
    data = next(iter(embedded.values()), data)
    strategies = {name: router.strategy for name, router in found.routers.items()}
    with waiting("judging", quiet):
        return judge(strategies, train=None, test=data, best_single=found.manifest.get("best_single"), **settings)


def _nothing(text: str) -> None:
    pass


def _write(report: Report, name: str, html: Path | None, picture: Path | None, markdown: Path | None) -> list[str]:
    from anabranch.files import atomic_file, atomic_write_text

    if picture is not None:
        from anabranch.report.style import to_png, to_svg
        from anabranch.routers.referee.pictures import draw

        made = draw(report)
        with atomic_file(picture) as temporary:
            temporary.write_bytes(to_svg(made).encode() if picture.suffix == ".svg" else to_png(made))
    if html is not None:
        from anabranch.routers.referee.page import page

        atomic_write_text(html, page(report, f"Routers on {Path(name).name}"))
    if markdown is not None:
        atomic_write_text(markdown, report.to_markdown())
    return [str(path) for path in (picture, html, markdown) if path is not None]


def _print(report: Report, written: list[str]) -> None:
    for headers, rows in report.tables():
        table(headers, rows)
        print()
    print_line(report.describe())
    for name, reason in report.failed.items():
        say(f"{name} was left out: {reason}")
    if written:
        fact("wrote", ", ".join(written))
