"""How routers distribute a token, and what one tells about the next: the measures that RMoE is judged by (arXiv 2408.06793, sec. 5).

    facts = measure_gates(model, token_BL)
    facts.inner_balance, facts.information_LL

They need the scores of all experts, which a `RoutingTrace` does not hold, so they look at the routers while a model runs.
"""
# Shapes: B sequences, L routers (passes of routers), N tokens, E destinations, K chosen, D width, F hidden

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.lm.decoder import Decoder
from anabranch.lm.generate import evaluating
from anabranch.nn.activation import activation_of
from anabranch.nn.pool import ExpertPool, check_stacked
from anabranch.routing import Router, Routing
from anabranch.routing.measure import mutual_information

# Of a gate's probability, as in the paper.
NUM_BINS = 100


@dataclass(frozen=True)
class GateFacts:
    """Measures of the routers of a model on some tokens; scores are taken as shares of their sum.

    Attributes:
        entropy_L: bits, mean over tokens.
        inner_balance_L: the largest share over the second largest, median over tokens (the paper's Enwik8 model: SMoE 34.7, RMoE 2.02).
        outer_balance_L: sum of the chosen shares, median over tokens (SMoE 0.915, RMoE 0.573).
        information_LL: bits, the paper's estimate of mutual information between routers: for each token the E shares of both are put
            into 100 bins, the labels paired expert by expert, and the result averaged over tokens. NaN between routers of different E.
        choice_information_LL: bits between first choices, over all tokens; a few tokens give a value above 0 by chance, see
            `anabranch.routing.measure.mutual_information_bias`.
    """

    entropy_L: np.ndarray
    inner_balance_L: np.ndarray
    outer_balance_L: np.ndarray
    information_LL: np.ndarray
    choice_information_LL: np.ndarray

    @property
    def inner_balance(self) -> float:
        """Median over routers."""
        return float(np.median(self.inner_balance_L))

    @property
    def outer_balance(self) -> float:
        """Median over routers."""
        return float(np.median(self.outer_balance_L))

    @property
    def information(self) -> float:
        """Mean over pairs of different routers."""
        return _off_diagonal(self.information_LL)

    @property
    def choice_information(self) -> float:
        """Mean over pairs of different routers."""
        return _off_diagonal(self.choice_information_LL)


@torch.no_grad()
def measure_gates(model: Decoder, token_BL: Tensor) -> GateFacts:
    """Run ``model`` in evaluation on ``token_BL`` and measure its routers, in the order in which they route."""
    seen: list[Routing] = []

    def note(router: nn.Module, args: Any, routing: Routing) -> None:
        seen.append(routing)

    handles = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, Router)]
    try:
        with evaluating(model):
            model(token_BL)
    finally:
        for handle in handles:
            handle.remove()
    return gate_facts(seen)


def gate_facts(seen: list[Routing]) -> GateFacts:
    """`measure_gates` of decisions of the same tokens by several routers."""
    share_LNE = [routing.score_NE / routing.score_NE.sum(-1, keepdim=True).clamp_min(1e-20) for routing in seen]
    entropy, inner, outer = [], [], []
    for share_NE, routing in zip(share_LNE, seen, strict=True):
        best_N2 = share_NE.topk(min(2, share_NE.shape[1]), dim=-1).values
        chosen_NK = share_NE.gather(1, routing.index_NK.clamp_min(0)).masked_fill(~routing.used_NK, 0.0)
        entropy.append(float(-(share_NE * share_NE.clamp_min(1e-20).log2()).sum(-1).mean()))
        inner.append(float((best_N2[:, 0] / best_N2[:, -1].clamp_min(1e-20)).median()))
        outer.append(float(chosen_NK.sum(-1).median()))
    return GateFacts(
        np.array(entropy),
        np.array(inner),
        np.array(outer),
        _pairs([_bins(share_NE) for share_NE in share_LNE], _binned_information),
        _pairs([routing.index_NK[:, 0] for routing in seen], _choice_information),
    )


def _pairs(values: list[Tensor], measure: Any) -> np.ndarray:
    found_LL = np.empty((len(values), len(values)))
    for i, j in itertools.combinations_with_replacement(range(len(values)), 2):
        found_LL[i, j] = found_LL[j, i] = measure(values[i], values[j])
    return found_LL


def _bins(share_NE: Tensor) -> Tensor:
    return (share_NE * NUM_BINS).long().clamp(0, NUM_BINS - 1)


def _binned_information(first_NE: Tensor, second_NE: Tensor) -> float:
    if first_NE.shape != second_NE.shape:
        return float("nan")
    joint_NE = first_NE * NUM_BINS + second_NE
    bits = _entropy_of_labels(first_NE) + _entropy_of_labels(second_NE) - _entropy_of_labels(joint_NE)
    return max(0.0, float(bits.mean()))


def _entropy_of_labels(label_NE: Tensor) -> Tensor:
    """bits ``[N]``: of the E labels of a row. Each label counts log2 (E / how often it is in the row)."""
    count_NE = (label_NE.unsqueeze(-1) == label_NE.unsqueeze(-2)).sum(-1)
    return (label_NE.shape[1] / count_NE).log2().mean(-1)


def _choice_information(first_N: Tensor, second_N: Tensor) -> float:
    used_N = (first_N >= 0) & (second_N >= 0)
    first_N, second_N = first_N[used_N], second_N[used_N]
    if not len(first_N):
        return float("nan")
    width = int(second_N.max()) + 1
    pair_N = first_N * width + second_N
    return mutual_information(
        torch.bincount(pair_N, minlength=(int(first_N.max()) + 1) * width).view(-1, width).numpy()
    )


def _off_diagonal(value_LL: np.ndarray) -> float:
    others = ~np.eye(len(value_LL), dtype=bool)
    return float(np.nanmean(value_LL[others])) if np.isfinite(value_LL[others]).any() else float("nan")


def expert_similarity(pool: ExpertPool) -> tuple[float, float]:
    """Mean cosine between experts of their mean key row (the gate of w13, or all of it without one) and of their mean value row (of w2).

    Over pairs of experts. Raises ConfigError for experts with layers of their own.
    """
    check_stacked(pool)
    w13, w2 = pool.stacks
    gate_EFD, *_ = w13.detach().float().chunk(len(activation_of(pool.activation).parts), dim=1)
    return _mean_cosine(gate_EFD.mean(1)), _mean_cosine(w2.detach().float().mean(2))


def _mean_cosine(row_ED: Tensor) -> float:
    cosine_EE = F.normalize(row_ED, dim=-1) @ F.normalize(row_ED, dim=-1).T
    num = len(row_ED)
    return float((cosine_EE.sum() - cosine_EE.trace()) / max(num * (num - 1), 1))
