"""How commands talk: results on stdout, everything else on stderr, and numbers that people can read."""

import json
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Controls of a terminal, and what turns the order of the letters after it or begins a line where nobody sees one.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")

# Of the first column: model, data, wrote, ...
LABEL_WIDTH = 8


def print_json(value: dict[str, Any]) -> None:
    """One object on stdout, nothing else. Numbers that JSON cannot hold become null; what would steer a terminal is escaped."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False)
    print(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def print_line(text: str) -> None:
    """A line, or several, on stdout."""
    print(visible(text))


def say(text: str = "") -> None:
    """A line on stderr, if anybody still reads it: what is shown never ends what is done."""
    try:
        print(visible(text), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        let_go(sys.stderr)


def let_go(stream: TextIO) -> None:
    """Point a standard stream that cannot be written to where nothing is kept."""
    descriptor = 2 if stream is sys.stderr else 1
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def fact(label: str, text: str, *, to: TextIO | None = None) -> None:
    """A line: what it is about, then what there is to say, broken where a terminal ends. ``to`` None is stdout."""
    to, text = to or sys.stdout, visible(text)
    if to.isatty():
        width = max(shutil.get_terminal_size().columns - LABEL_WIDTH, 20)
        lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
        text = f"\n{'':{LABEL_WIDTH}}".join(lines)
    told = f"{visible(label) + ' ':<{LABEL_WIDTH}}{text}"
    if to is sys.stderr:
        say(told)
    else:
        print(told, file=to)


def sample(text: str) -> None:
    """Text of a model's under the label of a fact."""
    lines = visible(text).rstrip().split("\n")
    print(f"{'sample':<{LABEL_WIDTH}}" + f"\n{'':{LABEL_WIDTH}}".join(lines))


def visible(text: str) -> str:
    """``text`` without what would steer a terminal: control characters but line ends and tabs, and what turns the order of letters, become
    U+FFFD."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def shell_word(text: object) -> str:
    """``text`` as one word of a command line, in one line, as bash and zsh read it."""
    word = str(text)
    if not _CONTROL.search(word) and "\n" not in word and "\t" not in word:
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\t", "\\t")
    return "$'" + _CONTROL.sub(lambda found: "".join(f"\\x{byte:02x}" for byte in os.fsencode(found[0])), escaped) + "'"


def wrote(where: str, next_command: str) -> None:
    """The last line of a command: where things are and what to do next."""
    fact("wrote", where)
    fact("next", next_command)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1, indent: bool = True) -> None:
    """A plain table: the first ``text_columns`` columns on the left of their cells, numbers on the right.

    A header may be two lines, the second being the unit.
    """
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    for number, header in enumerate(headers):
        is_text = number < text_columns
        grid.add_column(visible(header), justify="left" if is_text else "right", no_wrap=not is_text, vertical="bottom")
    for row in rows:
        grid.add_row(*(Text(visible(cell)) for cell in row))
    _print_grid(grid)


def fact_table(rows: Sequence[tuple[str, str]]) -> None:
    """Facts under each other: what each is about, then what there is to say, in as many lines as it takes."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in rows:
        grid.add_row(visible(label), Text(visible(text)))
    _print_grid(grid)


def _print_grid(grid: Table) -> None:
    console = Console(width=_width(), highlight=False)
    with console.capture() as capture:
        console.print(grid)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def is_wide() -> bool:
    """Whether a table has room for a column of words."""
    return _width() >= 110


def _width() -> int:
    """Of what tables are printed on. A file or a pipe has no width; tables are never cut there."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 200


def quantity(value: float, units: str = "kMBT") -> str:
    """1234567 as ``1.23 M``; below 1000 as it is."""
    for power in range(len(units), 0, -1):
        scaled = value / 1000**power
        if abs(scaled) >= 0.9995:
            return f"{scaled:.0f} {units[power - 1]}" if abs(scaled) >= 999.5 else f"{scaled:.3g} {units[power - 1]}"
    return f"{value:.0f}"


def size(num_bytes: float) -> str:
    """Bytes as ``12.3 MB`` (powers of 1000)."""
    text = quantity(num_bytes, "kMGT")
    return f"{text}B" if text[-1].isalpha() else f"{text} B"


def binary_size(num_bytes: float) -> str:
    """Bytes of memory as it is given to ``--memory`` (powers of 1024): ``1.50 GiB``, ``12 MiB``, ``45 KiB``."""
    for power, unit, digits in ((30, "GiB", 2), (20, "MiB", 0), (10, "KiB", 0)):
        if num_bytes >= 1 << power:
            return f"{num_bytes / (1 << power):.{digits}f} {unit}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as ``42 s``, ``3 min 05 s`` or ``2 h 10 min``."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def finite(value: Any) -> Any:
    """The same, with None for numbers that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value
