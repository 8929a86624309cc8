"""The switch from one instance to the next, in the two ways there are.

`migrate` (ours): all ranks stop between two steps, the scheduler of each device that stays goes over as it is, since the key-value pages
are shared; requests of devices that leave go to those that stay with their blocks. Everything goes on in the new instance.

`drain` (the paper): the new instance takes all new requests, the old one ends those it has. Both use one cache: at the switch the old
one's free blocks go to the new one but for those that its requests may grow into; the rest follow when it is empty.

A request that is paused, as its reader is slow, stays paused over `migrate`. `drain` does not wait for readers: a paused request is taken
from the old instance, and when it is resumed the new one begins it again from the tokens it has.
"""

import contextlib
import time
from typing import TYPE_CHECKING, Any

from anabranch.serving.elasticmoe.instance import Instance, InstanceError
from anabranch.serving.elasticmoe.plan import ScalePlan
from anabranch.serving.elasticmoe.report import ScaleReport

if TYPE_CHECKING:
    from anabranch.serving.elasticmoe.group import Group

__all__ = ["drain", "migrate"]


def migrate(group: "Group", plan: ScalePlan, old: Instance, new: Instance, report: ScaleReport) -> None:
    """Hand everything over between two steps. Raises InstanceError, the old instance then serves on if it can."""
    ledger = group.ledger
    with ledger.lock:
        ledger.is_paused = True
    paused = time.perf_counter()
    try:
        starts = _handed_over(group, plan, old)
        told = new.all("start", {device: start for device, (start, _) in starts.items()})
    except BaseException:
        _go_on(group, old)
        raise
    with ledger.lock:
        devices = {id: device for device, (_, ids) in starts.items() for id in ids}
        lost = [live for live in ledger.with_instance(old) if live.request.id not in devices]
        # With a device that is gone, or all of them if the old instance is.
        for live in lost:
            live.instance = live.device = None
            live.reruns += 1
            ledger.enqueue(live)
        ledger.reruns += len(lost)
        ledger.move(old, new, devices)
        # With their counters, also those that have no request.
        group.counts.moved(old, new, [device for device, (start, _) in starts.items() if "frozen" in start])
        ledger.resume(new)
    report.gap_s = time.perf_counter() - paused
    report.seconds = time.perf_counter() - report.started
    report.tokens_brought = sum(answer["brought"] for answer in told.values())
    report.tokens_again = sum(answer["again"] for answer in told.values())


def _handed_over(group: "Group", plan: ScalePlan, old: Instance) -> dict[int, tuple[dict[str, Any], list[str]]]:
    """For each new device what it starts with, and the ids of the requests in it."""
    ledger = group.ledger
    starts: dict[int, tuple[dict[str, Any], list[str]]] = {device: ({"parcels": []}, []) for device in plan.new.devices}
    if old.is_broken:
        return starts
    alive = [device for device in old.devices if device not in plan.lost]
    leaving = [device for device in alive if device not in plan.new.devices]
    stay = [device for device in alive if device in plan.new.devices]
    how = {device: {"how": "carry" if device in leaving else "freeze"} for device in alive}
    given = _paused(old, how)
    if given is None:
        return starts
    # Outputs of the last steps have all arrived: they stand before the answers in the channels.
    with ledger.lock:
        for live in ledger.with_instance(old):
            if live.device in stay:
                starts[live.device][1].append(live.request.id)
    for device in stay:
        starts[device][0]["frozen"] = given[device]
    for device in leaving:
        if given[device]:
            for target, parcels in ledger.spread(given[device], stay or plan.new.devices).items():
                starts[target][0]["parcels"].append((device, parcels))
                starts[target][1].extend(parcel.request.id for parcel in parcels)
    return starts


def _paused(old: Instance, how: dict[int, dict[str, Any]]) -> dict[int, Any] | None:
    """What the ranks of the old instance give; None if it has failed: then its requests are run again, and the switch goes on."""
    try:
        return old.all("pause", how)
    except InstanceError:
        if not old.is_broken:
            raise
        return None


def _go_on(group: "Group", old: Instance) -> None:
    """The switch failed: let the old instance serve on; if it cannot, it is recovered."""
    try:
        if not old.is_broken:
            old.all("resume")
    except InstanceError:
        old.is_broken = True
    group.ledger.resume(old)


def drain(group: "Group", plan: ScalePlan, old: Instance, new: Instance, report: ScaleReport) -> None:
    """Let the new instance take what comes, and the old one end what it has; returns when that is done.

    Raises InstanceError if the new instance cannot start; what fails later is put right here.
    """
    ledger = group.ledger
    with ledger.lock:
        ledger.is_paused = True
    paused = time.perf_counter()
    free: dict[int, list[int]] = {}
    try:
        if not old.is_broken:
            free = _paused(old, {device: {"how": "drain"} for device in old.devices if device not in plan.lost}) or {}
        shared = {device: free[device] for device in plan.kv_keep if device in free}
        starts = {device: {"free": shared[device]} if device in shared else {} for device in plan.new.devices}
        told = new.all("start", starts)
    except BaseException:
        _take_back(group, old, free)
        raise
    with ledger.lock:
        ledger.resume(new, {device: len(blocks) for device, blocks in shared.items()})
    report.gap_s = time.perf_counter() - paused
    report.seconds = time.perf_counter() - report.started
    started = time.perf_counter()
    _wait_until_empty(group, plan, old)
    report.phases["drain"] = time.perf_counter() - started
    if not new.is_broken:
        new.all("give", {device: {"blocks": told[device]["kept_out"]} for device in shared})
        ledger.resume(new)


def _take_back(group: "Group", old: Instance, free: dict[int, list[int]]) -> None:
    try:
        if not old.is_broken:
            old.all("resume", {device: {"blocks": blocks} for device, blocks in free.items()})
    except InstanceError:
        old.is_broken = True
    group.ledger.resume(old)


def _wait_until_empty(group: "Group", plan: ScalePlan, old: Instance) -> None:
    """Until the old instance has ended its requests, and has stopped. If it dies they go to the new one."""
    ledger = group.ledger
    with ledger.changed:
        while True:
            if old.is_broken:
                ledger.send_back(old)
                ledger.dispatch()
                return
            ledger.withdraw_paused(old)
            if not ledger.with_instance(old):
                break
            ledger.changed.wait(0.5)
    # The step under way may still write for a request that was withdrawn or aborted; only then are its blocks another's.
    with contextlib.suppress(InstanceError):
        old.all("pause", {device: {"how": "carry"} for device in old.devices if device not in plan.lost})
