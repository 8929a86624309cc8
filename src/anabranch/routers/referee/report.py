"""What the referee found, as a value: JSON for machines, Markdown for people; `page` and `pictures` show it."""

import dataclasses
import importlib.metadata
import math
import platform
from dataclasses import dataclass, field
from typing import Any, Self

from anabranch.routers.referee.verdict import Verdict


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One strategy. What needs costs is None where costs are not known.

    Attributes:
        name: of the strategy.
        score: mean quality at its own setting, mean over seeds.
        interval: 95%, paired bootstrap over questions.
        gain: score - that of the best single model, with ``gain_interval``, of this one alone. p, p_holm: as the verdict has them.
        gap: score of the oracle - score.
        regret: utility given up against the best choice in hindsight, a mean over questions.
        by_seed: score of each seed.
        calls: mean calls of each model a question.
        cost: mean dollars a question.
        curve: points (cost, score) over its knob.
        aiq: mean score of the hull over the declared range of costs, where budgets below its cheapest setting are met by mixing with
            the cheapest model.
        aiq_routerbench: as RouterBench's code reckons it, on the strategies compared.
        cost_save: largest share of the best single model's cost saved without loss; None if it is never as good.
        pareto_distance: from its own setting to the hull of all that is compared; ranges of cost and score count 1.
        apgr, apgr_in_bins, cpt: of a pool of two (see `two_models`).
        fit_s: processor seconds of learning. latency_ms: of a decision given a vector, p50 and p99. memory_bytes: of what it learned.
    """

    name: str
    score: float
    interval: list[float]
    gain: float
    gain_interval: list[float]
    p: float
    p_holm: float
    gap: float
    regret: float
    by_seed: list[float]
    calls: dict[str, float]
    cost: float | None = None
    curve: list[list[float]] | None = None
    aiq: float | None = None
    aiq_routerbench: float | None = None
    cost_save: float | None = None
    pareto_distance: float | None = None
    apgr: float | None = None
    apgr_in_bins: float | None = None
    cpt: dict[str, float | None] | None = None
    fit_s: float | None = None
    latency_ms: dict[str, float] | None = None
    memory_bytes: int = 0

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class Report:
    """All strategies and baselines on one test.

    Attributes:
        models: of the pool.
        num_test, num_train: questions judged on and learned from; None for strategies that had learned before.
        left_out: test questions without the outcome of every model.
        strategies: in the order they were given.
        baselines: ``random``, ``best_single``, ``best_per_task`` (where tasks are known) and ``oracle``: score, cost, aiq and more.
        singles: the same of each model alone.
        mixing: what drawing among single models at random reaches.
        failed: strategies that could not be judged, and why.
        cost_range: dollars a question between which AIQ is taken.
        dollar: score that a unit of cost is worth, for regret. unit: what costs are in.
        verdict: who is better than the best single model, what equal quality costs, and what to serve.
        data: digests of the outcomes. seconds: wall time. versions: of what the result depends on.
    """

    models: list[str]
    num_test: int
    num_train: int | None = None
    left_out: int = 0
    strategies: list[Standing] = field(default_factory=list)
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)
    singles: dict[str, dict[str, Any]] = field(default_factory=dict)
    mixing: dict[str, Any] | None = None
    failed: dict[str, str] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    cost_range: tuple[float, float] | None = None
    dollar: float = 0.0
    unit: str = "dollars"
    verdict: Verdict | None = None
    data: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def ranked(self) -> list[Standing]:
        """Strategies, best score first."""
        return sorted(self.strategies, key=lambda one: -one.score)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        found = dataclasses.asdict(self)
        return {
            "strategies": found.pop("strategies"),
            "baselines": {**found.pop("baselines"), "single": found.pop("singles"), "mixing": found.pop("mixing")},
            **found,
            "verdict": None if self.verdict is None else self.verdict.to_dict(),
            "versions": versions(),
        }

    def to_markdown(self) -> str:
        """Tables of strategies and baselines, a sentence on how they were judged, and the verdict."""
        lines = [f"{self.describe()}\n"]
        for headers, rows in self.tables():
            lines += [*_markdown(headers, rows), ""]
        if self.verdict is not None:
            lines += ["## Verdict", "", *(f"- {sentence}" for sentence in self.verdict.sentences())]
            lines += [f"- Next: `{self.verdict.next}`"] if self.verdict.next else []
        lines += [f"- {name} was left out: {reason}" for name, reason in self.failed.items()]
        return "\n".join(lines).rstrip() + "\n"

    def tables(self) -> list[tuple[list[str], list[list[str]]]]:
        """Headers and cells of strategies, best first, and of baselines; columns that hold nothing are left out."""
        cost = "$ per 1k\nqueries" if self.unit == "dollars" else f"{self.unit}\nper 1k"
        found = []
        for headers, rows in ((HEADERS, self.rows()), (BASELINE_HEADERS, self.baseline_rows())):
            shown = [column for column in range(len(headers)) if column == 0 or any(row[column] for row in rows)]
            named = [cost if headers[column] == COST else headers[column] for column in shown]
            found.append((named, [[row[column] for column in shown] for row in rows]))
        return found

    def describe(self) -> str:
        """How strategies were judged, in a sentence."""
        learned = "learned before" if self.num_train is None else f"learned from {self.num_train:,}"
        seeds = f", {len(self.seeds)} seeds" if len(self.seeds) > 1 else ""
        out = f" ({self.left_out:,} without every outcome were left out)" if self.left_out else ""
        return f"Judged on {self.num_test:,} questions{out} and {len(self.models)} models, {learned}{seeds}."

    def rows(self) -> list[list[str]]:
        """Cells under `HEADERS`, best first."""
        return [
            [
                one.name,
                number(one.score),
                f"{number(one.interval[0])}-{number(one.interval[1])}",
                f"{one.gain:+.4f}",
                "" if one.p_holm >= 0.05 else "*",
                dollars(one.cost),
                number(one.aiq),
                share(one.cost_save),
                number(one.gap),
                number(one.apgr),
                number(None if one.latency_ms is None else one.latency_ms["p99"], 3),
            ]
            for one in self.ranked()
        ]

    def baseline_rows(self) -> list[list[str]]:
        """Cells under `BASELINE_HEADERS`."""
        named = {
            "random": "random choice",
            "best_single": f"best single ({self.baselines.get('best_single', {}).get('model', '')})",
            "best_per_task": "best model of the true task",
            "oracle": "oracle",
        }
        rows = {named[name]: row for name, row in self.baselines.items()} | self.singles
        found = [[name, number(row["score"]), dollars(row["cost"]), number(row["aiq"])] for name, row in rows.items()]
        mixed = [] if self.mixing is None else [["single models, mixed at random", "", "", number(self.mixing["aiq"])]]
        return mixed + found


COST = "cost"
HEADERS = (
    "strategy",
    "score",
    "95% interval",
    "gain on\nbest single",
    "p<.05\nHolm",
    COST,
    "AIQ",
    "cost saved\nwithout loss",
    "gap to\noracle",
    "APGR",
    "decision\nms p99",
)
BASELINE_HEADERS = ("baseline", "score", COST, "AIQ")


def versions() -> dict[str, str]:
    """Of Python, this package and numpy."""
    packages = {name: importlib.metadata.version(name) for name in ("anabranch", "numpy")}
    return {"python": platform.python_version(), **packages}


def number(value: float | None, decimals: int = 4) -> str:
    """A number for a table, nothing where there is none."""
    return "" if value is None or not math.isfinite(value) else f"{value:.{decimals}f}"


def share(value: float | None) -> str:
    """A share as per cent."""
    return "" if value is None else f"{value:.0%}"


def dollars(value: float | None) -> str:
    """Dollars of a thousand queries from those of one."""
    return "" if value is None else f"{1000 * value:.4g}"


def _markdown(headers: list[str], rows: list[list[str]]) -> list[str]:
    head = " | ".join(header.replace("\n", " ") for header in headers)
    line = " | ".join("---" if place == 0 else "---:" for place in range(len(headers)))
    return [
        f"| {head} |",
        f"| {line} |",
        *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows),
    ]
