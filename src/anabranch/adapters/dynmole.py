"""DynMoLE: a mixture of LoRA experts beside each matrix, all of them for tokens whose router is undecided, few for the others.

    p = softmax(G h)                                               one router for each adapted matrix, fp32, without a bias
    H = S_q(p) / S_q(even),  S_q(p) = (1 - sum_i p_i^q) / (q - 1)  Tsallis entropy, as a share of its greatest
    w = p                    where H > entropy_threshold           soft: all experts
    w = p * sparse_mask(p)   elsewhere                             the ranks whose cumulative p is at most top_p, and keep_top_k in any case
    y = W h + sum_e w_e (alpha / r) B_e A_e dropout(h)
    L = task + c_H mean(H) + c_B N sum_e mean(w_e) mean(p_e)       over the real tokens of all layers

    config = DynMoLE().on(Decoder.Config(...))          # its gate, up and down have experts
    put_on(model, DynMoLE().linears(num_layers))        # the same, in place, on a model that is trained, which is frozen

The routing is a `HybridEntropy` select, the losses are `UncertaintyLoss` and `SoftLoss`, and what is computed is a `LowRankPool`: rows go
to their experts alone, or through all of them in two products where most tokens are soft. With ``policy`` other than ``hybrid`` it is
one of the paper's baselines: `mola` and `lora_moe`.

"DynMoLE: Boosting Mixture of LoRA Experts Fine-Tuning with a Hybrid Routing Mechanism", 2025, arXiv 2504.00661.
"""

from typing import Literal

from anabranch.adapters.routed import RoutedLowRank
from anabranch.config import Config, Field, Size, configclass
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.nn import Linear
from anabranch.routing import Balancer, HybridEntropy, LinearScore, Router, Select, SoftLoss, TopK, UncertaintyLoss
from anabranch.routing.uncertainty import EntropyKind

__all__ = ["DynMoLE", "Experts", "lora_moe", "mola"]


@configclass
class Experts(Config):
    """What experts are and how they are chosen; defaults are those of the paper's code.

    Attributes:
        experts_per_layer: N of each block (MoLA's idea: more in higher ones); empty for as many in all.
        rank, alpha: of each expert.
        dropout: on the input of each expert.
        policy: ``hybrid`` (DynMoLE), ``top_k`` (keep_top_k of them), ``top_p`` (by mass alone) or ``soft`` (all).
        top_p, keep_top_k, entropy_threshold, entropy, entropy_index, nucleus: see `HybridEntropy`.
        renormalize: make the kept weights sum to 1.
        entropy_loss: c_H.
        balance_loss: c_B.
    """

    experts_per_layer: tuple[int, ...] = ()
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

    def select(self, num_experts: int) -> Select.Config:
        """How experts are chosen among so many."""
        normalize: Literal["sum", "none"] = "sum" if self.renormalize else "none"
        if self.policy == "soft":
            return TopK.Config(top_k=num_experts, normalize=normalize)
        if self.policy == "top_k":
            return TopK.Config(top_k=self.keep_top_k, normalize=normalize)
        is_hybrid = self.policy == "hybrid"
        return HybridEntropy.Config(
            normalize=normalize,
            top_p=self.top_p,
            keep_top_k=self.keep_top_k if is_hybrid else 1,
            entropy_threshold=self.entropy_threshold if is_hybrid else 1.0,
            entropy=self.entropy,
            entropy_index=self.entropy_index,
            nucleus=self.nucleus,
        )

    def router(self, num_experts: int) -> Router.Config:
        """The router of one matrix."""
        losses: list[Balancer.Config] = []
        if self.balance_loss:
            losses.append(SoftLoss.Config(alpha=self.balance_loss))
        if self.entropy_loss:
            losses.append(
                UncertaintyLoss.Config(
                    coefficient=self.entropy_loss, entropy=self.entropy, entropy_index=self.entropy_index
                )
            )
        score = LinearScore.Config(init="kaiming_uniform")
        return Router.Config(score=score, select=self.select(num_experts), balance=tuple(losses))

    def layer(self, num_experts: int) -> RoutedLowRank.Config:
        """What stands beside one matrix."""
        return RoutedLowRank.Config(
            ranks=(self.rank,) * num_experts,
            alphas=(self.alpha,) * num_experts,
            router=self.router(num_experts),
            dropout=self.dropout,
        )


@configclass
class DynMoLE(Experts):
    """The paper's settings.

    Attributes:
        num_experts: N, beside each matrix, where ``experts_per_layer`` does not say.
        targets: the parts of feed-forward layers that are adapted, by their last names.
    """

    num_experts: Size = Field(default=6, ge=1)
    targets: tuple[str, ...] = Field(default=("gate", "up", "down"), min_length=1)

    def __post_init__(self) -> None:
        for number in self.experts_per_layer or (self.num_experts,):
            if number < 1:
                raise ConfigError(f"experts_per_layer has {number}; each must be at least 1")
            self.layer(number)

    def linears(self, num_layers: int) -> dict[str, Linear.Config]:
        """What ``Decoder.Config.linears`` of a model of so many blocks is with it.

        Raises ConfigError where ``experts_per_layer`` is of another number of blocks.
        """
        if not self.experts_per_layer:
            return {f"blocks.*.feed_forward.{part}": self.layer(self.num_experts) for part in self.targets}
        if len(self.experts_per_layer) != num_layers:
            raise ConfigError(
                f"experts_per_layer has {len(self.experts_per_layer)} values for {num_layers} blocks; give one for each"
            )
        return {
            f"blocks.{block}.feed_forward.{part}": self.layer(number)
            for block, number in enumerate(self.experts_per_layer)
            for part in self.targets
        }

    def on(self, config: Decoder.Config) -> Decoder.Config:
        """The model of ``config`` with experts beside its feed-forward matrices. Raises ConfigError as `linears`, or where it has none."""
        return config.replace(linears={**config.linears, **self.linears(config.num_layers)})


def mola(num_experts: int = 6, *, experts_per_layer: tuple[int, ...] = ()) -> DynMoLE:
    """The baseline MoLA (arXiv 2402.08562): the two best, renormalised, and no auxiliary loss."""
    return DynMoLE(
        num_experts=num_experts,
        experts_per_layer=experts_per_layer,
        policy="top_k",
        renormalize=True,
        entropy_loss=0.0,
        balance_loss=0.0,
    )


def lora_moe(num_experts: int = 6) -> DynMoLE:
    """The baseline LoRAMoE (arXiv 2312.09979): all experts by their softmax."""
    return DynMoLE(num_experts=num_experts, policy="soft", entropy_loss=0.0, balance_loss=0.0)
