"""What a `Communicator` is asked, looked at before anybody else hears of it: values that are none are an InputError of this peer alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from anabranch.bounds import shown
from anabranch.cluster.pccl.bandwidth import MOST_STREAMS
from anabranch.cluster.pccl.links import MOST_POOL
from anabranch.cluster.pccl.part import Reduction
from anabranch.cluster.pccl.quantise import Quantiser
from anabranch.cluster.pccl.records import MOST_TAGS, MOST_WORLD
from anabranch.cluster.pccl.ring import OPS
from anabranch.cluster.pccl.sharing import has_no_numbers, not_written
from anabranch.errors import InputError

DTYPES = {
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.uint8,
}
_MOST_TAG = 2**31


def check_settings(group: Any, pool: Any, waits: Mapping[str, Any]) -> None:
    """Of a peer; waits by name, those without an end left out."""
    for name, value, most in (("group", group, 2**16), ("pool", pool, MOST_POOL)):
        if type(value) is not int or not (name == "pool") <= value <= most:
            raise InputError(f"{name} is {shown(value)}; use {int(name == 'pool')} to {most}")
    for name, seconds in waits.items():
        if not isinstance(seconds, (int, float)) or not 0 < seconds < 1e6:
            raise InputError(f"{name} is {shown(seconds)}; use a number of seconds above 0")


def check_world(world: Any) -> None:
    """A number of peers."""
    if type(world) is not int or not 1 <= world <= MOST_WORLD:
        raise InputError(f"world is {shown(world)}; use 1 or more, up to {MOST_WORLD}")


def check_flood(seconds: float, streams: int) -> None:
    """How a link is measured."""
    if not 0.01 <= seconds <= 60 or not 1 <= streams <= MOST_STREAMS:
        raise InputError(
            f"seconds is {shown(seconds)} and streams {shown(streams)}; use 0.01 to 60 and 1 to {MOST_STREAMS}"
        )


def check_reduction(one: Reduction) -> None:
    """A collective."""
    if type(one.tag) is not int or not 0 <= one.tag < _MOST_TAG:
        raise InputError(f"tag is {shown(one.tag)}; use 0 to {_MOST_TAG - 1}")
    if one.op not in OPS:
        raise InputError(f"op is {shown(one.op)}; use {', '.join(OPS)}")
    if one.world is not None:
        check_world(one.world)
    if not isinstance(one.send, Tensor) or one.send.dtype not in DTYPES or one.send.layout != torch.strided:
        given = one.send.dtype if isinstance(one.send, Tensor) else type(one.send).__name__
        raise InputError(f"a {given} cannot be reduced; use a dense tensor of {', '.join(sorted(map(str, DTYPES)))}")
    for tensor in (one.send, one.recv):
        if isinstance(tensor, Tensor) and (why := has_no_numbers(tensor)):
            raise InputError(f"{why} cannot be reduced; use a dense tensor that has numbers")
    target = one.send if one.recv is None else one.recv
    if not isinstance(target, Tensor) or (why := not_written(target)):
        told = why if isinstance(target, Tensor) else f"a {type(target).__name__}"
        raise InputError(f"the result has no place in {told}; give recv, or a clone")
    if one.recv is not None and (one.recv.dtype != one.send.dtype or one.recv.numel() != one.send.numel()):
        raise InputError(
            f"recv has {one.recv.numel()} elements of {one.recv.dtype}, and send {one.send.numel()} of {one.send.dtype}; they must agree"
        )
    if one.quantise is not None and not isinstance(one.quantise, (str, Quantiser)):
        raise InputError(f"quantise is {shown(one.quantise)}; use a Quantiser, its kind as text, or None")
    if isinstance(one.quantise, str):
        Quantiser(one.quantise)
    if one.quantise is not None and not one.send.dtype.is_floating_point:
        raise InputError(f"{one.send.dtype} is not quantised; quantise is for floating-point numbers")


def check_many(reductions: Sequence[Reduction], max_in_flight: Any, attempts: Any) -> None:
    """Several collectives."""
    tags = [one.tag for one in reductions]
    if len(set(tags)) < len(tags):
        raise InputError(f"tags are {shown(tags)}; give each collective its own")
    if not 1 <= max_in_flight <= MOST_TAGS:
        raise InputError(f"max_in_flight is {shown(max_in_flight)}; use 1 to {MOST_TAGS}")
    if type(attempts) is not int or attempts < 1:
        raise InputError(f"attempts is {shown(attempts)}; use 1 or more")
    for one in reductions:
        check_reduction(one)
