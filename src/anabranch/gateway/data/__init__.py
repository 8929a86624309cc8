"""Recorded outcomes from files: what routers learn from and are judged on.

data = load("outcomes.jsonl.gz", prices=read_prices("prices.json"))
train, test = split(deduplicated(data), seed=0)
"""

from collections.abc import Mapping
from pathlib import Path

from anabranch.errors import DataError
from anabranch.gateway.data.budget import UNITS, measured_in
from anabranch.gateway.data.csv import Columns, load_csv
from anabranch.gateway.data.guard import check_disjoint, deduplicated, folds, groups, pooled, split
from anabranch.gateway.data.jsonl import load_jsonl
from anabranch.gateway.data.ledger import from_ledger, load_store
from anabranch.gateway.data.prices import pool_of, read_joules, read_prices
from anabranch.gateway.data.sets import SETS, RoutingSet, llmrouter, merged, routellm_mmlu
from anabranch.gateway.dataset import Recorded
from anabranch.gateway.query import Model

__all__ = [
    "SETS",
    "UNITS",
    "Columns",
    "RoutingSet",
    "check_disjoint",
    "deduplicated",
    "folds",
    "from_ledger",
    "groups",
    "is_store",
    "llmrouter",
    "load",
    "load_csv",
    "load_jsonl",
    "load_store",
    "measured_in",
    "merged",
    "pool_of",
    "pooled",
    "read_joules",
    "read_prices",
    "routellm_mmlu",
    "split",
]


def is_store(path: str | Path) -> bool:
    """Whether outcomes by this name are those of a gateway's store."""
    return "://" in str(path) or Path(path).suffix in (".db", ".sqlite", ".sqlite3")


def load(
    path: str | Path,
    *,
    columns: Columns | None = None,
    prices: Mapping[str, Model] | None = None,
    by_choice: bool = False,
) -> Recorded:
    """Outcomes from a file, by the ending of its name: .jsonl, .csv or .tsv, each with or without .gz, or a gateway's store (.db, a URL).

    ``by_choice`` is for logs of traffic, see `load_store`.

    Raises DataError for another ending, or a file that is malformed, with the line.
    """
    if is_store(path):
        return load_store(str(path), by_choice=by_choice)
    path = Path(path)
    endings = [ending for ending in path.suffixes[-2:] if ending != ".gz"]
    kind = endings[-1] if endings else ""
    if kind in (".csv", ".tsv"):
        return load_csv(path, columns, prices=prices)
    if kind in (".jsonl", ".ndjson", ".json"):
        return load_jsonl(path, prices=prices)
    raise DataError(
        f"{path} has no ending that is known; outcomes are read from .jsonl and .csv files, also gzipped (.jsonl.gz)"
    )
