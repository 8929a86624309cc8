"""Waits for what another thread, task or process does; ``test_waiting.py`` says how tests wait."""

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

# Only a test that fails lasts as long, so it is what a machine that is many times too busy needs.
PATIENCE_S = 120.0
# Between two looks. What takes long is not held up by those who look.
FIRST_PAUSE_S, LAST_PAUSE_S = 0.005, 0.1


def until(holds: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
    """The first true value of ``holds()``."""
    end, pause_s = time.monotonic() + patience_s, FIRST_PAUSE_S
    while not (value := holds()):
        assert time.monotonic() < end, "it did not come true"
        time.sleep(pause_s)
        pause_s = min(1.1 * pause_s, LAST_PAUSE_S)
    return value


async def until_async(holds: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
    """The first true value of ``holds()``, or of what it gives to be awaited; the loop goes on meanwhile."""
    end, pause_s = time.monotonic() + patience_s, FIRST_PAUSE_S
    while True:
        value = holds()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < end, "it did not come true"
        await asyncio.sleep(pause_s)
        pause_s = min(1.1 * pause_s, LAST_PAUSE_S)
