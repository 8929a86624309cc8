"""What attention over ranks is told beside tensors, and what all ranks must be told alike."""
# Shapes: S positions of a sequence

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from anabranch.bounds import near_name, shown
from anabranch.cluster.ring.costs import SCHEMES, Topology
from anabranch.cluster.ring.hybrid import Hybrid
from anabranch.cluster.ring.layout import KINDS
from anabranch.cluster.ring.link import Traffic
from anabranch.cluster.ring.pieces import Mask
from anabranch.errors import InputError

__all__ = [
    "LayoutKind",
    "RingOptions",
    "asks_gradients",
    "described",
    "read_documents",
    "read_layout",
    "read_length",
    "read_options",
]

LayoutKind = Literal["contiguous", "zigzag", "stripe"]


@dataclass(frozen=True, kw_only=True)
class RingOptions:
    """What attention over ranks is told beside tensors.

    Attributes:
        scheme: ``auto``, one of `SCHEMES`, or ``hybrid`` (TokenRing inside nodes, a ring of keys between them), which ``auto`` looks at too
            where ``topology`` says which ranks are of a node.
        causal: queries see nothing behind themselves.
        window: positions that a causal query sees, its own among them; None for all.
        softmax_scale: factor on scores; None for 1 / sqrt(D).
        out_dtype: of partial results that travel: None for float32 (float64 of float64), or the type of the inputs.
        topology: what ``auto`` assumes of links, and the nodes of ``hybrid``; None for `Topology()`.
        timeout_s: how long a message may take; None for as long as the group says.
        traffic: counts what is sent and how long it is waited for; None for not at all.
        check: ask first whether all ranks were given the same, which costs one small exchange; without it, ranks that were not wait.
    """

    scheme: str = "auto"
    causal: bool = False
    window: int | None = None
    softmax_scale: float | None = None
    out_dtype: torch.dtype | None = None
    topology: Topology | None = None
    timeout_s: float | None = None
    traffic: Traffic | None = None
    check: bool = True

    @property
    def mask(self) -> Mask:
        """What queries see."""
        return Mask(self.causal, self.window)


def read_options(values: Mapping[str, Any]) -> tuple[RingOptions, str | None]:
    """The options by name, and what is wrong with them, so that a rank can tell the others before it raises.

    What is wrong is left at its default.
    """
    names = [field.name for field in fields(RingOptions)]
    kept: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in values.items():
        if name not in names:
            problems.append(
                f"attention over ranks has no option {name!r}{near_name(name, names)}; use {', '.join(names)}"
            )
            continue
        try:
            kept[name] = _read(name, value)
        except InputError as error:
            problems.append(str(error))
    options = RingOptions(**kept)
    try:
        options.mask  # noqa: B018
    except InputError as error:
        problems.append(str(error))
    return options, problems[0] if problems else None


def _read(name: str, value: Any) -> Any:
    """The value of an option, as what it is compared and used as. Raises InputError for what it cannot be."""
    kinds = {"out_dtype": torch.dtype, "topology": Topology, "traffic": Traffic}
    if name in ("causal", "check"):
        found = 0 if value is None else _whole(value)
        if found not in (0, 1):
            raise InputError(f"{name} is {shown(value)}; use True or False")
        return bool(found)
    if name == "scheme":
        known = ("auto", *SCHEMES, Hybrid.scheme)
        if not isinstance(value, str) or value not in known:
            raise InputError(f"scheme is {shown(value)}; use {', '.join(known)}")
        return known[known.index(value)]
    if value is None:
        return None
    if name == "window":
        if (found := _whole(value)) is None:
            raise InputError(f"window is {shown(value)}; use a whole number of at least 1, or None")
        return found
    if name in ("softmax_scale", "timeout_s"):
        return _number(name, value)
    if not isinstance(value, kinds[name]):
        raise InputError(f"{name} is {shown(value)}; use a {kinds[name].__name__}, or None")
    return value


def _number(name: str, value: Any) -> float:
    """A finite number, which may be a tensor or an array of one."""
    try:
        # Unlike torch, numpy makes no number of an array of one that has dimensions.
        found = float(value.item() if isinstance(value, np.ndarray) and value.size == 1 else value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = math.nan
    if not math.isfinite(found) or (name == "timeout_s" and found <= 0):
        raise InputError(
            f"{name} is {shown(value)}; use a finite number{' above 0' if name == 'timeout_s' else ''}, or None"
        )
    return found


def _whole(value: Any) -> int | None:
    """The whole number that a value is, of Python, of numpy or a tensor of one element, also where its type is that of others (4.0, True).

    None for all else. Ranks compare and use what is found, so that a number is the same whatever its type was.
    """
    if isinstance(value, Tensor | np.ndarray | np.generic):
        if math.prod(value.shape) != 1 or (isinstance(value, Tensor) and value.is_meta):
            return None
        value = value.item()
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    try:
        return operator.index(value)
    except TypeError:
        return None


def read_length(length: Any) -> tuple[int | None, str | None]:
    """How many positions there are, None for those of all ranks; and what is wrong with what was given instead."""
    found = None if length is None else _whole(length)
    if length is not None and found is None:
        return None, f"length is {shown(length)}; use a whole number of positions, or None for those of all ranks"
    return found, None


def read_layout(layout: Any) -> Any:
    """The layout by its name, also of a string of another type; what is none is given back, for `Layout` to refuse."""
    return KINDS[KINDS.index(layout)] if isinstance(layout, str) and layout in KINDS else layout


def read_documents(documents: Any) -> tuple[tuple[int, ...] | None, str | None]:
    """Where documents begin and the last one ends; and what is wrong with what was given instead."""
    if documents is None:
        return None, None
    found = documents.tolist() if isinstance(documents, Tensor | np.ndarray) else documents
    try:
        given = list(found)
    except TypeError:
        given = [None]
    places = [place for place in map(_whole, given) if place is not None]
    if len(places) < len(given):
        return None, (
            f"documents is {shown(found)}; give the positions where documents begin and the last one ends, (0, ..., S)"
        )
    return tuple(places), None


def asks_gradients(tensors: Sequence[Any]) -> bool:
    """Whether autograd records what is done with the tensors."""
    return torch.is_grad_enabled() and any(isinstance(part, Tensor) and part.requires_grad for part in tensors)


def described(tensors: Sequence[Any], options: RingOptions) -> dict[str, Any]:
    """What must be the same on all ranks, by what it is called in a message."""
    query, key = tensors[:2]
    is_fit = all(isinstance(part, Tensor) and part.dim() == 4 for part in (query, key))
    names = ("sequences", "query heads", "head widths", "key heads")
    sizes = (query.shape[0], query.shape[2], query.shape[3], key.shape[2]) if is_fit else (0, 0, 0, 0)
    return {
        **dict(zip(names, sizes, strict=True)),
        "types": getattr(query, "dtype", None),
        "types of partial results": options.out_dtype,
        "schemes": options.scheme,
        "topologies": options.topology,
        "causal": options.causal,
        "windows": options.window,
        "scales": options.softmax_scale,
        # What `auto` runs depends on it, and a backward pass needs all.
        "requests for gradients": asks_gradients(tensors),
    }
