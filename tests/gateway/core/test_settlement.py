"""A purse is settled once, as soon as it is known what all its calls cost."""

import asyncio
import logging

import pytest

from anabranch.errors import CapacityError
from anabranch.gateway.core import settlement
from anabranch.gateway.core.purse import Purse
from anabranch.gateway.dispatch import Attempt, Report
from anabranch.gateway.store import LedgerRow, Reservation
from gateway_states import FakeStore


def late(cost):
    return Report(attempts=[Attempt(model="m", deployment="m", start_s=0.0, is_late=True, cost=cost)])


def known(report, cost):
    report.attempts[0].is_late, report.attempts[0].cost = False, cost
    report.now_known()


def test_it_waits_for_each_call_that_is_read_on_in_whatever_order_they_end():
    async def work():
        store = FakeStore()
        purse = Purse(lambda nano: store.reserve("r", (), nano), store.grow)
        await purse.hold(50)
        first, second, sure = late(10), late(20), Report()
        written = []
        settlement.settle(
            purse, [sure, first, second], lambda held: written.append((held.nano, first.cost + second.cost))
        )
        known(second, 2)
        assert written == []
        known(first, 1)
        assert written == [(50, 3)]

    asyncio.run(work())


def test_without_money_there_is_a_row_and_with_it_the_reservation_ends():
    async def work():
        store, row = FakeStore(), LedgerRow(request_id="r")
        assert settlement.write(store, None, row).done()
        held = Reservation("r", (), 5)
        settlement.write(store, held, row, None, [row])
        assert store.appended == [row]
        assert store.settled == [(held, row, None, (row,))]

    asyncio.run(work())


@pytest.mark.parametrize(("error", "level"), [(CapacityError("full"), logging.DEBUG), (OSError("gone"), logging.ERROR)])
def test_a_row_that_cannot_be_written_is_said_in_the_log(caplog, error, level):
    class Broken:
        def append(self, row):
            failed = asyncio.get_running_loop().create_future()
            failed.set_exception(error)
            return failed

    async def work():
        done = settlement.write(Broken(), None, LedgerRow(request_id="r"))
        await asyncio.sleep(0)
        assert done.exception() is error

    with caplog.at_level(logging.DEBUG, "anabranch"):
        asyncio.run(work())
    assert [record.levelno for record in caplog.records if "ledger" in record.message] == [level]
