"""What lies beside a file of ours, and whether another file may take its place.

Beside an index of vectors may lie a folder with the changes that a server took of it (`anabranch.graph.live`). They are changes of that
very file: put another one in its place, and they are lost. So all that writes a file by name in this package does it by `new_file`. A run
that is long keeps its parts in a folder beside its result, which is removed in the end: `check_parts` says whether it may be.
"""

import contextlib
import errno
import os
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from anabranch.errors import DataError, InputError
from anabranch.files import atomic_file, explained

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

# Of array files (`anabranch.graph.array_file`): changes can be taken of no others.
MAGIC = b"ANABARR1"
LOCK = "lock"
# To take a lock whose file others make and remove.
TRIES = 5

# Folders that this thread holds by `replacing`.
_held = threading.local()


def live_folder(path: str | Path) -> Path:
    """Where the changes of the index at ``path`` lie."""
    return Path(f"{path}.live")


def segments(folder: Path) -> list[int]:
    """Numbers of the logs of changes there are, rising. Raises DataError where they may not be looked at."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return []
        # Not as if there were none: what changed would be missing from answers.
        raise DataError(f"cannot read {folder}: {(error.strerror or str(error)).lower()}") from error
    found = (name.removeprefix("log-") for name in names if name.startswith("log-"))
    return sorted(int(number) for number in found if number.isascii() and number.isdigit())


def check_unchanged(path: str | Path) -> None:
    """Before an index is written. Raises InputError if a server took changes of the one that is there: they would be lost."""
    if segments(live_folder(path)):
        raise InputError(
            f"{live_folder(path)} holds changes of {path}, which would be lost if that were written; name another file, or move the "
            "folder away"
        )


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[None]:
    """Around reading an index and writing it, or another one in its place: no process takes changes of it meanwhile, which would be lost.

    Nothing is left beside the index, nor made where its folder is not there yet. The thread that is within may enter it again.

    Raises InputError as `check_unchanged`, DataError while another process takes changes or writes it, and as `explained`.
    """
    folder = live_folder(path)
    check_unchanged(path)
    held: set[Path] = _held.__dict__.setdefault("folders", set())
    place = folder.resolve()
    # Nobody can have opened what lies in a folder that is not there.
    if place in held or not folder.parent.is_dir():
        yield
        return
    try:
        lock = FolderLock(folder)
    except NoLocksError:
        # Nor can anybody take changes there.
        yield
        return
    held.add(place)
    try:
        # Now that nothing can come any more.
        check_unchanged(path)
        yield
    finally:
        held.discard(place)
        lock.release(clean=True)


@contextlib.contextmanager
def new_file(path: str | Path, *, mode: int | None = None) -> Iterator[Path]:
    """`anabranch.files.atomic_file`, but nothing takes the place of an index whose changes would be lost.

    Raises as `atomic_file`, and as `replacing` where an array file or a folder of changes is there.
    """
    with contextlib.ExitStack() as stack:
        if _may_have_changes(Path(path)):
            stack.enter_context(replacing(path))
        yield stack.enter_context(atomic_file(path, mode=mode))


def check_parts(folder: str | Path, names: Iterable[str], ours: str = "") -> None:
    """Before a folder takes the parts of a run, and is removed with them.

    Args:
        folder: where it lies.
        names: what it holds.
        ours: regular expression of the names that parts have. Default: none, for a run that begins.

    Raises DataError if it holds anything else; names that begin with a dot are what a write left that was broken off.
    """
    foreign = sorted(name for name in names if not name.startswith(".") and not re.fullmatch(ours, name))
    if foreign:
        raise DataError(
            f"{folder} holds {foreign[0]}, which would be lost: parts of a run go there, and it is removed with them; move it away, or "
            "name another place for the result"
        )


def _may_have_changes(path: Path) -> bool:
    if live_folder(path).is_dir():
        return True
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _make(folder: Path) -> None:
    """A folder that is still there after a loss of power: its name is in the folder around it, which is brought to the disk too."""
    if folder.is_dir():
        return
    # As its files: of its owner alone, whoever may read the index.
    folder.mkdir(0o700, exist_ok=True)
    handle = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise
    finally:
        os.close(handle)


class NoLocksError(DataError):
    """The file system has no locks."""


class FolderLock:
    """The right to write a folder, held by one process at a time; the system takes it back when that ends, however it does."""

    def __init__(self, folder: Path) -> None:
        """Take it. Raises DataError if another has it, NoLocksError where there are no locks, and as `explained`."""
        self._folder = folder
        self._handle: int | None = None
        for _ in range(TRIES):
            if self._take(folder / LOCK):
                return
        raise self._refusal()

    def _take(self, path: Path) -> bool:
        """Whether the file that was locked is still the one that others find: who held it may have removed it (`release`)."""
        with explained(path):
            try:
                _make(self._folder)
                self._handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
            except (FileNotFoundError, FileExistsError):
                # Who held it removed the folder just now.
                if self._folder.parent.is_dir():
                    return False
                raise
        try:
            if fcntl is not None:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise self._refusal() from None
        except OSError as error:
            self.release(clean=True)
            raise NoLocksError(
                f"{path} cannot be locked ({error.strerror}); an index takes changes on a file system with locks"
            ) from error
        try:
            if os.path.samestat(os.fstat(self._handle), os.stat(path)):
                return True
        except FileNotFoundError:
            pass
        self.release()
        return False

    def _refusal(self) -> DataError:
        return DataError(f"{self._folder} is written by another process; an index takes changes from one at a time")

    def release(self, *, clean: bool = False) -> None:
        """Give it back. With ``clean`` nothing is left of a folder that holds nothing else."""
        if self._handle is None:
            return
        # Windows keeps open files; then the folder stays, empty but for this.
        with contextlib.suppress(OSError):
            if clean and os.listdir(self._folder) == [LOCK]:
                (self._folder / LOCK).unlink()
                self._folder.rmdir()
        os.close(self._handle)
        self._handle = None
