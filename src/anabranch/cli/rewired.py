"""``anabranch generate --rewire``: its options, and the tokens of a `anabranch.adapters.rewiring.Rerouter`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.options import FLAG
from anabranch.cli.output import say
from anabranch.errors import ConfigError

if TYPE_CHECKING:
    from anabranch.adapters.rewiring import Rewiring
    from anabranch.lm import Decoder

Rewire = Annotated[
    bool,
    typer.Option(
        "--rewire",
        metavar=FLAG,
        help="Fit the routers of a mixture of experts to the text: once before generation, then every 128 tokens.",
    ),
]
RewireSet = Annotated[
    list[str] | None,
    typer.Option(
        "--rewire-set",
        metavar="FIELD=VALUE",
        help="A setting of --rewire, such as steps=10, eta=0.1, interval=64, guard=false. May be repeated.",
    ),
]


def rewiring_of(wanted: bool, assignments: Sequence[str] | None, others: dict[str, Any]) -> Rewiring | None:
    """The settings, None without --rewire. ``others`` are values of options that do not go with it.

    Raises ConfigError for settings that cannot be, or without --rewire, and for an option that does not go with it.
    """
    if not wanted:
        if assignments:
            raise ConfigError("--rewire-set is given, but --rewire is not; give both")
        return None
    for name, value in others.items():
        if value is not None:
            raise ConfigError(f"{name} cannot be combined with --rewire; leave one of them out")
    from anabranch.adapters.rewiring import Rewiring
    from anabranch.config import from_dict, parse_assignment

    return from_dict(Rewiring, dict(parse_assignment(text) for text in assignments or ()))


def rewiring_settings(assignments: Sequence[str] | None, path: str) -> dict[str, Any]:
    """Settings by the dotted path of their field in a config, where their table lies at ``path``. Raises ConfigError for what is none."""
    from anabranch.config import parse_assignment

    return {f"{path}.{name}": value for name, value in map(parse_assignment, assignments or ())}


def library_fields(fields: dict[str, Any], option: str, *, talks: bool) -> dict[str, Any]:
    """Fields of `anabranch.lm.SamplingConfig`: those of an engine without what is not known there; a note says what makers asked for."""
    neutral = {"min_p": 0.0, "repetition_penalty": 1.0}
    asked = [name for name, value in neutral.items() if fields.get(name, value) != value]
    if asked and talks:
        say(f"note: the model's generation_config.json has {' and '.join(asked)}, which {option} leaves out")
    return {name: value for name, value in fields.items() if name not in neutral}


class Rewired:
    """The new tokens of one prompt, and afterwards the report of how its routers were turned."""

    def __init__(self, model: Decoder, config: Rewiring) -> None:
        from anabranch.adapters.rewiring import Rerouter

        self._rerouter = Rerouter(model, config)
        self._state = self._rerouter.new_state()

    def tokens(self, prompt: Sequence[int], fields: dict[str, Any]) -> Iterator[int]:
        """As they come; ``fields`` of `anabranch.lm.SamplingConfig`."""
        from anabranch.lm import SamplingConfig

        for step in self._rerouter.stream([prompt], SamplingConfig(**fields), states=[self._state]):
            yield from step.tokens

    def report(self) -> dict[str, Any]:
        """Settings, routers by name, and of each phase 1 what it did."""
        from dataclasses import asdict

        from anabranch.config import to_dict

        return {
            "settings": to_dict(self._rerouter.config),
            "routers": list(self._rerouter.names),
            "steps": self._state.steps,
            "seconds": round(self._state.seconds, 3),
            "phases": [asdict(phase) for phase in self._state.phases],
        }

    def notes(self) -> list[str]:
        """A line for each phase 1 that left something out."""
        skipped = dict.fromkeys(phase.skipped for phase in self._state.phases if phase.skipped)
        return [f"note: routers were not turned: {reason}" for reason in skipped]
