"""What was learned from vectors of other dimensions than those that a strategy is given now.

A strategy that took it up would refuse every query from then on, and what it learned next would be kept beside it. So it is recognised when
it is read, and put under a make that nothing is read from: it is there for people, and the strategy begins anew.
"""

import logging
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from anabranch.errors import CheckpointError, DataError
from anabranch.gateway.learning.kept_bytes import Part, part_of
from anabranch.gateway.logged_error import plain, words
from anabranch.gateway.store import Store, learned
from anabranch.gateway.store.learned import LearnedRow
from anabranch.routers.contract.strategy import Strategy
from anabranch.routers.embed import dim_of
from anabranch.web.turns import in_thread, plainly

if TYPE_CHECKING:
    from anabranch.gateway.lane import Lane

logger = logging.getLogger(__name__)


def given_dim(lane: "Lane") -> int | None:
    """Dimensions of the vectors that a strategy is given; None where its embedder does not say, or there is none."""
    embedder = lane.embedder
    if embedder is None:
        return None
    try:
        return plainly(lambda: dim_of(embedder))
    except Exception as error:
        logger.warning(
            "what strategy %s learned is not compared with its embedder, which does not say its dimensions: %s",
            lane.name,
            words(error),
        )
        return None


def fitting(lane: "Lane", dim: int | None, part: Part) -> Part:
    """The part itself. Raises DataError for one that was learned from vectors of other dimensions."""
    found = plainly(lambda: lane.strategy.vector_dim(*part))
    if dim is not None and found is not None and found != dim:
        raise DataError(f"it is of vectors of {found} dimensions, and the embedder gives {dim}")
    return part


async def set_aside(store: Store, lane: "Lane", dim: int | None) -> bool:
    """Put away what was learned from vectors of other dimensions, and say so; whether there was any.

    Args:
        store: where it is.
        lane: whose.
        dim: of the vectors it is given; None if that is not known, and then nothing is put away.
    """
    if dim is None or type(lane.strategy).vector_dim is Strategy.vector_dim:
        return False
    name, made = lane.name, lane.made
    rows = await store.look(lambda connection: learned.read_learned(connection, name, made))
    odd = await in_thread(_odd, lane, rows, dim)
    if not odd:
        return False
    aside = f"{made}.{uuid.uuid4().hex}"
    versions = {row.writer: row.version for row, _ in odd}
    count = await store.change(lambda connection: learned.put_aside(connection, name, made, aside, versions))
    logger.warning(
        "strategy %s does not go on with some of what it learned (%d rows, kept aside as made from %s): %s",
        name,
        count,
        aside,
        odd[0][1],
    )
    return True


def _odd(lane: "Lane", rows: Sequence[LearnedRow], dim: int) -> list[tuple[LearnedRow, str]]:
    """Those of other dimensions, and what is wrong with each. A damaged row is not among them: whoever reads it says so."""
    found = []
    for row in rows:
        try:
            part = part_of(row)
        except CheckpointError as error:
            logger.debug("a row of strategy %s cannot be read: %s", lane.name, words(error))
            continue
        try:
            fitting(lane, dim, part)
        except DataError as error:
            found.append((row, words(error)))
        except Exception as error:
            # The strategy's own fault, which no other row has to stand for.
            logger.error(
                "strategy %s cannot say of which vectors it learned what is kept as %s; that stays as it is: %s",
                lane.name,
                f"version {row.version}",
                words(error),
                exc_info=plain(error),
            )
    return found
