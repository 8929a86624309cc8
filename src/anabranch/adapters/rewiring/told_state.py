"""The state of a rewired request as JSON: what `anabranch generate` keeps in a file, and a server tells and takes.

    {"kind": "anabranch.rewiring_state", "version": 1, "model": "rt_...", "routers": [...], "delta": [[...], ...],
     "steps": 5, "seconds": 0.4}

A state is of the routers to whose logits its vectors are added, and ``model`` says which these are. It comes from anywhere, so nothing
of it is believed before it is looked at.
"""
# Shapes: S routed layers, E destinations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anabranch.adapters.rewiring.state import MOST_SHIFT, RewiringState
from anabranch.adapters.rewiring.vectors import router_of
from anabranch.bounds import shown
from anabranch.errors import ConfigError
from anabranch.routing.discovery import RouterLayer

if TYPE_CHECKING:
    from anabranch.adapters.rewiring.rerouter import Rerouter

__all__ = ["KIND", "VERSION", "fingerprint_of", "state_from_told", "told_state"]

KIND, VERSION = "anabranch.rewiring_state", 1
_FIELDS = ("kind", "version", "model", "routers", "delta", "steps", "seconds")


def fingerprint_of(layers: Sequence[RouterLayer]) -> str:
    """Of the routers: their names, sizes and numbers. A model has one fingerprint in float32, bfloat16 and few bits."""
    found = hashlib.sha256()
    for layer in layers:
        found.update(f"{layer.name} {router_of(layer).num_destinations}\n".encode())
        if layer.pass_index:
            continue
        for name, value in sorted(layer.router.state_dict().items()):
            found.update(f"{name} {list(value.shape)}\n".encode())
            # As the narrowest type in which weights are held has it.
            plain = value.detach().to("cpu", torch.bfloat16 if value.is_floating_point() else torch.int64)
            found.update(plain.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"rt_{found.hexdigest()[:16]}"


def told_state(rerouter: "Rerouter", state: RewiringState) -> dict[str, Any]:
    """``state`` as JSON has it: S lists of E numbers, each the shortest that reads back the same, and what they are of."""
    return {
        "kind": KIND,
        "version": VERSION,
        "model": rerouter.fingerprint,
        "routers": list(rerouter.names),
        # Of float32 as such: as a float64 each number has ten digits more that say nothing.
        "delta": [[float(str(number)) for number in delta_E.numpy()] for delta_E in state.delta],
        "steps": state.steps,
        "seconds": state.seconds,
    }


def state_from_told(rerouter: "Rerouter", found: Any) -> RewiringState:
    """What `told_state` told, for a request that goes on with it.

    Raises ConfigError for what is no such state, is of another model, or has a number that cannot be.
    """
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise ConfigError(f"it is no state of a rewired request; it must be an object whose kind is {KIND!r}")
    missing = [name for name in _FIELDS if name not in found]
    unknown = [name for name in found if name not in _FIELDS]
    if missing or unknown:
        what = f"has no {missing[0]}" if missing else f"has the field {shown(unknown[0])}, which no state has"
        raise ConfigError(f"it {what}; take a state as it was told")
    if isinstance(found["version"], bool) or found["version"] != VERSION:
        raise ConfigError(f"its version is {shown(found['version'])}; this version of anabranch reads {VERSION}")
    if found["model"] != rerouter.fingerprint or found["routers"] != list(rerouter.names):
        raise ConfigError(
            f"it is of the routers {shown(found['model'])}, and the model's are {rerouter.fingerprint!r}: vectors of one model mean "
            "nothing to another"
        )
    state = rerouter.new_state()
    state.load_state_dict({**found, "delta": _tensors(found["delta"], rerouter, state.delta)})
    state.go_on()
    return state


def _tensors(rows: Any, rerouter: "Rerouter", like: Sequence[Tensor]) -> list[Tensor]:
    if not isinstance(rows, list) or len(rows) != len(like):
        what = f"{len(rows)} lists" if isinstance(rows, list) else shown(rows)
        raise ConfigError(f"its delta is {what}; it must be {len(like)} lists of numbers, one for each router")
    for place, (row, like_E, name) in enumerate(zip(rows, like, rerouter.names, strict=True)):
        if not isinstance(row, list) or len(row) != len(like_E):
            what = f"a list of {len(row)}" if isinstance(row, list) else shown(row)
            raise ConfigError(f"its delta[{place}] is {what}; {name} has {len(like_E)} experts, with a number for each")
        for at, number in enumerate(row):
            # Integers have no end, and nan is beside no number.
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if not is_number or not -MOST_SHIFT <= number <= MOST_SHIFT:
                raise ConfigError(
                    f"its delta[{place}][{at}] is {shown(number)}; it must be a number from {-MOST_SHIFT:,.0f} to {MOST_SHIFT:,.0f}"
                )
    return [torch.tensor(row, dtype=torch.float64) for row in rows]
