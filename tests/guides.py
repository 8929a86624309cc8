"""Run the commands and examples of a guide as a reader does, where only what the guide names is installed.

A guide names its extras in its first ``pip install 'anabranch[...]'``, and a section what it wants beside, before it wants it. Python is
that of an environment with these extras, or this one, from which all packages are hidden that they do not bring.
"""

import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from stat import S_ISREG
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from anabranch.extras import extras, module_of
from base_install import BASE

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```\s*$", re.MULTILINE | re.DOTALL)
INSTALL = re.compile(r"pip install 'anabranch\[(?P<extras>[\w,-]+)\]'")
# Of other programs, which the test of a guide does not run.
OTHERS = ("pip", "make", "source", "cat", "curl", "sudo", "lm_eval", "lm-eval")
# Seconds; nothing is measured by it, and a command of half a minute took ten where eight other programs ran on two cores.
PATIENCE = 3000

HIDE = """
import importlib.machinery, json, os, sys

class Hides(importlib.machinery.PathFinder):
    hidden = tuple(json.loads(os.environ["GUIDE_HIDES"]))

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        # As where it is not there: whoever only asks gets no error.
        if any(name == each or name.startswith(each + ".") for each in cls.hidden):
            return None
        return super().find_spec(name, path, target)

sys.meta_path[:] = [Hides if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
"""


@dataclass(frozen=True)
class Guide:
    """A guide whose commands run.

    Attributes:
        page: its file in docs/.
        smaller: the beginning of a command -> options after it that make it small; of an option that is given twice the last one counts.
        left_out: the beginning of a command -> why it does not run here.
    """

    page: str
    smaller: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Of the page."""
        return (DOCS / self.page).read_text(encoding="utf-8")

    @property
    def extras(self) -> tuple[str, ...]:
        """Those that it names first."""
        found = INSTALL.search(self.text)
        assert found is not None, f"{self.page} does not say what to install"
        return tuple(found["extras"].split(","))

    def blocks(self, info: str) -> Iterator[tuple[str, frozenset[str]]]:
        """Its blocks of one kind, in order, each with the extras that are named by then: first of all, and in its section."""
        text = self.text
        for block in FENCE.finditer(text):
            if block["info"].strip() == info:
                section = text[text.rfind("\n## ", 0, block.start()) + 1 : block.start("body")]
                named = {
                    name for found in INSTALL.finditer(section + block["body"]) for name in found["extras"].split(",")
                }
                yield textwrap.dedent(block["body"]), frozenset(self.extras) | named

    def commands(self) -> list[tuple[list[str], frozenset[str]]]:
        """The commands of ours in its bash blocks as words, in order, each with its extras."""
        lines = [
            (line, named) for body, named in self.blocks("bash") for line in body.replace("\\\n", " ").splitlines()
        ]
        found = [(shlex.split(line, comments=True), named) for line, named in lines]
        return [(words, named) for words, named in found if words and words[0] not in OTHERS and "=" not in words[0]]

    def made_small(self, words: list[str]) -> list[str] | None:
        """A command as it runs here; None for one that is left out."""
        said = " ".join(words)
        if any(said.startswith(beginning) for beginning in self.left_out):
            return None
        more = [options for beginning, options in self.smaller.items() if said.startswith(beginning)]
        return [*words, *shlex.split(" ".join(more))]

    def unused(self) -> list[str]:
        """What is said of commands that the guide does not have."""
        said = [" ".join(words) for words, _ in self.commands()]
        return [
            beginning
            for beginning in (*self.smaller, *self.left_out)
            if not any(line.startswith(beginning) for line in said)
        ]


def hidden(wanted: Sequence[str]) -> list[str]:
    """Modules of all extras but those of ``wanted``, and but what these packages bring themselves."""
    known = extras()
    kept = _closure([package.name for name in wanted for package in known[name].packages])
    modules = {module for extra in known.values() for module in extra.modules}
    return sorted(modules - {module_of(package) for package in kept} - BASE)


def _closure(packages: Sequence[str]) -> set[str]:
    """These packages and all that they need, by what is installed here."""
    found, left = set(), [canonicalize_name(package) for package in packages]
    while left:
        package = left.pop()
        if package in found:
            continue
        found.add(package)
        try:
            lines = metadata.requires(package) or []
        except metadata.PackageNotFoundError:
            continue
        needed = map(Requirement, lines)
        left += [
            canonicalize_name(each.name)
            for each in needed
            if each.marker is None or each.marker.evaluate({"extra": ""})
        ]
    return found


@cache
def cli_options() -> dict[str, set[str]]:
    """The options of each command; those of groups by all words."""
    from typer.main import get_command

    from anabranch.cli.main import app

    def of(group: Any, prefix: str) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                found |= of(command, f"{prefix}{name} ")
            else:
                words = [
                    option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
                ]
                found[prefix + name] = set(words)
        return found

    return of(get_command(app), "")


class Reader:
    """Whoever types the commands of a guide, one after another, in a folder.

    Args:
        folder: where.
        python: of an environment; None for this one.
            With None, each command is refused all packages that its extras do not bring.
    """

    def __init__(self, folder: Path, *, python: Path | None = None) -> None:
        self.folder, self.python, self.hides = folder, str(python or sys.executable), python is None
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ANABRANCH_"))}
        self.environment = {
            **clean,
            "ANABRANCH_CACHE": str(folder / ".cache"),
            "ANABRANCH_NO_KERNELS": "1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "160",
            "TERM": "dumb",
            "NO_COLOR": "1",
        }
        if self.hides:
            (folder / ".hide").mkdir(exist_ok=True)
            (folder / ".hide" / "sitecustomize.py").write_text(HIDE)
            self.environment["PYTHONPATH"] = os.pathsep.join([str(folder / ".hide"), str(ROOT / "src")])

    def of(self, named: Iterable[str]) -> dict[str, str]:
        """The environment of a command that has these extras."""
        return {**self.environment, **({"GUIDE_HIDES": json.dumps(hidden(sorted(named)))} if self.hides else {})}

    def follows(self, guide: Guide) -> int:
        """Run all of a guide, its examples in Python first, as one program; how many programs ran."""
        assert guide.unused() == []
        examples = list(guide.blocks("python"))
        if examples:
            named = frozenset().union(*(named for _, named in examples))
            given = self._files()
            self.runs([self.python, "-c", "\n".join(body for body, _ in examples)], named)
            found = self._files()
            changed = sorted(str(path) for path, said in given.items() if found.get(path) != said)
            assert changed == [], (
                f"the examples of {guide.page} write over what its commands read: {', '.join(changed)}"
            )
        ran = int(bool(examples))
        for words, named in guide.commands():
            small = guide.made_small(words)
            if small is not None:
                self.types(small, named)
                ran += 1
        return ran

    def _files(self) -> dict[Path, tuple[int, int]]:
        """All that lie in the folder but for hidden ones, with the time of their last change and their size."""
        paths = (path.relative_to(self.folder) for path in self.folder.rglob("*"))
        seen = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
        stats = {path: (self.folder / path).stat() for path in seen}
        return {path: (stat.st_mtime_ns, stat.st_size) for path, stat in stats.items() if S_ISREG(stat.st_mode)}

    def command(self, words: Sequence[str]) -> list[str]:
        """What is started for a command of a guide."""
        starts = {"anabranch": ["-m", "anabranch"], "torchrun": ["-m", "torch.distributed.run"]}
        return [self.python, *starts[words[0]], *words[1:]]

    def types(self, words: Sequence[str], named: Iterable[str]) -> str:
        """What a command says, which has to end well; a server is asked for a free port, and stopped once it answers."""
        return self._serves(words, named) if "serve" in words[:3] else self.runs(self.command(words), named)

    def runs(self, command: Sequence[str], named: Iterable[str]) -> str:
        """What a program says, which has to end well."""
        options = {"cwd": self.folder, "env": self.of(named), "capture_output": True, "text": True, "timeout": PATIENCE}
        done = subprocess.run(command, **options)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def _serves(self, words: Sequence[str], named: Iterable[str]) -> str:
        with self._started([*words, "--port", "0"], named) as (process, said):
            # Where it is said before that, it still loads.
            told = line = ""
            while not line.startswith("serving "):
                line = said.get(timeout=PATIENCE)
                assert line is not None, f"{shlex.join(words)} ended\n{told[-3000:]}"
                told += line
            process.send_signal(signal.SIGTERM)
            code = process.wait(PATIENCE)
        assert code == 0, f"{shlex.join(words)}: exit code {code}\n{told[-3000:]}"
        return told

    @contextmanager
    def _started(self, words: Sequence[str], named: Iterable[str]) -> Iterator[tuple[subprocess.Popen, queue.Queue]]:
        said: queue.Queue = queue.Queue()
        with subprocess.Popen(
            self.command(words),
            cwd=self.folder,
            env=self.of(named),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:

            def read() -> None:
                for line in process.stdout or ():
                    said.put(line)
                said.put(None)

            reading = threading.Thread(target=read)
            reading.start()
            try:
                yield process, said
            finally:
                if process.poll() is None:
                    process.kill()
                reading.join()
