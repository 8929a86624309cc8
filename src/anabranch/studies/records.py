"""Records of runs: one JSON a run, and whether it counts for what is asked now.

A record counts if nothing that decides its numbers has changed: the study's revision, the whole config of the arm, what the run
read beside its config, by content, and the kind of device it ran on. One that does not count is run again, and kept in ``earlier/``
beside the new one. Versions of libraries are noted and told, and decide nothing: see docs/evidence.md.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.config import completed, differences, to_dict
from anabranch.errors import DataError
from anabranch.files import atomic_write_json, parse_json
from anabranch.studies.provenance import recorded_device

Metrics = dict[str, Any]
EARLIER = "earlier"

# Characters of a value in a reason.
_SHOWN = 60


@dataclass(frozen=True)
class RunRecord:
    """Where the record of one run lies, and what it must say.

    Attributes:
        folder: of the study's runs.
        study, arm, seed: which run.
        revision: of the study.
        config: of the arm, what `to_dict` takes.
        inputs: digest of what the run reads beside its config; None if it reads nothing, or what it read is not to be compared.
        device: kind of device that it runs on; None if nothing chooses one.
        noted_only: whether a record that notes nothing of what it read does not count.
    """

    folder: Path
    study: str
    arm: str
    seed: int
    revision: int
    config: Any
    inputs: str | None = None
    device: str | None = None
    noted_only: bool = False

    @property
    def path(self) -> Path:
        """The record."""
        return self.folder / f"{self.arm}-seed{self.seed}.json"

    @property
    def lock(self) -> Path:
        """Held by who works on the run; see `locked`."""
        return self.folder / f".{self.path.stem}.lock"

    def read(self) -> Metrics | None:
        """The metrics of the run, None if it has not finished or does not count. Raises DataError if the file is no record."""
        record = self._record()
        return None if record is None or self._reason(record) is not None else record["metrics"]

    def origin(self) -> dict[str, Any]:
        """What the record notes of where its numbers come from: ``versions``, ``device``, ``inputs``, ``frozen``; None if not noted."""
        record = self._record() or {}
        return {
            "versions": record.get("versions") or {},
            "device": recorded_device(record),
            "inputs": record.get("inputs"),
            "frozen": record.get("frozen"),
        }

    def why_not(self) -> str | None:
        """Why the record does not count, as the end of a sentence; None if it counts, or there is none."""
        record = self._record()
        return None if record is None else self._reason(record)

    def write(self, metrics: Metrics, **facts: Any) -> Path | None:
        """Write the record; ``facts`` are further fields. One that lies there is moved to the path that is returned."""
        record: dict[str, Any] = {"study": self.study, "arm": self.arm, "seed": self.seed, "revision": self.revision}
        noted = {"inputs": self.inputs, "device": self.device}
        record |= {name: value for name, value in noted.items() if value is not None}
        kept = self._set_aside()
        atomic_write_json(self.path, {**record, "metrics": metrics, **facts, "config": to_dict(self.config)})
        return kept

    def _set_aside(self) -> Path | None:
        try:
            digest = hashlib.blake2b(self.path.read_bytes(), digest_size=4).hexdigest()
        except FileNotFoundError:
            return None
        kept = self.folder / EARLIER / f"{self.path.stem}-{digest}.json"
        kept.parent.mkdir(exist_ok=True)
        os.replace(self.path, kept)
        return kept

    def _record(self) -> dict[str, Any] | None:
        try:
            record = parse_json(self.path.read_bytes())
            complete = isinstance(record["metrics"], dict) and "config" in record
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._broken(error) from error
        if not complete:
            raise self._broken("it lacks its metrics or its config")
        return record

    def _broken(self, why: object) -> DataError:
        return DataError(f"{self.path} is not the record of a run ({why}); remove it to run it again")

    def _reason(self, record: dict[str, Any]) -> str | None:
        if record.get("revision") != self.revision:
            return f"is of revision {record.get('revision')} of the study, which is now {self.revision}"
        found = changes(record["config"], self.config)
        if found:
            name, (old, new) = next(iter(found.items()))
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            return f"is of another config: {name or 'it'} was {_short(old)} and is now {_short(new)}{more}"
        device = recorded_device(record)
        if None not in (device, self.device) and device != self.device:
            return f"ran on {device}, and would now run on {self.device}"
        if "inputs" not in record:
            return "was written by an older version, which did not note what text it read" if self.noted_only else None
        if self.inputs is not None and record["inputs"] != self.inputs:
            return "read other text: the files have changed since, or an older version noted less of them"
        return None


def recorded_seeds(folder: Path, arm: str) -> list[int]:
    """Seeds of which a record of ``arm`` lies in ``folder``, whether it counts or not."""
    start = f"{arm}-seed"
    names = [path.stem for path in folder.glob("*.json") if path.name.startswith(start)]
    return sorted(int(name.removeprefix(start)) for name in names if name.removeprefix(start).isdecimal())


def changes(recorded: Any, current: Any) -> dict[str, tuple[Any, Any]]:
    """What keeps a run recorded with one config (its JSON form) from counting for another: see `differences`.

    A field that came later counts as recorded at its default, which is taken to change nothing (raise `Study.revision` where it
    does), so that a new option does not undo hours of runs. All else must be equal.
    """
    return differences(completed(recorded, current), current)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
