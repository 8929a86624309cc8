"""List prices of hosted models by where they are served and what they are called there, for models that the config gives no price.

``prices.json`` is made by ``benchmarks/make_price_table.py``, and says from what, under which licence and of which day. It is read when
a model first needs it.
"""

import json
import re
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from anabranch.config import from_dict
from anabranch.routers.money import Price

FILE = Path(__file__).with_name("prices.json")


@cache
def table() -> dict[str, Any]:
    """The file: ``source``, ``licence``, ``date`` and ``providers``."""
    read: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return read


def list_price(url: str, model: str, date: str | None = None) -> Price | None:
    """What a model costs; None if the table does not know it.

    Args:
        url: of the endpoint, from which the table knows the provider.
        model: what the provider calls it.
        date: ISO, of the day; None for today.
    """
    return _list_price(url, model.lower(), date or datetime.now(UTC).date().isoformat())


@cache
def _list_price(url: str, model: str, date: str) -> Price | None:
    providers = table()["providers"]
    by_id = {provider["id"]: provider for provider in providers}
    served = [provider for provider in providers if re.match(provider["api"], url)]
    others = [by_id[name] for provider in served for name in provider["also"] if name in by_id]
    for provider in [*served, *others]:
        for one in provider["models"]:
            if _matches(one["match"], model):
                prices = [price for since, price in one["prices"] if since <= date]
                return from_dict(Price, prices[-1] if prices else one["prices"][0][1])
    return None


def _matches(rule: list[Any], name: str) -> bool:
    what, *rest = rule
    if what == "or":
        return any(_matches(one, name) for one in rest)
    if what == "and":
        return all(_matches(one, name) for one in rest)
    text = rest[0]
    if what == "regex":
        return re.search(text, name) is not None
    text = text.lower()
    found = {
        "starts_with": name.startswith,
        "ends_with": name.endswith,
        "contains": name.__contains__,
        "equals": name.__eq__,
    }
    return bool(found[what](text))
