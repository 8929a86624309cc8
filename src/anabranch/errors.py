"""The error tree. Everything a user can cause is one of these; an ``assert`` elsewhere is our own mistake.

    AnabranchError
    ├── ConfigError       a config field has a value it may not have (also a ValueError)
    ├── InputError        an argument of a call (array, graph, node, k) has a value it may not have (also a ValueError)
    ├── DataError         a corpus, dataset or trace is missing, unreadable or malformed
    ├── CheckpointError   a model folder or file is missing, corrupt, or of another shape or version
    ├── TokenizerError    a tokenizer cannot be read or does not fit the model
    ├── CapacityError     memory, disk or device room does not suffice
    └── BackendError      an optional package, device or compiled kernel is not there

Messages say what was wrong, which value, and what would work. The command line prints them as one line, exit code 2.
"""


class AnabranchError(Exception):
    """Base of every error a user can cause."""


class ConfigError(AnabranchError, ValueError):
    """A config field has a value it may not have; the message names the field, the value and what is allowed."""


class InputError(AnabranchError, ValueError):
    """An argument of a call has a value it may not have; the message names it, the value (and its row), and what is allowed."""


class DataError(AnabranchError):
    """A corpus, dataset or trace is missing, unreadable or malformed."""


class CheckpointError(AnabranchError):
    """A model folder or file is missing, corrupt, or of another shape or schema version."""


class TokenizerError(AnabranchError):
    """A tokenizer cannot be read or does not fit the model."""


class CapacityError(AnabranchError):
    """Memory, disk or device room does not suffice; the message says how much is needed and what would fit."""


class BackendError(AnabranchError):
    """An optional package, device or compiled kernel that was asked for is not available."""
