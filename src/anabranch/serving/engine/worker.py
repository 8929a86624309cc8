"""The process of a `ProcessEngine`: ``python -m anabranch.serving.engine.worker FD``, with FD an open socket."""

import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection

from anabranch.errors import AnabranchError, BackendError
from anabranch.serving.engine.loop import EngineLoop
from anabranch.serving.engine.messages import Close, Event

# For a loop to end once nobody waits for it any longer.
LEAVE_S = 10.0


def main(descriptor: int) -> None:
    """Make the engine that the other end asks for, and run it until told to end or the other end is gone."""
    # The front end drains and closes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(descriptor)
    try:
        engine = connection.recv()()
        engine.warm_up()
    except EOFError:
        return
    except AnabranchError as error:
        connection.send(error)
        return
    except Exception as error:
        connection.send(BackendError(f"the engine could not start: {type(error).__name__}: {error}"))
        raise
    is_cut = threading.Event()

    def emit(events: list[Event]) -> None:
        if is_cut.is_set():
            return
        try:
            connection.send(events)
        except OSError:
            is_cut.set()
            loop.put(Close())

    loop = engine.loop(emit)
    connection.send(engine.info)
    threading.Thread(target=_listen, args=(connection, loop, is_cut), daemon=True).start()
    loop.run()


def _listen(connection: Connection, loop: EngineLoop, is_cut: threading.Event) -> None:
    try:
        while True:
            loop.put(connection.recv())
    except (EOFError, OSError):
        # The front end is gone, and with it everyone who waits.
        is_cut.set()
        loop.put(Close())
        # The process ends with its loop, and this thread with it; a step that hangs keeps neither.
        time.sleep(LEAVE_S)
        os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
