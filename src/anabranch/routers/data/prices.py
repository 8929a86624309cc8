"""Price files: what models cost, how large they are and what they are good at.

    {"small": {"input_price": 0.2, "output_price": 0.2, "size": "8B", "feature": "fast, good at short answers"}}

JSON or TOML, a table for each model. Prices are dollars per million tokens; ``input`` and ``output`` are read too, ``parameters``
(billions) for ``size``, ``description`` for ``feature``, and ``cached_input``, ``context`` and ``joules_per_token`` where they are there.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anabranch.bounds import shown
from anabranch.errors import DataError
from anabranch.files import parse_json, parse_toml
from anabranch.routers.contract.query import Model, Pool
from anabranch.routers.money import Price

# Of ordinary text, about.
BYTES_PER_TOKEN = 4


def estimated_tokens(text: str) -> int:
    """A text's tokens, reckoned from its bytes."""
    return -(-len(text.encode("utf-8", "surrogatepass")) // BYTES_PER_TOKEN)


def read_prices(path: str | Path) -> dict[str, Model]:
    """Models by name, in the order of the file. Raises DataError that names the model and field that is wrong."""
    path = Path(path)
    return {name: _model(name, fields, path) for name, fields in _tables(path).items()}


def read_joules(path: str | Path) -> dict[str, float]:
    """``joules_per_token`` of the models of a price file that have it. Raises DataError for one that is no number above 0."""
    path = Path(path)
    found = {name: fields["joules_per_token"] for name, fields in _tables(path).items() if "joules_per_token" in fields}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise DataError(f"{path}: joules_per_token of {name!r} is {shown(value)}; it must be a number above 0")
    return {name: float(value) for name, value in found.items()}


def _tables(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        found = parse_toml(text) if path.suffix == ".toml" else parse_json(text)
    except OSError as error:
        raise DataError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
    except ValueError as error:
        # Of JSON, TOML and UTF-8 alike.
        raise DataError(f"{path} is no price file: {error}") from None
    if not isinstance(found, dict) or not found:
        raise DataError(
            f"{path} is no price file; it must hold a table of models, each with input_price and output_price"
        )
    for name, fields in found.items():
        if not isinstance(fields, dict):
            raise DataError(
                f"{path}: {name!r} is {shown(fields)}; it must be a table with input_price and output_price"
            )
    return found


def pool_of(names: tuple[str, ...], known: Mapping[str, Model] | None = None) -> Pool:
    """A pool of these models, with what is known of them."""
    return Pool(tuple((known or {}).get(name, Model(name=name)) for name in names))


def _model(name: str, fields: dict[str, Any], path: Path) -> Model:
    prices = []
    for kind in ("input", "output"):
        value = fields.get(f"{kind}_price", fields.get(kind))
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise DataError(
                f"{path}: {kind}_price of {name!r} is {shown(value)}; it must be dollars per million tokens, such as 0.25"
            )
        prices.append(value)
    context = fields.get("context")
    return Model(
        name=name,
        price=Price.of_dollars(prices[0], prices[1], fields.get("cached_input")),
        parameters=_billions(fields.get("parameters", fields.get("size"))),
        description=str(fields.get("description", fields.get("feature", ""))),
        context=context if isinstance(context, int) else None,
    )


def _billions(size: Any) -> float | None:
    """8, "8B", "8x7B" and "500M" as billions; None for anything else."""
    if isinstance(size, int | float) and not isinstance(size, bool):
        return float(size)
    found = re.fullmatch(r"(?:(\d+)x)?(\d+(?:\.\d+)?)\s*([BM])", str(size), re.IGNORECASE)
    if found is None:
        return None
    return float(found[1] or 1) * float(found[2]) / (1000 if found[3] in "mM" else 1)
