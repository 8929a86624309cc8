"""`Purse`: the money of one request, out of which all its calls are paid, however many are under way at once.

    held + spent <= what the store has set aside

A call has the most that it may cost held before it is made, and gives back what it did not need when it ends, so two calls never count
on the same money. What fits into no budget is not held, and then nothing has changed. The store's reservation grows to the most that
was ever held and spent at once, and ends with the request.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from anabranch.errors import BudgetError, CapacityError, InputError
from anabranch.gateway.store import Reservation
from anabranch.routers.money import in_full


class Hold:
    """Money held for a call and its further attempts.

    Attributes:
        nano: held now; 0 once it has ended.
        most_nano: the most that ever was.
        cost_nano: what was spent of it; it is taken from the purse when `Purse.holding` ends.
    """

    __slots__ = ("cost_nano", "most_nano", "nano")

    def __init__(self) -> None:
        self.nano = self.most_nano = self.cost_nano = 0


class Purse:
    """See the module. It belongs to one event loop; its methods may be called by many tasks at once.

    Attributes:
        reservation: of the store; None while there is none.
        held_nano: by calls that have not ended.
        spent_nano: by calls that have.

    Args:
        reserve: sets the first money aside in the store (`Store.reserve`). It is not cancelled with whoever asks for it.
        grow: sets more aside (`Store.grow`).
        limit_nano: the most that the request may cost in all; None leaves that to budgets.
        has_budget: whether there is a budget that it counts against; None if nobody can say, which is taken for none.
    """

    def __init__(
        self,
        reserve: Callable[[int], Awaitable[Reservation]],
        grow: Callable[[Reservation, int], Awaitable[Reservation]],
        limit_nano: int | None = None,
        has_budget: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        self._reserve, self._grow, self._limit_nano, self._has_budget = reserve, grow, limit_nano, has_budget
        self._limit_name = "limits.request_usd"
        self.reservation: Reservation | None = None
        self.held_nano = self.spent_nano = 0
        self._lock = asyncio.Lock()
        # Under way; its end is taken note of by `_opened`, whoever waits for it.
        self._opening: asyncio.Future[Reservation] | None = None
        self._is_closed = False

    @property
    def is_empty(self) -> bool:
        """Nothing was ever set aside, nor is being so."""
        return self.reservation is None and self._opening is None

    async def is_limited(self) -> bool:
        """Whether a budget, or a limit of its own, applies to the request. Raises CapacityError if the store cannot be read."""
        return self._limit_nano is not None or (self._has_budget is not None and await self._has_budget())

    def bound(self, nano: int, name: str) -> None:
        """From now on the request may cost no more than so much; ``name`` is the setting that says so. A limit that is nearer stays."""
        limit = self.spent_nano + self.held_nano + nano
        if self._limit_nano is None or limit < self._limit_nano:
            self._limit_nano, self._limit_name = limit, name

    async def hold(self, nano: int) -> Hold:
        """Hold so many nano-dollars.

        Raises BudgetError if a budget or the request's own limit has no room, InputError once the request is over; what `Store.reserve`
        raises beside. Then nothing has changed.
        """
        hold = Hold()
        await self.raise_to(hold, nano)
        return hold

    async def raise_to(self, hold: Hold, nano: int) -> None:
        """Hold ``nano`` in all, if that is more than is held. Raises as `hold`."""
        async with self._lock:
            more = nano - hold.nano
            if more <= 0 and self.reservation is not None:
                return
            self._check_open()
            self._check_limit(more)
            await self._have(self.spent_nano + self.held_nano + more)
            # The request may have ended meanwhile; what was set aside goes with it.
            self._check_open()
            hold.nano += more
            hold.most_nano = max(hold.most_nano, hold.nano)
            self.held_nano += more

    async def can_raise(self, hold: Hold, nano: int) -> bool:
        """Whether ``nano`` in all may be held; then it is. Not while the store cannot write. Raises InputError once the request is over."""
        try:
            await self.raise_to(hold, nano)
        except (BudgetError, CapacityError):
            return False
        return True

    def lower_to(self, hold: Hold, nano: int) -> None:
        """Hold no more than ``nano``: what is above it may be held for something else."""
        less = max(0, hold.nano - nano)
        hold.nano -= less
        self.held_nano -= less

    def end(self, hold: Hold, cost_nano: int) -> None:
        """What a call has cost takes the place of what was held for it."""
        self.lower_to(hold, 0)
        self.spent_nano += cost_nano

    @asynccontextmanager
    async def holding(self, nano: int) -> AsyncIterator[Hold]:
        """`hold`, ended with the block at its ``cost_nano``, however that ends."""
        hold = await self.hold(nano)
        try:
            yield hold
        finally:
            self.end(hold, hold.cost_nano)

    def close(self, settle: Callable[[Reservation | None], None]) -> None:
        """Hold no more. ``settle`` is called with what the store has set aside: at once, or as soon as that is known."""
        self._is_closed = True
        if self._opening is None:
            settle(self.reservation)
        else:
            self._opening.add_done_callback(lambda _: settle(self.reservation))

    def _check_open(self) -> None:
        if self._is_closed:
            raise InputError("the request is over; nothing can be paid for it any more")

    def _check_limit(self, more: int) -> None:
        limit = self._limit_nano
        if limit is None:
            return
        left = max(0, limit - self.spent_nano - self.held_nano)
        if more > left:
            raise BudgetError(
                f"a request may cost {in_full(limit)} in all ({self._limit_name}); this one has {in_full(left)} of it left, and what "
                f"comes next may cost {in_full(more)}",
                subject="request",
                period="request",
                limit_nano=limit,
                remaining_nano=left,
                resets_s=None,
                retry_after_s=None,
            )

    async def _have(self, nano: int) -> None:
        """Have so much set aside in the store, or more."""
        if self._opening is not None:
            # Of somebody who has gone.
            await asyncio.wait({self._opening})
        if self.reservation is None:
            opening = self._opening = asyncio.ensure_future(self._reserve(nano))
            opening.add_done_callback(self._opened)
            # A strategy may run out of time here, and its request goes on: under the same id, which is reserved once.
            await asyncio.shield(opening)
        elif nano > self.reservation.nano:
            # Where this is cancelled, the store has set more aside than is known here, and settles that.
            self.reservation = await self._grow(self.reservation, nano)

    def _opened(self, opening: "asyncio.Future[Reservation]") -> None:
        self._opening = None
        if not opening.cancelled() and opening.exception() is None:
            self.reservation = opening.result()
