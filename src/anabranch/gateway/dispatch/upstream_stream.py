"""`Opened`: one upstream's stream, as blocks of whole events in OpenAI's form.

Until the first token every chunk is read. After it, blocks that plainly hold chunks are passed on unread: only their shape is looked at,
and what they say is counted, for upstreams that send no usage. All else (an error, usage, the end, a foreign form) is read event by event.
"""

import asyncio
import logging
import math
import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from anabranch.gateway.dispatch.attempt_ends import OURS, stops
from anabranch.gateway.dispatch.billed import broken_off
from anabranch.gateway.dispatch.deployment_state import Live
from anabranch.gateway.dispatch.kept_stream import no_room
from anabranch.gateway.dispatch.plan import Attempt
from anabranch.gateway.dispatch.provider_fault import as_failure, refusal
from anabranch.gateway.dispatch.stream_lag import AHEAD_BYTES
from anabranch.gateway.dispatch.stream_made import Made
from anabranch.gateway.dispatch.stream_tally import Tally
from anabranch.gateway.logged_error import raised
from anabranch.gateway.plain_values import plain_numbers
from anabranch.gateway.prompt_tokens import num_shown
from anabranch.gateway.providers.answer_shape import in_counts
from anabranch.gateway.providers.chunks import as_chunks, ended, has_content
from anabranch.gateway.providers.content_lists import flattened
from anabranch.gateway.providers.native_events import NATIVE
from anabranch.gateway.providers.provider import (
    BODY_BYTES,
    Answer,
    Failure,
    Json,
    Reply,
    Translator,
    UpstreamError,
    UpstreamRequest,
    Usage,
    excess,
    garbage,
    parse_object,
)
from anabranch.gateway.providers.sse import DONE_DATA, EVENT_BYTES, Splitter, events
from anabranch.gateway.providers.vocabulary import status_said
from anabranch.web.sse import event
from anabranch.web.turns import plainly

if TYPE_CHECKING:
    from anabranch.gateway.dispatch.run import Run

logger = logging.getLogger(__name__)
# Of content in parts, which is put into OpenAI's form.
_LIST = re.compile(rb'"content"\s*:\s*\[')
# Some servers say an empty one with every chunk (SGLang, Ollama).
_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"[^"]')

# How long the usage is waited for that comes behind the end of an answer whose reader has gone: nothing more is made meanwhile.
USAGE_S = 5.0


class Opened:
    """See the module.

    Attributes:
        first: events up to the first token, and, once `read_whole` was called, all of them.
        head: of the first chunk: its id, model and the like.
        tally: of what has come.
        made: what it can have made beside that.
        is_done: nothing more will come.
        has_finished: every choice that was asked for came to its end, whatever the connection does.
        has_given_usage: a chunk with the usage was passed on.
        num_bytes: that have come, pings and comments among them.
        num_signs: how often something whole came, be it a ping or a comment.

    Args:
        stitch: the head of a stream that broke off: chunks take it over, and say no role, so that they go on with that stream.
    """

    def __init__(
        self,
        run: "Run",
        live: Live,
        attempt: Attempt,
        request: UpstreamRequest,
        reply: Reply,
        stitch: Json | None = None,
    ) -> None:
        self.run, self.live, self.attempt, self.request, self.reply = run, live, attempt, request, reply
        self.splitter = Splitter()
        self.translator: Translator | None = plainly(lambda: live.provider.translator(request))
        self.first, self.head = b"", Json()
        self.is_done = self.has_finished = self.has_given_usage = False
        self._stitch = stitch
        self._usage_body: Json | None = None
        self._gives_usage = request.wants_usage and stitch is None
        self._tells_all_along = request.wants_usage and bool(
            request.body["stream_options"].get("continuous_usage_stats")
        )
        self._has_begun = self._is_settled = False
        self.num_bytes = self.num_signs = 0
        self._num_choices, self._whole = num_shown(request.endpoint, request.body), set[int]()
        self.tally = Tally(request.prompt_tokens, self._num_choices, bool(request.body.get("echo")))
        self.made = Made(run, live, attempt, request, self.tally)

    def counted(self) -> Usage:
        """What the upstream said of all of it, else an estimate."""
        return self.tally.counted(self.is_done)

    @property
    def usage_body(self) -> Json | None:
        """The usage of all of it in the upstream's words; None if it did not say that."""
        return self._usage_body if self._is_told else None

    @property
    def _is_told(self) -> bool:
        """The upstream said what the whole answer comes to."""
        return self.tally.is_told(self.is_done)

    def settle(self) -> None:
        """The answer is whole: close the books of its attempt, once."""
        if not self._is_settled:
            self._is_settled = True
            usage, most = self.counted(), self.attempt.most
            self.attempt.seen = usage.completion
            if not self._is_told and most is not None:
                usage = self.made.untold(most, self.told)
            self.run.ends.won(self.live, self.attempt, usage, self.made.waited_s)
            if self._is_told:
                self.made.told_whole(usage)

    def drop(self, failure: Failure | None = None) -> None:
        """It broke, or, without a ``failure``, nobody wants it any more. What it can have made so far is charged."""
        if self._is_settled:
            if not self.attempt.is_late:
                self.reply.close()
            return
        self._is_settled = True
        most, is_behind, reads_on = self.attempt.most, self._look_ahead(), False
        usage = self.counted()
        self.attempt.seen = usage.completion
        if most is not None and not self._is_told:
            if self.has_finished and not is_behind:
                # No more is made, but it may not have said yet what it came to.
                usage = self.made.untold(most, self.told)
                reads_on = failure is None and not self.is_done and self.read_on(USAGE_S)
            elif stops(self.live, failure):
                usage = self.made.left(most, self.told)
            else:
                usage = broken_off(most, self.told, 0, None)
                reads_on = (failure is None or failure.kind in OURS) and self.read_on()
        self.run.ends.lost(self.live, self.attempt, failure, usage)
        if not reads_on:
            self.reply.close()

    def read_on(self, seconds: float = math.inf) -> bool:
        """Read to the end for the usage, while nobody waits for it, for so long at most; call it before the attempt is `lost`.

        Returns whether it is: not so where there is no room for it, or nothing that it could cost.
        """
        attempt, most = self.attempt, self.attempt.most
        if most is None or not self.live.bill(most, most):
            return False

        async def read() -> None:
            while not self.is_done and not self._is_told:
                await self.next()

        reading = asyncio.ensure_future(read())

        def known() -> None:
            error = None if reading.cancelled() else reading.exception()
            if error is not None:
                logger.debug("%s ended without its usage: %s", self.live.name, type(error).__name__)
            attempt.is_late = False
            usage = self.counted() if self._is_told else None
            if usage is None and self.has_finished and self.is_done:
                # It is whole, and never said.
                usage = self.made.untold(most, self.told)
            if usage is not None:
                attempt.is_guess = usage.is_estimated
                self.run.ends.charge(self.live, attempt, usage, max(0, usage.completion - attempt.seen))
                attempt.seen = usage.completion
            self.run.dispatcher.linger(self.reply)
            self.run.report.now_known()

        size = attempt.held_bytes + len(self.first) + AHEAD_BYTES
        attempt.is_late = self.run.dispatcher.late.take(reading, size, known, seconds, self.run.plan.sender)
        if not attempt.is_late:
            reading.cancel()
        return attempt.is_late

    @property
    def told(self) -> Usage | None:
        """What the upstream has said of its usage so far; its prompt is 0 where it did not say that."""
        if self.tally.told is not None or self.translator is None:
            return self.tally.told
        try:
            found = plainly(lambda: _usage_of(getattr(self.translator, "told", None)))
        except Exception as error:
            logger.warning(
                "the provider of deployment %s cannot tell the usage so far: %s", self.live.name, raised(error)
            )
            return None
        return found

    def _look_ahead(self) -> bool:
        """Count what has come and nobody has read. Returns whether there may be more of that."""
        try:
            data = self.reply.read_ready()
            if data and not self.is_done:
                self.taken(data)
        except UpstreamError:
            # It broke, or is no answer from here on: what is before that has been counted.
            return False
        except Exception as error:
            logger.warning("the provider of deployment %s cannot read a stream: %s", self.live.name, raised(error))
            return False
        if not self.has_finished:
            self.tally.count_begun(self.splitter.rest)
        return len(data) > AHEAD_BYTES

    async def until_content(self) -> None:
        """Read to the first token. Raises UpstreamError."""
        try:
            while not self._has_begun and not self.is_done:
                self.first += self.ready() or await self.next()
                if self.num_bytes > EVENT_BYTES and not self._has_begun:
                    raise garbage(f"more than {EVENT_BYTES:,} bytes before a first token")
        finally:
            self.attempt.told, self.attempt.has_begun = self.told, bool(self.head)
        if not self._has_begun:
            raise UpstreamError(
                Failure(kind="cut", message=f"{self.live.name} ended the stream before its first token")
            )

    async def read_whole(self, has_room: Callable[[int], bool]) -> None:
        """Read to the end, and close the books. Raises UpstreamError, with the books closed too.

        Args:
            has_room: whether so many bytes of it may be held.
        """
        try:
            self._check_held(has_room)
            while not self.is_done:
                limit_s = self.live.deployment.idle_s
                async with asyncio.timeout(max(min(limit_s, self.run.left_s), 0.0)):
                    self.first += self.ready() or await self.next()
                self._check_held(has_room)
        except TimeoutError:
            error = self.run.timed_out(self.live, limit_s, "timeout")
            self.drop(error.failure)
            raise error from None
        except Exception as cause:
            error = as_failure(cause, self.live.name)
            self.drop(error.failure)
            raise error from None
        except BaseException:
            self.drop()
            raise
        self.settle()

    def _check_held(self, has_room: Callable[[int], bool]) -> None:
        if len(self.first) > BODY_BYTES:
            raise excess(f"an answer of more than {BODY_BYTES:,} bytes")
        if not has_room(len(self.first)):
            raise no_room()

    def ready(self) -> bytes:
        """What is passed on of what has come without waiting. Raises UpstreamError for what cannot be read."""
        try:
            data = self.reply.read_ready()
        except UpstreamError:
            # The connection broke: `next` meets the same, and knows what it means.
            return b""
        return self.taken(data) if data else b""

    async def next(self) -> bytes:
        """What is passed on next; empty if no event is whole yet, or it `is_done`. May be cancelled and called again.

        Raises UpstreamError.
        """
        began = self.run.dispatcher.now()
        try:
            data = await self.reply.read_some()
        except UpstreamError as error:
            if self.has_finished:
                data = b""
            elif self._has_begun and error.failure.kind != "busy":
                # One in this process says itself why.
                raise UpstreamError(
                    Failure(kind="cut", message=f"{self.live.name} broke off: {error.failure.message}")
                ) from None
            else:
                raise
        finally:
            self.made.waited(self.run.dispatcher.now() - began)
        return self.taken(data) if data else self._ended()

    def taken(self, data: bytes) -> bytes:
        """What is passed on of some bytes that came. Raises UpstreamError."""
        self.num_bytes += len(data)
        try:
            block = self.splitter.feed(data)
            self.num_signs += bool(block)
            return self._passed(block)
        finally:
            self.made.took(len(data), self.told, self.has_finished)

    def _passed(self, block: bytes) -> bytes:
        """What is passed on of whole events. Raises UpstreamError."""
        if not block:
            return b""
        is_plain = self.translator is None and self._stitch is None and self._num_choices == 1
        if self._has_begun and is_plain and _is_plain(block):
            self._count(block)
            return block
        return self._examined(block)

    def _ended(self) -> bytes:
        """The connection says that it is over. Raises UpstreamError if the answer is not."""
        self.is_done = True
        rest, block = self.splitter.rest.strip(b"\n"), b""
        if rest:
            try:
                block = self._examined(rest + b"\n\n")
            except UpstreamError:
                if not self.has_finished:
                    raise
        if not self.has_finished:
            when = "in the middle of its answer" if self._has_begun else "before its first token"
            raise UpstreamError(Failure(kind="cut", message=f"{self.live.name} broke off {when}"))
        return block

    def _examined(self, block: bytes) -> bytes:
        """Read every event; what is passed on of them."""
        kept: list[bytes] = []
        for name, data in events(block):
            if data.strip() == DONE_DATA:
                self.is_done = True
                self.has_finished = self.has_finished or self._has_begun
                break
            if (translator := self.translator) is not None:
                chunks, is_over = plainly(partial(_fed, translator, data))
                for chunk in chunks:
                    if self._is_passed(chunk):
                        kept.append(event(chunk))
                        self._count_translated(chunk, kept[-1])
                self.is_done = is_over
                continue
            chunk = read_chunk(data)
            if name == b"error" or chunk.get("error"):
                raise refusal(self.live.provider, status_said(chunk), self.reply.headers, data)
            had, is_list = len(chunk), flattened(chunk, "delta")
            if self._is_passed(chunk):
                is_as_it_came = self._stitch is None and len(chunk) == had and not is_list
                kept.append(b"data: " + data.replace(b"\n", b" ") + b"\n\n" if is_as_it_came else event(chunk))
                self._count(kept[-1])
        return b"".join(kept)

    def _is_passed(self, chunk: Json) -> bool:
        """Learn from a chunk. Whether the reader sees it: not so the usage that we asked for and they did not.

        Some upstreams say the usage beside the last words. It is taken out there, and said once, behind them, to whoever asked for it.
        """
        if not self._has_begun:
            self.head = self.head or {key: value for key, value in chunk.items() if key not in ("choices", "usage")}
            self._has_begun = has_content(chunk)
        self._whole |= ended(chunk)
        self.has_finished = self.has_finished or len(self._whole) >= self._num_choices
        usage = self.tally.hear(chunk, self.has_finished)
        if usage is not None and usage.prompt:
            self._usage_body = chunk["usage"]
        if not chunk.get("choices") and isinstance(chunk.get("usage"), dict):
            self.has_given_usage = self.has_given_usage or self._gives_usage
            return self._gives_usage
        if usage is not None and not self._tells_all_along:
            del chunk["usage"]
        if self._stitch is None:
            return True
        chunk.update(self._stitch)
        for choice in chunk.get("choices") or ():
            if isinstance(choice, dict) and isinstance(choice.get("delta"), dict):
                choice["delta"].pop("role", None)
        return has_content(chunk)

    def _count(self, block: bytes) -> None:
        self.tally.count(block)
        if self._num_choices == 1 and not self.has_finished and _FINISHED.search(block):
            self.has_finished = True

    def _count_translated(self, chunk: Json, block: bytes) -> None:
        """What its event in a form of its own says, its chunk says too, or some of it: neither is counted beside the other."""
        native = [chunk[name] for name in NATIVE if isinstance(chunk.get(name), dict)]
        self._count(event({name: value for name, value in chunk.items() if name not in NATIVE}) if native else block)
        for one in native:
            self.tally.count_native(one)

    def from_answer(self, answer: Answer) -> None:
        """The upstream gave a whole answer where a stream was asked for: make one of it. Raises UpstreamError if it says nothing."""
        chunks = as_chunks(answer.body, self.request.endpoint, with_usage=True)
        self.first = b"".join(event(chunk) for chunk in chunks if self._is_passed(chunk))
        self._count(self.first)
        if not self._has_begun:
            raise garbage("an answer without choices", answer.data)
        self.is_done = self.has_finished = True
        if not answer.usage.is_estimated:
            self.tally.told_whole(answer.usage)
        # All of it is there.
        self.made.took(0, self.told, True)


def _fed(translator: Translator, data: bytes) -> tuple[list[Json], bool]:
    """The chunks of an event, and whether the stream is over."""
    return [_in_own_numbers(chunk) for chunk in translator.feed(data)], bool(translator.is_done)


def _in_own_numbers(chunk: Json) -> Json:
    """A translator's chunk whose usage has numbers of Python's, which are counted, and told, as such."""
    usage = chunk.get("usage")
    return {**chunk, "usage": plain_numbers(usage)} if isinstance(usage, dict) else chunk


def _is_plain(block: bytes) -> bool:
    """Whether a block holds nothing but chunks, by their shape, that need not be read."""
    num = block.count(b"\n\n")
    return (
        block.startswith(b"data: {")
        and block.count(b"}\n\n") == num
        and block.count(b"\n\ndata: {") == num - 1
        and b'"prompt_tokens"' not in block
        and b'"error"' not in block
        and _LIST.search(block) is None
        and (block.isascii() or _is_utf8(block))
    )


def _usage_of(told: object) -> Usage | None:
    return in_counts(told) if isinstance(told, Usage) else None


def _is_utf8(block: bytes) -> bool:
    try:
        block.decode()
    except UnicodeDecodeError:
        return False
    return True


def read_chunk(data: bytes) -> Json:
    """A chunk. Raises UpstreamError (``garbage``, ``excess``)."""
    return parse_object(data, "a chunk")
