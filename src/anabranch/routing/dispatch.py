"""`dispatch` and `combine`: the only places where items are permuted, and exact inverses of each other.

A `DispatchPlan` sorts the used choices of a `Routing` by destination (stable, so within a destination rows keep item order).
Dropless routing computes every row. `limit_capacity` drops what exceeds a destination's capacity, and `pad_rows` lays rows
out as ``[E, capacity, D]`` for a batched matmul.
"""
# Shapes: N items, E destinations, K choices per item, R = N K rows, C capacity, D width

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from anabranch.errors import ConfigError
from anabranch.routing.decision import Routing
from anabranch.routing.renamed import Renamed


@dataclass(frozen=True)
class DispatchPlan:
    """The permutation of one routing decision.

    Attributes:
        choice_R: int64, for each row the flat choice ``n * K + k`` it comes from. Rows are sorted by destination; rows of
            unused choices stand last, behind ``offset_E[-1]``, and are never computed.
        offset_E: int32, end row (exclusive) of each destination.
        num_items: N.
        num_choices: K.
    """

    choice_R: Tensor
    offset_E: Tensor
    num_items: int
    num_choices: int

    place_R, num_places = Renamed("choice_R"), Renamed("num_choices")

    @property
    def item_R(self) -> Tensor:
        """int64: the item each row carries."""
        return self.choice_R // self.num_choices

    @property
    def load_E(self) -> Tensor:
        """int32: rows of each destination."""
        return torch.diff(self.offset_E, prepend=self.offset_E.new_zeros(1))

    @property
    def used_R(self) -> Tensor:
        """bool: rows that belong to a destination."""
        return torch.arange(self.choice_R.shape[0], device=self.choice_R.device) < self.offset_E[-1]


def plan_dispatch(routing: Routing) -> DispatchPlan:
    """Sort the choices of ``routing`` by destination."""
    index_R, num_destinations = routing.index_NK.reshape(-1), routing.num_destinations
    # A narrow key makes the stable sort a radix sort on the CPU, several times faster than on int64.
    narrow = torch.int16 if num_destinations < 2**15 - 1 else torch.int32
    key_R, choice_R = torch.sort(torch.where(index_R < 0, num_destinations, index_R).to(narrow), stable=True)
    destination_E = torch.arange(num_destinations, dtype=narrow, device=key_R.device)
    offset_E = torch.searchsorted(key_R, destination_E, right=True, out_int32=True)
    return DispatchPlan(choice_R, offset_E, routing.num_items, routing.num_choices)


def dispatch(x_ND: Tensor, plan: DispatchPlan, weight_NK: Tensor | None = None) -> Tensor:
    """rows_RD: a copy of each item for each of its choices, sorted by destination; with weights times that of its choice."""
    rows_RD = x_ND[plan.item_R]
    return rows_RD if weight_NK is None else weigh(rows_RD, weight_NK, plan.choice_R)


def weigh(rows_RD: Tensor, weight_NK: Tensor, choice_R: Tensor) -> Tensor:
    """Each row times the weight of its choice, in the dtype of the rows."""
    return rows_RD * weight_NK.reshape(-1)[choice_R].unsqueeze(-1).to(rows_RD.dtype)


def combine(rows_RD: Tensor, plan: DispatchPlan, weight_NK: Tensor | None = None) -> Tensor:
    """y_ND: each item's rows, weighted, summed in fp32 in the order of its choices (so the result does not depend on threads).

    Without weights rows are added as they are: with one used choice per item, ``combine(dispatch(x, plan), plan) == x``.
    """
    width = rows_RD.shape[-1]
    used_R1 = plan.used_R.unsqueeze(-1)
    y_RD = torch.zeros_like(rows_RD).index_copy(0, plan.choice_R, rows_RD.masked_fill(~used_R1, 0.0))
    return sum_choices(y_RD.view(plan.num_items, plan.num_choices, width), weight_NK)


def sum_choices(y_NKD: Tensor, weight_NK: Tensor | None = None) -> Tensor:
    """y_ND: what the choices of each item gave, weighted, summed in fp32; zeros where a choice gave nothing."""
    wide = torch.promote_types(y_NKD.dtype, torch.float32)
    if weight_NK is None:
        return y_NKD.sum(1, dtype=wide).to(y_NKD.dtype)
    # Autocast would take the sum in half precision.
    with torch.autocast(y_NKD.device.type, enabled=False):
        return torch.einsum("nkd,nk->nd", y_NKD.to(wide), weight_NK.to(wide)).to(y_NKD.dtype)


def capacity_of(num_items: int, num_choices: int, num_destinations: int, capacity_factor: float) -> int:
    """ceil(capacity_factor * N K / E), the rows each destination takes (GShard, Switch Transformer)."""
    if capacity_factor <= 0:
        raise ConfigError(f"capacity_factor is {capacity_factor}; it must be greater than 0 (1.0 to 2.0 is usual)")
    return math.ceil(capacity_factor * num_items * num_choices / num_destinations)


def limit_capacity(
    routing: Routing, capacity: int, *, order: Literal["token", "score"] = "token", renormalize: bool = False
) -> Routing:
    """Drop the choices that exceed ``capacity`` rows of their destination.

    Args:
        routing: the decision to limit.
        capacity: most rows a destination takes, see `capacity_of`.
        order: who stays: ``token``, first come first served; ``score``, the highest weights.
        renormalize: scale what an item keeps so its weights sum to what they summed to before.
    """
    rank_R = _rank_in_destination(routing, order)
    limited = routing.drop((rank_R >= capacity).view_as(routing.index_NK))
    if not renormalize:
        return limited
    before_N1 = routing.weight_NK.sum(-1, keepdim=True)
    after_N1 = limited.weight_NK.sum(-1, keepdim=True)
    scale_N1 = torch.where(after_N1 > 0, before_N1 / after_N1.clamp_min(1e-20), 0.0)
    return Routing(limited.index_NK, limited.weight_NK * scale_N1, limited.score_NE)


def _rank_in_destination(routing: Routing, order: str) -> Tensor:
    """int64 [N K]: how many rows of the same destination go before this place."""
    index_R = routing.index_NK.reshape(-1)
    key_R = torch.where(index_R < 0, routing.num_destinations, index_R)
    first_R = torch.arange(key_R.numel(), device=key_R.device)
    if order == "score":
        first_R = torch.sort(routing.weight_NK.detach().reshape(-1), descending=True, stable=True).indices
    sorted_R = first_R[torch.sort(key_R[first_R], stable=True).indices]
    load = torch.zeros(routing.num_destinations + 1, dtype=torch.int64, device=key_R.device)
    load.scatter_add_(0, key_R, torch.ones_like(key_R))
    start_R = (load.cumsum(0) - load)[key_R[sorted_R]]
    rank_sorted_R = torch.arange(key_R.numel(), device=key_R.device) - start_R
    return torch.empty_like(rank_sorted_R).scatter_(0, sorted_R, rank_sorted_R)


def pad_rows(rows_RD: Tensor, plan: DispatchPlan, capacity: int) -> Tensor:
    """rows_ECD: the rows of each destination, zero-padded to ``capacity``.

    Raises ConfigError if a destination has more rows than that (see `limit_capacity`).
    """
    num_destinations, width = plan.offset_E.numel(), rows_RD.shape[-1]
    most = int(plan.load_E.max())
    if most > capacity:
        raise ConfigError(f"capacity is {capacity}, but a destination has {most} rows; limit_capacity drops the excess")
    row_R, slot_R = _padded_slot(plan, capacity)
    padded = rows_RD.new_zeros(num_destinations * capacity, width)
    return padded.index_copy(0, slot_R, rows_RD[row_R]).view(num_destinations, capacity, width)


def unpad_rows(rows_ECD: Tensor, plan: DispatchPlan) -> Tensor:
    """rows_RD: the inverse of `pad_rows`; rows of unused choices are zero."""
    row_R, slot_R = _padded_slot(plan, rows_ECD.shape[1])
    rows = rows_ECD.new_zeros(plan.choice_R.numel(), rows_ECD.shape[-1])
    return rows.index_copy(0, row_R, rows_ECD.flatten(0, 1)[slot_R])


def _padded_slot(plan: DispatchPlan, capacity: int) -> tuple[Tensor, Tensor]:
    """For each used row: its number, and its place in the padded layout."""
    start_E = plan.offset_E.long() - plan.load_E.long()
    row_R = torch.arange(int(plan.offset_E[-1]), device=plan.choice_R.device)
    destination_R = torch.searchsorted(plan.offset_E.long(), row_R, right=True)
    return row_R, destination_R * capacity + row_R - start_E[destination_R]
