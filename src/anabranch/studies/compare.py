"""Several designs at one budget: the library behind ``anabranch compare``.

Every design trains on the same tokens in the same order for one seed, for the same number of steps; seeds are paired. Only the model
may differ: the rest of the configs must be equal, and a finished run counts only for the same config and the same text. The first design
is the baseline of the differences. There is no claim to judge: an interval that contains 0 decides nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.config import differences, to_dict
from anabranch.errors import ConfigError
from anabranch.studies.harness import Arm, Column, Outcome, Progress, Results, Study, run_study
from anabranch.studies.paired import Estimate
from anabranch.studies.picture import draw_arms, draw_costs
from anabranch.studies.training import check_held_out, train_and_measure
from anabranch.train import RunConfig

COLUMNS = (
    Column("bits_per_byte", "bits/byte", ".4f"),
    Column("parameters", "parameters", ",.0f"),
    Column("active_parameters", "active", ",.0f"),
    Column("flops_per_token", "FLOPs\n/token", ",.0f"),
    Column("tokens_per_second", "tokens/s", ",.0f"),
    Column("peak_memory_bytes", "memory\n(bytes)", ",.0f"),
    Column("max_violation_layer", "MaxVio", ".2f"),
    Column("srp", "SRP", ".3f"),
)


@dataclass(frozen=True)
class Row:
    """One design.

    Attributes:
        design: its name.
        seeds: that it was trained with.
        bits_per_byte: on held-out text, mean over seeds.
        difference: to the first design, paired over seeds; None for the first.
        metrics: mean over seeds of what else was measured, see `train_and_measure`.
    """

    design: str
    seeds: list[int]
    bits_per_byte: Estimate
    difference: Estimate | None
    metrics: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "design": self.design,
            "seeds": self.seeds,
            "bits_per_byte": _to_dict(self.bits_per_byte),
            "difference": None if self.difference is None else _to_dict(self.difference),
            **self.metrics,
        }


def comparison(designs: Mapping[str, RunConfig], seeds: Sequence[int]) -> Study:
    """The study that compares ``designs``.

    The design is ``model``; all else (``data`` and ``train``, whole) must be equal. A run counts for its whole config and for the text
    it read, by content. Raises ConfigError for fewer than two designs, for one that differs in more than its model, and where no text
    is held out.
    """
    if len(designs) < 2:
        raise ConfigError(f"{len(designs)} design(s) to compare; name two or more")
    baseline = next(iter(designs))
    shared = _shared(designs[baseline])
    for name, config in designs.items():
        for field, (ours, other) in differences(shared, _shared(config)).items():
            raise ConfigError(
                f"{field} of {name} is {other!r}, of {baseline} {ours!r}; designs are compared at one budget, on one text: "
                "all but the model must be equal"
            )
    check_held_out(designs[baseline])

    def draw(results: Results, path: Path) -> None:
        draw_arms(results, path, baseline=baseline, title="Designs at one budget")
        draw_costs(results, path.with_name(f"{path.name}-costs"), title="What designs reach and what they cost")

    return Study(
        name="compare",
        title=f"{', '.join(designs)} at one budget",
        settings=_budget(designs[baseline]),
        arms=[Arm(name, "", config) for name, config in designs.items()],
        run=lambda config, seed, progress: train_and_measure(config, seed, progress),
        judge=lambda results: [],
        columns=COLUMNS,
        draw=draw,
        seeds=tuple(seeds),
        noted_only=True,
    )


def compare(
    designs: Mapping[str, RunConfig],
    folder: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    progress: Progress = lambda text: None,
) -> tuple[list[Row], Outcome]:
    """Train what is missing of ``designs`` x ``seeds``; the rows, in the order given, and the harness's outcome."""
    outcome = run_study(comparison(designs, seeds), folder, progress=progress)
    return make_rows(outcome.results, list(designs)), outcome


def make_rows(results: Results, designs: Sequence[str]) -> list[Row]:
    """One row per design that has run."""
    baseline, rows = designs[0], []
    for name in designs:
        if name in results.runs:
            difference = None if name == baseline else results.compare("bits_per_byte", name, baseline)
            others = {
                column.metric: mean.mean for column in COLUMNS[1:] if (mean := results.mean(name, column.metric)).count
            }
            rows.append(Row(name, sorted(results.runs[name]), results.mean(name, "bits_per_byte"), difference, others))
    return rows


def _shared(config: RunConfig) -> dict[str, Any]:
    """All of a config that is not the design."""
    return {name: value for name, value in to_dict(config).items() if name != "model"}


def _budget(config: RunConfig) -> dict[str, Any]:
    """What the result file says of it."""
    train, data = config.train, config.data
    return {
        "steps": train.steps,
        "batch_size": train.batch_size,
        "sequence_length": data.sequence_length,
        "corpus": to_dict(data.corpus),
        "tokenizer": to_dict(data.tokenizer),
        "validation_fraction": data.validation_fraction,
    }


def _to_dict(found: Estimate) -> dict[str, Any]:
    return {"mean": found.mean if found.count else None, "interval": found.interval}
