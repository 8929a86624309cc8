"""Ranks as the coordinator knows them: who may be one, and what their votes add up to."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from anabranch.cluster.elastic.tree import TreeSum
from anabranch.cluster.elastic.waiting import Standing
from anabranch.cluster.elastic.wire import Channel, Header
from anabranch.errors import InputError
from anabranch.sockets import MOST_PORT

__all__ = ["Seat", "counted", "named", "other_batches", "other_state", "refusal"]


@dataclass
class Seat:
    """One rank.

    Attributes:
        rank: its name.
        channel: to it.
        host, port: where other ranks reach it.
        hello: what it said of itself.
        heard: when it was last heard of.
        vote: of the step that runs, what it told.
        is_ready: for the epoch that is announced.
        standing: what it does in this epoch, as its last beat told.
    """

    rank: int
    channel: Channel
    host: str
    port: int
    hello: Header
    heard: float
    vote: Header | None = None
    is_ready: bool = False
    standing: Standing = field(default_factory=Standing)


def named(wish: Any, taken: Collection[int], whole: int) -> int:
    """The name of a rank while all gather: as it wishes, where that is free."""
    is_free = isinstance(wish, int) and 0 <= wish < whole and wish not in taken
    return int(wish) if is_free else min(set(range(whole)) - set(taken))


def refusal(hello: Header, signature: Header | None, mesh: tuple[int, int]) -> str | None:
    """Why a rank cannot take part; None where it can.

    Args:
        hello: what it says of itself.
        signature: what the first one said that all must agree on; None for the first.
        mesh: replicas and stages.
    """
    theirs, wanted = hello.get("signature"), hello.get("mesh")
    if not isinstance(theirs, dict):
        return "it says nothing of its model"
    if wrong := _wrong(hello, theirs):
        return f"its hello has no sound {wrong}"
    if wanted is not None and tuple(wanted) != mesh:
        return f"it is for {wanted[0]} replicas of {wanted[1]} stages, and the coordinator has {mesh[0]} of {mesh[1]}"
    layers = len(theirs["sizes"])
    if mesh[1] > layers:
        return f"there are {mesh[1]} stages, and its model has {layers} layers; use at most as many stages"
    for name in sorted({*(signature or theirs), *theirs}):
        mine, other = (signature or theirs).get(name), theirs.get(name)
        if json.dumps(mine) == json.dumps(other):
            continue
        if isinstance(mine, list) and isinstance(other, list) and len(mine) == len(other):
            place = next(n for n, (one, two) in enumerate(zip(mine, other, strict=True)) if one != two)
            return f"its {name} differ at {place}: {other[place]}, and those here have {mine[place]}"
        return f"its {name} is {other}, and those here have {mine}"
    return None


def other_state(hello: Header, seats: Sequence[Seat]) -> str | None:
    """Why a rank cannot begin with those who are there: it would go on from somewhere else; None where it can."""
    for seat in seats:
        if hello["version"] != seat.hello["version"]:
            return (
                f"it begins at step {hello['version']}, and rank {seat.rank} at {seat.hello['version']}; "
                "resume all from the same checkpoint"
            )
        for name, told in (("weights", "weights"), ("moments", "state of the optimizer")):
            if hello[name] != seat.hello[name]:
                return (
                    f"it begins with other {told} than rank {seat.rank}; give all the same seed, or the same checkpoint"
                )
    return None


def _wrong(hello: Header, signature: Header) -> str | None:
    """What of a hello is not there, or not as it is used; None where all is sound."""
    sizes, mesh = signature.get("sizes"), hello.get("mesh")
    sound = {
        "host": isinstance(hello.get("host"), str),
        "port": _is_count(hello.get("port"), 1) and hello["port"] <= MOST_PORT,
        **{name: isinstance(hello.get(name), str) for name in ("weights", "moments")},
        "version": _is_count(hello.get("version"), 0),
        "mesh": mesh is None or (isinstance(mesh, list) and len(mesh) == 2),
        "sizes": isinstance(sizes, list) and all(_is_count(size, 0) for size in sizes),
        **{name: _is_count(signature.get(name), 0) for name in ("copies", "micro_batches")},
        **{name: _is_count(signature.get(name), 1) for name in ("global_batch", "block")},
    }
    return next((name for name, is_sound in sound.items() if not is_sound), None)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def other_batches(seats: Collection[Seat], proved: Collection[int]) -> dict[int, int] | None:
    """Ranks whose votes are of another batch than that of most, each with one of these; None where neither batch is that of most.

    Args:
        seats: with votes of one step.
        proved: ranks that have made a step with others already; their word counts before that of any number of others.
    """
    having: dict[Any, list[int]] = {}
    for seat in seats:
        having.setdefault((seat.vote or {}).get("batch"), []).append(seat.rank)
    if len(having) == 1:
        return {}
    found = sorted(having.values(), key=lambda ranks: (sum(rank in proved for rank in ranks), len(ranks)), reverse=True)
    most, second = ((sum(rank in proved for rank in ranks), len(ranks)) for ranks in found[:2])
    return None if most == second else {rank: found[0][0] for ranks in found[1:] for rank in ranks}


def counted(seats: Collection[Seat]) -> dict[str, str]:
    """By name, what votes told of the loss and its terms, added up; votes are then gone.

    A rank that had no samples tells so, and adds nothing. Raises InputError for a term that is told of some samples alone.
    """
    sums: dict[str, TreeSum[float]] = {}
    votes = [seat.vote or {} for seat in seats]
    for vote in votes:
        for name, level, place, value in vote["loss"]:
            tree = sums.setdefault(name, TreeSum(int(votes[0]["blocks"])))
            tree.add_node((level, place), float.fromhex(value))
    for tree in sums.values():
        for vote in votes:
            for leaf in vote.get("absent", ()):
                tree.add(leaf, 0.0)
    for seat in seats:
        seat.vote = None
    found = {}
    for name, tree in sums.items():
        try:
            found[name] = tree.root().hex()
        except InputError as error:
            told = f"the term {name!r}" if name else "the loss"
            raise InputError(
                f"{told} is told of some samples alone; a loss must tell the same of all ({error})"
            ) from None
    return found
