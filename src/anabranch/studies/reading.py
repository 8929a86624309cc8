"""What runs read of files of the data folder, by content: for studies whose configs do not say it themselves (`provenance.Reads`)."""

from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from anabranch.files import sha256_of
from anabranch.graph.datasets import files_of
from anabranch.places import data_file
from anabranch.studies.provenance import parts

TRACE = "traces/azure_llm_2023_conv.csv.gz"


def of_files(paths: Iterable[Path]) -> str:
    """Digest of the bytes of these files, in order."""
    return blake2b(" ".join(map(sha256_of, paths)).encode(), digest_size=8).hexdigest()


def of_graphs(config: Any) -> str | None:
    """Digest of the files of the graphs that ``config`` names, wherever in it; None if it names none that lies in a file.

    Raises DataError where a file is not there.
    """
    names = sorted({part for part in parts(config) if isinstance(part, str)})
    found = [path for name in names for path in files_of(name)]
    return of_files(found) if found else None


def of_trace() -> str:
    """Digest of the trace of conversations. Raises DataError where it is not there."""
    return of_files([data_file(TRACE)])
