"""What a gateway does by the clock: delete what is old, and keep and take over what strategies learn."""

import asyncio
import logging
import time
from collections.abc import Callable

from anabranch.errors import AnabranchError, CapacityError
from anabranch.gateway.config import GatewayConfig
from anabranch.gateway.learning.erasures import Erasures
from anabranch.gateway.learning.kept import EVERY_S, Kept
from anabranch.gateway.learning.services import LearningServices
from anabranch.gateway.learning.teaching import Teaching
from anabranch.gateway.store import Store

logger = logging.getLogger(__name__)
PRUNE_S = 3600.0
DAY_S = 86_400.0


async def prune_forever(store: Store, config: Callable[[], GatewayConfig], erasures: Erasures) -> None:
    """Delete what is older than the config that is in use wants it kept."""
    while True:
        days = config().log.keep_days
        if days is not None:
            try:
                # First where they are at work, or they would be written again.
                await erasures.expire(time.time() - days * DAY_S)
                count = await store.prune(time.time() - days * DAY_S)
                logger.info("deleted %d rows older than %d days", count, days)
            except CapacityError as error:
                logger.warning("rows older than %d days are deleted later: %s", days, error)
        await asyncio.sleep(PRUNE_S)


async def learn_forever(services: LearningServices, teaching: Teaching, erasures: Erasures, kept: Kept) -> None:
    """Keep what strategies learn, and learn from what other processes on the store were told, or told to forget."""
    while True:
        await asyncio.sleep(EVERY_S)
        try:
            await teaching.read_keys()
            await teaching.catch_up()
            await erasures.catch_up()
        except AnabranchError as error:
            logger.warning("scores that other processes were sent cannot be read: %s", error)
        await kept.save(services.lanes.values())
