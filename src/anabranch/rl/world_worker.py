"""A process that runs some environments for `anabranch.rl.parallel.ParallelWorld`: asked over its standard input, told over its output.

It is a program of its own, and no copy of the one that began it: so nothing of that is run again, and no thread of it is missing here.
Once nothing more is asked it closes the environments, and what that fails with is the last that it tells.
"""

from __future__ import annotations

import os
import pickle
import signal
import struct
import sys
from typing import Any, BinaryIO

# Behind the last answer, of what closing the environments fails with, or None: how many bytes it has, and that it is that. Before it
# an answer may stand of which nobody has read all.
LAST = struct.Struct("<Q16s")
CLOSED = b"anabranch closed"


def main() -> None:
    """Answer until the other side asks no more or is gone, and close the environments."""
    asked, told = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What environments print is no answer.
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    # Ctrl-C is for who acts, who finishes the step first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    served = _Served()
    try:
        served.serve(asked, told)
    except (EOFError, BrokenPipeError):
        # The other side asks no more.
        served.close(told)


class _Served:
    """Environments, once they are made."""

    def __init__(self) -> None:
        self.world: Any = None

    def serve(self, asked: BinaryIO, told: BinaryIO) -> None:
        """Answer. Raises EOFError where nothing more is asked, BrokenPipeError where nobody listens."""
        while True:
            name, given = pickle.load(asked)
            try:
                if name == "begin":
                    self.world = _begin(**given)
                    answer: Any = (self.world.single_observation_space, self.world.single_action_space)
                else:
                    answer = getattr(self.world, name)(*given)
                message = (True, answer)
            except Exception as error:
                message = (False, _sendable(error))
            pickle.dump(message, told, protocol=pickle.HIGHEST_PROTOCOL)
            told.flush()

    def close(self, told: BinaryIO) -> None:
        """Close the environments, and tell what that fails with: on standard error where nobody listens."""
        failed: Exception | None = None
        try:
            if self.world is not None:
                self.world.close()
        except Exception as error:
            failed = _sendable(error)
        last = pickle.dumps(failed, protocol=pickle.HIGHEST_PROTOCOL)
        try:
            told.write(last + LAST.pack(len(last), CLOSED))
            told.flush()
        except BrokenPipeError:
            if failed is not None:
                raise failed from None


def _begin(path: list[str], config: dict[str, Any], num: int, seed: int, first: int) -> Any:
    sys.path[:] = path
    from anabranch.config import from_dict
    from anabranch.rl.environment import Environment

    return from_dict(Environment.Config, config).build().make(num, seed=seed, first=first)


def _sendable(error: Exception) -> Exception:
    """The error, or its words where it cannot be taken out of this process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


if __name__ == "__main__":
    main()
