"""`Owed`: orders to forget that a strategy has not obeyed yet."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["FORGETTING_S", "MOST", "Order", "Owed"]

Order = Mapping[str, Any]

# Of one strategy.
MOST = 1000

# Seconds that an order has, and all of one round: so long others wait.
FORGETTING_S = 30.0


@dataclass(slots=True, eq=False)
class _One:
    """An order, and the work on it where that goes on."""

    order: Order
    task: "asyncio.Task[int] | None" = None


class Owed:
    """Of one strategy, on one event loop. Each order is told by itself: one that the strategy fails at keeps no other from it.

    What is begun is not given up: an order that takes the strategy longer than anybody waits is obeyed once it comes to its end.

    Attributes:
        forget: has the strategy forget what an order is about; how much there was.
        is_over: it failed at one more order than it may owe (`MOST`), which is not told again: what the strategy keeps is not to be
            stored any more.
    """

    def __init__(self, forget: Callable[[Order], Awaitable[int]]) -> None:
        self.forget, self._all = forget, list[_One]()
        self.is_over = False

    def __bool__(self) -> bool:
        """Whether what the strategy keeps has something in it that it was told to forget."""
        return self.is_over or bool(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, order: Order) -> bool:
        return any(one.order == order for one in self._all)

    def __repr__(self) -> str:
        return f"Owed({[one.order for one in self._all]})"

    def take_over(self, other: "Owed") -> None:
        """Owe what another does, too."""
        self._all += [_One(one.order) for one in other._all if one.order not in self][: MOST - len(self._all)]

    async def tell(self, order: Order, limit_s: float) -> int:
        """Have one obeyed; how much there was.

        Raises what the strategy does, and TimeoutError after ``limit_s`` seconds; then it is owed.
        """
        # One that is being obeyed does not know of what came since.
        one = next((one for one in self._all if one.task is None and one.order == order), None)
        if one is None and len(self._all) < MOST:
            one = _One(order)
            self._all.append(one)
        if one is not None:
            return await self._tried(one, limit_s)
        try:
            async with asyncio.timeout(limit_s):
                return await self.forget(order)
        except BaseException:
            self.is_over = True
            raise

    async def tell_again(self, limit_s: float, on_failure: Callable[[Exception], None]) -> int:
        """Have all obeyed, within ``limit_s`` seconds in all; how much there was. Those it has no time for come first the next time."""
        count, end_s = 0, time.monotonic() + limit_s
        for one in list(self._all):
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                break
            if one not in self._all:
                continue
            try:
                count += await self._tried(one, left_s)
            except Exception as error:
                on_failure(error)
        return count

    async def _tried(self, one: _One, limit_s: float) -> int:
        if limit_s <= 0:
            raise TimeoutError("there is no time for it in this round")
        if one.task is None:
            one.task = asyncio.ensure_future(self._obeyed(one))
            one.task.add_done_callback(_seen)
        task = one.task
        await asyncio.wait({task}, timeout=limit_s)
        if not task.done():
            raise TimeoutError(f"it has not come to its end within {limit_s:.3g} s")
        return task.result()

    async def _obeyed(self, one: _One) -> int:
        try:
            count = await self.forget(one.order)
        except BaseException:
            one.task = None
            # Behind those that have not been tried since.
            self._all.remove(one)
            self._all.append(one)
            raise
        self._all.remove(one)
        return count


def _seen(task: "asyncio.Task[int]") -> None:
    """Whoever waited for it may be gone."""
    task.cancelled() or task.exception()
