"""`recommend`: the methods that keep to limits, best measured first, and what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anabranch.adapters.catalogue.card import Card
from anabranch.adapters.catalogue.cost import Estimate, estimate
from anabranch.adapters.catalogue.measured import MEASURED, Measurement, of_table, tables_of
from anabranch.adapters.catalogue.shape import Shape
from anabranch.adapters.catalogue.table import CARDS, MERGED, runnable_backends
from anabranch.errors import ConfigError

__all__ = ["Choice", "Limits", "Recommendation", "recommend"]


@dataclass(frozen=True)
class Limits:
    """What must hold of a method; None and False for no limit.

    Attributes:
        max_parameters: that learn.
        max_share: the same as a share of the model's.
        max_file_bytes: of the file that is written, see `Estimate`: of the whole model where parameters of the base learn.
        max_training_bytes: of base, adapter, gradients and optimizer state; activations come on top.
        max_added_flops: that it may add to a token of the served model, as a share of the model's; a merged adapter adds none.
        merges: whether it must become part of the matrices.
        mixed: whether rows of one batch must have adapters of their own.
        starts_as_base: whether a new adapter must leave the model as it was.
        backends: who may run it; None for who can in this installation, which is ``own``, and ``peft`` where that is installed.
    """

    max_parameters: int | None = None
    max_share: float | None = None
    max_file_bytes: int | None = None
    max_training_bytes: int | None = None
    max_added_flops: float | None = None
    merges: bool = False
    mixed: bool = False
    starts_as_base: bool = False
    backends: tuple[str, ...] | None = None

    def why_not(self, card: Card, found: Estimate) -> str | None:
        """The first limit that a method does not keep to; None where it keeps to all."""
        if self.merges and card.merges not in MERGED:
            return (
                "cannot be merged"
                if card.merges == "no"
                else "one task of it can be merged (adapters export --task), not all"
            )
        if self.mixed and card.mixed == "no":
            return "rows of a batch cannot have adapters of their own"
        if self.starts_as_base and not card.starts_as_base:
            return "a new adapter changes what the model computes"
        # Counted where somebody asks.
        size = None if self.max_file_bytes is None else found.file_bytes
        added = found.merged_flops if found.merged_flops is not None else found.added_flops
        numbers = (
            ("learns", found.trainable, self.max_parameters, "numbers"),
            ("learns", found.share, self.max_share, "of the model's parameters"),
            ("takes", size, self.max_file_bytes, "bytes in a file"),
            ("takes", found.training_bytes, self.max_training_bytes, "bytes in training"),
            ("adds", None if added is None else added / found.base_flops, self.max_added_flops, "of the model's FLOPs"),
        )
        for verb, value, most, unit in numbers:
            if most is None:
                continue
            if value is None:
                return f"nobody has counted what it {verb} {unit}"
            if value > most:
                return f"{verb} {value:.4g} {unit}, above {most:.4g}"
        return None


@dataclass(frozen=True)
class Choice:
    """One method that keeps to the limits: its cost here, and the measurement that ranks it; None where there is none."""

    estimate: Estimate
    measurement: Measurement | None

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-ready."""
        card = self.estimate.card
        return {
            **self.estimate.to_dict(),
            "backend": card.backend,
            "merges": card.merges,
            "mixed_batch": card.mixed,
            "measurement": None if self.measurement is None else self.measurement.to_dict(),
        }


@dataclass(frozen=True)
class Recommendation:
    """What `recommend` found.

    Attributes:
        choices: best first: by what was measured, then those that nobody measured by how little they learn.
        rejected: why not, by id.
        sources: where what it was ranked by was measured.
        used: how many measurements ranked a choice.
        table: of the measurements that ranked them, and ``unit``, what those are.
        other_tables: that were there, too.
    """

    choices: tuple[Choice, ...]
    rejected: dict[str, str]
    sources: tuple[str, ...]
    used: int
    table: str
    unit: str
    other_tables: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-ready."""
        return {
            "choices": [choice.to_dict() for choice in self.choices],
            "rejected": self.rejected,
            "measured_by": list(self.sources),
            "measurements_used": self.used,
            "table": self.table,
            "unit": self.unit,
            "other_tables": list(self.other_tables),
        }


def recommend(
    shape: Shape,
    limits: Limits | None = None,
    *,
    measurements: Sequence[Measurement] = MEASURED,
    table: str | None = None,
    options: dict[str, Any] | None = None,
    length: int = 512,
    base_width: float = 4,
) -> Recommendation:
    """The methods for a model: those that keep to hard limits, ranked by what was measured.

    A figure of another model and task ranks methods where nobody measured this one: learning rates and starts move them more than families
    do (IA3 from .311 to .455, prompts from .057 to .343). One's own ``measurements`` come first wherever there are some.

    Args:
        shape: of the model.
        limits: None for none.
        measurements: the best of each method ranks it.
        table: of the measurements, which can be compared within one alone; None for the first.
        options: such as rank and targets, for the methods that have them.
        length, base_width: as of `estimate`.

    Raises ConfigError for a limit that is not positive, and as `of_table`.
    """
    limits = limits or Limits()
    for name in ("max_parameters", "max_share", "max_file_bytes", "max_training_bytes"):
        value = getattr(limits, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{name} is {value}; it must be above 0")
    best: dict[str, Measurement] = {}
    rows = of_table(measurements, table)
    for row in rows:
        if row.method not in best or row.score > best[row.method].score:
            best[row.method] = row
    choices, rejected = [], {}
    backends = runnable_backends() if limits.backends is None else limits.backends
    for card in CARDS.values():
        if card.backend not in backends:
            who = "nobody runs it here" if card.backend == "none" else f"run by {card.backend}"
            if card.backend == "peft" and limits.backends is None:
                who = "run by peft, which is not installed: pip install 'anabranch[peft]'"
            who = who if card.way is None else f"not put on by its name: {card.way}"
            rejected[card.id] = who if card.setting is None else f"a setting of training: {card.setting}"
            continue
        if card.only_peft is not None:
            rejected[card.id] = f"peft alone trains it, on models of transformers: {card.only_peft}"
            continue
        own = {name: value for name, value in (options or {}).items() if name in card.options}
        try:
            found = estimate(card, shape, own, length=length, base_width=base_width)
        except ConfigError as error:
            rejected[card.id] = str(error)
            continue
        why = limits.why_not(card, found)
        if why is None:
            choices.append(Choice(found, best.get(card.id)))
        else:
            rejected[card.id] = why
    choices.sort(key=_rank)
    used = [choice.measurement for choice in choices if choice.measurement is not None]
    sources = tuple(dict.fromkeys(row.source for row in used))
    name, unit = (rows[0].table, rows[0].unit) if rows else ("", "")
    told = name, unit, tuple(other for other in tables_of(measurements) if other != name)
    return Recommendation(tuple(choices), rejected, sources, len(used), *told)


def _rank(choice: Choice) -> tuple[bool, float, int]:
    measured = choice.measurement
    return measured is None, 0.0 if measured is None else -measured.score, choice.estimate.trainable
