"""`Override`: destinations of one layer that are forced, closed, or preferred by a bias, for all items or for some.

Every `Router` asks what overrides its forward context carries (``context.routing``), in their order. A bias and closed destinations
change what selection sees and nothing else: scores, and so weights, stay the router's own. What is added to the logits changes both, and
gradients reach it through the weights of what was selected. A forced decision takes the place of what was selected; the router need not
run where the weights are given too.

What balancers see: nothing of items that are overridden, neither in losses nor in loads, unless ``learn`` is set. A layer must not be
taught to even out what it did not choose.

`anabranch.routing.layer_overrides` and `anabranch.routing.replay` put overrides into the forward passes of a model.
"""
# Shapes: N items, E destinations, K choices per item

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.routing.context import RoutingContext
from anabranch.routing.decision import UNUSED, Routing


@dataclass(frozen=True, kw_only=True, eq=False)
class Override:
    """What is changed in the decisions of one layer. Lists are taken as tensors.

    Attributes:
        index_NK: int64 ``[K]`` or ``[N, K]``, the destinations that items are sent to, -1 for choices that are not used. None: as selected.
            K need not be the router's.
        weight_NK: of the same shape, the weights of their outputs. None: made of the router's own scores, as its select does, with their
            gradient; a destination that the router's own candidates close then weighs 0.
        bias_NE: ``[E]`` or ``[N, E]``, added to the scores for selection only, beside the router's own bias.
        open_NE: bool ``[E]`` or ``[N, E]``, False for destinations that must not be selected, beside those that are closed anyway. An item
            with too few open ones has unused choices. Forced destinations are not asked.
        logit_NE: ``[E]`` or ``[N, E]``, added to the logits, before they become scores: selection and weights both follow. It may require a
            gradient, which comes through the weights; who is selected is not differentiated. Where it is 0 nothing changes, to the bit.
        only_N: bool ``[N]``, the items that this is for; None for all.
        learn: balancers see these items all the same.
        of_all_routers: there is one like it for every router of the model. No score then needs to hand on a state to the next router, and
            none is computed where weights are given.

    Raises ConfigError for values of another kind or shape, destinations that an item names twice, and where nothing would be changed.
    """

    index_NK: Tensor | None = None
    weight_NK: Tensor | None = None
    bias_NE: Tensor | None = None
    open_NE: Tensor | None = None
    logit_NE: Tensor | None = None
    only_N: Tensor | None = None
    learn: bool = False
    of_all_routers: bool = False

    def __post_init__(self) -> None:
        for name in ("index_NK", "weight_NK", "bias_NE", "open_NE", "logit_NE", "only_N"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, torch.as_tensor(value))
                _check_kind(name, getattr(self, name))
        if all(value is None for value in (self.index_NK, self.bias_NE, self.open_NE, self.logit_NE)):
            raise ConfigError("an override changes nothing; give it index_NK, bias_NE, open_NE or logit_NE")
        if self.weight_NK is not None:
            if self.index_NK is None or self.weight_NK.shape != self.index_NK.shape:
                other = "there is no index_NK" if self.index_NK is None else f"index_NK {list(self.index_NK.shape)}"
                raise ConfigError(f"weight_NK has shape {list(self.weight_NK.shape)}, but {other}; they go together")
            if bool((self.weight_NK[self.index_NK < 0] != 0).any()):
                raise ConfigError("weight_NK has a weight at a choice whose index_NK is -1; such choices weigh 0")

    @property
    def is_complete(self) -> bool:
        """Whether it says all about every item, so that the router need not run."""
        return self.weight_NK is not None and self.only_N is None and not self.learn

    def check_fit(self, num_items: int, num_destinations: int, layer: str) -> None:
        """Raise ConfigError unless this is of N items and E destinations."""
        wanted = {
            "index_NK": (num_items, None),
            "bias_NE": (num_items, num_destinations),
            "open_NE": (num_items, num_destinations),
            "logit_NE": (num_items, num_destinations),
            "only_N": (num_items,),
        }
        for name, sizes in wanted.items():
            value = getattr(self, name)
            if value is None:
                continue
            sizes = sizes[-value.dim() :]
            if any(size not in (None, given) for size, given in zip(sizes, value.shape, strict=True)):
                shape = f"[{', '.join('K' if size is None else str(size) for size in sizes)}]"
                raise ConfigError(
                    f"{name} has shape {list(value.shape)}; {layer} routes {num_items} items to {num_destinations} destinations, so it "
                    f"must be {shape}"
                )
        if self.index_NK is not None and self.index_NK.numel() and int(self.index_NK.max()) >= num_destinations:
            raise ConfigError(
                f"index_NK names destination {int(self.index_NK.max())} of {layer}; it has 0 to {num_destinations - 1}"
            )

    def biased(self, bias_NE: Tensor | None, like_NE: Tensor) -> Tensor | None:
        """What selection adds to the scores, with this."""
        if self.bias_NE is None:
            return bias_NE
        more_NE = self.bias_NE.to(like_NE)
        if self.only_N is not None:
            more_NE = torch.where(self._only_N1(like_NE), more_NE, 0.0)
        return more_NE if bias_NE is None else bias_NE + more_NE

    def shifted(self, logit_NE: Tensor) -> Tensor:
        """The logits that become scores, with this."""
        if self.logit_NE is None:
            return logit_NE
        more_NE = self.logit_NE.to(logit_NE)
        return logit_NE + (more_NE if self.only_N is None else torch.where(self._only_N1(logit_NE), more_NE, 0.0))

    def opened(self, open_NE: Tensor | None, like_NE: Tensor) -> Tensor | None:
        """What may be selected, with this."""
        if self.open_NE is None:
            return open_NE
        mine_NE = self.open_NE.to(like_NE.device)
        if self.only_N is not None:
            mine_NE = mine_NE | ~self._only_N1(like_NE)
        return mine_NE if open_NE is None else open_NE & mine_NE

    def forced_NK(self, num_items: int, device: torch.device, item_mask_N: Tensor | None) -> Tensor:
        """The forced destinations of each item; padding goes nowhere."""
        assert self.index_NK is not None, "asked only where something is forced"
        index_NK = self.index_NK.to(device).expand(num_items, self.index_NK.shape[-1])
        return index_NK if item_mask_N is None else index_NK.masked_fill(~item_mask_N.unsqueeze(-1), UNUSED)

    def routing(self, x_ND: Tensor, num_destinations: int, item_mask_N: Tensor | None) -> Routing:
        """The whole decision, where it `is_complete`. Scores are the weights of the chosen, and 0 elsewhere."""
        assert self.weight_NK is not None
        index_NK = self.forced_NK(len(x_ND), x_ND.device, item_mask_N)
        # Scores are in this type.
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        weight_NK = self.weight_NK.to(x_ND.device, dtype).expand(index_NK.shape).masked_fill(index_NK < 0, 0.0)
        score_NE = weight_NK.new_zeros(len(x_ND), num_destinations)
        return Routing(index_NK, weight_NK, score_NE.scatter_add(1, index_NK.clamp_min(0), weight_NK))

    def force(self, routing: Routing, weigh: Callable[[Tensor], Tensor], item_mask_N: Tensor | None) -> Routing:
        """``routing`` with the forced decisions in it; ``weigh`` makes weight_NK of index_NK where none are given."""
        if self.index_NK is None:
            return routing
        index_NK = self.forced_NK(routing.num_items, routing.index_NK.device, item_mask_N)
        if self.weight_NK is None:
            weight_NK = weigh(index_NK)
        else:
            weight_NK = self.weight_NK.to(routing.weight_NK).expand(index_NK.shape).masked_fill(index_NK < 0, 0.0)
        if self.only_N is None:
            return Routing(index_NK, weight_NK, routing.score_NE)
        num_choices, only_N1 = max(routing.num_choices, index_NK.shape[1]), self._only_N1(routing.index_NK)
        index_NK = torch.where(
            only_N1, _widen(index_NK, num_choices, UNUSED), _widen(routing.index_NK, num_choices, UNUSED)
        )
        weight_NK = torch.where(only_N1, _widen(weight_NK, num_choices, 0), _widen(routing.weight_NK, num_choices, 0))
        drawn_NK = routing.propensity_NK
        if drawn_NK is not None:
            drawn_NK = _widen(drawn_NK, num_choices, torch.nan).masked_fill(only_N1, torch.nan)
        return replace(routing, index_NK=index_NK, weight_NK=weight_NK, propensity_NK=drawn_NK)

    def _only_N1(self, like: Tensor) -> Tensor:
        assert self.only_N is not None
        return self.only_N.to(like.device).unsqueeze(-1)


class Overrides(Protocol):
    """What a forward context carries: something that says how the decisions of each router are changed."""

    def of(self, router: nn.Module, visit: int, x_ND: Tensor, context: RoutingContext) -> Override | None:
        """The override of the next N items of ``router``, None for none.

        ``visit`` is how often it routed in this forward pass before. A recomputation in the backward pass asks again, with the same
        visit, and must be told the same.
        """


def overrides_of(router: nn.Module, num_destinations: int, x_ND: Tensor, context: RoutingContext) -> list[Override]:
    """What ``context`` changes in the next N decisions of ``router``, in order.

    Raises ConfigError for one that is not of N items and E destinations.
    """
    visit = context.visit(router)
    found = [source.of(router, visit, x_ND, context) for source in context.routing]
    overrides = [override for override in found if override is not None]
    for override in overrides:
        override.check_fit(len(x_ND), num_destinations, f"the router of layer {getattr(router, 'layer', '?')}")
    return overrides


def hidden_items(overrides: Sequence[Override], device: torch.device) -> Tensor | bool:
    """The items whose decisions balancers must not see: all (True), none (False), or bool ``[N]``."""
    hidden: Tensor | bool = False
    for override in overrides:
        if override.learn:
            continue
        if override.only_N is None:
            return True
        hidden = override.only_N.to(device) | hidden
    return hidden


def _check_kind(name: str, value: Tensor) -> None:
    dims, kind = (1,) if name == "only_N" else (1, 2), value.dtype
    if value.dim() not in dims:
        raise ConfigError(
            f"{name} has shape {list(value.shape)}; it must have {' or '.join(map(str, dims))} dimensions"
        )
    if name == "index_NK":
        if not value.shape[-1]:
            raise ConfigError("index_NK has no choices; an item that goes nowhere has index -1")
        if kind != torch.int64:
            raise ConfigError(f"index_NK is {kind}; destinations are int64")
        sorted_NK = value.sort(-1).values
        twice_NK = (sorted_NK.diff(dim=-1) == 0) & (sorted_NK[..., 1:] >= 0)
        if bool(twice_NK.any()):
            raise ConfigError(f"index_NK names destination {int(sorted_NK[..., 1:][twice_NK][0])} twice for one item")
        if value.numel() and int(value.min()) < UNUSED:
            raise ConfigError(
                f"index_NK has {int(value.min())}; destinations are 0 and up, and -1 is a choice that is not used"
            )
    elif name in ("open_NE", "only_N"):
        if kind != torch.bool:
            raise ConfigError(f"{name} is {kind}; it must be bool")
    elif not kind.is_floating_point or not bool(torch.isfinite(value).all()):
        what = f"is {kind}" if not kind.is_floating_point else "has a number that is not finite"
        raise ConfigError(f"{name} {what}; it must be finite floats (open_NE closes destinations)")


def _widen(value_NK: Tensor, num_choices: int, fill: float) -> Tensor:
    """With choices added that hold ``fill``."""
    return F.pad(value_NK, (0, num_choices - value_NK.shape[1]), value=fill)
