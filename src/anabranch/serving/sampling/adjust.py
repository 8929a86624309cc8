"""Logits changed by what requests ask: penalties, bias, stop tokens held back, grammar. No loop over rows touches a tensor."""
# Shapes: S rows, V vocabulary, P (row, token) pairs

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.serving.sampling.state import SequenceState

__all__ = ["adjust"]


def adjust(logits_SV: Tensor, states: list[SequenceState]) -> Tensor:
    """``logits_SV`` (float32, changed in place) with -inf for tokens that are not allowed."""
    _penalise(logits_SV, states)
    biased = [(row, state.bias_tokens, state.bias) for row, state in enumerate(states) if len(state.bias)]
    if biased:
        row_P, token_P = _pairs([(row, tokens) for row, tokens, _ in biased], logits_SV)
        bias_P = torch.from_numpy(np.concatenate([bias for _, _, bias in biased])).to(logits_SV.device)
        # A token named twice gets both.
        logits_SV.index_put_((row_P, token_P), bias_P, accumulate=True)
    held = [(row, state.stops) for row, state in enumerate(states) if state.holds_stops and state.matcher is None]
    if held:
        logits_SV[_pairs(held, logits_SV)] = -math.inf
    _restrict(logits_SV, states)
    return logits_SV


def _penalise(logits_SV: Tensor, states: list[SequenceState]) -> None:
    penalised = [(row, state.counts, state.sampling) for row, state in enumerate(states) if state.counts is not None]
    if not penalised:
        return
    device = logits_SV.device
    row_P, token_P = _pairs([(row, counts.tokens_N) for row, counts, _ in penalised], logits_SV)
    sizes = [len(counts.tokens_N) for _, counts, _ in penalised]

    def spread(values: list[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), sizes)).to(device)

    count_P = torch.from_numpy(np.concatenate([counts.count_N for _, counts, _ in penalised])).to(device)
    repetition_P = spread([sampling.repetition_penalty for _, _, sampling in penalised])
    before_P = logits_SV[row_P, token_P]
    value_P = torch.where(before_P > 0, before_P / repetition_P, before_P * repetition_P)
    value_P -= count_P * spread([sampling.frequency_penalty for _, _, sampling in penalised])
    value_P -= (count_P > 0) * spread([sampling.presence_penalty for _, _, sampling in penalised])
    # What is finite stays so: a penalty forbids nothing, and infinity has no softmax.
    bounds = torch.finfo(value_P.dtype)
    logits_SV[row_P, token_P] = torch.where(before_P.isfinite(), value_P.clamp(bounds.min, bounds.max), before_P)


def _restrict(logits_SV: Tensor, states: list[SequenceState]) -> None:
    masks = [(row, mask_V) for row, state in enumerate(states) if (mask_V := state.allowed_V()) is not None]
    if not masks:
        return
    allowed = np.zeros((len(masks), logits_SV.shape[-1]), dtype=np.bool_)
    for place, (_, mask_V) in enumerate(masks):
        # A model may have more logits than its tokenizer has tokens, or fewer.
        both = min(len(mask_V), allowed.shape[1])
        allowed[place, :both] = mask_V[:both]
    rows = torch.tensor([row for row, _ in masks], device=logits_SV.device)
    allowed_MV = torch.from_numpy(allowed).to(logits_SV.device)
    logits_SV[rows] = logits_SV[rows].masked_fill(~allowed_MV, -math.inf)


def _pairs(named: list[tuple[int, NDArray[np.int64]]], like: Tensor) -> tuple[Tensor, Tensor]:
    """row_P and token_P of [(row, its tokens)]."""
    row_P = np.repeat(np.array([row for row, _ in named]), [len(tokens) for _, tokens in named])
    token_P = np.concatenate([tokens for _, tokens in named])
    return torch.from_numpy(row_P).to(like.device), torch.from_numpy(token_P).to(like.device)
