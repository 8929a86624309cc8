"""A provider as OpenAI and Anthropic bill: what was made is on the invoice, whether or not anybody was there to take it.

A real HTTP server on loopback with ``/v1/chat/completions`` (whole and streamed) and ``/v1/messages`` (likewise). What each call meets is
drawn from its number:

    fine      an answer
    slow      an answer after ``slow_s``. A whole one is made to its end and billed, also when the caller has gone; a stream stops within
              ``notices`` tokens of a connection that is gone, and is billed for what was made
    refused   429 or 500 at once, billed with nothing
    lost      the answer is made and billed, and the connection breaks before its first byte. A stream takes as long as one that is sent
              out, and stops within ``notices`` tokens of a caller that has gone, as above
    cut       a stream breaks in the middle; what was made is billed, with up to ``ahead`` tokens that never went out. A whole answer
              breaks in its middle too, and is billed whole

How it speaks is drawn too, from ``habits``; the bill does not depend on it:

    usual     words; the usage with a whole answer, and behind the end of a stream that asks for it
    zeros     as usual, and a usage of zeros with each chunk before that
    stale     likewise, with the true prompt and one token
    mute      no usage at all
    dense     as usual, and tokens of one byte, up to ten in a chunk
"""

import asyncio
import json
import math
import random
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, ClassVar

from aiohttp import web

from anabranch.routers.money import PER, Price

Json = dict[str, Any]
HABITS = ("usual", "zeros", "stale", "mute", "dense")
FATES = ("fine", "slow", "refused", "lost", "cut")


class BillingProvider:
    """See the module.

    Attributes:
        bills: nano-dollars by the number that a prompt carries (``#17 ...``), exactly, of all its calls.
        calls: how many were begun, by fate.

    Args:
        prices: of its models.
        seed: of what calls meet.
        weights: of `FATES`.
        slow_s: of a slow call, before its first byte.
        token_s: between the tokens of a stream.
        notices: tokens that are made after the caller has gone.
        ahead: see the module.
        habits: weights of `HABITS`.
        after_s: between the end of an answer and its usage.
    """

    def __init__(
        self,
        prices: dict[str, Price],
        seed: int,
        weights: tuple[float, ...] = (1, 0, 0, 0, 0),
        *,
        slow_s: float = 0.5,
        token_s: float = 0.0005,
        notices: int = 4,
        ahead: int = 3,
        habits: tuple[float, ...] = (1, 0, 0, 0, 0),
        after_s: float = 0.0,
    ) -> None:
        self.prices, self.seed, self.weights = prices, seed, weights
        self.habits, self.after_s = habits, after_s
        self.slow_s, self.token_s, self.notices, self.ahead = slow_s, token_s, notices, ahead
        self.bills: dict[int, int] = defaultdict(int)
        self.calls: dict[str, int] = defaultdict(int)
        self.url = ""
        self._at = self._under_way = 0
        # What says what a call is, what of it is told, and what it costs: see `billing_extras`.
        self.call_kind: type[Call] = Call

    @property
    def total_nano(self) -> int:
        """Of the invoice."""
        return sum(self.bills.values())

    async def idle(self) -> None:
        """Wait until no call is under way: then all is billed."""
        while self._under_way:
            await asyncio.sleep(0.005)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["BillingProvider"]:
        """Serves, on a free port of loopback."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/chat/completions", partial(self._counted, form=OpenAIForm()))
        app.router.add_post("/v1/messages", partial(self._counted, form=AnthropicForm()))
        # Handlers go on when the caller is gone, as aiohttp's do unless told otherwise.
        runner = web.AppRunner(app, shutdown_timeout=self.slow_s + 1, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _counted(self, request: web.Request, form: "OpenAIForm | AnthropicForm") -> web.StreamResponse:
        self._under_way += 1
        try:
            return await self._answered(request, form)
        finally:
            self._under_way -= 1

    async def _answered(self, request: web.Request, form: "OpenAIForm | AnthropicForm") -> web.StreamResponse:
        body = await request.json()
        draw, self._at = random.Random(f"{self.seed} {self._at}"), self._at + 1
        fate = draw.choices(FATES, self.weights)[0]
        self.calls[fate] += 1
        if fate == "refused":
            status = draw.choice((429, 500))
            return web.json_response(form.error(status), status=status)
        call = self.call_kind(body, draw, draw.choices(HABITS, self.habits)[0])
        if fate == "slow":
            await asyncio.sleep(self.slow_s)
        if fate == "lost":
            self._bill(call, await self._made_in_vain(request, call) if body.get("stream") else call.length)
            _break(request)
            return web.Response()
        if body.get("stream"):
            return await self._streamed(request, form, call, draw.randint(1, call.length) if fate == "cut" else None)
        self._bill(call, call.length)
        if fate == "cut":
            return await self._broken(request, json.dumps(form.whole(call)).encode())
        return web.json_response(form.whole(call))

    async def _broken(self, request: web.Request, data: bytes) -> web.StreamResponse:
        """Half of an answer."""
        response = web.StreamResponse(headers={"content-type": "application/json", "content-length": str(len(data))})
        await response.prepare(request)
        await response.write(data[: len(data) // 2])
        _break(request)
        return response

    async def _made_in_vain(self, request: web.Request, call: "Call") -> int:
        """Make the tokens of a stream that never goes out, no faster than those of one that does: how many there were."""
        made, unnoticed = 0, self.notices
        while made < call.length and unnoticed > 0:
            size = min(call.at_once, call.length - made)
            made += size
            await asyncio.sleep(size * self.token_s)
            if _is_gone(request):
                unnoticed -= size
        return made

    async def _streamed(
        self, request: web.Request, form: "OpenAIForm | AnthropicForm", call: "Call", cut_at: int | None
    ) -> web.StreamResponse:
        """Make and send tokens, up to four at a time. Whatever ends it, what was made is billed."""
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        made, unnoticed = 0, self.notices
        try:
            await response.prepare(request)
            await response.write(form.begin(call))
            while made < call.length:
                size = min(
                    call.draw.randint(1, call.at_once), call.length - made, cut_at - made if cut_at else call.at_once
                )
                made += size
                if self.token_s:
                    await asyncio.sleep(size * self.token_s)
                if _is_gone(request):
                    # It takes a few tokens until it is seen that nobody is there.
                    unnoticed -= size
                    if unnoticed <= 0 or made == cut_at:
                        return response
                    continue
                await response.write(form.token(call, size))
                if made == cut_at:
                    made = min(call.length, made + self.ahead)
                    _break(request)
                    return response
            await response.write(form.end(call))
            if self.after_s:
                await asyncio.sleep(self.after_s)
            await response.write(form.usage(call))
            await response.write_eof()
        except ConnectionError:
            made = min(call.length, made + self.notices)
        finally:
            self._bill(call, made)
        return response

    def _bill(self, call: "Call", made: int) -> None:
        self.bills[call.number] += call.nano(self.prices[call.model], made * call.choices)


def _is_gone(request: web.Request) -> bool:
    """Whether the caller has closed the connection."""
    return request.transport is None or request.transport.is_closing()


def _break(request: web.Request) -> None:
    """Break the connection, if it is there."""
    if request.transport is not None:
        request.transport.abort()


class Call:
    """What was asked, how it is answered, and how long the answer is: up to what was asked for at most."""

    def __init__(self, body: Json, draw: random.Random, habit: str = "usual") -> None:
        self.model, self.draw, self.habit = body["model"], draw, habit
        text = json.dumps(body["messages"])
        self.number = int(text.partition("#")[2].split()[0]) if "#" in text else -1
        self.prompt = len(text.encode()) // 5 + 3
        most = body.get("max_completion_tokens") or body.get("max_tokens") or 10**9
        self.length = max(1, min(most, int(draw.triangular(most / 2, most, most)) if most < 10**9 else 50))
        self.tells_usage = bool((body.get("stream_options") or {}).get("include_usage")) and habit != "mute"
        self.at_once = 10 if habit == "dense" else 4
        # Of OpenAI's form; all are made at the same time, and as long as each other.
        self.choices = body.get("n") or 1

    def text(self, size: int) -> str:
        """So many tokens."""
        return "1," * (size // 2) + "7" * (size % 2) if self.habit == "dense" else "word " * size

    def nano(self, price: Price, made: int) -> int:
        """What is billed, if so many tokens were made."""
        return math.ceil((self.prompt * price.input + made * price.output) / PER)

    def openai_usage(self) -> Json:
        """Of the whole answer."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.length * self.choices,
            "total_tokens": self.prompt + self.length * self.choices,
        }

    def anthropic_usage(self) -> Json:
        """Of the prompt."""
        return {"input_tokens": self.prompt}

    def beside(self) -> Json:
        """Fields beside an answer's choices, of OpenAI's form."""
        return {}

    def usage_so_far(self) -> Json:
        """The field that a chunk before the end has, or none."""
        if self.habit not in ("zeros", "stale"):
            return {}
        prompt, completion = (0, 0) if self.habit == "zeros" else (self.prompt, 1)
        return {
            "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        }


def _data(value: Json, name: str = "") -> bytes:
    return (f"event: {name}\n" if name else "").encode() + b"data: " + json.dumps(value).encode() + b"\n\n"


class OpenAIForm:
    """Of chat completions."""

    head: ClassVar[Json] = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}

    def error(self, status: int) -> Json:
        """What a refusal says."""
        return {"error": {"message": "not now", "type": "server_error", "code": str(status), "param": None}}

    def whole(self, call: Call) -> Json:
        """An answer."""
        message = {"role": "assistant", "content": call.text(call.length)}
        choices = [{"index": at, "message": message, "finish_reason": "stop"} for at in range(call.choices)]
        usage = {} if call.habit == "mute" else {"usage": call.openai_usage()}
        # Long beside a short answer, and no part of it.
        return {
            **self.head,
            "object": "chat.completion",
            "system_fingerprint": "f" * 2000,
            "choices": choices,
            **usage,
            **call.beside(),
        }

    def _chunk(self, call: Call, delta: Json, reason: str | None = None) -> bytes:
        return b"".join(
            _data(
                {
                    **self.head,
                    "choices": [{"index": at, "delta": delta, "finish_reason": reason}],
                    **call.usage_so_far(),
                }
            )
            for at in range(call.choices)
        )

    def begin(self, call: Call) -> bytes:
        """Before the first token."""
        return self._chunk(call, {"role": "assistant", "content": ""})

    def token(self, call: Call, size: int) -> bytes:
        """So many tokens at once."""
        return self._chunk(call, {"content": call.text(size)})

    def end(self, call: Call) -> bytes:
        """After the last."""
        return self._chunk(call, {}, "stop")

    def usage(self, call: Call) -> bytes:
        """Behind the end."""
        usage = (
            _data({**self.head, **call.beside(), "choices": [], "usage": call.openai_usage()})
            if call.tells_usage
            else b""
        )
        return usage + b"data: [DONE]\n\n"


class AnthropicForm:
    """Of messages."""

    def error(self, status: int) -> Json:
        """What a refusal says."""
        kind = "rate_limit_error" if status == 429 else "api_error"
        return {"type": "error", "error": {"type": kind, "message": "not now"}}

    def whole(self, call: Call) -> Json:
        """An answer."""
        usage = {**call.anthropic_usage(), "output_tokens": call.length}
        return {
            "id": "m",
            "type": "message",
            "role": "assistant",
            "model": "m",
            "stop_reason": "end_turn",
            "content": [{"type": "text", "text": call.text(call.length)}],
            **({} if call.habit == "mute" else {"usage": usage}),
        }

    def begin(self, call: Call) -> bytes:
        """Before the first token."""
        told = {"input_tokens": 0, "output_tokens": 0}
        if call.habit != "zeros":
            told = {**call.anthropic_usage(), "output_tokens": 1}
        usage = {} if call.habit == "mute" else {"usage": told}
        message = {"id": "m", "type": "message", "role": "assistant", "model": "m", "content": [], **usage}
        start = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        return _data({"type": "message_start", "message": message}, "message_start") + _data(start, start["type"])

    def token(self, call: Call, size: int) -> bytes:
        """So many tokens at once."""
        delta = {"type": "text_delta", "text": call.text(size)}
        return _data({"type": "content_block_delta", "index": 0, "delta": delta}, "content_block_delta")

    def end(self, call: Call) -> bytes:
        """After the last."""
        late = call.anthropic_usage() if call.habit == "zeros" else {}
        usage = {} if call.habit == "mute" else {"usage": {**late, "output_tokens": call.length}}
        said = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, **usage}
        stop = _data({"type": "content_block_stop", "index": 0}, "content_block_stop")
        return stop + _data(said, "message_delta")

    def usage(self, call: Call) -> bytes:
        """Behind the end, where there is none: it was said with it."""
        return _data({"type": "message_stop"}, "message_stop")
