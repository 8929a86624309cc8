"""How what was asked of models is paid for in the end: a request, its calls and errands alike.

A call that was given up may be read on for what it costs. Until that is known what was set aside for it stays so, and no row is written.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from anabranch.errors import CapacityError
from anabranch.gateway.core.purse import Purse
from anabranch.gateway.dispatch import Report
from anabranch.gateway.store import CollectedRow, LedgerRow, Reservation, Store

logger = logging.getLogger(__name__)


def settle(purse: Purse, reports: Sequence[Report], write: Callable[[Reservation | None], None]) -> None:
    """End a purse once it is known what all its calls cost: ``write`` is then called, once, with what the store has set aside.

    Args:
        purse: nothing is paid out of it any more.
        reports: of all calls that were paid out of it; none is added to later.
        write: what they came to is read from the reports as it is called, not before.
    """
    late = next((report for report in reports if report.is_late), None)
    if late is None:
        purse.close(write)
    else:
        late.when_known(lambda: settle(purse, reports, write))


def write(
    store: Store,
    held: Reservation | None,
    row: LedgerRow,
    collected: CollectedRow | None = None,
    calls: Sequence[LedgerRow] = (),
) -> "asyncio.Future[Any]":
    """End a request in the store, and what was set aside for it; it is written soon, whoever waits or not. Done once it is."""
    done = store.append(row) if held is None else store.settle(held, row, collected, calls)
    done.add_done_callback(_noted)
    return done


def _noted(done: "asyncio.Future[Any]") -> None:
    if done.cancelled() or (error := done.exception()) is None:
        return
    # That the store has no room, it says itself, once for many rows.
    level = logging.DEBUG if isinstance(error, CapacityError) else logging.ERROR
    logger.log(level, "the ledger could not be written: %s", error)
