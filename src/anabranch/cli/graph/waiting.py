"""What shows that work goes on where nobody counts it, and rates of what is counted."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from anabranch.cli.output import quantity, visible
from anabranch.cli.progress import Progress


@contextmanager
def waiting(text: str, quiet: bool = False) -> Iterator[None]:
    """A line that moves while the block runs, where a person looks; nothing where a file or a pipe does."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    with Console(stderr=True).status(f"{visible(text)} ...", spinner="line"):
        yield


class Rate:
    """Tells a `Progress` how far things are, with their rate."""

    def __init__(self, progress: Progress, unit: str) -> None:
        self._progress, self._unit, self._started = progress, unit, time.perf_counter()

    def __call__(self, done: int, total: int | None = None) -> None:
        """``done`` units are finished. ``total`` is there for callbacks that say it too."""
        seconds = time.perf_counter() - self._started
        rate = f"{quantity(done / seconds)} {self._unit}/s" if done and seconds > 0.1 else ""
        self._progress.update(done, rate)
