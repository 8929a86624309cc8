"""What SCALE asks models, a file a language (``en.toml``): text with names that are filled in.

`Prompts.read` takes one that ships, or a file of one's own with the same names. Texts of senders and models stand between lines (``bar``)
that occur in none of them, so that no answer of a model can end the place where it is quoted.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

from anabranch.errors import ConfigError, DataError
from anabranch.files import parse_toml

FOLDER = Path(__file__).parent
VERSION = 1

# What each text is filled in with: all of these names, each at least once.
NAMES: Mapping[str, frozenset[str]] = {
    "outline": frozenset({"bar", "problem", "most"}),
    "select": frozenset({"bar", "problem", "count", "versions"}),
    "version_of": frozenset({"bar", "number", "steps"}),
    "score": frozenset({"bar", "problem", "earlier", "step"}),
    "draft": frozenset({"bar", "problem", "earlier", "step"}),
    "solve": frozenset({"bar", "problem", "earlier", "step"}),
    "last": frozenset({"bar", "problem", "earlier", "step"}),
    "done": frozenset({"bar", "number", "step", "answer"}),
    "planned": frozenset({"number", "step"}),
    "joined": frozenset({"step"}),
    "question": frozenset(),
}
_EQUALS = re.compile("=+")
SHORTEST = 5


@dataclass(frozen=True, slots=True)
class Prompts:
    """Those of one language.

    Attributes:
        language: or the file's name.
        texts: by name, see `NAMES`.
        families: texts that models have in place of these, by a part of their names.
    """

    language: str
    texts: Mapping[str, str]
    families: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @staticmethod
    def read(language: str = "en") -> "Prompts":
        """Those that ship in a language, or of a file that ends in ``.toml``.

        Raises ConfigError for a language that there is not, DataError for a file that cannot be read or lacks something.
        """
        # One's own file may have changed since.
        return _read(language) if language.endswith(".toml") else _shipped(language)

    def fill(self, name: str, model: str, **values: object) -> str:
        """A text as a model is given it."""
        for family, texts in self.families.items():
            if family in model.casefold() and name in texts:
                return Template(texts[name]).substitute(values).strip()
        return Template(self.texts[name]).substitute(values).strip()


def bar_for(texts: Sequence[str]) -> str:
    """A line of ``=`` that is longer than any in these texts."""
    longest = max((len(run) for text in texts for run in _EQUALS.findall(text)), default=0)
    return "=" * max(SHORTEST, longest + 1)


@cache
def _shipped(language: str) -> Prompts:
    return _read(language)


def _read(language: str) -> Prompts:
    is_file = language.endswith(".toml")
    path = Path(language) if is_file else FOLDER / f"{language}.toml"
    known = sorted(one.stem for one in FOLDER.glob("*.toml"))
    if not is_file and language not in known:
        raise ConfigError(
            f"language is {language[:80]!r}; there are {', '.join(known)}, or give a file that ends in .toml"
        )
    try:
        table = parse_toml(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"prompts {str(path)!r} cannot be read: {error}") from None
    families = table.get("families", {})
    if table.get("version") != VERSION:
        raise DataError(f"prompts {str(path)!r} have version {table.get('version')!r}; this program reads {VERSION}")
    missing = [name for name in NAMES if name not in table]
    if missing:
        raise DataError(f"prompts {str(path)!r} lack {', '.join(missing)}")
    if not isinstance(families, dict) or not all(isinstance(one, dict) for one in families.values()):
        raise DataError(f"families of prompts {str(path)!r} must be tables, [families.NAME]")
    for where, texts in (("", table), *((f"families.{name}.", one) for name, one in families.items())):
        _check(path, where, {name: text for name, text in texts.items() if name not in ("version", "families")})
    texts = {name: table[name] for name in NAMES}
    return Prompts(language, texts, {name.casefold(): dict(one) for name, one in families.items()})


def _check(path: Path, where: str, texts: Mapping[str, Any]) -> None:
    for name, text in texts.items():
        if name not in NAMES:
            raise DataError(f"prompts {str(path)!r} have {where}{name}, which is none; there are {', '.join(NAMES)}")
        if not isinstance(text, str) or not Template(text).is_valid():
            raise DataError(f"{where}{name} of prompts {str(path)!r} is no text with $names")
        found = frozenset(Template(text).get_identifiers())
        if found != NAMES[name]:
            raise DataError(
                f"{where}{name} of prompts {str(path)!r} fills in {_listed(found)}; it must fill in {_listed(NAMES[name])}"
            )


def _listed(names: frozenset[str]) -> str:
    return ", ".join(f"${name}" for name in sorted(names)) or "nothing"
