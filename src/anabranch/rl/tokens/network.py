"""`TokenPolicy`: a decoder that acts, and where there is one its critic, as one module that scores whole episodes."""
# Shapes: B sequences, L tokens, V vocabulary, D width, N = B L items of a router, A layers that route, K choices

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.lm.decoder import Decoder
from anabranch.nn.context import ForwardContext
from anabranch.rl.tokens.trajectory import NOWHERE
from anabranch.routing import Override, Router
from anabranch.routing.context import RoutingContext
from anabranch.routing.decision import Routing
from anabranch.routing.discovery import RouterLayer, find_routers, router_layers

__all__ = ["Scored", "TokenPolicy", "router_layers_of"]

# Rows of logits that are there at once, over the vocabulary.
_LOGITS_AT_ONCE = 2**26


@dataclass(frozen=True)
class Scored:
    """What a policy says of episodes. All of a token stands at its own place: it is what was said of it before it was there.

    Attributes:
        log_prob_BL: of each token that was asked for, 0 of the others.
        entropy_BL: of the distribution that it was drawn from, in nats.
        value_BL: what the critic holds the place before it for; None without a critic.
        auxiliary: losses that layers emitted, means over layers.
        flipped: of the choices of experts that were recorded, how many were made otherwise; and how many there were.
    """

    log_prob_BL: Tensor
    entropy_BL: Tensor
    value_BL: Tensor | None
    auxiliary: dict[str, Tensor]
    flipped: tuple[int, int]


class TokenPolicy(nn.Module):
    """See the module.

    Args:
        policy: the decoder.
        critic: a decoder whose states a value is read from; None for no critic. See `with_critic`.

    Attributes:
        value_head: float ``[1, D]`` of the critic.
    """

    def __init__(self, policy: Decoder, critic: Decoder | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.value_head: nn.Linear | None = None
        self._layers = router_layers_of(policy)
        if critic is not None:
            # Nothing is read off its head.
            critic.head = None if critic.head is None else nn.Identity()
            self.value_head = nn.Linear(critic.config.dim, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    @classmethod
    def with_critic(cls, policy: Decoder) -> TokenPolicy:
        """One whose critic begins as a copy of the policy; its values begin at 0."""
        return cls(policy, copy.deepcopy(policy))

    def forward(
        self,
        token_BL: Tensor,
        asked_BL: Tensor,
        *,
        temperature: float = 1.0,
        real_BL: Tensor | None = None,
        route_BLAK: Tensor | None = None,
        is_replayed: bool = False,
        commits: bool = True,
    ) -> Scored:
        """Score episodes.

        Args:
            token_BL: int64.
            asked_BL: bool, the tokens that log probabilities are wanted of. The first of a sequence has none.
            temperature: logits are divided by it.
            real_BL: bool, no padding; needed where tokens are routed.
            route_BLAK: where the engine sent each token, see `Samples`.
            is_replayed: send them there again, weighed by the router as it is now.
            commits: tell balancers of the loads of this pass.
        """
        context = self.policy.context(token_BL)
        if self._layers and real_BL is not None:
            context.item_mask_N = real_BL.reshape(-1)
        watch = None
        if route_BLAK is not None and route_BLAK.shape[2] > 0:
            watch = _Watch(self._layers, route_BLAK)
        if watch is not None and is_replayed:
            context.routing.append(watch)
        with watch.listening() if watch is not None else _nothing():
            x_BLD = self.policy.hidden(token_BL, context)
        before_BL = F.pad(asked_BL[:, 1:], (0, 1))
        log_prob_T, entropy_T = self._said(x_BLD[before_BL], token_BL[:, 1:][asked_BL[:, 1:]], context, temperature)
        at_BL = asked_BL & F.pad(torch.ones_like(asked_BL[:, 1:]), (1, 0))
        log_prob_BL, entropy_BL = (_placed(at_BL, said_T) for said_T in (log_prob_T, entropy_T))
        value_BL = None
        if self.critic is not None and self.value_head is not None:
            judged_BL = self.value_head(self.critic.hidden(token_BL, self.critic.context(token_BL))).squeeze(-1)
            value_BL = F.pad(judged_BL[:, :-1], (1, 0))
        auxiliary = context.mean_losses()
        if commits:
            context.commit()
        return Scored(log_prob_BL, entropy_BL, value_BL, auxiliary, (0, 0) if watch is None else watch.flipped)

    def _said(
        self, x_TD: Tensor, token_T: Tensor, context: ForwardContext, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """(log probability of a token, entropy of what it is drawn from) by the states before it; a part of them at a time."""
        step = max(_LOGITS_AT_ONCE // self.policy.config.vocab_size, 1)
        parts = [
            self._of_part(x_TD[at : at + step], token_T[at : at + step], context, temperature)
            for at in range(0, max(len(x_TD), 1), step)
        ]
        log_probs, entropies = zip(*parts, strict=True)
        return torch.cat(log_probs), torch.cat(entropies)

    def _of_part(
        self, x_TD: Tensor, token_T: Tensor, context: ForwardContext, temperature: float
    ) -> tuple[Tensor, Tensor]:
        all_TV = (self.policy.logits(x_TD[None], context)[0].float() / temperature).log_softmax(-1)
        log_prob_T = all_TV.gather(-1, token_T[:, None]).squeeze(-1)
        return log_prob_T, -(all_TV.exp() * all_TV).sum(-1)


def router_layers_of(model: Decoder) -> list[RouterLayer]:
    """The layers of a model in which a `Router` decides, as the engine numbers them; those of the head are not among them."""
    routers = {name: module for name, module in find_routers(model).items() if isinstance(module, Router)}
    of_head = set() if model.head is None else set(model.head.modules())
    return [layer for layer in router_layers(model, routers) if layer.router not in of_head] if routers else []


def _placed(at_BL: Tensor, said_T: Tensor) -> Tensor:
    return torch.zeros(at_BL.shape, dtype=said_T.dtype, device=said_T.device).masked_scatter(at_BL, said_T)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class _Watch:
    """Compares where tokens are sent with where the engine sent them, and sends them there where it is asked (an `Overrides`).

    Attributes:
        flipped: choices that were made otherwise than recorded, and recorded ones.
    """

    def __init__(self, layers: Sequence[RouterLayer], route_BLAK: Tensor) -> None:
        ordered = sorted(layers, key=lambda layer: layer.number)
        self._place = {(layer.router, layer.pass_index): place for place, layer in enumerate(ordered)}
        self._passes = {layer.router: layer.num_passes for layer in layers}
        self._route_NAK = route_BLAK.flatten(0, 1).long()
        self._visits: dict[nn.Module, int] = {}
        self.flipped = (0, 0)

    def of(self, router: nn.Module, visit: int, x_ND: Tensor, context: RoutingContext) -> Override | None:
        """See `Overrides`: recorded destinations, and whatever the router says itself where none were."""
        place = self._place.get((router, visit % self._passes.get(router, 1)))
        if place is None:
            return None
        index_NK = self._route_NAK[:, place]
        known_N = (index_NK != NOWHERE).any(-1)
        return Override(index_NK=index_NK, only_N=known_N, learn=True)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Count while the block runs."""
        handles = [router.register_forward_hook(self._note) for router in self._passes]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _note(self, router: nn.Module, given: Any, routing: Routing) -> None:
        visit = self._visits.get(router, 0)
        self._visits[router] = visit + 1
        recorded_NK = self._route_NAK[:, self._place[router, visit % self._passes[router]]]
        known_NK = recorded_NK != NOWHERE
        same_NK = (recorded_NK[:, :, None] == routing.index_NK[:, None, :]).any(-1)
        flipped, of = self.flipped
        self.flipped = flipped + int((known_NK & ~same_NK).sum()), of + int(known_NK.sum())
