"""Where files lie: the cache, the folder of data that is not part of the package, and home directories."""

import errno
import logging
import os
import stat
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from anabranch.errors import DataError

__all__ = [
    "DATA_FOLDER",
    "cache_folder",
    "cache_places",
    "can_write",
    "check_database_file",
    "data_file",
    "data_folder",
    "expanded",
    "make_cache",
]

log = logging.getLogger(__name__)

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


def make_cache(folder: Path) -> None:
    """Make ``folder``, a part of the cache. Raises DataError, which says what to set, if nothing can be written there."""
    reason = os.strerror(errno.EACCES)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if can_write(folder):
            return
    except OSError as error:
        reason = error.strerror or str(error)
    raise DataError(f"cannot write the cache {folder}: {reason}; set ANABRANCH_CACHE to a folder of yours")


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


def check_database_file(path: str | Path) -> None:
    """Raises DataError for a name by which SQLite knows a database that outlives no process, or a URI.

    Taken as a path, each would be a file of an odd name, or forgotten at the end by whoever opens it as SQLite does.
    """
    name = str(path)
    if Path(name).name == ":memory:":
        raise DataError(f"{name!r} is no file: what is in SQLite's memory ends with the process; name a file")
    if name.startswith("file:"):
        raise DataError(f"{name!r} is a URI of SQLite, which is not read here; name a path")
