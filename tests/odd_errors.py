"""What code of others may raise that would end or steer whoever waits for it."""

import asyncio
import concurrent.futures
import contextlib
import math


class PanicError(BaseException):
    """As libraries in Rust raise."""


UNUSUAL = (
    StopIteration,
    StopAsyncIteration,
    GeneratorExit,
    SystemExit,
    KeyboardInterrupt,
    asyncio.CancelledError,
    concurrent.futures.CancelledError,
    PanicError,
)


async def _fails():
    raise ConnectionError("of a part")


async def _group_that_waits():
    with contextlib.suppress(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(_fails())
            await asyncio.Event().wait()


async def _group_at_its_end():
    with contextlib.suppress(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(_fails())


async def _time_by_hand():
    """As libraries did before `asyncio.timeout`."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().call_soon(task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.Event().wait()


# By what code does that ends well: what leaves the task that it runs in told to end, or did until some Python. Awaited, each gives None.
LEFT_CANCELLED = {
    "a group whose part fails while it works": _group_that_waits,
    "a group whose part fails at its end": _group_at_its_end,
    "a time that is over by a cancel": _time_by_hand,
}


def odd_failures():
    """Each by a name: makes an UpstreamError that says nothing which can be read. Of every field of `Failure` there is one at least."""
    from anabranch.gateway.providers.provider import Failure, UpstreamError

    class EmptyError(UpstreamError):
        def __init__(self):
            Exception.__init__(self, "empty")

    class TextError(UpstreamError):
        def __init__(self):
            Exception.__init__(self, "text")
            self.failure, self.report, self.is_for_room = "text", None, False

    class PropertyError(UpstreamError):
        """Ends the process where it is read."""

        def __init__(self):
            Exception.__init__(self, "property")

        @property
        def failure(self):
            raise SystemExit

    def of(**fields):
        return lambda: UpstreamError(Failure(**({"kind": "rate_limit", "message": "m"} | fields)))

    return {
        "without": EmptyError,
        "failure is text": TextError,
        "failure raises": PropertyError,
        "kind misspelt": of(kind="rate_limited"),
        "kind None": of(kind=None),
        "kind list": of(kind=["server"]),
        "message None": of(message=None),
        "message object": of(message=object()),
        "retry_after_s nan": of(retry_after_s=math.nan),
        "retry_after_s inf": of(retry_after_s=math.inf),
        "retry_after_s negative": of(retry_after_s=-5.0),
        "retry_after_s text": of(retry_after_s="3"),
        "retry_after_s bool": of(retry_after_s=True),
        "status text": of(kind="request", status="400"),
        "status fraction": of(kind="busy", status=503.5),
        "status huge": of(kind="busy", status=10**30),
        "status negative": of(kind="busy", status=-1),
        "hint unknown": of(kind="request", hint="nonsense"),
        "hint list": of(kind="request", hint=["credit"]),
        "type list": of(kind="request", type=["x"]),
        "code number": of(kind="request", code=5),
        "param object": of(kind="request", param=object()),
        "is_crowded text": of(is_crowded="no"),
    }
