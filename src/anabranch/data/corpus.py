"""Corpora: named, labelled documents that split themselves into training and validation.

Kinds: ``stdlib`` (the default: Python's own library, real text on every machine), ``files`` (any files and folders),
``table`` (Parquet and JSON lines), ``named`` (well-known texts where they are installed; see `anabranch.data.named`),
``mixture`` (weighted domains, each any other corpus).
"""

import codecs
import glob
import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, configclass, to_dict
from anabranch.data.reading import (
    digest_file,
    is_table,
    list_files,
    matches,
    read_rows,
    read_texts,
    stable_hash,
)
from anabranch.errors import DataError
from anabranch.places import expanded


@dataclass(frozen=True, slots=True)
class Document:
    """One text. ``key`` names it for ever (its path in the corpus): the split hangs on it. ``label`` is its domain."""

    key: str
    text: str
    label: str


class Corpus(Part, family="corpus"):
    """A source of documents."""

    @configclass
    class Config(BaseConfig):
        """What all kinds share."""

        max_bytes: int | None = Field(default=None, ge=1)  # stop after this much text (UTF-8); None takes all

    def __init__(self, config: Any) -> None:
        self.config = config

    def documents(self) -> Iterator[Document]:
        """The documents, in an order that is always the same, none of them empty, no more than ``max_bytes``.

        Raises DataError if a source is missing, unreadable or malformed, or if there is no text at all.
        """
        left, found = self.config.max_bytes, False
        for document in self._read():
            if left is not None:
                document = Document(document.key, _cut_to_bytes(document.text, left), document.label)
                left -= len(document.text.encode("utf-8"))
            if document.text:
                found = True
                yield document
            if left is not None and left <= 0:
                break
        if not found:
            raise DataError(f"no text in {self.describe()}")

    def fingerprint(self) -> str:
        """Digest of the configuration and of the bytes of all sources: it changes whenever a document may have changed."""
        parts = [json.dumps(to_dict(self.config), sort_keys=True), type(self).__qualname__]
        parts += [f"{file.resolve()} {digest_file(file)}" for file in self.sources()]
        return f"{stable_hash(chr(10).join(parts)):016x}"

    def sources(self) -> list[Path]:
        """The files that the documents come from. Raises DataError if one is missing."""
        raise NotImplementedError

    def describe(self) -> str:
        """A few words for messages: what and where."""
        raise NotImplementedError

    def _read(self) -> Iterator[Document]:
        raise NotImplementedError

    def _in_order(self, keyed: Iterable[tuple[str, Path]]) -> list[tuple[str, Path]]:
        """Sorted by key; by the hash of the key where only some will be taken, so that they are a fair sample."""
        order = stable_hash if self.config.max_bytes is not None else str
        return sorted(keyed, key=lambda item: (order(item[0]), item[0]))


class Stdlib(Corpus, kind="stdlib"):
    """The source of Python's standard library and, where installed, its documentation.

    Source: ``sysconfig.get_paths()["stdlib"]``, ``**/*.py`` (about 10 MB) labelled ``code``, and Debian's ``python3.X-doc``
    (``**/*.rst.txt``, about 11 MB) labelled ``docs``. Licence: PSF-2.0. What is there depends on the Python that runs.
    """

    @configclass
    class Config(Corpus.Config):
        """Which parts of it."""

        include_tests: bool = False  # some installations carry 20 MB of tests
        include_docs: bool = True

    def sources(self) -> list[Path]:
        """See `Corpus`."""
        return [file for _, file, _ in self.files()]

    def describe(self) -> str:
        """See `Corpus`."""
        return f"the standard library at {sysconfig.get_paths()['stdlib']}"

    def files(self) -> list[tuple[str, Path, str]]:
        """(key, file, label) of each."""
        root = Path(sysconfig.get_paths()["stdlib"])
        outside = {"site-packages", "dist-packages"} | (
            set() if self.config.include_tests else {"test", "tests", "idle_test"}
        )
        found = [(key, file, "code") for key, file in self._in_order(list_files(root, "*.py", outside))]
        manual = Path(f"/usr/share/doc/python{sys.version_info.major}.{sys.version_info.minor}/html/_sources")
        if self.config.include_docs and manual.is_dir():
            pages = self._in_order(list_files(manual, "*.rst.txt"))
            found += [(f"doc/{key}", file, "docs") for key, file in pages]
        return found

    def _read(self) -> Iterator[Document]:
        for key, file, label in self.files():
            for _, text in read_texts(file):
                yield Document(key, text, label)


class Files(Corpus, kind="files"):
    """Any text files: single ones, folders of them, gzip and zip archives. Binary files are skipped.

    Source and licence: whatever the paths hold. A document's key is its path below the given folder (the file's name where a file
    was given, followed by ``!`` and the member in a zip).
    """

    @configclass
    class Config(Corpus.Config):
        """Which files."""

        paths: tuple[str, ...] = Field(min_length=1)
        # Of the files in a given folder, or the members of a given zip; * also spans folders.
        pattern: str = "*"
        # Bytes that do not fit it become U+FFFD; a byte-order mark goes before it.
        encoding: str = "utf-8"
        label: str | None = None  # None labels a document as label_by says
        # The name of the given path, of the first folder in it, of the file.
        label_by: Literal["path", "folder", "file"] = "path"

        def __post_init__(self) -> None:
            _check_encoding(self.encoding)

    def sources(self) -> list[Path]:
        """See `Corpus`."""
        return [file for _, _, file in self._files()]

    def describe(self) -> str:
        """See `Corpus`."""
        paths = ", ".join(self.config.paths)
        return paths if self.config.pattern == "*" else f"{paths} (files that match {self.config.pattern!r})"

    def _files(self) -> list[tuple[Path, str, Path]]:
        """(given path, key, file), unreadable zips and binary files included."""
        found = []
        for path in self.config.paths:
            root = expanded(path)
            found += [(root, key, file) for key, file in self._in_order(list_files(root, self.config.pattern))]
        return found

    def _label(self, root: Path, key: str) -> str:
        if self.config.label is not None:
            return self.config.label
        parts = key.split("/")
        if self.config.label_by == "folder" and len(parts) > 1:
            return parts[0]
        name = parts[-1] if self.config.label_by == "file" else root.resolve().name
        return name.split(".")[0] or "text"

    def _read(self) -> Iterator[Document]:
        for root, key, file in self._files():
            for member, text in read_texts(file, self.config.encoding):
                if not member:
                    yield Document(key, text, self._label(root, key))
                elif file != root or matches(member, self.config.pattern):
                    yield Document(f"{key}!{member}", text, self._label(root, member))


class Table(Corpus, kind="table"):
    """Rows of Parquet (``.parquet``) or JSON lines (``.jsonl``, ``.json``, each also ``.gz``) files with a text column.

    Source and licence: whatever the paths hold. A document's key is a digest of its text, so that rows may be moved about and equal
    texts never stand in both splits. Rows without text are left out.
    """

    @configclass
    class Config(Corpus.Config):
        """Which files and columns."""

        paths: tuple[str, ...] = Field(min_length=1)  # a folder stands for the tables in it
        text_column: str = "text"
        label_column: str | None = None  # None labels all rows with the name of the path

    def sources(self) -> list[Path]:
        """See `Corpus`."""
        found = []
        for path in self.config.paths:
            root = expanded(path)
            files = [file for _, file in list_files(root) if root.is_file() or is_table(file)]
            if not files:
                raise DataError(f"no .parquet or .jsonl files in {root}")
            found += files
        return found

    def describe(self) -> str:
        """See `Corpus`."""
        return f"column {self.config.text_column!r} of {', '.join(self.config.paths)}"

    def _read(self) -> Iterator[Document]:
        text_column, label_column = self.config.text_column, self.config.label_column
        columns = [text_column] + ([label_column] if label_column else [])
        for file in self.sources():
            name = file.name.split(".")[0]
            for where, row in read_rows(file, columns):
                text, label = row[text_column], row[label_column] if label_column else name
                if text is None or text == "":
                    continue
                if not isinstance(text, str):
                    raise DataError(f"{file}, {where}: column {text_column!r} holds {text!r}; it must be text")
                # JSON can spell lone surrogates, UTF-8 cannot.
                text = text.encode("utf-8", "replace").decode("utf-8")
                yield Document(f"{stable_hash(text):016x}", text, str(label))


@configclass
class Domain(BaseConfig):
    """One domain of a mixture."""

    corpus: Corpus.Config
    # Share of the sequences, relative to the other domains.
    weight: float = Field(default=1.0, gt=0)


class Mixture(Corpus, kind="mixture"):
    """Labelled domains in given proportions, each any other corpus (a mixture too). Sequences carry the domain's name.

    Source and licence: those of the domains. Example, two thirds code and one third your notes::

        Mixture.Config(domains={
            "code": Domain(corpus=Stdlib.Config(), weight=2.0),
            "notes": Domain(corpus=Files.Config(paths=("~/notes",))),
        })
    """

    @configclass
    class Config(Corpus.Config):
        """Which domains; ``max_bytes`` is set on each of them."""

        domains: dict[str, Domain] = Field(min_length=1)

        def __post_init__(self) -> None:
            if self.max_bytes is not None:
                raise ValueError(f"max_bytes is {self.max_bytes} on a mixture; set it on the corpora of its domains")

    def sources(self) -> list[Path]:
        """See `Corpus`."""
        return [file for domain in self.config.domains.values() for file in domain.corpus.build().sources()]

    def describe(self) -> str:
        """See `Corpus`."""
        return "; ".join(f"{name}: {domain.corpus.build().describe()}" for name, domain in self.config.domains.items())

    def _read(self) -> Iterator[Document]:
        for name, domain in self.config.domains.items():
            for document in domain.corpus.build().documents():
                yield Document(document.key, document.text, name)


def corpus_at(*paths: str | Path) -> Corpus.Config:
    """The config that reads ``paths``: tables if they are Parquet or JSON lines, else text files.

    Args:
        paths: files, folders, and patterns of a shell (``notes/*.md``; ``**`` spans folders), which stand for what they match.

    Raises DataError if one is absent or matches nothing, and if some are tables and others are not.
    """
    found = [path for given in paths for path in _matched(given)]
    for path in found:
        list_files(path)
    tables = [path for path in found if is_table(path)]
    if tables and len(tables) < len(found):
        other = next(path for path in found if path not in tables)
        raise DataError(
            f"{tables[0]} is a table, but {other} is not; give only tables, or only text files and folders, or mix them as domains "
            "(data.corpus.kind=mixture)"
        )
    return (Table if tables else Files).Config(paths=tuple(map(str, found)))


def _matched(path: str | Path) -> list[Path]:
    """What a path or pattern stands for, in order. What is there is no pattern, whatever its name."""
    place = expanded(path)
    if place.exists() or not glob.has_magic(str(place)):
        return [place]
    found = sorted(map(Path, glob.glob(str(place), recursive=True)))
    if not found:
        raise DataError(f"nothing matches {str(path)!r}")
    return found


def _check_encoding(name: str) -> None:
    try:
        codecs.lookup(name)
    except LookupError:
        raise ValueError(
            f"encoding is {name!r}; it must be one that Python knows, such as 'utf-8' or 'latin-1'"
        ) from None


def _cut_to_bytes(text: str, size: int) -> str:
    """The start of ``text`` that fits ``size`` bytes, cut after a line end where there is one."""
    data = text.encode("utf-8", "replace")
    if len(data) <= size:
        return text
    head = data[:size].decode("utf-8", "ignore")
    return head[: head.rfind("\n") + 1] or head
