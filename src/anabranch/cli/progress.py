"""Progress on stderr: a bar where a person looks, a plain line every few seconds where a file or a pipe does, or nothing."""

import sys
import time
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from anabranch.cli.output import duration, let_go, say, visible

PLAIN_EVERY_S = 5.0


class Progress:
    """A context that is told how far things are.

    Args:
        total: how many units there are.
        unit: what is counted, e.g. ``step``.
        quiet: show nothing.
    """

    def __init__(self, total: int, unit: str, *, quiet: bool = False) -> None:
        self._total, self._unit, self._quiet = total, unit, quiet
        self._first: tuple[float, int] | None = None
        self._said, self._has_said = time.perf_counter(), False
        self._bar: Bar | None = None
        if not quiet and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.completed:>{task.fields[width]}}/{task.total}"),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(unit, total=total, text="", width=len(str(total)))

    def __enter__(self) -> Self:
        self._show(lambda bar: bar.start())
        return self

    def __exit__(self, *_: object) -> None:
        self._show(lambda bar: bar.stop())

    def _show(self, change: Callable[[Bar], None]) -> None:
        """Do something to the bar. A terminal that is gone takes it away, and nothing else: what is shown never ends what is done."""
        try:
            if self._bar is not None:
                change(self._bar)
        except (OSError, ValueError):
            self._bar, self._quiet = None, True
            let_go(sys.stderr)

    def update(self, done: int, text: str = "") -> None:
        """``done`` units are finished; ``text`` says what there is to say about them. Time left is worked out here."""
        if self._quiet:
            return
        now = time.perf_counter()
        if self._first is None:
            # Set-up before the first unit says nothing about the rest.
            self._first = (now, done)
        text = visible(f"{text}  {self._left(now, done)}".strip())
        if self._bar is not None:
            self._show(lambda bar: bar.update(self._task, completed=done, text=text))
        elif now - self._said >= PLAIN_EVERY_S or (done == self._total and self._has_said):
            self._said, self._has_said = now, True
            say(f"{self._unit} {done:>{len(str(self._total))}}/{self._total}  {text}")

    def doing(self, text: str) -> None:
        """What is done between two units, which says nothing of the time that is left."""
        if self._quiet:
            return
        now = time.perf_counter()
        if self._bar is not None:
            self._show(lambda bar: bar.update(self._task, text=visible(text)))
        elif now - self._said >= PLAIN_EVERY_S:
            self._said, self._has_said = now, True
            say(text)

    def set_total(self, total: int) -> None:
        """There are ``total`` units, which is known only now."""
        if total != self._total:
            self._total = total
            self._show(lambda bar: bar.update(self._task, total=total, width=len(str(total))))

    def note(self, text: str) -> None:
        """A line that stays."""
        if self._quiet:
            return
        if self._bar is not None:
            self._show(lambda bar: bar.console.print(visible(text), highlight=False, markup=False))
        else:
            say(text)

    def _left(self, now: float, done: int) -> str:
        assert self._first is not None
        started, first = self._first
        if done <= first or done >= self._total:
            return ""
        return f"{duration((self._total - done) * (now - started) / (done - first))} left"
