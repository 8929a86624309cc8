"""Records of benchmarks: what each has, and the one way they are written.

Every record has ``name`` (of the benchmark), ``device``, ``commit``, ``date``, ``command`` (see `_machine.here`) and ``rows``; most have
``versions``, and all else that a benchmark wants to keep. A row has ``case`` and whatever of these it has:

    ours, peer      what was measured, in ``unit``; None where it failed (``failed`` says who and why)
    peer_name       against whom; None where there is nobody
    ratio           above 1: ours is better; None where nothing can be compared
    spread          of the ratio, or of ours where there is no peer: the interquartile range, or ``[low, high]``
    bar, missed     what was asked of the ratio, and why it is missed whatever the ratio (`_bars`)
    withdrawn       why the row is of no use until it is measured again
"""

import json
import os
import re
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from _bars import with_bars

TEXTS = ("name", "device", "commit", "date", "command")
NUMBERS = ("ours", "peer", "ratio", "bar")
ROW_TEXTS = ("peer_name", "unit", "missed", "withdrawn", "failed")


def wrong(record: Mapping[str, Any]) -> list[str]:
    """What keeps a record from being one, each in a few words; empty if nothing does."""
    found = [f"{field} is {record.get(field)!r}, no text" for field in TEXTS if not _is_text(record.get(field))]
    if not re.fullmatch(r"20\d\d-\d\d-\d\d", str(record.get("date"))):
        found.append(f"date is {record.get('date')!r}, not YYYY-MM-DD")
    rows = record.get("rows")
    if not isinstance(rows, list):
        return [*found, f"rows is {type(rows).__name__}, no list"]
    return found + [f"row {number}: {what}" for number, row in enumerate(rows) for what in _wrong_row(row)]


def _wrong_row(row: Mapping[str, Any]) -> list[str]:
    found = [] if _is_text(row.get("case")) else [f"case is {row.get('case')!r}, no text"]
    found += [f"{name} is {row[name]!r}, no number" for name in NUMBERS if not _is_number_or_none(row.get(name))]
    for name in ROW_TEXTS:
        if not isinstance(row.get(name), str | None):
            found.append(f"{name} is {row[name]!r}, no text")
    spread = row.get("spread")
    ends = spread if isinstance(spread, list) else [spread, spread]
    if len(ends) != 2 or not all(map(_is_number_or_none, ends)):
        found.append(f"spread is {spread!r}, neither a number nor [low, high]")
    if row.get("ratio") is not None and row.get("peer_name") is None:
        found.append("it has a ratio and no peer_name")
    return found


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_number_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, Real) and not isinstance(value, bool))


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record, with the bars of its rows; folders are made, and one that lies there stays whole until the new one is.

    Raises SystemExit, after writing, for one that is not as it should be: what took hours to measure is not lost.
    """
    written = {**record, "rows": with_bars(record["name"], record["rows"])}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(written, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(beside, path)
    if found := wrong(written):
        raise SystemExit(f"{path} is no record: {'; '.join(found)}")
