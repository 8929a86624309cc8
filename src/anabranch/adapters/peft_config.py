"""adapter_config.json of the package peft: which layers are adapted (`TargetTable`), and for LoRA and DoRA with what rank and scale.

Fields that are not named here are kept as they are. One that asks for something that is not computed is refused where it is set: what it
asks for would be left out without a word.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from anabranch.adapters.patterns import ends_with, matching
from anabranch.bounds import MOST_SIZE, shown
from anabranch.errors import CheckpointError
from anabranch.lm.tensors import some

__all__ = ["ALL_LINEAR", "LoraTable", "PeftTable", "TargetTable"]

ALL_LINEAR = "all-linear"
# Set, they make an adapter something else than scale B A beside a matrix.
_REFUSED = {
    "lora_bias": "biases of lora_B",
    "layer_replication": "repeated layers",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "trainable_token_indices": "single learned tokens",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow",
    "megatron_config": "Megatron's layers",
}
# Ways to start that also change the base, which an adapter alone cannot say.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftTable:
    """adapter_config.json, checked by the kind that it is of.

    Attributes:
        table: all of it, as it stands there.
        path: where it lies, for messages.
    """

    table: Mapping[str, Any]
    path: Path

    peft_type: ClassVar[str]

    def __post_init__(self) -> None:
        kind = self.table.get("peft_type")
        if kind != self.peft_type:
            self._refuse("peft_type", kind, f"{self.peft_type!r} is what can be read")
        self._check()

    def _check(self) -> None:
        """Raise CheckpointError for fields that this kind cannot have."""

    def _refuse_set(self, fields: Mapping[str, str]) -> None:
        """Raise CheckpointError for the first of ``fields`` that is set: what it asks for is not computed."""
        for name, what in fields.items():
            if self.table.get(name):
                self._refuse(name, self.table[name], f"{what} cannot be computed here")

    def _size(self, name: str, usual: int | None = None) -> int:
        """A field that is a size."""
        value = self.table.get(name, usual)
        if type(value) is not int or not 1 <= value <= MOST_SIZE:
            self._refuse(name, value, "it must be a whole number, at least 1")
        return value

    def _words(self, name: str) -> list[str]:
        value = self.table.get(name)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            self._refuse(name, value, "it must be a list of names")
        return value

    def _refuse(self, name: str, value: Any, why: str) -> NoReturn:
        raise CheckpointError(f"{name} in {self.path} is {shown(value)}; {why}")


class TargetTable(PeftTable):
    """The config of a kind that has numbers for linear layers."""

    def _check(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            if not isinstance(self.table.get(name), str):
                self._words(name)
        self._words("modules_to_save")
        self._words("target_parameters")
        layers = self.table.get("layers_to_transform")
        if layers is not None and not (_is_index(layers) or (isinstance(layers, list) and all(map(_is_index, layers)))):
            self._refuse("layers_to_transform", layers, "it must be a layer's number, or a list of them")
        if isinstance(self.table.get("layers_pattern"), list | type(None)):
            self._words("layers_pattern")
        elif not isinstance(self.table["layers_pattern"], str):
            self._refuse("layers_pattern", self.table["layers_pattern"], "it must be a name, or a list of them")

    @property
    def target_modules(self) -> list[str] | str | None:
        """Names, a regular expression, `ALL_LINEAR`, or None where nothing is said."""
        given = self.table.get("target_modules")
        return given if isinstance(given, str) else (self._words("target_modules") or None)

    @property
    def modules_to_save(self) -> list[str]:
        """Modules that the adapter brings whole."""
        return self._words("modules_to_save")

    def parameters(self, module: str, known: Collection[str]) -> list[str]:
        """Which of the ``known`` parameters of a module ``target_parameters`` names."""
        words = self._words("target_parameters")
        return [name for name in known if any(ends_with(f"{module}.{name}", word) for word in words)]

    def targets(self, modules: Collection[str]) -> set[str]:
        """Which of ``modules``, the linear layers of a model, are adapted; none where the config names none.

        ``target_parameters`` may name a layer too, by its ``weight``; no exclusion of modules is for these.
        """
        wanted = self.target_modules
        if wanted is None:
            found = set[str]()
        elif wanted == ALL_LINEAR:
            found = {name for name in modules if not ends_with(name, "lm_head")}
        elif isinstance(wanted, str):
            found = self._fitting("target_modules", wanted, modules)
        else:
            named = _ending(modules, wanted)
            full = set(wanted)
            found = {name for name in named if name in full or self._is_in_layer(name)}
        excluded = self.table.get("exclude_modules")
        if isinstance(excluded, str):
            found -= self._fitting("exclude_modules", excluded, found)
        elif excluded:
            found -= _ending(found, excluded)
        found |= self._by_weight(modules)
        return {name for name in found if not self.is_saved(name)}

    def check_named(self, modules: Collection[str], where: Path) -> None:
        """Raise CheckpointError unless it names all of ``modules``, the linear layers that a file ``where`` has numbers for.

        Where it names none, peft takes some by the kind of model, which is not known here, or refuses.
        """
        named = self.targets(modules)
        outside = [module for module in modules if module not in named]
        if not outside:
            return
        if self.target_modules is None:
            self._refuse(
                "target_modules",
                self.table.get("target_modules"),
                f"peft may take its default layers for this kind of model then, and which these are is not known here; name those that the "
                f"file has numbers for, {some(outside)}, there: by a list of names, a pattern or {ALL_LINEAR!r}",
            )
        raise CheckpointError(
            f"{where} holds numbers for {some(outside)}, which neither target_modules nor target_parameters in {self.path} names"
        )

    def _by_weight(self, modules: Collection[str]) -> set[str]:
        """Those that ``target_parameters`` names, by the weight that they have."""
        weights = _ending([f"{name}.weight" for name in modules], self._words("target_parameters"))
        return {name.removesuffix(".weight") for name in weights}

    def is_saved(self, module: str) -> bool:
        """Whether ``module`` is one of those brought whole, or lies in one."""
        return any(f".{word}." in f".{module}." for word in self.modules_to_save)

    def is_learned(self, name: str) -> bool:
        """Whether a tensor beside those of layers was learned: a bias, or one of a module that is brought whole. Others are the base's."""
        module, _, leaf = name.rpartition(".")
        return leaf != "weight" or self.is_saved(module)

    def _is_in_layer(self, module: str) -> bool:
        """Whether ``layers_to_transform`` names its layer, as peft 0.21 has it.

        That is the first number in its name, behind two words at least, or the first behind the first of ``layers_pattern`` that stands
        before one: a later number may be an expert's.
        """
        layers = self.table.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        pattern = self.table.get("layers_pattern")
        words = module.split(".")
        numbers = [place for place in range(1, len(words) - 1) if words[place].isdecimal()]
        if pattern:
            before = [pattern] if isinstance(pattern, str) else pattern
            found = [place for one in before for place in numbers if ends_with(".".join(words[:place]), one)]
        else:
            found = [place for place in numbers if place > 1]
        return bool(found) and int(words[found[0]]) in ([layers] if isinstance(layers, int) else layers)

    def _fitting(self, name: str, pattern: str, modules: Collection[str]) -> set[str]:
        return matching([pattern], modules, is_ending=False, what=f"{name} in {self.path}")[0]


class LoraTable(TargetTable):
    """The config of LoRA, and of DoRA (``use_dora``)."""

    peft_type: ClassVar[str] = "LORA"

    def _check(self) -> None:
        self._refuse_set(_REFUSED)
        start = self.table.get("init_lora_weights", True)
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            why = "it changed the base too; save the adapter with path_initial_model_for_weight_conversion, which makes it plain LoRA"
            self._refuse("init_lora_weights", start, why)
        self._rank("r", self.table.get("r", 8))
        self._alpha("lora_alpha", self.table.get("lora_alpha", 8))
        for name, check in (("rank_pattern", self._rank), ("alpha_pattern", self._alpha)):
            for pattern, value in self._patterns(name).items():
                check(f"{name}[{pattern!r}]", value)
        for name in ("use_rslora", "use_dora"):
            if not isinstance(self.table.get(name), bool | None):
                self._refuse(name, self.table[name], "it must be true or false")
        dropout = self.table.get("lora_dropout", 0.0)
        if dropout is not None and (type(dropout) not in (int, float) or not 0 <= dropout < 1):
            self._refuse("lora_dropout", dropout, "it must be a number from 0 to below 1")
        bias = self.table.get("bias", "none")
        if bias not in ("none", "all", "lora_only"):
            self._refuse("bias", bias, "it must be none, all or lora_only")
        super()._check()

    @property
    def is_dora(self) -> bool:
        """Whether rows have lengths of their own."""
        return bool(self.table.get("use_dora"))

    @property
    def dropout(self) -> float:
        """Share of what goes into an adapter that is left out while it learns."""
        return float(self.table.get("lora_dropout") or 0.0)

    @property
    def rslora(self) -> bool:
        """Whether scales are alpha / sqrt(rank)."""
        return bool(self.table.get("use_rslora"))

    def ranks(self, modules: Collection[str]) -> dict[str, int]:
        """The rank of each adapted module."""
        return self._by_pattern("rank_pattern", modules, self.table.get("r", 8))

    def alphas(self, modules: Collection[str]) -> dict[str, float]:
        """The alpha of each adapted module."""
        return self._by_pattern("alpha_pattern", modules, self.table.get("lora_alpha", 8))

    def _by_pattern(self, name: str, modules: Collection[str], usual: Any) -> dict[str, Any]:
        """The value of the first pattern that fits each module, else the usual one."""
        patterns, by_weight = self._patterns(name), self._by_weight(modules)
        found = dict.fromkeys(modules, usual)
        # As peft has it, what is named by its weight is looked up by that.
        keys = {f"{module}.weight" if module in by_weight else module: module for module in modules}
        fitting = matching(list(patterns), keys, is_ending=True, what=f"{name} in {self.path}")
        for own, value in reversed(list(zip(fitting, patterns.values(), strict=True))):
            found |= {keys[key]: value for key in own}
        return found

    def _patterns(self, name: str) -> dict[str, Any]:
        value = self.table.get(name) or {}
        if not isinstance(value, dict):
            self._refuse(name, value, "it must be a table of patterns")
        return value

    def _rank(self, name: str, value: Any) -> None:
        if type(value) is not int or not 1 <= value <= MOST_SIZE:
            self._refuse(name, value, "a rank must be a whole number, at least 1")

    def _alpha(self, name: str, value: Any) -> None:
        if type(value) not in (int, float) or not abs(value) < 1e30 or not math.isfinite(value):
            self._refuse(name, value, "it must be a finite number")


def _is_index(value: Any) -> bool:
    return type(value) is int and value >= 0


def _ending(names: Collection[str], words: Collection[str]) -> set[str]:
    """Which names `ends_with` holds of for any word: looked up, since words may be as many as names, the full names of them all."""
    known = set(words)
    found = set()
    for name in names:
        pieces = name.split(".")
        if any(".".join(pieces[start:]) in known for start in range(len(pieces))):
            found.add(name)
    return found
