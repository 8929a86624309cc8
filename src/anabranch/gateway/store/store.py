"""`Store`: keys, budgets, the ledger, decisions and feedback, for one event loop.

    store = open_store("gateway.db")
    held = await store.reserve(request_id, subjects_of(key), nano)        # raises BudgetError; committed before it returns
    ...                                                                   # the call
    store.settle(held, LedgerRow(request_id=request_id, cost_nano=cost))  # need not be awaited

All that changes goes through one thread in transactions of many jobs (`writer`); budgets are decided there, on rows that nobody else
can touch, so they are exact over any number of processes. Reservations that a process leaves behind when it ends, however it ends, are
settled at what was reserved by whoever comes next, and their rows flagged.
"""

from anabranch.gateway.store.store_history import StoreHistory
from anabranch.gateway.store.store_money import StoreMoney


class Store(StoreMoney, StoreHistory):
    """See the module. Use it from one event loop; every method but `key_of` sees what was written before it was called.

    Args:
        database: open.
        serves, clock: see `open_store`.
    """
