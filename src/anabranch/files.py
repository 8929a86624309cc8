"""Writing files so that none is ever half there: write beside, fsync, rename."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anabranch.errors import CapacityError, DataError


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Fill the yielded temporary file, which lies beside ``path``; on a clean exit it is renamed into place.

    Raises CapacityError if the disk is full and DataError if the place cannot be written; ``path`` then is as it was.
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

    An existing ``path`` is moved aside, replaced, then deleted. Raises as `atomic_write`.
    """
    path = Path(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield temporary
            for file in sorted(temporary.rglob("*")):
                _fsync(file)
            temporary.chmod(0o777 & ~_umask())
            if path.exists():
                aside = path.with_name(f".{path.name}.old-{os.getpid()}")
                path.replace(aside)
                temporary.replace(path)
                shutil.rmtree(aside)
            else:
                temporary.replace(path)
            _fsync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (28, 122):  # ENOSPC, EDQUOT
            raise CapacityError(f"no room left on disk to write {path}; free some or choose another --out") from error
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


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
