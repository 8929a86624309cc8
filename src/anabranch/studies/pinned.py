"""The text of evidence, pinned: the files of Python's standard library that studies read, with the hash of each.

    FOLDER/corpus/stdlib.json     ``python``, and ``files``: their keys in the corpus, with label and hash

What the standard library is depends on the Python that runs. Recorded runs of language models are to be of one text, so a study at its
recorded size is refused where that of here is another. Other texts have files of their own; each run notes what it read by content.
"""

import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from anabranch.errors import DataError
from anabranch.files import atomic_write_json, parse_json, sha256_of
from anabranch.studies.provenance import parts

Files = dict[str, tuple[str, str]]


def path_of(folder: Path) -> Path:
    """Where the list lies in a folder of results."""
    return folder / "corpus" / "stdlib.json"


def check_corpus(configs: Iterable[Any], folder: Path) -> None:
    """Raise DataError if ``configs`` read the standard library, and it is not the one that is pinned in ``folder``; pin it if none is."""
    found = [reads for config in configs for reads in _reads_of(config)]
    if not found:
        return
    path = path_of(folder)
    if not path.exists():
        every = {key: entry for files, _ in found for key, entry in files.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, {"python": platform.python_version(), "files": dict(sorted(every.items()))})
        return
    try:
        pinned = parse_json(path.read_bytes())
        python, files = pinned["python"], {key: tuple(entry) for key, entry in pinned["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no list of files ({error}); restore it") from error
    for here, labels in found:
        wanted = {key: entry for key, entry in files.items() if entry[0] in labels}
        other = sorted(key for key in wanted.keys() | here.keys() if wanted.get(key) != here.get(key))
        if other:
            raise DataError(
                f"evidence in {folder} is of the standard library of Python {python}; {len(other)} of its {len(wanted)} files are "
                f"others here (Python {platform.python_version()}), such as {other[0]}; run it with that Python, or into another "
                "folder (--out)"
            )


def _reads_of(config: Any) -> list[tuple[Files, set[str]]]:
    """What each part of a config reads of the standard library, its files by key, and the labels that such files have."""
    # Whoever reads it has loaded this; who does not need not.
    corpus = sys.modules.get("anabranch.data.corpus")
    if corpus is None:
        return []
    kinds = {part.replace(max_bytes=None) for part in parts(config) if isinstance(part, corpus.Stdlib.Config)}
    return [
        (
            {key: (label, sha256_of(file)) for key, file, label in kind.build().files()},
            {"code", "docs"} if kind.include_docs else {"code"},
        )
        for kind in sorted(kinds, key=repr)
    ]
