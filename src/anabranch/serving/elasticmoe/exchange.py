"""Experts spread over the processes of an instance: rows travel to the experts' owners and back through shared memory.

    model's pool = ShardedExperts(...)        # same call as an ExpertPool
    y_ND = pool(x_ND, routing)                # owners compute their part of each token's experts and send back its weighted sum

Not a collective: an owner serves each peer in a thread of its own, so every rank runs its own requests at its own pace, none steps for
the sake of others, and an instance stops or ends at any moment without leaving another waiting. A token travels once to each owner of
any of its experts. The sum over owners is taken in fp32 in the order of ranks.
"""
# Shapes: N items here, M items that travel, E experts of all ranks, K choices per item, D width

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.nn.expert_call import WeightOn
from anabranch.nn.grouped import expert_mlp
from anabranch.routing.context import RoutingContext
from anabranch.routing.decision import Routing
from anabranch.routing.dispatch import plan_dispatch
from anabranch.serving.elasticmoe.dlpack import tensor_over
from anabranch.serving.elasticmoe.mapped import Opened, Pages, Range, padded
from anabranch.serving.elasticmoe.plan import Placement
from anabranch.serving.elasticmoe.wire import Channel, ChannelClosedError

__all__ = ["Mailbox", "Owner", "Peer", "ShardedExperts", "shard_experts"]

_INDEX, _WEIGHT = torch.int64, torch.float32


class Mailbox:
    """Memory that one rank and one owner of experts share: rows, where they go and with what weight; then what comes back.

    It is main memory whatever the ranks compute on: rows are few, and devices that cannot see each other's memory exchange them as well.

    Args:
        rows: most items at once.
        places: most experts per item.
        dim: D.
        dtype: of items.
        fd: of a mailbox that another process made; None makes one.
    """

    def __init__(self, rows: int, places: int, dim: int, dtype: torch.dtype, fd: int | None = None) -> None:
        self.rows, self.places = rows, places
        sizes = [rows * places * 8, rows * places * 4, rows * dim * dtype.itemsize]
        starts = [0, padded(sizes[0], 64), padded(sizes[0], 64) + padded(sizes[1], 64)]
        total = padded(starts[2] + sizes[2])
        self._pages = Pages("mailbox", total) if fd is None else None
        self.fd = self._pages.fd if self._pages is not None else -1 if fd is None else fd
        self._range = Range(1, total, is_writable=True, copies=False)
        self._range.remap(Opened(self.fd), [0])
        flat = tensor_over(self._range.address, total, self._range.place)
        self._index = flat[: sizes[0]].view(_INDEX)
        self._weight = flat[starts[1] : starts[1] + sizes[1]].view(_WEIGHT)
        self.x_ND = flat[starts[2] : starts[2] + sizes[2]].view(dtype).view(rows, dim)

    def index(self, rows: int, places: int) -> Tensor:
        """Slots of the first ``rows`` items, [rows, places]; -1 where a place is not the owner's."""
        return self._index[: rows * places].view(rows, places)

    def weight(self, rows: int, places: int) -> Tensor:
        """Their weights."""
        return self._weight[: rows * places].view(rows, places)


@dataclass
class Owner:
    """What this rank holds of each layer: (w13, w2) of its experts, set when it attaches; empty before."""

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where the experts are, for those who ask."""
        return next((w13.device for w13, _ in self.layers if len(w13)), torch.device("cpu"))

    def compute(self, layer: int, x_MD: Tensor, slot_MK: Tensor, weight_MK: Tensor, weight_on: str) -> Tensor:
        """y_MD: the weighted sum over this rank's experts; ``slot_MK`` is -1 for those of others."""
        w13, w2 = self.layers[layer]
        score_ME = weight_MK.new_zeros(()).expand(len(x_MD), len(w13))
        routing = Routing(slot_MK, weight_MK, score_ME)
        # The compiled kernels want experts without padding between them and would copy all of them to get that.
        backend = "auto" if w13.is_contiguous() and w2.is_contiguous() else "torch"
        side: WeightOn = "input" if weight_on == "input" else "output"
        return expert_mlp(x_MD, plan_dispatch(routing), weight_MK, w13, w2, weight_on=side, backend=backend)

    def serve(self, channel: Channel, mailbox: Mailbox) -> None:
        """Answer one peer until it is gone, in a thread of its own."""
        threading.Thread(target=self._serve, args=(channel, mailbox), daemon=True).start()

    def _serve(self, channel: Channel, mailbox: Mailbox) -> None:
        try:
            while True:
                (number, layer, rows, places, weight_on), _ = channel.recv()
                with torch.inference_mode():
                    try:
                        asked = (mailbox.x_ND[:rows], mailbox.index(rows, places), mailbox.weight(rows, places))
                        x_MD, slot_MK, weight_MK = (part.to(self.device) for part in asked)
                        y_MD = self.compute(layer, x_MD, slot_MK, weight_MK, weight_on)
                        # The answer lies where the question lay.
                        asked[0].copy_(y_MD)
                        error = None
                    except Exception as failed:
                        error = f"{type(failed).__name__}: {failed}"
                channel.send((number, error))
        except ChannelClosedError:
            channel.close()


class Peer:
    """Another rank, seen by one that needs its experts."""

    def __init__(self, rank: int, channel: Channel, mailbox: Mailbox) -> None:
        self.rank, self.channel, self.mailbox = rank, channel, mailbox
        self._number = 0

    def ask(self, layer: int, x_MD: Tensor, slot_MK: Tensor, weight_MK: Tensor, weight_on: str) -> None:
        """Let it compute; `answer` gives the result."""
        rows, places = slot_MK.shape
        self.mailbox.x_ND[:rows] = x_MD
        self.mailbox.index(rows, places).copy_(slot_MK)
        self.mailbox.weight(rows, places).copy_(weight_MK)
        self._number += 1
        self.channel.send((self._number, layer, rows, places, weight_on))

    def answer(self, rows: int) -> Tensor:
        """y_MD of the last `ask`; valid until the next. Raises ChannelClosedError if the rank has died."""
        number = -1
        # An answer that nobody fetched, as something else failed meanwhile, is of no use.
        while number != self._number:
            (number, error), _ = self.channel.recv()
        if error is not None:
            raise RuntimeError(f"rank {self.rank}: {error}")
        return self.mailbox.x_ND[:rows]


class ShardedExperts(nn.Module):
    """Stands for an `ExpertPool` whose experts are spread over the ranks.

    Args:
        layer: number of the pool.
        rank: this process's.
        owner: what this rank holds.
        peers: the other ranks.
        num_experts: E.
    """

    def __init__(self, layer: int, rank: int, owner: Owner, peers: Sequence[Peer], num_experts: int) -> None:
        super().__init__()
        self.layer, self.rank, self.owner, self.peers = layer, rank, owner, tuple(peers)
        self.num_experts = num_experts
        self.rank_E = torch.zeros(num_experts, dtype=torch.int64)
        self.slot_E = torch.zeros(num_experts, dtype=torch.int64)
        # Tokens since the last `place`, for plans.
        self.load_E = torch.zeros(num_experts, dtype=torch.int64)

    def place(self, placement: Placement, device: torch.device | str = "cpu") -> None:
        """Where experts are from now on, and on which device items come."""
        owners = placement.owners(self.layer)
        told = [owners[expert] for expert in range(self.num_experts)]
        self.rank_E, self.slot_E = torch.tensor(told, dtype=torch.int64, device=device).unbind(1)
        self.load_E = torch.zeros(self.num_experts, dtype=torch.int64, device=device)

    def forward(
        self,
        x_ND: Tensor,
        routing: Routing,
        *,
        weight_on: WeightOn = "output",
        context: RoutingContext | None = None,
    ) -> Tensor:
        """y_ND, as `ExpertPool` gives it."""
        used_NK = routing.index_NK >= 0
        index_NK = routing.index_NK.clamp_min(0)
        self.load_E += torch.bincount(index_NK[used_NK], minlength=self.num_experts)
        slot_NK = self.slot_E[index_NK].masked_fill(~used_NK, -1)
        if not self.peers:
            return self.owner.compute(self.layer, x_ND, slot_NK, routing.weight_NK, weight_on)
        rank_NK = self.rank_E[index_NK].masked_fill(~used_NK, -1)
        limit = self.peers[0].mailbox.rows
        if len(x_ND) <= limit:
            return self._spread(x_ND, slot_NK, rank_NK, routing.weight_NK, weight_on)
        whole = (x_ND, slot_NK, rank_NK, routing.weight_NK)
        starts = range(0, len(x_ND), limit)
        parts = [[part[start : start + limit] for part in whole] for start in starts]
        return torch.cat([self._spread(x, slot, rank, weight, weight_on) for x, slot, rank, weight in parts])

    def _spread(self, x_ND: Tensor, slot_NK: Tensor, rank_NK: Tensor, weight_NK: Tensor, weight_on: str) -> Tensor:
        asked: list[tuple[Peer, Tensor]] = []
        for peer in self.peers:
            theirs_NK = rank_NK == peer.rank
            item_M = theirs_NK.any(1).nonzero().squeeze(1)
            if len(item_M):
                slot_MK = slot_NK.masked_fill(~theirs_NK, -1)[item_M]
                weight_MK = weight_NK.masked_fill(~theirs_NK, 0.0)[item_M]
                peer.ask(self.layer, x_ND[item_M], slot_MK, weight_MK, weight_on)
                asked.append((peer, item_M))
        parts: dict[int, tuple[Tensor, Tensor]] = {}
        mine_NK = rank_NK == self.rank
        item_M = mine_NK.any(1).nonzero().squeeze(1)
        # While they compute, so do we.
        if len(item_M):
            slot_MK = slot_NK.masked_fill(~mine_NK, -1)[item_M]
            weight_MK = weight_NK.masked_fill(~mine_NK, 0.0)[item_M]
            parts[self.rank] = item_M, self.owner.compute(self.layer, x_ND[item_M], slot_MK, weight_MK, weight_on)
        for peer, item_M in asked:
            parts[peer.rank] = item_M, peer.answer(len(item_M))
        y_ND = torch.zeros(x_ND.shape, dtype=torch.promote_types(x_ND.dtype, torch.float32), device=x_ND.device)
        for _, (item_M, y_MD) in sorted(parts.items()):
            y_ND.index_add_(0, item_M, y_MD.to(y_ND))
        return y_ND.to(x_ND.dtype)


def shard_experts(model: nn.Module, pools: Sequence[str], make: Any) -> list[ShardedExperts]:
    """Put ``make(layer, num_experts)`` in the place of each pool of a model, also where layers share it."""
    made = []
    for layer, name in enumerate(pools):
        pool = model.get_submodule(name)
        new = make(layer, pool.num_experts)
        made.append(new)
        for module in model.modules():
            for attribute, child in (*module._modules.items(), *vars(module).items()):
                if child is pool:
                    _exchange(module, attribute, new)
    return made


def _exchange(module: nn.Module, attribute: str, new: nn.Module) -> None:
    if attribute in module._modules:
        module._modules[attribute] = new
    else:
        # A pool that a neighbouring layer owns, see `anabranch.nn.context.set_unregistered`.
        object.__setattr__(module, attribute, new)
