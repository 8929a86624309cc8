"""`CappedAsk`: an `Ask` through which no more than so many dollars are spent, however many calls are under way at once.

    spent + the most that each call under way may cost <= cap

Before a call is made, the most that it may cost is kept free; when it ends, what it did cost takes the place of that. How much it may be,
an `Ask` that knows says itself (``most``), and one that can holds itself to the cap as well (``bound``): a gateway, which pays further
attempts at a call too. Of any other it is reckoned by the pool's prices: a token for each byte that is sent, and ``max_tokens``.
"""

import json
import math
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

from anabranch.errors import AnabranchError, BudgetError
from anabranch.routers.contract.ask import Answered, Arm, Ask, Messages, Said
from anabranch.routers.contract.query import Pool
from anabranch.routers.money import NANO, dollars

# Tokens of a prompt beside those of its text: marks of roles, and what a chat template says.
_BESIDE = 64

# Of a cap, which is a sum of fractions.
_ROUNDING = 1e-12


@dataclass
class _Call:
    """One that is under way: what it costs, as far as that is known."""

    cost: float


class CappedAsk:
    """See the module.

    Attributes:
        cap: dollars in all; infinity for none.
        name: of the setting that says so, for messages.

    Args:
        ask: that makes the calls.
        cap: see the attribute; None for none.
        name: see the attribute.
        pool: whose prices are reckoned with.
    """

    def __init__(self, ask: Ask, cap: float | None, name: str, pool: Pool) -> None:
        self._ask, self.name = ask, name
        self.cap = math.inf if cap is None else cap
        self._prices = {model.name: model.price for model in pool.models}
        self._own = self._held = 0.0
        self._under_way = 0
        known = getattr(ask, "spent", None)
        self._before = None if known is None else known.cost
        if cap is not None and (bound := getattr(ask, "bound", None)) is not None:
            bound(cap, name)

    @property
    def left(self) -> float:
        """Calls that may still be made."""
        return self._ask.left

    @property
    def spent(self) -> float:
        """Dollars so far; of calls under way the most that they may cost."""
        return self._own + self._held

    @property
    def room(self) -> float:
        """Dollars that are left."""
        return max(0.0, self.cap - self.spent)

    async def most(self, arm: Arm | str, messages: Messages, **how: Any) -> float:
        """Dollars that such a call may cost at most; 0 where there is no cap, and it does not matter."""
        if math.isinf(self.cap):
            return 0.0
        arm = Arm(arm) if isinstance(arm, str) else arm
        says = getattr(self._ask, "most", None)
        if says is not None:
            return float(await says(arm, messages, **how))
        settings: Mapping[str, Any] = {**arm.settings, **how}
        sent = json.dumps([messages, arm.system, settings], default=str).encode()
        ends = [settings.get(name) for name in ("max_tokens", "max_completion_tokens")]
        completion = max((end for end in ends if isinstance(end, int)), default=0)
        price = self._prices.get(arm.model)
        return math.inf if price is None else dollars(price.cost(len(sent) + _BESIDE, completion))

    async def __call__(self, arm: Arm | str, messages: Messages, **how: Any) -> Answered:
        """See `Ask`. Raises BudgetError where the cap has no room for what it may cost, and nothing was asked then."""
        purpose = {"purpose": how.pop("purpose")} if "purpose" in how else {}
        with self._held_free(await self.most(arm, messages, **how)) as call:
            answered = await self._ask(arm, messages, **purpose, **how)
            call.cost = answered.cost
            return answered

    async def stream(self, arm: Arm | str, messages: Messages, **how: Any) -> AsyncGenerator[Said | Answered, None]:
        """See `Ask`. Raises as a call."""
        purpose = {"purpose": how.pop("purpose")} if "purpose" in how else {}
        with self._held_free(await self.most(arm, messages, **how)) as call:
            pieces: Any = self._ask.stream(arm, messages, **purpose, **how)
            async with aclosing(pieces):
                async for piece in pieces:
                    if isinstance(piece, Answered):
                        call.cost = piece.cost
                    yield piece

    @contextmanager
    def _held_free(self, most: float) -> Iterator["_Call"]:
        """A call that may cost so much: it is kept free until the call ends. Raises BudgetError where there is no room for it."""
        if self.spent + most > self.cap * (1 + _ROUNDING):
            raise self.full(most)
        self._held, self._under_way = self._held + most, self._under_way + 1
        call = _Call(most)
        try:
            yield call
        except AnabranchError as error:
            # One for which there was no room was not made; what another came to is not known here.
            call.cost = 0.0 if error.is_for_room else most
            raise
        finally:
            self._end(most, call.cost)

    def full(self, most: float) -> BudgetError:
        """What is said where the cap has no room."""
        return BudgetError(
            f"{self.name} is ${self.cap:g}, of which ${self.room:.9g} is left, and what comes next may cost ${most:.9g}; "
            "give answers a nearer end (max_tokens), or raise it",
            subject="request",
            period="request",
            limit_nano=round(self.cap * NANO),
            remaining_nano=round(self.room * NANO),
            resets_s=None,
            retry_after_s=None,
        )

    def _end(self, most: float, cost: float) -> None:
        self._held, self._under_way = self._held - most, self._under_way - 1
        self._own += cost
        if not self._under_way:
            # Sums of fractions leave some.
            self._held = 0.0
            if self._before is not None:
                # What failed cost something too, and this is the time to ask.
                self._own = self._ask.spent.cost - self._before  # type: ignore[attr-defined]
