"""What the checks share."""

import copy
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.config import Config, from_dict, to_dict
from anabranch.routing import (
    Router,
    Routing,
)
from anabranch.routing.balance import LoadCounter

NUM_ITEMS = 24
VOCAB_SIZE = 61


def expect(condition: Any, message: str) -> None:
    """Raise AssertionError with ``message`` unless ``condition``."""
    if not condition:
        raise AssertionError(message)


def expect_close(ours: Tensor, expected: Tensor, what: str, tolerance: float = 1e-4) -> None:
    """Two tensors are the same within a relative and absolute ``tolerance``."""
    torch.testing.assert_close(
        ours, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what} differ: {text}"
    )


def num_parameters(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def check_config(config: Config) -> None:
    """A config reads back equal from JSON."""
    again = from_dict(type(config), json.loads(json.dumps(to_dict(config))))
    expect(again == config, f"a config read back from JSON is {again}, it was {config}")


def check_same_state(ours: nn.Module, expected: nn.Module, how: str) -> None:
    """Two modules have the same state, to the bit."""
    ours_state, state = ours.state_dict(), expected.state_dict()
    expect(ours_state.keys() == state.keys(), f"{how}: state dicts have other names")
    for name, value in state.items():
        expect(torch.equal(ours_state[name], value), f"{how}: {name} differs")


def check_has_gradients(module: nn.Module) -> None:
    """Every parameter that learns has a finite gradient, and no other has one."""
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            expect(parameter.grad is None, f"{name} is frozen and gets a gradient")
            continue
        expect(parameter.grad is not None, f"{name} gets no gradient")
        expect(torch.isfinite(parameter.grad).all(), f"the gradient of {name} is not finite")  # type: ignore[arg-type]


def check_copies(module: nn.Module, call: Callable[[Any], Tensor]) -> None:
    """A deep copy and a pickled twin give the same, and are apart from the original."""
    expected = call(module).detach()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        expect(torch.equal(call(twin), expected), "a copy gives something else")
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1.0)
    expect(torch.equal(call(module), expected), "a copy shares parameters with the original")


def loads(model: nn.Module) -> list[Tensor]:
    """What each load counter has counted."""
    return [module.load_E.clone() for module in model.modules() if isinstance(module, LoadCounter)]


@contextmanager
def no_counting(model: nn.Module) -> Iterator[None]:
    """A block in which no load may be counted."""
    before = loads(model)
    yield
    for load_E, after_E in zip(before, loads(model), strict=True):
        expect(torch.equal(load_E, after_E), "an evaluation is counted in a load")


def routers_of(model: nn.Module) -> list[Router]:
    """The routers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, Router)]


def routings_of(model: nn.Module, run: Callable[[], Any], modules: Sequence[nn.Module] | None = None) -> list[Routing]:
    """What each router, or each of ``modules``, returned during ``run``, in order."""
    seen: list[Routing] = []
    handles = [
        router.register_forward_hook(lambda module, args, output: seen.append(output))
        for router in (routers_of(model) if modules is None else modules)
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen
