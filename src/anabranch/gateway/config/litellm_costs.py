"""Moving in from LiteLLM: what its prices are called, and which price is a whole model's."""

from decimal import Decimal
from typing import Any

from anabranch.config import from_dict
from anabranch.gateway.config.prices import listed_price
from anabranch.gateway.providers.provider import Provider
from anabranch.routers.money import MOST_NANO, NANO, Price

Table = dict[str, Any]

# Dollars a token -> nano-dollars a million tokens.
NANO_MILLION = 10**15

# Dollars a token: what a price in a file of ours may be.
MOST_PRICE = Decimal(MOST_NANO // NANO) / 10**6

# Prices, by what they are called there: dollars a token.
COSTS = {
    "input_cost_per_token": "input",
    "output_cost_per_token": "output",
    "cache_read_input_token_cost": "cached_input",
    "cache_creation_input_token_cost": "cache_write",
    "cache_creation_input_token_cost_above_1hr": "cache_write_1h",
    "input_cost_per_audio_token": "audio_input",
    "output_cost_per_audio_token": "audio_output",
    "input_cost_per_image_token": "image_input",
    "output_cost_per_image_token": "image_output",
}


def completed(own: Table, known: Price) -> Table:
    """A price as an entry gives it; what it does not say of prompts and answers is as known."""
    return {"input": known.input, "output": known.output, **own}


def hoist_price(model: Table) -> None:
    """The first price is the model's, and deployments keep what differs from it.

    A deployment that has none is given the dearest of the others, unless the list that ships knows its own, or nothing is billed there.
    """
    given = [one["price"] for one in model["deployments"] if "price" in one]
    without = [one for one in model["deployments"] if "price" not in one]
    if not given or any(_is_known(one) for one in without):
        return
    price = max(given, key=lambda one: from_dict(Price, one).cost(1000, 500)) if without else given[0]
    if without and from_dict(Price, price).is_free:
        return
    model["price"] = price
    for one in model["deployments"]:
        if one.get("price") == price:
            del one["price"]


def _is_known(deployment: Table) -> bool:
    """Whether the list that ships knows what it costs."""
    return listed_price(from_dict(Provider.Config, deployment["provider"])) is not None
