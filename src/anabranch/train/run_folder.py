"""`RunFolder`: who writes in the folder of a run while it trains: its metrics, and how another process goes on where one is lost."""

import logging
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from anabranch.errors import DataError
from anabranch.train.checkpoint import checkpoints
from anabranch.train.checkpoint_manager import CheckpointManager
from anabranch.train.config import RunConfig, TaskRunConfig
from anabranch.train.metrics import MetricsLog, read_metrics
from anabranch.train.parallel import Workers
from anabranch.train.run import check_new, prepare, run_lock

log = logging.getLogger(__name__)

__all__ = ["RunFolder"]

# Of metrics, what a process that does not write keeps: more than pass until the loss of the one that does is seen.
_KEPT_LINES = 16
# Between tries to have the folder of a run whose writer was cast out and has not ended.
_FOLDER_S = 0.5


class RunFolder:
    """The folder, as this process has it.

    Args:
        out: where it is.
        config: of the run.
        workers: the first of them writes.
        kept: the run's checkpoints, and how far it is.
        resumes: whether the run was there before.

    Attributes:
        held: what this process holds of it, until that is closed.
    """

    def __init__(
        self, out: Path, config: RunConfig | TaskRunConfig, workers: Workers, kept: CheckpointManager, *, resumes: bool
    ) -> None:
        self._out, self._config, self._workers, self._kept, self._resumes = out, config, workers, kept, resumes
        self.held = ExitStack()
        self._log: MetricsLog | None = None
        # The newest lines of a process that does not write: it may have to go on where another has ended.
        self._unwritten: deque[dict[str, Any]] = deque()

    @property
    def is_written(self) -> bool:
        """Whether this process writes metrics."""
        return self._log is not None

    def hold(self) -> None:
        """Nobody else trains in the folder meanwhile, nor has since this process looked at it. Raises DataError where somebody does."""
        if not self._workers.is_first:
            return
        self.held.enter_context(run_lock(self._out))
        newest = self._kept.newest
        if not self._resumes:
            check_new(self._out)
        elif checkpoints(self._out)[-1:] != ([newest] if newest else []):
            raise DataError(f"another process has trained in {self._out} since this one began; resume it again")

    def start(self) -> None:
        """Write the config, and metrics from here on."""
        # Until all have looked at the folder.
        self._workers.wait()
        if self._workers.is_first:
            prepare(self._out, self._config)
            settings = self._config.train
            self._log = MetricsLog(self._out, step=self._kept.progress.step, tensorboard=settings.tensorboard)

    def take_over(self, *, must: bool = True, tells: bool = True) -> bool:
        """Where processes share the run: the first of them writes, and goes on in the folder where one before it is lost.

        Whether it begins to now. Raises DataError where another process holds the folder, if it ``must``; else it is to try again at the
        next step, and ``tells`` so.
        """
        elastic = self._workers.elastic
        if elastic is None or not elastic.is_first or elastic.holds_folder:
            return False
        try:
            self.held.enter_context(run_lock(self._out))
        except DataError as error:
            if must:
                raise
            # One that was cast out may live on for a while; training need not wait for it.
            if tells:
                log.warning("nothing is written for now: %s", error)
            return False
        step = self._kept.progress.step
        if not self._resumes and step == 0:
            check_new(self._out)
        elastic.holds_folder = True
        # Of a run that had gone further, or of this one's steps that were taken back.
        self._kept.give_up(step + 1)
        found = checkpoints(self._out)
        self._kept.newest = found[-1] if found else None
        self.start()
        assert self._log is not None
        written = {(line["kind"], line["step"]) for line in read_metrics(self._out)}
        for record in self._unwritten:
            if (record["kind"], record["step"]) not in written:
                self._log.write(record)
        return True

    def wait_for_turn(self) -> bool:
        """At the end: where the process before this one did not come to write, wait until it lets the folder go; whether it was taken over.

        One that was cast out and stands still holds the folder: what was learned is here until it ends, or this run is told to stop.
        """
        elastic = self._workers.elastic
        assert elastic is not None
        has_taken = is_told = False
        while elastic.is_first and not elastic.holds_folder:
            has_taken = self.take_over(must=elastic.is_stopped(), tells=not is_told)
            if not has_taken:
                if not is_told:
                    log.warning("all is learned, and written as soon as that process has ended: end it, or wake it")
                is_told = True
                time.sleep(_FOLDER_S)
        return has_taken

    def write(self, record: dict[str, Any]) -> None:
        """A line of metrics."""
        if self._log is not None:
            self._log.write(record)
            return
        self._unwritten.append(record)
        # Who is to write, and cannot yet since another holds the folder, has to keep all of them.
        elastic = self._workers.elastic
        while len(self._unwritten) > _KEPT_LINES and not (elastic is not None and elastic.is_first):
            self._unwritten.popleft()

    def cut(self, step: int) -> None:
        """Go on from ``step``, which is an earlier one."""
        if self._log is not None:
            self._log.cut(step)

    def close(self) -> None:
        """Close the metrics."""
        if self._log is not None:
            self._log.close()
