"""Which optional packages are here, and the pip command for those that are not.

    require("lm", by="anabranch train")     # MissingExtraError: anabranch train needs torch; pip install 'anabranch[lm]'
    extras()["graph"].missing               # ("numba",)

Extras are read from the metadata of the installed package, or from ``pyproject.toml`` where the package runs from its source
tree; nothing here repeats what stands there.
"""

import importlib
import importlib.util
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from anabranch.errors import MissingExtraError

NAME = "anabranch"
_BASE = ""  # stands for what every command needs, where extras stand by their names
# For those who work on the project, and the sum of all: no message offers them.
INTERNAL = ("all", "bench", "dev", "docs")
# What is imported, where it is not called as the package is (its name with _ for -).
_MODULES = {
    "eclipse-sumo": "sumo",
    "faiss-cpu": "faiss",
    "google-auth": "google.auth",
    "import-linter": "importlinter",
    "llama-index-core": "llama_index.core",
    "mkdocs-material": "material",
    "opentelemetry-exporter-otlp-proto-http": "opentelemetry.exporter.otlp.proto.http",
    "opentelemetry-sdk": "opentelemetry.sdk",
    "pytest-xdist": "xdist",
    "python-igraph": "igraph",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "scikit-network": "sknetwork",
}
_REQUIREMENT = re.compile(
    r"^\s*(?P<name>[\w.-]+)\s*(?:\[(?P<extras>[^\]]*)\])?\s*(?P<needs>[^;]*)(?:;(?P<marker>.*))?$", re.DOTALL
)
_EXTRA_MARKER = re.compile(r"""(?:\s*and\s*)?\bextra\s*==\s*['"](?P<extra>[^'"]+)['"]""")


_BOUND = re.compile(r"(>=|<)\s*([\d.]+)")


@dataclass(frozen=True)
class Package:
    """What the project needs of one package of an index.

    Attributes:
        name: as pip knows it.
        needs: the versions, as a requirement says it: ``>=2.2,<3``.
    """

    name: str
    needs: str

    @property
    def version(self) -> str | None:
        """What is installed; None where nothing is, or does not say. Imports nothing."""
        try:
            return metadata.version(self.name)
        except metadata.PackageNotFoundError:
            return None

    @property
    def fits(self) -> bool:
        """Whether ``version`` is one of those needed; one that is not known counts as such."""
        version = self.version
        if version is None:
            return True
        return all((_release(version) < _release(bound)) == (sign == "<") for sign, bound in _BOUND.findall(self.needs))

    def __str__(self) -> str:
        return f"{self.name} {self.version}, needs {self.needs}"


def _release(version: str) -> list[int]:
    """``2.10.0+cu128`` as [2, 10]: zeros at the end say nothing, and marks of a build or a trial version are left out."""
    numbers = [int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", version, maxsplit=1)[0])]
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers


@dataclass(frozen=True)
class Extra:
    """One extra.

    Attributes:
        name: as in ``pip install 'anabranch[NAME]'``.
        modules: what it brings, by the names that are imported; those of other extras that it includes are among them, those
            that are for some platforms only are not, since the code does without.
        packages: the same, as pip knows them.
    """

    name: str
    modules: tuple[str, ...]
    packages: tuple[Package, ...] = field(default=(), compare=False)

    @property
    def missing(self) -> tuple[str, ...]:
        """Those of ``modules`` that cannot be imported here. Looks anew at each call, and imports nothing."""
        return tuple(module for module in self.modules if not is_installed(module))

    @property
    def outdated(self) -> tuple[Package, ...]:
        """Those of ``packages`` that are here in a version that is not among those needed."""
        return tuple(package for package in self.packages if not package.fits)


def is_installed(module: str) -> bool:
    """Whether a top-level module is here; it is looked for, not imported."""
    if sys.modules.get(module) is not None:
        return True
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def extras() -> dict[str, Extra]:
    """Every extra by its name, in alphabetical order."""
    wanted = {name: lines for name, lines in _requirements().items() if name != _BASE}
    made = {}
    for name in sorted(wanted):
        brought = _brought(name, wanted)
        made[name] = Extra(name, tuple(sorted(brought)), tuple(brought[module] for module in sorted(brought)))
    return made


def packages() -> dict[str, Package]:
    """What every command needs and what an extra for users brings, by the names that are imported."""
    wanted = _requirements()
    found: dict[str, Package] = {}
    for name in wanted:
        if name not in INTERNAL:
            found |= _brought(name, wanted)
    return found


def require(*wanted: str, by: str, of: str = "") -> None:
    """Make sure that optional packages are here before they are used.

    Args:
        wanted: names of extras, each wanted whole, or of single packages, such as ``scipy``.
        by: what needs them, as a subject of the sentence: ``anabranch train``, ``reading .gguf files``.
        of: the extra to name for a single package that several bring. Default: the smallest.

    Raises MissingExtraError, whose one line names the pip command for all of them.
    """
    known = extras()
    brought = {name: known[name].modules if name in known else (module_of(name),) for name in wanted}
    short = {name: [module for module in modules if not is_installed(module)] for name, modules in brought.items()}
    short = {name: modules for name, modules in short.items() if modules}
    if short:
        modules = sorted({module for modules in short.values() for module in modules})
        sources = [name if name in known else _extra_of(module_of(name), [of]) or name for name in short]
        raise _missing(by, modules, sources)


def explain(error: ModuleNotFoundError, by: str, near: Iterable[str] = ()) -> MissingExtraError | None:
    """The same error with the pip command; None if no extra brings the module, or if it is here and lacks a part: pip cures neither.

    Args:
        error: of an import that failed.
        by: what wanted it, as in `require`.
        near: words that may name the extra (the command's, the package's), the likelier ones first. Without one that fits, it is
            the folder of ours whose module wanted it, and else the smallest extra that brings the module.
    """
    if isinstance(error, MissingExtraError):
        return error
    module = (error.name or "").partition(".")[0]
    if not module or is_installed(module) or not any(module in extra.modules for extra in extras().values()):
        return None
    return _missing(by, [module], [_extra_of(module, [*near, *_folders(error)]) or _package_of(module)])


def _folders(error: ModuleNotFoundError) -> list[str]:
    """Folders of ours that an error came through, the innermost first."""
    found, trace = [], error.__traceback__
    while trace is not None:
        package, _, rest = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")
        if package == NAME and rest:
            found.append(rest.partition(".")[0])
        trace = trace.tb_next
    return found[::-1]


def lazy(package: str, homes: Mapping[str, str | None]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose names are imported when they are first used.

    Args:
        package: its ``__name__``.
        homes: the module in which each name lives, ``.module`` for one of the package; None where the name is itself a module.

    What is missing is told as by `require`, with the extra that is called as the package where that brings it.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(homes[name] or f".{name}", package)
        except ModuleNotFoundError as error:
            told = explain(error, by=f"{package}.{name}", near=reversed(package.split(".")))
            if told is None:
                raise
            raise told from None
        value = getattr(module, name) if homes[name] else module
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *homes})


def module_of(package: str) -> str:
    """The name under which a package of an index is imported."""
    package = _normalised(package)
    return _MODULES.get(package, package.replace("-", "_"))


def _extra_of(module: str, near: Iterable[str]) -> str | None:
    """The extra to name for a module: the first of ``near`` that brings it, else the smallest; None if none of users does."""
    fitting = [extra for extra in extras().values() if module in extra.modules and extra.name not in INTERNAL]
    order = {name: place for place, name in reversed(list(enumerate(near)))}
    fitting.sort(key=lambda extra: (order.get(extra.name, len(order)), len(extra.modules), extra.name))
    return fitting[0].name if fitting else None


def _package_of(module: str) -> str:
    return next((package for package, found in _MODULES.items() if found == module), module.replace("_", "-"))


def _missing(by: str, modules: list[str], sources: list[str]) -> MissingExtraError:
    """The error; ``sources`` are extras and packages that bring the modules."""
    of = [name for name in dict.fromkeys(sources) if name in extras()]
    parts = [f"'{NAME}[{','.join(of)}]'"] if of else []
    command = " ".join(["pip install", *parts, *(name for name in dict.fromkeys(sources) if name not in of)])
    listed = " and ".join([", ".join(modules[:-1]), modules[-1]] if len(modules) > 1 else modules)
    return MissingExtraError(f"{by} needs {listed}; {command}", modules=modules, command=command)


@cache
def _requirements() -> dict[str, tuple[str, ...]]:
    """The requirements of each extra, without what belongs to the extra's marker, and of the base under `_BASE`."""
    source = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if source.is_file():
        project = tomllib.loads(source.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == NAME:
            extras = {name: tuple(lines) for name, lines in project["optional-dependencies"].items()}
            return {_BASE: tuple(project["dependencies"]), **extras}
    try:
        found = metadata.metadata(NAME)
    except metadata.PackageNotFoundError:  # a copy of the folder alone: nothing says what it may use
        return {}
    made: dict[str, list[str]] = {name: [] for name in (_BASE, *(found.get_all("Provides-Extra") or []))}
    for line in found.get_all("Requires-Dist") or []:
        marker = _EXTRA_MARKER.search(line)
        made[marker["extra"] if marker else _BASE].append(_EXTRA_MARKER.sub("", line).strip().rstrip(";"))
    return {name: tuple(lines) for name, lines in made.items()}


def _brought(name: str, wanted: Mapping[str, Iterable[str]]) -> dict[str, Package]:
    """Packages of an extra and of those that it includes, by the module that is imported."""
    found: dict[str, Package] = {}
    for line in wanted[name]:
        parsed = _REQUIREMENT.match(line)
        assert parsed is not None, f"requirement {line!r}"
        if _normalised(parsed["name"]) == NAME:
            for other in (parsed["extras"] or "").split(","):
                found |= _brought(other.strip(), wanted)
        elif not (parsed["marker"] or "").strip():
            found[module_of(parsed["name"])] = Package(parsed["name"], parsed["needs"].strip())
    return found


def _normalised(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()
