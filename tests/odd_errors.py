"""What code of others may raise that would end or steer whoever waits for it."""

import asyncio
import concurrent.futures


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
