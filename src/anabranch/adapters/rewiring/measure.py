"""What a phase 1 looks at: losses of each row, how sure each layer is, and how decisions differ before and after."""
# Shapes: B rows, L positions, S routed layers, N items, E destinations, K choices, X items of one row, V vocabulary

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.adapters.rewiring.vectors import Seen
from anabranch.precision import wide
from anabranch.routing.decision import count_destinations


def token_losses(logits_BLV: Tensor, token_BL: Tensor) -> Tensor:
    """nats ``[B, L - 1]``: of the tokens at positions 1 and up."""
    logits_BLV = wide(logits_BLV[:, : token_BL.shape[1] - 1])
    target_BL = token_BL[:, 1 : logits_BLV.shape[1] + 1]
    # Over the last axis, along which numbers lie beside one another.
    loss_N = F.cross_entropy(logits_BLV.flatten(0, 1), target_BL.flatten(), reduction="none")
    return loss_N.view(target_BL.shape)


def row_means(loss_BL: Tensor, counted_BL: Tensor) -> Tensor:
    """[B]: mean over what is counted; 0 where nothing is."""
    # What is not counted may be no number.
    total_B = torch.where(counted_BL, loss_BL, 0.0).sum(-1)
    return total_B / counted_BL.sum(-1).clamp_min(1)


def confidence(seen: Sequence[Seen], batch: int) -> Tensor:
    """C, ``[B, S]``: minus the mean log probability of the chosen experts. Large where a router is UNDECIDED, see the page.

    Probabilities are scores over their sum, which for a softmax they are.
    """
    of_layers = []
    for layer in seen:
        score_NE, index_NK = layer.routing.score_NE, layer.routing.index_NK
        probability_NE = score_NE / score_NE.sum(-1, keepdim=True).clamp_min(1e-20)
        used_NK = index_NK >= 0
        log_NK = probability_NE.gather(1, index_NK.clamp_min(0)).clamp_min(1e-20).log()
        own_N = -torch.where(used_NK, log_NK, 0.0).sum(-1) / used_NK.sum(-1).clamp_min(1)
        total_B = own_N.new_zeros(batch).index_add(0, layer.row_N, own_N)
        count_B = own_N.new_zeros(batch).index_add(0, layer.row_N, torch.ones_like(own_N))
        of_layers.append(total_B / count_B.clamp_min(1))
    return torch.stack(of_layers, dim=1)


@dataclass(frozen=True)
class Difference:
    """How the decisions of a row differ between two passes; an entry for each layer, see `Phase`."""

    overlap: tuple[float | None, ...]
    load_change: tuple[float | None, ...]
    new_experts: tuple[tuple[int, ...], ...]


def difference(
    before: Sequence[Seen], after: Sequence[Seen], rows: tuple[int, int], length: int, sizes: Sequence[int]
) -> Difference:
    """Of row ``rows[0]`` of the one pass and ``rows[1]`` of the other, both of ``length`` positions; ``sizes`` are E of the layers."""
    overlap: list[float | None] = []
    change: list[float | None] = []
    new: list[tuple[int, ...]] = []
    for old, now, num_destinations in zip(before, after, sizes, strict=True):
        (old_position_X, old_XK), (position_X, now_XK) = old.of_row(rows[0], length), now.of_row(rows[1], length)
        # A layer that some tokens skip may have had others.
        same = len(position_X) > 0 and torch.equal(old_position_X, position_X)
        overlap.append(_overlap(old_XK, now_XK, num_destinations) if same else None)
        load_E, now_E = (count_destinations(index_XK, num_destinations) for index_XK in (old_XK, now_XK))
        shares = [load.double() / load.sum().clamp_min(1) for load in (load_E, now_E)]
        change.append(float((shares[0] - shares[1]).abs().sum() / 2) if len(position_X) else None)
        new.append(tuple(((load_E == 0) & (now_E > 0)).nonzero().flatten().tolist()))
    return Difference(tuple(overlap), tuple(change), tuple(new))


def _overlap(old_XK: Tensor, now_XK: Tensor, num_destinations: int) -> float:
    old_XE, now_XE = (_members(index_XK, num_destinations) for index_XK in (old_XK, now_XK))
    both_X, any_X = (old_XE & now_XE).sum(-1), (old_XE | now_XE).sum(-1)
    # Two empty sets are the same.
    return float(torch.where(any_X > 0, both_X / any_X.clamp_min(1), 1.0).double().mean())


def _members(index_XK: Tensor, num_destinations: int) -> Tensor:
    """bool ``[X, E]``: whether an item goes there."""
    found_XE = index_XK.new_zeros(len(index_XK), num_destinations + 1, dtype=torch.bool)
    place_XK = torch.where(index_XK < 0, num_destinations, index_XK)
    return found_XE.scatter(1, place_XK, True)[:, :num_destinations]
