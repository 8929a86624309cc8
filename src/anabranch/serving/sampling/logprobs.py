"""Log probabilities that clients ask for: of the model's own distribution."""
# Shapes: R rows, V vocabulary, K most likely tokens

import math

import torch
from torch import Tensor

from anabranch.serving.core.request import TokenLogprob

__all__ = ["logprobs", "not_numbers"]

# That a request may ask for; always as many are looked up, so that a row's result does not depend on the others.
_MOST = 20


def logprobs(logits_RV: Tensor, tokens: list[int], tops: list[int]) -> list[TokenLogprob]:
    """For each row the log probability of its token and of the ``tops`` most likely.

    Raises nothing; ``logits_RV`` must be finite where it is not -inf.
    """
    logits_RV = logits_RV.float()
    whole_R1 = logits_RV.logsumexp(-1, keepdim=True)
    token_R1 = torch.tensor(tokens, device=logits_RV.device)[:, None]
    own = (logits_RV.gather(-1, token_R1) - whole_R1).squeeze(-1).tolist()
    best_RK, index_RK = logits_RV.topk(min(_MOST, logits_RV.shape[-1]), dim=-1)
    likely, names = (best_RK - whole_R1).tolist(), index_RK.tolist()
    return [
        TokenLogprob(token=token, logprob=value, top=tuple(zip(names[row][:top], likely[row][:top], strict=True)))
        for row, (token, value, top) in enumerate(zip(tokens, own, tops, strict=True))
    ]


def not_numbers(best: float) -> str | None:
    """The error of a row whose largest logit is ``best``; None if it can be read."""
    return None if math.isfinite(best) else f"the model's logits are not numbers (the largest is {best})"
