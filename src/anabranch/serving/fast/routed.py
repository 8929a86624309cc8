"""Which routed layers the compiled step knows, and what it is told of their routers.

A mixture of experts is told as passes: x += f(norm(x)), each with a router. `MoE` and `ReXMoE` are one, Chain-of-Experts several over one
pool. VersatileFFN is a dense feed-forward with a router of slices and a gate of loops.
"""
# Shapes: E destinations, D width, P width of a recurrent router's state

from typing import Any

import torch
from torch import Tensor, nn

from anabranch.experts.chain import Chain
from anabranch.experts.rexmoe import ProgressiveScaling, ReXMoE
from anabranch.experts.rmoe import RecurrentScore
from anabranch.experts.versatile import VersatileFFN
from anabranch.nn import MoE, SwiGLU
from anabranch.nn.kernels import packed as native
from anabranch.nn.kernels.door import address
from anabranch.nn.linear import is_plain
from anabranch.nn.packed import WIDE, Packed
from anabranch.routing.router import Router
from anabranch.routing.score import LinearScore
from anabranch.routing.select import TopK
from anabranch.serving.fast.layout import CLoops, CRecurrence, floats

__all__ = ["loops", "passes_of", "recurrence", "state_width", "why_not_routed"]


def passes_of(layer: Any) -> list[Router]:
    """The router of each pass of a supported layer, in order."""
    if isinstance(layer, VersatileFFN):
        return [layer.paths.router]  # type: ignore[list-item]  # it has a width path
    if not isinstance(layer, Chain):
        return [layer.router]
    routers = layer.routers
    return [routers[number % len(routers)] for number in range(layer.config.iterations)]


def why_not_routed(layer: Any) -> str | None:
    """Why the compiled step cannot run this routed layer, or None if it can."""
    if type(layer) is VersatileFFN:
        return _of_versatile(layer)
    if type(layer) not in (MoE, ReXMoE, Chain):
        return f"the feed-forward is a {type(layer).__name__}"
    config = layer.config
    if isinstance(layer, Chain) and config.iterations > 1 and (config.residual, config.norm) != ("inner", "each"):
        return f"passes have residual {config.residual!r} and norm {config.norm!r}; the kernels know 'inner' and 'each'"
    if config.weight_on != "output":
        return "routing weights act on the experts' inputs"
    if type(layer.shared) not in (SwiGLU, type(None)) or not (layer.shared_gate is None or is_plain(layer.shared_gate)):
        return "the shared experts were replaced"
    return next((why for router in passes_of(layer) if (why := _of_router(router))), None)


def _of_versatile(layer: Any) -> str | None:
    config = layer.config
    if (config.fusion, config.gate, config.norm) != ("difficulty", "hard", "shared"):
        return (
            f"paths have fusion {config.fusion!r}, gate {config.gate!r} and norm {config.norm!r}; the kernels know 'difficulty', 'hard' "
            "and 'shared'"
        )
    router = layer.paths.router
    return _of_router(router) or (
        None if type(router.score) is LinearScore else "virtual experts have a recurrent router"
    )


def _of_router(router: Any) -> str | None:
    if type(router) is not Router or type(router.select) is not TopK:
        return "a router is not a plain top-k"
    candidates = router.candidates
    if candidates is not None and not (
        isinstance(candidates, ProgressiveScaling) and candidates.config.evaluate == "full"
    ):
        return "the router's candidates change"
    if type(router.score) is LinearScore:
        return None
    if type(router.score) is not RecurrentScore:
        return f"a router scores by {type(router.score).__name__}"
    config: Any = router.score.config
    if (config.cell, config.gate, config.logit_residual) != ("gru", "linear", 0.0):
        return "a recurrent router is not a gru behind a linear gate"
    if config.state_dim % WIDE or router.score.recurrence.dim % WIDE:
        return f"a recurrent router's state is {config.state_dim} wide; the kernels take multiples of {WIDE}"
    return None


def state_width(router: Any) -> int:
    """P, 0 for a router without a state."""
    return router.score.config.state_dim if isinstance(router.score, RecurrentScore) else 0


def recurrence(router: Any, keep: list[Tensor], packed: dict[nn.Parameter, Packed]) -> CRecurrence:
    """The cell before the router's matrix, an empty one for a linear score; ``packed`` holds what routers share."""
    score = router.score
    if not isinstance(score, RecurrentScore):
        return CRecurrence()
    cell = score.recurrence
    projector = cell.projector if score.projector is None else score.projector
    assert projector is not None, "one of them has it"
    for weight in (projector, cell.weight_ih, cell.weight_hh):
        if weight not in packed:
            packed[weight] = Packed.pack(weight, "float32")
    gates = 3 * score.config.state_dim
    return CRecurrence(
        *(native.matrix(packed[weight]) for weight in (projector, cell.weight_ih, cell.weight_hh)),
        floats(cell.bias_ih, keep, gates), floats(cell.bias_hh, keep, gates), int(score.config.passing),
    )  # fmt: skip


def loops(layer: Any, keep: list[Tensor]) -> CLoops:
    """The loop gate of a versatile feed-forward and where its virtual experts begin."""
    paths = layer.paths
    keep.append(torch.tensor(paths.starts, dtype=torch.int32))
    first, dim = address(keep[-1], "int32", paths.router.num_destinations), paths.loops.score.weight.shape[-1]
    return CLoops(
        floats(paths.loops.score.weight, keep, paths.num_loops, dim),
        first,
        paths.num_loops,
        paths.width,
        layer.config.width_threshold,
    )
