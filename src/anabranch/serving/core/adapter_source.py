"""`AdapterSource`: what is read of the folders of a shelf's adapters, and who is told what is wrong with one.

An operator, who has named the folder, is told all. Whoever asks for an adapter that is known already is told that it cannot be read now:
what has become of its folder is neither their fault nor theirs to know, and is in the log for who runs the server.
"""

import contextlib
import logging
from collections.abc import Callable
from typing import Generic, TypeVar

from anabranch.errors import AnabranchError, CapacityError, CheckpointError
from anabranch.serving.core.adapter_entry import Entry, H, Read
from anabranch.serving.core.client import BusyError

__all__ = ["AdapterSource", "bare"]

logger = logging.getLogger(__name__)

R = TypeVar("R")


class _MeasuredError(Exception):
    """The size of an adapter is known, and no more was asked for."""


class AdapterSource(Generic[H]):
    """See the module.

    Attributes:
        read: what is in a folder, see `Read`.
    """

    def __init__(self, read: Read[H]) -> None:
        self.read = read

    def first(self, entry: Entry[H], check: Callable[[int], None]) -> H:
        """What an operator has named.

        Args:
            entry: whose folder is read.
            check: called with its bytes before any number is read; what it raises is raised.

        Raises what ``read`` raises.
        """
        return self.read(entry.folder, entry.root, check)

    def again(self, entry: Entry[H], check: Callable[[int], None]) -> H:
        """What is known, for whoever asks for it. Arguments as of `first`.

        Raises `BusyError` where it cannot be read, or has other numbers than it had, and what ``check`` raises of room.
        """
        try:
            held = self.read(entry.folder, entry.root, check)
            if entry.version and held.version != entry.version:
                # Nothing takes the place of a pinned one.
                pinned = "start the server again, or put its files back"
                mend = pinned if entry.is_pinned else "load it once more to have these"
                raise CheckpointError(f"{entry.folder} holds other numbers than when the adapter was loaded; {mend}")
            return held
        except (BusyError, CapacityError, _MeasuredError):
            raise
        except Exception as error:
            refused = self.refused(entry, error)
        raise refused

    def refused(self, entry: Entry[H], error: Exception) -> BusyError:
        """What whoever asks for one that is known is told, where ``error`` is why it cannot be read, which is logged."""
        trace = None if isinstance(error, AnabranchError) else error
        logger.error("adapter %s cannot be read again: %s", entry.name, error, exc_info=trace)
        return BusyError(
            f"adapter {entry.name!r} is known and cannot be read now, which is no fault of the request; the server's log says why"
        )

    def size_of(self, entry: Entry[H]) -> int:
        """The bytes that it will take by what its folder says, of which no number is read; 0 where it says none. Raises as `again`."""
        told = [0]

        def check(nbytes: int) -> None:
            told.append(nbytes)
            raise _MeasuredError

        with contextlib.suppress(_MeasuredError):
            self.again(entry, check)
        return told[-1]


def bare(work: Callable[[], R]) -> R:
    """What work gives; its error comes without the frames of the work, in which the numbers of a whole adapter would be kept."""
    try:
        return work()
    except AnabranchError as error:
        error.__cause__ = error.__context__ = None
        raise error.with_traceback(None) from None
