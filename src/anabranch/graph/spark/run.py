"""One run on Spark: its steps kept in Parquet beside ``out`` until the result is whole.

    OUT.parts/manifest.json     what is made of what, and how far it is
    OUT.parts/NAME/             a step that is done, or is being written: Spark's ``_SUCCESS`` says which
    OUT/                        the result: Spark's own Parquet files and ``_anabranch.json``, renamed into place when all of it is there

A step that is there is not made again. A job that fails leaves the parts and no ``out``, or the ``out`` that was there before.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anabranch.errors import AnabranchError, BackendError, DataError, InputError
from anabranch.files import parse_json
from anabranch.graph.beside import check_parts, foreign_parts
from anabranch.graph.spark.files import Files, first_line
from anabranch.graph.stored_folder import FACTS, check_place

# File systems that rename a folder in one step.
_RENAMING = ("file", "hdfs", "viewfs")
# What lies in the folder of parts: the steps of all runs.
_OURS = r"manifest\.json|edges|ids|records|index|scores|rows|vectors|degrees|matrix|sums|(?:ends|walks|power)-\d+"


class Run:
    """A run and its folder.

    Args:
        spark: the session.
        out: where the result goes.
        identity: all that decides the result, as JSON: a run is gone on with where it is the same.
        kind: of the result, as in `anabranch.graph.stored_folder`.
        cancel: an event that stops the run between steps; None for none.

    Raises:
        DataError: ``out`` holds something that is not a result of this kind, or the parts are those of another run.
    """

    def __init__(self, spark: Any, out: str | Path, identity: dict[str, Any], kind: str, cancel: Any = None) -> None:
        self.spark, self.files, self.cancel = spark, Files(spark), cancel
        self.out, self._kind = self.files.qualified(out), kind
        self.folder = f"{self.out}.parts"
        self._identity = json.loads(json.dumps(identity))
        self.state: dict[str, Any] = {}
        path = self.place("manifest.json")
        self._is_new = not self.files.exists(path)
        check_parts(self.folder, self.files.names(self.folder), "" if self._is_new else _OURS)
        if self._is_new:
            self._check_out()
            self.files.make_folder(self.folder)
            self.save({})
            return
        try:
            found = parse_json(self.files.read_text(path))
            recorded, self.state = found["job"], found["state"]
        except (DataError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not readable; remove {self.folder} to start anew") from error
        if recorded != self._identity:
            raise DataError(
                f"{self.folder} holds parts of another run (other edges, sources or settings); remove it to start anew"
            )
        self._check_out()

    def _check_out(self) -> None:
        """What may be replaced is a result of ours, whole, or one that this run was putting there."""
        if self.files.is_file(self.out):
            raise DataError(f"cannot write {self.out}: it is a file; on Spark `out` is a folder")
        check_place(
            self.out,
            self.files.names(self.out),
            lambda name: self.files.read_text(f"{self.out}/{name}"),
            self._kind,
            is_publishing=bool(self.state.get("publishing")),
        )

    @contextmanager
    def working(self) -> Iterator[None]:
        """What is refused, as bad edges and unknown sources are, leaves no parts: corrected, it is another run."""
        try:
            yield
        except (InputError, DataError):
            if self._is_new:
                self._remove_parts()
            raise

    def place(self, name: str) -> str:
        """Where a step lies."""
        return f"{self.folder}/{name}"

    def save(self, state: dict[str, Any]) -> None:
        """Note how far the run is."""
        self.state = state
        self.files.write_text(self.place("manifest.json"), json.dumps({"job": self._identity, "state": state}))

    def check_cancelled(self, done: str) -> None:
        """Raises AnabranchError where the run is to stop."""
        if self.cancel is not None and self.cancel.is_set():
            raise AnabranchError(
                f"cancelled after {done}; with the same `out` the run goes on from its last checkpoint"
            )

    def step(self, name: str, make: Callable[[], Any]) -> Any:
        """The frame of a step: ``make`` is asked for it and it is written, unless it is there already; then it is read."""
        place = self.place(name)
        if not self.files.exists(f"{place}/_SUCCESS"):
            self.check_cancelled(f"the steps before {name!r}")
            write(make(), place)
        return self.spark.read.parquet(place)

    def publish(self, name: str, facts: dict[str, Any]) -> None:
        """Put the step in the place of ``out`` with its facts, and remove the parts.

        Facts and ``_SUCCESS`` are there before the folder is renamed; where renaming copies file by file, as on object stores, they
        come last, so that a folder without them is not whole.
        """
        staged, text = self.place(name), json.dumps(facts)
        at_once = self.out.split(":", 1)[0] in _RENAMING
        if at_once:
            self.files.write_text(f"{staged}/{FACTS}", text)
        else:
            self.files.remove(f"{staged}/_SUCCESS")
        self._check_out()
        self.save({**self.state, "publishing": True})
        old = None
        if self.files.exists(self.out):
            old = f"{self.out}.old-{time.time_ns():x}"
            self.files.move(self.out, old)
        try:
            self.files.move(staged, self.out)
        except DataError:
            if old is not None:
                self.files.move(old, self.out)
            raise
        if not at_once:
            self.files.write_text(f"{self.out}/{FACTS}", text)
            self.files.write_text(f"{self.out}/_SUCCESS", "")
        if old is not None:
            self.files.remove(old)
        self._remove_parts()

    def _remove_parts(self) -> None:
        """Remove the folder, or what is ours in it where something else came into it."""
        names = self.files.names(self.folder)
        foreign = foreign_parts(names, _OURS)
        if not foreign:
            self.files.remove(self.folder)
        for name in sorted(set(names) - set(foreign)) if foreign else ():
            self.files.remove(self.place(name))


def write(frame: Any, place: str) -> None:
    """Write a frame as Parquet, by Spark's writer. Raises BackendError with what Spark says where it cannot."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        frame.write.mode("overwrite").parquet(place)
    except (Py4JError, PySparkException) as error:
        raise BackendError(f"Spark could not make {place}: {first_line(error)}") from error
