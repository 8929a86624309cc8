"""Well-known texts by name, each where its package or the project's data folder puts it; nothing is downloaded.

The small ones lie in the folder that ``ANABRANCH_DATA`` names (``text/`` in it). The others come with Debian packages, found under
``/`` or, for packages unpacked without root (``apt-get download NAME; dpkg -x NAME.deb DIR``), under ``ANABRANCH_DATA``.
Good six domains for a small mixture of experts, equal bytes of each: the standard library, metamath, gcide, manpages-de,
python-docs, perl-docs.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from anabranch.config import Field, configclass
from anabranch.data.corpus import Corpus, Document, Files
from anabranch.data.reading import stable_hash
from anabranch.errors import ConfigError, DataError
from anabranch.places import DATA_FOLDER, data_folder


@dataclass(frozen=True)
class _Text:
    """Where a text is, whose it is, and how it is cut into documents."""

    place: str  # path under a root, with * where versions differ
    package: str  # Debian package, empty for a file of ANABRANCH_DATA
    source: str
    licence: str
    pattern: str = "*"
    encoding: str = "utf-8"
    label_by: Literal["path", "file"] = "path"
    # Regular expression of a line that begins a new document.
    starts: str | None = None


def _dictd(name: str, source: str, licence: str, starts: str | None = None) -> _Text:
    return _Text(f"usr/share/dictd/{name}.dict.dz", f"dict-{name}", source, licence, starts=starts)


def _manpages(language: str) -> _Text:
    return _Text(
        f"usr/share/man/{language}",
        f"manpages-{language}",
        "manpages-l10n",
        "GPL-3.0+ and the pages' own",
        pattern="*.gz",
    )


NAMED: dict[str, _Text] = {
    "tinyshakespeare": _Text(
        "text/tinyshakespeare.txt.gz", "", "karpathy/char-rnn: plays of Shakespeare, 1.1 MB", "public domain"
    ),
    "genesis": _Text(
        "text/genesis.zip",
        "",
        "nltk_data: Genesis in 8 versions, 1.4 MB",
        "public domain; lolcat CC BY-SA",
        pattern="*.txt",
        label_by="file",
    ),
    "udhr2": _Text(
        "text/udhr2.zip",
        "",
        "nltk_data: declaration of human rights, 387 language files, 5.7 MB",
        "public domain",
        pattern="*.txt",
        label_by="file",
    ),
    "wikipedia_multilingual": _Text(
        "text/wikipedia_multilingual.txt.gz",
        "",
        "allenai/OLMoE: Wikipedia articles, 1.3 MB",
        "CC BY-SA 4.0",
        starts="# ",
    ),
    "metamath": _Text(
        "usr/share/metamath/databases/set.mm",
        "metamath-databases",
        "metamath.org: formal mathematics, 41 MB",
        "CC0-1.0",
    ),
    "gcide": _dictd("gcide", "GNU dictionary of English, 36 MB", "GPL-2.0+"),
    "wordnet": _dictd("wn", "Princeton WordNet 3.0 as a dictionary, 28 MB", "WordNet licence"),
    "foldoc": _dictd("foldoc", "Free On-line Dictionary of Computing, 5 MB", "GFDL-1.3+"),
    "jargon": _dictd("jargon", "The Jargon File, 1.4 MB", "public domain"),
    "python-docs": _Text(
        "usr/share/doc/python3.*/html/_sources",
        "python3-doc",
        "Python's manual in reStructuredText, 11 MB",
        "PSF-2.0",
        pattern="*.rst.txt",
    ),
    "perl-docs": _Text(
        "usr/share/perl/5.*", "perl-doc", "Perl's manual in POD, 9 MB", "Artistic or GPL-1.0+", pattern="*.pod"
    ),
    "manpages-de": _manpages("de"),
    "manpages-fr": _manpages("fr"),
    "manpages-es": _manpages("es"),
    "fortunes": _Text("usr/share/games/fortunes", "fortunes", "short sayings, 2.5 MB", "free, mixed", starts="%$"),
}


class Named(Corpus, kind="named"):
    """One of the texts of `NAMED`, which says where each comes from and its licence, labelled with its name.

    Genesis and the declaration of human rights are labelled by language. Raises DataError, with what to install or set, where
    the text is not on this machine.
    """

    @configclass
    class Config(Corpus.Config):
        """Which text."""

        # Tinyshakespeare, genesis, metamath, gcide, python-docs, ...
        name: str = Field(min_length=1)

        def __post_init__(self) -> None:
            if self.name not in NAMED:
                raise ConfigError(f"name is {self.name!r}; it must be one of {', '.join(NAMED)}")

    def sources(self) -> list[Path]:
        """See `Corpus`."""
        return self._files().sources()

    def describe(self) -> str:
        """See `Corpus`."""
        return f"{self.config.name} ({NAMED[self.config.name].source})"

    def _files(self) -> Files:
        text = NAMED[self.config.name]
        label = None if text.label_by == "file" else self.config.name
        return Files.Config(
            paths=(str(_find(self.config.name, text)),),
            pattern=text.pattern,
            encoding=text.encoding,
            label=label,
            label_by=text.label_by,
            max_bytes=self.config.max_bytes,
        ).build()

    def _read(self) -> Iterator[Document]:
        starts = NAMED[self.config.name].starts
        for document in self._files().documents():
            if starts is None:
                yield document
                continue
            for part in re.split(f"^(?={starts})", document.text, flags=re.MULTILINE):
                # Named by its text: when the file grows, the parts that were there stay in their split.
                yield Document(f"{document.key}#{stable_hash(part):016x}", part, document.label)


def _find(name: str, text: _Text) -> Path:
    """The newest match of the text's place. Raises DataError if there is none."""
    folder = data_folder()
    roots = [folder] if folder else []
    if text.package:
        roots.append(Path("/"))
    for root in roots:
        found = sorted(path for path in root.glob(text.place) if path.is_file() or any(path.rglob("*")))
        if found:
            return found[-1]
    if text.package:
        raise DataError(f"no {name} at /{text.place}; install it with: apt-get install {text.package}")
    where = f"in {folder}" if folder else f"because {DATA_FOLDER} is not set"
    raise DataError(f"no {name} {where}; set {DATA_FOLDER} to the folder that holds {text.place}")
