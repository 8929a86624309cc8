"""How what was asked of models is paid for in the end: a request, its calls and errands alike.

A call that was given up may be read on for what it costs. Until that is known what was set aside for it stays so, and no row is written.
"""

from collections.abc import Callable, Sequence

from anabranch.gateway.dispatch import Report
from anabranch.gateway.purse import Purse
from anabranch.gateway.store import Reservation


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
