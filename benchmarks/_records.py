"""Records of benchmarks: what each has, and the one way they are written.

Every record has ``name`` (of the benchmark), ``device``, ``commit``, ``date``, ``command`` (see `_machine.here`) and ``rows``; most have
``versions``, and all else that a benchmark wants to keep. Since 2026-12-02 the versions of all peers are there that are packages: of those
that ran in an environment of their own as the benchmark says, of others as they are installed. A row has ``case`` and whatever of these it
has:

    ours, peer      what was measured, in ``unit``; None where it failed (``failed`` says who and why)
    peer_name       against whom; None where there is nobody
    ratio           above 1: ours is better; None where nothing can be compared
    spread          of the ratio, or of ours where there is no peer: the interquartile range, or ``[low, high]``
    per_round       ``{"ours": [...], "peer": [...]}`` in ``unit``, of which ``ratio`` is the median of peer / ours
    bar, missed     what was asked of the ratio, and why it is missed whatever the ratio (`_bars`)
    withdrawn       why the row is of no use until it is measured again
"""

import json
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from numbers import Real
from pathlib import Path
from typing import Any

from _bars import with_bars

TEXTS = ("name", "device", "commit", "date", "command")
NUMBERS = ("ours", "peer", "ratio", "bar")
ROW_TEXTS = ("peer_name", "unit", "missed", "withdrawn", "failed")
VERSIONS_SINCE, NOT_KNOWN = "2026-12-02", "not known"
# Peers that are packages: a word of a row's ``peer_name`` (as it is written: "TorchFT" is our model of torchft), and what pip calls it.
PACKAGES = {
    "GPTCache": "gptcache",
    "HighwayEnv": "highway-env",
    "Mixtral": "transformers",
    "OLMoE": "transformers",
    "OR-tools": "ortools",
    "PecanPy": "pecanpy",
    "TRL": "trl",
    "diskannpy": "diskannpy",
    "faiss": "faiss-cpu",
    "fast-pagerank": "fast-pagerank",
    "fastrp": "fastrp",
    "gensim": "gensim",
    "glass": "pyglass-portable",
    "hnswlib": "hnswlib",
    "igraph": "igraph",
    "litellm": "litellm",
    "llmrouter-lib": "llmrouter-lib",
    "networkx": "networkx",
    "ns-3": "ns3",
    "peft": "peft",
    "pypccl": "pypccl",
    "scikit-network": "scikit-network",
    "scipy": "scipy",
    "semantic-router": "semantic-router",
    "svs": "scalable-vs",
    "tensorzero": "tensorzero",
    "torchft": "torchft",
    "torchgpipe": "torchgpipe",
    "transformers": "transformers",
    "usearch": "usearch",
    "vllm": "vllm",
}


def wrong(record: Mapping[str, Any]) -> list[str]:
    """What keeps a record from being one, each in a few words; empty if nothing does."""
    found = [f"{field} is {record.get(field)!r}, no text" for field in TEXTS if not _is_text(record.get(field))]
    if not re.fullmatch(r"20\d\d-\d\d-\d\d", str(record.get("date"))):
        found.append(f"date is {record.get('date')!r}, not YYYY-MM-DD")
    rows = record.get("rows")
    if not isinstance(rows, list):
        return [*found, f"rows is {type(rows).__name__}, no list"]
    if str(record.get("date")) >= VERSIONS_SINCE:
        told = record.get("versions") or {}
        found += [f"versions has nothing of {package}" for package in peers_of(rows) if package not in told]
    return found + [f"row {number}: {what}" for number, row in enumerate(rows) for what in _wrong_row(row)]


def peers_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The packages that peers of these rows are, as pip calls them."""
    names = {str(row.get("peer_name")) for row in rows if row.get("peer") is not None}
    words = {word for name in names for word in re.split(r"[^\w-]+", name)}
    return sorted({package for word, package in PACKAGES.items() if word in words})


def with_versions(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the versions of all peers that are packages: those that it tells, else those installed here, else `NOT_KNOWN`."""
    told = dict(record.get("versions") or {})
    for package in peers_of(record["rows"]):
        if package not in told:
            try:
                told[package] = version(package)
            except PackageNotFoundError:
                told[package] = NOT_KNOWN
    return {**record, "versions": told} if told else dict(record)


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
    return found + _wrong_rounds(row)


def _wrong_rounds(row: Mapping[str, Any]) -> list[str]:
    """Whether the ratio of a row can be made again of its rounds, to the digits that are kept."""
    if "per_round" not in row:
        return []
    ours, peer = row["per_round"]["ours"], row["per_round"]["peer"]
    if not ours or len(ours) != len(peer):
        return [f"per_round has {len(ours)} of ours and {len(peer)} of the peer"]
    ratio = statistics.median(theirs / mine for mine, theirs in zip(ours, peer, strict=True))
    if row.get("ratio") is None or abs(ratio - row["ratio"]) > 0.002 * ratio + 0.001:
        return [f"ratio is {row.get('ratio')!r}, and its rounds say {ratio:.4g}"]
    return []


def of_rounds(ours_s: Sequence[float], peer_s: Sequence[float]) -> dict[str, list[float]]:
    """What a row keeps of its rounds: seconds as milliseconds, to six digits."""
    return {
        name: [float(f"{1e3 * value:.6g}") for value in values] for name, values in (("ours", ours_s), ("peer", peer_s))
    }


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_number_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, Real) and not isinstance(value, bool))


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record, with the bars of its rows and the versions of its peers.

    Folders are made, and a record that lies there stays whole until the new one is.

    Raises SystemExit, after writing, for one that is not as it should be: what took hours to measure is not lost.
    """
    written = with_versions({**record, "rows": with_bars(record["name"], record["rows"])})
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(written, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(beside, path)
    if found := wrong(written):
        raise SystemExit(f"{path} is no record: {'; '.join(found)}")
