"""Metrics of a run: ``metrics.jsonl``, one JSON object a line, and TensorBoard events where they are asked for."""

import contextlib
import errno
import itertools
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anabranch.errors import CapacityError, DataError
from anabranch.extras import require
from anabranch.files import atomic_write_text, is_full, parse_json
from anabranch.lm.folder import METRICS_FILE

log = logging.getLogger(__name__)

__all__ = ["METRICS_FILE", "MetricsLog", "read_metrics", "recorded_updates"]


class MetricsLog:
    """Appends to the metrics of a run. Every line is whole or absent, so a killed run leaves readable metrics.

    Args:
        out: folder of the run.
        step: the step that training goes on from; lines after it, and a torn last line, are dropped. Those of a run that begins again
            at step 0 are kept, as ``metrics.jsonl.old1`` and on.
        tensorboard: write TensorBoard events into ``out/tensorboard`` too. Raises BackendError if it is not installed.
    """

    def __init__(self, out: Path, *, step: int = 0, tensorboard: bool = False) -> None:
        self._out, self._path, self._tensorboard = out, out / METRICS_FILE, tensorboard
        self._begin(step)

    def cut(self, step: int) -> None:
        """Go on from ``step``, which is an earlier one: lines after it are dropped, as of a run that is resumed there."""
        self.close()
        self._begin(step)

    def _begin(self, step: int) -> None:
        out = self._out
        self._board = _board(out, step) if self._tensorboard else None
        if step == 0 and self._path.exists() and any(record and record["step"] > 0 for _, record in _records(out)):
            _set_aside(self._path)
        elif self._path.exists():
            kept = [record for record in _readable(out) if record["step"] <= step]
            atomic_write_text(self._path, "".join(map(_line, kept)))
        try:
            # Without a buffer a line is one write call.
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            raise DataError(f"cannot write {self._path}: {error.strerror}") from None

    def write(self, record: dict[str, Any]) -> None:
        """Add a record with a ``step`` and a ``kind``; numbers that are not finite become null."""
        self._append(_line(record).encode())
        if self._board is not None:
            for name, value in _scalars(record):
                self._board.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def _append(self, line: bytes) -> None:
        """Write ``line`` whole, or take back what was written of it. Raises CapacityError if the disk is full, DataError otherwise."""
        start = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(line)
            # The disk is full, and a second write says so.
            if written != len(line):
                written += self._file.write(line[written:])
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(start)
            if is_full(error):
                raise CapacityError(f"no room left on disk to write {self._path}; free some and resume") from error
            raise DataError(f"cannot write {self._path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(out: str | Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first; a last line that was cut short is left out.

    Raises DataError if there are none, or a line is damaged.
    """
    records = []
    for number, record in _records(out):
        if record is None:
            raise DataError(f"line {number} of {Path(out) / METRICS_FILE} is damaged; remove it")
        records.append(record)
    return records


def recorded_updates(out: Path) -> int:
    """The most updates (steps that were not skipped) that the metrics of a run tell of; 0 where there are none, damaged lines aside."""
    if not (out / METRICS_FILE).exists():
        return 0
    records = (record for _, record in _records(out) if record is not None and record.get("kind") == "train")
    return max((record["step"] - _skipped(record) for record in records), default=0)


def _skipped(record: dict[str, Any]) -> int:
    skipped = record.get("skipped_steps")
    return skipped if isinstance(skipped, int) else 0


def _set_aside(path: Path) -> None:
    place = next(
        free for number in itertools.count(1) if not (free := path.with_name(f"{path.name}.old{number}")).exists()
    )
    try:
        path.rename(place)
    except OSError as error:
        raise DataError(f"cannot write {place}: {error.strerror}") from None
    log.warning("training begins again at step 0; the metrics of before go on as %s", place)


def _readable(out: Path) -> list[dict[str, Any]]:
    """The records of a run that goes on: a line that is damaged (by a full disk, say) is lost, and is no reason not to go on."""
    found = list(_records(out))
    damaged = [number for number, record in found if record is None]
    if damaged:
        log.warning("left out of %s: damaged line %s", out / METRICS_FILE, ", ".join(map(str, damaged)))
    return [record for _, record in found if record is not None]


def _records(out: str | Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(number, record or None where it is damaged) of each line that has an end."""
    path = Path(out) / METRICS_FILE
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        is_record = isinstance(record, dict) and isinstance(record.get("step"), int)
        yield number, record if is_record else None


def _line(record: dict[str, Any]) -> str:
    return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, item in value.items():
            if path or key not in ("step", "kind"):
                yield from _scalars(item, f"{path}/{key}" if path else key)
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _scalars(item, f"{path}/{place}")
    elif isinstance(value, int | float) and math.isfinite(value):
        yield path, value


def _board(out: Path, step: int) -> Any:
    require("tensorboard", by="train.tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)
