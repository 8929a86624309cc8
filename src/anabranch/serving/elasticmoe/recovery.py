"""Recovery: a group whose active instance or memory manager has failed serves again, with the same devices.

The weights are in the memory manager still, so new ranks attach to them, and every accepted request goes on from the tokens it has. If
the memory manager itself is gone a new one reads the weights from disk.
"""

import logging
from typing import TYPE_CHECKING

from anabranch.errors import AnabranchError
from anabranch.serving.core.request import Finish
from anabranch.serving.elasticmoe.instance import InstanceError
from anabranch.serving.elasticmoe.wire import ChannelClosedError

if TYPE_CHECKING:
    from anabranch.serving.elasticmoe.group import Group
    from anabranch.serving.elasticmoe.memory import MemoryManager

__all__ = ["FAULTS", "recover", "recover_if_broken", "recover_memory"]

logger = logging.getLogger(__name__)

FAULTS = (InstanceError, ChannelClosedError, AnabranchError, OSError, RuntimeError)
_TRIES = 3


def recover_if_broken(group: "Group") -> None:
    """Recover once no change is under way, unless that has put it right already."""
    with group.operator:
        active = group.ledger.active
        if active is not None and active.is_broken and not group.is_closed:
            recover(group)


def recover_memory(group: "Group", lost: "MemoryManager") -> None:
    """Recover from the loss of a memory manager once no change is under way, unless that has put it right already.

    What serves has mapped its memory and goes on until the new ranks are there.
    """
    with group.operator:
        if group.memory is lost and not group.is_closed and group.ledger.active is not None:
            recover(group, is_memory_lost=True)


def recover(group: "Group", *, is_memory_lost: bool = False) -> None:
    """Serve again, with the same devices. What fails is tried again from further back: from disk if need be.

    After three failures the group is closed, and its requests end with an error. ``group.operator`` must be held.
    """
    error: BaseException | None = None
    for attempt in range(_TRIES):
        if group.is_closed:
            return
        try:
            _bring_back(group, is_memory_lost=is_memory_lost or attempt > 0)
            return
        except FAULTS as failed:
            error = failed
            logger.warning("recovery failed (attempt %d of %d): %s", attempt + 1, _TRIES, failed)
    logger.error("the group cannot serve any more: %s", error)
    group.is_closed = True
    group.ledger.end_all(Finish.ERROR, f"the engine failed: {error}")


def _bring_back(group: "Group", *, is_memory_lost: bool) -> None:
    old, memory = group.ledger.active, group.memory
    assert group.placement is not None
    assert memory is not None
    group.counts.recoveries += 1
    # Before anything is read of another model.
    group.check_files()
    if is_memory_lost or not memory.process.is_alive:
        # They are connected to the memory manager that is gone.
        group.standby.close()
        group.memory = group.start_memory()
        group.memory.load(group.placement)
    new = group.boot(group.devices)
    try:
        group.bring_up(new, "current")
        new.all("start")
    except BaseException:
        new.close()
        raise
    with group.ledger.lock:
        if old is not None:
            old.is_broken = True
            group.ledger.send_back(old)
        group.ledger.resume(new)
    group.counts.up()
    if old is not None:
        old.close()
    if memory is not group.memory:
        memory.close()
