"""The whole report: its sections, and the files they are written into."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from anabranch.errors import DataError
from anabranch.files import atomic_write, atomic_write_json, atomic_write_text, parse_json
from anabranch.report import cache_pictures, captions, pictures
from anabranch.report.page import Section, page
from anabranch.report.style import to_png, to_svg
from anabranch.report.summary import Summary, summarize
from anabranch.report.words import explain
from anabranch.routing.trace import RoutingTrace
from anabranch.routing.trace_schema import METADATA_KEY

# file name, heading, how to read it, picture
_SECTIONS: list[tuple[str, str, Callable[[Summary], str], Callable[[RoutingTrace, Summary], Figure | None]]] = [
    ("load", "Load", captions.load, pictures.load),
    ("entropy", "Entropy", captions.entropy, lambda trace, summary: pictures.entropy(summary)),
    (
        "coactivation",
        "Experts chosen together",
        captions.coactivation,
        lambda trace, summary: pictures.coactivation(trace),
    ),
    ("passes", "From pass to pass", captions.passes, lambda trace, summary: pictures.passes(summary)),
    ("specialisation", "Specialisation by domain", captions.specialisation, pictures.specialisation),
    ("reuse", "Reuse", captions.reuse, lambda trace, summary: pictures.reuse(summary)),
    ("caches", "Offloading", captions.caches, lambda trace, summary: cache_pictures.caches(summary)),
    (
        "windows",
        "Windows and caches that were asked for",
        captions.windows,
        lambda trace, summary: cache_pictures.windows(summary),
    ),
]


def report_files(folder: str | Path) -> list[Path]:
    """What `write_report` writes into ``folder``, or removes if it is of an earlier report."""
    return [Path(folder) / name for name in ("report.html", "summary.json", *(f"{one[0]}.png" for one in _SECTIONS))]


def check_place(folder: str | Path, *, trace: str | Path | None = None) -> None:
    """Raise DataError if a report in ``folder``, and a ``trace`` beside it, would replace what is no earlier report's, or cannot be there.

    A report is known by its ``summary.json``, which is written before the rest; a trace that is there alone by what it says of itself.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file, and a report is a folder; choose another name")
    held = [path for path in report_files(folder) if os.path.lexists(path)]
    if trace is not None and os.path.lexists(trace) and not _is_trace(trace):
        held.append(Path(trace))
    if held and not _is_report(folder):
        raise DataError(f"{held[0]} is there and of no report, so it is not replaced; choose another folder")


def _is_trace(path: str | Path) -> bool:
    try:
        with pq.ParquetFile(path) as file:
            return METADATA_KEY in (file.metadata.metadata or {})
    except (pa.ArrowException, OSError):
        return False


def _is_report(folder: Path) -> bool:
    try:
        facts = parse_json((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(facts, dict) and {"title", "extra", "text"} <= facts.keys()


def write_report(
    trace: RoutingTrace,
    folder: str | Path,
    *,
    title: str,
    extra: Mapping[str, Any] | None = None,
    summary: Summary | None = None,
) -> Path:
    """Write ``report.html``, one PNG for each picture, and ``summary.json`` with the same facts into ``folder``.

    Args:
        trace: what to report; pictures for which it says nothing (domains, sequences, more than one layer) are left out.
        folder: made if it is not there; files of these names are replaced.
        title: heading of the page.
        extra: shown below the title and kept in ``summary.json``, e.g. the model's name; values must be JSON-ready.
        summary: what `summarize` found in the trace, with what was asked of it. Default: what it finds unasked.

    Returns the path of the page. It needs no other file and no network.

    Raises DataError if the trace is empty or the folder cannot be written, CapacityError if the disk is full.
    """
    folder, extra = Path(folder), dict(extra or {})
    summary = summarize(trace) if summary is None else summary
    sentences = explain(summary)
    atomic_write_json(folder / "summary.json", {"title": title, "extra": extra, "text": sentences, **summary.to_dict()})
    sections: list[Section] = []
    for name, heading, how_to_read, draw in _SECTIONS:
        picture = draw(trace, summary)
        path = folder / f"{name}.png"
        if picture is None:
            path.unlink(missing_ok=True)  # of an earlier report
            continue
        save_picture(path, to_png(picture))
        sections.append(Section(heading, how_to_read(summary), to_svg(picture)))
    atomic_write_text(folder / "report.html", page(title, summary, sentences, sections, extra))
    return folder / "report.html"


def save_picture(path: Path, data: bytes) -> None:
    """Write the bytes of a picture, all or nothing."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    atomic_write(path, write)
