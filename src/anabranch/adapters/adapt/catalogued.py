"""Methods of the catalogue as methods of `anabranch adapt`: all that it runs by code of ours.

    anabranch adapt SmolLM2-135M rows.jsonl --method dora --rank 4 --target q --out runs/dora
    anabranch adapt SmolLM2-135M rows.jsonl --method adapter-parallel --set method.width=8 --out runs/parallel

What such a method may be told, and its usual values, is on its card (`anabranch adapters card dora`).
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from anabranch.adapters.adapt.method import Method, Written, write_peft_or_own
from anabranch.adapters.adapter_mixture import averaged
from anabranch.adapters.catalogue.applied import Applied, apply
from anabranch.adapters.catalogue.card import Card
from anabranch.adapters.catalogue.cost import settings
from anabranch.adapters.catalogue.table import CARDS, find
from anabranch.adapters.eva import start_by_inputs
from anabranch.adapters.front import Front
from anabranch.adapters.graft import layers_of
from anabranch.adapters.numbers import Holder
from anabranch.adapters.own_folder import OwnAdapter, write_own
from anabranch.adapters.sparse_bottleneck import settle, snip
from anabranch.adapters.sparse_delta import place_by_fisher
from anabranch.bounds import shown
from anabranch.config import Field, configclass
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.nn import Linear
from anabranch.registry import kinds, resolve
from anabranch.train.optimizer import Speed

__all__ = ["Catalogued", "method_named", "method_names", "methods_with"]

_FAMILY = "adapter_method"
# LoRA+, section 4 of its paper: the rate of B over that of A.
_B_OVER_A = 16.0
_NOT_OPTIONS = ("id", "targets")
# It needs what a training of the whole model moved, which nobody makes here.
_NOT_BY_ROWS = ("lt-sft",)


class Catalogued(Method, kind="catalogue"):
    """One method of `anabranch.adapters.catalogue`, put on by `anabranch.adapters.catalogue.apply`."""

    summary: ClassVar[str] = "a method of the catalogue"

    @configclass
    class Config(Method.Config):
        """Which method, and its options; None, and no targets, for the usual value of its card.

        Attributes:
            id: of a card whose backend is ``own``.
            sparsity: of sparse-adapter, the share of its weights that is pruned.
            consistency: of adamix, what the divergence between two random choices weighs.
            rank, alpha, width, activation, scale, number, active, size, drop, tokens, feedforward, reduction, expansion: as its card says.
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
            if card.backend != "own":
                who = "nobody runs here" if card.backend == "none" else f"is run by {card.backend}, not by code of ours"
                raise ConfigError(f"method is {self.id!r}, which {who}; {_why(card)}")
            if card.id in _NOT_BY_ROWS:
                raise ConfigError(
                    "method is 'lt-sft', which learns the entries that a full training moved furthest, and adapt makes none first; in "
                    "Python give what it moved to `place` of each layer, or take 'fish-mask' (by gradients) or 'shira' (at random)"
                )
            settings(card, self.options())

        def options(self) -> dict[str, Any]:
            """What was said, by the names of the card."""
            said = {name: getattr(self, name) for name in type(self).__dataclass_fields__ if name not in _NOT_OPTIONS}
            found = {name: value for name, value in said.items() if value is not None}
            return found | ({"targets": self.targets} if self.targets else {})

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._applied: Applied | None = None

    @property
    def name(self) -> str:
        """The card's id."""
        return self.config.id

    @property
    def trains_base(self) -> bool:
        """Whether parameters of the base learn."""
        return find(self.config.id).trains_base

    @property
    def parts_differ(self) -> str:
        """As the card says."""
        return find(self.config.id).parts_differ

    def layer(self, tasks: Sequence[str]) -> Linear.Config:
        """There is none for all matrices alike."""
        raise AssertionError("a method of the catalogue is put on whole")

    def begin(self, model: Decoder, tasks: Sequence[str], *, seed: int) -> Decoder:
        """As `anabranch.adapters.catalogue.apply`."""
        self._applied = apply(model, self.config.id, seed=seed, **self.config.options())
        return model

    def go_on(self, model: Decoder, tasks: Sequence[str], layers: Mapping[str, Linear.Config], *, seed: int) -> Decoder:
        """As `begin`; what was pruned is pruned."""
        self.begin(model, tasks, seed=seed)
        settle(model)
        return model

    def look(self, model: Decoder, losses: Iterable[Tensor]) -> None:
        """SparseAdapter is pruned by them, FISH mask's entries are chosen, and EVA's A takes directions of what layers are given."""
        if self.config.id == "sparse-adapter":
            snip(model, losses)
        elif self.config.id == "fish-mask":
            place_by_fisher(model, losses)
        elif self.config.id == "eva":
            start_by_inputs(model, losses)

    def consistency(self) -> float:
        """AdaMix has two choices for each row."""
        if self.config.id != "adamix":
            return 0.0
        return float(settings(find("adamix"), self.config.options())["consistency"])

    def kept(self, model: Decoder) -> list[str]:
        """What stands beside the model, or learns of it."""
        assert self._applied is not None, "it is put on before anything is kept"
        return list(self._applied.state())

    def speed(self, name: str, parameter: nn.Parameter) -> Speed | None:
        """B of LoRA+ learns 16 times as quickly as A."""
        return Speed(_B_OVER_A) if self.config.id == "lora-plus" and name.endswith(".b") else None

    def write(self, folder: Path, model: Decoder, base: str) -> Written:
        """A folder of peft's where peft has such an adapter, else one of our own."""
        layers = layers_of(model).values()
        is_front = isinstance(model.streams, Front)
        if (layers and not is_front and all(isinstance(layer, Holder) for layer in layers)) or (
            is_front and not layers
        ):
            return write_peft_or_own(folder, model, base)
        write_own(folder, model, base=base)
        if self.config.id == "adamix":
            averaged(OwnAdapter.read(folder)).write(folder)
        return Written(folder, "anabranch")


def method_names() -> list[str]:
    """What `--method` takes: methods by themselves, and those of the catalogue that are run by code of ours and train by rows alone."""
    own = {id for id, card in CARDS.items() if card.backend == "own" and id not in _NOT_BY_ROWS}
    return sorted({*kinds(_FAMILY), *own} - {"catalogue"})


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


def _why(card: Card) -> str:
    if card.backend == "peft":
        return "train it with the package peft (anabranch.adapters.catalogue.apply_peft), and put its folder on with eval --adapter"
    return card.limits or "its card tells what it is"
