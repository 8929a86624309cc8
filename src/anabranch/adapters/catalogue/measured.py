"""What was measured of methods, like for like, which `recommend` ranks by."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.bounds import shown
from anabranch.errors import DataError
from anabranch.files import parse_json

__all__ = ["MEASURED", "SOURCE", "Measurement", "read_measurements"]

SOURCE = "huggingface/peft method_comparison/MetaMathQA: Llama-3.2-3B, learned from MetaMathQA, accuracy on GSM8K"


@dataclass(frozen=True)
class Measurement:
    """One run.

    Attributes:
        method: id of its card.
        variant: which settings.
        accuracy: from 0 to 1.
        parameters: that learned; None where nobody said.
        memory_gib: at most, while it trained.
        seconds: of training.
        source: where it was measured.
    """

    method: str
    variant: str
    accuracy: float
    parameters: float | None = None
    memory_gib: float | None = None
    seconds: float | None = None
    source: str = SOURCE

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


def read_measurements(path: str | Path, known: Sequence[str]) -> list[Measurement]:
    """Measurements of one's own: a JSON list of objects with ``method``, ``accuracy``, and what else `Measurement` has.

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


def _measurement(row: dict[str, Any], number: int, place: Path, known: Sequence[str]) -> Measurement:
    where = f"measurement {number} in {place}"
    if row.get("method") not in known:
        raise DataError(f"{where} is of method {shown(row.get('method'))}, of which there is no card")
    for name in ("accuracy", "parameters", "memory_gib", "seconds"):
        value, most = row.get(name), 1.0 if name == "accuracy" else 1e30
        # A NaN is not at most anything.
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most
        if not is_number and (value is not None or name == "accuracy"):
            allowed = "from 0 to 1" if name == "accuracy" else "at least 0"
            raise DataError(f"{name} of {where} is {shown(value)}; it must be a number, {allowed}")
    return Measurement(
        row["method"],
        str(row.get("variant", "")),
        float(row["accuracy"]),
        row.get("parameters"),
        row.get("memory_gib"),
        row.get("seconds"),
        str(row.get("source", place)),
    )
