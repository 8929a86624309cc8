"""``anabranch study``: run the evidence experiment of a paper."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.options import FLAG, AsJson, Quiet, read_seeds
from anabranch.cli.output import fact, is_wide, print_json, say, table, wrote
from anabranch.extras import explain

if TYPE_CHECKING:
    from anabranch.studies.harness import Column, Outcome, Study

RECORDED, TRIED = Path("studies/results"), Path("runs/studies")


def study(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Which study. Without it, studies are listed.")
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full", metavar=FLAG, help="Run the recorded size (hours) instead of a short test run."),
    ] = False,
    seeds: Annotated[str | None, typer.Option(metavar="S", help="Only these seeds, e.g. 0,1 or 0-4.")] = None,
    arms: Annotated[str | None, typer.Option(metavar="A", help="Only these arms, e.g. vanilla,reuse2.")] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="Optimizer steps of a run.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help=f"Folder of results. Default: {TRIED}, with --full {RECORDED}."),
    ] = None,
    judge_only: Annotated[
        bool, typer.Option("--judge-only", metavar=FLAG, help="Run nothing; judge the recorded runs.")
    ] = False,
    fit: Annotated[
        bool,
        typer.Option(
            "--fit",
            metavar=FLAG,
            help="Run nothing; fit the study's scaling law to published losses and to the recorded runs.",
        ),
    ] = False,
    refreeze: Annotated[
        str | None,
        typer.Option(
            metavar="WHY",
            help="Run nothing; freeze plan and rule of --full again, for this reason. Verdicts are void until the arms have run "
            "again.",
        ),
    ] = None,
    power: Annotated[
        float | None,
        typer.Option(
            metavar="E",
            help="Run nothing; show how many seeds are needed to detect a difference of E, by the spread of the recorded runs.",
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Repeat a paper's experiment: several arms and seeds, compared in pairs, judged by a rule that was fixed beforehand.

    Every finished run is recorded. Stop whenever you like, which shows what has run; the same command continues.

    Several processes may work on the same study.
    """
    from anabranch import studies
    from anabranch.studies.harness import fitted, outcome_of, read_results, run_study, summarize

    if name is None:
        _list(as_json)
        return
    chosen = studies.find(name)(full=full, **({} if steps is None else {"steps": steps}))
    folder = out or (RECORDED if full else TRIED)
    if fit:
        _print_fit(chosen.name, fitted(chosen, folder), as_json)
        return
    if refreeze is not None:
        _refreeze(chosen, folder, refreeze, as_json)
        return
    if power is not None:
        _print_power(chosen, folder, power, as_json)
        return
    if judge_only:
        outcome = summarize(chosen, folder)
    else:
        try:
            outcome = run_study(
                chosen,
                folder,
                arms=None if arms is None else [arm.strip() for arm in arms.split(",")],
                seeds=None if seeds is None else read_seeds(seeds),
                progress=(lambda text: None) if quiet else (lambda text: say(f"{time.strftime('%H:%M:%S')}  {text}")),
                freezes=full,
            )
        except KeyboardInterrupt:
            if read_results(chosen, folder).runs:
                # A part of the runs is not what was asked for: what was judged before stays.
                _tell(outcome_of(chosen, folder), as_json)
            raise
    _tell(outcome, as_json)
    if not as_json:
        # Not every study has a picture.
        kinds, shown = (".json", ".json") if chosen.draw is None else ("{.json, .png, .svg}", ".png")
        wrote(
            f"{folder}/{chosen.name}{kinds} and one file a run in {folder / chosen.name}/",
            f"look at {folder / chosen.name}{shown}",
        )


def _tell(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        print_json(outcome.to_dict())
        return
    _print(outcome)


def _list(as_json: bool) -> None:
    from anabranch import studies

    found = {}
    for name in studies.names():
        try:
            found[name] = studies.find(name)().title
        except ModuleNotFoundError as error:
            told = explain(error, by=name)
            if told is None:
                raise
            found[name] = f"({told.command})"
    if as_json:
        print_json({"studies": found})
        return
    table(["study", "about"], [[name, title] for name, title in found.items()], text_columns=2)


def _refreeze(study: Study, folder: Path, why: str, as_json: bool) -> None:
    from anabranch.studies.frozen import path_of
    from anabranch.studies.harness import refreeze

    made = refreeze(study, folder, why)
    if as_json:
        print_json({"study": study.name, **made.history[-1]})
        return
    fact("frozen", f"{study.name}   {made.hash}")
    for what in made.history[-1]["changed"]:
        fact("changed", what)
    wrote(str(path_of(folder, study.name)), f"anabranch study {study.name} --full")


def _print_fit(name: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json({"study": name, "fit": rows})
        return
    headers = list(rows[0])
    cells = [[value if isinstance(value, str) else f"{value:.4g}" for value in row.values()] for row in rows]
    table(headers, cells, text_columns=1)


def _print_power(study: Study, folder: Path, effect: float, as_json: bool) -> None:
    from dataclasses import asdict

    from anabranch.errors import DataError
    from anabranch.studies.harness import read_results
    from anabranch.studies.power import planned

    results = read_results(study, folder)
    rows = planned(study.judge(results), repetitions=len(results.seeds), effect=effect)
    if not rows:
        raise DataError(
            f"no claim of study {study.name!r} has two seeds in {folder / study.name}; run two or three as a pilot first"
        )
    if as_json:
        print_json({"study": study.name, "effect": effect, "claims": [asdict(row) for row in rows]})
        return
    table(
        ["claim", "pairs", "deviation", "smallest effect", f"pairs for {effect:g}"],
        [
            [
                row.claim,
                str(row.count),
                f"{row.deviation:.3g}",
                f"{row.smallest:.3g}",
                "over 10,000" if row.needed is None else f"{row.needed:,}",
            ]
            for row in rows
        ],
        text_columns=1,
    )


def _print(outcome: Outcome) -> None:
    study = outcome.study
    fact("study", f"{study.name}   {study.title}")
    fact(
        "size",
        f"{study.settings.get('size', '')}   "
        + ", ".join(f"{name} {value}" for name, value in study.settings.items() if name != "size"),
    )
    print()
    print_arms(outcome)
    print()
    table(
        ["claim", "verdict", "baseline", "limit", "ours", "difference", "95% interval"],
        [
            [
                claim.claim,
                claim.verdict,
                _number(claim.baseline),
                " to ".join(map(_number, claim.limit)) if isinstance(claim.limit, tuple) else _number(claim.limit),
                _number(claim.ours),
                _number(claim.difference, "+.4f") + ("*" if claim.margin else ""),
                "-" if claim.interval is None else f"{claim.interval[0]:+.4f} to {claim.interval[1]:+.4f}",
            ]
            for claim in outcome.claims
        ],
        text_columns=2,
    )
    print()
    for claim in outcome.claims:
        if claim.margin:
            fact("*", f"{claim.claim}: {claim.margin}")
    print_left_out(outcome)


def print_left_out(outcome: Outcome) -> None:
    """One line per run that is not in the numbers although it was asked for or recorded, and what of the others is not alike."""
    for arm, seed in outcome.missing:
        fact("open", f"{arm} seed {seed} is under way in another process")
    for arm, seed, reason in outcome.outdated:
        fact("ignored", f"{arm} seed {seed}: the run recorded there {reason}")
    for note in outcome.notes:
        fact("note", note)


def print_arms(outcome: Outcome) -> None:
    """One row per arm: the mean of each column, with the half-width of the first one's interval."""
    columns = [column for column in outcome.study.columns if _is_measured(outcome, column.metric)]
    about = ["about"] if is_wide() else []
    rows = []
    for arm in outcome.study.arms:
        runs = outcome.results.runs.get(arm.name, {})
        if runs:
            cells = [_cell(outcome, arm.name, column, first=column is columns[0]) for column in columns]
            rows.append([arm.name, *([arm.about] if about else []), str(len(runs)), *cells])
    headers = ["arm", *about, "seeds", *(column.header for column in columns)]
    table(headers, rows, text_columns=1 + len(about))


def _is_measured(outcome: Outcome, metric: str) -> bool:
    return any(outcome.results.values(arm, metric) for arm in outcome.results.runs)


def _cell(outcome: Outcome, arm: str, column: Column, *, first: bool) -> str:
    found = outcome.results.mean(arm, column.metric)
    if not found.count:
        return "-"
    text = format(found.mean, column.form)
    return f"{text} ± {format(found.half_width, column.form)}" if first and found.interval else text


def _number(value: Any, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)
