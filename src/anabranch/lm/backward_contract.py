"""The contract of backward passes: whatever is differentiated, in which order and how often, gives what one plain pass gives.

`anabranch.testing` checks it for every feed-forward design and every kind of streams. Each check raises AssertionError that says what
is broken.
"""
# Shapes: B batch, L positions, D width

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.errors import AnabranchError
from anabranch.lm.decoder import Decoder
from anabranch.routing.balance import LoadCounter

__all__ = ["check_gradients", "check_second_derivatives", "gradients_of_training"]

# The same numbers are summed in another order.
TOLERANCE = 1e-4
# Length of a step of all parameters together: float32 resolves it, and decisions rarely change within it.
STEP = 1e-4
# Batches that are tried: in some a decision changes within the step, where derivatives jump.
BATCHES = 6
# Tolerance of a difference quotient in float32.
CURVATURE_TOLERANCE = 0.02

Gradients = dict[str, Tensor]


def gradients_of_training(model: nn.Module, token_BL: Tensor, call: Callable[..., Any] | None = None) -> Gradients:
    """Gradients of one training pass by name; loads start from zero, randomness from one seed. ``call`` (default: model) runs it."""
    _begin(model)
    run = model if call is None else call
    run(token_BL, token_BL.roll(-1, 1)).loss.backward()
    return _collected(model)


def check_gradients(model: Decoder, token_BL: Tensor) -> None:
    """Passes that take a part, end early, come twice or from two losses, over one forward pass; the first two with recompute as well."""
    model.train()
    plain = gradients_of_training(model, token_BL)
    for check in (_check_partial, _check_stopped, _check_twice, _check_two_losses):
        check(model, token_BL, plain, "")
    model.recompute = True
    for check in (_check_partial, _check_stopped):
        check(model, token_BL, plain, "with recompute, ")
    model.recompute = False


def _check_partial(model: Decoder, token_BL: Tensor, plain: Gradients, how: str) -> None:
    _begin(model)
    loss = model(token_BL, token_BL.roll(-1, 1)).loss
    name, first = _first_that_learns(model)
    torch.autograd.grad(loss, [first], retain_graph=True)
    loss.backward()
    _same(model, plain, f"{how}after the gradient of {name} alone was asked for")


def _check_stopped(model: Decoder, token_BL: Tensor, plain: Gradients, how: str) -> None:
    _begin(model)
    with _outputs_of(model.embedding) as seen:
        loss = model(token_BL, token_BL.roll(-1, 1)).loss
    # With a frozen embedding, a backward pass ends at what learns.
    name, end = ("the embedding's output", seen[0]) if seen[0].requires_grad else _first_that_learns(model)
    handle = end.register_hook(_stop)
    try:
        loss.backward(retain_graph=True)
    except _StoppedError:
        pass
    else:
        raise AssertionError(f"{name} gets no gradient")
    handle.remove()
    model.zero_grad()
    loss.backward()
    _same(model, plain, f"{how}after a backward pass that an exception ended")


def _check_twice(model: Decoder, token_BL: Tensor, plain: Gradients, how: str) -> None:
    _begin(model)
    loss = model(token_BL, token_BL.roll(-1, 1)).loss
    loss.backward(retain_graph=True)
    loss.backward()
    double = {name: 2 * gradient for name, gradient in plain.items()}
    _same(model, double, f"{how}after two backward passes over one graph")


def _check_two_losses(model: Decoder, token_BL: Tensor, plain: Gradients, how: str) -> None:
    found = []
    for at_once in (True, False):
        _begin(model)
        with _outputs_of(*model.blocks[len(model.blocks) // 2 :]) as seen:
            loss = model(token_BL, token_BL.roll(-1, 1)).loss
        other = next(y_BLD for y_BLD in seen if y_BLD.requires_grad).square().mean()
        if at_once:
            (loss + other).backward()
        else:
            other.backward(retain_graph=True)
            loss.backward()
        found.append(_collected(model))
    _same(model, found[0], f"{how}of two losses, one backward pass each instead of one for their sum,")


def check_second_derivatives(model: Decoder, token_BL: Tensor) -> None:
    """``create_graph=True`` gives right second derivatives, with and without recompute, or an error of ours that says what to do.

    Right is what a difference quotient along the gradient says. Where decisions change within its step it says nothing; that is tried
    in a few batches.
    """
    model.train()
    for number in range(BATCHES):
        batch_BL = (token_BL + 7 * number) % model.config.vocab_size
        try:
            curvature, direction = _curvature(model, batch_BL)
        except AnabranchError:
            return
        except RuntimeError as problem:
            raise AssertionError(
                f"it has no second derivatives, and the error does not say what to do: {problem}"
            ) from problem
        expected = _difference(model, batch_BL, direction)
        if abs(curvature - expected) <= CURVATURE_TOLERANCE * max(abs(expected), 1e-3):
            break
    else:
        raise AssertionError(
            f"the second derivative along the gradient is {curvature}; by differences it is {expected}"
        )
    model.recompute = True
    again, _ = _curvature(model, batch_BL)
    model.recompute = False
    if abs(again - curvature) > TOLERANCE * max(1.0, abs(curvature)):
        raise AssertionError(f"with recompute, the second derivative is {again}; it is {curvature} without")


def _curvature(model: Decoder, token_BL: Tensor) -> tuple[float, list[Tensor]]:
    """Slope of half the gradient's squared size along the gradient, and that direction, of length 1."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _begin(model)
    loss = model(token_BL, token_BL.roll(-1, 1)).loss
    first = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    size = sum(gradient.square().sum() for gradient in first) / 2
    assert isinstance(size, Tensor)
    # torch.autograd.grad would pass over an error in the graph of gradients in silence; backward does not.
    size.backward()
    length = (2 * size.detach()).sqrt()
    direction = [gradient.detach() / length for gradient in first]
    second = [parameter.grad for parameter in parameters]
    return sum(float((a * b).sum()) for a, b in zip(second, direction, strict=True) if a is not None), direction


def _difference(model: Decoder, token_BL: Tensor, direction: list[Tensor]) -> float:
    """The same by differences."""
    parameters, sizes = [parameter for parameter in model.parameters() if parameter.requires_grad], []
    saved = [parameter.detach().clone() for parameter in parameters]
    for step in (STEP, -STEP):
        with torch.no_grad():
            for parameter, start, way in zip(parameters, saved, direction, strict=True):
                parameter.copy_(start + step * way)
        found = gradients_of_training(model, token_BL)
        sizes.append(sum(float(gradient.double().square().sum()) for gradient in found.values()) / 2)
    with torch.no_grad():
        for parameter, start in zip(parameters, saved, strict=True):
            parameter.copy_(start)
    return (sizes[0] - sizes[1]) / (2 * STEP)


class _StoppedError(Exception):
    pass


def _stop(gradient: Tensor) -> None:
    raise _StoppedError


@contextmanager
def _outputs_of(*modules: nn.Module):
    """What modules return from now on, in order."""
    seen: list[Tensor] = []
    handles = [module.register_forward_hook(lambda module, args, output: seen.append(output)) for module in modules]
    yield seen
    for handle in handles:
        handle.remove()


def _first_that_learns(model: nn.Module) -> tuple[str, nn.Parameter]:
    """With its name: the embedding, unless that is frozen."""
    return next((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _begin(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, LoadCounter):
            module.forget()
    model.zero_grad()
    torch.manual_seed(0)


def _collected(model: nn.Module) -> Gradients:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def _same(model: nn.Module, expected: Gradients, when: str) -> None:
    found = _collected(model)
    if found.keys() != expected.keys():
        raise AssertionError(f"{when} other parameters have gradients: {sorted(found.keys() ^ expected.keys())}")
    for name, gradient in expected.items():
        what = f"{when} the gradient of {name} is another: "
        torch.testing.assert_close(found[name], gradient, rtol=TOLERANCE, atol=TOLERANCE, msg=what.__add__)
