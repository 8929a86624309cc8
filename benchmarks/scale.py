"""What does SCALE itself take of a step, beside the calls it makes: is it below 2 ms?

Models that answer at once, on one event loop; one thread, processor time. A step is its score and its answer, with the context, the seeds,
the records and the trace of both; rows hold whole runs by their number of steps. Each row is against the bar: ``peer`` is 2, a ratio of 1
or above passes.

    given       steps that are given: a score and an answer each
    outlined    8 outlines and a choice before them, shared out over the steps
    journal     the same with every call written to disk at once, and synced

    python benchmarks/scale.py --threads 1 --json benchmarks/results/scale.json
"""

import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _harness import arguments, finish, start
from anabranch.routers.contract.ask import Answered
from anabranch.routers.scale import Given, Prompted, SelectiveReasoner

BAR_MS = 2.0
PROBLEM = "A train leaves at noon, and another one an hour later. " * 10


class AtOnce:
    """A model that says what SCALE wants to read, at once; outlines of so many steps, no two alike."""

    left = float("inf")

    def __init__(self, num_steps: int) -> None:
        self._steps, self._count = num_steps, 0

    async def __call__(self, arm: Any, messages: Any, **how: Any) -> Answered:
        text = messages[-1]["content"]
        self._count += 1
        if "How hard is this step?" in text:
            said = "0.3"
        elif "Which version is best?" in text:
            said = "version1"
        elif "Split it into" in text:
            said = json.dumps(
                {f"step{at}": f"Find number {at}, way {self._count}." for at in range(1, self._steps + 1)}
            )
        else:
            said = "First this, then that. " * 20 + r"So it is \boxed{7}."
        return Answered.saying(said, model=arm.model, prompt_tokens=len(text) // 4, completion_tokens=len(said) // 4)


def against_bar(case: str, work: Callable[[], Any], steps: int, rounds: int, each: int = 5) -> dict[str, Any]:
    """Milliseconds of a step against the bar, median over rounds and their interquartile range."""
    times = []
    for _ in range(rounds + 1):
        began = time.process_time()
        for _ in range(each):
            work()
        times.append(1e3 * (time.process_time() - began) / each / steps)
    ratios = [BAR_MS / value for value in times[1:]]  # the first warms up
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    row = {
        "case": case,
        "ours": round(statistics.median(times[1:]), 4),
        "peer": BAR_MS,
        "ratio": round(statistics.median(ratios), 3),
        "spread": round(high - low, 3),
        "unit": "ms",
        "peer_name": "bar of 2 ms a step",
    }
    print(f"{case:<40} {row['ours']:8.3f} ms   ratio to the bar {row['ratio']:.2f}", file=sys.stderr, flush=True)
    return row


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    start(options)
    rows: list[dict[str, Any]] = []
    for steps in (3, 16):
        texts = tuple(f"Find number {at} of those that are asked for." for at in range(1, steps + 1))
        given = SelectiveReasoner(system1="a", system2="b", decomposer=Given.Config(steps=texts).build())
        outlined = SelectiveReasoner(system1="a", system2="b", decomposer=Prompted.Config(k=8).build())
        models = AtOnce(steps)
        trace = asyncio.run(outlined.solve(PROBLEM, models))
        if len(trace.steps) != steps or trace.answer != "7" or trace.is_degraded:
            raise SystemExit(f"the run is not what it should be: {trace.notes}")

        def journaled(given: SelectiveReasoner = given, models: AtOnce = models) -> None:
            with tempfile.TemporaryDirectory() as folder:
                asyncio.run(given.solve(PROBLEM, models, journal=Path(folder) / "run.jsonl"))

        works: dict[str, Callable[[], Any]] = {
            f"given, {steps} steps": lambda given=given, models=models: asyncio.run(given.solve(PROBLEM, models)),
            f"outlined, {steps} steps": lambda outlined=outlined, models=models: asyncio.run(
                outlined.solve(PROBLEM, models)
            ),
            f"journal, {steps} steps": journaled,
        }
        rows += [against_bar(case, work, steps, options.rounds) for case, work in works.items() if options.only in case]
    finish("scale", rows, options, ["numpy"])


if __name__ == "__main__":
    main()
