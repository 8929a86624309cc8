"""What a gateway does by the clock: delete what is old, and keep and take over what strategies learn."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from anabranch.errors import AnabranchError
from anabranch.gateway.config import GatewayConfig
from anabranch.gateway.learning.erasures import Erasures
from anabranch.gateway.learning.kept import EVERY_S, Kept
from anabranch.gateway.learning.services import LearningServices
from anabranch.gateway.learning.teaching import Teaching
from anabranch.gateway.logged_error import words
from anabranch.gateway.store import Store
from anabranch.web.turns import in_task

logger = logging.getLogger(__name__)
PRUNE_S = 3600.0
DAY_S = 86_400.0


async def prune_forever(store: Store, config: Callable[[], GatewayConfig], erasures: Erasures) -> None:
    """Delete what is older than the config that is in use wants it kept."""
    while True:
        days = config().log.keep_days
        if days is not None:
            # First where they are at work, or they would be written again.
            await _piece(lambda: erasures.expire(time.time() - days * DAY_S), "old examples are erased later")  # noqa: B023
            await _piece(lambda: _prune(store, days), "old rows are deleted later")  # noqa: B023
        await asyncio.sleep(PRUNE_S)


async def _prune(store: Store, days: float) -> None:
    count = await store.prune(time.time() - days * DAY_S)
    logger.info("deleted %d rows older than %d days", count, days)


async def learn_forever(services: LearningServices, teaching: Teaching, erasures: Erasures, kept: Kept) -> None:
    """Keep what strategies learn, and learn from what other processes on the store were told, or told to forget."""
    while True:
        await asyncio.sleep(EVERY_S)
        await _piece(teaching.read_keys, "keys cannot be read")
        await _piece(teaching.catch_up, "scores that other processes were sent cannot be read")
        await _piece(erasures.catch_up, "what other processes were told to forget cannot be read")
        await _piece(lambda: kept.save(services.lanes.values()), "what strategies learned cannot be kept")


async def _piece(work: Callable[[], Awaitable[None]], otherwise: str) -> None:
    """One piece of a round. Whatever it fails with, the next one is done, and so is the next round."""
    try:
        await in_task(work)
    except AnabranchError as error:
        logger.warning("%s: %s", otherwise, words(error))
    except Exception as error:
        logger.error("%s: %s", otherwise, type(error).__name__, exc_info=error)
