"""A process that runs some environments for `anabranch.rl.parallel.ParallelWorld`: asked over its standard input, told over its output.

It is a program of its own, and no copy of the one that began it: so nothing of that is run again, and no thread of it is missing here.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from typing import Any, BinaryIO


def main() -> None:
    """Answer until the other side is gone."""
    asked, told = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What environments print is no answer.
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    # Ctrl-C is for who acts, who finishes the step first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _serve(asked, told)
    except (EOFError, BrokenPipeError):
        return


def _serve(asked: BinaryIO, told: BinaryIO) -> None:
    world: Any = None
    while True:
        name, given = pickle.load(asked)
        try:
            if name == "begin":
                world = _begin(**given)
                answer: Any = (world.single_observation_space, world.single_action_space)
            else:
                answer = getattr(world, name)(*given)
            message = (True, answer)
        except Exception as error:
            message = (False, _sendable(error))
        pickle.dump(message, told, protocol=pickle.HIGHEST_PROTOCOL)
        told.flush()


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
