"""`Asked`: one request as what answers it sees it, whatever it came by: a socket (`context`), or a call in this process (`inside`)."""

import asyncio
import contextlib
import difflib
import logging
import re
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from typing import Any

from aiohttp import web

from anabranch.errors import AnabranchError
from anabranch.serving.http.config import HttpConfig
from anabranch.web.answer_room import AnswerRoom, HeldAnswer
from anabranch.web.answers import error_response, json_response
from anabranch.web.api_error import ApiError, wrong
from anabranch.web.body import parse
from anabranch.web.json_size import check_json_size
from anabranch.web.large_json import is_light, json_slices
from anabranch.web.slices import sliced
from anabranch.web.turns import Turns

logger = logging.getLogger(__name__)

PLAIN = re.compile(r"[^\x20-\x7e]")
# Reading more than this would hold up the others, so it is done in a thread.
LONG_CHARACTERS = 20_000
# Of the fields that nobody knows.
MOST_TOLD = 10
_PARSING = threading.Lock()
Apart = Callable[..., Awaitable[Any]]


class Asked:
    """One request.

    Attributes:
        id: its sender's, else a new one.
        began: seconds of `time.monotonic`.
        key: name of the key that it came with; "" without keys.
        headers: of the answer, whatever it is.
        facts: for the access log.
        endpoint: label in the metrics.
        code: status of the answer once that is written; 499 until then, in case the sender goes away.
        default_tokens: most new tokens where it names no end, if there is room for so many; None for what that means at OpenAI.

    Args:
        config: of the server.
        apart: calls a function in a thread, see `Frontend.apart`.
        writing: turns of the loop in which long answers are written.
        answers: room for what answers are made of.
        id, key: see above.
    """

    def __init__(
        self, config: HttpConfig, apart: Apart, writing: Turns, answers: AnswerRoom, id: str, key: str = ""
    ) -> None:
        self._config, self._apart, self._writing, self._answers = config, apart, writing, answers
        self._held: HeldAnswer | None = None
        self.id, self.key = id, key
        self.began = time.monotonic()
        self.endpoint, self.code = "other", 499
        self.headers = {"x-request-id": id}
        self.facts: dict[str, Any] = {}
        self.default_tokens: int | None = None

    # What it came by

    @property
    def length(self) -> int | None:
        """Bytes of its body; None if that is not known."""
        raise NotImplementedError

    async def body(self, most_tokens: int = 0) -> dict[str, Any]:
        """Its JSON, with room for ``most_tokens`` token ids; `let_go` when nothing is left of it. Raises ApiError."""
        raise NotImplementedError

    def let_go(self) -> None:
        """Nothing is left of its body. A second call does nothing."""

    @property
    def source(self) -> str:
        """Whose it is: the key, or where there are none the address."""
        return self.key

    def cut(self) -> None:
        """End it: its answer takes room that others need."""
        raise NotImplementedError

    def deadline_s(self) -> float | None:
        """Seconds it has, from its beginning; None for no bound. Raises ApiError."""
        return self._config.limits.deadline_s

    async def give(self, response: web.Response) -> None:
        """Hand a whole answer to whoever asked."""
        raise NotImplementedError

    async def give_slices(self, slices: AsyncIterator[bytes]) -> web.StreamResponse:
        """Hand JSON to whoever asked, as it is made."""
        raise NotImplementedError

    async def give_events(
        self,
        headers: Mapping[str, str],
        events: AsyncIterator[bytes],
        failed: Callable[[ApiError], bytes],
        ending: bytes,
    ) -> tuple[web.StreamResponse, ApiError | None]:
        """Hand events to whoever asked, as they come; arguments, result and errors as of `anabranch.serving.http.stream.send`."""
        raise NotImplementedError

    # What is the same for all

    def hold(self, num_bytes: int) -> None:
        """Its answer takes so many bytes more, until `close`.

        Raises ApiError: 429, or 503 by config, where there is no room for them now, 400 where there never is.
        """
        if not num_bytes:
            return
        if self._held is None:
            self._held = self._answers.enter(self.source, self.cut)
        self._held.more(num_bytes)

    def begin_reading(self) -> None:
        """What it holds goes to its reader from now on: where others lack room and it takes long, it is cut."""
        if self._held is not None:
            self._held.is_read()

    def close(self) -> None:
        """It has ended, and nothing is left of it or its answer. A second call does nothing."""
        self.let_go()
        if self._held is not None:
            self._held.close()

    def left_s(self) -> float | None:
        """What is left of `deadline_s` now, less than 0 once it has passed. Raises ApiError."""
        deadline_s = self.deadline_s()
        return None if deadline_s is None else deadline_s - (time.monotonic() - self.began)

    async def parsed(self, raw: bytes, most_tokens: int) -> dict[str, Any]:
        """A body's JSON; a long one is read in a thread. Raises ApiError (400), and what `Frontend.apart` does."""
        if len(raw) <= LONG_CHARACTERS:
            return parse(raw)
        limits = self._config.limits
        return await self._apart(self.key, _parse_long, raw, max(limits.body_values, most_tokens), limits.body_parts)

    def warn(self, unknown: tuple[str, ...], known: Collection[str]) -> None:
        """Tell of the first fields that nobody knows, each with the one of ``known`` it may be; refuse them in strict mode (ApiError)."""
        if not unknown:
            return
        # A look for what a name may be takes time, and a body may have very many names.
        names = ", ".join(sorted(_told(name, known) for name in unknown[:MOST_TOLD]))
        if len(unknown) > MOST_TOLD:
            names += f" and {len(unknown) - MOST_TOLD:,} more"
        if self._config.strict:
            raise wrong(unknown[0][:80], f"nobody knows these fields: {names}", "unknown_parameter")
        self.headers["x-warning"] = f"ignored unknown fields: {names}"

    def json(self, value: Any, status: int = 200) -> web.Response:
        """An answer, a short one."""
        return json_response(value, status, self.headers)

    async def give_json(self, value: Any) -> web.StreamResponse:
        """Hand an answer to whoever asked, whatever its size: what is made of `Rows` is made as it is handed over. See `sliced`."""
        self.begin_reading()
        if is_light(value):
            response = self.json(value)
            await self.give(response)
            return response
        async with contextlib.aclosing(self.sliced(json_slices(value))) as slices:
            return await self.give_slices(slices)

    def sliced(self, slices: Iterator[bytes]) -> AsyncGenerator[bytes]:
        """The slices of an answer, in turn with those of other keys."""
        return sliced(self._writing, self.key, slices)

    def refuse(self, error: ApiError) -> web.Response:
        """An answer that is an error."""
        response = error_response(error)
        response.headers.update(self.headers)
        self.facts["error"] = error.code
        return response


async def answered(asked: Asked, answering: Awaitable[web.StreamResponse], what: str) -> web.StreamResponse:
    """The answer, errors among it: in OpenAI's form, and none unforeseen reaches whoever asked.

    Args:
        asked: the request.
        answering: makes the answer.
        what: was asked for, for the log.

    Raises CancelledError and ConnectionError alone: nobody waits for it any longer.
    """
    try:
        return await answering
    except ApiError as error:
        return asked.refuse(error)
    except (asyncio.CancelledError, ConnectionError):
        raise
    except AnabranchError as error:
        return asked.refuse(ApiError(400, "invalid_value", str(error)))
    except Exception as error:
        # A bug of ours: the log says what, the client only that.
        logger.error("a bug: %s", what, exc_info=error)
        return asked.refuse(ApiError(500, "internal_error", "the server failed; its log says how"))


def _parse_long(raw: bytes, most_values: int, most_parts: int) -> dict[str, Any]:
    check_json_size(raw, most_values, most_parts)
    # One at a time: each holds Python's lock while it lasts, and all other threads together may have it as often.
    with _PARSING:
        return parse(raw)


def _told(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name[:40], known, n=1, cutoff=0.8)
    return PLAIN.sub("?", name[:40]) + (f" (did you mean {near[0]}?)" if near and near[0] != name else "")
