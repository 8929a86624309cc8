"""``anabranch gateway scale``: SCALE on questions with known answers, and rows of its right runs to learn from."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.options import AsJson, Quiet, Seed, only_file, read_assignments, read_toml
from anabranch.cli.output import fact, print_json, say, shell_word, table, wrote
from anabranch.cli.progress import Progress
from anabranch.errors import BackendError, ConfigError, DataError
from anabranch.files import atomic_write_text, check_apart
from anabranch.locks import locked

if TYPE_CHECKING:
    from anabranch.routers.scale.reasoner import SelectiveReasoner
    from anabranch.routers.scale.traces import Question, Solved

TRACES, ROWS, JOURNALS = "traces.jsonl", "rows.jsonl", "journals"


def scale(
    questions: Annotated[
        Path, typer.Argument(metavar="QUESTIONS", help="JSON lines (also .gz) with question and answer (or answers).")
    ],
    url: Annotated[
        str, typer.Option("--url", metavar="URL", help="Endpoint that speaks OpenAI's API: http://127.0.0.1:8000/v1.")
    ],
    system1: Annotated[str, typer.Option(metavar="NAME", help="Model of easy steps, by its name there.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Folder of the runs; those of the same questions go on, others are not replaced.",
        ),
    ],
    system2: Annotated[
        str | None, typer.Option(metavar="NAME", help="Model of hard steps. Default: that of --system1.")
    ] = None,
    key_env: Annotated[
        str | None, typer.Option(metavar="VAR", help="Environment variable that holds the endpoint's key.")
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="Runs of each question.")] = 1,
    most: Annotated[
        int, typer.Option(metavar="N", min=1, max=1_000_000, help="Rows to learn from, at most. The paper keeps 800.")
    ] = 800,
    at_once: Annotated[int, typer.Option(metavar="N", min=1, max=256, help="Runs at a time.")] = 4,
    config_files: Annotated[
        list[Path] | None, typer.Option("--config", metavar="FILE", help="Fields of the strategy scale as TOML.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Set a field of the strategy scale, e.g. --set rule.tau=0.7."
        ),
    ] = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Solve questions by SCALE, and write the right runs as rows that a model may learn from.

    Example: anabranch gateway scale questions.jsonl --url http://127.0.0.1:8000/v1 --system1 qwen3 --out runs/scale
    """
    from anabranch.routers.scale.client_ask import ClientAsk, PostClient
    from anabranch.routers.scale.traces import learnable, read_questions, solve_all
    from anabranch.web.endpoint import Endpoint

    config_file = only_file(config_files)
    check_apart([out / TRACES, out / ROWS], [questions, config_file])
    asked = read_questions(questions)
    reasoner, call_s = _reasoner(system1, system2 or system1, config_file, assignments, seed)
    endpoint = Endpoint(url, system1, key_env=key_env, timeout_s=call_s)
    journals = out / JOURNALS
    journals.mkdir(parents=True, exist_ok=True)
    right = 0
    with _alone(out, asked, samples) as kept, Progress(len(asked) * samples, "run", quiet=quiet) as progress:
        done = 0

        def tell(one: Solved) -> None:
            nonlocal done, right
            done, right = done + 1, right + one.is_right
            progress.update(done, f"{right:,} right")

        runs = asyncio.run(
            solve_all(
                reasoner,
                asked,
                lambda: ClientAsk(PostClient(endpoint)),
                samples=samples,
                at_once=at_once,
                journals=journals,
                tell=tell,
            )
        )
        # A journal may be damaged, and who is asked then may be away: a run that was done is not lost for that.
        runs = [kept.get((one.question.text, one.attempt), one) if one.trace is None else one for one in runs]
        rows = learnable(runs, most=most)
        for place, lines in ((TRACES, [one.to_dict() for one in runs]), (ROWS, rows)):
            atomic_write_text(out / place, "".join(f"{_line(line)}\n" for line in lines))
    _tell(runs, rows, out, as_json)
    failed = [one for one in runs if one.error]
    if len(failed) == len(runs):
        raise BackendError(f"no run was done; the first failed with {failed[0].error}")


@contextmanager
def _alone(out: Path, asked: list[Question], samples: int) -> Iterator[dict[tuple[str, int], Solved]]:
    """Whoever writes a folder's runs has it alone, and loses none of those in it that were done, which are given. Raises DataError."""
    with locked(out / ".scale.lock") as is_ours:
        if not is_ours:
            raise DataError(f"{out} is in use by another run; wait for its end, or take another folder")
        yield _kept(out, asked, samples)


def _kept(out: Path, asked: list[Question], samples: int) -> dict[tuple[str, int], Solved]:
    """The runs in a folder that were done, by text and attempt. Raises DataError where what will be written would not hold them all."""
    from anabranch.routers.scale.traces import attempts, journal_of, read_traces

    if not (out / TRACES).exists():
        if (out / ROWS).exists():
            raise DataError(f"{out / ROWS} would be replaced, and no {TRACES} says what it is of; take another folder")
        return {}
    coming = {(question.text, attempt) for question, attempt in attempts(asked, samples)}
    done = {(one.question.text, one.attempt): one for one in read_traces(out / TRACES) if one.trace is not None}
    lost = len([run for run in done if run not in coming])
    if lost:
        raise DataError(
            f"{out / TRACES} would be replaced, and {lost:,} of its {len(done):,} runs are on other questions, or further samples, "
            "and would be lost; take another folder, or ask for those as well"
        )
    anew = [run for run in done if not journal_of(out / JOURNALS, *run).exists()]
    if anew:
        raise DataError(
            f"{out / TRACES} would be replaced, and the calls of {len(anew):,} of its {len(done):,} runs are not in {out / JOURNALS}, so "
            "they would be made anew, maybe by others; put them back, or take another folder"
        )
    return done


def _line(row: dict[str, Any]) -> str:
    """As JSON; half a character, which a model may write, is no UTF-8, and is escaped."""
    text = json.dumps(row, ensure_ascii=False)
    return json.dumps(row) if any("\ud800" <= letter <= "\udfff" for letter in text) else text


def _reasoner(
    system1: str, system2: str, config_file: Path | None, assignments: list[str] | None, seed: int
) -> tuple[SelectiveReasoner, float]:
    """By the fields of a strategy, and the longest that a call may take."""
    from anabranch.config import from_dict, override
    from anabranch.routers.scale.program import Scale

    given = {} if config_file is None else read_toml(config_file)
    changed = read_assignments(assignments)
    said = sorted({"system1", "system2", "seed"} & {*given, *changed})
    if said:
        raise ConfigError(f"{said[0]} is a field of the config, and an option of the command line; leave the field out")
    fields = {"kind": "scale", **given, "system1": system1, "system2": system2, "seed": seed}
    config = override(from_dict(Scale.Config, fields), changed)
    return config.build().reasoner(), float(config.call_s)


def _tell(runs: list[Solved], rows: list[dict[str, str]], out: Path, as_json: bool) -> None:
    whole = [one.trace for one in runs if one.trace is not None]
    totals = [one.totals for one in whole]
    steps = [step for one in whole for step in one.steps]
    facts: dict[str, Any] = {
        "runs": len(runs),
        "right": sum(one.is_right for one in runs),
        "failed": sum(bool(one.error) for one in runs),
        "degraded": sum(one.is_degraded for one in whole),
        "steps": len(steps),
        "hard_steps": sum(one.system == 2 for one in steps),
        "tokens": sum(one.all.completion for one in totals),
        "overhead_tokens": sum(one.overhead.completion for one in totals),
        "calls": sum(one.all.calls for one in totals),
        "rows": len(rows),
    }
    if as_json:
        print_json({**facts, "out": str(out)})
        return
    per = max(1, len(whole))
    table(
        ["runs", "right", "failed", "degraded", "steps\neach", "hard", "tokens\neach", "overhead", "rows"],
        [
            [
                f"{facts['runs']:,}",
                f"{facts['right']:,}",
                f"{facts['failed']:,}",
                f"{facts['degraded']:,}",
                f"{len(steps) / per:.1f}",
                f"{facts['hard_steps'] / max(1, len(steps)):.0%}",
                f"{facts['tokens'] / per:,.0f}",
                f"{facts['overhead_tokens'] / max(1, facts['tokens']):.0%}",
                f"{len(rows):,}",
            ]
        ],
        text_columns=0,
    )
    for one in [one for one in runs if one.error][:3]:
        say(f"failed: {' '.join(one.question.text.split())[:60]!r}: {one.error}")
    fact("traces", str(out / TRACES))
    wrote(str(out / ROWS), f"anabranch adapt MODEL {shell_word(out / ROWS)} --out adapted")
