"""Ranks as the coordinator knows them, and who may be one."""

import hmac
import json
from dataclasses import dataclass

from anabranch.cluster.elastic.wire import Channel, Header

__all__ = ["Seat", "refusal"]


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
    """

    rank: int
    channel: Channel
    host: str
    port: int
    hello: Header
    heard: float
    vote: Header | None = None
    is_ready: bool = False


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
    if wanted is not None and tuple(wanted) != mesh:
        return f"it is for {wanted[0]} replicas of {wanted[1]} stages, and the coordinator has {mesh[0]} of {mesh[1]}"
    layers = len(theirs.get("sizes", ()))
    if mesh[1] > layers:
        return f"there are {mesh[1]} stages, and its model has {layers} layers; use at most as many stages"
    for name in sorted({*(signature or theirs), *theirs}):
        mine = (signature or theirs).get(name)
        if not hmac.compare_digest(json.dumps(mine), json.dumps(theirs.get(name))):
            return f"its {name} is {theirs.get(name)}, and those here have {mine}"
    return None
