"""`merge`: what an adapter makes of the matrices that it stands beside, in their place; and `unmerge`: the matrices of before."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from anabranch.adapters.attached import ATTACHED, Attached, attached_on, configs_of, forget, our_layers, put_on
from anabranch.adapters.graft import check_pools, layers_of, strip, with_layers
from anabranch.adapters.names import Place
from anabranch.adapters.numbers import Numbers
from anabranch.adapters.put_on import Lifted, lift, put_back
from anabranch.adapters.routed import RoutedLowRank
from anabranch.adapters.saving import adapter_of
from anabranch.adapters.taking_in import give_back, take_in
from anabranch.adapters.whole import state_of, tensor_in
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder

__all__ = ["merge", "unmerge"]

M = TypeVar("M", bound=nn.Module)
# How a model remembers what was merged that `load_peft` did not put on.
_OWN = "_merged_layers"
# A tensor of ours, where in it, and what goes there.
_Written = tuple[str, tuple[int | slice, ...], Tensor]


@torch.no_grad()
def merge(model: M, *, keep: bool = True) -> M:
    """Let the matrices take in the adapter that stands beside them, in place, in the types that they have; the layers beside them go.

    The adapter may be of `load_peft`, or layers that `put_on`, `read_own` or `merge_task` left beside.

    The model then runs, converts and saves as one that never had an adapter.

    Args:
        model: with an adapter: one of ours, or any that `put_on` put it onto.
        keep: keep what the matrices were, in as much memory again, so that `unmerge` gives it back to the bit. Where not, the model forgets
            that it had an adapter.

    Raises ConfigError where there is no adapter, it is merged already, no matrix can take in its kind, routers choose among adapters, a
    matrix is stored in few bits, or its type cannot hold what it would be; the model is as it was then.
    """
    _check_unrouted(model)
    if _has_own(model):
        return _merge_own(model, keep=keep)
    if not isinstance(model, Decoder):
        raise ConfigError(
            f"the {type(model).__name__} has no adapter; put_on, read_own or load_mixture put one onto it"
        )
    attached = attached_on(model)
    if attached.merged is not None:
        raise ConfigError("the adapter is merged already")
    adapter = adapter_of(model)
    layers = our_layers(attached.names, adapter, model.config)
    if adapter.prompt_MW is not None or not all(numbers.merges for numbers in layers.values()):
        raise ConfigError(f"the adapter is {adapter.what}, which no matrix can take in; leave it beside")
    state = state_of(model)
    for name, _, made in _written(state, attached, layers):
        if not made.isfinite().all():
            kind = str(made.dtype).removeprefix("torch.")
            raise ConfigError(
                f"{name} with the adapter in it has numbers that {kind} cannot hold; leave it beside, or load the model in float32"
            )
    strip(model)
    attached.base = []
    for name, where, made in _written(state, attached, layers):
        target = tensor_in(state, name)[where]
        if keep:
            attached.base.append((name, where, target.detach().clone()))
        target.copy_(made)
    attached.merged = adapter
    if not keep:
        forget(model)
    return model


@torch.no_grad()
def unmerge(model: M) -> M:
    """Give the matrices what they were before `merge`, to the bit, and put the adapter beside them again.

    What they have learned meanwhile is lost. Raises ConfigError where there is no adapter, it is not merged, or a matrix is stored in few
    bits by now; the model is as it was then.
    """
    if _has_own(model):
        return _unmerge_own(model)
    if not isinstance(model, Decoder):
        raise ConfigError(f"the {type(model).__name__} has no adapter that was merged")
    attached = attached_on(model)
    if attached.merged is None:
        raise ConfigError("the adapter is not merged")
    layers = our_layers(attached.names, attached.merged, model.config)
    state = state_of(model)
    targets = [tensor_in(state, name)[where] for name, where, _ in attached.base]
    made = with_layers(
        model.config, configs_of(attached.merged, layers, trainable=attached.trainable), attached.names.parts
    )
    check_pools(model, made)
    for target, (_, _, before) in zip(targets, attached.base, strict=True):
        target.copy_(before)
    put_on(model, made, layers, trainable=attached.trainable)
    attached.merged, attached.base = None, []
    return model


@dataclass(frozen=True, eq=False)
class _Own:
    """What was merged that `load_peft` did not put on: the layers, and what matrices were, by part."""

    lifted: Lifted
    before: Mapping[str, list[Tensor]]


def _has_own(model: nn.Module) -> bool:
    """Whether an adapter is on the model, or in its matrices, that `load_peft` did not put on."""
    return hasattr(model, _OWN) or (getattr(model, ATTACHED, None) is None and bool(layers_of(model)))


def _merge_own(model: M, *, keep: bool) -> M:
    if hasattr(model, _OWN):
        raise ConfigError("the adapter is merged already")
    before = take_in(model)
    lifted = lift(model)
    if keep:
        object.__setattr__(model, _OWN, _Own(lifted, before))
    return model


def _unmerge_own(model: M) -> M:
    own: _Own | None = getattr(model, _OWN, None)
    if own is None:
        raise ConfigError("the adapter is not merged")
    if layers_of(model):
        raise ConfigError("the model has another adapter since it was merged; take that one off first")
    put_back(model, own.lifted)
    try:
        give_back(model, own.before)
    except ConfigError:
        lift(model)
        raise
    object.__delattr__(model, _OWN)
    return model


def _check_unrouted(model: nn.Module) -> None:
    """Raise ConfigError where routers choose: what a token gets is known with the token alone."""
    for part, layer in layers_of(model).items():
        if isinstance(layer, RoutedLowRank) and layer.router is not None:
            raise ConfigError(
                f"{part} has experts that a router chooses: which experts a token has depends on the token, so they cannot be merged; "
                "mu(model) makes one adapter of their average, static_mixture(model, weights) one of a mixture"
            )


def _written(state: Mapping[str, Any], attached: Attached, layers: Mapping[str, Numbers]) -> Iterator[_Written]:
    """What becomes of each matrix, and of its bias where that changes. Raises ConfigError for one that is stored in few bits."""
    for part, numbers in layers.items():
        place = attached.names.of_part(part)
        weight_OC, (name, bias_O) = tensor_in(state, place.tensor)[place.where], _bias(state, place)
        made_OC, made_O = numbers.merged(weight_OC, bias_O)
        yield place.tensor, place.where, made_OC
        if made_O is not None and made_O is not bias_O:
            yield name, place.where, made_O


def _bias(state: Mapping[str, Any], place: Place) -> tuple[str, Tensor | None]:
    """The bias of a matrix, of the same rows, and its name; None where it has none, as those of experts."""
    name = f"{place.tensor.removesuffix('weight')}bias"
    found = state.get(name, state.get(f"{place.tensor.removesuffix('weight')}matrix.bias"))
    return name, None if found is None or not place.tensor.endswith(".weight") else found[place.where]
