"""A price in a file that names what prompts cost, and not what answers do, or the other way round: what is not said is not free.

The side that is missing comes from where else it is known: a deployment's from the price of its model, else, as a model's, from the list
that ships, the dearest of its deployments that the list knows. Where nobody knows it the file is refused: whoever means that a side costs
nothing writes that it is 0.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

from anabranch.config import from_dict
from anabranch.errors import AnabranchError
from anabranch.gateway.config.prices import listed_price
from anabranch.gateway.config.source import Source
from anabranch.gateway.providers.provider import Provider
from anabranch.routers.money import Price

__all__ = ["with_both_sides"]

Table = dict[str, Any]
SIDES = ("input", "output")

# What names a price of text. One without any is of calls, sound or pictures alone, and one without anything is free.
_OF_TEXT = (*SIDES, "cached_input", "cache_write", "cache_write_1h")


def with_both_sides(model: Table, path: str, source: Source) -> Table:
    """A model whose prices, and those of its deployments, name both sides if they name one of text.

    Args:
        model: in plain form (prices in nano-dollars), whose fields may be wrong otherwise.
        path: where it is in the file.

    Raises ConfigError with file, line and field for a price with a side that nobody knows.
    """
    deployments, out = _tables(model.get("deployments")), dict(model)
    price = model.get("price")
    if isinstance(price, dict):
        # The price of a deployment that has one of its own is no guide to those that have none, unless all have.
        without = [one for one in deployments if one.get("price") is None]
        out["price"] = _whole(price, None, without or deployments, f"{path}.price", source)
    if deployments:
        # Others are told to be no tables.
        out["deployments"] = [
            {**one, "price": _whole(one["price"], out.get("price"), [one], f"{path}.deployments.{at}.price", source)}
            if isinstance(one, dict) and isinstance(one.get("price"), dict)
            else one
            for at, one in enumerate(model["deployments"])
        ]
    return out


def _tables(value: Any) -> list[Table]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _whole(price: Table, outer: Any, deployments: Sequence[Table], path: str, source: Source) -> Table:
    """A price with both sides, its tiers and its long prompts with them."""
    out = dict(price)
    lacking = _lacking(price)
    for side in lacking:
        known = outer.get(side) if isinstance(outer, dict) else None
        if known is None:
            found = _listed(deployments)
            if found is None:
                # What is wrong with the provider is told instead.
                return price
            if not found:
                _refuse(price, lacking, path, source)
            known = max(getattr(one, side) for one in found)
        out[side] = known
    if isinstance(tiers := out.get("tiers"), dict):
        out["tiers"] = {
            name: _whole(tier, out, (), f"{path}.tiers.{name}", source) if isinstance(tier, dict) else tier
            for name, tier in tiers.items()
        }
    if isinstance(out.get("long"), dict):
        out["long"] = _whole(out["long"], out, (), f"{path}.long", source)
    return out


def _lacking(price: Table) -> list[str]:
    """Sides that are missing."""
    return [side for side in SIDES if side not in price] if any(name in price for name in _OF_TEXT) else []


def _listed(deployments: Sequence[Table]) -> list[Price] | None:
    """Of those deployments that the list that ships knows; None if a provider cannot be read."""
    try:
        found = [listed_price(from_dict(Provider.Config, one.get("provider"))) for one in deployments]
    except AnabranchError:
        return None
    known = [one for one in found if one is not None]
    # What costs nothing, such as a model of one's own, is no guide to one that nobody knows.
    return known if len(known) == len(found) else [one for one in known if one != Price()]


def _refuse(price: Table, lacking: Sequence[str], path: str, source: Source) -> NoReturn:
    named = [f"{name}_usd" for name in _OF_TEXT if name in price]
    missing = [f"{side}_usd" for side in lacking]
    source.fail(
        f"{path} gives {' and '.join(named)}, but no {' and no '.join(missing)}, and the price list that ships does not know the model; "
        f"write {' and '.join(missing)} too ({missing[-1]} = 0 if {'answers cost' if lacking[-1] == 'output' else 'prompts cost'} nothing)",
        path,
    )
