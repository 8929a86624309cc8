"""The model of a request for pictures or moderation that names none, as OpenAI's clients may: a default, or the only one of its kind."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from anabranch.errors import InputError
from anabranch.gateway.config.models import ModelConfig
from anabranch.gateway.config.prices import model_price
from anabranch.gateway.providers.openai import OpenAI

if TYPE_CHECKING:
    from anabranch.gateway.config.gateway import GatewayConfig

# Endpoint -> the kind that its models are of. Pictures of pictures are made by those that make pictures.
KIND_OF = {"moderations": "moderations", "images": "images", "image_edits": "images"}
KINDS = ("moderations", "images")

# What models of a kind are called, here or upstream.
_CALLED = {
    "moderations": re.compile(r"moderation|llama-?guard", re.I),
    "images": re.compile(r"\bgpt-image|\bchatgpt-image|\bdall-e|\bflux\b|stable-diffusion", re.I),
}


def default_model(config: "GatewayConfig", endpoint: str, allows: Callable[[str], bool] = lambda model: True) -> str:
    """The model of a request to an endpoint that names none: the default, or for whom that is closed the only one of its kind.

    Args:
        config: of the gateway.
        endpoint: one of `KIND_OF`.
        allows: whether the sender may use a model; one that it may not is not told of.

    Raises InputError where the config has no default for the endpoint, and not exactly one model of its kind.
    """
    kind = KIND_OF[endpoint]
    named = config.default_models.get(kind)
    if named is not None and allows(named):
        return named
    found = [model.name for model in config.models if allows(model.name) and _is_of(kind, model)]
    if len(found) == 1:
        return found[0]
    several = f"several of that kind ({', '.join(found[:5])})" if found else "none that is known to be of that kind"
    raise InputError(f"model is missing, and of the models here {several}; name one, or set default_models.{kind}")


def _is_of(kind: str, model: ModelConfig) -> bool:
    """By what it is called, or that pictures have a price; only of providers that have the endpoint."""
    theirs = [one for one in model.deployments if isinstance(one.provider, OpenAI.Config)]
    names = [model.name, *model.aliases, *(str(one.provider.model) for one in theirs)]
    if theirs and any(_CALLED[kind].search(name) for name in names):
        return True
    return kind == "images" and any(
        (price := model_price(model, one)) is not None and price.image_output is not None for one in theirs
    )
