"""``anabranch gateway curve``: from recorded samples to the number of answers that pays."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.gateway.doors import door
from anabranch.cli.gateway.options import ColumnMap, Data, Prices, check_ending, read_data
from anabranch.cli.graph.waiting import waiting
from anabranch.cli.options import FLAG, AsJson, Quiet, Seed, finite_number
from anabranch.cli.output import fact, print_json, print_line, say, shell_word, table
from anabranch.errors import InputError
from anabranch.extras import require
from anabranch.files import check_apart

if TYPE_CHECKING:
    from anabranch.routers.contract.dataset import Recorded
    from anabranch.routers.sample_curves import SampleCurve

_SAME = ("no answer was right", "every answer was right")


def curve(
    data: Data,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="NAME", help="This model alone. May be repeated. Default: all."),
    ] = None,
    eps: Annotated[
        float | None,
        typer.Option(
            metavar="F",
            callback=finite_number,
            help="Share of questions that one more answer must solve to be worth drawing. Default: 0.01.",
        ),
    ] = None,
    value: Annotated[
        float | None,
        typer.Option(
            metavar="USD", callback=finite_number, help="Worth of a right answer; with the cost of one it sets --eps."
        ),
    ] = None,
    cost: Annotated[
        float | None,
        typer.Option(
            metavar="USD", callback=finite_number, help="Cost of an answer. Default: the mean of those recorded."
        ),
    ] = None,
    rounds: Annotated[
        bool,
        typer.Option("--rounds", metavar=FLAG, help="Samples are rounds of rethinking one answer, in their order."),
    ] = False,
    right: Annotated[
        float,
        typer.Option(
            metavar="F",
            min=0,
            max=1,
            callback=finite_number,
            help="Score, of the scale from 0 to 1, from which an answer is right.",
        ),
    ] = 0.5,
    scale: Annotated[
        tuple[float, float],
        typer.Option(
            "--scale", metavar="LOW HIGH", help="Scores of the worst and the best answer. Others are refused."
        ),
    ] = (0.0, 1.0),
    columns: ColumnMap = None,
    prices: Prices = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the curves (.png or .svg).")] = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Fit how the share of solved questions grows with answers, and tell how many of them pay.

    A row is a question with several samples of a model: {"question": "...", "samples": [true, false, ...]}, maybe with task and model, and
    with what they said ("answers": ["...", ...]): then also what a vote delivers. Fewer than 10 questions give no 95% and no config.

    Example: anabranch gateway curve samples.jsonl --value 0.05 --cost 0.0004 --picture curve.svg
    """
    from anabranch.routers.sample_curves import config_lines, sample_curves
    from anabranch.routers.samples import RIGHT
    from anabranch.routers.score_scale import UNIT

    check_ending(picture, "--picture", (".png", ".svg"))
    check_apart([picture], [data, prices])
    if picture is not None:
        require("plots", by=f"drawing {picture}")
    with waiting(f"reading {data}", quiet):
        recorded, _ = read_data(data, columns, prices, by_sample=True)
    least = _gains(recorded, model, eps, value, cost)
    with waiting("fitting", quiet):
        found = sample_curves(
            recorded,
            eps=least,
            kind="sequential" if rounds else "parallel",
            right=right,
            scale=scale,
            models=model,
            seed=seed,
        )
        if picture is not None:
            _draw(found, picture, f"{Path(data).name}", seed)
    told = {"right": (right, RIGHT), "scale": (list(scale), list(UNIT))}
    fields = {name: given for name, (given, usual) in told.items() if given != usual}
    lines = config_lines(found, **fields, **({} if value is None else {"value_usd": value}))
    written = [] if picture is None else [str(picture)]
    if as_json:
        curves = [one.to_dict() for one in found]
        print_json({"curves": curves, "config": lines, "wrote": written, "read": recorded.what_was_read()})
        return
    _print(found)
    if lines:
        print()
        print_line(lines.removesuffix("\n"))
    if written:
        fact("wrote", written[0])
    # Of too few questions, or where all went alike, what is fitted says no more than the lines that are not given.
    if lines and _can_be_counted(recorded, right, scale):
        if rounds:
            fields["rounds"] = True
        fact("next", _fit(data, columns, prices, fields))


def _fit(data: str, columns: str | None, prices: Path | None, fields: dict[str, Any]) -> str:
    """The command that counts the same samples, read as they were here."""
    more = [] if columns is None else ["--columns", columns]
    more += [] if prices is None else ["--prices", str(prices)]
    for name, given in fields.items():
        more += ["--set", f"best_of.{name}={json.dumps(given, separators=(',', ':'))}"]
    return f"{door()} fit {shell_word(data)} --strategy best_of --out routers{''.join(f' {shell_word(one)}' for one in more)}"


def _can_be_counted(data: Recorded, right: float, scale: tuple[float, float]) -> bool:
    """Whether all models of the file have scores of the scale: a fit counts them all, be there curves of some alone."""
    from anabranch.errors import DataError
    from anabranch.routers.samples import drawn

    try:
        for model in data.models:
            drawn(data, model, right=right, scale=scale)
    except DataError as error:
        say(f"no fit to this file would be taken: {error}")
        return False
    return True


def _gains(
    data: Recorded, models: list[str] | None, eps: float | None, value: float | None, cost: float | None
) -> dict[str, float]:
    """Of each model, the gain from which one more answer is worth drawing. Raises InputError for prices that are none."""
    import numpy as np

    from anabranch.routers.sample_curves import EPS, LEAST_EPS

    for option, given in (("--value", value), ("--cost", cost)):
        if given is not None and not given > 0:
            raise InputError(f"{option} is {given:g}; it must be above 0 dollars")
    if cost is not None and value is None:
        raise InputError(f"--cost is {cost:g} without --value; say what a right answer is worth")
    if eps is not None and not LEAST_EPS <= eps < 1:
        raise InputError(f"--eps is {eps:g}; it must be a share of questions, from {LEAST_EPS:g} to below 1")
    gains = {}
    for name in data.only(models).models if models else data.models:
        known = math.nan if cost is None else cost
        if value is not None and cost is None and data.cost_NM is not None:
            costs_N = data.cost_NM[:, data.models.index(name)]
            known = float(np.nanmean(costs_N)) if np.isfinite(costs_N).any() else math.nan
        if value is not None and not known > 0:
            why = "is 0" if known == 0 else "the data do not say"
            raise InputError(f"--value needs what an answer of {name} costs, which {why}; give --cost")
        paid = 0.0 if value is None else known / value
        gains[name] = max(paid, (EPS if value is None else 0.0) if eps is None else eps)
        if value is not None and not LEAST_EPS <= gains[name] < 1:
            why = "none pays" if gains[name] >= 1 else f"gains of less than {LEAST_EPS:g} of all questions would pay"
            raise InputError(f"an answer of {name} costs {known:g} and a right one is worth {value:g}, so that {why}")
    return gains


def _draw(found: list[SampleCurve], place: Path, name: str, seed: int) -> None:
    from anabranch.files import atomic_file
    from anabranch.report.style import to_png, to_svg
    from anabranch.routers.referee.sample_pictures import SHOWN, draw

    if len(found) > SHOWN:
        say(f"drawn are the first {SHOWN} of {len(found)} curves; name a --model")
    made = draw(found, f"Answers that pay: {name}", seed=seed)
    with atomic_file(place) as temporary:
        temporary.write_bytes(to_svg(made).encode() if place.suffix == ".svg" else to_png(made))


def _print(found: list[SampleCurve]) -> None:
    from anabranch.test_time.curves import LEAST_QUESTIONS

    rows, has_votes = [], any(one.vote is not None for one in found)
    for one in found:
        low, high = one.stop_interval
        between = "-" if one.too_few else f"{math.floor(low):,} to {math.ceil(high):,}"
        rows.append(
            [
                one.model,
                "all" if one.task is None else one.task,
                f"{one.questions:,}",
                f"{len(one.observed_N)}",
                f"{one.observed_N[0]:.3f}",
                f"{one.observed_N[-1]:.3f}",
                _between(one, "f_max"),
                _between(one, "a"),
                _between(one, "b"),
                _told(one, f"{one.stop:,}"),
                between,
                _told(one, f"{one.curve.value(one.stop):.3f}"),
                _told(one, f"{one.single_stop:,}"),
                *(["-" if one.vote is None else f"{list(one.vote.values())[-1]:.3f}"] if has_votes else []),
            ]
        )
    headers = [
        "model",
        "task",
        "questions",
        "samples",
        "solved\nby 1",
        "solved\nby all",
        "f_max",
        "a",
        "b",
        "stop at\nN*",
        "95%",
        "solved\nby N*",
        "N* of\none p",
        *(["vote\nof all"] if has_votes else []),
    ]
    table(headers, rows, text_columns=2)
    gains = ", ".join(f"{eps:.4g}" for eps in dict.fromkeys(one.eps for one in found))
    fact("gain", f"at least {gains} of all questions by one more answer")
    for one in found:
        name = one.model if one.task is None else f"{one.model}, {one.task}"
        if one.left_out:
            say(f"{name}: {one.left_out:,} questions with fewer than {len(one.observed_N)} samples were left out")
        if one.all_same is not None:
            config = "; no config is given for it" if one.task is None else ""
            say(f"{name}: {_SAME[one.all_same]}, which bounds the curve and shows none{config}")
        if one.too_few:
            config = ", and no config is given for it" if one.task is None else ""
            say(
                f"{name}: too few questions ({one.questions}) to tell of others: no 95% is known{config}; "
                f"record at least {LEAST_QUESTIONS}"
            )
        if one.is_cut:
            say(f"{name}: drawn until one was right, so that the curve is that of survival")
        if one.vote is not None:
            shares = ", ".join(f"{n} {share:.3f}" for n, share in one.vote.items())
            fact("vote", f"{name}: right of the commonest of so many answers: {shares}")
        if one.lost is not None:
            fact("lost", f"{name}: a round makes {one.lost:.1%} of right answers wrong")


def _between(one: SampleCurve, name: str) -> str:
    if one.too_few:
        return f"{getattr(one.curve, name):.3g}"
    low, high = one.interval[name]
    return f"{getattr(one.curve, name):.3g} ({low:.3g}-{high:.3g})" if one.all_same is None else f"{low:.3g}-{high:.3g}"


def _told(one: SampleCurve, value: str) -> str:
    """Of outcomes that show a curve."""
    return value if one.all_same is None else "-"
