"""Routers at work on prompts: decisions made while a prompt goes through the model, or anew for every token behind it."""
# Shapes: N sequences, B of them at once, L positions or blocks, D width, V vocabulary, C decisions

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anabranch.depth.decisions import path_of
from anabranch.depth.dr_llm.bank import RouterBank
from anabranch.depth.dr_llm.runner import padded
from anabranch.depth.dr_llm.windows import pool_windows
from anabranch.depth.routed import PLAIN, Decider, routed_pass
from anabranch.depth.stack import BlockStack, run_path
from anabranch.errors import ConfigError

__all__ = ["Decided", "FirstLayer", "check_bank", "decide_prompts", "logits_after", "route_steps"]


@dataclass(frozen=True)
class Decided:
    """What routers decided.

    Attributes:
        decision_NL: int64, for each prompt and block.
        probability_NLC: float32, after the control.
        router_s: seconds that they took.
    """

    decision_NL: Tensor
    probability_NLC: Tensor
    router_s: float

    @property
    def paths(self) -> list[tuple[int, ...]]:
        """The blocks that each prompt runs."""
        return [path_of(row) for row in self.decision_NL.tolist()]


class FirstLayer:
    """A bank whose routers all see the states before the first block: the baseline of the paper's Table on features.

    One pass at a time: it remembers what the first block was asked with.
    """

    def __init__(self, bank: RouterBank) -> None:
        self._bank = bank
        self._seen: tuple[Tensor, Tensor] | None = None

    def decide(
        self, layer: int, x_BLD: Tensor, mask_BL: Tensor | None, control: float = PLAIN
    ) -> tuple[Tensor, Tensor]:
        """As `RouterBank.decide`."""
        if layer == 0:
            self._seen = pool_windows(x_BLD, mask_BL, self._bank.windows)
        if self._seen is None or len(self._seen[0]) != len(x_BLD):
            raise ConfigError("routers that see the states before the first block are asked from block 0 on")
        return self._bank.decide_on(layer, *self._seen, control)


def check_bank(bank: RouterBank, stack: BlockStack) -> None:
    """Raise ConfigError, with both values, for routers of a model of another depth, width or content."""
    wanted: list[tuple[str, Any, Any]] = [
        ("blocks", bank.num_blocks, stack.num_blocks),
        ("width", bank.width, stack.width),
    ]
    if bank.config.fingerprint:
        wanted.append(("fingerprint", bank.config.fingerprint, stack.fingerprint()))
    for what, theirs, ours in wanted:
        if theirs != ours:
            raise ConfigError(f"the routers are of a model with {what} {theirs}, and this one has {ours}")


def _decider(bank: RouterBank) -> Decider:
    return FirstLayer(bank) if bank.config.features == "first" else bank


@torch.no_grad()
def decide_prompts(
    stack: BlockStack,
    bank: RouterBank,
    prompts: Sequence[Sequence[int]],
    control: float = PLAIN,
    *,
    batch_size: int = 8,
) -> Decided:
    """Decisions on all blocks for each prompt.

    Args:
        stack: of the model, in evaluation.
        bank: its routers; also ones that see the states before the first block alone.
        prompts: tokens.
        control: the knob.
        batch_size: prompts at once.

    Raises as `RouterBank.decide`, and ConfigError for routers of another model or a prompt without tokens.
    """
    check_bank(bank, stack)
    if not prompts or not all(map(len, prompts)):
        raise ConfigError(
            "a prompt has no tokens, or there is none, so that routers see nothing; give at least one token each"
        )
    made = []
    for start in range(0, len(prompts), batch_size):
        token_BL, mask_BL = padded(prompts[start : start + batch_size], stack.device)
        made.append(
            routed_pass(stack, _decider(bank), token_BL, attention_mask=mask_BL, control=control, last_only=True)
        )
    return Decided(
        torch.cat([one.decision_BN for one in made]),
        torch.cat([one.probability_BN3 for one in made]),
        sum(one.router_s for one in made),
    )


@torch.no_grad()
def route_steps(
    stack: BlockStack, bank: RouterBank, prompt: Sequence[int], after: Sequence[int], control: float = PLAIN
) -> tuple[Tensor, Tensor]:
    """Decisions anew for every token, as the reference's code makes them: the prompt goes in whole, then token after token.

    Args:
        stack: of the model, in evaluation.
        bank: its routers.
        prompt: tokens.
        after: tokens that follow, each of which goes in alone but the last, which is only foretold.
        control: the knob.

    Returns (logits_LV that foretell each of ``after``, decision_SN of each pass, that of the prompt first). Raises as `decide_prompts`.
    """
    check_bank(bank, stack)
    if not len(after):
        raise ConfigError("nothing follows the prompt; give at least one token")
    cache = stack.new_cache(len(prompt) + len(after))
    decider, logits, decisions = _decider(bank), [], []
    for tokens in (list(prompt), *([token] for token in after[:-1])):
        token_BL = torch.tensor([tokens], device=stack.device)
        made = routed_pass(stack, decider, token_BL, cache=cache, control=control, last_only=True)
        logits.append(made.logits_BLV[0, -1])
        decisions.append(made.decision_BN[0])
    return torch.stack(logits), torch.stack(decisions)


@torch.no_grad()
def logits_after(
    stack: BlockStack, prompt: Sequence[int], after: Sequence[int], path: Sequence[int] | None = None
) -> Tensor:
    """``[len(after), V]``: what the model foretells of each token of ``after`` on a path (None: the whole model), in one pass."""
    token_BL = torch.tensor([[*prompt, *after[:-1]]], device=stack.device)
    return run_path(stack, token_BL, None if path is None else tuple(path))[0, len(prompt) - 1 :]
