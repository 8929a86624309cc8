"""TOML and YAML with the line of every field: ``{"models.0.price": 12}``, so that a complaint can say where to look."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.files import check_nesting, parse_toml

Lines = dict[str, int]
FORMATS = {".toml": "toml", ".yaml": "yaml", ".yml": "yaml", ".json": "yaml"}  # JSON is YAML

# A YAML alias can stand for very much.
MAX_FIELDS = 100_000


def parse(text: str, path: Path) -> tuple[dict[str, Any], Lines]:
    """The table in ``text``, and where each of its fields begins, counted from 1.

    Raises ConfigError, with file and line, for what cannot be read, and for a key that is there twice.
    """
    form = FORMATS.get(path.suffix.lower())
    if form is None:
        raise ConfigError(f"{path} is no config by its name; it must end in {', '.join(FORMATS)}")
    return _parse_toml(text, path) if form == "toml" else _parse_yaml(text, path)


def _parse_toml(text: str, path: Path) -> tuple[dict[str, Any], Lines]:
    try:
        data = parse_toml(text)
    except ValueError as error:
        message = str(error)
        at = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
        where = str(path)
        # But for brackets without end, and an integer of thousands of digits.
        if at is not None:
            last = text.count("\n") + 1
            where += f":{at[1] or last}"
            message = message[: at.start()]
        raise ConfigError(f"{where}: not TOML: {message[:1].lower()}{message[1:]}") from None
    return data, _TomlLines(text).lines


def join(path: str, name: object) -> str:
    """The path of a field in a table or list."""
    return f"{path}.{name}" if path else str(name)


_SKIP = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_KEY = re.compile(r"""[ \t]*(?:"(?P<basic>(?:[^"\\\n]|\\.)*)"|'(?P<literal>[^'\n]*)'|(?P<bare>[A-Za-z0-9_-]+))[ \t]*""")
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"""(?:"{0,2})' r"|'''.*?'''(?:'{0,2})" r'|"(?:[^"\\\n]|\\.)*"' r"|'[^'\n]*'", re.DOTALL
)
_BARE = re.compile(r"[^,\]}#\n]*")


class _TomlLines:
    """Finds lines in text that is known to be TOML, so that it need not complain."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.lines = text, 0, Lines()
        # Entries of arrays of tables.
        self._counts: dict[str, int] = {}
        table = ""
        while self._skip() < len(text):
            if text[self.at] == "[":
                table = self._header()
            else:
                self._pair(table)

    def _skip(self) -> int:
        match = _SKIP.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        return self.at

    def _mark(self, path: str, at: int) -> None:
        self.lines.setdefault(path, self.text.count("\n", 0, at) + 1)

    def _header(self) -> str:
        start, is_array = self.at, self.text.startswith("[[", self.at)
        self.at += 2 if is_array else 1
        names = list(self._keys())
        self.at += 2 if is_array else 1
        path = ""
        for number, name in enumerate(names):
            path = join(path, name)
            if is_array and number == len(names) - 1:
                self._counts[path] = self._counts.get(path, -1) + 1
            self._mark(path, start)
            if path in self._counts:
                path = join(path, self._counts[path])
                self._mark(path, start)
        return path

    def _keys(self) -> Iterator[str]:
        while match := _KEY.match(self.text, self.at):
            self.at = match.end()
            if match["basic"] is not None:
                yield parse_toml(f'key = "{match["basic"]}"')["key"]
            else:
                yield match["literal"] if match["literal"] is not None else match["bare"]
            if not self.text.startswith(".", self.at):
                return
            self.at += 1

    def _pair(self, table: str) -> None:
        start, path = self.at, table
        for name in self._keys():
            path = join(path, name)
            self._mark(path, start)
        self.at += 1  # =
        self._value(path)

    def _value(self, path: str) -> None:
        self._skip()
        opening = self.text[self.at]
        if opening in "[{":
            self._several(path, is_table=opening == "{")
            return
        match = _STRING.match(self.text, self.at) or _BARE.match(self.text, self.at)
        assert match is not None
        self.at = match.end()

    def _several(self, path: str, is_table: bool) -> None:
        self.at += 1
        place = 0
        while self.text[self._skip()] not in "]}":
            if self.text[self.at] == ",":
                self.at += 1
            elif is_table:
                self._pair(path)
            else:
                self._mark(join(path, place), self.at)
                self._value(join(path, place))
                place += 1
        self.at += 1


def _parse_yaml(text: str, path: Path) -> tuple[dict[str, Any], Lines]:
    require("pyyaml", by=f"reading {path} (other than TOML)")
    import yaml

    try:
        loader = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}:{line}: not YAML: it holds the character U+{error.character:04X}") from None
    try:
        node = loader.get_single_node()
        lines = Lines()
        data = {} if node is None else _YamlReader(loader, lines, path).value(node, "")
        check_nesting(data)
    except ConfigError:
        # The reader's own, which says where; it is a ValueError too.
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not YAML: nested too deep") from None
    except (ValueError, OverflowError) as error:
        # A date that there is not, an integer of thousands of digits.
        raise ConfigError(f"{path}: not YAML: {error}") from None
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        raise ConfigError(f"{path}:1: the file holds {_kind(data)}; it must hold a table of fields")
    return data, lines


class _YamlReader:
    """Turns nodes into values, and writes down where they were."""

    def __init__(self, loader: Any, lines: Lines, path: Path) -> None:
        self.loader, self.lines, self.path, self.count = loader, lines, path, 0

    def value(self, node: Any, path: str) -> Any:
        self.count += 1
        if self.count > MAX_FIELDS:
            raise ConfigError(f"{self.path}: more than {MAX_FIELDS:,} fields; do aliases repeat too much?")
        if node.id == "mapping":
            return self._table(node, path)
        if node.id == "sequence":
            return [self._entry(item, join(path, place)) for place, item in enumerate(node.value)]
        value = self.loader.construct_object(node)
        # Configs hold what JSON holds: dates stay the text they are.
        return value if value is None or isinstance(value, str | bool | int | float) else node.value

    def _entry(self, node: Any, path: str) -> Any:
        self.lines[path] = node.start_mark.line + 1
        return self.value(node, path)

    def _table(self, node: Any, path: str) -> dict[str, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        self._check_twice(own)
        # What << brings comes first, so that a table's own fields win.
        self.loader.flatten_mapping(node)
        table: dict[str, Any] = {}
        for key, item in node.value:
            if key.id != "scalar":
                raise ConfigError(f"{self.path}:{key.start_mark.line + 1}: a name of a field is {key.id}, not text")
            here = join(path, key.value)
            self.lines[here] = key.start_mark.line + 1
            table[key.value] = self.value(item, here)
        return table

    def _check_twice(self, keys: list[Any]) -> None:
        seen: dict[str, int] = {}
        for key in keys:
            line = key.start_mark.line + 1
            if key.id == "scalar" and seen.setdefault(key.value, line) != line:
                raise ConfigError(f"{self.path}:{line}: {key.value!r} is there twice, first in line {seen[key.value]}")


def _kind(value: Any) -> str:
    return {list: "a list", str: "text", type(None): "nothing"}.get(type(value), "a single value")
