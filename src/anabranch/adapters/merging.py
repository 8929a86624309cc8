"""`merge`: an adapter's numbers into the matrices that it stands beside, and `unmerge`: out of them again."""

from collections.abc import Iterable

import torch
from torch import Tensor

from anabranch.adapters.attached import attached_on, configs_of, our_pairs, put_on
from anabranch.adapters.graft import check_pools, layers_of, strip, with_layers
from anabranch.adapters.names import Names, Place
from anabranch.adapters.routed import RoutedLowRank
from anabranch.adapters.saving import adapter_of
from anabranch.adapters.whole import tensor_of
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder

__all__ = ["merge", "unmerge"]


@torch.no_grad()
def merge(model: Decoder) -> Decoder:
    """Add the adapter to the matrices that it stands beside, in place, in the types that they have; the layers beside them go.

    The model then runs, converts and saves as one that never had an adapter; `unmerge` takes the numbers out again, to the rounding of
    the matrices' type.

    What is added and taken out is rounded each time, relative to the greater of matrix and adapter: an adapter that is far greater than
    the matrices leaves little of them.

    Raises ConfigError where there is no adapter, it is merged already, a matrix is stored in few bits, its type cannot hold the sum, or
    routers choose among adapters.
    """
    _check_unrouted(model)
    attached = attached_on(model)
    if attached.merged is not None:
        raise ConfigError("the adapter is merged already")
    adapter = adapter_of(model)
    pairs = our_pairs(attached.names, adapter, model.config)
    _check_parts(model, attached.names, pairs)
    for part, pair in pairs.items():
        place = attached.names.of_part(part)
        found = _sum(model, place, pair.delta())
        if not found.isfinite().all():
            kind = str(found.dtype).removeprefix("torch.")
            raise ConfigError(
                f"{place.tensor} with the adapter in it has numbers that {kind} cannot hold; leave it beside, or load the model in float32"
            )
    strip(model)
    for part, pair in pairs.items():
        _add(model, attached.names.of_part(part), pair.delta())
    attached.merged = adapter
    return model


@torch.no_grad()
def unmerge(model: Decoder) -> Decoder:
    """Take what `merge` added out of the matrices, and put the adapter beside them again.

    Raises ConfigError where there is no adapter, it is not merged, or a matrix is stored in few bits by now; the model is as it was then.
    """
    attached = attached_on(model)
    if attached.merged is None:
        raise ConfigError("the adapter is not merged")
    names = attached.names
    pairs = our_pairs(names, attached.merged, model.config)
    _check_parts(model, names, pairs)
    made = with_layers(model.config, configs_of(pairs), names.parts)
    check_pools(model, made)
    for part, pair in pairs.items():
        _add(model, names.of_part(part), -pair.delta())
    put_on(model, made, pairs, trainable=attached.trainable)
    attached.merged = None
    return model


def _check_unrouted(model: Decoder) -> None:
    """Raise ConfigError where routers choose: what a token gets is known with the token alone."""
    for part, layer in layers_of(model).items():
        if isinstance(layer, RoutedLowRank) and layer.router is not None:
            raise ConfigError(
                f"{part} has experts that a router chooses: which experts a token has depends on the token, so they cannot be merged; "
                "mu(model) makes one adapter of their average, static_mixture(model, weights) one of a mixture"
            )


def _check_parts(model: Decoder, names: Names, parts: Iterable[str]) -> None:
    """Raise ConfigError where one of them cannot be added to, before any is."""
    for part in parts:
        tensor_of(model, names.of_part(part).tensor)


def _add(model: Decoder, place: Place, delta_OC: Tensor) -> None:
    tensor_of(model, place.tensor)[place.where].copy_(_sum(model, place, delta_OC))


def _sum(model: Decoder, place: Place, delta_OC: Tensor) -> Tensor:
    """What the matrix is with ``delta_OC``, summed in the wider type and rounded to its own."""
    part = tensor_of(model, place.tensor)[place.where]
    wide = torch.promote_types(part.dtype, delta_OC.dtype)
    return (part.to(wide) + delta_OC.to(part.device, wide)).to(part.dtype)
