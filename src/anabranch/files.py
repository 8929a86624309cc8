"""Writing files so that none is ever half there: write beside, fsync, rename. Where the cache lies. Locks between processes."""

import ctypes
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from anabranch.errors import AnabranchError, CapacityError, DataError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


DATA_FOLDER = "ANABRANCH_DATA"  # the environment variable that names it


def data_folder() -> Path | None:
    """The folder of data that is not part of the package, which ``ANABRANCH_DATA`` names; None where that is not set."""
    folder = os.environ.get(DATA_FOLDER)
    return expanded(folder) if folder else None


def data_file(name: str, source: str = "") -> Path:
    """The file ``name`` (such as ``graphs/ppi.labels.gz``) of `data_folder`.

    Args:
        name: its path in the folder.
        source: where it can be had, for the message.

    Raises DataError if the folder is not named or has no such file.
    """
    folder, where = data_folder(), f" ({source})" if source else ""
    if folder is None:
        raise DataError(f"set {DATA_FOLDER} to the folder that holds {name}{where}; it is not part of the package")
    path = folder / name
    if not path.is_file():
        raise DataError(f"there is no {path}; {DATA_FOLDER} must name the folder that holds {name}{where}")
    return path


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Fill the yielded temporary file, which lies beside ``path``; on a clean exit it is renamed into place.

    Raises CapacityError if the disk is full and DataError if the place cannot be written; ``path`` then is as it was.
    `torch.save` hides why it failed unless it is given an open file: ``with open(temporary, "wb") as file: ...``.
    """
    path = Path(path)
    with _explained(path):
        # Whoever may write in /dev would have /dev/null replaced by a file, for all programs of the machine.
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise DataError(f"cannot write {path}: it is a device or a pipe, not a file; choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            _fsync(temporary)
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
            _fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal. Raises OSError if it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(text: str | bytes) -> Any:
    """The value that JSON ``text`` spells. Raises ValueError alone, whatever is wrong: also for brackets without end."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_toml(text: str) -> dict[str, Any]:
    """The table that TOML ``text`` spells. Raises ValueError alone, whatever is wrong: also for brackets without end."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def atomic_write(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it into place. Raises as `atomic_file`."""
    with atomic_file(path) as temporary:
        write(temporary)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, all or nothing. Raises as `atomic_write`."""
    atomic_write(path, lambda temporary: _write_text(temporary, text))


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, all or nothing. Raises as `atomic_write`."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        text = json.dumps(
            value, indent=2
        )  # half a character (a file name that is no UTF-8): JSON can escape it, UTF-8 cannot
    atomic_write_text(path, text + "\n")


@contextmanager
def atomic_folder(path: str | Path, *, replacing: str = "") -> Iterator[Path]:
    """Fill the yielded temporary folder; on a clean exit it takes the place of ``path``, otherwise it is removed.

    An existing ``path`` is exchanged for the new one in one step on Linux, so that a process killed at any moment leaves
    one of the two there; elsewhere it is moved aside for an instant.

    Args:
        path: the place.
        replacing: a regular expression of the names that an existing folder may hold, since all of it is lost. Default: none, so that
            only an empty folder is replaced.

    Raises as `atomic_file`, and DataError if an existing folder holds anything else.
    """
    path = Path(path).resolve()  # through a link, to where the data lies
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_dir():
            raise DataError(
                f"cannot write {path}: it is a file, and a folder is to take its place; choose another name"
            )
        check_holds_only(path, replacing)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield temporary
            check_holds_only(path, replacing)
            for file in sorted(temporary.rglob("*")):
                # Opening a named pipe would wait for its other end, and a link may lead nowhere.
                if not file.is_symlink() and (file.is_file() or file.is_dir()):
                    _fsync(file)
            temporary.chmod(stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o777 & ~_umask())
            put = _swap if path.exists() else Path.replace
            put(temporary, path)
            try:
                _fsync(path.parent)
            except BaseException:
                put(*((temporary, path) if put is _swap else (path, temporary)))
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # after a swap: what was there before


def check_holds_only(folder: Path, replacing: str) -> None:
    """Raise DataError if ``folder`` holds a name that does not match the regular expression ``replacing``; see `atomic_folder`."""
    if not folder.is_dir():
        return
    foreign = sorted(name for name in os.listdir(folder) if not re.fullmatch(replacing, name, re.DOTALL))
    if foreign:
        raise DataError(f"{folder} holds {foreign[0]}, which would be lost if it were replaced; choose a new folder")


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def _swap(first: Path, second: Path) -> None:
    """Swap two folders, in one step where that is possible; both are as they were if it fails."""
    if _exchange(first, second):
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{second.name}.", dir=second.parent))
    moves = [(second, aside), (first, second), (aside, first)]
    for number, (place, new) in enumerate(moves):
        try:
            place.replace(new)
        except BaseException:
            for done, was in reversed(moves[:number]):
                was.replace(done)
            if number == 0:
                aside.rmdir()
            raise


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except AnabranchError:
        raise
    except Exception as error:
        if is_full(error):
            raise CapacityError(f"no room left on disk to write {path}; free some or choose another place") from error
        if not isinstance(error, OSError):
            raise
        culprit = str(error.filename or "")
        where = f" ({culprit})" if culprit and culprit != str(path) and f".{path.name}." not in culprit else ""
        raise DataError(f"cannot write {path}: {error.strerror or error}{where}") from error


@contextmanager
def locked(path: str | Path) -> Iterator[bool]:
    """Hold the lock file ``path`` (hidden, named ``.NAME.lock``) meanwhile; yields False, at once, if another process has it.

    The system frees the lock when a process dies, however it dies; what is left of the file then means nothing. The folder must be
    there. Where there are no locks (Windows, some network file systems) everybody gets it. Raises DataError if the file cannot be made.
    """
    handle = None if fcntl is None else _lock(Path(path))
    if fcntl is None or handle is not None:
        try:
            yield True
        finally:
            if handle is not None:
                # While it is still held: whoever opened the file before sees that it is no longer there, and makes another.
                Path(path).unlink(missing_ok=True)
                os.close(handle)
    else:
        yield False


def is_locked(path: str | Path) -> bool:
    """Whether a process holds the lock file ``path`` now."""
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _try_lock(handle, shared=True)
    finally:
        os.close(handle)


def _lock(path: Path) -> int | None:
    """An open handle of the lock file with its lock, or None if another process has it."""
    while True:
        with _explained(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _try_lock(handle):
                os.close(handle)
                return None
            # The holder before may have removed the file after we opened it: a lock on what nobody else can find is none.
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _try_lock(handle: int, *, shared: bool = False) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
    return True


def is_full(error: BaseException | None) -> bool:
    """Whether ``error``, or what it came from, is a full disk. safetensors only quotes the system's error."""
    while error is not None:
        quoted = re.search(r"\(os error (\d+)\)", str(error))
        if getattr(error, "errno", None) in _FULL or (quoted and int(quoted[1]) in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def cache_folder() -> Path:
    """Where what can be made again is kept: tokenised corpora, compiled kernels, embedded texts. It may be deleted.

    The first of `cache_places`, which a folder that the user names always is. Where there is no home directory, or it cannot
    be written: a folder of this user alone among the system's temporary files, which the log says once. Raises DataError
    where even that cannot be had.
    """
    places = cache_places()
    if places and (os.environ.get("ANABRANCH_CACHE") or can_write(places[0])):
        return places[0]
    try:
        return _private_folder(tempfile.gettempdir())
    except OSError as error:
        raise DataError(
            f"no folder can be written for the cache: {error.strerror or error}; set ANABRANCH_CACHE to a folder of yours"
        ) from None


def cache_places() -> tuple[Path, ...]:
    """The folder of the cache by its rule, whether or not it can be written; empty where there is no home directory.

    ``$ANABRANCH_CACHE`` if that is set, else ``$XDG_CACHE_HOME/anabranch``, else ``~/.cache/anabranch``.
    """
    named = os.environ.get("ANABRANCH_CACHE")
    if named:
        return (expanded(named),)
    # A relative folder of caches is void by its specification, and a relative home would be another one in every folder.
    shared = Path(os.environ.get("XDG_CACHE_HOME") or "")
    if shared.is_absolute():
        return (shared / "anabranch",)
    try:
        home = Path.home()
    except RuntimeError:  # a user whom the system does not know, as in many containers
        return ()
    return (home / ".cache" / "anabranch",) if home.is_absolute() else ()


def expanded(path: str | Path) -> Path:
    """``path`` with ``~`` replaced by the home directory it stands for. Raises DataError if nobody knows that."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise DataError(f"{path} begins with a home directory that is not known here; write the whole path") from None


def can_write(folder: Path) -> bool:
    """Whether files can be put into ``folder``, which is made first if it is absent."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


@cache
def _private_folder(temporary: str) -> Path:
    """A folder in ``temporary`` that this user alone can write: libraries that are loaded lie there."""
    user = os.geteuid()
    folder = Path(temporary) / f"anabranch-{user}"
    with suppress(FileExistsError):  # whatever it is; what it must be is asked next
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o022:
        folder = Path(tempfile.mkdtemp(prefix=f"anabranch-{user}-", dir=temporary))
    log.warning(
        "no home directory that can be written; what is cached goes to %s (or where ANABRANCH_CACHE says)", folder
    )
    return folder
