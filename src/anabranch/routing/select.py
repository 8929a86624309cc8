"""Selectors: which destinations an item goes to, given its scores, and with what weight.

Selection looks at ``score + bias`` with closed destinations at minus infinity; weights come from the unbiased scores (ALF-LB,
arXiv 2408.15664, step 1). Ties go to the lowest index. A choice that finds no open destination stays unused (index -1).
"""
# Shapes: N items, E destinations, K choices per item, G groups of destinations, C items per destination

import math
import warnings
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, configclass
from anabranch.errors import ConfigError
from anabranch.routing.decision import UNUSED, Routing
from anabranch.routing.renamed import Renamed

TINY = 4096  # scores


def stable_top_k(value_NE: Tensor, top_k: int) -> Tensor:
    """index_NK of the ``top_k`` largest values, in falling order, ties to the lowest index (torch.topk leaves ties open)."""
    if value_NE.dtype != torch.float32 or _is_tiny(value_NE):
        return value_NE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    # fp32 bits, made monotone as an integer, above the reversed index: unique 64-bit keys, so topk has no ties to break.
    # + 0.0 turns -0.0 into 0.0.
    bits_NE = (value_NE + 0.0).view(torch.int32)
    ordered_NE = torch.where(bits_NE < 0, bits_NE ^ 0x7FFFFFFF, bits_NE).long()
    reversed_E = torch.arange(value_NE.shape[-1] - 1, -1, -1, device=value_NE.device)
    return ((ordered_NE << 32) + reversed_E).topk(top_k, dim=-1).indices


def _is_tiny(value: Tensor) -> bool:
    """Whether launching operations costs more than their work: a few items on a CPU, as in decoding."""
    return 0 < value.numel() <= TINY and value.device.type == "cpu" and not torch.compiler.is_compiling()


class Select(Part, nn.Module, family="select"):
    """Interface: scores in, `Routing` out."""

    @configclass
    class Config(BaseConfig):
        """How weights are made from the scores of the chosen destinations.

        Attributes:
            normalize: ``none`` keeps the scores (OLMoE, ReXMoE), ``sum`` divides by their sum (Mixtral, DeepSeek-V3), ``softmax``
                takes a softmax over the chosen logits.
            scale: factor on the weights (``routed_scaling_factor`` of DeepSeek).
        """

        normalize: Literal["none", "sum", "softmax"] = "none"
        scale: float = Field(default=1.0, gt=0)

        @property
        def exact_choices(self) -> int | None:
            """K where every item goes to exactly K destinations, as long as so many are open; None (the default) where that differs."""
            return None

        def most_choices(self, num_destinations: int) -> int | None:
            """The most destinations of an item, the K of its routings; None where it is not known beforehand.

            ``exact_choices`` by default. A layer counts its active parameters by it.
            """
            if self.exact_choices is None and getattr(self, "top_k", None) is not None:
                warnings.warn(
                    f"{type(self).__qualname__} does not say how many choices it makes, so its field top_k is taken; give it exact_choices "
                    "or most_choices, from the next version on no field is looked at",
                    DeprecationWarning,
                    stacklevel=2,
                )
                return int(getattr(self, "top_k"))  # noqa: B009
            return self.exact_choices

        def check(self, num_destinations: int) -> None:
            """Raise ConfigError if this cannot choose among ``num_destinations``."""
            _check_at_most(
                f"the number of choices of select {self.owner.kind!r}",
                self.most_choices(num_destinations),
                num_destinations,
            )

    config: Config
    # Where False, an item's routing depends on later items, which no language model may do.
    is_causal: ClassVar[bool] = True

    def __init__(self, config: Config, num_destinations: int) -> None:
        super().__init__()
        config.check(num_destinations)
        self.config = config
        self.num_destinations = num_destinations

    def forward(
        self,
        score_NE: Tensor,
        *,
        logit_NE: Tensor | None = None,
        bias_E: Tensor | None = None,
        open_NE: Tensor | None = None,
    ) -> Routing:
        """Choose.

        Args:
            score_NE: scores.
            logit_NE: the logits behind them, needed for ``normalize="softmax"``.
            bias_E: added for selection only.
            open_NE: bool, ``[E]``, ``[N, 1]`` or ``[N, E]``, destinations that may be chosen; None if all may.
        """
        value_NE = score_NE.detach()
        if bias_E is not None:
            value_NE = value_NE + bias_E
        if open_NE is not None:
            value_NE = value_NE.masked_fill(~open_NE, -torch.inf)
        index_NK = self.choose(value_NE)
        return self.weigh(index_NK, score_NE, logit_NE)

    def of_pass(self, training: bool) -> "Select":
        """What selects in a pass that trains, or does not (``context.training``): this, unless a kind knows two ways."""
        return self

    num_places = Renamed("num_choices")

    @property
    def num_choices(self) -> int | None:
        """K, the choices of its routings; None where that is not known beforehand."""
        return self.config.most_choices(self.num_destinations)

    def choose(self, value_NE: Tensor) -> Tensor:
        """index_NK from selection values; minus infinity must not be chosen."""
        raise NotImplementedError  # abstract

    def weigh(self, index_NK: Tensor, score_NE: Tensor, logit_NE: Tensor | None) -> Routing:
        """The routing to ``index_NK``, weighed by the scores as the config says; choices of -1 weigh 0."""
        # One look at few indices spares the masks that follow.
        if _is_tiny(score_NE) and int(index_NK.min()) >= 0:
            return self._weigh_all(index_NK, score_NE, logit_NE)
        unused_NK = index_NK < 0
        gather_NK = index_NK.clamp_min(0)
        if self.config.normalize == "softmax":
            chosen_NK = (score_NE if logit_NE is None else logit_NE).gather(-1, gather_NK)
            weight_NK = chosen_NK.masked_fill(unused_NK, -torch.inf).softmax(-1).masked_fill(unused_NK, 0.0)
        else:
            weight_NK = score_NE.gather(-1, gather_NK).masked_fill(unused_NK, 0.0)
            if self.config.normalize == "sum":
                weight_NK = weight_NK / (weight_NK.sum(-1, keepdim=True) + 1e-20)
        if self.config.scale != 1.0:
            weight_NK = weight_NK * self.config.scale
        return Routing(index_NK, weight_NK, score_NE)

    def _weigh_all(self, index_NK: Tensor, score_NE: Tensor, logit_NE: Tensor | None) -> Routing:
        """`weigh` where every choice is used."""
        if self.config.normalize == "softmax":
            weight_NK = (score_NE if logit_NE is None else logit_NE).gather(-1, index_NK).softmax(-1)
        else:
            weight_NK = score_NE.gather(-1, index_NK)
            if self.config.normalize == "sum":
                weight_NK = weight_NK / (weight_NK.sum(-1, keepdim=True) + 1e-20)
        return Routing(index_NK, weight_NK if self.config.scale == 1.0 else weight_NK * self.config.scale, score_NE)


def _only_open(value_NE: Tensor, index_NK: Tensor) -> Tensor:
    if _is_tiny(value_NE) and float(value_NE.min()) > -math.inf:
        return index_NK
    return index_NK.masked_fill(value_NE.gather(-1, index_NK) == -torch.inf, UNUSED)


def _check_at_most(name: str, value: int | None, num_destinations: int) -> None:
    if value is not None and value > num_destinations:
        raise ConfigError(
            f"{name} is {value}, but there are {num_destinations} destinations; use 1 to {num_destinations}"
        )


class TopK(Select, kind="top_k"):
    """The K highest (Shazeer et al. 2017)."""

    @configclass
    class Config(Select.Config):
        """Attributes: ``top_k``, destinations per item (default 2)."""

        top_k: int = Field(default=2, ge=1)

        @property
        def exact_choices(self) -> int:
            """K."""
            return self.top_k

        def check(self, num_destinations: int) -> None:
            """At most all."""
            _check_at_most("top_k", self.top_k, num_destinations)

    config: Config

    def choose(self, value_NE: Tensor) -> Tensor:
        """The K largest."""
        return _only_open(value_NE, stable_top_k(value_NE, self.config.top_k))


class GroupTopK(Select, kind="group_top_k"):
    """The K highest within the best ``top_groups`` of ``num_groups`` equal groups of destinations.

    A group's score is the ``max`` of its members (DeepSeek-V2) or the sum of its two best (``top2_sum``, DeepSeek-V3).
    """

    @configclass
    class Config(Select.Config):
        """Attributes: ``top_k`` per item, ``num_groups``, ``top_groups`` that stay open, ``group_score``."""

        top_k: int = Field(default=8, ge=1)
        num_groups: int = Field(default=8, ge=1)
        top_groups: int = Field(default=4, ge=1)
        group_score: Literal["max", "top2_sum"] = "top2_sum"

        @property
        def exact_choices(self) -> int:
            """K."""
            return self.top_k

        def __post_init__(self) -> None:
            if self.top_groups > self.num_groups:
                raise ConfigError(
                    f"top_groups is {self.top_groups}, but there are {self.num_groups} groups; use at most that"
                )

        def check(self, num_destinations: int) -> None:
            """Equal groups, large enough."""
            _check_at_most("top_k", self.top_k, num_destinations)
            if num_destinations % self.num_groups:
                raise ConfigError(
                    f"num_groups is {self.num_groups}, which does not divide {num_destinations} destinations"
                )
            size = num_destinations // self.num_groups
            if self.group_score == "top2_sum" and size < 2:
                raise ConfigError(f"group_score top2_sum needs groups of at least 2 destinations, they have {size}")
            if self.top_k > size * self.top_groups:
                raise ConfigError(
                    f"top_k is {self.top_k}, but top_groups={self.top_groups} groups of {size} hold only {size * self.top_groups}"
                )

    config: Config

    def choose(self, value_NE: Tensor) -> Tensor:
        """The K largest of the open groups."""
        num_groups = self.config.num_groups
        value_NGM = value_NE.unflatten(-1, (num_groups, self.num_destinations // num_groups))
        best_NGM = value_NGM.topk(1 if self.config.group_score == "max" else 2, dim=-1).values
        # A closed second-best adds nothing; a group is out only if its best is closed.
        closed_NG = best_NGM[..., 0] == -torch.inf
        group_NG = best_NGM.masked_fill(best_NGM == -torch.inf, 0.0).sum(-1).masked_fill(closed_NG, -torch.inf)
        open_NG = torch.zeros_like(group_NG, dtype=torch.bool)
        open_NG = open_NG.scatter(1, stable_top_k(group_NG, self.config.top_groups), True)
        value_NE = value_NGM.masked_fill(~open_NG.unsqueeze(-1), -torch.inf).flatten(1)
        return _only_open(value_NE, stable_top_k(value_NE, self.config.top_k))


class TopP(Select, kind="top_p"):
    """As many of the highest as it takes for their scores to sum to ``top_p``, at least one, at most ``max_k``.

    Scores should sum to 1 (softmax). Huang et al., "Harder Tasks Need More Experts", arXiv 2403.07652, eq. 5.
    """

    @configclass
    class Config(Select.Config):
        """Attributes: ``top_p`` (default 0.4, as in the paper), ``max_k`` (default: all destinations)."""

        top_p: float = Field(default=0.4, gt=0, le=1)
        max_k: int | None = Field(default=None, ge=1)

        def most_choices(self, num_destinations: int) -> int:
            """At most so many are used."""
            return self.max_k or num_destinations

        def check(self, num_destinations: int) -> None:
            """At most all."""
            _check_at_most("max_k", self.max_k, num_destinations)

    config: Config

    def choose(self, value_NE: Tensor) -> Tensor:
        """The shortest prefix of the sorted values that reaches ``top_p``."""
        index_NK = stable_top_k(value_NE, self.config.most_choices(self.num_destinations))
        value_NK = value_NE.gather(-1, index_NK)
        share_NK = value_NK.masked_fill(value_NK == -torch.inf, 0.0)
        before_NK = share_NK.cumsum(-1) - share_NK
        return _only_open(value_NE, index_NK).masked_fill(before_NK >= self.config.top_p, UNUSED)


class Threshold(Select, kind="threshold"):
    """Every destination whose selection value is at least ``threshold``, at most ``max_k``, and always the best one."""

    @configclass
    class Config(Select.Config):
        """Attributes: ``threshold`` in units of the score, ``max_k`` (default: all destinations)."""

        threshold: float = 0.1
        max_k: int | None = Field(default=None, ge=1)

        def most_choices(self, num_destinations: int) -> int:
            """At most so many are used."""
            return self.max_k or num_destinations

        def check(self, num_destinations: int) -> None:
            """At most all."""
            _check_at_most("max_k", self.max_k, num_destinations)

    config: Config

    def choose(self, value_NE: Tensor) -> Tensor:
        """All values over the threshold."""
        index_NK = stable_top_k(value_NE, self.config.most_choices(self.num_destinations))
        low_NK = value_NE.gather(-1, index_NK) < self.config.threshold
        low_NK[:, 0] = False
        return _only_open(value_NE, index_NK).masked_fill(low_NK, UNUSED)


class ExpertChoice(Select, kind="expert_choice"):
    """Each destination takes its C = ceil(capacity_factor N / E) best items (Zhou et al., arXiv 2202.09368).

    Items with nothing open (padding) are not among the N. Loads are equal, but an item's routing depends
    on the other items of the batch: not causal.
    """

    @configclass
    class Config(Select.Config):
        """Attributes: ``capacity_factor``, the mean number of destinations per item (default 2)."""

        capacity_factor: float = Field(default=2.0, gt=0)

        def most_choices(self, num_destinations: int) -> int:
            """E, a choice for each destination."""
            return num_destinations

    config: Config
    is_causal: ClassVar[bool] = False

    def choose(self, value_NE: Tensor) -> Tensor:
        """index_NE: destination e is choice e of the items that it took."""
        num_items, num_destinations = value_NE.shape
        factor = self.config.capacity_factor
        capacity = min(num_items, math.ceil(factor * num_items / num_destinations))
        item_EC = stable_top_k(value_NE.T, capacity)
        num_real = (value_NE != -torch.inf).any(-1).sum()
        real_capacity = torch.ceil(factor * num_real.double() / num_destinations)
        within_C = torch.arange(capacity, device=value_NE.device) < real_capacity
        taken_EN = torch.zeros_like(value_NE.T, dtype=torch.bool).scatter(1, item_EC, within_C.expand_as(item_EC))
        taken_NE = taken_EN.T
        index_NE = torch.arange(num_destinations, device=value_NE.device).expand_as(value_NE)
        return index_NE.masked_fill(~taken_NE | (value_NE == -torch.inf), UNUSED)
