"""Mixtures of adapters that a router chooses for each token as methods of `anabranch adapt`: DynMoLE and LoRA-Mixer.

anabranch adapt SmolLM2-135M rows.jsonl --method dynmole --out runs/experts
anabranch adapt SmolLM2-135M rows.jsonl --method lora_mixer --set method.adapters='["law-lora", "sql-lora"]' --out runs/mixer
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from anabranch.adapters.adapt.method import Method, patterns_of_targets
from anabranch.adapters.dynmole import DynMoLE
from anabranch.adapters.lora_mixer import MixedLowRank, SoftThenTopK, SpecialisationLoss, load_mixture
from anabranch.adapters.lora_mixer.loss import check_top_k
from anabranch.adapters.routed import RoutedLowRank
from anabranch.config import Field, Size, configclass
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.nn import Linear
from anabranch.routing import LinearScore, Router
from anabranch.routing.uncertainty import EntropyKind

__all__ = ["Dynmole", "LoraMixer"]

_BALANCED = "the balance loss is a product of two means, which parts have not in common"


class Dynmole(Method, kind="dynmole"):
    """LoRA experts beside feed-forward matrices, all or few for each token (arXiv 2504.00661)."""

    summary: ClassVar[str] = "experts that a router chooses for each token, all where it is undecided"

    @configclass
    class Config(Method.Config):
        """As `DynMoLE`, whose defaults these are, with ``experts`` for its number of experts."""

        targets: tuple[str, ...] = Field(default=("gate", "up", "down"), min_length=1)
        experts: Size = Field(default=6, ge=1)
        rank: Size = Field(default=24, ge=1)
        alpha: float = 48.0
        dropout: float = Field(default=0.05, ge=0, lt=1)
        policy: Literal["hybrid", "top_k", "top_p", "soft"] = "hybrid"
        top_p: float = Field(default=0.75, gt=0, le=1)
        keep_top_k: int = Field(default=2, ge=1)
        entropy_threshold: float = Field(default=0.9, gt=0)
        entropy: EntropyKind = "tsallis"
        entropy_index: float = Field(default=1.1, gt=0, le=2)
        nucleus: Literal["exclusive", "inclusive"] = "exclusive"
        renormalize: bool = False
        entropy_loss: float = Field(default=1e-2, ge=0)
        balance_loss: float = Field(default=1e-3, ge=0)

        def __post_init__(self) -> None:
            self.settings()

        def settings(self) -> DynMoLE:
            """The same as a `DynMoLE`. Raises ConfigError for what cannot be."""
            return DynMoLE(
                num_experts=self.experts,
                rank=self.rank,
                alpha=self.alpha,
                dropout=self.dropout,
                policy=self.policy,
                top_p=self.top_p,
                keep_top_k=self.keep_top_k,
                entropy_threshold=self.entropy_threshold,
                entropy=self.entropy,
                entropy_index=self.entropy_index,
                nucleus=self.nucleus,
                renormalize=self.renormalize,
                entropy_loss=self.entropy_loss,
                balance_loss=self.balance_loss,
            )

    config: Config

    @property
    def parts_differ(self) -> str:
        """Dropout and balance."""
        drawn = "dropout is drawn for each part" if self.config.dropout else ""
        return " and ".join(filter(None, (drawn, _BALANCED if self.config.balance_loss else "")))

    def layer(self, tasks: Sequence[str]) -> RoutedLowRank.Config:
        """The same for all tasks."""
        return self.config.settings().layer(self.config.experts)


class LoraMixer(Method, kind="lora_mixer"):
    """LoRA experts in projections, given or new, and one router for q, k and v (arXiv 2507.00029)."""

    summary: ClassVar[str] = "adapters, given or new, that a router chooses for each token"
    folders: ClassVar[tuple[str, ...]] = ("adapters",)

    @configclass
    class Config(Method.Config):
        """Who the experts are, and how they are chosen.

        Attributes:
            adapters: folders of peft's, at least two, which become experts and stay as they are: routers alone learn. None for new experts,
                which learn with their routers.
            experts, rank, alpha: of new ones.
            top_k: experts of a token after training.
            balance_loss, entropy_loss, entropy: a, lambda and its sign, see `SpecialisationLoss`.
        """

        adapters: tuple[str, ...] | None = None
        experts: Size = Field(default=6, ge=2)
        rank: Size = Field(default=8, ge=1)
        alpha: float = 16.0
        top_k: int = Field(default=3, ge=1)
        balance_loss: float = Field(default=1.0, ge=0)
        entropy_loss: float = Field(default=0.1, ge=0)
        entropy: Literal["minimise", "maximise"] = "minimise"

        def __post_init__(self) -> None:
            if self.adapters is not None and len(self.adapters) < 2:
                raise ConfigError(f"adapters has {len(self.adapters)}; a router needs at least 2 to choose from")
            if self.adapters is None:
                check_top_k(self.top_k, self.experts)

    config: Config

    @property
    def parts_differ(self) -> str:
        """Balance."""
        return _BALANCED if self.config.balance_loss else ""

    def layer(self, tasks: Sequence[str]) -> MixedLowRank.Config:
        """New experts."""
        config = self.config
        loss = SpecialisationLoss.Config(
            a=config.balance_loss, lam=config.entropy_loss, entropy=config.entropy, top_k=config.top_k
        )
        router = Router.Config(
            score=LinearScore.Config(init="kaiming_uniform"),
            select=SoftThenTopK.Config(top_k=config.top_k),
            balance=(loss,),
        )
        return MixedLowRank.Config(
            ranks=(config.rank,) * config.experts, alphas=(config.alpha,) * config.experts, router=router
        )

    def linears(self, tasks: Sequence[str]) -> dict[str, Linear.Config]:
        """One router for the q, k and v that are all adapted."""
        made = self.layer(tasks)
        found: dict[str, Linear.Config] = {}
        for pattern in patterns_of_targets(self.config.targets):
            if pattern == "*.attention.*":
                found["*.attention.[qkv]"] = made.replace(router_group="qkv")
            found[pattern] = made
        return found

    def begin(self, model: Decoder, tasks: Sequence[str], *, seed: int) -> Decoder:
        """New experts, or those that are given, frozen."""
        if self.config.adapters is None:
            return super().begin(model, tasks, seed=seed)
        folders = {Path(folder).name: folder for folder in self.config.adapters}
        if len(folders) < len(self.config.adapters):
            folders = {f"{number}": folder for number, folder in enumerate(self.config.adapters)}
        router = self.layer(tasks).router
        assert router is not None
        return load_mixture(folders, model, router=router, seed=seed)
