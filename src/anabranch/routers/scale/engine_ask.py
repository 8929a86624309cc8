"""`EngineAsk`: an `Ask` over a model in this process, without a server or a socket.

    ask = EngineAsk(LLM("SmolLM2-135M-Instruct"), name="small", price=Price.of_dollars(0.1, 0.4))

The engine is given, not made: nothing here knows how it runs. What is asked at the same time is answered in one batch. Texts of ``stop``
are looked for in the whole answer: the tokens behind one were made, and count.
"""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from anabranch.errors import AnabranchError, BackendError, InputError
from anabranch.routers.contract.ask import Answered, Arm, Messages, Purpose, Said, Spent
from anabranch.routers.money import Price, dollars
from anabranch.routers.scale.client_ask import body_of

__all__ = ["EngineAsk"]

# Fields of a request that the engine reads as they are.
_READ = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
# What a request may have beside: it is looked at here, or means nothing to an engine.
_BESIDE = frozenset(
    {"model", "messages", "n", "stop", "logprobs", "top_logprobs", "max_completion_tokens", "user", "extra_body"}
)
# Of an answer that nobody has named an end of.
_TOKENS = 1024
_MOST_AT_ONCE = 32


class Engine(Protocol):
    """What `anabranch.serving.engine.LLM` has."""

    @property
    def tokenizer(self) -> Any:
        """Of the model."""

    def chat(self, conversations: Any, sampling: Any = None) -> Sequence[Any]:
        """Answers, in order: each with ``prompt``, ``tokens``, ``text``, ``finish`` and ``output.logprobs``."""


@dataclass
class _Wanted:
    """A call under way."""

    body: Mapping[str, Any]
    sampling: dict[str, Any]
    samples: int
    coming: Future[list[Any]] = field(default_factory=Future)


class EngineAsk:
    """See the module. It may be asked from several threads and loops; the engine runs in a thread of its own.

    Attributes:
        spent: what all calls came to.
        left: calls that may still be made: no end is known.

    Args:
        engine: an `LLM`.
        name: that it is asked by; any other is refused. "" for whatever it is called.
        price: of its tokens; None for nothing.
    """

    left = float("inf")

    def __init__(self, engine: Engine, *, name: str = "", price: Price | None = None) -> None:
        self._engine, self._name, self._price = engine, name, price or Price()
        self._calls: queue.SimpleQueue[_Wanted | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self.spent = Spent()

    async def __call__(
        self, arm: Arm | str, messages: Messages, *, purpose: Purpose | None = None, **how: Any
    ) -> Answered:
        """See `Ask`. Raises InputError for what an engine does not do, BackendError for what it fails with."""
        body, began = body_of(arm, messages, **how), time.monotonic()
        wanted = self._wanted(body)
        self._begin()
        self._calls.put(wanted)
        try:
            made = await asyncio.wrap_future(wanted.coming)
        except AnabranchError:
            raise
        except Exception as error:
            raise BackendError(f"{body['model']} did not answer: {type(error).__name__}: {str(error)[:200]}") from error
        return self._answered(body, made, time.monotonic() - began)

    async def stream(
        self, arm: Arm | str, messages: Messages, *, purpose: Purpose | None = None, **how: Any
    ) -> AsyncGenerator[Said | Answered, None]:
        """See `Ask`; the whole at once, as one piece. Raises as a call does."""
        found = await self(arm, messages, purpose=purpose, **how)
        if found.text:
            yield Said(found.text)
        yield found

    def close(self) -> None:
        """End the thread, after what is under way. The engine is whose it was."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._calls.put(None)
            thread.join()

    # What is asked

    def _wanted(self, body: Mapping[str, Any]) -> _Wanted:
        if self._name and body["model"] != self._name:
            raise InputError(f"the engine runs {self._name!r}, and {body['model']!r} is asked; name that")
        unknown = sorted(body.keys() - set(_READ) - _BESIDE) + sorted(
            (body.get("extra_body") or {}).keys() - set(_READ)
        )
        if unknown:
            raise InputError(f"an engine in this process knows no {unknown[0]!r}; leave it out of the arm's settings")
        given = {**body, **(body.get("extra_body") or {})}
        most = given.get("max_completion_tokens") or _TOKENS
        sampling = {"max_tokens": most} | {name: given[name] for name in _READ if given.get(name) is not None}
        if given.get("logprobs"):
            sampling["logprobs"] = int(given.get("top_logprobs") or 0)
        return _Wanted(body, sampling, int(given.get("n") or 1))

    # The thread

    def _begin(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="anabranch engine ask", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while (first := self._calls.get()) is not None:
            calls: list[_Wanted] = [first]
            ends = False
            while len(calls) < _MOST_AT_ONCE and not self._calls.empty():
                further = self._calls.get()
                ends = further is None
                if further is None:
                    break
                calls.append(further)
            # Who has left by now is not answered; who leaves later has been.
            self._make([call for call in calls if call.coming.set_running_or_notify_cancel()])
            if ends:
                return

    def _make(self, calls: Sequence[_Wanted]) -> None:
        """Answer all of them, or each alone where one of them fails: nobody's call fails for another's."""
        if not calls:
            return
        try:
            made = self._chat(calls)
        except Exception as error:
            if len(calls) == 1:
                calls[0].coming.set_exception(error)
                return
            for call in calls:
                self._make([call])
            return
        for call in calls:
            call.coming.set_result([made.pop(0) for _ in range(call.samples)])

    def _chat(self, calls: Sequence[_Wanted]) -> list[Any]:
        conversations, samplings = [], []
        for call in calls:
            seed = call.sampling.get("seed")
            for number in range(call.samples):
                conversations.append(call.body["messages"])
                samplings.append(call.sampling | ({} if seed is None else {"seed": seed + number}))
        return list(self._engine.chat(conversations, samplings))

    # What came

    def _answered(self, body: Mapping[str, Any], made: Sequence[Any], latency_s: float) -> Answered:
        ends = body.get("stop") or ()
        choices = tuple(self._choice(one, [ends] if isinstance(ends, str) else ends) for one in made)
        prompt, completion = len(made[0].prompt), sum(len(one.tokens) for one in made)
        cost = dollars(self._price.cost(prompt, completion, 0))
        with self._lock:
            self.spent = Spent(
                prompt_tokens=self.spent.prompt_tokens + prompt,
                completion_tokens=self.spent.completion_tokens + completion,
                cost=self.spent.cost + cost,
            )
        return Answered(
            model=body["model"],
            choices=choices,
            prompt_tokens=prompt,
            completion_tokens=completion,
            cost=cost,
            latency_s=latency_s,
        )

    def _choice(self, made: Any, ends: Sequence[str]) -> dict[str, Any]:
        places = [place for end in ends if (place := made.text.find(end)) >= 0]
        text, is_cut = made.text[: min(places, default=len(made.text))], bool(places)
        reason = "length" if str(made.finish) == "length" and not is_cut else "stop"
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
        if made.output.logprobs:
            choice["logprobs"] = {"content": [self._told(one) for one in made.output.logprobs]}
        return choice

    def _told(self, said: Any) -> dict[str, Any]:
        text = self._engine.tokenizer.decode
        top = [{"token": text([token], skip_special=False), "logprob": value} for token, value in said.top]
        return {"token": text([said.token], skip_special=False), "logprob": said.logprob, "top_logprobs": top}
