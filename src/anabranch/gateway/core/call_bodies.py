"""What has to be known of the body of a call before it is paid for: that it may be asked, how long it is, and what in it is billed.

All of that walks the whole conversation. A large one is looked at in another thread, where senders take turns, and once for all calls of a
request that send it: samples differ in what a call says itself (`SAID`), of which none is long. To see that a body is large, and the same
as another, takes a moment too, and samples are drawn all at once: they take turns, and others have theirs between them.
"""

import asyncio
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from anabranch.errors import InputError
from anabranch.gateway.asked import Asked, asked_of
from anabranch.gateway.core.call_room import MOST_BYTES
from anabranch.gateway.core.engine_counts import engine_count
from anabranch.gateway.prompt_tokens import PromptCount, count_prompt
from anabranch.gateway.providers.provider import UpstreamRequest
from anabranch.gateway.validate import check_chat, check_depth
from anabranch.web.api_error import ApiError
from anabranch.web.large_json import LARGE, weight_of

if TYPE_CHECKING:
    from anabranch.gateway.runtime import Runtime

Json = dict[str, Any]

# Of a body, without its size.
# Fields that one call says and the next says otherwise. They are no part of the prompt, and nothing of `Asked`.
SAID = frozenset(
    {"model", "n", "max_tokens", "max_completion_tokens", "temperature", "seed", "logprobs", "top_logprobs", "stop"}
    | {"stream"}
)

# Long lists, which are looked at apart.
_LONG = frozenset({"messages", "tools"})

# Bytes of a body from which on it takes a turn.
_TAKES_TIME = LARGE >> 3

# Conversations of one request that are remembered: its own, and what is asked about its answers.
_MOST = 4


@dataclass(frozen=True, slots=True)
class Looked:
    """What is known of a body.

    Attributes:
        count: of its prompt.
        asked: what else in it is billed.
        num_bytes: about its length, as `UpstreamRequest` takes it; counted no further than to see that it is sent alone (`CallRoom`).
    """

    count: PromptCount
    asked: Asked
    num_bytes: int


class CallBodies:
    """Those of one request.

    Args:
        runtime: that the request began on.
        sender: whose turn it is in the other thread.
    """

    def __init__(self, runtime: "Runtime", sender: str) -> None:
        self._runtime, self._sender = runtime, sender
        # Large ones: what is in them beside `SAID`, and what is known of that, or will be.
        self._known: list[tuple[Json, asyncio.Future[Looked]]] = []
        self._turn = asyncio.Lock()

    async def look(self, body: Json) -> Looked:
        """See the module. Raises InputError for a body that is no request for a chat."""
        try:
            async with self._turn:
                size, found = self._begun(body)
                if size > _TAKES_TIME:
                    await asyncio.sleep(0)
            # Whoever stops waiting leaves it to the others who wait for it.
            looked = found if isinstance(found, Looked) else await asyncio.shield(found)
        except ApiError as error:
            raise InputError(f"a strategy asks a model what cannot be asked: {error}") from None
        tokens, size = looked.count.tokens, looked.num_bytes
        request = UpstreamRequest("chat", body, prompt_tokens=tokens, num_bytes=size)
        count = await engine_count(self._runtime, body["model"], request, looked.count, self._sender)
        return replace(looked, count=count)

    def _begun(self, body: Json) -> "tuple[int, Looked | asyncio.Future[Looked]]":
        """How large a body is, and what is known of it; of a large one, what will be. Raises ApiError."""
        size, most_tokens = weight_of(body), self._runtime.config.limits.most_tokens
        if size <= LARGE:
            return size, _looked(body, most_tokens)
        # What this call says itself: another one that sends the same conversation must not fail of it.
        own = {name: value for name, value in body.items() if name not in _LONG}
        check_chat({**own, "messages": [{"role": "user", "content": ""}]}, most_tokens)
        return size, self._apart(body, most_tokens)

    def _apart(self, body: Json, most_tokens: int) -> "asyncio.Future[Looked]":
        shared = {name: value for name, value in body.items() if name not in SAID}
        for known, coming in self._known:
            if _is_same(shared, known):
                return coming
        work = partial(_looked, body, most_tokens)
        coming = asyncio.ensure_future(self._runtime.dispatcher.turns.run(self._sender, work))
        # It may fail when nobody waits any more.
        coming.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._known = [*self._known[1 - _MOST :], (shared, coming)]
        return coming


def _looked(body: Json, most_tokens: int) -> Looked:
    """Raises ApiError."""
    check_depth(body)
    check_chat(body, most_tokens)
    count = count_prompt(body)
    return Looked(count, asked_of(body, count), weight_of(body, MOST_BYTES))


def _is_same(one: Json, other: Json) -> bool:
    """Whether two bodies hold the same objects, so that nothing long has to be compared."""
    return one.keys() == other.keys() and all(
        _are_same(value, other[name]) if name == "messages" else _is_one(value, other[name])
        for name, value in one.items()
    )


def _are_same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    if len(one) != len(other):
        return False
    # Of tens of thousands, all or most are the same objects: that is seen in C.
    if all(map(operator.is_, one, other)):
        return True
    rest = [at for at, is_same in enumerate(map(operator.is_, one, other)) if not is_same]
    return all(_is_one(one[at], other[at]) for at in rest)


def _is_one(one: Any, other: Any) -> bool:
    """The same object; or the same text, alone or as a message, which is made anew for each call."""
    if one is other:
        return True
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys() == {"role", "content"}:
        return _is_one(one["role"], other["role"]) and _is_one(one["content"], other["content"])
    return isinstance(one, str) and isinstance(other, str) and one == other
