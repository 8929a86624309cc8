"""`Router` = score + select + balance, three small interchangeable parts, and an optional mask of candidates."""
# Shapes: N items, E destinations, K choices per item, D width

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from anabranch.config import Config as BaseConfig
from anabranch.config import Part, configclass
from anabranch.errors import AnabranchError, NotFiniteError
from anabranch.routing.balance import Balancer, Observation, SwitchLoss, ZLoss
from anabranch.routing.context import RoutingContext
from anabranch.routing.decision import UNUSED, Routing
from anabranch.routing.destinations import Destinations
from anabranch.routing.fixed import is_fixed
from anabranch.routing.nan import refuse_nan
from anabranch.routing.override import Override, hidden_items, overrides_of
from anabranch.routing.renamed import Renamed
from anabranch.routing.score import LinearScore, Score
from anabranch.routing.select import Select, TopK
from anabranch.routing.shared import Share, join_model

# In ``context.carry`` behind a score that should have handed on its state and did not run.
_SKIPPED = "routing_skipped"


class Router(Part, nn.Module):
    """Scores items, selects destinations, and lets balancers watch (in training only).

    Attributes:
        layer: index of the layer it routes for, written into traces.
        matrix: name of the matrix beside which it chooses, which messages then say in the place of the layer; None for no such.
        destinations: what they are, beside how many: whose, and which are open.
    """

    @configclass
    class Config(BaseConfig):
        """The parts of a router.

        Attributes:
            score: how logits and scores are made (default: linear, softmax).
            select: how destinations are chosen and weighted (default: top 2).
            balance: what keeps loads even (default: Switch loss 1e-2 and z-loss 1e-3, the OLMoE setting).
            check_finite: raise if a logit is NaN or infinite, wherever it is computed; on a GPU that makes the CPU wait. Scores that are
                NaN raise by default where looking costs next to nothing, see `anabranch.routing.nan`.
        """

        score: Score.Config = LinearScore.Config()
        select: Select.Config = TopK.Config()
        balance: tuple[Balancer.Config, ...] = (SwitchLoss.Config(), ZLoss.Config())
        check_finite: bool = False

        def check(self, num_destinations: int) -> None:
            """Raise ConfigError if a part does not suit ``num_destinations``, before anything is built."""
            self.select.check(num_destinations)
            for part in self.balance:
                part.check(num_destinations)

        def num_choices(self, num_destinations: int) -> int:
            """Most destinations of an item: all of ``num_destinations``, where the select sets no bound."""
            return self.select.most_choices(num_destinations) or num_destinations

    is_router: ClassVar[bool] = True

    def __init__(
        self,
        config: Config,
        dim: int,
        num_destinations: int,
        *,
        layer: int = 0,
        destinations: Destinations | None = None,
        generator: torch.Generator | None = None,
        share: Share | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_destinations = num_destinations
        self.layer = layer
        self.matrix: str | None = None
        # It has balancers of several routers, which are not registered here: whoever they belong to has them.
        self.destinations = destinations or Destinations()
        self.score: Score = config.score.build(dim, num_destinations, generator=generator)
        if share is not None:
            join_model(self.score, share, layer)
        self.select: Select = config.select.build(num_destinations)
        self.balance = nn.ModuleList(part.build(num_destinations) for part in config.balance)
        self.candidates = self.destinations.candidates

    num_places = Renamed("num_choices")

    @property
    def num_choices(self) -> int | None:
        """K, the choices of its routings; None where that is not known beforehand."""
        return self.select.num_choices

    def forward(self, x_ND: Tensor, context: RoutingContext) -> Routing:
        """Route N items of width D, as ``context.routing`` overrides it. Padding items (``context.item_mask_N``) go nowhere."""
        overrides: Sequence[Override] = ()
        if context.routing:
            overrides = overrides_of(self, self.num_destinations, x_ND, context)
            forced = [override for override in overrides if override.index_NK is not None]
            if forced and forced[-1].is_complete and (forced[-1].of_all_routers or not self.score.hands_on):
                if self.score.hands_on:
                    context.carry[_SKIPPED] = torch.tensor(True)
                return forced[-1].routing(x_ND, self.num_destinations, context.item_mask_N)
        return self.decide(x_ND, context, overrides)

    def decide(self, x_ND: Tensor, context: RoutingContext, overrides: Sequence[Override] = ()) -> Routing:
        """The decision by score and select, with ``overrides``; balancers watch it in training.

        Raises NotFiniteError for scores that are NaN, see `anabranch.routing.nan`, and AnabranchError for a score that goes on from what
        others hand on, behind one that did not run (`Override.of_all_routers`).
        """
        if self.score.hands_on and _SKIPPED in context.carry:
            raise AnabranchError(
                f"the router of layer {self.layer} goes on from a state that a router before it has not handed on: what decided for that "
                "one says that it decides for all routers. Replay or override routers of the whole model, not of a part of it"
            )
        logit_NE = self.score.project(x_ND, context)
        if self.config.check_finite and not torch.isfinite(logit_NE).all():
            raise NotFiniteError(
                f"router of layer {self.matrix or self.layer} has NaN or infinite logits; lower the learning rate"
            )
        for override in overrides:
            logit_NE = override.shifted(logit_NE)
        open_NE = None if self.candidates is None else self.candidates.open_NE(x_ND.shape[0], context)
        masked_NE = logit_NE
        if open_NE is not None and self.candidates.stage == "pre_softmax":  # type: ignore[union-attr]
            masked_NE = logit_NE.masked_fill(~open_NE, -torch.inf)
        score_NE = self.score.activate(masked_NE)
        if open_NE is not None:
            score_NE = score_NE.masked_fill(~open_NE, 0.0)
        refuse_nan(score_NE, context, self.matrix or self.layer)
        bias_NE, may_NE = self._shift(score_NE), open_NE
        for override in overrides:
            bias_NE, may_NE = override.biased(bias_NE, score_NE), override.opened(may_NE, score_NE)
        seen_open_NE = may_NE
        # Nothing is open to a padding item.
        if context.item_mask_N is not None:
            real_N1 = context.item_mask_N.unsqueeze(-1)
            may_NE = real_N1 if may_NE is None else may_NE & real_N1
        select = self.select.of_pass(context.training)
        routing = select(score_NE, logit_NE=masked_NE, bias_E=bias_NE, open_NE=may_NE)

        def weigh(index_NK: Tensor) -> Tensor:
            if open_NE is not None:
                open_NK = open_NE.expand_as(score_NE).gather(1, index_NK.clamp_min(0))
                index_NK = index_NK.masked_fill(~open_NK, UNUSED)
            return select.weigh(index_NK, score_NE, masked_NE).weight_NK

        for override in overrides:
            routing = override.force(routing, weigh, context.item_mask_N)
        if context.training and not is_fixed(self):
            self._balance(Observation(logit_NE, routing, seen_open_NE), context, overrides)
        return routing

    def _balance(self, seen: Observation, context: RoutingContext, overrides: Sequence[Override]) -> None:
        """Let balancers watch what is the router's own."""
        hidden = hidden_items(overrides, seen.logit_NE.device)
        if hidden is True:
            return
        if isinstance(hidden, Tensor):
            own_N = ~hidden if context.item_mask_N is None else ~hidden & context.item_mask_N
            seen = replace(seen, routing=seen.routing.drop(hidden.unsqueeze(-1)))
            # The replaced context collects into the same lists.
            context = replace(context, item_mask_N=own_N)
        for part in self._balancers:
            part(seen, context)

    @property
    def bias_E(self) -> Tensor | None:
        """float ``[E]``: what is added to scores to select, of all balancers together; None without such a balancer."""
        return _sum(part.bias_E for part in self._balancers)

    @property
    def shifts_by_scores(self) -> bool:
        """Whether what is added to scores to select depends on them, so that `bias_E` is not all of it."""
        return any(part.shifts_by_scores for part in self._balancers)

    def _shift(self, score_NE: Tensor) -> Tensor | None:
        """What all balancers together add to these scores to select, ``[E]`` or ``[N, E]``."""
        return _sum(part.shift(score_NE) for part in self._balancers)

    @property
    def _balancers(self) -> tuple[Balancer, ...]:
        return (*self.balance, *self.destinations.balance)


def _sum(parts: Iterable[Tensor | None]) -> Tensor | None:
    total: Tensor | None = None
    for part in parts:
        if isinstance(part, Tensor):
            total = part if total is None else total + part
    return total
