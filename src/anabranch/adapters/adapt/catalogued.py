"""Methods of the catalogue as methods of `anabranch adapt`: all that it runs by code of ours, or through the package peft.

    anabranch adapt SmolLM2-135M rows.jsonl --method dora --rank 4 --target q --out runs/dora
    anabranch adapt SmolLM2-135M rows.jsonl --method adapter-parallel --set method.width=8 --out runs/parallel

What such a method may be told, and its usual values, is on its card (`anabranch adapters card dora`).
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from anabranch.adapters.adapt.answers import Rows
from anabranch.adapters.adapt.lesson import Lesson, Seen
from anabranch.adapters.adapt.method import Method, Written, write_peft_or_own
from anabranch.adapters.adapter_mixture import twice_told
from anabranch.adapters.catalogue.applied import Applied, apply
from anabranch.adapters.catalogue.cost import settings
from anabranch.adapters.catalogue.table import CARDS, find, runnable_backends
from anabranch.adapters.catalogue.through_peft import put_by_peft
from anabranch.adapters.catalogue.written import goes_to_peft
from anabranch.adapters.own_folder import OwnAdapter, write_own
from anabranch.adapters.put_on import added_names
from anabranch.adapters.sparse_bottleneck import settle
from anabranch.bounds import shown
from anabranch.config import Field, configclass
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.lm.decoder import Decoder
from anabranch.nn import Linear
from anabranch.registry import kinds, resolve
from anabranch.train.optimizer import Speed

__all__ = ["Catalogued", "method_named", "method_names", "methods_with"]

_FAMILY = "adapter_method"
_NOT_OPTIONS = ("id", "targets")


class Catalogued(Method, kind="catalogue"):
    """One method of `anabranch.adapters.catalogue`, put on by `anabranch.adapters.catalogue.apply`, or through peft by `put_by_peft`."""

    summary: ClassVar[str] = "a method of the catalogue"

    @configclass
    class Config(Method.Config):
        """Which method, and its options; None, and no targets, for the usual value of its card.

        Attributes:
            id: of a card whose backend is ``own``, or ``peft``, which wants the extra of that name.
            sparsity: of sparse-adapter, the share of its weights that is pruned.
            consistency: of adamix, what the divergence between two random choices weighs.
            rank, alpha, width, activation, scale, number, active, size, drop, tokens, feedforward, reduction, expansion, entries, block,
                group, vectors, length, hidden: as its card says.
        """

        id: str = "lora"
        targets: tuple[str, ...] = ()
        rank: int | None = Field(default=None, ge=1)
        alpha: float | None = None
        width: int | None = Field(default=None, ge=1)
        activation: str | None = None
        scale: float | None = None
        number: int | None = Field(default=None, ge=1)
        active: int | None = Field(default=None, ge=1)
        size: int | None = Field(default=None, ge=1)
        drop: int | None = Field(default=None, ge=0)
        tokens: int | None = Field(default=None, ge=1)
        feedforward: tuple[str, ...] | None = None
        reduction: int | None = Field(default=None, ge=1)
        expansion: int | None = Field(default=None, ge=1)
        entries: int | None = Field(default=None, ge=1)
        block: int | None = Field(default=None, ge=1)
        group: int | None = Field(default=None, ge=1)
        vectors: int | None = Field(default=None, ge=1)
        length: int | None = Field(default=None, ge=1)
        hidden: int | None = Field(default=None, ge=1)
        sparsity: float | None = Field(default=None, ge=0, lt=1)
        consistency: float | None = Field(default=None, ge=0)

        def __post_init__(self) -> None:
            card = find(self.id)
            if card.setting is not None:
                raise ConfigError(
                    f"method is {self.id!r}, which is a setting of training and no adapter; say --set {card.setting} with any method"
                )
            if card.way is not None:
                raise ConfigError(f"method is {self.id!r}, which adapt does not train; what runs it: {card.way}")
            if card.backend == "none":
                raise ConfigError(
                    f"method is {self.id!r}, which nobody runs here; {card.limits or 'its card tells what it is'}"
                )
            if card.only_peft is not None:
                raise ConfigError(
                    f"method is {self.id!r}, which peft alone trains (anabranch.adapters.catalogue.apply_peft, in Python): {card.only_peft}"
                )
            if card.not_by_rows:
                raise ConfigError(f"method is {self.id!r}, which {card.not_by_rows}")
            settings(card, self.options())

        def options(self) -> dict[str, Any]:
            """What was said, by the names of the card."""
            said = {name: getattr(self, name) for name in type(self).__dataclass_fields__ if name not in _NOT_OPTIONS}
            found = {name: value for name, value in said.items() if value is not None}
            return found | ({"targets": self.targets} if self.targets else {})

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._card = find(config.id)
        self._applied: Applied | None = None
        if self._is_by_peft:
            require("peft", by=f"method {config.id}")

    @property
    def _is_by_peft(self) -> bool:
        return self._card.backend == "peft"

    @property
    def name(self) -> str:
        """The card's id."""
        return self.config.id

    @property
    def trains_base(self) -> bool:
        """Whether parameters of the base learn."""
        return self._card.trains_base

    @property
    def parts_differ(self) -> str:
        """As the card says."""
        return self._card.parts_differ

    def layer(self, tasks: Sequence[str]) -> Linear.Config:
        """There is none for all matrices alike."""
        raise AssertionError("a method of the catalogue is put on whole")

    def begin(self, model: Decoder, tasks: Sequence[str], *, seed: int) -> Decoder:
        """As `anabranch.adapters.catalogue.apply`, or `put_by_peft`."""
        if self._is_by_peft:
            return put_by_peft(model, self.config.id, seed=seed, **self.config.options())
        self._applied = apply(model, self.config.id, seed=seed, **self.config.options())
        return model

    def go_on(self, model: Decoder, tasks: Sequence[str], layers: Mapping[str, Linear.Config], *, seed: int) -> Decoder:
        """As `begin`; what was pruned is pruned."""
        self.begin(model, tasks, seed=seed)
        settle(model)
        return model

    def look(self, model: Decoder, losses: Iterable[Tensor]) -> None:
        """As the card says."""
        if self._card.looks is not None:
            self._card.looks(model, losses)

    def lessons(self, batch: Rows) -> Sequence[Lesson]:
        """Two choices for each row are held to each other, where a card has a weight for that."""
        weight = float(settings(self._card, self.config.options()).get("consistency", 0.0))
        if not weight:
            return []
        assert self._applied is not None, "it is put on before anything is learned"
        return [_consistency(batch, self._applied.model, weight)]

    def kept(self, model: Decoder) -> list[str]:
        """What stands beside the model, or learns of it."""
        if self._is_by_peft:
            # What layers share is kept once.
            once = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
            return [name for name in added_names(model) if name in once]
        assert self._applied is not None, "it is put on before anything is kept"
        return list(self._applied.state())

    def speed(self, name: str, parameter: nn.Parameter) -> Speed | None:
        """As the card says."""
        found = self._card.speed(name)
        return None if found == 1 else Speed(found)

    def write(self, folder: Path, model: Decoder, base: str) -> Written:
        """A folder of peft's where peft has such an adapter, else one of our own."""
        if goes_to_peft(model):
            return write_peft_or_own(folder, model, base)
        write_own(folder, model, base=base)
        if self._card.written is not None:
            self._card.written(OwnAdapter.read(folder)).write(folder)
        return Written(folder, "anabranch")


def _consistency(batch: Rows, model: Decoder, weight: float) -> Lesson:
    """All rows twice, for which other random choices are made: the divergence of both, see `anabranch.adapters.adapter_mixture`."""
    (num_streams, _), rows = model.streams_of(None), len(batch[0])

    def losses(seen: Seen, own: slice) -> dict[str, Tensor]:
        return {"consistency": weight * seen.mean_R(seen.apart_M)[:rows].mean()}

    return Lesson(losses, again=partial(twice_told, num_streams=num_streams, device=batch[0].device))


def method_names() -> list[str]:
    """What `--method` takes here: methods by themselves, and those of the catalogue that train by rows alone.

    Those that peft runs are among them where it is installed.
    """
    backends = runnable_backends()
    carded = {
        id for id, card in CARDS.items() if card.backend in backends and not card.not_by_rows and card.only_peft is None
    }
    return sorted({*kinds(_FAMILY), *carded} - {"catalogue"})


def methods_with(option: str) -> list[str]:
    """Those of `method_names` that have an option of this name."""
    own: Any = {kind: resolve(_FAMILY, kind) for kind in kinds(_FAMILY) if kind != "catalogue"}
    found = {kind for kind, method in own.items() if option in method.Config.__dataclass_fields__}
    cards = {id for id, card in CARDS.items() if id not in own and option in card.options}
    return sorted(found | (cards & {*method_names()}))


def plain_name(name: str) -> str:
    """A method's name with hyphens, which pages and cards have where some kinds have underscores: `lora-mixer` for `lora_mixer`."""
    return name.replace("_", "-")


def method_named(name: str) -> Method.Config:
    """The config of a method, with its usual values; hyphens and underscores are the same. Raises ConfigError, with the nearest
    name, for one that there is not."""
    card = CARDS.get(name)
    if name not in kinds(_FAMILY) and card is not None:
        return Catalogued.Config(id=name)
    if name in method_names():
        made: Any = resolve(_FAMILY, name)
        return made.Config()
    alike = plain_name(name)
    for known in method_names():
        if plain_name(known) == alike:
            return method_named(known)
    if name in kinds(_FAMILY):
        raise ConfigError(f"--method {name} takes a method's id; say which, as in --method dora")
    near = difflib.get_close_matches(name, method_names(), n=1)
    told = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(method_names())}"
    raise ConfigError(f"method is {shown(name)}, and there is none of that name; {told}")
