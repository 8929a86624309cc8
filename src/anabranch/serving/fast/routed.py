"""Which routed layers the compiled step knows, by what they say of themselves (`anabranch.nn.description`), and what it is told of them."""
# Shapes: E destinations, D width, P width of a recurrent router's state

from typing import Any

import torch
from torch import Tensor

from anabranch.nn import SwiGLU
from anabranch.nn.description import Dense, FeedForwardForm, Loops, Passes
from anabranch.nn.kernels import packed as native
from anabranch.nn.kernels.operands import address
from anabranch.nn.linear import is_plain
from anabranch.nn.packed import WIDE, Packed
from anabranch.routing.description import ScoreForm, described
from anabranch.routing.router import Router
from anabranch.routing.select import TopK
from anabranch.serving.fast.layout import CLoops, CRecurrence, floats

__all__ = ["form_of", "loops", "recurrence", "score_of", "why_not_run"]


def why_not_run(layer: Any) -> str | None:
    """Why the compiled step cannot run this feed-forward, or None if it can."""
    form = described(layer)
    if form is None:
        return f"the feed-forward is a {type(layer).__name__}"
    if isinstance(form, str):
        return form
    if isinstance(form, Dense):
        return None
    if isinstance(form, Loops):
        reason = _of_router(form.router)
        return reason or (None if score_of(form.router).cell is None else "virtual experts have a recurrent router")
    if not isinstance(form, Passes):
        return f"the feed-forward is described as {type(form).__name__}"
    if type(form.shared) not in (SwiGLU, type(None)) or not (form.shared_gate is None or is_plain(form.shared_gate)):
        return "the shared experts were replaced"
    return next((why for router in form.routers if (why := _of_router(router))), None)


def form_of(layer: Any) -> FeedForwardForm:
    """What a supported layer says of itself."""
    return described(layer)


def score_of(router: Any) -> ScoreForm:
    """What the score of a supported router says of itself."""
    return described(router.score)


def _of_router(router: Any) -> str | None:
    if type(router) is not Router or type(router.select) is not TopK:
        return "a router is not a plain top-k"
    if router.candidates is not None and not router.candidates.only_in_training:
        return "the router's candidates change"
    if router.shifts_by_scores:
        return "a router's bias depends on the scores"
    score = described(router.score)
    if score is None:
        return f"a router scores by {type(router.score).__name__}"
    if isinstance(score, str) or score.cell is None:
        return score if isinstance(score, str) else None
    if any(size % WIDE for size in score.cell.projector_PD.shape):
        return f"a recurrent router's state is {score.cell.state_dim} wide; the kernels take multiples of {WIDE}"
    return None


def recurrence(score: ScoreForm, keep: list[Tensor], packed: dict[Tensor, Packed]) -> CRecurrence:
    """The cell before the router's matrix, an empty one for a linear score; ``packed`` holds what routers share."""
    cell = score.cell
    if cell is None:
        return CRecurrence()
    for weight in (cell.projector_PD, cell.weight_ih, cell.weight_hh):
        if weight not in packed:
            packed[weight] = Packed.pack(weight, "float32")
    gates = 3 * cell.state_dim
    return CRecurrence(
        *(native.matrix(packed[weight]) for weight in (cell.projector_PD, cell.weight_ih, cell.weight_hh)),
        floats(cell.bias_ih, keep, gates),
        floats(cell.bias_hh, keep, gates),
        int(cell.hands_on),
    )


def loops(form: Loops, keep: list[Tensor]) -> CLoops:
    """The loop gate of a feed-forward used wide and deep, and where its virtual experts begin."""
    keep.append(torch.tensor(form.starts, dtype=torch.int32))
    first, (most, dim) = address(keep[-1], "int32", form.router.num_destinations), form.gate_TD.shape
    return CLoops(floats(form.gate_TD, keep, most, dim), first, most, form.width, form.threshold)
