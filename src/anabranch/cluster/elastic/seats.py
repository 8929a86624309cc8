"""Ranks as the coordinator knows them: who may be one, what their votes add up to, and which checkpoint all of them have written."""

import hmac
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from anabranch.cluster.elastic.tree import TreeSum
from anabranch.cluster.elastic.wire import Channel, Header

__all__ = ["Checkpoints", "Seat", "counted", "refusal"]


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


def counted(seats: Collection[Seat]) -> dict[str, str]:
    """By name, what votes told of the loss and its terms, added up; votes are then gone."""
    sums: dict[str, TreeSum[float]] = {}
    votes = [seat.vote or {} for seat in seats]
    for vote in votes:
        for name, level, place, value in vote["loss"]:
            tree = sums.setdefault(name, TreeSum(int(votes[0]["blocks"])))
            tree.add_node((level, place), float.fromhex(value))
    for seat in seats:
        seat.vote = None
    return {name: tree.root().hex() for name, tree in sums.items()}


class Checkpoints:
    """What ranks have written.

    Attributes:
        newest: where, and of which step; None where there is none.
    """

    def __init__(self) -> None:
        self.newest: str | None = None
        self._told: dict[int, Header] = {}

    def wrote(self, where: str, version: int) -> None:
        """One rank has written all."""
        self.newest = f"{where} (step {version})"

    def saved(self, rank: int, header: Header, ranks: Sequence[int]) -> Header | None:
        """A rank has written its slices, or could not; what all are told when the last of ``ranks`` has."""
        self._told[rank] = header
        of = {one: self._told.get(one) for one in ranks}
        if not all(told is not None and told["version"] == header["version"] for told in of.values()):
            return None
        self._told = {}
        answer: Header = {"kind": "saved", "version": header["version"], "folder": header["folder"]}
        failed = next((one for one, told in of.items() if told and told.get("why")), None)
        if failed is None:
            self.wrote(header["folder"], header["version"])
            answer["files"] = {str(one): told["file"] for one, told in of.items() if told}
        else:
            answer["why"] = f"rank {failed}: {(of[failed] or {})['why']}"
        return answer
