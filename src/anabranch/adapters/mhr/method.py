"""Poly and MHR as methods of `anabranch adapt`, and their few-shot forms, which start from an adapter that was trained before."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from anabranch.adapters.adapt.answers import Rows
from anabranch.adapters.adapt.lesson import Lesson, Seen
from anabranch.adapters.adapt.method import Method, Written, patterns_of_targets, set_anew, values_of, write_peft_or_own
from anabranch.adapters.mhr.few_shot import adapt, mu
from anabranch.adapters.mhr.layer import MultiHeadRouted, Skills
from anabranch.adapters.mhr.measure import diagnose
from anabranch.adapters.mhr.table import tables_of
from anabranch.adapters.own_folder import read_own
from anabranch.adapters.saving import adapter_on
from anabranch.config import Field, Size, configclass
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.train.optimizer import Speed

__all__ = ["Mhr", "Poly"]


# What skills that were trained before have, and what may be set anew for new tasks.
_SIZES = ("rank", "skills", "heads", "alpha", "granularity", "mixes")
_ANEW = ("unknown", "anneal", "weights", "penalties")


class Poly(Method, kind="poly"):
    """K skills and a routing table of tasks, with one head (Ponti et al. 2022, arXiv 2202.13914)."""

    summary: ClassVar[str] = "an inventory of adapters, weighed by task"
    folders: ClassVar[tuple[str, ...]] = ("start",)

    @configclass
    class Config(Skills, Method.Config):
        """As `Skills`, with one head, and how it is trained.

        Attributes:
            table_speed: learning rate of routing tables, over that of skills: 0.1 for 1e-3. They have no weight decay.
            start: the folder of an adapter that was trained before, whose skills a new task learns with; None to begin anew.
            mode: with ``start``, what learns: ``full``, ``z``, ``mu`` or ``random``, see `anabranch.adapters.mhr.adapt`.
            redundant: with ``mu``, let all skills learn under equal weights, as the reference does; what is written is their average alike.
        """

        heads: Size = Field(default=1, ge=1)
        table_speed: float = Field(default=100.0, gt=0)
        start: str | None = None
        mode: Literal["full", "z", "mu", "random"] = "full"
        redundant: bool = False

        def __post_init__(self) -> None:
            if self.redundant and self.mode != "mu":
                raise ConfigError(f"redundant is for mode 'mu', and mode is {self.mode!r}; leave it out")
            routers = (name for name in (*_ANEW, "table_speed") if name in set_anew(self))
            if self.mode == "mu" and (name := next(routers, None)):
                raise ConfigError(
                    f"{name} is of routing, and mode is 'mu', whose average knows no tasks; leave one of them out"
                )
            if self.start is None and self.mode != "full":
                raise ConfigError(
                    f"mode is {self.mode!r}, which goes on from skills that were trained before; name their folder: --from, or method.start"
                )

    config: Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._unlikelihood: float = config.penalties.unlikelihood

    @property
    def needs_task(self) -> bool:
        """Whether it routes: the average alone (``mu``) does not."""
        return self.config.mode != "mu"

    def layer(self, tasks: Sequence[str]) -> MultiHeadRouted.Config:
        """An inventory for these tasks."""
        return MultiHeadRouted.Config(tasks=tuple(tasks), **values_of(self.config, Skills))

    def begin(self, model: Decoder, tasks: Sequence[str], *, seed: int) -> Decoder:
        """Fresh skills, or those of ``start`` for new tasks, routed as set anew where anything is.

        Raises ConfigError where the config asks for skills of other sizes or elsewhere than ``start`` has them.
        """
        if self.config.start is None:
            return super().begin(model, tasks, seed=seed)
        read_own(self.config.start, model, trainable=True)
        _check_kind(model, self.config.start)
        asked = set_anew(self.config)
        _check_sizes(model, asked, self.config.start)
        names = () if self.config.mode == "mu" else tuple(tasks)
        anew = _anew(model, asked)
        self._unlikelihood = anew["penalties"].unlikelihood
        return adapt(model, names, mode=self.config.mode, redundant=self.config.redundant, seed=seed, anew=anew)

    def speed(self, name: str, parameter: nn.Parameter) -> Speed | None:
        """Routing tables learn quickly, and do not decay."""
        is_table = name.endswith("table.z") or (".routing_table_" in name and name.endswith(".z"))
        return Speed(self.config.table_speed, 0.0) if is_table else None

    def routing(self, model: Decoder, rows: Iterable[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Any]:
        """``sparsity``, ``discreteness`` and ``efficiency`` (see `anabranch.adapters.mhr.diagnose`), their means and of each table."""
        # The average asks no table, though it may have one.
        if self.config.mode == "mu" or not tables_of(model):
            return {}
        tables = {name: asdict(found) for name, found in diagnose(model).items()}
        names = next(iter(tables.values())).keys()
        return {**{name: fmean(table[name] for table in tables.values()) for name in names}, "tables": tables}

    def lessons(self, batch: Rows) -> Sequence[Lesson]:
        """Rows under another's task, where that has a weight: as configured, or as of ``start`` where nothing else is asked."""
        return [_under_another(batch, self._unlikelihood)] if self._unlikelihood and self.needs_task else []

    def write(self, folder: Path, model: Decoder, base: str) -> Written:
        """A folder of our own with skills and table; the average alone is plain LoRA, in a folder of peft's."""
        if self.config.mode == "mu":
            return write_peft_or_own(folder, model, base, mu if self.config.redundant else adapter_on)
        return super().write(folder, model, base)


def _under_another(batch: Rows, weight: float) -> Lesson:
    """The same rows again, each under the task of another, where its answer is to be unlikely: -log(1 - p) of its tokens."""
    token_BL, start_B, length_B, task_B = batch
    other_B = task_B.roll(1)

    def losses(seen: Seen, own: slice) -> dict[str, Tensor]:
        punished_M = -torch.log1p(-(-seen.nats_M).exp().clamp_max(1 - 1e-6))
        punished_B = seen.mean_R(punished_M)[own]
        return {"unlikelihood": weight * (punished_B * (other_B != task_B).float()).mean()}

    return Lesson(losses, rows=(token_BL, start_B, length_B, other_B))


def _anew(model: Decoder, asked: Mapping[str, Any]) -> dict[str, Any]:
    """How routed layers are from now on: field by field what is ``asked``, and of all else what those on the model have."""
    own = next(kind for kind in model.config.linears.values() if isinstance(kind, MultiHeadRouted.Config))
    anew = {name: asked.get(name, getattr(own, name)) for name in _ANEW}
    parts = {
        name: getattr(own, name).replace(**set_anew(asked[name])) for name in ("weights", "penalties") if name in asked
    }
    return anew | parts


def _check_kind(model: Decoder, start: str) -> None:
    """Raise ConfigError where ``start`` put something else than skills onto the model."""
    others = [kind for kind in model.config.linears.values() if not isinstance(kind, MultiHeadRouted.Config)]
    if others or not model.config.linears:
        what = f"layers of kind {others[0].owner.kind!r}" if others else "nothing beside a matrix"
        raise ConfigError(f"{start} has {what}, and skills of poly or mhr are gone on from; name a folder of theirs")


def _check_sizes(model: Decoder, asked: Mapping[str, Any], start: str) -> None:
    """Raise ConfigError where sizes or targets are ``asked`` for that the layers of ``start`` have not."""
    for kind in model.config.linears.values():
        for name in _SIZES:
            if name in asked and asked[name] != getattr(kind, name, asked[name]):
                raise ConfigError(
                    f"{name} is {asked[name]!r}, and the skills in {start} have {getattr(kind, name)!r}; leave it out"
                )
    there = list(model.config.linears)
    if "targets" in asked and set(patterns_of_targets(asked["targets"])) != set(there):
        raise ConfigError(
            f"targets are {', '.join(asked['targets'])}, and the skills in {start} stand beside {', '.join(there)}; leave them out"
        )


class Mhr(Poly, kind="mhr"):
    """The same with many heads, each of which has weights of its own (Caccia et al. 2023, arXiv 2211.03831)."""

    summary: ClassVar[str] = "an inventory of adapters of many heads, weighed by task head by head"

    @configclass
    class Config(Poly.Config):
        """As of `Poly`, with ``heads`` 8."""

        heads: Size = Field(default=8, ge=1)

    config: Config
