"""`ClientAsk`: an `Ask` over an OpenAI client, of whatever endpoint it was made for.

    ask = ClientAsk(openai.AsyncOpenAI(base_url="http://localhost:8000/v1", api_key="-"), prices={"qwen3": Price.of_dollars(0.1, 0.4)})

The client is given, not made: nothing here knows HTTP. One that is not async is called in threads. Its own retries count as one call, of
which it tells the last answer's tokens; make it with ``max_retries=0`` to have them counted. What an endpoint bills for an answer that did
not come, or without ``usage``, it tells nobody here: the error of a call that nobody bills says so (``is_free``), and an answer whose
tokens were not told, too (``is_counted``).
"""

import asyncio
import contextlib
import inspect
import json
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from anabranch.errors import AnabranchError, BackendError
from anabranch.routers.contract.ask import Answered, Arm, Messages, Purpose, Said, Spent
from anabranch.routers.contract.choices import wrong_choices
from anabranch.routers.money import Price, dollars

# Fields of OpenAI's that its client takes as arguments; others go into its ``extra_body``.
KNOWN = frozenset(
    {
        "model",
        "messages",
        "n",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "logprobs",
        "top_logprobs",
        "frequency_penalty",
        "presence_penalty",
        "logit_bias",
        "response_format",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "user",
        "reasoning_effort",
        "service_tier",
        "store",
        "metadata",
        "modalities",
        "audio",
        "prediction",
        "verbosity",
        "stream",
        "stream_options",
        "safety_identifier",
        "prompt_cache_key",
        "web_search_options",
    }
)
# Of one answer: whoever tells more tells nothing that can be.
_MOST_TOKENS = 10**9


class ClientAsk:
    """See the module.

    Attributes:
        spent: what all calls came to that told their tokens.
        left: calls that may still be made: no end is known.

    Args:
        client: an ``openai.OpenAI`` or ``openai.AsyncOpenAI``, or what has its ``chat.completions.create``.
        prices: of models, by name; the cost of others is 0.
        concurrency: most calls at a time.
    """

    left = math.inf

    def __init__(self, client: Any, *, prices: Mapping[str, Price] | None = None, concurrency: int = 8) -> None:
        self._create, self._prices = client.chat.completions.create, dict(prices or {})
        self._is_async = inspect.iscoroutinefunction(self._create) or type(client).__name__.startswith("Async")
        self._concurrency = concurrency
        # Of the loop that it is used in: one that is used by several runs in turn has another each time.
        self._rooms: dict[int, asyncio.Semaphore] = {}
        self.spent = Spent()

    async def __call__(
        self, arm: Arm | str, messages: Messages, *, purpose: Purpose | None = None, **how: Any
    ) -> Answered:
        """See `Ask`. Raises BackendError for whatever the client fails with, and for what is no answer of a chat."""
        body = body_of(arm, messages, **how)
        began = time.monotonic()
        async with self._room():
            try:
                found = self._create(**body) if self._is_async else await in_thread(lambda: self._create(**body))
                told = plain(await found if inspect.isawaitable(found) else found)
            except Exception as error:
                failed = BackendError(f"{body['model']} did not answer: {type(error).__name__}: {str(error)[:200]}")
                if isinstance(error, AnabranchError):
                    failed.is_free, failed.is_transient = error.is_free, error.is_transient
                raise failed from error
        return self._answered(body["model"], told, time.monotonic() - began)

    async def stream(
        self, arm: Arm | str, messages: Messages, *, purpose: Purpose | None = None, **how: Any
    ) -> AsyncGenerator[Said | Answered, None]:
        """See `Ask`; the whole at once, as one piece. Raises as a call does."""
        found = await self(arm, messages, purpose=purpose, **how)
        if found.text:
            yield Said(found.text)
        yield found

    def _room(self) -> asyncio.Semaphore:
        loop = id(asyncio.get_running_loop())
        if loop not in self._rooms:
            self._rooms = {loop: asyncio.Semaphore(self._concurrency)}
        return self._rooms[loop]

    def _answered(self, model: str, body: Any, latency_s: float) -> Answered:
        choices = body.get("choices") if isinstance(body, Mapping) else None
        usage = body.get("usage") if isinstance(body, Mapping) else None
        prompt, completion, cached = _tokens(usage)
        price = self._prices.get(model)
        cost = 0.0 if price is None else dollars(price.cost(prompt, completion, min(cached, prompt)))
        self.spent = Spent(
            prompt_tokens=self.spent.prompt_tokens + prompt,
            completion_tokens=self.spent.completion_tokens + completion,
            cost=self.spent.cost + cost,
        )
        what = wrong_choices(choices) or ("" if _can_be_kept(choices) else "choices are no JSON")
        if choices is None or what:
            raise BackendError(f"{model} gave an answer whose {what}")
        answered = Answered(
            model=model,
            choices=tuple(choices),
            prompt_tokens=prompt,
            completion_tokens=completion,
            cached_tokens=cached,
            cost=cost,
            latency_s=latency_s,
        )
        # No chat is without a token of its prompt, nor a text without one of its own.
        return replace(answered, is_counted=prompt > 0 and (completion > 0 or not any(answered.texts)))


class PostClient:
    """What posts bodies (`anabranch.web.endpoint.Endpoint`) as OpenAI's clients are called: ``chat.completions.create``."""

    def __init__(self, endpoint: Any) -> None:
        self._endpoint = endpoint
        self.chat = self.completions = self

    def create(self, **body: Any) -> dict[str, Any]:
        """Post a chat."""
        extra = body.pop("extra_body", {})
        found: dict[str, Any] = self._endpoint.post("/chat/completions", {**body, **extra})
        return found


def body_of(
    arm: Arm | str,
    messages: Messages,
    *,
    n: int | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    logprobs: int | None = None,
    stop: Sequence[str] = (),
) -> dict[str, Any]:
    """Arguments of a client's ``create``."""
    arm = Arm(arm) if isinstance(arm, str) else arm
    given = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(one) for one in messages]
    if arm.system is not None:
        rest = [one for one in given if one.get("role") not in ("system", "developer")]
        given = [{"role": "system", "content": arm.system}, *rest]
    said = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "stop": list(stop) or None}
    fields = {**arm.settings, **{name: value for name, value in said.items() if value is not None}}
    if max_tokens is not None:
        fields.pop("max_completion_tokens", None)
    if (samples := arm.samples if n is None else n) != 1:
        fields["n"] = samples
    if logprobs is not None:
        fields |= {"logprobs": True} | ({"top_logprobs": logprobs} if logprobs else {})
    extra = {**fields.pop("extra_body", {}), **{name: fields.pop(name) for name in sorted(fields.keys() - KNOWN)}}
    return {**fields, "model": arm.model, "messages": given} | ({"extra_body": extra} if extra else {})


async def in_thread(work: Callable[[], Any]) -> Any:
    """``work()`` in a thread of its own, which nobody waits for who has left: one that hangs holds up no loop's end, nor Python's."""
    loop = asyncio.get_running_loop()
    coming: asyncio.Future[Any] = loop.create_future()

    def end(found: Any, error: BaseException | None) -> None:
        if not coming.done():
            if error is None:
                coming.set_result(found)
            else:
                coming.set_exception(error)

    def run() -> None:
        found: Any = None
        error: BaseException | None = None
        try:
            found = work()
        except Exception as raised:
            error = raised
        # A loop that has ended meanwhile has nobody left who waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(end, found, error)

    threading.Thread(target=run, name="scale-client", daemon=True).start()
    return await coming


def plain(found: Any) -> Any:
    """An answer of a client as plain JSON."""
    dump = getattr(found, "model_dump", None)
    # What an endpoint wrote is not checked by its client, and need not be what the client's types say.
    return dump(mode="json", exclude_unset=True, warnings=False) if callable(dump) else found


def _can_be_kept(choices: Any) -> bool:
    """Whether a journal could write them: clients are not all of OpenAI's, and what they give need not have come as JSON."""
    try:
        json.dumps(choices)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _tokens(usage: Any) -> tuple[int, int, int]:
    """Prompt, completion and cached tokens that an answer tells; 0 for what it does not tell as a number that can be."""
    table = usage if isinstance(usage, Mapping) else {}
    details = table.get("prompt_tokens_details")
    told = (
        table.get("prompt_tokens"),
        table.get("completion_tokens"),
        details.get("cached_tokens") if isinstance(details, Mapping) else 0,
    )
    prompt, completion, cached = (one if type(one) is int and 0 <= one <= _MOST_TOKENS else 0 for one in told)
    return prompt, completion, cached
