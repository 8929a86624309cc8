"""The folder of a run on Spark: what it is about, how far it is, and what its files hold."""

import os
from pathlib import Path
from typing import Any

from anabranch.errors import AnabranchError, DataError
from anabranch.files import atomic_write_json, explained, parse_json
from anabranch.graph.beside import MANIFEST, check_parts
from anabranch.graph.fully_ppr.chunks import Job
from anabranch.graph.store import Graph

# What lies in the folder beside the manifest.
OURS = r"manifest\.json|graph\.anb|records|(?:scores|ends|walks)-\d+"


class Manifest:
    """What a run in a folder is about and how far it is. ``state`` is what `save` was last given."""

    def __init__(self, folder: Path, job: Job, first: dict[str, Any]) -> None:
        """Raises DataError where the folder belongs to another run."""
        self.folder, self._path, self._identity = folder, folder / MANIFEST, job.identity
        self.state: dict[str, Any] = first
        check_names(folder)
        if not self._path.exists():
            self.save(first)
            return
        try:
            found = parse_json(self._path.read_text(encoding="utf-8"))
            recorded, self.state = found["job"], found["state"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self._path} is not readable; remove {folder} to start anew") from error
        if recorded != self._identity:
            raise DataError(
                f"{folder} holds parts of another run (other graph, sources or settings); remove it to start anew"
            )

    def place(self, name: str) -> str:
        """The path of a checkpoint."""
        return str(self.folder / name)

    def save(self, state: dict[str, Any]) -> None:
        """Note how far the run is."""
        self.state = state
        atomic_write_json(self._path, {"job": self._identity, "state": state})


def check_names(folder: Path) -> None:
    """Raises DataError where a folder holds anything but the parts of a run, as `check_parts`."""
    if folder.is_dir():
        with explained(folder):
            names = os.listdir(folder)
        check_parts(folder, names, OURS if MANIFEST in names else "")


def check_cancelled(job: Any, done: str) -> None:
    """Raises AnabranchError where the run is to stop."""
    if job.cancel is not None and job.cancel.is_set():
        raise AnabranchError(f"cancelled after {done}; with the same `out` the run goes on from its last checkpoint")


def schema_of(graph: Graph) -> str:
    """Of scores, in Spark's words."""
    columns = "source long, target long, score float"
    if graph.names is None:
        return columns
    kind = "long" if graph.names.dtype.kind in "iu" else "string"
    return f"{columns}, source_name {kind}, target_name {kind}"
