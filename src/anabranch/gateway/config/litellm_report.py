"""Moving in from LiteLLM: what an import says to who started it, and what it reads of the environment."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anabranch.gateway.config.lines import Lines
from anabranch.gateway.config.secret import VARIABLE


class Report:
    """Sentences with file, line and field.

    Attributes:
        left: what was not taken over.
        notes: what was taken over, and is not as it was there, or not only the file's.
    """

    def __init__(self, path: Path, lines: Lines) -> None:
        self._path, self._lines = path, lines
        self.left: list[str] = []
        self.notes: list[str] = []

    def leave(self, field: str, why: str) -> None:
        """Say what is not taken over."""
        self.left.append(self._line(field, why))

    def note(self, field: str, why: str) -> None:
        """Say what else is to be known; once, however often it is so."""
        line = self._line(field, why)
        if line not in self.notes:
            self.notes.append(line)

    def _line(self, field: str, why: str) -> str:
        known = field
        while known and known not in self._lines:
            known = known.rpartition(".")[0]
        return f"{self._path}:{self._lines.get(known, 1)}: {field} {why}"


class Environment:
    """The variables that LiteLLM would see: those of this process, and before them what its file sets itself.

    Args:
        given: ``environment_variables`` of the file.

    Attributes:
        unknown: what its file sets to what is not known now.
    """

    def __init__(self, given: Any) -> None:
        self._values: dict[str, str] = dict(os.environ)
        self.unknown: set[str] = set()
        for name, value in given.items() if isinstance(given, Mapping) else ():
            variable = variable_of(value)
            found = os.environ.get(variable) if variable else value
            if found is not None and not isinstance(found, dict | list):
                self._values[str(name)] = str(found)
            elif value is not None:
                self.unknown.add(str(name))

    def get(self, name: str) -> str | None:
        """The value, without blanks around it; None where it is not set, or empty."""
        return self._values.get(name, "").strip() or None

    def first(self, names: Sequence[str]) -> str | None:
        """The first name that is set; None for none."""
        return next((name for name in names if self.get(name) is not None), None)


def variable_of(value: Any) -> str | None:
    """NAME of ``os.environ/NAME``; None of anything else."""
    match = re.fullmatch(r"os\.environ/(.+)", value) if isinstance(value, str) else None
    return match[1] if match and VARIABLE.fullmatch(match[1]) else None
