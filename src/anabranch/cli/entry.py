"""Where the command ``anabranch`` begins. Ctrl-C is one line from here on, also while modules are imported.

An exception in the midst of an import leaves halves of modules behind, which others then trip over, or ends the process where C++ code
calls Python. So an interrupt waits there, for as long as the import takes; a second one does not.
"""

import os
import signal
from types import FrameType

INTERRUPTED = 130
_LOOK_AGAIN_S = 0.001


def main() -> int:
    """Run the command line; its exit code, see `anabranch.cli.main.main`."""
    # A shell has its background jobs ignore interrupts.
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler and hasattr(signal, "setitimer")
    try:
        if is_ours:
            signal.signal(signal.SIGINT, _interrupt)
        from anabranch.cli.main import main as run

        code = run()
        if not _is_waiting():
            return code
        # All was imports, one after another.
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        # Outside of the boundary that the command line has itself.
        _tell()
        return INTERRUPTED
    finally:
        if is_ours:
            # What Python does at its end is no place for a trace either.
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, as soon as no import is under way."""
    if number == signal.SIGINT and _is_waiting():
        _tell()
        os._exit(INTERRUPTED)
    if _is_importing(frame):
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, _LOOK_AGAIN_S)
        return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    raise KeyboardInterrupt


def _is_waiting() -> bool:
    return hasattr(signal, "SIGALRM") and signal.getsignal(signal.SIGALRM) is _interrupt


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _tell() -> None:
    try:
        os.write(2, b"interrupted\n")
    except OSError:
        # Nobody reads it.
        return
