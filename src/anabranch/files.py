"""Writing files so that none is ever half there: write beside, fsync, rename."""

import ctypes
import errno
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anabranch.errors import AnabranchError, CapacityError, DataError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


DATA_FOLDER = "ANABRANCH_DATA"  # the environment variable that names it


def data_folder() -> Path | None:
    """The folder of data that is not part of the package, which ``ANABRANCH_DATA`` names; None where that is not set."""
    folder = os.environ.get(DATA_FOLDER)
    return Path(folder).expanduser() if folder else None


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


def atomic_write(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it into place. Raises as `atomic_file`."""
    with atomic_file(path) as temporary:
        write(temporary)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, all or nothing. Raises as `atomic_write`."""
    atomic_write(path, lambda temporary: _write_text(temporary, text))


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, all or nothing. Raises as `atomic_write`."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Fill the yielded temporary folder; on a clean exit it takes the place of ``path``, otherwise it is removed.

    An existing ``path`` is exchanged for the new one in one step on Linux, so that a process killed at any moment leaves
    one of the two there; elsewhere it is moved aside for an instant. Raises as `atomic_file`.
    """
    path = Path(path).resolve()  # through a link, to where the data lies
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_dir():
            raise DataError(
                f"cannot write {path}: it is a file, and a folder is to take its place; choose another name"
            )
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield temporary
            for file in sorted(temporary.rglob("*")):
                _fsync(file)
            temporary.chmod(0o777 & ~_umask())
            if not path.exists():
                temporary.replace(path)
            elif not _exchange(temporary, path):
                _replace_folder(temporary, path)
            _fsync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # after an exchange: what was there before


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def _replace_folder(new: Path, path: Path) -> None:
    """Put ``new`` in the place of the folder ``path`` in two steps; put ``path`` back if the second fails."""
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    path.replace(aside)
    try:
        new.replace(path)
    except OSError:
        aside.replace(path)
        raise
    shutil.rmtree(aside)


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
