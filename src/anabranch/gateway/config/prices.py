"""Which price a deployment has: its own, its model's, that of the list that ships, or none that is known."""

from collections.abc import Sequence

from anabranch.gateway.config.models import DeploymentConfig, ModelConfig
from anabranch.gateway.config.price_table import list_price
from anabranch.gateway.providers.provider import Provider
from anabranch.routers.money import Price

# Where providers are that have an address for each region; the list knows them by it.
PLACES = {
    "bedrock": "https://bedrock-runtime.us-east-1.amazonaws.com",
    "vertex": "https://aiplatform.googleapis.com",
}


def deployment_price(model: ModelConfig, one: DeploymentConfig) -> Price | None:
    """Of a deployment of a model; None if nobody says. What nobody bills (mock, engine, replay) is free where it has no price."""
    if one.price is not None:
        return one.price
    return model_price(model, one)


def model_price(model: ModelConfig, one: DeploymentConfig | None = None) -> Price | None:
    """Of a model, as strategies weigh it: its own, else that of its deployments, of several the dearest for a usual call.

    Args:
        model: of the config.
        one: the only deployment to look at; None for all.
    """
    if model.price is not None:
        return model.price
    if one is not None:
        return listed_price(one.provider)
    found = [deployment_price(model, each) for each in model.deployments]
    known = [price for price in found if price is not None]
    return max(known, key=lambda price: price.cost(1000, 500), default=None)


def listed_price(provider: Provider.Config) -> Price | None:
    """Of a provider's model, from the list that ships; None if that does not know it, or nothing says where the provider is."""
    inner = getattr(provider, "provider", None)
    if isinstance(inner, Provider.Config) and provider.owner.is_billed:
        # One that only looks on.
        return listed_price(inner)
    if not provider.owner.is_billed:
        return Price()
    url = getattr(provider, "base_url", None) or PLACES.get(provider.owner.kind)
    return list_price(url, provider.model) if isinstance(url, str) and provider.model else None


def unpriced(models: Sequence[ModelConfig]) -> list[str]:
    """A sentence for each deployment whose price is not known, and what to do about it."""
    return [
        f"deployment {model.deployment_name(at)} of model {model.name} has no price, and the price list that ships does not know "
        f"{one.provider.model or model.name!r}; requests to it are refused where a budget applies. Set price (input_usd and output_usd; "
        "0 if it costs nothing)"
        for model in models
        for at, one in enumerate(model.deployments)
        if deployment_price(model, one) is None
    ]
