"""What lies beside a file of ours, and whether another file may take its place.

Beside an index of vectors may lie a folder with the changes that a server took of it (`anabranch.graph.live`). They are changes of that
very file: put another one in its place, and they are lost. So all that writes a file by name in this package does it by `new_file`. A run
that is long keeps its parts in a folder beside its result, which is removed in the end: `check_parts` says whether it may be, and
`holding_parts` gives it to one run at a time.
"""

import contextlib
import errno
import io
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from weakref import WeakValueDictionary

from anabranch.errors import DataError, InputError
from anabranch.files import atomic_file, explained
from anabranch.graph.arguments import as_path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

# Of array files (`anabranch.graph.array_file`): changes can be taken of no others.
MAGIC = b"ANABARR1"
LOCK = "lock"
# Of a run that keeps its parts in a folder.
MANIFEST = "manifest.json"
_MANIFEST = r"manifest\.json"
# Bytes of a name beside which there is room for that of `live_folder`, in most file systems.
_LONGEST = 255 - len(".live")
# To take a lock whose file others make and remove.
TRIES = 5

# Folders that this thread holds by `replacing`.
_held = threading.local()


def live_folder(path: str | Path) -> Path:
    """Where the changes of the index at ``path`` lie: of a link, beside the file that it leads to, which has a name of its own."""
    return Path(f"{os.path.realpath(path) if os.path.islink(path) else path}.live")


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
    # With the lock goes what is said of it, also where an interrupt comes between the two.
    held: WeakValueDictionary[Path, FolderLock] = _held.__dict__.setdefault("folders", WeakValueDictionary())
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
    try:
        held[place] = lock
        # Now that nothing can come any more.
        check_unchanged(path)
        yield
    finally:
        held.pop(place, None)
        lock.release(clean=True)


@contextlib.contextmanager
def new_file(path: str | Path, *, mode: int | None = None) -> Iterator[Path]:
    """`anabranch.files.atomic_file`, but nothing takes the place of an index whose changes would be lost.

    What a write of the same file left that was killed is removed.

    Raises as `atomic_file`, and as `replacing` where an array file or a folder of changes is there.
    """
    path = as_path(path)
    if len(os.fsencode(path.name)) > _LONGEST:
        raise InputError(
            f"the name of {path.name:.40}... is too long: it may have {_LONGEST} bytes, since a folder may lie beside it"
        )
    with contextlib.ExitStack() as stack:
        if is_replacing := _may_have_changes(path):
            stack.enter_context(replacing(path))
        with atomic_file(path, mode=mode, clears=True) as temporary:
            yield temporary
            # Where nothing was when this began, an index may have come since, and taken changes. Held until the file is in place.
            if not is_replacing and _may_have_changes(path):
                stack.enter_context(replacing(path))


def foreign_parts(names: Iterable[str], ours: str = "") -> list[str]:
    """Those of the names in a folder of parts that are not of the run, rising.

    ``ours`` is as of `check_parts`. Of the run are also its manifest and lock, and what a write of its files left that was broken off.
    """
    own = rf"{ours}|{_MANIFEST}" if ours else _MANIFEST
    known = re.compile(
        rf"{ours}|{LOCK}|\.(?:{own})\.(?:unfinished-)?[a-z0-9_]{{8}}|\.?manifest\.json(?:\.new)?(?:\.crc)?"
    )
    return sorted(name for name in names if not known.fullmatch(name))


def check_parts(folder: str | Path, names: Iterable[str], ours: str = "") -> None:
    """Before a folder takes the parts of a run, and is removed with them.

    Args:
        folder: where it lies.
        names: what it holds.
        ours: regular expression of the names that parts have. Default: none, for a run that begins.

    Raises DataError if it holds anything else, see `foreign_parts`.
    """
    if foreign := foreign_parts(names, ours):
        raise DataError(
            f"{folder} holds {foreign[0]}, which would be lost: parts of a run go there, and it is removed with them; move it away, or "
            "name another place for the result"
        )


@contextlib.contextmanager
def holding_parts(folder: Path) -> Iterator[None]:
    """The folder of the parts of a run, made where there is none; no other run has it meanwhile. What is left of it is not removed here.

    Raises DataError for a link or a file in its place, and while another run has it.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise DataError(
            f"{folder} is {'a link' if folder.is_symlink() else 'a file'}; parts of a run go into a folder of that name, which is removed "
            "in the end; move it away, or name another place for the result"
        )
    with explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FolderLock(
            folder, "holds the parts of a run that is under way; wait for it, or name another place for the result"
        )
    except NoLocksError:
        # Without locks, two runs with one result are the caller's own care.
        yield
        return
    try:
        yield
    finally:
        lock.release(clean=True)


def remove_parts(folder: Path, names: Iterable[str]) -> None:
    """Remove the files or folders of these names, what broken-off writes of them left, and the folder if it then holds nothing.

    Whatever else came into it stays, and the folder with it. Raises DataError as `explained`.
    """
    wanted = {*names, LOCK, MANIFEST}
    with explained(folder):
        for name in os.listdir(folder):
            # As `tempfile` calls the file that `atomic_file` makes.
            left = re.fullmatch(r"\.(.+?)\.(?:unfinished-)?[a-z0-9_]{8}", name)
            place = folder / name
            if name in wanted and place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            elif name in wanted or (left is not None and left[1] in wanted and _is_broken_off(place)):
                place.unlink()
        with contextlib.suppress(OSError):
            folder.rmdir()


def _is_broken_off(path: Path) -> bool:
    """Whether a file begins as one that was being written here: an array file, JSON, or nothing yet."""
    if path.is_symlink() or not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(len(MAGIC))
    return head == MAGIC or head.startswith(b"{") or not head.strip(b"\0")


def _may_have_changes(path: Path) -> bool:
    # Beside a name of the full length nothing can lie, and looking there is an error.
    if os.path.isdir(live_folder(path)):
        return True
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _make(folder: Path) -> bool:
    """A folder that is still there after a loss of power: its name is in the folder around it, which is brought to the disk too.

    Gives whether it was not there before.
    """
    if folder.is_dir():
        return False
    try:
        # As its files: of its owner alone, whoever may read the index.
        folder.mkdir(0o700)
    except FileExistsError:
        if folder.is_dir():
            return False
        raise
    handle = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise
    finally:
        os.close(handle)
    return True


class NoLocksError(DataError):
    """The file system has no locks."""


class FolderLock:
    """The right to write a folder, held by one process at a time; the system takes it back when that ends, however it does."""

    def __init__(
        self, folder: Path, taken: str = "is written by another process; an index takes changes from one at a time"
    ) -> None:
        """Take it.

        Raises DataError with what ``taken`` says if another has it, NoLocksError where there are no locks, and as `explained`.
        """
        self._folder, self._taken = folder, taken
        self._made_folder = self._made_lock = False
        # A file and no number: what an interrupt leaves of it is closed, and never twice.
        self._file: io.FileIO | None = None
        self._process = os.getpid()
        for _ in range(TRIES):
            if self._take(folder / LOCK):
                return
        raise self._refusal()

    def __del__(self) -> None:
        """An interrupt may have come before anybody could give it back: then nobody but this process's end would."""
        if getattr(self, "_file", None) is not None:
            self._close()

    def _close(self) -> None:
        # A process that was forked meanwhile has the same open file: there it does not end with this one's, and is not its to give back.
        if fcntl is not None and self._process == os.getpid():
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)  # type: ignore[arg-type]
        self._file.close()  # type: ignore[union-attr]

    def _take(self, path: Path) -> bool:
        """Whether the file that was locked is still the one that others find: who held it may have removed it (`release`)."""
        with explained(path):
            try:
                self._made_folder |= _make(self._folder)
                flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
                try:
                    self._file = io.FileIO(os.open(path, flags | os.O_EXCL, 0o600), "r+")
                    self._made_lock = True
                except FileExistsError:
                    self._file = io.FileIO(os.open(path, flags, 0o600), "r+")
                    self._made_lock = False
            except (FileNotFoundError, FileExistsError):
                # Who held it removed the folder just now.
                if self._folder.parent.is_dir():
                    return False
                raise
        try:
            if fcntl is not None:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise self._refusal() from None
        except OSError as error:
            self.release(clean=True)
            raise NoLocksError(
                f"{path} cannot be locked ({error.strerror}); an index takes changes on a file system with locks"
            ) from error
        try:
            if os.path.samestat(os.fstat(self._file.fileno()), os.stat(path)):
                return True
        except FileNotFoundError:
            pass
        self.release()
        return False

    def _refusal(self) -> DataError:
        return DataError(f"{self._folder} {self._taken}")

    def release(self, *, clean: bool = False) -> None:
        """Give it back.

        With ``clean`` what was made here goes: the lock, and the folder if it holds nothing else. So does what a crash left of another
        lock, a folder with an empty file in it. A folder that a user made stays.
        """
        if self._file is None:
            return
        # Windows keeps open files; then the folder stays, empty but for this.
        with contextlib.suppress(OSError):
            if clean:
                is_alone = os.listdir(self._folder) == [LOCK]
                is_left = is_alone and not self._made_lock and os.fstat(self._file.fileno()).st_size == 0
                if self._made_lock or is_left:
                    (self._folder / LOCK).unlink()
                if is_alone and (self._made_folder or is_left):
                    self._folder.rmdir()
        self._close()
        self._file = None
