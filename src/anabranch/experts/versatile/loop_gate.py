"""The loop gate of VersatileFFN: how many loops each token takes, recorded, overridden and replayed as routers are.

    with override_routing(model, {"blocks.0.feed_forward.paths.loops": Override(index_NK=[1])}):
        model(token_BL)                                        # two loops for every token in layer 0

Destination l is l + 1 loops.
"""
# Shapes: N items, T most loops, D width

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.routing import LinearScore, Recorder, Routing, RoutingContext, record_routing
from anabranch.routing.destinations import Destinations
from anabranch.routing.nan import refuse_nan
from anabranch.routing.override import Override, overrides_of
from anabranch.routing.relax import Temperature, gumbel_softmax

if TYPE_CHECKING:
    from anabranch.experts.versatile.layer import VersatileFFN

__all__ = ["LoopGate", "loop_gates", "record_difficulty"]


class LoopGate(nn.Module):
    """How many loops each token takes: T logits from the un-normalised stream, a Gumbel sample of them in training, their argmax outside.

    It returns a `Routing` whose destination is the number of loops minus 1, so `record_routing` can write per-token difficulty
    (see `record_difficulty`). Its ``score_NE`` are the relaxed probabilities: a Gumbel softmax at the current temperature in
    training, the plain softmax outside (which is how samples are distributed at any temperature).

    Overrides that ``context.routing`` carries change the number as they change a router's decision; a choice that is not used is one loop,
    and padding takes one.

    Attributes:
        layer: index of the layer, for traces.
        num_destinations: T.
        mixes_by_scores: whether the share of each path is made of the probabilities, which no decision says: then the gate is asked for
            them though its number is forced.
    """

    num_choices: ClassVar[int] = 1

    def __init__(
        self, config: "VersatileFFN.Config", dim: int, *, layer: int = 0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.layer, self.num_destinations = layer, config.max_loops
        self.destinations = Destinations()
        # What the probabilities mix is not said by the number that was chosen.
        self._is_soft_in_training = config.relaxation == "soft"
        self.mixes_by_scores: bool = config.gate == "soft" or self._is_soft_in_training
        self.score: LinearScore = LinearScore.Config().build(dim, config.max_loops, generator=generator)
        self.temperature: Temperature = config.temperature.build()

    @property
    def takes_overrides(self) -> bool:
        """Whether it decides: not where training mixes all loops by their probabilities, which has no number to record or to override."""
        return not (self.training and self._is_soft_in_training)

    def forward(self, x_ND: Tensor, context: RoutingContext) -> Routing:
        """One choice per item. Raises ConfigError for an override of several choices, and in training where all loops are mixed.

        Raises NotFiniteError for probabilities that are NaN, see `anabranch.routing.nan`.
        """
        overrides: Sequence[Override] = ()
        if context.routing:
            overrides = overrides_of(self, self.num_destinations, x_ND, context)
            self._check(overrides, context)
            forced = [override for override in overrides if override.index_NK is not None]
            if forced and forced[-1].is_complete and not self.mixes_by_scores:
                return _taken(forced[-1].routing(x_ND, self.num_destinations, None))
        logit_NT = self.score.project(x_ND, context)
        for override in overrides:
            logit_NT = override.shifted(logit_NT)
        if context.training:
            soft_NT = gumbel_softmax(logit_NT, self.temperature.value.to(logit_NT.dtype))
        else:
            soft_NT = logit_NT.softmax(-1)
        refuse_nan(soft_NT, context, self.layer, who="loop gate")
        bias_NT, open_NT = None, None
        for override in overrides:
            bias_NT, open_NT = override.biased(bias_NT, soft_NT), override.opened(open_NT, soft_NT)
        value_NT = soft_NT if bias_NT is None else soft_NT + bias_NT
        value_NT = value_NT if open_NT is None else value_NT.masked_fill(~open_NT, -torch.inf)
        index_N1 = value_NT.argmax(-1, keepdim=True)
        # Padding takes one loop, as it does where decisions are replayed.
        if context.item_mask_N is not None:
            index_N1 = index_N1.masked_fill(~context.item_mask_N.unsqueeze(-1), 0)
        is_drawn = context.training and value_NT is soft_NT
        drawn_N1 = logit_NT.detach().softmax(-1).gather(-1, index_N1) if is_drawn else None
        routing = Routing(index_N1, soft_NT.gather(-1, index_N1), soft_NT, drawn_N1)
        for override in overrides:
            routing = override.force(routing, lambda index_NK: soft_NT.gather(-1, index_NK.clamp_min(0)), None)
        return _taken(routing) if overrides else routing

    def _check(self, overrides: Sequence[Override], context: RoutingContext) -> None:
        for override in overrides:
            num_choices = 1 if override.index_NK is None else override.index_NK.shape[-1]
            if num_choices != 1:
                raise ConfigError(f"index_NK has {num_choices} choices; a token takes one number of loops")
        if overrides and context.training and self._is_soft_in_training:
            raise ConfigError(
                "relaxation is 'soft', so in training every token takes all loops, mixed by their probabilities: there is no number to "
                "override; use relaxation='straight_through', or override in evaluation"
            )


def _taken(routing: Routing) -> Routing:
    """The same with one loop at least."""
    return Routing(routing.index_NK.clamp_min(0), routing.weight_NK, routing.score_NE, routing.propensity_NK)


def loop_gates(model: nn.Module) -> dict[str, nn.Module]:
    """The loop gates of a model by name, for a record of them alone (``routers`` of `record_routing`).

    Raises ConfigError if there is none.
    """
    gates: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, LoopGate)
    }
    if not gates:
        raise ConfigError(f"{type(model).__name__} has no loop gate, so no token has a number of loops to record")
    return gates


def record_difficulty(model: nn.Module, *, path: str | Path | None = None) -> AbstractContextManager[Recorder]:
    """`record_routing` of the loop gates: destination l is a token that took l + 1 loops, its weight the gate's probability for them.

        with record_difficulty(model) as recorder:
            model(token_BL)
        loops_N = recorder.trace().decisions(0).index_NK[:, 0] + 1        # of layer 0

    ``replay_routing(model, trace)`` takes them again, and leaves the experts to their routers.

    Raises ConfigError if the model has no loop gate.
    """
    return record_routing(model, path=path, routers=loop_gates(model))
