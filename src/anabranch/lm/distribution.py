"""The distribution that the next token is drawn from: temperature, top-k, top-p, min-p, each row by its own settings.

All cuts look at the softmax of the whole vocabulary at the row's temperature; a token stays if every one of them keeps it. Equally
likely tokens stay in the order of their ids, so that a row's result depends on nothing beside it.
"""
# Shapes: R rows, V vocabulary, N blocks of the vocabulary, W tokens of a block

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["cut", "invert", "temper"]

_BLOCK = 256
# The most likely tokens, which are sorted first: top-p rarely needs more.
_FIRST_LOOK = 1024


def temper(logits_RV: Tensor, temperature_R: Tensor) -> Tensor:
    """probability_RV, the softmax of logits divided by temperatures above 0."""
    # Less the largest first, so that the smallest temperature gives no infinity but the most likely token.
    shifted_RV = logits_RV.float()
    shifted_RV = shifted_RV - shifted_RV.amax(-1, keepdim=True)
    # And no temperature that float32 rounds to 0, which would make 0 / 0 of the most likely one.
    least_R = temperature_R.float().clamp(min=torch.finfo(torch.float32).tiny)
    return shifted_RV.div_(least_R[:, None]).softmax(-1)


def cut(probability_RV: Tensor, *, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor | None = None) -> Tensor:
    """``probability_RV`` with 0 for what is cut; not divided by what is left. The most likely token always stays.

    Args:
        probability_RV: rows that add up to 1.
        top_k_R: how many of the most likely stay; 0 for all.
        top_p_R: the most likely stay whose probabilities reach it; 1 for all.
        min_p_R: those stay that have at least this share of the most likely one's probability; 0 for all.
    """
    least_R = torch.zeros_like(probability_RV[:, 0])
    if min_p_R is not None:
        least_R = min_p_R * probability_RV.amax(-1)
    counts_R = ((top_k_R > 0) & (top_k_R < probability_RV.shape[-1])) | (top_p_R < 1)
    if bool(counts_R.any()):
        rows_C = counts_R.nonzero().squeeze(-1)
        edge_C, excess_C = _edge(probability_RV[rows_C], top_k_R[rows_C], top_p_R[rows_C])
        for row, excess in zip(rows_C[excess_C > 0].tolist(), excess_C[excess_C > 0].tolist(), strict=True):
            # Rare: some of the tokens that are as likely as the last that stays have to go.
            edge = edge_C[rows_C == row]
            probability_RV = probability_RV.clone()
            tied = (probability_RV[row] == edge).nonzero().squeeze(-1)
            probability_RV[row, tied[len(tied) - excess :]] = 0.0
        least_R = least_R.index_copy(0, rows_C, torch.maximum(least_R[rows_C], edge_C))
    if not bool((least_R > 0).any()):
        return probability_RV
    return probability_RV.masked_fill(probability_RV < least_R[:, None], 0.0)


def invert(probability_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """token_R: the first whose cumulative probability, in the order of ids, is above ``uniform_R`` (in [0, 1)) times the whole.

    Rows need not add up to 1 and must not be all zeros. A token of probability 0 is never taken.
    """
    rows, vocab_size = probability_RV.shape
    # First the block of tokens, then the token in it: a sum of the whole vocabulary in doubles would cost more than the softmax.
    block_RNW = F.pad(probability_RV, (0, -vocab_size % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    sum_RN = block_RNW.sum(-1, dtype=torch.float64).cumsum(-1)
    whole_R1 = sum_RN[:, -1:]
    point_R1 = torch.minimum(
        uniform_R.double()[:, None] * whole_R1, torch.nextafter(whole_R1, torch.zeros_like(whole_R1))
    )
    block_R1 = torch.searchsorted(sum_RN, point_R1, right=True)
    before_R1 = F.pad(sum_RN, (1, 0)).gather(-1, block_R1)
    inside_RW = block_RNW[torch.arange(rows, device=block_RNW.device), block_R1.squeeze(-1)].cumsum(
        -1, dtype=torch.float64
    )
    place_R1 = torch.searchsorted(inside_RW, point_R1 - before_R1, right=True)
    # Two sums of one block may differ in their last bit: no further than the last token that may be taken.
    last_R1 = torch.searchsorted(inside_RW, inside_RW[:, -1:].contiguous())
    return (block_R1 * _BLOCK + torch.minimum(place_R1, last_R1)).squeeze(-1)


def _edge(probability_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> tuple[Tensor, Tensor]:
    """edge_R, the probability of the last token that top-k and top-p keep, and excess_R, how many as likely ones are too many."""
    vocab_size = probability_RV.shape[-1]
    kept_R = torch.where(top_k_R > 0, top_k_R, vocab_size).clamp(max=vocab_size)
    ascending_RV = _sort(probability_RV)
    if bool((top_p_R < 1).any()):
        for looked in (min(_FIRST_LOOK, vocab_size), vocab_size):
            descending_RV = ascending_RV[:, vocab_size - looked :].flip(-1)
            before_RV = descending_RV.cumsum(-1, dtype=torch.float64).sub_(descending_RV)
            inside_R = (before_RV < top_p_R[:, None]).sum(-1).clamp(min=1)
            if bool(((inside_R < looked) | (top_p_R >= 1)).all()):
                break
        kept_R = torch.where(top_p_R < 1, torch.minimum(kept_R, inside_R), kept_R)
    edge_R1 = ascending_RV.gather(-1, (vocab_size - kept_R)[:, None])
    reaching_R = vocab_size - torch.searchsorted(ascending_RV, edge_R1).squeeze(-1)
    return edge_R1.squeeze(-1), reaching_R - kept_R


def _sort(probability_RV: Tensor) -> Tensor:
    """Rows in ascending order. numpy sorts the vocabulary of a model some fifty times faster than torch does on a CPU."""
    if probability_RV.device.type == "cpu":
        return torch.from_numpy(np.sort(probability_RV.numpy(), axis=-1))
    return probability_RV.sort(dim=-1).values
