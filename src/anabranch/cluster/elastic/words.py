"""Announcements of layouts, as the coordinator says them and ranks hear them."""

from collections.abc import Mapping, Sequence
from typing import Any

from anabranch.cluster.elastic.layout import Layout, layout_to
from anabranch.cluster.elastic.ledger import Way
from anabranch.cluster.elastic.planner import ElasticPlan
from anabranch.cluster.elastic.seats import Seat
from anabranch.cluster.elastic.wire import Header

__all__ = ["another_layout", "stream_to"]


def another_layout(
    epoch: int,
    members: Mapping[int, Seat],
    before: Layout | None,
    made: ElasticPlan,
    way: Way,
    *,
    costs: Sequence[float],
    lost: Mapping[int, str],
    detect_s: float,
    is_growth: bool,
) -> Header:
    """That all go to another layout.

    Args:
        epoch: of it.
        members: who is there.
        before: what holds; None before training begins.
        made: the plan of the new one.
        way: from which step on, and who has what lost ranks had.
        costs: seconds of each layer.
        lost: why ranks are gone.
        detect_s: for how long one of them had not been heard.
        is_growth: whether nobody is lost and no link: what all do after the last step they may do before.
    """
    plan = made.to_dict()
    # Ranks find themselves what travels.
    del plan["moves"]
    return {
        "kind": "epoch",
        "epoch": epoch,
        "version": way.version,
        "before": None if before is None else layout_to(before),
        "after": layout_to(made.layout),
        "schedule": made.schedule_name,
        "costs": list(costs),
        "holders": {str(owner): list(holders) for owner, holders in way.holders.items()},
        "lost": {str(rank): lost.get(rank, "") for rank in way.holders},
        "members": _addresses(members, before, made.layout),
        "is_growth": is_growth,
        "plan": plan,
        "detect_s": detect_s,
        "step_s": made.step_s,
        "warnings": list(made.warnings),
    }


def stream_to(
    epoch: int, members: Mapping[int, Seat], before: Layout, after: Layout, *, version: int, chunk: int
) -> Header:
    """That pieces begin to travel to another layout while this one holds, ``chunk`` numbers of each in one step."""
    return {
        "kind": "live",
        "epoch": epoch,
        "version": version,
        "chunk": chunk,
        "before": layout_to(before),
        "after": layout_to(after),
        "members": _addresses(members, before, after),
    }


def _addresses(members: Mapping[int, Seat], *layouts: Layout | None) -> dict[str, list[Any]]:
    """Of those who have a part: nobody waits for a link to one who has none yet."""
    parts = {rank for layout in layouts if layout is not None for rank in layout.grid.ranks}
    return {str(member.rank): [member.host, member.port] for member in members.values() if member.rank in parts}
