"""What a design says of models that look like its own and have other weights: a part of its config, read where weights are loaded."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class WeightField:
    """A field of a config that decides what the weights are, and what leads from one value of it to another.

    Attributes:
        name: of the field, the same in all designs that have it.
        value: in this config.
        advice: what converts a model; empty where nothing does.
        plain: the value of configs that do not have the field.
        path: the field as a config is written, where ``name`` is short for it.
        hint: what to do where stored tensors do not fit this value, most likely since it was edited by hand; ``advice`` unless given.
    """

    name: str
    value: Any
    advice: str = ""
    plain: Any = None
    path: str = ""
    hint: str = ""

    @property
    def what_to_do(self) -> str:
        """The value and the hint, as the end of an error message; empty if there is no hint."""
        hint = self.hint or self.advice
        value = repr(self.value) if self.path else self.value
        return f"the config says {self.path or self.name}={value}: {hint}" if hint else ""


def first_difference(
    ours: tuple[WeightField, ...], theirs: tuple[WeightField, ...]
) -> tuple[str, Any, Any, str] | None:
    """(name, our value, their value, advice or nothing) of the first field in which two configs differ; None if they do not."""
    of_ours, of_theirs = ({part.name: part for part in parts} for parts in (ours, theirs))
    for name in {**of_ours, **of_theirs}:
        known = [part for part in (of_ours.get(name), of_theirs.get(name)) if part is not None]
        values = [known[0].plain if part is None else part.value for part in (of_ours.get(name), of_theirs.get(name))]
        if values[0] != values[1]:
            return name, *values, next((part.advice for part in known if part.advice), "")
    return None
