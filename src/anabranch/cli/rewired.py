"""``--rewire`` of ``generate``, ``chat`` and ``eval``: its options, and the tokens of a `anabranch.adapters.rewiring.Rerouter`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.option_sets import OptionSet
from anabranch.cli.options import FLAG
from anabranch.cli.output import say
from anabranch.errors import ConfigError, DataError

if TYPE_CHECKING:
    from anabranch.adapters.rewiring import Rewiring, RewiringState
    from anabranch.lm import Decoder

RewireSet = Annotated[
    list[str] | None,
    typer.Option(
        "--rewire-set",
        metavar="FIELD=VALUE",
        help="A setting of --rewire, such as steps=10, eta=0.1, interval=64, guard=false. May be repeated.",
    ),
]
# Of a state: OLMoE's has 1,024 numbers, the largest that there are 15,000.
MOST_STATE_BYTES = 64 << 20


@dataclass(frozen=True)
class Turned(OptionSet):
    """Whether routers are turned to the text, and how. Commands tell when: ``{turned}``."""

    rewire: Annotated[
        bool,
        typer.Option("--rewire", metavar=FLAG, help="Fit the routers of a mixture of experts to the text: {turned}."),
    ] = False
    rewire_set: RewireSet = None

    def config(self, others: dict[str, Any]) -> Rewiring | None:
        """The settings, None without --rewire. ``others`` are values of options that do not go with it.

        Raises ConfigError for settings that cannot be, or without --rewire, and for an option that does not go with it.
        """
        if not self.rewire:
            if self.rewire_set:
                raise ConfigError("--rewire-set is given, but --rewire is not; give both")
            return None
        for name, value in others.items():
            if value not in (None, False):
                raise ConfigError(f"{name} cannot be combined with --rewire; leave one of them out")
        from anabranch.adapters.rewiring import Rewiring
        from anabranch.config import from_dict, parse_assignment

        return from_dict(Rewiring, dict(parse_assignment(text) for text in self.rewire_set or ()))


@dataclass(frozen=True)
class KeptState(OptionSet):
    """Where the vectors of a conversation come from, and where they go."""

    rewire_load: Annotated[
        Path | None,
        typer.Option(
            "--rewire-load",
            metavar="FILE",
            help="With --rewire, begin with the routers as --rewire-save, or a server, left them: a conversation goes on.",
        ),
    ] = None
    rewire_save: Annotated[
        Path | None,
        typer.Option("--rewire-save", metavar="FILE", help="With --rewire, write how the routers are turned (JSON)."),
    ] = None

    def read(self, model: str, *, rewires: bool) -> dict[str, Any] | None:
        """What --rewire-load names, before the model is there; None for nothing.

        Raises ConfigError without --rewire, InputError where --rewire-save would take the place of what is read, DataError for a file
        that is none, or too large for a state, and as `anabranch.files.check_writable` for --rewire-save.
        """
        said = {"--rewire-load": self.rewire_load, "--rewire-save": self.rewire_save}
        given = [name for name, value in said.items() if value is not None]
        if given and not rewires:
            raise ConfigError(f"{given[0]} is given, but --rewire is not; give both")
        from anabranch.files import check_apart, check_writable, read_json

        check_apart([self.rewire_save], [self.rewire_load, model])
        if self.rewire_save is not None:
            check_writable(self.rewire_save)
        if self.rewire_load is None:
            return None
        # A device has no end, and a pipe may have no beginning.
        if self.rewire_load.exists() and not self.rewire_load.is_file():
            raise DataError(f"{self.rewire_load} is no file; give one that --rewire-save wrote")
        if self.rewire_load.is_file() and self.rewire_load.stat().st_size > MOST_STATE_BYTES:
            size = self.rewire_load.stat().st_size
            raise DataError(f"{self.rewire_load} has {size:,} bytes; a state has at most {MOST_STATE_BYTES:,}")
        return read_json(self.rewire_load, DataError)


def is_plain(rewiring: Rewiring | None, quantize: str | None, expert_budget: str | None) -> bool:
    """Whether weights have to be in floating point: gradients go through no experts in few bits that come when they are wanted.

    Raises ConfigError where others are asked for.
    """
    if rewiring is None or expert_budget is None:
        return False
    if quantize not in (None, "none"):
        raise ConfigError(
            f"--quantize is {quantize}, and no gradient, which --rewire needs, goes through experts in few bits that come when "
            "they are wanted; leave --expert-budget out, or use --quantize none"
        )
    return True


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
    """The new tokens of a prompt, or of one prompt of a conversation after another, and how routers were turned to each.

    Attributes:
        most: positions that the model reads.
        ran: nothing; see `anabranch.cli.chat.Voice`.

    Args:
        model: a mixture of experts.
        config: how they are turned.
        stop: tokens that end an answer.
        told: the state to begin with, see `anabranch.adapters.rewiring.Rerouter.told_state`; None for a new one.
        place: where that is from.

    Raises ConfigError for a model without routers of experts, and a state that is not of it.
    """

    def __init__(
        self, model: Decoder, config: Rewiring, stop: Sequence[int], told: Any = None, place: Path | None = None
    ) -> None:
        from anabranch.adapters.rewiring import Rerouter

        self._rerouter, self._stop = Rerouter(model, config), tuple(stop)
        self.most, self.ran = model.config.max_positions, dict[str, Any]()
        self._state = self._rerouter.new_state()
        if told is not None:
            try:
                self._state = self._rerouter.state_from_told(told)
            except ConfigError as error:
                raise ConfigError(f"{place} cannot be gone on with: {error}") from None

    def tokens(self, prompt: Sequence[int], fields: dict[str, Any], asked: str = "") -> Iterator[int]:
        """As they come; ``fields`` of `anabranch.lm.SamplingConfig`. What was fitted to the prompts before stays, to go on from."""
        from anabranch.lm import SamplingConfig

        self._state.go_on()
        for step in self._rerouter.stream([prompt], SamplingConfig(**fields, stop=self._stop), states=[self._state]):
            yield from step.tokens

    def mark(self) -> RewiringState:
        """How far it has come, to go `back` to."""
        return self._state.copy()

    def back(self, mark: RewiringState) -> None:
        """Forget what came behind a `mark`."""
        self._state = mark

    def forget(self) -> None:
        """Begin anew, with routers as the model has them."""
        self._state.reset()

    def save(self, place: Path | None) -> None:
        """Write the state as JSON, all or nothing; nowhere for None. Raises as `anabranch.files.atomic_write_json`."""
        if place is not None:
            from anabranch.files import atomic_write_text

            atomic_write_text(place, json.dumps(self._rerouter.told_state(self._state)) + "\n")

    def report(self) -> dict[str, Any]:
        """Settings, routers by name, and of each phase 1 of the last prompt what it did; steps and seconds of the conversation."""
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
        """A line for each phase 1 of the last prompt that left something out."""
        skipped = dict.fromkeys(phase.skipped for phase in self._state.phases if phase.skipped)
        return [f"note: routers were not turned: {reason}" for reason in skipped]
