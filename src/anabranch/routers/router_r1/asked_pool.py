"""`AskPool`: models of a pool that are there, each asked through an `Ask`: an endpoint's (`ClientAsk`) or an engine's (`EngineAsk`).

    pool = AskPool({"small": Member(ask, Arm("qwen3"), Price(completion=0.4, prompt=0.1))})
    pool.reply("small", "Who wrote it?")               # from any thread

They are asked as `auto/router-r1` asks them behind a gateway: the agent's prompt, temperature 0, so many tokens, so many seconds.
"""

import asyncio
import threading
from collections.abc import Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

from anabranch.errors import BackendError, InputError
from anabranch.routers.contract.ask import Arm, Ask
from anabranch.routers.router_r1.environment import Price, Reply
from anabranch.routers.router_r1.prompts import agent_prompt

__all__ = ["AskPool", "Member"]

# A token has at least one byte of its text; what a chat's template adds to a question is less than this.
_TEMPLATE_TOKENS = 200
# For calls that are cancelled to end in good order.
_CLOSE_S = 5.0


@dataclass(frozen=True)
class Member:
    """A model of a pool.

    Attributes:
        ask: who asks it.
        arm: as what.
        price: of it.
    """

    ask: Ask
    arm: Arm
    price: Price


class AskPool:
    """See the module. A `RoutePool`.

    Args:
        members: by the names that routers know them by.
        reply_tokens: most of a reply.
        call_s: most seconds of a call.

    Raises InputError for no model.
    """

    def __init__(self, members: Mapping[str, Member], *, reply_tokens: int = 512, call_s: float = 60.0) -> None:
        if not members:
            raise InputError("a pool needs at least one model with a price")
        self._members, self._reply_tokens, self._call_s = dict(members), reply_tokens, call_s
        self.prices = {name: member.price for name, member in members.items()}
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def most_usd(self, model: str, query: str) -> float:
        """What a call may cost at most, in dollars."""
        price = self.prices[model]
        prompt = len(agent_prompt(query, self._reply_tokens).encode("utf-8", "surrogatepass")) + _TEMPLATE_TOKENS
        return (price.prompt * prompt + price.completion * self._reply_tokens) / 1e6

    def reply(self, model: str, query: str) -> Reply:
        """See `RoutePool`.

        Raises BackendError for what a model fails with, and where it takes too long or the pool is closed, which is free (``is_free``)
        where that was before the model was asked.
        """
        begun = threading.Event()
        # At one go: a loop that is stopped in between would never come to it.
        with self._lock:
            coming = asyncio.run_coroutine_threadsafe(self._asked(model, query, begun), self._running())
        try:
            found = coming.result()
        except CancelledError:
            ended = BackendError(
                f"{model} had not {'answered' if begun.is_set() else 'been asked'} when the pool was closed"
            )
            ended.is_free = not begun.is_set()
            raise ended from None
        if not found.is_counted:
            return Reply(found.text, len(query.split()), len(found.text.split()), is_counted=False)
        return Reply(found.text, found.prompt_tokens, found.completion_tokens)

    async def _asked(self, model: str, query: str, begun: threading.Event) -> Any:
        # A task that is cancelled before its first step never comes here.
        begun.set()
        member = self._members[model]
        try:
            async with asyncio.timeout(self._call_s):
                return await member.ask(
                    member.arm,
                    agent_prompt(query, self._reply_tokens),
                    purpose="draft",
                    max_tokens=self._reply_tokens,
                    temperature=0.0,
                )
        except TimeoutError:
            raise BackendError(f"{model} did not answer within {self._call_s:g} seconds") from None

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=_run, args=(self._loop,), name="anabranch pool", daemon=True)
            self._thread.start()
        return self._loop

    def close(self) -> None:
        """End what it began, calls that are out among it, which fail; asked again it begins anew.

        What cannot be cancelled, such as the look-up of a name, is waited for 5 seconds, and ends by itself after that.
        """
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(_CLOSE_S)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    # Stopped, it cancels what is under way, and closes once that has ended.
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.get_loop().run_forever()
