"""What one task makes and another reads, piece by piece: no more is made ahead than is read."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, TypeVar

T = TypeVar("T")

# Pieces that wait for whoever reads them.
AHEAD = 16


async def drained(
    pieces: asyncio.Queue[T], maker: asyncio.Task[Any], beat_s: float | None = None
) -> AsyncGenerator[T | None, None]:
    """The pieces as they come, until whoever makes them has ended, however: that is told by the task.

    Args:
        pieces: that ``maker`` puts there.
        maker: ended, and waited for, where nobody reads on.
        beat_s: None is given wherever nothing has come for so long; without it, that never happens.
    """
    try:
        while True:
            while not pieces.empty():
                yield pieces.get_nowait()
            if maker.done():
                return
            coming = asyncio.ensure_future(pieces.get())
            try:
                await asyncio.wait((coming, maker), timeout=beat_s, return_when=asyncio.FIRST_COMPLETED)
                # A piece that came at this moment is not lost: either it was taken, or it is still there.
                if not coming.done():
                    coming.cancel()
                    await asyncio.wait((coming,))
            finally:
                coming.cancel()
            if not coming.cancelled():
                yield coming.result()
            elif not maker.done():
                yield None
    finally:
        if not maker.done():
            maker.cancel()
            await asyncio.wait((maker,))
