"""The error tree. Everything a user can cause is one of these; an ``assert`` elsewhere is our own mistake.

    AnabranchError
    ├── ConfigError       a config field has a value it may not have (also a ValueError)
    ├── InputError        an argument of a call (array, graph, node, k) has a value it may not have (also a ValueError)
    │   └── UnknownModelError   a request names a model that a gateway does not have
    ├── LimitError        a request has no room in a limit of a gateway
    │   ├── BudgetError         of spending
    │   └── RateError           of requests or tokens a minute
    ├── DataError         a corpus, dataset or trace is missing, unreadable or malformed
    ├── CheckpointError   a model folder or file is missing, corrupt, or of another shape or version
    ├── TokenizerError    a tokenizer cannot be read or does not fit the model
    ├── NotFiniteError    a computation gave NaN where nothing can go on from it
    ├── CapacityError     memory, disk or device room does not suffice
    ├── PeerError         another process of a group failed, or did not answer in time
    └── BackendError      an optional package, device or compiled kernel is not there
        └── MissingExtraError   a package of an extra is not installed (also an ImportError)

Messages say what was wrong, which value, and what would work. The command line prints them as one line, exit code 2.
"""

from collections.abc import Sequence


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says, in one line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class AnabranchError(Exception):
    """Base of every error a user can cause.

    Attributes:
        is_for_room: there was no room (of money, of calls, at a model): asked again with less beside it, the same may succeed.
        is_free: a call to a model failed before the model was at work, so that nobody bills it.
        is_transient: a call to a model failed by what may be over in a moment: it may be made again.
        is_of_this_call: a call to a model failed by what it asks, as far as one can tell: others may succeed meanwhile.
    """

    is_for_room: bool = False
    is_free: bool = False
    is_transient: bool = False
    is_of_this_call: bool = False


class ConfigError(AnabranchError, ValueError):
    """A config field has a value it may not have; the message names the field, the value and what is allowed."""


class InputError(AnabranchError, ValueError):
    """An argument of a call has a value it may not have; the message names it, the value (and its row), and what is allowed."""


class UnknownModelError(InputError):
    """A request names a model that a gateway does not have.

    Attributes:
        model: the name.
        near: names that were perhaps meant, best first.

    Args:
        beside: what there is of that name that is no model, in place of what was perhaps meant.
    """

    def __init__(self, model: str, near: Sequence[str] = (), beside: str = "") -> None:
        self.model, self.near = model, tuple(near)
        found = f"did you mean {' or '.join(map(repr, near))}?" if near else "list the models to see what there is"
        super().__init__(f"there is no model {model!r}; {beside or found}")


class LimitError(AnabranchError):
    """A request has no room in a limit of a gateway.

    Attributes:
        retry_after_s: seconds after which it may have; None if waiting does not help.
    """

    is_for_room = True

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class BudgetError(LimitError):
    """A budget has no room for what a request may cost.

    Attributes:
        subject: whose budget: ``key:ID``, ``user:NAME``, ``team:NAME``, ``tag:NAME``, ``global``, or the one ``request``.
        period: of the budget.
        limit_nano, remaining_nano: nano-dollars; what remains is neither spent nor reserved.
        resets_s: unix seconds at which the period ends; None if it never does.
    """

    def __init__(
        self,
        message: str,
        *,
        subject: str,
        period: str,
        limit_nano: int,
        remaining_nano: int,
        resets_s: float | None,
        retry_after_s: float | None,
    ) -> None:
        super().__init__(message, retry_after_s)
        self.subject, self.period = subject, period
        self.limit_nano, self.remaining_nano, self.resets_s = limit_nano, remaining_nano, resets_s


class RateError(LimitError):
    """Too many requests or tokens in a minute, or requests at a time.

    Attributes:
        limit: ``rpm``, ``tpm`` or ``max_in_flight``.
    """

    def __init__(self, message: str, *, limit: str, retry_after_s: float | None) -> None:
        super().__init__(message, retry_after_s)
        self.limit = limit


class DataError(AnabranchError):
    """A corpus, dataset or trace is missing, unreadable or malformed."""


class CheckpointError(AnabranchError):
    """A model folder or file is missing, corrupt, or of another shape or schema version."""


class TokenizerError(AnabranchError):
    """A tokenizer cannot be read or does not fit the model."""


class NotFiniteError(AnabranchError):
    """A computation gave NaN where nothing can go on from it; the message names the layer."""


class CapacityError(AnabranchError):
    """Memory, disk or device room does not suffice; the message says how much is needed and what would fit."""


class PeerError(AnabranchError):
    """Another process of a group failed, or did not answer in time; the message names it."""


class BackendError(AnabranchError):
    """An optional package, device or compiled kernel that was asked for is not available."""


class MissingExtraError(BackendError, ModuleNotFoundError):
    """An optional package is not installed; the message ends with the command that installs it.

    Attributes:
        modules: what could not be found, by the names that are imported; ``name``, as of any ImportError, is the first.
        command: ``pip install ...``.
    """

    def __init__(self, message: str, *, modules: Sequence[str], command: str) -> None:
        super().__init__(message)
        self.modules, self.command = tuple(modules), command
        self.name = self.modules[0]
