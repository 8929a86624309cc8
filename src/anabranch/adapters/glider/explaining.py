"""Why experts were chosen: what the query as a whole says of each, what its tokens say, and who was used, in all and by matrix."""
# Shapes: E experts, N tokens, L positions

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from anabranch.adapters.glider.pool import GliderPool
from anabranch.adapters.glider.score import bias_rows, watching
from anabranch.errors import InputError
from anabranch.lm.generate import evaluating

__all__ = ["Explained", "Explanation", "explain", "global_shares"]


@dataclass(frozen=True)
class Explained:
    """Of one expert.

    Attributes:
        name: of the expert.
        cosine: of its instruction and the query's.
        global_logit: that times a.
        local_logit: mean over tokens and matrices that it adapts; None without tokens.
        weight: mean over tokens and matrices of what it is multiplied by; None without tokens.
        global_share: how much of what sets it apart from the mean expert is global, 0 to 1: |g - mean g| over |g - mean g| + |l - mean l|;
            1 without tokens, 0 where nothing sets it apart.
    """

    name: str
    cosine: float
    global_logit: float
    local_logit: float | None
    weight: float | None
    global_share: float


@dataclass(frozen=True)
class Explanation:
    """Of one query.

    Attributes:
        instruction: what was compared.
        a: the weight of the global score.
        experts: most used first, or of the best cosine where no tokens were given.
        weights: mean over tokens by matrix, then by expert.
    """

    instruction: str
    a: float
    experts: tuple[Explained, ...]
    weights: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.__dict__, "experts": [dict(expert.__dict__) for expert in self.experts]}


@torch.no_grad()
def explain(
    pool: GliderPool, query: str, token_ids: Sequence[int] | None = None, *, instruction: str | None = None
) -> Explanation:
    """What speaks for each expert of ``pool`` for a query.

    Args:
        pool: on a model, where ``token_ids`` are given.
        query: its text.
        token_ids: its tokens, which the model runs on; None for the global router alone.
        instruction: in the place of what the writer would write.

    Raises ConfigError for a pool that is on no model, InputError for no tokens.
    """
    text, _ = pool.matcher.instruct(query, instruction)
    cosines = pool.matcher.cosines(query, instruction)
    is_used = pool.config.instruction
    a = pool.weight(cosines) if is_used else 0.0
    bias_E = pool.bias([query], [instruction])[0]
    if token_ids is None:
        found = [Explained(name, cosines[name], float(bias_E[e]), None, None, 1.0) for e, name in enumerate(pool.names)]
        return Explanation(text, a, tuple(sorted(found, key=lambda one: -one.cosine)))
    if not len(token_ids):
        raise InputError("there are no tokens to explain the routing of")
    local_E, weight_E, weights = _used(pool, token_ids, bias_E)
    share_E = global_shares(bias_E, local_E)
    found = [
        Explained(name, cosines[name], float(bias_E[e]), float(local_E[e]), float(weight_E[e]), float(share_E[e]))
        for e, name in enumerate(pool.names)
    ]
    return Explanation(text, a, tuple(sorted(found, key=lambda one: -(one.weight or 0.0))), weights)


def global_shares(global_E: torch.Tensor, local_E: torch.Tensor) -> torch.Tensor:
    """share_E: see `Explained.global_share`."""
    apart_E, own_E = ((value_E - value_E.mean()).abs() for value_E in (global_E, local_E))
    total_E = apart_E + own_E
    return torch.where(total_E > 0, apart_E / total_E.clamp_min(1e-30), 0.0)


def _used(
    pool: GliderPool, token_ids: Sequence[int], bias_E: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, dict[str, float]]]:
    """(mean local logit, mean weight, weights by matrix) of the tokens of one row."""
    model, names = pool.model, pool.names
    token_BL = torch.tensor([list(token_ids)], device=model.embedding.weight.device)
    seen: dict[int, torch.Tensor] = {}
    with evaluating(model):
        bias_1E = bias_E.unsqueeze(0).to(token_BL.device)
        model(token_BL, state={**bias_rows(bias_1E, token_BL.shape[1]), **watching(seen)})
    local_sum, weight_sum, open_count = (torch.zeros(len(names)) for _ in range(3))
    weights: dict[str, dict[str, float]] = {}
    layers = {part: layer for part, layer in pool.layers().items() if id(layer.router.score) in seen}  # type: ignore[union-attr]
    for part, layer in layers.items():
        router = layer.router
        assert router is not None
        score: Any = router.score
        local_NE = seen[id(score)]
        is_open_E = torch.ones(len(names), dtype=torch.bool)
        is_open_E[list(layer.config.closed)] = False
        open_E = is_open_E.to(local_NE.device)
        logit_NE = (score.within_cluster(local_NE) + bias_E.to(local_NE)).masked_fill(~open_E, -torch.inf)
        # As the router decided: the same score, and the same select.
        routing = router.select(score.activate(logit_NE), logit_NE=logit_NE, open_NE=open_E)
        mean_E = local_NE.new_zeros(local_NE.shape).scatter_add(
            1, routing.index_NK.clamp_min(0), routing.weight_NK * routing.used_NK
        )
        mean_E = mean_E.mean(0).float().cpu()
        # What a matrix lacks has a vector of zeros.
        local_sum += local_NE.mean(0).float().cpu()
        weight_sum, open_count = weight_sum + mean_E, open_count + is_open_E
        weights[part] = dict(zip(names, mean_E.tolist(), strict=True))
    return local_sum / open_count.clamp_min(1), weight_sum / max(1, len(weights)), weights
