"""What layers say of themselves to code that computes the same faster, see `anabranch.routing.description`.

Outside of training, with x the residual stream and norm the block's:

    Dense    x + W2 (silu(W1 norm(x)) * W3 norm(x))
    Passes   x = x + f_t(norm(x)), t = 1, 2, ...: a router for each over one pool, and shared experts
    Loops    the dense layer's matrices used wide (a router of slices of hidden units) and deep (a gate of repetitions)

and attentions:

    WeighedHeads    what another attention's heads give, each times a number of the token's, which is 0 for some
"""
# Shapes: D width, T most loops, H heads of an attention, M of them routed, S shared

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from anabranch.routing.router import Router

__all__ = ["Dense", "FeedForwardForm", "Loops", "Passes", "WeighedHeads", "passes_as"]


@dataclass(frozen=True)
class Dense:
    """Attributes: ``w13``, W1 over W3 in one linear layer; ``w2``."""

    w13: Any
    w2: Any


@dataclass(frozen=True)
class Passes:
    """One pass or several.

    Attributes:
        routers: of each pass, in order; one may stand several times.
        experts: the pool.
        shared: experts of every token, None without any.
        shared_gate: the linear layer before the sigmoid that scales their output; None for 1.
        shift_D: is added to what routers and experts see; None for nothing.
    """

    routers: tuple[Router, ...]
    experts: Any
    shared: Any = None
    shared_gate: Any = None
    shift_D: Tensor | None = None


@dataclass(frozen=True)
class Loops:
    """With lambda = (T - loops) / T of a token: lambda times the width path, and the rest of what its loops made.

    Attributes:
        w13, w2: as of `Dense`.
        router: of the virtual experts, by the stream without a norm.
        starts: the first hidden unit of each virtual expert.
        width: hidden units of each.
        gate_TD: the largest logit of the stream says how many loops.
        threshold: tokens with lambda up to this have no width path.
    """

    w13: Any
    w2: Any
    router: Router
    starts: tuple[int, ...]
    width: int
    gate_TD: Tensor
    threshold: float


@dataclass(frozen=True)
class WeighedHeads:
    """With [a, b] = factor * softmax(clamp(pair x)): shared heads count a, routed ones b times g(routed x + bias).

    g is the part above 0, or of a softmax k times the share of each of the k largest among these.

    Attributes:
        attention: what gives the heads; the first S are shared.
        pair_2D, routed_MD, bias_M: the matrices, and what is added to the last; None for nothing.
        shared_SD: shared heads also count S times their share of softmax(shared x); None for alike.
        top_k: k; 0 for the part above 0.
        floor, cap: bounds of routed x + bias where g is the part above 0.
        most_pair: bound of pair x, either way.
        factor: see above.
    """

    attention: Any
    pair_2D: Tensor
    routed_MD: Tensor
    bias_M: Tensor | None
    shared_SD: Tensor | None
    top_k: int
    floor: float
    cap: float
    most_pair: float
    factor: float


FeedForwardForm = Dense | Passes | Loops


def passes_as(form: FeedForwardForm | str, **changes: Any) -> FeedForwardForm | str:
    """What a layer under another says of itself, with some fields of `Passes` changed; where it gives a reason, the reason."""
    return replace(form, **changes) if isinstance(form, Passes) else form
