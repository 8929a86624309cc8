"""What passes between an `ExpertStore` and those who use it: leases, loads that are waited for, and what a checkpoint's files look like."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anabranch.errors import CheckpointError, InputError
from anabranch.routers.coe.tier import Resident, Usage

# Name, bytes, time of change of each file.
Signature = tuple[tuple[str, int, int], ...]


class Lease:
    """An expert in use. It stays where it is until `release`, or the end of a ``with``."""

    def __init__(self, name: str, resident: Resident, unpin: Callable[[Resident], None]) -> None:
        self.name, self._resident, self._unpin = name, resident, unpin
        self._is_open = True

    @property
    def expert(self) -> Any:
        """What the loader gave. Raises InputError after release."""
        if not self._is_open:
            raise InputError(f"the lease of expert {self.name!r} was released; ask for it again")
        return self._resident.value

    def release(self) -> None:
        """Say that it is no longer used; more than once does nothing."""
        if self._is_open:
            self._is_open = False
            self._unpin(self._resident)

    def __enter__(self) -> Any:
        return self.expert

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass
class Expert:
    """A registered checkpoint: where its files are, how they looked, what it takes in each tier, how it is asked for."""

    path: Path
    signature: Signature
    bytes_in: dict[str, int]  # by tier
    usage: Usage


@dataclass
class Job:
    """A load that is waiting or under way."""

    name: str
    waiting: list[tuple[Future[Lease], float]] = field(default_factory=list)
    ahead: list[Future[None]] = field(default_factory=list)
    has_begun: bool = False
    is_spared: bool = True  # what is fetched ahead goes last for a while

    def is_wanted(self) -> bool:
        """Somebody still waits for it."""
        return any(not future.cancelled() for future, _ in self.waiting)

    def finish_ahead(self) -> None:
        """Say to those who fetched ahead that it is over."""
        for future in self.ahead:
            if future.set_running_or_notify_cancel():
                future.set_result(None)


def signature_of(path: Path) -> Signature:
    """Names, sizes and times of change of a checkpoint's files. Raises CheckpointError if there are none."""
    try:
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        found = []
        for file in files:
            status = file.stat()
            found.append((str(file.relative_to(path)), status.st_size, status.st_mtime_ns))
    except OSError as error:
        raise CheckpointError(f"cannot read the expert in {path}: {(error.strerror or str(error)).lower()}") from None
    if not found:
        raise CheckpointError(f"no expert in {path}; it must be a file, or a folder with files")
    return tuple(found)
