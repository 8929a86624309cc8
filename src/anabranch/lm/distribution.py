"""The distribution that the next token is drawn from: temperature, top-k, top-p, min-p, each row by its own settings.

All cuts look at the softmax of the whole vocabulary at the row's temperature; a token stays if every one of them keeps it. Equally
likely tokens stay in the order of their ids, so that a row's result depends on nothing beside it.
"""
# Shapes: R rows, V vocabulary, K the most likely tokens that are looked at

import torch
from torch import Tensor

__all__ = ["cut", "invert", "temper"]

_FIRST_LOOK = 512  # of the most likely tokens; top-p rarely needs more, and a sort of the whole vocabulary is slow


def temper(logits_RV: Tensor, temperature_R: Tensor) -> Tensor:
    """probability_RV, the softmax of logits divided by temperatures above 0."""
    # Less the largest first, so that the smallest temperature gives no infinity but the most likely token.
    shifted_RV = logits_RV.float() - logits_RV.float().amax(-1, keepdim=True)
    return (shifted_RV / temperature_R[:, None]).softmax(-1)


def cut(probability_RV: Tensor, *, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor | None = None) -> Tensor:
    """``probability_RV`` with 0 for what is cut; not divided by what is left. The most likely token always stays.

    Args:
        probability_RV: rows that add up to 1.
        top_k_R: how many of the most likely stay; 0 for all.
        top_p_R: the most likely stay whose probabilities reach it; 1 for all.
        min_p_R: those stay that have at least this share of the most likely one's probability; 0 for all.
    """
    vocab_size = probability_RV.shape[-1]
    if bool(((top_k_R > 0) & (top_k_R < vocab_size)).any()) or bool((top_p_R < 1).any()):
        probability_RV = _keep_most_likely(probability_RV, top_k_R, top_p_R)
    if min_p_R is not None and bool((min_p_R > 0).any()):
        least_R1 = min_p_R[:, None] * probability_RV.amax(-1, keepdim=True)
        probability_RV = probability_RV.masked_fill(probability_RV < least_R1, 0.0)
    return probability_RV


def invert(probability_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """token_R: the first whose cumulative probability, in the order of ids, is above ``uniform_R`` (in [0, 1)) times the whole.

    Rows need not add up to 1 and must not be all zeros. A token of probability 0 is never taken.
    """
    sum_RV = probability_RV.cumsum(-1, dtype=torch.float64)
    whole_R = sum_RV[:, -1]
    point_R = torch.minimum(uniform_R.double() * whole_R, torch.nextafter(whole_R, torch.zeros_like(whole_R)))
    return torch.searchsorted(sum_RV, point_R[:, None], right=True).squeeze(-1)


def _keep_most_likely(probability_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> Tensor:
    """0 for all but the most likely that top-k and top-p keep, of equally likely ones the first."""
    kept_R, edge_R = _edge(probability_RV, top_k_R, top_p_R)
    above_RV, equal_RV = probability_RV > edge_R[:, None], probability_RV == edge_R[:, None]
    room_R1 = (kept_R - above_RV.sum(-1))[:, None]
    if bool((equal_RV.sum(-1, keepdim=True) > room_R1).any()):
        equal_RV &= equal_RV.cumsum(-1) <= room_R1
    return probability_RV.masked_fill(~(above_RV | equal_RV), 0.0)


def _edge(probability_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> tuple[Tensor, Tensor]:
    """kept_R and edge_R: how many of the most likely tokens stay, and the probability of the last of them."""
    rows, vocab_size = probability_RV.shape
    most_R = torch.where(top_k_R > 0, top_k_R, vocab_size).clamp(max=vocab_size)
    # Rows that cut nothing keep all: more than there are above the edge -1.
    kept_R = torch.full((rows,), vocab_size, device=probability_RV.device)
    edge_R = torch.full((rows,), -1.0, dtype=probability_RV.dtype, device=probability_RV.device)
    open_R = ((most_R < vocab_size) | (top_p_R < 1)).nonzero().squeeze(-1)
    for width in (min(_FIRST_LOOK, vocab_size), vocab_size):
        if not len(open_R):
            break
        part_RV, p_R1 = probability_RV[open_R], top_p_R[open_R, None]
        top_RK = (part_RV.topk(width) if width < vocab_size else part_RV.sort(descending=True)).values
        before_RK = top_RK.cumsum(-1, dtype=torch.float64) - top_RK
        inside_R = ((before_RK < p_R1) | (p_R1 >= 1)).sum(-1).clamp(min=1)
        done_R = (inside_R < width) | (most_R[open_R] <= width) | (width == vocab_size)
        stay_R = torch.minimum(inside_R, most_R[open_R])[done_R]
        kept_R[open_R[done_R]] = stay_R
        edge_R[open_R[done_R]] = top_RK[done_R].gather(-1, stay_R[:, None] - 1).squeeze(-1)
        open_R = open_R[~done_R]
    return kept_R, edge_R
