"""The contract of replay: a trace that is replayed gives the passes that it was recorded in, to the bit, and no router runs.

`anabranch.testing` checks it for every feed-forward design and every kind of streams. Each check raises AssertionError that says what
is broken; a model in which nothing decides passes. What decides and is no `Router` (`TakesOverrides`: a loop gate) is held to it likewise.
"""
# Shapes: B batch, L positions, V vocabulary

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.lm.decoder import Decoder
from anabranch.routing import record_routing, replay_routing
from anabranch.routing.balance import LoadCounter
from anabranch.routing.discovery import find_routers, takes_overrides

__all__ = ["check_partial_replay", "check_replay", "check_replayed_training"]

# Gradients are summed in another order.
TOLERANCE = 1e-4


def check_replay(model: Decoder, token_BL: Tensor) -> None:
    """Evaluation, padded, in another order, and cached."""
    # What decides may mix all destinations in training, and decide in an evaluation only.
    model.eval()
    if not _deciders(model):
        return
    mask_BL = torch.ones_like(token_BL, dtype=torch.bool)
    mask_BL[0, :4] = False

    def run() -> list[Tensor]:
        found = [model(token_BL, token_mask_BL=mask_BL).logits_BLV, model(token_BL.flip(1)).logits_BLV]
        if model.is_causal:
            cache, length = model.new_cache(token_BL.shape[1]), token_BL.shape[1]
            for start, end in ((0, 5), (5, 6), (6, length)):
                found.append(model(token_BL[:, start:end], cache=cache).logits_BLV)
        return found

    with torch.no_grad():
        with record_routing(model) as recorder:
            expected = run()
        trace = recorder.trace()
        with replay_routing(model, trace), record_routing(model) as again, _no_scores(model):
            replayed = run()
    for ours_BLV, expected_BLV in zip(replayed, expected, strict=True):
        _is(torch.equal(ours_BLV, expected_BLV), "a replayed trace gives other logits")
    _is(again.trace().table.equals(trace.table), "what is replayed is recorded as something else")


def check_partial_replay(model: Decoder, token_BL: Tensor) -> None:
    """The first, the last, or all routers but the first replayed; and all, with some of them weighing by their own scores inside."""
    model.eval()
    routers = {name: module for name, module in find_routers(model).items() if takes_overrides(module)}
    if not routers:
        return
    names = list(routers)
    picked = dict.fromkeys((tuple(names[:1]), tuple(names[1:]), tuple(names[-1:])))
    with torch.no_grad():
        with record_routing(model) as recorder:
            expected_BLV = model(token_BL).logits_BLV
        for part in ({name: routers[name] for name in some} for some in picked if some):
            with record_routing(model, routers=part) as of_part:
                model(token_BL)
            which = ", ".join(part)
            with replay_routing(model, of_part.trace(), routers=part):
                _is(
                    torch.equal(model(token_BL).logits_BLV, expected_BLV), f"replay of {which} alone gives other logits"
                )
            with (
                replay_routing(model, recorder.trace()),
                replay_routing(model, of_part.trace(), routers=part, weights="own"),
            ):
                replayed_BLV = model(token_BL).logits_BLV
            message = f"all replayed, and {which} with weights of its own inside, gives other logits"
            _is(torch.equal(replayed_BLV, expected_BLV), message)


def check_replayed_training(model: Decoder, token_BL: Tensor) -> None:
    """Replayed, a training pass has the same cross-entropy to the bit; with weights of its own it learns as if it had chosen."""
    model.train()
    if not _deciders(model):
        return
    model.recompute = True
    with record_routing(model) as recorder:
        cross_entropy, loss, gradients = _trained(model, token_BL)
    before = _loads(model)
    with replay_routing(model, recorder.trace()), _no_scores(model):
        replayed, *_ = _trained(model, token_BL)
    _is(torch.equal(replayed, cross_entropy), f"replayed, the cross-entropy of {cross_entropy} is {replayed}")
    for load_E, after_E in zip(before, _loads(model), strict=True):
        _is(torch.equal(load_E, after_E), "a replayed decision is counted in a load")
    with replay_routing(model, recorder.trace(), weights="own", learn=True):
        _, again, own_gradients = _trained(model, token_BL)
    _is(torch.equal(again, loss), f"replayed with its own weights, the loss of {loss} is {again}")
    for name, gradient in gradients.items():
        is_close = torch.allclose(own_gradients[name], gradient, rtol=TOLERANCE, atol=TOLERANCE)
        _is(is_close, f"replayed with its own weights, the gradient of {name} differs")


def _trained(model: Decoder, token_BL: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(cross-entropy, loss, gradients) of a training pass; randomness is from one seed."""
    torch.manual_seed(0)
    model.zero_grad()
    output = model(token_BL, token_BL.roll(-1, 1))
    output.loss.backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }
    return output.cross_entropy, output.loss.detach(), gradients


@contextmanager
def _no_scores(model: nn.Module) -> Iterator[None]:
    """No router may ask its score. A gate that mixes by its scores what was decided says so (``mixes_by_scores``), and may."""

    def refuse(*given: Any) -> Tensor:
        raise AssertionError("a router runs though all is replayed")

    scores: list[Any] = [
        module.score
        for module in _deciders(model)
        if hasattr(module, "score") and not getattr(module, "mixes_by_scores", False)
    ]
    for score in scores:
        score.project = refuse
    try:
        yield
    finally:
        for score in scores:
            del score.project


def _deciders(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if takes_overrides(module)]


def _loads(model: nn.Module) -> list[Tensor]:
    return [module.load_E.clone() for module in model.modules() if isinstance(module, LoadCounter)]


def _is(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
