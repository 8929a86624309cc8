"""``mixture.json`` beside a checkpoint of LoRA-Mixer: whose numbers are in it, which themselves stand there by place alone."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import nn

from anabranch.adapters.base_digest import base_digest, is_same_base
from anabranch.adapters.lora_mixer.layer import MixedLowRank
from anabranch.adapters.lora_mixer.load import mixed_layers
from anabranch.bounds import shown
from anabranch.config import completed, differences, to_dict
from anabranch.errors import CheckpointError, ConfigError
from anabranch.files import atomic_write_json, read_json
from anabranch.lm.checkpoint import find_model, load_config
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import build_empty

__all__ = ["MIXTURE", "Mixture"]

MIXTURE = "mixture.json"
FORMAT, SCHEMA = "anabranch-mixture", 1
_ADVICE = "load_mixture with what it was trained with"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Mixture:
    """What a mixture is besides its numbers.

    Attributes:
        layers: the configs of the mixed layers, by the names of what they stand beside.
        base: of `base_digest`.
        is_ours: whether it is on a model of ours, whose checkpoints have its config.
    """

    layers: Mapping[str, MixedLowRank.Config]
    base: dict[str, dict[str, str]]
    is_ours: bool

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """That on ``model``. Raises ConfigError where there is none."""
        layers = {name: layer.config for name, layer in mixed_layers(model).items()}
        return cls(layers, base_digest(model), isinstance(model, Decoder))

    @property
    def experts(self) -> list[str]:
        """Their names, in order; none where they have none."""
        return list(next(iter(self.layers.values())).experts)

    def write(self, folder: Path) -> None:
        """Into the new folder of a checkpoint."""
        told = {
            "format": FORMAT,
            "schema": SCHEMA,
            "experts": self.experts,
            "layers": {name: _facts(config) for name, config in self.layers.items()},
            "base": self.base,
        }
        atomic_write_json(folder / MIXTURE, told)

    def check(self, folder: Path) -> None:
        """Raise CheckpointError where the checkpoint in ``folder`` is of other experts, of the same in another order, or of other scales,
        routers or another base.

        What an earlier version wrote says neither names nor base: a warning in the log says so, and what else there is to compare is.
        """
        found = find_model(folder) if self.is_ours and folder.is_dir() else folder
        if (found / MIXTURE).is_file():
            self._check_told(found / MIXTURE)
        elif (found / "config.json").is_file():
            if self.is_ours:
                self._check_layers(found / "config.json", _layers_in(found))
            logger.warning(
                "%s has no %s, as an earlier version wrote it: neither the names of its experts nor its base are compared with the model's",
                found,
                MIXTURE,
            )

    def _check_told(self, file: Path) -> None:
        told = read_json(file)
        if told.get("format") != FORMAT or told.get("schema") != SCHEMA:
            raise CheckpointError(
                f"{file} is of format {shown(told.get('format'))}, schema {shown(told.get('schema'))}; this version reads {FORMAT!r}, "
                f"{SCHEMA}"
            )
        experts, layers, base = (told.get(name) for name in ("experts", "layers", "base"))
        if not isinstance(experts, list) or not isinstance(layers, dict) or not isinstance(base, dict):
            raise CheckpointError(
                f"{file} lacks a list of experts, or tables of layers and base; copy the folder again"
            )
        if experts != self.experts:
            is_order = sorted(map(str, experts)) == sorted(self.experts)
            raise CheckpointError(
                f"{file} is of the experts {_named(experts)}, and the model has {_named(self.experts)}"
                f"{' in this order' if is_order else ''}; {_ADVICE}{', in its order' if is_order else ''}"
            )
        self._check_layers(file, layers)
        try:
            is_same = is_same_base(base, self.base)
        except (AttributeError, KeyError, TypeError):
            raise CheckpointError(f"base in {file} is no digest of a base; copy the folder again") from None
        if not is_same:
            raise CheckpointError(
                f"{file} is of a mixture on another base, with other numbers than this model's; put the adapters on that one"
            )

    def _check_layers(self, file: Path, layers: Mapping[str, Any]) -> None:
        """Raise CheckpointError for the first thing in which layers differ, those of routers before others."""
        ours = {name: _facts(config) for name, config in self.layers.items()}
        theirs = {name: _completed(facts, self.layers.get(name)) for name, facts in layers.items()}
        odd = differences(theirs, ours)
        if odd:
            name = next((name for name in odd if name.endswith(".top_k")), next(iter(odd)))
            told, own = odd[name]
            raise CheckpointError(
                f"{file} is of a mixture whose {name} is {shown(told)}, and the model's is {shown(own)}; {_ADVICE}"
            )


def _facts(config: MixedLowRank.Config) -> dict[str, Any]:
    """What tensors do not tell of a layer, and what it computes depends on."""
    router = config.router
    return {
        "ranks": list(config.ranks),
        "alphas": [float(alpha) for alpha in config.alphas or config.ranks],
        "rslora": config.rslora,
        "closed": list(config.closed),
        "router_group": config.router_group,
        "router": None if router is None else {"score": to_dict(router.score), "select": to_dict(router.select)},
    }


def _completed(facts: Any, config: MixedLowRank.Config | None) -> Any:
    """Facts of an earlier version, with what routers have been given since."""
    router = facts.get("router") if isinstance(facts, dict) else None
    if config is None or config.router is None or not isinstance(router, dict):
        return facts
    parts = {"score": config.router.score, "select": config.router.select}
    return {**facts, "router": {name: completed(told, parts.get(name)) for name, told in router.items()}}


def _layers_in(found: Path) -> dict[str, Any]:
    """Facts by the config of a model of ours; none where it has no mixture, which its tensors tell too."""
    try:
        return {name: _facts(layer.config) for name, layer in mixed_layers(build_empty(load_config(found))).items()}
    except ConfigError:
        return {}


def _named(experts: list[Any]) -> str:
    return ", ".join(map(shown, experts)) if experts else "none that have names"
