"""Files wherever Spark finds them: Hadoop's file systems, asked through the driver's JVM."""

import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anabranch.errors import DataError, InputError

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:/")

# The last line of a Python worker's traceback.
_RAISED = re.compile(r"^(?:[\w.]+\.)?\w+(?:Error|Exception): (.+)$", re.MULTILINE)


def is_uri(path: Any) -> bool:
    """Whether this text names a file system, as in ``s3a://bucket/edges``."""
    return isinstance(path, str) and _SCHEME.match(path) is not None


def as_text(path: str | Path) -> str:
    """How Spark is told of a path. Text is as it is: a name without a scheme lies on Spark's default file system.

    Raises InputError for a URI that went through `pathlib`, which takes a slash out of it.
    """
    if isinstance(path, str):
        return path
    if _SCHEME.match(str(path)):
        raise InputError(f"{path} is a URI made a Path, which takes a slash out of it; give it as text")
    return f"file://{path.resolve()}"


class Files:
    """The file systems of a session. Paths are texts as `qualified` gives them; every error is a DataError that names the path."""

    def __init__(self, spark: Any) -> None:
        self._jvm = spark.sparkContext._jvm
        self._conf = spark.sparkContext._jsc.hadoopConfiguration()

    def _at(self, path: str) -> tuple[Any, Any]:
        found = self._jvm.org.apache.hadoop.fs.Path(path)
        return found.getFileSystem(self._conf), found

    def qualified(self, path: str | Path) -> str:
        """The path with its file system, and without an ending slash."""
        text = as_text(path)
        if not text.strip():
            raise InputError("the path is empty; name a folder")
        with _explained(text):
            system, found = self._at(text)
            return str(system.makeQualified(found).toString())

    def exists(self, path: str) -> bool:
        """Whether there is a file or folder."""
        with _explained(path):
            system, found = self._at(path)
            return bool(system.exists(found))

    def is_file(self, path: str) -> bool:
        """Whether there is a file."""
        with _explained(path):
            system, found = self._at(path)
            return bool(system.exists(found)) and bool(system.getFileStatus(found).isFile())

    def names(self, folder: str) -> list[str]:
        """What a folder holds; nothing where there is none."""
        with _explained(folder):
            system, found = self._at(folder)
            if not system.exists(found):
                return []
            return sorted(str(status.getPath().getName()) for status in system.listStatus(found))

    def read_text(self, path: str) -> str:
        """The text of a small file."""
        with _explained(path):
            system, found = self._at(path)
            stream = system.open(found)
            try:
                return str(self._jvm.org.apache.commons.io.IOUtils.toString(stream, "UTF-8"))
            finally:
                stream.close()

    def write_text(self, path: str, text: str) -> None:
        """Write a small file: beside its place, then renamed over it."""
        beside = f"{path}.new"
        with _explained(path):
            system, found = self._at(beside)
            stream = system.create(found, True)
            try:
                stream.write(bytearray(text.encode()))
            finally:
                stream.close()
        self.remove(path)
        self.move(beside, path)

    def move(self, path: str, to: str) -> None:
        """Rename a file or folder. Raises DataError where something is there already."""
        with _explained(to):
            system, found = self._at(path)
            place = self._jvm.org.apache.hadoop.fs.Path(to)
            # A rename onto a folder would move into it.
            if system.exists(place) or not system.rename(found, place):
                raise DataError(f"cannot move {path} to {to}: something is there, or it may not be written")

    def make_folder(self, path: str) -> None:
        """Make a folder and those above it. Raises DataError where that may not be."""
        with _explained(path):
            system, found = self._at(path)
            # Hadoop tells so without saying why.
            if not system.mkdirs(found):
                raise DataError(f"cannot make the folder {path}: nothing may be written there")

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all that it holds, where it is there."""
        with _explained(path):
            system, found = self._at(path)
            system.delete(found, True)

    def stamp(self, path: str) -> dict[str, int]:
        """What tells the files under a path apart from others: their number, bytes, and a checksum of names, sizes and times."""
        with _explained(path):
            system, found = self._at(path)
            files = system.listFiles(found, True)
            seen = []
            while files.hasNext():
                status = files.next()
                name = str(status.getPath().getName())
                if not name.startswith((".", "_")):
                    seen.append((name, int(status.getLen()), int(status.getModificationTime())))
        return {
            "files": len(seen),
            "bytes": sum(size for _, size, _ in seen),
            "crc": zlib.crc32(repr(sorted(seen)).encode()),
        }


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """What Java throws as a DataError of one line."""
    from py4j.protocol import Py4JError

    try:
        yield
    except Py4JError as error:
        raise DataError(f"{path}: {first_line(error)}") from error


# How Spark begins and ends what it says: "[PATH_NOT_FOUND] Path does not exist: file:/e. SQLSTATE: 42K03".
_CODES = re.compile(r"^\[[A-Z_.]+\] | SQLSTATE: \w+$")


def why_unread(error: BaseException) -> str:
    """Why Parquet cannot be read, of what Spark says."""
    said = first_line(error)
    if "UNABLE_TO_INFER_SCHEMA" in said:
        return "it holds no Parquet files"
    return _CODES.sub("", said)


def first_line(error: BaseException) -> str:
    """What a failed call of Spark says, without Java's stack; of a worker that raised, what it raised."""
    java = getattr(error, "java_exception", None)
    text = str(java.getMessage() if java is not None and java.getMessage() else error).strip()
    raised = _RAISED.findall(text)
    if raised:
        return raised[-1].strip()
    return text.splitlines()[0] if text else type(error).__name__
