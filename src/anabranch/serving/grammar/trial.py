"""`try_out`: what a grammar takes, found out where it can hurt nobody."""

import signal
from pathlib import Path

from anabranch.errors import InputError
from anabranch.sandbox import Refused, Sandbox, SandboxBusyError, SandboxError, Work
from anabranch.serving.core.client import BusyError
from anabranch.serving.grammar import trial_worker
from anabranch.serving.grammar.library import llguidance

__all__ = ["try_out"]

_MEMORY = f"it asked for more than {trial_worker.LIMITS.memory_text} of memory"
_STACK = (
    f"it needs more than {(trial_worker.LIMITS.stack or 0) >> 20} MiB of stack: it is nested too deeply, or one object has too many "
    "properties"
)


def _require() -> None:
    llguidance()


WORK = Work(
    program=Path(trial_worker.__file__),
    does="tries grammars out",
    do="try grammars out",
    limits=trial_worker.LIMITS,
    greeting={"grammar": '{"grammars":[{"json_schema":{"type":"null"}}]}'},
    crash={signal.SIGABRT: _MEMORY, signal.SIGSEGV: _STACK},
    require=_require,
)


def try_out(text: str, source: str = "") -> int:
    """Compile a grammar in another process, within `trial_worker.LIMITS`, and ask for its first mask.

    Args:
        text: see `anabranch.serving.grammar.forms.text_of`.
        source: who sends it; the processes serve sources in turn.

    Returns the bytes of memory that it takes. Raises InputError that says why it cannot be followed; BusyError if no process was free
    in time, or none can be started; MissingExtraError without llguidance.
    """
    try:
        return int(Sandbox.of(WORK).ask(source, {"grammar": text}))
    except Refused as error:
        raise InputError(f"the grammar cannot be followed: {error}") from None
    except SandboxBusyError as error:
        raise BusyError(str(error)) from None
    except SandboxError as error:
        raise BusyError(f"grammars cannot be followed now: {error}") from None
