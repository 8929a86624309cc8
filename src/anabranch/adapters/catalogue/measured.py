"""What was measured of methods, like for like, which `recommend` ranks by."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.bounds import near_name, shown
from anabranch.errors import ConfigError, DataError
from anabranch.files import parse_json

__all__ = ["MEASURED", "SOURCE", "Measurement", "of_table", "read_measurements", "tables_of"]

SOURCE = "huggingface/peft method_comparison/MetaMathQA: Llama-3.2-3B, learned from MetaMathQA, accuracy on GSM8K"


@dataclass(frozen=True)
class Measurement:
    """One run, or the mean of several.

    Attributes:
        method: id of its card.
        variant: which settings.
        accuracy: from 0 to 1; None where ``gained`` was measured.
        parameters: that learned; None where nobody said.
        memory_gib: at most, while it trained.
        seconds: of training.
        source: where it was measured.
        gained: nats per token less than the model as it was, on the same rows; None where ``accuracy`` was measured.
        seeds: runs that it is the mean of; None where nobody said.
        table: of measurements that may be compared.
    """

    method: str
    variant: str
    accuracy: float | None = None
    parameters: float | None = None
    memory_gib: float | None = None
    seconds: float | None = None
    source: str = SOURCE
    gained: float | None = None
    seeds: int | None = None
    table: str = ""

    @property
    def score(self) -> float:
        """What ranks it within its table; more is better."""
        score = self.accuracy if self.gained is None else self.gained
        assert score is not None, "one of the two was measured"
        return score

    @property
    def unit(self) -> str:
        """Of the score, for people."""
        return "accuracy" if self.gained is None else "nats per token less than the model as it was"

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-ready."""
        return dict(vars(self))


MEASURED: tuple[Measurement, ...] = (
    Measurement("lily", "r 140, feed-forward", 0.526, 9.5e6, 23.9, 1324),
    Measurement("rslora", "r 64", 0.513, 18.4e6, 21.0, 966),
    Measurement("hira", "r 32", 0.513, 9.2e6, 22.0, 1286),
    Measurement("shira", "usual", 0.510, 9.2e6, 20.2, 1003),
    Measurement("miss", "bat", 0.504, 7.3e6, 23.5, 1409),
    Measurement("miss", "usual", 0.487, 7.3e6, 18.9, 897),
    Measurement("oft", "r 32", 0.491, 8.2e6, 20.8, 1192),
    Measurement("c3a", "usual", 0.487, 5.5e6, 20.5, 1171),
    Measurement("lora", "r 32", 0.478, 9.2e6, 20.8, 942),
    Measurement("full", "usual", 0.472, 3213e6, 36.2, 2147),
    Measurement("dora", "r 32", 0.469, 9.3e6, 22.8, 1191),
    Measurement("ia3", "all attention, learning rate 5e-3", 0.455, 0.63e6, 24.3, 1060),
    Measurement("ia3", "usual", 0.311, 0.29e6, 21.6, 987),
    Measurement("prefix-tuning", "p 50", 0.416, 2.9e6, 19.2, 878),
    Measurement("lora-fa", "r 32", 0.404, 3.7e6, 20.7, 1159),
    Measurement("adalora", "r 32", 0.373, 18.4e6, 21.2, 1169),
    Measurement("vera", "usual", 0.354, 0.13e6, 20.1, 1011),
    Measurement("prompt-tuning", "started from tokens", 0.343, 0.6e6, 22.7, 1429),
    Measurement("prompt-tuning", "usual", 0.057, 0.6e6, 22.7, 1429),
    Measurement("boft", "usual", 0.343, 0.8e6, 23.0, 6926),
    Measurement("fourierft", "n 5000", 0.096, 0.28e6, 22.0, 1722),
)


def tables_of(measurements: Sequence[Measurement]) -> list[str]:
    """The tables that measurements are of, in order."""
    return list(dict.fromkeys(row.table for row in measurements))


def of_table(measurements: Sequence[Measurement], table: str | None = None) -> list[Measurement]:
    """The rows of one table; None for the first that there is, if any.

    Raises ConfigError for a table that there is not, and one whose rows cannot be compared: some have accuracies, others nats.
    """
    known = tables_of(measurements) or [""]
    if table is not None and table not in known:
        raise ConfigError(
            f"there is no table {shown(table)} of measurements, only {', '.join(map(repr, known))}{near_name(table, known)}"
        )
    rows = [row for row in measurements if row.table == (known[0] if table is None else table)]
    if len({row.unit for row in rows}) > 1:
        raise ConfigError(
            f"measurements of table {rows[0].table!r} have accuracy in part and gained in part; what cannot be compared is of two tables"
        )
    return rows


def read_measurements(path: str | Path, known: Sequence[str]) -> list[Measurement]:
    """Measurements of one's own: a JSON list of objects with ``method``, ``accuracy`` or ``gained``, and what else `Measurement` has.

    Raises DataError for a file that cannot be read or is no such list, a method that no card has, an accuracy that is none from 0 to 1.
    """
    place = Path(path)
    try:
        rows = parse_json(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {place}: {(error.strerror or str(error)).lower()}") from None
    except ValueError as error:
        raise DataError(f"{place} is not JSON: {error}") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{place} must hold a list of measurements, each an object with method and accuracy")
    return [_measurement(row, number, place, known) for number, row in enumerate(rows, 1)]


# Numbers of a measurement: the least and the most that each may be.
_BOUNDS = {
    "accuracy": (0.0, 1.0),
    "gained": (-1e30, 1e30),
    "parameters": (0.0, 1e30),
    "memory_gib": (0.0, 1e30),
    "seconds": (0.0, 1e30),
}


def _measurement(row: dict[str, Any], number: int, place: Path, known: Sequence[str]) -> Measurement:
    where = f"measurement {number} in {place}"
    if row.get("method") not in known:
        raise DataError(f"{where} is of method {shown(row.get('method'))}, of which there is no card")
    # What ranks it must be there: gained, where that is said, and accuracy otherwise.
    score, other = ("accuracy", "gained") if row.get("gained") is None else ("gained", "accuracy")
    if row.get(other) is not None:
        raise DataError(f"{where} has both accuracy and gained; a table is ranked by one of them")
    for name, (least, most) in _BOUNDS.items():
        value = row.get(name)
        # A NaN is neither at least nor at most anything.
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
        if not is_number and (value is not None or name == score):
            allowed = {"accuracy": "from 0 to 1", "gained": "in nats per token"}.get(name, "at least 0")
            raise DataError(f"{name} of {where} is {shown(value)}; it must be a number, {allowed}")
    seeds, table = row.get("seeds"), row.get("table", "")
    if seeds is not None and (not isinstance(seeds, int) or isinstance(seeds, bool) or not 1 <= seeds <= 1_000_000):
        raise DataError(f"seeds of {where} is {shown(seeds)}; it must be the number of runs that it is the mean of")
    if not isinstance(table, str):
        raise DataError(f"table of {where} is {shown(table)}; it must be a name")
    numbers = {name: row.get(name) for name in _BOUNDS}
    numbers[score] = float(row[score])
    return Measurement(
        row["method"],
        str(row.get("variant", "")),
        source=str(row.get("source", place)),
        seeds=seeds,
        table=table,
        **numbers,
    )
