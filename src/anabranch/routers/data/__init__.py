"""Recorded outcomes from files: what routers learn from and are judged on.

data = load_outcomes("outcomes.jsonl.gz", prices=read_prices("prices.json"))
train, test = split(deduplicated(data), seed=0)
"""

from collections.abc import Mapping
from pathlib import Path

from anabranch.errors import DataError
from anabranch.registry import resolve
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Model
from anabranch.routers.data.budget import UNITS, measured_in
from anabranch.routers.data.csv import Columns, load_csv
from anabranch.routers.data.jsonl import load_jsonl
from anabranch.routers.data.judgements import is_judged, load_judgements
from anabranch.routers.data.prices import pool_of, read_joules, read_prices
from anabranch.routers.data.sets import SETS, RoutingSet, llmrouter, merged, routellm_mmlu
from anabranch.routers.data.splits import check_disjoint, deduplicated, folds, groups, pooled, split

__all__ = [
    "SETS",
    "UNITS",
    "Columns",
    "RoutingSet",
    "check_disjoint",
    "deduplicated",
    "folds",
    "groups",
    "is_store",
    "llmrouter",
    "load_csv",
    "load_jsonl",
    "load_judgements",
    "load_outcomes",
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
    return "://" in str(path) or Path(path).suffix.lower() in (".db", ".sqlite", ".sqlite3")


def load_outcomes(
    path: str | Path,
    *,
    columns: Columns | None = None,
    prices: Mapping[str, Model] | None = None,
    by_choice: bool = False,
) -> Recorded:
    """Outcomes from a file, by the ending of its name: .jsonl, .csv or .tsv, each with or without .gz, or a gateway's store (.db, a URL).

    A folder of MT-Bench, or one of its files of judgements, is known by what is in it (`load_judgements`).

    ``by_choice`` is for logs of traffic, see `anabranch.gateway.store_outcomes.load_store`.

    Raises DataError for another ending, or a file that is malformed, with the line.
    """
    if is_store(path):
        return resolve("outcomes", "store")(str(path), by_choice=by_choice)
    path = Path(path)
    if path.is_dir() and is_judged(path):
        return load_judgements(path, prices=prices)
    endings = [ending for ending in map(str.lower, path.suffixes[-2:]) if ending != ".gz"]
    kind = endings[-1] if endings else ""
    if kind in (".csv", ".tsv"):
        return load_csv(path, columns, prices=prices)
    if kind in (".jsonl", ".ndjson", ".json"):
        return load_judgements(path, prices=prices) if is_judged(path) else load_jsonl(path, prices=prices)
    if kind in (".toml", ".yaml", ".yml"):
        raise DataError(
            f"{path} is a config by its name, and outcomes are in no config; those of a gateway are in its store: give the file or URL "
            "that its field store names (gateway.db unless it names one)"
        )
    raise DataError(
        f"{path} has no ending that is known; outcomes are read from .jsonl, .csv and .tsv files, also gzipped (.jsonl.gz), from a "
        "gateway's store (.db, .sqlite, or a URL such as postgresql://HOST/NAME), and from a folder of MT-Bench"
    )
