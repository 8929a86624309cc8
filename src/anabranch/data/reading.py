"""Text out of files of any kind: plain, gzip, zip; binary ones are skipped, bad bytes become U+FFFD. Endings may be in capitals."""

import codecs
import difflib
import gzip
import hashlib
import os
import zipfile
import zlib
from collections.abc import Container, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any, cast

from anabranch.errors import DataError, first_line
from anabranch.files import parse_json

# .dz: dictd's seekable gzip.
GZIP_SUFFIXES = (".gz", ".dz")
_PROBE_BYTES = 8192
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def missing_corpus(path: str | Path) -> DataError:
    """The error for a path that is not there."""
    return DataError(f"no corpus at {path}; name a file or folder of text")


def open_bytes(file: Path) -> IO[bytes]:
    """Open ``file`` for reading, through gzip where its suffix says so. Raises DataError if it cannot be opened."""
    try:
        return cast(IO[bytes], gzip.open(file)) if file.suffix.lower() in GZIP_SUFFIXES else file.open("rb")
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from None


def read_bytes(file: Path) -> bytes:
    """The content of ``file``, unpacked if it is gzip. Raises DataError if it cannot be read or is damaged."""
    try:
        with open_bytes(file) as stream:
            return stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {file}: {error}") from None


def decode_text(data: bytes, encoding: str = "utf-8") -> str | None:
    """``data`` as text with ``\\n`` line ends, or None if it is binary (a zero byte near its start and no UTF-16 mark)."""
    encoding = next((name for mark, name in _BOMS if data.startswith(mark)), encoding)
    if encoding != "utf-16" and b"\0" in data[:_PROBE_BYTES]:
        return None
    return data.decode(encoding, "replace").replace("\r\n", "\n")


def read_texts(file: Path, encoding: str = "utf-8") -> Iterator[tuple[str, str]]:
    """The texts in ``file`` as (name inside an archive or "", text): one, or one for each member of a zip file."""
    if file.suffix.lower() == ".zip":
        yield from _read_zip(file, encoding)
        return
    text = decode_text(read_bytes(file), encoding)
    if text:
        yield "", text


def _read_zip(file: Path, encoding: str) -> Iterator[tuple[str, str]]:
    try:
        with zipfile.ZipFile(file) as archive:
            for member in sorted(archive.namelist()):
                text = None if member.endswith("/") else decode_text(archive.read(member), encoding)
                if text:
                    yield member, text
    except DataError:
        raise
    except Exception as error:
        # Zipfile raises whatever the broken bytes lead it to.
        raise DataError(f"cannot read {file}: {error or type(error).__name__}") from None


def list_files(root: Path, pattern: str = "*", outside: Container[str] = ()) -> list[tuple[str, Path]]:
    """(path below ``root``, file) of the files at ``root``, sorted: itself, or those in it, at any depth, that match ``pattern``.

    Hidden files, caches, links to other files in ``root``, and folders named in ``outside`` are left out. Raises DataError if
    there is nothing at ``root``.
    """
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise missing_corpus(root)
    found = []
    for folder, below, names in os.walk(root):
        below[:] = [
            name for name in below if not name.startswith(".") and name != "__pycache__" and name not in outside
        ]
        prefix = os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        keys = [(prefix + name).removeprefix("./") for name in names if not name.startswith(".")]
        found += [key for key in keys if matches(key, pattern) and _is_of_its_own(root / key, root)]
    return [(key, root / key) for key in sorted(found)]


def _is_of_its_own(file: Path, root: Path) -> bool:
    """Whether this is a file, and no second name for one in ``root``, whose text would then train and validate at once."""
    return file.is_file() and not (file.is_symlink() and file.resolve().is_relative_to(root.resolve()))


def matches(key: str, pattern: str) -> bool:
    """Whether a path matches a shell pattern whose ``*`` also spans folders, so that ``**/*.py`` and ``*.py`` are one."""
    return fnmatch(key, pattern.removeprefix("**/"))


def is_table(file: Path) -> bool:
    """Whether the name says Parquet or JSON lines."""
    suffixes = [suffix for suffix in map(str.lower, file.suffixes) if suffix not in GZIP_SUFFIXES]
    return bool(suffixes) and suffixes[-1] in (".parquet", ".jsonl", ".ndjson")


def read_rows(file: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, values of ``columns``) of each row of a Parquet or JSON lines file. Raises DataError if it is neither, is damaged,
    or lacks a column.
    """
    yield from (_read_parquet if file.suffix.lower() == ".parquet" else _read_json_lines)(file, columns)


def _read_parquet(file: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            _check_columns(file, columns, table.schema_arrow.names)
            row = 0
            for batch in table.iter_batches(columns=columns):
                for values in batch.to_pylist():
                    row += 1
                    yield f"row {row}", values
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {first_line(error)}") from None


def _read_json_lines(file: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with open_bytes(file) as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    row = parse_json(line)
                except ValueError as error:
                    raise DataError(f"{file}, line {number} is not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise DataError(
                        f"{file}, line {number} is {line[:40].decode('utf-8', 'replace')!r}; it must be a JSON object"
                    )
                _check_columns(f"{file}, line {number}", columns, list(row))
                yield f"line {number}", row
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {file}: {error}") from None


def _check_columns(where: Path | str, columns: list[str], known: list[str]) -> None:
    for column in columns:
        if column not in known:
            near = difflib.get_close_matches(column, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(known)}"
            raise DataError(f"no column {column!r} in {where}; {hint}")


def stable_hash(text: str) -> int:
    """64 bits that depend on ``text`` alone: the same on every machine, in every process, for every Python."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def digest_file(file: Path) -> str:
    """Digest of the bytes of ``file``. Raises DataError if it cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from None
