"""Where the configs of two models differ, field by field.

for found in differences(wanted.feed_forward, held.feed_forward, "feed_forward"):
    print(found.path, found.wanted, found.held)         # feed_forward.router.select.top_k 1 2
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from anabranch.config import Config, to_dict

__all__ = ["Difference", "differences", "shown"]


@dataclass(frozen=True)
class Difference:
    """A field of two configs with two values.

    Attributes:
        path: names with dots between them.
        wanted: what it is in the first.
        held: what it is in the second.
    """

    path: str
    wanted: Any
    held: Any

    def is_within(self, *paths: str) -> bool:
        """Whether the field is one of ``paths``, or a field of one."""
        return any(self.path == path or self.path.startswith(f"{path}.") for path in paths)


def differences(wanted: Any, held: Any, path: str) -> Iterator[Difference]:
    """All fields in which ``wanted`` and ``held`` differ, each below ``path``; parts of two kinds are one difference."""
    if isinstance(wanted, Config) and type(wanted) is type(held):
        for field in fields(wanted):  # type: ignore[arg-type]
            yield from differences(getattr(wanted, field.name), getattr(held, field.name), f"{path}.{field.name}")
    elif to_dict(wanted) != to_dict(held):
        yield Difference(path, wanted, held)


def shown(value: Any) -> str:
    """A value of a config in few words: a part by its kind."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(shown, value))}]"
    kind = getattr(getattr(value, "owner", None), "kind", None) if isinstance(value, Config) else None
    return repr(kind or value)
