"""Where the numbers of a result come from: what each run read, on which device it ran, and with which versions.

What a run reads and where it runs is asked of its config: whatever part of it names what it reads (`Reads`) or its device (`RunsOn`)
is found, wherever it stands, so that no study has to think of it.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from anabranch.machine import processor_name, usable_cores
from anabranch.native import best_level

UNKNOWN = "not noted"
PACKAGES = ("anabranch", "torch", "numpy")


@runtime_checkable
class Reads(Protocol):
    """A part of a config by which files are read."""

    def content_digest(self) -> str:
        """Names what is read, by content."""
        ...


@runtime_checkable
class RunsOn(Protocol):
    """A part of a config that chooses a device."""

    def device_kind(self) -> str:
        """``cpu`` or ``cuda``: where a run would take place here and now."""
        ...


def parts(config: Any) -> Iterator[Any]:
    """A config and all that stands in it, in order."""
    yield config
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        inner: Iterable[Any] = (getattr(config, field.name) for field in dataclasses.fields(config))
    else:
        inner = config.values() if isinstance(config, dict) else config if isinstance(config, list | tuple) else ()
    for value in inner:
        yield from parts(value)


def readers(config: Any) -> list[Reads]:
    """The parts of a config that say what they read, those that are equal once."""
    found: list[Reads] = []
    for part in parts(config):
        if isinstance(part, Reads) and part not in found:
            found.append(part)
    return found


class Digests:
    """What arms read, by content, each text looked at once: what it was at the first question.

    Args:
        given: config of an arm -> digest, where a study says it itself; None to ask the parts of the config.
    """

    def __init__(self, given: Callable[[Any], str | None] | None = None) -> None:
        self._given = given
        self._known: list[tuple[Reads, str]] = []

    def of(self, config: Any) -> str | None:
        """Digest of what a run of ``config`` reads; None if it reads nothing. Raises DataError if that is not there."""
        if self._given is not None:
            return self._given(config)
        found = [self._digest(part) for part in readers(config)]
        if len(found) < 2:
            return found[0] if found else None
        return blake2b(" ".join(found).encode(), digest_size=8).hexdigest()

    def _digest(self, part: Reads) -> str:
        for known, digest in self._known:
            if known == part:
                return digest
        self._known.append((part, part.content_digest()))
        return self._known[-1][1]


def device_kind(config: Any) -> str | None:
    """Where a run of ``config`` takes place; None if no part of it chooses a device."""
    kinds = dict.fromkeys(part.device_kind() for part in parts(config) if isinstance(part, RunsOn))
    return " and ".join(kinds) if kinds else None


def versions() -> dict[str, str]:
    """Of what a result depends on, in this process."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def here() -> dict[str, Any]:
    """Where a run takes place: commit of the source (None where it is no work tree of git), processor, its instructions, and threads."""
    level = best_level()
    return {
        "commit": _commit(),
        "cpu": processor_name(),
        "isa": None if level is None else level.name,
        "threads": usable_cores() if (told := os.environ.get("OMP_NUM_THREADS")) is None else told,
    }


@functools.cache
def _commit() -> str | None:
    """When it is first asked for, of the work tree that this package lies in, "-dirty" behind it where the package differs from it."""
    package = Path(__file__).parents[1]

    def said(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=package, capture_output=True, text=True, check=False).stdout.strip()

    try:
        name = said("rev-parse", "--short=10", "HEAD")
        # A package that is installed may lie in the work tree of something else.
        is_tracked = said("ls-files", "--", "errors.py")
        return f"{name}-dirty" if said("status", "--porcelain", "-uno", "--", ".") else name if is_tracked else None
    except OSError:
        return None


def recorded_device(record: Mapping[str, Any]) -> str | None:
    """The device that a record notes; older ones do not, but a build of PyTorch for CPUs runs on nothing else. None: not known."""
    if "device" in record:
        return record["device"]
    return "cpu" if str((record.get("versions") or {}).get("torch", "")).endswith("+cpu") else None


@dataclass(frozen=True)
class Origin:
    """Of one run that counts.

    Attributes:
        arm, seed: which run.
        versions: that it ran with; empty if they are not noted.
        device: that it ran on; None if it is not known, or nothing chooses one.
        inputs: digest of what it read; None if it is not noted.
        reads: whether a run of this arm reads anything that would be noted now.
        unchecked: why what it read could not be compared with what lies here; None if it was, or there is nothing to compare.
        frozen: hash of the frozen plan that it ran under; None if it notes none.
    """

    arm: str
    seed: int
    versions: Mapping[str, str]
    device: str | None
    inputs: str | None
    reads: bool
    unchecked: str | None = None
    frozen: str | None = None

    @property
    def is_unnoted(self) -> bool:
        """Whether it read something and does not say what."""
        return self.reads and self.inputs is None


def joined_versions(origins: Iterable[Origin]) -> dict[str, str]:
    """The versions that the runs were made with, each once: several of one package stand side by side."""
    names = dict.fromkeys(name for origin in origins for name in origin.versions)
    return {
        name: " and ".join(dict.fromkeys(origin.versions.get(name, UNKNOWN) for origin in origins)) for name in names
    }


def groups(origins: Iterable[Origin]) -> list[dict[str, Any]]:
    """Which runs have the same versions, device and text: one entry for each kind, with the seeds of each arm."""
    found: dict[str, dict[str, Any]] = {}
    for origin in origins:
        text = origin.inputs or (UNKNOWN if origin.reads else None)
        kind = {"versions": dict(origin.versions), "device": origin.device, "inputs": text}
        runs = found.setdefault(repr(kind), {**kind, "runs": {}})["runs"]
        runs.setdefault(origin.arm, []).append(origin.seed)
    return list(found.values())


def notes(origins: Iterable[Origin], now: Mapping[str, str]) -> list[str]:
    """What is not alike in runs that stand in one table, and which runs: versions that moved (``now``: of this process), text that is
    not noted or that could not be compared, devices that differ."""
    origins = list(origins)
    told: dict[str, list[Origin]] = {}
    for origin in origins:
        moved = [
            f"{name} {origin.versions.get(name, UNKNOWN)} (here {version})"
            for name, version in now.items()
            if origin.versions.get(name) != version
        ]
        if moved:
            told.setdefault(f"other versions than here, {', '.join(moved)}", []).append(origin)
        if origin.is_unnoted:
            told.setdefault("written before runs noted what text they read", []).append(origin)
        if origin.unchecked is not None:
            told.setdefault(f"text not compared with that of here ({origin.unchecked})", []).append(origin)
    found = [f"{what}: {listed(runs)}" for what, runs in told.items()]
    devices: dict[str, list[Origin]] = {}
    for origin in origins:
        # The others, numbers drawn and counted, choose none.
        if origin.reads:
            devices.setdefault(origin.device or UNKNOWN, []).append(origin)
    if len(devices) > 1:
        found.append("not all on one device: " + "; ".join(f"{name}: {listed(of)}" for name, of in devices.items()))
    mixed = sorted(_seeds(origins, noted=True) & _seeds(origins, noted=False))
    if mixed:
        found.append(
            f"seed{'s' if len(mixed) > 1 else ''} {', '.join(map(str, mixed))}: runs that note their text are paired with runs that "
            "do not; they may have read other text"
        )
    return found


def _seeds(origins: Iterable[Origin], *, noted: bool) -> set[int]:
    return {origin.seed for origin in origins if origin.reads and origin.is_unnoted is not noted}


def listed(origins: Iterable[Origin]) -> str:
    """Runs, arm by arm."""
    seeds: dict[str, list[int]] = {}
    for origin in origins:
        seeds.setdefault(origin.arm, []).append(origin.seed)
    return "; ".join(
        f"{arm} {'seeds' if len(of) > 1 else 'seed'} {', '.join(map(str, of))}" for arm, of in seeds.items()
    )
