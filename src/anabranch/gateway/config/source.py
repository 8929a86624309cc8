"""Where in a config file the field stands that something is wrong with, whoever finds that out."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from anabranch.errors import AnabranchError, ConfigError, DataError
from anabranch.gateway.config.lines import Lines, join, parse

MAX_BYTES = 16 << 20


class LocatedError(ConfigError):
    """Says where already."""


class Source:
    """A file whose fields have lines."""

    def __init__(self, path: Path, lines: Lines) -> None:
        self.path, self.lines = path, lines

    def fail(self, message: str, field: str | None = None) -> NoReturn:
        """Raise ConfigError with the line of ``field``; None takes the field that the message begins with."""
        found = self.begun(message) if field is None else field
        unknown = re.search(r" has no field '([^']*)'", message)
        if unknown and join(found, unknown[1]) in self.lines:
            found = join(found, unknown[1])
        while found and found not in self.lines:
            found = found.rpartition(".")[0]
        line = self.lines.get(found, 1)
        raise LocatedError(f"{self.path}:{line}: {message}") from None

    def begun(self, message: str) -> str:
        """The field that a message begins with, or the table (``[otel] in the config ...``); "" for none."""
        named = re.match(r"\[([^\]\s]+)\] ", message)
        if named:
            return named[1] if named[1] in self.lines else ""
        starts = (
            name for name in self.lines if message.startswith(name) and message[len(name) :][:1] in (" ", ":", ".")
        )
        return max(starts, key=len, default="")


def read_text(path: Path) -> str:
    """Raises DataError for a file that cannot be read, ConfigError for one that is too long or no text."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the config {path}: {(error.strerror or str(error)).lower()}") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path} has {len(raw):,} bytes; a config has {MAX_BYTES:,} at most")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8: byte {error.start} is {raw[error.start]:#04x}") from None


@contextmanager
def told_where(path: Path | None) -> Iterator[None]:
    """Have errors within begin with file and line, where they begin with a field of the file.

    What a config is made into finds more wrong with it than its reader does, and knows of no file.

    Args:
        path: of the config; None for one of no file.
    """
    try:
        yield
    except AnabranchError as error:
        if path is None or isinstance(error, LocatedError):
            raise
        line = _line_of(path, str(error))
        if line is not None:
            message = f"{path}:{line}: {error}"
            error.args = (message,)
            if isinstance(error, ImportError):
                # What it shows is not what it was made of.
                error.msg = message
        raise


def _line_of(path: Path, message: str) -> int | None:
    """Where the field stands that a message begins with; None if it begins with none of the file's."""
    try:
        _, lines = parse(read_text(path), path)
    except AnabranchError:
        # It has changed since it was read.
        return None
    found = Source(path, lines).begun(message)
    # Of a strategy that is not in the file (that of --router) the table of all says nothing.
    return None if found == "strategies" else lines.get(found)
