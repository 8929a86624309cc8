"""`FieldError`: what is wrong with a chat, and with which field of it."""

from anabranch.errors import InputError

__all__ = ["FieldError"]


class FieldError(InputError):
    """A message or a tool of a chat has a value it may not have. Its sentence is the field and what is wrong with it.

    Attributes:
        param: the field, such as ``messages[2].content``.
        what: is wrong with it, such as ``is missing``.
        is_unsupported: it is something that OpenAI's API knows and no model here can do.
    """

    def __init__(self, param: str, what: str, *, is_unsupported: bool = False) -> None:
        super().__init__(f"{param} {what}")
        self.param, self.what, self.is_unsupported = param, what, is_unsupported
