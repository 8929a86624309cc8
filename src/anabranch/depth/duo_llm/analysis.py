"""What an oracle's choices say: who needs the big module and where, which tokens are hard, and how much of the gain is real.

Token difficulty is the *reducible* loss, D_t = loss_t(all small) - loss_t(oracle): a high loss with D near 0 is uncertainty that no
compute removes. The controls: an oracle against shuffled targets (`oracle`, ``shuffle_seed``) and routes chosen by one model that
another model is scored on (`transfer`); only what passes from model to model is about the token, and can be learned.
"""
# Shapes: B sequences, L positions, G rows of budgets, Y duo layers, P parts of a sequence

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.data import Tokenizer
from anabranch.depth.duo_llm.layer import BIG, Route, duo_layers, take
from anabranch.depth.duo_llm.results import OracleResult, evaluating, token_losses
from anabranch.depth.duo_llm.routes import Walk
from anabranch.errors import ConfigError
from anabranch.files import atomic_write_json
from anabranch.lm.decoder import Decoder

# Tokens with the highest loss that are looked at.
HARD_SHARE = 0.1


def route_loss(model: Decoder, ids_BL: Tensor, route: Route, *, chunk: int = 16) -> Tensor:
    """loss_BL, nats, of a model on one route (a tensor route is ``[B, L, Y]`` of all sequences)."""
    losses = []
    with evaluating(model):
        for start in range(0, ids_BL.shape[0], chunk):
            rows = slice(start, start + chunk)
            here = route[rows] if isinstance(route, Tensor) else route
            logits_BLV = model(ids_BL[rows, :-1], state=take(here)).logits_BLV
            losses += token_losses(logits_BLV, [ids_BL[rows, 1:]])
    return torch.cat(losses)


def transfer(result: OracleResult, model: Decoder, ids_BL: Tensor, *, chunk: int = 16) -> Tensor:
    """loss_GBL of ``model`` on the routes that another model's oracle chose, each token scored as `uniform` scores it.

    Raises ConfigError if the models have different numbers of duo layers.
    """
    num_layers = len(duo_layers(model))
    if num_layers != result.space.num_layers:
        raise ConfigError(f"the routes are of {result.space.num_layers} layers, the model has {num_layers} duo layers")
    loss_GBL = torch.full_like(result.loss_GBL, torch.nan)
    walk = Walk(model, result.space)
    with evaluating(model):
        for start in range(0, ids_BL.shape[0], chunk):
            rows = slice(start, start + chunk)
            code_GBL = result.code_GBL[:, rows].to(ids_BL.device)
            for code, logits_BLV in walk(ids_BL[rows, :-1], result.space.among(code_GBL.unique().tolist())):
                [loss_BL] = token_losses(logits_BLV, [ids_BL[rows, 1:]])
                loss_GBL[:, rows] = torch.where((code_GBL == code).cpu(), loss_BL.cpu(), loss_GBL[:, rows])
    return loss_GBL


def big_by_position(route_BLY: Tensor, parts: int = 10) -> Tensor:
    """share_YP: share of tokens that take big, by layer and part of the sequence (deciles by default)."""
    is_big_LY = (route_BLY == BIG).double().mean(0)
    edges = [round(part * is_big_LY.shape[0] / parts) for part in range(parts + 1)]
    return torch.stack([is_big_LY[start:end].mean(0) for start, end in itertools.pairwise(edges)], dim=1)


def ramp_loss(result: OracleResult, first: int, last: int) -> float:
    """Mean oracle loss where the budget goes linearly from ``first`` to ``last`` along the sequence, rounded at each position."""
    length = result.loss_GBL.shape[2]
    budgets = np.round(np.linspace(first, last, length)).astype(int)
    losses = [result.loss_GBL[result.row(int(budget)), :, place] for place, budget in enumerate(budgets)]
    return float(torch.stack(losses).double().mean())


def difficulty(result: OracleResult, small_BL: Tensor, budget: int | None = None) -> Tensor:
    """D_BL = loss on the all-small route - loss of the oracle at ``budget``."""
    return small_BL.cpu() - result.loss_GBL[result.row(budget)]


def hopeless_share(loss_BL: Tensor, difficulty_BL: Tensor) -> float:
    """Among the tenth of tokens with the highest loss: the share whose difficulty is below the median of all."""
    count = max(1, round(HARD_SHARE * loss_BL.numel()))
    hard_N = loss_BL.flatten().topk(count).indices
    return float((difficulty_BL.flatten()[hard_N] < difficulty_BL.median()).double().mean())


def top_tokens(
    ids_BL: Tensor, value_BL: Tensor, tokenizer: Tokenizer, *, count: int = 20, before: int = 24
) -> list[dict[str, Any]]:
    """The targets with the highest values, with the text before them."""
    found = []
    length = value_BL.shape[1]
    for place in value_BL.flatten().topk(min(count, value_BL.numel())).indices.tolist():
        row, position = divmod(place, length)
        ids = ids_BL[row].tolist()
        text = tokenizer.decode(ids[max(0, position + 1 - before) : position + 1])
        token = tokenizer.decode(ids[position + 1 : position + 2])
        found.append({"value": round(float(value_BL[row, position]), 4), "before": text, "token": token})
    return found


def gap_closed(fixed: float, router: float, oracle: float) -> float:
    """(fixed - router) / (fixed - oracle): 0 for a router as good as the best fixed route, 1 for the oracle."""
    return (fixed - router) / (fixed - oracle) if fixed != oracle else math.nan


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's; equal values share their mean rank. nan if one side does not vary."""
    ranks = [_ranks(np.asarray(values, np.float64)) for values in (first, second)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return math.nan
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    lower = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    return lower + (equal - 1) / 2


def analyze(
    result: OracleResult,
    small_BL: Tensor,
    *,
    ids_BL: Tensor,
    tokenizer: Tokenizer | None = None,
    ramps: Sequence[tuple[int, int]] = (),
    path: str | Path | None = None,
) -> dict[str, Any]:
    """All of it as JSON, written to ``path`` if given.

    Args:
        result: an oracle with every budget from 0 to Y.
        small_BL: loss on the all-small route, `route_loss`.
        ids_BL: what the oracle saw.
        tokenizer: for the text of tokens.
        ramps: (first, last) budgets to compare with the constant budget of their mean.
        path: of the JSON file.

    Gives ``rows`` and ``report`` of the oracle, ``choice_correlation`` (Spearman of -loss and log of the number of routes), ``heat``
    (by budget: share of big by layer and decile), ``ramps``, and at the middle budget ``hopeless_share`` and the ``difficult`` and
    ``hopeless`` tokens.
    """
    budgets = result.space.budgets or (None,)
    middle = budgets[len(budgets) // 2]
    difficulty_BL = difficulty(result, small_BL, middle)
    table = {
        **result.to_dict(),
        "choice_correlation": rank_correlation(
            (-result.oracle_G).tolist(), [math.log(result.space.count(budget)) for budget in budgets]
        ),
        "heat": {str(budget): big_by_position(result.route_BLY(budget)).tolist() for budget in budgets},
        "ramps": [
            {
                "first": first,
                "last": last,
                "loss": ramp_loss(result, first, last),
                "constant": float(result.oracle_G[result.row((first + last) // 2)]),
            }
            for first, last in ramps
        ],
        "hopeless_share": hopeless_share(small_BL.cpu(), difficulty_BL),
    }
    if tokenizer is not None:
        uncertain_BL = small_BL.cpu().masked_fill(difficulty_BL >= difficulty_BL.median(), -torch.inf)
        table["difficult"] = top_tokens(ids_BL, difficulty_BL, tokenizer)
        table["hopeless"] = top_tokens(ids_BL, uncertain_BL, tokenizer)
    if path is not None:
        atomic_write_json(path, table)
    return table
