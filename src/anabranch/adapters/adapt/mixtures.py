"""Mixtures of adapters that a router chooses for each token as methods of `anabranch adapt`: DynMoLE and LoRA-Mixer.

anabranch adapt SmolLM2-135M rows.jsonl --method dynmole --out runs/experts
anabranch adapt SmolLM2-135M rows.jsonl --method lora_mixer --set method.adapters='["law-lora", "sql-lora"]' --out runs/mixer
anabranch adapt SmolLM2-135M rows.jsonl --method lora_mixer --set method.stages=hard_soft --out runs/joint     # an expert for each task
"""
# Shapes: B rows, L positions, T tasks

import math
import os
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from anabranch.adapters.adapt.method import ADAPTER, Method, patterns_of_targets, set_anew, values_of
from anabranch.adapters.dynmole import DynMoLE, Experts
from anabranch.adapters.graft import layers_of
from anabranch.adapters.lora_mixer import MixedLowRank, SoftThenTopK, SpecialisationLoss, load_mixture, mixed_layers
from anabranch.adapters.lora_mixer.layer import NO_LABEL
from anabranch.adapters.lora_mixer.load import GROUPS, numbers_of_experts
from anabranch.adapters.lora_mixer.loss import Specialisation, check_top_k
from anabranch.adapters.lora_mixer.stages import Order, Stages
from anabranch.adapters.low_rank import LowRank
from anabranch.adapters.mixture_report import mixture_report
from anabranch.adapters.put_on import built_alone, put_on
from anabranch.adapters.routed import RoutedLowRank
from anabranch.config import Field, Size, configclass
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.nn import Linear
from anabranch.routing import LinearScore, Router

__all__ = ["Dynmole", "LoraMixer"]

_FEED_FORWARD = ("gate", "up", "down")
# Of a layer: more are no layer that anybody trains, and take minutes to be counted.
MOST_EXPERTS = 65_536
# New experts of LoRA-Mixer, where nobody says.
_EXPERTS = 6
_BALANCED = "the balance loss is a product of two means, which parts have not in common"


class Dynmole(Method, kind="dynmole"):
    """LoRA experts beside feed-forward matrices, all or few for each token (arXiv 2504.00661)."""

    summary: ClassVar[str] = "experts that a router chooses for each token, all where it is undecided"

    @configclass
    class Config(Experts, Method.Config):
        """As `DynMoLE`, with ``experts`` for its number of experts."""

        targets: tuple[str, ...] = Field(default=("gate", "up", "down"), min_length=1)
        experts: Size = Field(default=6, ge=1, le=MOST_EXPERTS)

        def __post_init__(self) -> None:
            most = max(self.experts_per_layer, default=1)
            if most > MOST_EXPERTS:
                raise ConfigError(f"experts_per_layer has {most}; a layer has at most {MOST_EXPERTS:,} experts")
            self.settings()
            wrong = [target for target in self.targets if target not in _FEED_FORWARD]
            if self.experts_per_layer and wrong:
                raise ConfigError(
                    f"targets has {wrong[0]!r}; with experts_per_layer they are of {', '.join(_FEED_FORWARD)}, in each block"
                )

        def settings(self) -> DynMoLE:
            """The same as a `DynMoLE`. Raises ConfigError for what cannot be."""
            return DynMoLE(num_experts=self.experts, **values_of(self, Experts))

    config: Config

    @property
    def parts_differ(self) -> str:
        """Dropout and balance."""
        drawn = "dropout is drawn for each part" if self.config.dropout else ""
        return " and ".join(filter(None, (drawn, _BALANCED if self.config.balance_loss else "")))

    def layer(self, tasks: Sequence[str]) -> RoutedLowRank.Config:
        """The same for all tasks."""
        return self.config.settings().layer(self.config.experts)

    def routing(self, model: Decoder, rows: Iterable[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Any]:
        """See `_of_routers`."""
        return _of_routers(model, rows)

    def begin(self, model: Decoder, tasks: Sequence[str], *, seed: int) -> Decoder:
        """As many experts as the config has for each block. Raises ConfigError where it has them for another number of blocks."""
        config = self.config
        if not config.experts_per_layer:
            return super().begin(model, tasks, seed=seed)
        settings = config.settings().replace(targets=config.targets)
        return put_on(model, settings.linears(model.config.num_layers), seed=seed)


class LoraMixer(Method, kind="lora_mixer"):
    """LoRA experts in projections, given or new, and one router for q, k and v (arXiv 2507.00029)."""

    summary: ClassVar[str] = "adapters, given or new, that a router chooses for each token"
    folders: ClassVar[tuple[str, ...]] = ("adapters",)

    @configclass
    class Config(Order, Specialisation, Method.Config):
        """Who the experts are, how they are chosen, and when they learn.

        Attributes:
            adapters: folders of peft's, at least two, which become experts; None for new ones.
            experts: number of new ones; None for 6, or where rows' tasks choose for one of each task.
            rank, alpha: of new ones.
            top_k: experts of a token after training; all where there are fewer.
            balance_loss, entropy_loss, entropy_schedule: a, lambda, and how lambda goes, see `SpecialisationLoss`.
            stages: see `Order`; in others than ``soft`` a row is its task's, whose expert has the name (given ones that of their folder,
                of ``RUN/adapter`` that of the run).
            router_per: ``input``: one router for q, k and v of a block, and one for gate and up, which read the same, where targets name
                them (by a name, or by a pattern that ends with a star); ``projection``: one for each.
            hold: what experts do where routers choose, see `Stages.experts`; None for ``free`` where new ones learn softly from the
                beginning, else ``frozen``.
            preserve: names of the experts that ``hold="preserved"`` holds, the others being free; empty for all.
        """

        adapters: tuple[str, ...] | None = None
        experts: Size | None = Field(default=None, ge=2, le=MOST_EXPERTS)
        rank: Size = Field(default=8, ge=1)
        alpha: float = 16.0
        balance_loss: float = Field(default=1.0, ge=0)
        entropy_loss: float = Field(default=0.1, ge=0)
        entropy_schedule: Literal["constant", "rising"] = "constant"
        router_per: Literal["input", "projection"] = "input"
        hold: Literal["frozen", "preserved", "free"] | None = None
        preserve: tuple[str, ...] = ()

        def __post_init__(self) -> None:
            if self.adapters is not None and len(self.adapters) < 2:
                raise ConfigError(f"adapters has {len(self.adapters)}; a router needs at least 2 to choose from")
            of_new = (name for name in ("targets", "experts", "rank", "alpha") if name in set_anew(self))
            if self.adapters is not None and (name := next(of_new, None)):
                raise ConfigError(
                    f"{name} is of new experts, and adapters are given, which have their own; leave it out"
                )
            if self.adapters is None and not self.in_stages.needs_tasks:
                check_top_k(self.top_k, self.experts or _EXPERTS)
            if self.adapters is None and self.stages == "soft" and self.hold == "frozen":
                raise ConfigError("hold is 'frozen' from the beginning, and new experts add nothing then; leave it out")
            if self.preserve and self.hold != "preserved":
                raise ConfigError(
                    f"preserve names {self.preserve[0]!r}, and hold is {self.hold!r}; set hold to 'preserved'"
                )

        @property
        def in_stages(self) -> Stages:
            """When labels choose and when routers do."""
            begun_new = self.adapters is None and self.stages == "soft"
            held = self.hold or ("free" if begun_new else "frozen")
            return Stages(experts=held, **values_of(self, Order))

    config: Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.stages = config.in_stages
        # The expert of each task by its number, -1 for none, where rows' tasks say something; and how many layers there are.
        self._expert_T: Tensor | None = None
        self._num_layers = 0

    @property
    def parts_differ(self) -> str:
        """Balance, where routers choose at any time."""
        return _BALANCED if self.config.balance_loss and self.config.stages != "hard" else ""

    @property
    def needs_labels(self) -> bool:
        """Where labels choose."""
        return self.config.stages != "soft"

    def layer(self, tasks: Sequence[str]) -> MixedLowRank.Config:
        """New experts."""
        # Rows without a task are the router's alone.
        tasks = [task for task in tasks if task]
        config, number = self.config, self._number(tasks)
        loss = SpecialisationLoss.Config(
            a=config.balance_loss,
            lam=config.entropy_loss,
            schedule=config.entropy_schedule,
            **values_of(config, Specialisation),
        )
        router = Router.Config(
            score=LinearScore.Config(init="kaiming_uniform"),
            select=SoftThenTopK.Config(top_k=config.top_k),
            balance=(loss,),
        )
        experts = tuple(tasks) if self.stages.needs_tasks and number == len(tasks) else ()
        # Given ones have the names of their folders, see `begin`.
        preserve = () if config.adapters is not None else numbers_of_experts(config.preserve, experts)
        return MixedLowRank.Config(
            ranks=(config.rank,) * number,
            alphas=(config.alpha,) * number,
            router=router,
            preserved=self.stages.experts == "preserved",
            preserved_experts=preserve,
            experts=experts,
        )

    def _number(self, tasks: Sequence[str]) -> int:
        """How many new experts there are. Raises ConfigError for fewer than tasks that are to choose one, or than two."""
        number, stages = self.config.experts, self.stages
        if not stages.needs_tasks:
            return number or _EXPERTS
        if number is not None and number < len(tasks):
            raise ConfigError(f"experts is {number}, and rows are of {len(tasks)} tasks, which are to have one each")
        if len(tasks) < 2 and number is None and self.config.adapters is None:
            raise ConfigError(
                f"rows are of {len(tasks)} named tasks, so there is nothing to choose; give rows of at least two tasks"
            )
        return number or len(tasks)

    def begin(self, model: Decoder, tasks: Sequence[str], *, seed: int) -> Decoder:
        """New experts, or those that are given."""
        if self.config.adapters is None:
            names = tuple(task for task in tasks if task)
            put_on(model, self._linears_of(model, tasks), seed=seed)
        else:
            names = tuple(folders := _by_name(self.config.adapters))
            preserved: bool | tuple[str, ...] = self.config.preserve or self.stages.experts == "preserved"
            groups = GROUPS if self.config.router_per == "input" else {}
            load_mixture(folders, model, router=self.layer(names).router, groups=groups, preserved=preserved, seed=seed)
        layers = mixed_layers(model)
        self._num_layers = len(layers)
        if self.stages.needs_tasks:
            self._expert_T = torch.tensor(self._experts_of(tasks, names))
        for layer in layers.values():
            layer.pool.requires_grad_(self.stages.experts_learn)
            if layer.router is not None:
                layer.router.requires_grad_(self.stages.routers_learn)
        return model

    def _linears_of(self, model: Decoder, tasks: Sequence[str]) -> dict[str, Linear.Config]:
        """New experts beside each target; those that read the same have one router, if not told otherwise."""
        made, patterns = self.layer(tasks), patterns_of_targets(self.config.targets)
        if self.config.router_per == "projection":
            return dict.fromkeys(patterns, made)
        one = LowRank.Config(rank=1)
        names = list(layers_of(built_alone(model.config, dict.fromkeys(patterns, one))))
        found: dict[str, Linear.Config] = {}
        for pattern in patterns:
            wanted = {each: made.replace(router_group=group) for each, group in _narrower(pattern, names).items()}
            for each, kind in (wanted | ({} if pattern in wanted else {pattern: made})).items():
                # What earlier targets leave to it.
                left = [name for name in names if not any(fnmatchcase(name, other) for other in found)]
                if any(fnmatchcase(name, each) for name in left):
                    found[each] = kind
        return found

    def _experts_of(self, tasks: Sequence[str], names: Sequence[str]) -> list[int]:
        """The number of each task's expert. Raises ConfigError where one is to have some, and has none."""
        without = [task for task in tasks if task and task not in names]
        if without and (self.needs_labels or not {*names} & {*tasks}):
            there = ", ".join(map(repr, names))
            raise ConfigError(
                f"task {without[0]!r} has no expert; adapters are called {there} by their folders, and rows' tasks must have these names"
            )
        return [names.index(task) if task and task in names else NO_LABEL for task in tasks]

    def state(self, task_B: Tensor, length: int, fraction: float | None) -> dict[str, Any]:
        """In training the expert of each row's task, where it says something."""
        if fraction is None or not (self.stages.needs_tasks or self.stages.experts == "preserved"):
            return {}
        expert_B = torch.full_like(task_B, NO_LABEL)
        if self._expert_T is not None:
            known_T = self._expert_T.to(task_B.device)
            expert_B = torch.where(task_B < 0, NO_LABEL, known_T[task_B.clamp_min(0)])
        return self.stages.state(expert_B, length, fraction, num_layers=self._num_layers)

    def routing(self, model: Decoder, rows: Iterable[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Any]:
        """See `_of_routers`."""
        return _of_routers(model, rows)

    def loss_counts(self, task_R: Tensor) -> dict[str, float]:
        """Of the alignment: rows that have an expert."""
        if not self.stages.c_t or self._expert_T is None:
            return {}
        # Steps ask where the model is.
        known_T = self._expert_T.to(task_R.device)
        expert_R = torch.where(task_R < 0, NO_LABEL, known_T[task_R.clamp_min(0)])
        return {"task_alignment": float((expert_R >= 0).sum())}

    def before_step(self, model: Decoder, step: int, fraction: float) -> None:
        """Experts are frozen and free as the stage wants."""
        if self.stages.experts_learn:
            self.stages.enter(mixed_layers(model).values(), step, fraction)


def _of_routers(model: Decoder, rows: Iterable[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Any]:
    """Means over routers of what `LayerFacts` has (``information`` where rows have tasks), and ``routers``, each by itself."""
    report = mixture_report(model, rows)
    names = ("active", "undecided", "entropy", "nats", "dropped", "information")
    means = {name: report.mean(name) for name in names}
    return {name: mean for name, mean in means.items() if not math.isnan(mean)} | report.to_dict()


def _narrower(pattern: str, names: Sequence[str]) -> dict[str, str]:
    """Of those of ``names`` that ``pattern`` fits: a pattern for each last name that shares a router with others, and their group."""
    fitting = [name for name in names if fnmatchcase(name, pattern)]
    found = {}
    for group, words in GROUPS.items():
        for word in words:
            mine = [name for name in fitting if name.rpartition(".")[2] == word]
            ways = (
                [pattern]
                if pattern.endswith(f".{word}")
                else [f"{pattern.removesuffix('*')}{word}", f"{pattern}.{word}"]
            )
            fits = [way for way in ways if mine and all(fnmatchcase(name, way) for name in mine)]
            found.update(dict.fromkeys(fits[:1], group))
    return found


def _by_name(folders: Sequence[str]) -> dict[str, str]:
    """Adapters by the names of their folders; by numbers where two have the same.

    ``RUN/adapter``, as a run is laid out, has the name of the run.
    """
    paths = {folder: Path(os.path.abspath(folder)) for folder in folders}
    named = {path.parent.name if path.name == ADAPTER else path.name: folder for folder, path in paths.items()}
    return named if len(named) == len(folders) else {f"{number}": folder for number, folder in enumerate(folders)}
