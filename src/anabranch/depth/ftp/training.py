"""Step 2 of FTP: the router learns while the model is frozen.

    x_{i+1} = G_1 B_i(x_i) + G_0 x_i        G = what was decided, with the gradient of the softmax
    loss = lambda_d L_d + lambda_s L_s + lambda_g L_g

    L_d   distance of the last states from those of the dense model: MSE of RMS-normalised states, or KL of the next tokens
    L_s   sum over blocks of |s_i - share passed over|; one-sided as in the paper, max(s_i - share, 0), if asked
    L_g   cross-entropy to what the static router decides; its weight falls linearly to 0 over the first half of the steps

Keys of tokens that are passed over are masked: nobody sees them but the token itself, as it would if it were computed. So the pass gives
exactly what gathering, running and scattering gives, and a gradient beside it.
"""
# Shapes: one sequence, L positions, D width, I blocks

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.config import Config, Field, configclass
from anabranch.depth.ftp.cache import Attending, BlockCache
from anabranch.depth.ftp.decider import Decider, Schedule
from anabranch.depth.ftp.features import FactorConfig, ScoreTable
from anabranch.depth.ftp.items import Item, items_of
from anabranch.depth.ftp.passes import Kept
from anabranch.depth.ftp.router import COMPUTE, PASS_OVER, TokenRouter, decide, straight_through
from anabranch.depth.ftp.schedule import check_schedule
from anabranch.depth.ftp.static import first_of, static_keep
from anabranch.depth.gathered import GatheredBlocks, gathered
from anabranch.depth.stack import BlockStack, stack_of
from anabranch.errors import NotFiniteError
from anabranch.lm.generate import evaluating

__all__ = ["DECODE_LIMIT", "GatedPass", "TrainingConfig", "frozen", "gated_pass", "sparsity_loss", "train_router"]

# A token that is decoded is passed over where the block passes over more than this.
DECODE_LIMIT = 0.5


@configclass
class TrainingConfig(Config):
    """How the router learns.

    Attributes:
        steps: of one sequence each.
        learning_rate: at the start; it falls to 0 by a cosine.
        weight_decay: of AdamW.
        distance: L_d: ``states`` or ``kl``.
        lambda_d, lambda_s, lambda_g: weights of the losses; the last is what it is at the start.
        guided: share of the steps over which lambda_g falls to 0.
        two_sided: L_s counts what is passed over beyond the target too.
        clip: most norm of the gradient.
    """

    steps: int = Field(default=2000, ge=1, le=10**7)
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    weight_decay: float = Field(default=0.01, ge=0)
    distance: Literal["states", "kl"] = "states"
    lambda_d: float = Field(default=1.0, ge=0)
    lambda_s: float = Field(default=1.0, ge=0)
    lambda_g: float = Field(default=1.0, ge=0)
    guided: float = Field(default=0.5, ge=0, le=1)
    two_sided: bool = True
    clip: float = Field(default=1.0, gt=0)


@dataclass(frozen=True)
class GatedPass:
    """What a pass with gates gave.

    Attributes:
        x_1LD: behind the last block.
        share_I: of each block that decides, the share of the prompt that it passes over, with a gradient.
        target_I: the sparsities of these blocks.
        guide: L_g, a mean over tokens and blocks.
        keep_IL: what each of all blocks computed.
    """

    x_1LD: Tensor
    share_I: Tensor
    target_I: Tensor
    guide: Tensor
    keep_IL: Tensor


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of the model wants a gradient; afterwards those do that did."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def sparsity_loss(share_I: Tensor, target_I: Tensor, *, two_sided: bool = True) -> Tensor:
    """L_s: 0 if and only if each block passes over its target, or, one-sided, at least as much."""
    missing_I = target_I - share_I
    return (missing_I.abs() if two_sided else missing_I.clamp_min(0)).sum()


def gated_pass(
    blocks: GatheredBlocks, decider: Decider, x_1LD: Tensor, prompt_length: int, *, kv: Kept = "drop"
) -> GatedPass:
    """One sequence through all blocks, the router deciding by the greater score, with a gradient for it.

    Args:
        blocks: of a stack whose parameters want no gradient.
        decider: with the router, for the tokens of the prompt.
        x_1LD: what goes into the first block.
        prompt_length: tokens that the router decides about; those behind them are computed where the block passes over at most half.
        kv: what happens to keys and values of tokens that are passed over.
    """
    length, device = x_1LD.shape[1], x_1LD.device
    position_1L = torch.arange(length, device=device).unsqueeze(0)
    table, kept, shares, targets, guides = ScoreTable(), [], [], [], []
    for layer, sparsity in enumerate(decider.schedule):
        behind = torch.full((1, length - prompt_length), sparsity <= DECODE_LIMIT, device=device)
        gate_1L2 = None
        if 0 < sparsity < 1:
            score_1N2 = decider.scores(layer, x_1LD[:, :prompt_length], table)
            keep_1N = decide(score_1N2, decider.real_BL, sparsity, "threshold")
            gate_1L2 = _gates(score_1N2, keep_1N, behind)
            shares.append(gate_1L2[0, :prompt_length, PASS_OVER].mean())
            targets.append(sparsity)
            guides.append(_guide(score_1N2, decider.real_BL, sparsity))
        else:
            keep_1N = decider(layer, x_1LD[:, :prompt_length], table)
        keep_1L = torch.cat((keep_1N, behind), dim=1)
        kept.append(keep_1L)
        if gate_1L2 is None and not bool(keep_1L.any()):
            continue
        y_1LD, score_1N = _computed(blocks, layer, x_1LD, position_1L, keep_1L, prompt_length, decider, kv)
        if score_1N is not None:
            table.update(score_1N, keep_1N)
        if gate_1L2 is None:
            # Here the router has no say; what it does not compute is as it was.
            x_1LD = torch.where(keep_1L.unsqueeze(2), y_1LD, x_1LD)
        else:
            gate_1L2 = gate_1L2.to(x_1LD.dtype)
            x_1LD = gate_1L2[..., COMPUTE, None] * y_1LD + gate_1L2[..., PASS_OVER, None] * x_1LD
    zero = torch.zeros((), device=device)
    return GatedPass(
        x_1LD,
        torch.stack(shares) if shares else zero[None][:0],
        torch.tensor(targets, device=device),
        torch.stack(guides).mean() if guides else zero,
        torch.cat(kept),
    )


def _gates(score_1N2: Tensor, keep_1N: Tensor, behind: Tensor) -> Tensor:
    """``[1, L, 2]``: gates of the prompt, with gradients but for its first token, and those of what comes behind it."""
    gate_1N2 = straight_through(score_1N2, keep_1N)
    # The first token is always computed: that is no decision of the router's.
    gate_1N2 = torch.cat((gate_1N2[:, :1].detach(), gate_1N2[:, 1:]), dim=1)
    return torch.cat((gate_1N2, torch.stack((~behind, behind), dim=-1).to(gate_1N2.dtype)), dim=1)


def _guide(score_1N2: Tensor, real_1N: Tensor, sparsity: float) -> Tensor:
    """Cross-entropy to what the static router decides, of all tokens but the first."""
    decided_1N = real_1N & ~first_of(real_1N)
    if not bool(decided_1N.any()):
        return score_1N2.sum() * 0.0
    return F.cross_entropy(score_1N2[decided_1N], static_keep(real_1N, sparsity)[decided_1N].long())


def _computed(
    blocks: GatheredBlocks,
    layer: int,
    x_1LD: Tensor,
    position_1L: Tensor,
    keep_1L: Tensor,
    prompt_length: int,
    decider: Decider,
    kv: Kept,
) -> tuple[Tensor, Tensor | None]:
    """(what the block would give each token, new scores of the prompt's tokens, if wanted)."""
    counted_1L = keep_1L.clone()
    counted_1L[:, prompt_length:] = False
    itself_LL = torch.eye(keep_1L.shape[1], dtype=torch.bool, device=keep_1L.device)
    hides = kv == "drop" and not bool(keep_1L.all())
    attend = Attending(
        BlockCache(),
        position_1L,
        wants_scores=decider.wants_scores(layer),
        queries_BK=counted_1L,
        keys_BK=counted_1L if kv == "drop" else None,
        own_only=decider.factors.causal,
        allowed=(lambda mask_1LL: mask_1LL & (keep_1L.unsqueeze(1) | itself_LL)) if hides else None,
    )
    y_1LD = blocks.run(layer, x_1LD, position_1L, attend)
    return y_1LD, None if attend.score_BK is None else attend.score_BK[:, :prompt_length]


def train_router(
    model: Any,
    items: Sequence[Any],
    schedule: Sequence[float],
    *,
    router: TokenRouter | None = None,
    config: TrainingConfig | None = None,
    factors: FactorConfig | None = None,
    one_pass: bool = False,
    kv: Kept = "drop",
    seed: int = 0,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> tuple[TokenRouter, list[dict[str, float]]]:
    """A router that has learned, and the losses of each step.

    Args:
        model: or its stack; nothing in it changes.
        items: `Item`, or pairs of (prompt, continuation) ids; a continuation may be empty. Drawn in rounds, each in a new order.
        schedule: the sparsity of each block; that of the first counts as 0.
        router: to go on with; it changes. None for a new one.
        config: how it learns.
        factors: constants of what it looks at.
        one_pass: it decides about all blocks behind the first one.
        kv: what happens to keys and values of tokens that are passed over.
        seed: of the weights and the order.
        on_step: told of each step and its losses.

    Raises ConfigError for a wrong schedule, DataError for no items, NotFiniteError where a loss is no number.
    """
    stack, config = stack_of(model), config or TrainingConfig()
    blocks, learned = gathered(stack), items_of(items, stack, needs_continuation=False)
    checked = (0.0, *check_schedule(schedule, stack.num_blocks)[1:])
    router = (router or TokenRouter(seed=seed)).to(stack.device)
    router.requires_grad_(True)
    optimizer = torch.optim.AdamW(router.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    history: list[dict[str, float]] = []
    order = _rounds(len(learned), random.Random(seed))
    with frozen(stack.module), evaluating(stack.module), torch.enable_grad():
        for step in range(config.steps):
            item = learned[next(order)]
            losses = _losses(stack, blocks, router, item, checked, config, factors, one_pass, kv)
            guide = config.lambda_g * max(0.0, 1 - step / (config.guided * config.steps)) if config.guided else 0.0
            loss = config.lambda_d * losses["distance"] + config.lambda_s * losses["sparsity"] + guide * losses["guide"]
            if not bool(loss.isfinite()):
                raise NotFiniteError(f"the loss of step {step} is not a number: check the model's weights")
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.steps))
            optimizer.zero_grad(set_to_none=True)
            if loss.requires_grad:
                loss.backward()
                nn.utils.clip_grad_norm_(router.parameters(), config.clip)
                optimizer.step()
            told = {name: float(value.detach()) for name, value in {"loss": loss, **losses}.items()}
            history.append(told)
            if on_step is not None:
                on_step(step, told)
    router.requires_grad_(False)
    return router.eval(), history


def _rounds(count: int, draw: random.Random) -> Iterator[int]:
    """Numbers below ``count``, all of them in a new order, again and again."""
    while True:
        yield from draw.sample(range(count), count)


def _losses(
    stack: BlockStack,
    blocks: GatheredBlocks,
    router: TokenRouter,
    item: Item,
    schedule: Schedule,
    config: TrainingConfig,
    factors: FactorConfig | None,
    one_pass: bool,
    kv: Kept,
) -> dict[str, Tensor]:
    """The three losses of an item, and how much was passed over."""
    token_1L = torch.tensor([item.tokens], device=stack.device)
    real_1N = torch.ones(1, len(item.prompt), dtype=torch.bool, device=stack.device)
    with torch.no_grad():
        x_1LD, state = stack.embed(token_1L)
        dense_1LD = x_1LD
        for layer in range(stack.num_blocks):
            dense_1LD = stack.block(layer, dense_1LD, state)
    decider = Decider(router, schedule, real_1N, mode="threshold", factors=factors, one_pass=one_pass)
    # A prompt of one token is never pruned.
    prompt_length = len(item.prompt)
    made = gated_pass(blocks, decider, x_1LD, prompt_length, kv=kv)
    return {
        "distance": _distance(stack, made.x_1LD, dense_1LD, state, config.distance),
        "sparsity": sparsity_loss(made.share_I, made.target_I, two_sided=config.two_sided),
        "guide": made.guide,
        "achieved": (~made.keep_IL[:, :prompt_length]).float().mean(),
    }


def _distance(stack: BlockStack, x_1LD: Tensor, dense_1LD: Tensor, state: Any, kind: Literal["states", "kl"]) -> Tensor:
    """L_d."""
    if kind == "states":
        return F.mse_loss(_normalised(x_1LD), _normalised(dense_1LD))
    ours_1LV, dense_1LV = (stack.head(one, state).float().log_softmax(-1) for one in (x_1LD, dense_1LD))
    return F.kl_div(ours_1LV, dense_1LV.detach(), log_target=True, reduction="none").sum(-1).mean()


def _normalised(x_1LD: Tensor) -> Tensor:
    x_1LD = x_1LD.float()
    return x_1LD * torch.rsqrt(x_1LD.square().mean(-1, keepdim=True) + 1e-6)
