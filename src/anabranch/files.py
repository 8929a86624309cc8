"""Writing files so that none is ever half there: write beside, fsync, rename. Reading JSON, TOML and digests without surprises."""

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from anabranch.errors import AnabranchError, CapacityError, CheckpointError, DataError, InputError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h

_UNFINISHED = "unfinished-"  # in the names of files and folders that are to take the place of others
_LONGEST = 255 - len("." + "." + _UNFINISHED) - 8  # bytes of a name that may have it, in most file systems
# What SQLite keeps beside a database while it is in use, and reads again after a program was killed.
SQLITE_LOGS = ("-wal", "-shm", "-journal")

MOST_NESTED = 100  # lists and tables in each other, in a config


def check_apart(written: Iterable[str | Path | None], read: Iterable[str | Path | None]) -> None:
    """Before the work: that nothing which is read is lost to what is written, and nothing is written twice. None stands for neither.

    Args:
        written: files and folders that are to be made; who writes some files into a folder names these.
        read: files, folders with all that is in them, and names that are no paths. SQLite's logs beside a database are read with it.

    Raises InputError if one to be written is one that is read, by whatever name, lies in one, or is a folder around one; and for two
    outputs in one place. Whether an output is there already makes no difference, so that a command that works once works again.
    """
    outputs = [Path(path) for path in written if path is not None]
    sources = [Path(path) for path in read if path is not None]
    for number, out in enumerate(outputs):
        for source in sources:
            logs = [Path(f"{source}{ending}") for ending in SQLITE_LOGS if source.is_file()]
            if is_within(out, source) or any(_is_same(out, log) or _real(out) == _real(log) for log in logs):
                where = "" if _is_same(out, source) else f" with {source}"
                raise InputError(f"{out} is read{where}, and would be lost if it were written; name another file")
            if out.is_dir() and os.path.lexists(source) and is_within(source, out):
                raise InputError(f"{source}, which is read, would be lost if {out} were written; name another folder")
        if any(_real(out) == _real(other) for other in outputs[:number]):
            raise InputError(f"{out} is to be written twice; name another file for one of the two")


def is_within(inner: Path, outer: Path) -> bool:
    """Whether ``inner`` is ``outer`` or lies in it. Compares what is there, not names: links and mounts have several."""
    place = _real(inner)
    return any(_is_same(parent, outer) for parent in (place, *place.parents))


def _is_same(first: Path, second: Path) -> bool:
    try:
        return first.samefile(second)
    except (OSError, ValueError):
        return False


def _real(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):
        return path


@contextmanager
def atomic_file(path: str | Path, *, mode: int | None = None, clears: bool = False) -> Iterator[Path]:
    """Fill the yielded temporary file, which lies beside ``path``; on a clean exit it is renamed into place.

    Args:
        path: the place. A file there is replaced.
        mode: who may read and write the file at most, such as 0o600, or the mode of the secret that it is a copy of. Beyond that it is
            as the file that is replaced, or as the user's umask has it. Until it is whole the file is its owner's alone.
        clears: remove what killed processes left that were writing the same file with ``clears``: files of a name that nothing else
            gives, and that no process holds. Not for a name that leaves no room for it.

    Raises CapacityError if the disk is full and DataError if the place cannot be written; ``path`` then is as it was.
    `torch.save` hides why it failed unless it is given an open file: ``with open(temporary, "wb") as file: ...``.
    """
    path = Path(path)
    with explained(path):
        # Whoever may write in /dev would have /dev/null replaced by a file, for all programs of the machine.
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise DataError(f"cannot write {path}: it is a device or a pipe, not a file; choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        clears = clears and fcntl is not None and len(os.fsencode(path.name)) <= _LONGEST
        if clears:
            _remove_leftovers(path, are_folders=False)
        temporary, held = _unfinished_file(path) if clears else _temporary_file(path)
        try:
            yield temporary
            _fsync(temporary)
            temporary.chmod(_mode_of(path) & (0o777 if mode is None else mode))
            temporary.replace(path)
            _fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
            if held is not None:
                os.close(held)


def _temporary_file(path: Path) -> tuple[Path, None]:
    """A new file beside a place, which nothing tells from others."""
    # Of a name that leaves no room for more, the beginning.
    name = path.name if len(os.fsencode(path.name)) <= _LONGEST else path.name[:50]
    handle, name = tempfile.mkstemp(prefix=f".{name}.", dir=path.parent)
    os.close(handle)
    return Path(name), None


def _unfinished_file(path: Path) -> tuple[Path, int]:
    """A new file in which another ``path`` is written, and a handle whose lock says so to whoever removes leftovers."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.{_UNFINISHED}", dir=path.parent)
        with suppress(OSError):  # a file system without locks, where nothing is removed
            fcntl.flock(handle, fcntl.LOCK_SH)
        # It may have been taken for a leftover before it was held.
        if os.path.lexists(name):
            return Path(name), handle
        os.close(handle)


def mode_of(path: str | Path) -> int:
    """Who may read and write a file, as bits: the ``mode`` of `atomic_file` for a copy of it."""
    return stat.S_IMODE(Path(path).stat().st_mode)


def _mode_of(path: Path) -> int:
    """Of the file that lies there, or of a new one."""
    return mode_of(path) & 0o777 if path.is_file() else 0o666 & ~_umask()


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


def read_json(path: Path, error: type[AnabranchError] = CheckpointError) -> dict[str, Any]:
    """The table in ``path``, which may begin with a byte order mark. Raises ``error`` if it cannot be read or is no table."""
    try:
        table = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as found:
        raise error(f"cannot read {path}: {found}") from None
    if not isinstance(table, dict):
        raise error(f"cannot read {path}: it holds a {type(table).__name__}; it must be a table of settings")
    return table


def parse_toml(text: str) -> dict[str, Any]:
    """The table that TOML ``text`` spells: every config is read by it.

    Raises ValueError alone, whatever is wrong: also for brackets without end, and for values that lie deeper than `MOST_NESTED`, which
    the names of a table (``a.a.a...``) reach without any bracket.
    """
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_nesting(table)
    return table


def check_nesting(value: Any) -> None:
    """Raises ValueError if lists and tables lie deeper in each other than `MOST_NESTED`: whoever walks over them recurses."""
    level = [value]
    for _ in range(MOST_NESTED + 1):
        level = [
            part
            for whole in level
            if isinstance(whole, dict | list)
            for part in (whole.values() if isinstance(whole, dict) else whole)
        ]
        if not level:
            return
    raise ValueError(f"it is nested too deeply: more than {MOST_NESTED} lists and tables in each other")


def check_writable(path: str | Path) -> None:
    """Raise as `atomic_file` where a file cannot be written at ``path``, before the work is done whose result it is to be."""
    with suppress(_NothingError), atomic_file(path):
        if Path(path).is_dir():
            raise DataError(f"cannot write {path}: it is a folder; choose another name")
        raise _NothingError


class _NothingError(Exception):
    """Nothing is to be written after all."""


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
def atomic_folder(
    path: str | Path, *, replacing: str = "", check_old: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """Fill the yielded temporary folder; on a clean exit it takes the place of ``path``, otherwise it is removed.

    An existing ``path`` is exchanged for the new one in one step on Linux, so that a process killed at any moment leaves
    one of the two there; elsewhere it is moved aside for an instant. What a killed process left beside ``path`` is removed.

    Args:
        path: the place.
        replacing: a regular expression of the names that an existing folder may hold, since all of it is lost. Default: none, so that
            only an empty folder is replaced.
        check_old: asked with what was in the place, once nothing can be added to it under its name. What it raises puts it back there.

    Raises as `atomic_file`, and DataError if an existing folder holds anything else, or is or holds the working directory.
    """
    path = Path(path).resolve()  # through a link, to where the data lies
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_no_file(path)
        check_not_here(path)
        check_holds_only(path, replacing)
        _remove_leftovers(path)
        temporary, handle = _unfinished(path)
        held = [handle]
        try:
            yield temporary
            check_holds_only(path, replacing)
            for file in sorted(temporary.rglob("*")):
                # Opening a named pipe would wait for its other end, and a link may lead nowhere.
                if not file.is_symlink() and (file.is_file() or file.is_dir()):
                    _fsync(file)
            temporary.chmod(stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o777 & ~_umask())
            is_there = path.exists()
            if is_there:
                held.append(_held(path))
            put = _swap if is_there else Path.replace
            put(temporary, path)
            try:
                if is_there:
                    # What appeared since the last look, or is still being written, would be lost with the rest.
                    check_holds_only(temporary, replacing, name=path)
                    if check_old is not None:
                        check_old(temporary)
                _fsync(path.parent)
            except BaseException:
                put(*((temporary, path) if is_there else (path, temporary)))
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # after a swap: what was there before
            for handle in held:
                if handle is not None:
                    os.close(handle)


def _unfinished(path: Path) -> tuple[Path, int | None]:
    """A new folder in which another ``path`` is made, and a handle that holds it, see `_held`."""
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.{_UNFINISHED}", dir=path.parent))
        # Whoever removes leftovers may take it for one before it is held.
        with suppress(FileNotFoundError):
            handle = _held(temporary)
            if temporary.exists():
                return temporary, handle
            if handle is not None:
                os.close(handle)


def _held(folder: Path) -> int | None:
    """A handle on a folder that is being filled or emptied, whose lock says so to others; None where there are no such locks."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_SH)
    return handle


def _remove_leftovers(path: Path, *, are_folders: bool = True) -> None:
    """Remove the folders, or files, in which killed processes were making another ``path``, or were removing an old one."""
    if fcntl is None:
        return
    pattern = re.compile(re.escape(f".{path.name}.{_UNFINISHED}") + "[a-z0-9_]{8}")
    # A pipe would wait for its other end.
    kind = os.O_DIRECTORY if are_folders else os.O_NONBLOCK
    for name in filter(pattern.fullmatch, os.listdir(path.parent)):
        with suppress(OSError):  # one at work holds it, or another was quicker to remove it
            handle = os.open(path.parent / name, os.O_RDONLY | os.O_NOFOLLOW | kind)
            try:
                if not are_folders and not stat.S_ISREG(os.fstat(handle).st_mode):
                    continue
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if are_folders:
                    shutil.rmtree(path.parent / name, ignore_errors=True)
                else:
                    (path.parent / name).unlink()
            finally:
                os.close(handle)


def check_no_file(folder: str | Path, *, advice: str = "choose another name") -> None:
    """Raise DataError, with ``advice``, if ``folder`` is there and no folder: see `atomic_folder`."""
    if Path(folder).exists() and not Path(folder).is_dir():
        raise DataError(f"cannot write {folder}: it is a file, and a folder is to take its place; {advice}")


def check_not_here(folder: str | Path) -> None:
    """Raise DataError if ``folder`` is or holds the working directory, which nothing can take the place of: see `atomic_folder`.

    A process, and the shell that started it, would stand in a folder that is gone.
    """
    try:
        here = Path.cwd()
    except FileNotFoundError:
        return
    if Path(folder).resolve() in (here, *here.parents):
        raise DataError(
            f"cannot write {folder}: it is, or holds, the working directory, and a new folder is to take its place; "
            "choose a new folder, or go elsewhere first"
        )


def check_holds_only(
    folder: Path, replacing: str, *, name: Path | None = None, advice: str = "choose a new folder"
) -> None:
    """Raise DataError if ``folder`` holds a name that does not match the regular expression ``replacing``; see `atomic_folder`.

    ``name`` is what the error calls the folder (default: its path), ``advice`` what it says to do.
    """
    if not folder.is_dir():
        return
    foreign = sorted(name for name in os.listdir(folder) if not re.fullmatch(replacing, name, re.DOTALL))
    if foreign:
        raise DataError(f"{name or folder} holds {foreign[0]}, which would be lost if it were replaced; {advice}")


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
def explained(path: Path) -> Iterator[None]:
    """Tell what went wrong in writing ``path``: raises CapacityError for a full disk, DataError for any other error of the system."""
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
