"""Options that several commands have, as one parameter of each: a dataclass whose fields are the options."""

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from typer.models import OptionInfo

__all__ = ["OptionSet", "takes_sets"]


class OptionSet:
    """What dataclasses of options are; a parameter of such a type is their options, in its place (`takes_sets`)."""


def takes_sets(**told: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The command with the options of its sets in the places of the parameters that are sets.

    Args:
        told: what ``{name}`` stands for in the help of a set's options, where commands differ.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        sets = {name: hint for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, OptionSet)}
        parameters = []
        for name, parameter in inspect.signature(command).parameters.items():
            own = [parameter.replace(annotation=hints[name])]
            parameters += _options(sets[name], parameter.kind, told) if name in sets else own

        @functools.wraps(command)
        def called(**given: Any) -> None:
            made = {
                name: kind(**{one.name: given.pop(one.name) for one in fields(kind)})  # type: ignore[arg-type]
                for name, kind in sets.items()
            }
            command(**made, **given)

        # What typer looks at.
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return called

    return decorated


def _options(kind: type[OptionSet], of: Any, told: dict[str, str]) -> list[inspect.Parameter]:
    """The parameters that a set's fields are."""
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(one.name, of, default=one.default, annotation=_with_help(hints[one.name], told))
        for one in fields(kind)  # type: ignore[arg-type]
    ]


def _with_help(hint: Any, told: dict[str, str]) -> Any:
    """An annotated type whose option's help has what a command tells."""
    if get_origin(hint) is not Annotated:
        return hint
    kind, *more = get_args(hint)
    return Annotated[(kind, *(_told(each, told) if isinstance(each, OptionInfo) else each for each in more))]


def _told(option: OptionInfo, told: dict[str, str]) -> OptionInfo:
    made = copy.copy(option)
    for name, text in told.items():
        made.help = (made.help or "").replace(f"{{{name}}}", text)
    return made
