"""What a fit has measured so far, on disk, so that one that was stopped goes on: JSON lines under a digest of all that decides the fit."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import torch

from anabranch.depth.ftp.decider import Schedule
from anabranch.depth.ftp.router import TokenRouter
from anabranch.errors import DataError
from anabranch.files import atomic_write_text, explained, parse_json

__all__ = ["FitMemo", "digest_of"]

_KIND = "anabranch fit of a token skipper"


def digest_of(*parts: Any) -> str:
    """SHA-256 over what is ready for JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class FitMemo:
    """Losses of schedules, by stage, and routers that have learned.

    Args:
        path: the file, which is read and gone on with, or made once there is something to keep; None keeps all in memory.
        digest: of all that decides the fit.

    Raises DataError for a file of another fit, or that is no such file.
    """

    def __init__(self, path: str | Path | None = None, digest: str = "") -> None:
        self.path = None if path is None else Path(path)
        self._rows: list[dict[str, Any]] = []
        self._head = {"kind": _KIND, "digest": digest}
        self._is_written = False
        if self.path is not None and self.path.exists():
            self._rows = _read(self.path, self._head)
            self._write()

    def losses(self, stage: str) -> MutableMapping[Schedule, float]:
        """Minus the loss of each schedule that was measured in a stage; what is set is on disk at once."""
        return _Losses(self, stage)

    def router(self, stage: str, router: TokenRouter) -> bool:
        """Give a router the weights that it learned in a stage. Returns whether it had. Raises DataError for weights of another router."""
        for row in self._rows:
            if row.get("router") == stage:
                try:
                    router.load_state_dict({name: torch.tensor(value) for name, value in row["state"].items()})
                except (RuntimeError, TypeError, ValueError) as error:
                    raise DataError(
                        f"{self.path} is damaged: its router does not fit ({type(error).__name__}); remove it"
                    ) from None
                return True
        return False

    def keep_router(self, stage: str, router: TokenRouter) -> None:
        """Note the weights that it has learned in a stage."""
        state = {name: value.detach().cpu().tolist() for name, value in router.state_dict().items()}
        self.add({"router": stage, "state": state})

    def add(self, row: dict[str, Any]) -> None:
        """Note a row, on disk at once."""
        self._rows.append(row)
        if self.path is not None and not self._is_written:
            self._write()
        elif self.path is not None:
            with explained(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(f"{json.dumps(row)}\n")
                file.flush()
                os.fsync(file.fileno())

    def _write(self) -> None:
        """All of it anew, since a killed process may have left half a line."""
        assert self.path is not None, "nothing is written without a file"
        atomic_write_text(self.path, "".join(f"{json.dumps(row)}\n" for row in (self._head, *self._rows)))
        self._is_written = True

    def remove(self) -> None:
        """The fit is finished: nothing of it needs to be gone on with."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def rows(self, stage: str) -> Iterator[tuple[Schedule, float]]:
        """Schedules and minus their losses."""
        for row in self._rows:
            if row.get("stage") == stage:
                loss = row["loss"]
                yield tuple(row["schedule"]), -math.inf if loss is None else -float(loss)


class _Losses(MutableMapping[Schedule, float]):
    def __init__(self, memo: FitMemo, stage: str) -> None:
        self._memo, self._stage, self._known = memo, stage, dict(memo.rows(stage))

    def __getitem__(self, schedule: Schedule) -> float:
        return self._known[schedule]

    def __setitem__(self, schedule: Schedule, value: float) -> None:
        self._known[schedule] = value
        loss = -value if math.isfinite(value) else None
        self._memo.add({"stage": self._stage, "schedule": list(schedule), "loss": loss})

    def __delitem__(self, schedule: Schedule) -> None:
        raise TypeError("what was measured is not forgotten")

    def __iter__(self) -> Iterator[Schedule]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


def _read(path: Path, head: dict[str, str]) -> list[dict[str, Any]]:
    """Whole rows of a file that begins with ``head``."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        first = parse_json(lines[0])
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is no unfinished fit ({type(error).__name__}); name another file, or remove it"
        ) from None
    if not isinstance(first, dict) or first.get("kind") != _KIND:
        raise DataError(f"{path} is no unfinished fit; name another file, or remove it")
    # A head alone keeps nothing that could be lost.
    if first != head and any(lines[1:]):
        raise DataError(
            f"{path} is an unfinished fit of another model, other data or other settings; finish that one, name another file, or remove it"
        )
    rows = []
    for line in lines[1:]:
        try:
            row = parse_json(line)
        except ValueError:
            # The last line of a process that was killed while it wrote.
            break
        if not isinstance(row, dict) or not _is_row(row):
            raise DataError(f"{path} is damaged: {line[:80]!r} is no row of it; remove it")
        rows.append(row)
    return rows


def _is_row(row: dict[str, Any]) -> bool:
    if "router" in row:
        return isinstance(row.get("state"), dict)
    loss = row.get("loss")
    return isinstance(row.get("schedule"), list) and (loss is None or isinstance(loss, int | float))
