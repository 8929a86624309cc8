"""A discrete-event simulator: tasks that need each other, on resources that do one at a time.

    done = run_tasks([Task("stage 0", 2.0), Task("link 0-1", 0.5, after=(0,)), Task("stage 1", 2.0, after=(1,))])
    done[2].end_s       # 4.5

It knows nothing of pipelines: stages, links and disks are resources alike. Time is virtual, and equal input gives equal output.
"""

import heapq
import math
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

from anabranch.errors import InputError

__all__ = ["Interval", "Task", "run_tasks"]


@dataclass(frozen=True)
class Task:
    """One piece of work.

    Attributes:
        resource: what does it, one task at a time.
        duration_s: how long that takes.
        after: numbers of the tasks that must be done before, their places in the list.
        delay_s: what passes between the last of those and this one being ready (the latency of a link).
    """

    resource: Hashable
    duration_s: float
    after: tuple[int, ...] = ()
    delay_s: float = 0.0


@dataclass(frozen=True)
class Interval:
    """When a task was done, in seconds from the beginning."""

    start_s: float
    end_s: float


def run_tasks(tasks: Sequence[Task], *, in_order: Collection[Hashable] = ()) -> list[Interval]:
    """When each task is done.

    Args:
        tasks: all of them; those that are ready at once are taken in this order.
        in_order: resources that do their tasks in the order of the list, and wait for one that is not ready; others take what is ready.

    Raises InputError for a duration that is none, a task that is not there, and tasks that wait for each other.
    """
    for number, task in enumerate(tasks):
        if not (0 <= task.duration_s < math.inf and 0 <= task.delay_s < math.inf):
            raise InputError(
                f"task {number} takes {task.duration_s} s, {task.delay_s} s late; give finite numbers of at least 0"
            )
        if any(not 0 <= needed < len(tasks) for needed in task.after):
            raise InputError(f"task {number} comes after {task.after}, and tasks are 0 to {len(tasks) - 1}")
    ordered = set(in_order)
    open_needs = [len(set(task.after)) for task in tasks]
    followers: list[list[int]] = [[] for _ in tasks]
    queues: dict[Hashable, list[int]] = {}
    for number, task in enumerate(tasks):
        for needed in set(task.after):
            followers[needed].append(number)
        queues.setdefault(task.resource, [])
    order: dict[Hashable, list[int]] = {resource: [] for resource in ordered}
    for number in reversed(range(len(tasks))):
        if tasks[number].resource in ordered:
            order[tasks[number].resource].append(number)
    ready: set[int] = set()
    busy: set[Hashable] = set()
    found: list[Interval | None] = [None] * len(tasks)
    # (time, 0 for an end and 1 for a task that becomes ready, task): at one moment things end before others begin.
    events: list[tuple[float, int, int]] = []

    def begin(resource: Hashable, now: float) -> None:
        if resource in busy:
            return
        if resource in ordered:
            waiting = order[resource]
            if not waiting or waiting[-1] not in ready:
                return
            number = waiting.pop()
        elif queues[resource]:
            number = heapq.heappop(queues[resource])
        else:
            return
        busy.add(resource)
        found[number] = Interval(now, now + tasks[number].duration_s)
        heapq.heappush(events, (now + tasks[number].duration_s, 0, number))

    for number, needs in enumerate(open_needs):
        if not needs:
            heapq.heappush(events, (tasks[number].delay_s, 1, number))
    while events:
        now = events[0][0]
        touched: dict[Hashable, None] = {}
        while events and events[0][0] == now:
            _, is_ready, number = heapq.heappop(events)
            resource = tasks[number].resource
            touched[resource] = None
            if is_ready:
                ready.add(number)
                if resource not in ordered:
                    heapq.heappush(queues[resource], number)
                continue
            busy.discard(resource)
            for follower in followers[number]:
                open_needs[follower] -= 1
                if not open_needs[follower]:
                    heapq.heappush(events, (now + tasks[follower].delay_s, 1, follower))
        for resource in touched:
            begin(resource, now)
    done = [interval for interval in found if interval is not None]
    if len(done) < len(tasks):
        stuck = next(number for number, interval in enumerate(found) if interval is None)
        raise InputError(f"task {stuck} on {tasks[stuck].resource!r} never begins: tasks wait for each other")
    return done
