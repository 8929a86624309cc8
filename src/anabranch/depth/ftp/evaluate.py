"""What skipping costs: likelihood of a continuation behind a pruned prompt, and the baselines at as much work.

Decisions about a prompt look at the whole of it, later tokens included. For a *given* prompt that is right. The likelihood of the prompt's
own tokens would leak their future, so here a model is measured on (prompt, continuation): of the prompt tokens are skipped as the router
says, of the continuation by the rule of decoding, which looks at nothing. `perplexity` of pruned text takes a router with causal factors
alone.
"""
# Shapes: N tokens of a prompt, C of a continuation, V vocabulary

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.depth.ftp.items import Item, check_tokens, items_of
from anabranch.depth.ftp.passes import dense_work
from anabranch.depth.ftp.report import SkipReport, joined
from anabranch.depth.ftp.router import TokenRouter
from anabranch.depth.ftp.skipper import TokenSkipper
from anabranch.depth.ftp.static import skip_count
from anabranch.depth.stack import BlockStack, run_path
from anabranch.errors import ConfigError, InputError, NotFiniteError
from anabranch.lm.generate import evaluating

__all__ = [
    "Evaluation",
    "calibration_loss",
    "evaluate",
    "evaluate_items",
    "evaluate_path",
    "evaluate_shortened",
    "evaluate_truncated",
    "kl_loss",
    "perplexity",
]


@dataclass(frozen=True)
class Evaluation:
    """What a model gave on continuations.

    Attributes:
        nats: sum of minus the log-likelihood of their tokens.
        tokens: of the continuations.
        work: multiply-adds of blocks, over prompts and continuations.
        dense: those of the dense model.
        following: the likeliest token behind each prompt.
        report: of the skipped prompts; None where nothing was skipped token by token.
        item_nats: of each item, the mean over its tokens.
    """

    nats: float
    tokens: int
    work: int
    dense: int
    following: tuple[int, ...]
    report: SkipReport | None = None
    item_nats: tuple[float, ...] = field(default=())

    @property
    def nats_per_token(self) -> float:
        """Mean over all tokens of all continuations."""
        return self.nats / self.tokens

    @property
    def saved(self) -> float:
        """Share of the dense model's block multiply-adds that were not done."""
        return 1 - self.work / self.dense

    def agreement(self, other: "Evaluation") -> float:
        """Share of the items behind whose prompt the likeliest token is that of ``other``."""
        pairs = list(zip(self.following, other.following, strict=True))
        return sum(one == two for one, two in pairs) / len(pairs)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        about = {} if self.report is None else self.report.to_dict()
        return {
            "nats_per_token": self.nats_per_token,
            "perplexity": math.exp(min(self.nats_per_token, 700.0)),
            "continuation_tokens": self.tokens,
            "items": len(self.following),
            **about,
            "block_flops": 2 * self.work,
            "dense_block_flops": 2 * self.dense,
            "block_flops_saved": self.saved,
        }


def _joined(parts: list[Evaluation]) -> Evaluation:
    reports = [part.report for part in parts if part.report is not None]
    return Evaluation(
        math.fsum(part.nats for part in parts),
        sum(part.tokens for part in parts),
        sum(part.work for part in parts),
        sum(part.dense for part in parts),
        tuple(token for part in parts for token in part.following),
        joined(reports) if reports else None,
        tuple(part.nats_per_token for part in parts),
    )


def _nats(logits_CV: Tensor, continuation: Sequence[int], what: str) -> float:
    target_C = torch.tensor(continuation, device=logits_CV.device)
    nats = float(F.cross_entropy(logits_CV.float(), target_C, reduction="sum"))
    if not math.isfinite(nats):
        raise NotFiniteError(f"{what} gives logits that are not numbers: check the model's weights")
    return nats


def _check_item(stack: BlockStack, prompt: Any, continuation: Any) -> Item:
    try:
        pair = tuple(int(token) for token in prompt), tuple(int(token) for token in continuation)
    except (TypeError, ValueError) as error:
        raise InputError(f"prompt and continuation are lists of token ids; {error}") from None
    return items_of([pair], stack)[0]


def evaluate(skipper: TokenSkipper, prompt: Sequence[int], continuation: Sequence[int]) -> Evaluation:
    """Likelihood of ``continuation`` behind the pruned ``prompt``, token by token as it would be decoded.

    Nothing in the continuation changes what is skipped of the prompt, and its own tokens are skipped by the rule of decoding alone.

    Raises DataError for a prompt or a continuation without a token, or both longer than the model can be; InputError for other ids.
    """
    item = _check_item(skipper.stack, prompt, continuation)
    prefilled = skipper.prefill([item.prompt])
    logits_CV = prefilled.logits_BV
    if len(item.continuation) > 1:
        logits_CV = torch.cat((logits_CV, skipper.decode([item.continuation[:-1]], prefilled)[0]))
    report = prefilled.report
    return Evaluation(
        _nats(logits_CV, item.continuation, "the pruned model"),
        len(item.continuation),
        sum(report.work),
        sum(report.dense),
        (int(prefilled.logits_BV.argmax(-1)),),
        report,
    )


def evaluate_items(skipper: TokenSkipper, items: Sequence[Any]) -> Evaluation:
    """`evaluate` of all items. Raises DataError where there is none."""
    return _joined([evaluate(skipper, item.prompt, item.continuation) for item in items_of(items, skipper.stack)])


@torch.no_grad()
def evaluate_path(stack: BlockStack, items: Sequence[Any], path: Sequence[int] | None = None) -> Evaluation:
    """Likelihood of continuations when whole blocks are left out of the model, in prompt and continuation; None leaves none out."""
    parts = []
    for item in items_of(items, stack):
        whole = item.tokens[:-1]
        with evaluating(stack.module):
            logits_LV = run_path(stack, torch.tensor([whole], device=stack.device), path)[0]
        behind_CV = logits_LV[len(item.prompt) - 1 :]
        nats = _nats(behind_CV, item.continuation, "the model")
        work = dense_work(stack, len(whole), path)
        following = (int(behind_CV[0].argmax()),)
        parts.append(Evaluation(nats, len(item.continuation), work, dense_work(stack, len(whole)), following))
    return _joined(parts)


def evaluate_truncated(stack: BlockStack, items: Sequence[Any], sparsity: float) -> Evaluation:
    """Likelihood of continuations when the tokens that the static router passes over are cut out of the prompt before the model."""
    kept, shorter = items_of(items, stack), []
    for item in kept:
        gone = skip_count(sparsity, len(item.prompt))
        shorter.append(Item(item.prompt[:1] + item.prompt[1 + gone :], item.continuation))
    return evaluate_shortened(stack, kept, shorter)


def evaluate_shortened(stack: BlockStack, items: Sequence[Any], shorter: Sequence[Any]) -> Evaluation:
    """Likelihood of continuations behind other prompts, ``shorter``, than those of ``items``, whose work is that of the dense model."""
    found = evaluate_path(stack, shorter)
    dense = sum(dense_work(stack, len(item.tokens) - 1) for item in items_of(items, stack))
    return Evaluation(found.nats, found.tokens, found.work, dense, found.following, None, found.item_nats)


def calibration_loss(skipper: TokenSkipper, items: Sequence[Any]) -> float:
    """Nats per token of the continuations behind pruned prompts: what a search for a schedule makes small."""
    return evaluate_items(skipper, items).nats_per_token


@torch.no_grad()
def dense_states(stack: BlockStack, items: Sequence[Any]) -> list[Tensor]:
    """Of each item the last states, ``[C, D]``, from which the dense model predicts its continuation."""
    states = []
    for item in items_of(items, stack):
        token_1L = torch.tensor([item.tokens[:-1]], device=stack.device)
        with evaluating(stack.module):
            x_1LD, state = stack.embed(token_1L)
            for layer in range(stack.num_blocks):
                x_1LD = stack.block(layer, x_1LD, state)
        states.append(x_1LD[0, len(item.prompt) - 1 :])
    return states


def kl_loss(stack: BlockStack, items: Sequence[Any]) -> Callable[[TokenSkipper], float]:
    """The loss of a skipper: mean KL divergence of the pruned model's next tokens from the dense model's, over the continuations.

    The dense model runs once; its last states are kept.
    """
    kept = items_of(items, stack)
    states = dense_states(stack, kept)

    @torch.no_grad()
    def loss(skipper: TokenSkipper) -> float:
        total, tokens = 0.0, 0
        for item, x_CD in zip(kept, states, strict=True):
            prefilled = skipper.prefill([item.prompt])
            logits_CV = prefilled.logits_BV
            if len(item.continuation) > 1:
                logits_CV = torch.cat((logits_CV, skipper.decode([item.continuation[:-1]], prefilled)[0]))
            _, state = stack.embed(torch.tensor([item.continuation], device=stack.device))
            dense_CV = stack.head(x_CD.unsqueeze(0), state)[0].float().log_softmax(-1)
            ours_CV = logits_CV.float().log_softmax(-1)
            total += float(F.kl_div(ours_CV, dense_CV, log_target=True, reduction="sum"))
            tokens += len(item.continuation)
        return total / tokens

    return loss


@torch.no_grad()
def perplexity(skipper: TokenSkipper, ids: Any) -> float:
    """Perplexity of text while its own tokens are skipped, in one pass.

    Raises ConfigError unless nothing is skipped (or whole blocks), or all decisions look at earlier tokens alone: a router that learned
    with causal factors (``FactorConfig(causal=True)``), in ``threshold`` mode. Others know later tokens, or how many there are, and the
    number would be wrong. InputError for fewer than two tokens.
    """
    if any(0 < sparsity < 1 for sparsity in skipper.schedule):
        is_causal = isinstance(skipper.router, TokenRouter) and (
            skipper.factors.causal or not skipper.router.needs_scores
        )
        if not is_causal or skipper.mode != "threshold":
            raise ConfigError(
                "this skipper decides about a token by later ones, so the likelihood of pruned text would leak its future; use "
                "evaluate(prompt, continuation), or a router with FactorConfig(causal=True) and mode='threshold'"
            )
    token_BL = check_tokens(ids, skipper.stack)
    if token_BL.shape[1] < 2:
        raise InputError(f"there are {token_BL.shape[1]} tokens in a row; perplexity needs at least 2")
    prefilled = skipper.prefill(token_BL[:, :-1])
    logits_BLV = skipper.uncached(prefilled)
    nats = F.cross_entropy(logits_BLV.flatten(0, 1).float(), token_BL[:, 1:].flatten())
    if not bool(nats.isfinite()):
        raise NotFiniteError("the pruned model gives logits that are not numbers: check the model's weights")
    return math.exp(min(float(nats), 700.0))
