"""Make ``src/anabranch/gateway/config/prices.json``, the table of list prices that ships, from the package genai-prices (MIT).

    python -m venv PRICES && PRICES/bin/pip install genai-prices
    PRICES/bin/python benchmarks/make_price_table.py

The package itself is no dependency: it brings an HTTP client, and holds its prices as Python code that takes longer to import than a
gateway takes to start. Prices are nano-dollars per million tokens, per thousand searches or calls. Where a price depends on the hour
of the day, the dearest is taken; where it changes on a date, the table has both with their dates, and the day a gateway starts decides.
"""

import datetime
import json
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Any

NANO = 10**9
OUT = Path(__file__).parents[1] / "src/anabranch/gateway/config/prices.json"
NAMES = {
    "input_mtok": "input",
    "output_mtok": "output",
    "cache_read_mtok": "cached_input",
    "cache_write_mtok": "cache_write",
    "cache_write_1h_mtok": "cache_write_1h",
    "input_audio_mtok": "audio_input",
    "output_audio_mtok": "audio_output",
    "input_image_mtok": "image_input",
    "output_image_mtok": "image_output",
    "web_searches_kcount": "web_search",
    "requests_kcount": "request",
}

# What a request says, or an answer, of the tier that it is given.
TIERS = {
    ("service_tier", "priority"): "priority",
    ("service_tier", "flex"): "flex",
    ("service_tier", "fast"): "fast",
    ("speed", "fast"): "fast",
    ("processing", "batch"): "batch",
}

# Billed by what a gateway does not count: hours of sound, pages, letters. They have no price here.
OTHER = (
    "audio_hours",
    "input_audio_hours",
    "input_mchars",
    "input_document_kpages",
    "output_reasoning_mtok",
    "output_citation_mtok",
)

Rates = dict[str, Any]


def rates_of(price: Any) -> Rates:
    """Those that are named."""
    return {name: value for name, value in vars(price).items() if value is not None and not name.startswith("_")}


def at(value: Any, prompt: int) -> Decimal:
    """The rate of a call with so many prompt tokens."""
    if isinstance(value, Decimal):
        return value
    above = [tier.price for tier in value.tiers if prompt > tier.start]
    return above[-1] if above else value.base


def written(rates: Rates) -> dict[str, Any]:
    """As a table of the file, with what holds for long prompts."""
    starts = sorted({tier.start for value in rates.values() for tier in getattr(value, "tiers", ())})
    made: dict[str, Any] = {}
    for start in reversed([0, *starts]):
        table = {
            ours: int((at(rates[theirs], start + 1 if start else 0) * NANO).to_integral_value())
            for theirs, ours in NAMES.items()
            if theirs in rates
        }
        if made:
            table |= {"long_context": next(one for one in starts if one > start), "long": made}
        made = table
    return made


def dearest(several: list[Rates]) -> Rates:
    """Of prices that hold at different hours."""
    made = dict(several[0])
    for rates in several[1:]:
        for name, value in rates.items():
            if name not in made or at(value, 0) > at(made[name], 0):
                made[name] = value
    return made


def dated(model: Any) -> list[tuple[str, Rates]]:
    """Prices with the dates from which they hold, in order."""
    if not isinstance(model.prices, list):
        return [("", rates_of(model.prices))]
    found: dict[str, list[Rates]] = {}
    for one in model.prices:
        date = getattr(one.constraint, "start_date", None)
        found.setdefault("" if date is None else date.isoformat(), []).append(rates_of(one.prices))
    return [(date, dearest(found[date])) for date in sorted(found)]


def prices_of(model: Any) -> list[list[Any]]:
    """Of a model: each date with its price, tiers among it. Empty for one that is not billed by what is counted."""
    made = []
    for date, rates in dated(model):
        if any(name in rates for name in OTHER) or "input_mtok" not in rates:
            return []
        # What an embedding costs has no completion in it.
        table = written({"output_mtok": Decimal(0), **rates})
        tiers = {}
        for variant in model.price_variants or ():
            words = [TIERS.get(item) for item in variant.when.items()]
            if len(words) == 1 and words[0] and not getattr(variant.constraint, "start_time", None):
                tiers[words[0]] = written({"output_mtok": Decimal(0), **rates, **rates_of(variant.prices)})
        made.append([date, {**table, "tiers": tiers} if tiers else table])
    return made


def match_of(clause: Any) -> list[Any]:
    """A rule for names, as a list: what it does, and with what."""
    kind = type(clause).__name__.removeprefix("Clause")
    words = {
        "StartsWith": "starts_with",
        "EndsWith": "ends_with",
        "Contains": "contains",
        "Regex": "regex",
        "Equals": "equals",
    }
    if kind in words:
        return [words[kind], getattr(clause, words[kind])]
    return [kind.lower(), *(match_of(one) for one in getattr(clause, f"{kind.lower()}_"))]


def main() -> None:
    """Write the table."""
    from genai_prices.data import providers

    made = [
        {
            "id": provider.id,
            "api": provider.api_pattern,
            "also": list(provider.fallback_model_providers or ()),
            "models": [
                {"id": model.id, "match": match_of(model.match), "prices": prices}
                for model in provider.models
                if (prices := prices_of(model))
            ],
        }
        for provider in providers
    ]
    head = {
        "source": f"genai-prices {version('genai-prices')}, https://github.com/pydantic/genai-prices",
        "licence": "MIT, Copyright (c) Pydantic Services Inc. 2025 to present (prices.LICENSE.txt)",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    lines = ",\n".join(json.dumps(one, separators=(",", ":")) for one in made)
    OUT.write_text(f'{json.dumps(head)[:-1]}, "providers": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{OUT}: {OUT.stat().st_size:,} bytes, {sum(len(one['models']) for one in made):,} models")


if __name__ == "__main__":
    main()
