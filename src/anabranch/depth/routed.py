"""One pass in which routers decide, block by block, which sequences pass it over, run it, or run it twice (Dr.LLM, arXiv 2510.12773)."""
# Shapes: B sequences, L new positions, N blocks, D width, V vocabulary

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from anabranch.depth.decisions import EXECUTE, REPEAT
from anabranch.depth.stack import BlockStack
from anabranch.errors import ConfigError
from anabranch.lm.cache import KeyValueCache

__all__ = ["PLAIN", "Decider", "RoutedBlocks", "RoutedPass", "check_control", "routed_blocks", "routed_pass"]

# The control at which the routers' own decisions stand.
PLAIN = -0.5


class Decider(Protocol):
    """What decides; `anabranch.depth.dr_llm.RouterBank` is one."""

    def decide(self, layer: int, x_BLD: Tensor, mask_BL: Tensor, control: float) -> tuple[Tensor, Tensor]:
        """(decision_B, int64, 0 to skip the block, 1 to run it, 2 to run it twice; probability_B3 of these).

        Args:
            layer: number of the block.
            x_BLD: what would go into it.
            mask_BL: bool, False for padding.
            control: -1 skips all, -0.5 is the router's own decision, 0.5 runs each once, 1 repeats all; in between they are mixed.
        """


@dataclass(frozen=True)
class RoutedPass:
    """What a routed pass gives.

    Attributes:
        logits_BLV: of all new positions, or of the last one.
        decision_BN: int64, on the CPU.
        probability_BN3: of the decisions that there are, on the CPU.
        router_s: seconds that the routers took.
    """

    logits_BLV: Tensor
    decision_BN: Tensor
    probability_BN3: Tensor
    router_s: float


@dataclass(frozen=True)
class RoutedBlocks:
    """What `routed_blocks` gives.

    Attributes:
        x_BLD: behind the last block, before the last norm.
        decision_BN, probability_BN3, router_s: as of `RoutedPass`.
    """

    x_BLD: Tensor
    decision_BN: Tensor
    probability_BN3: Tensor
    router_s: float


def check_control(control: Any) -> float:
    """The control as a float. Raises ConfigError unless it is a number from -1 to 1."""
    if isinstance(control, bool) or not isinstance(control, int | float) or not -1 <= control <= 1:
        raise ConfigError(
            f"control is {control!r}; it must be a number from -1 (skip all) to 1 (repeat all); -0.5 is the routers' own decision"
        )
    return float(control)


def routed_pass(
    stack: BlockStack,
    bank: Decider,
    token_BL: Tensor,
    *,
    attention_mask: Tensor | None = None,
    cache: KeyValueCache | None = None,
    control: float = PLAIN,
    last_only: bool = False,
) -> RoutedPass:
    """Run the model as routers decide: those that decide alike about a block run it together, and whoever repeats it runs it once more.

    Args:
        stack: of the model.
        bank: the routers.
        token_BL: int64, the new positions; the routers see these.
        attention_mask: as of `BlockStack.embed`. Padding reaches no router.
        cache: likewise; it is extended.
        control: see `Decider.decide`.
        last_only: logits of the last position alone.

    Raises ConfigError for a control outside -1 to 1, and for a decision that is none.
    """
    control = check_control(control)
    x_BLD, state = stack.embed(token_BL, attention_mask, cache=cache)
    mask_BL = torch.ones_like(token_BL, dtype=torch.bool) if attention_mask is None else attention_mask.bool()

    def run(layer: int, x_BLD: Tensor, rows: list[int]) -> Tensor:
        return stack.block(layer, x_BLD, state, rows=rows)

    made = routed_blocks(bank, stack.num_blocks, x_BLD, mask_BL.to(x_BLD.device), run, control=control)
    logits_BLV = stack.head(made.x_BLD, state, last_only=last_only)
    return RoutedPass(logits_BLV, made.decision_BN, made.probability_BN3, made.router_s)


def routed_blocks(
    bank: Decider,
    num_blocks: int,
    x_BLD: Tensor,
    mask_BL: Tensor,
    run: Callable[[int, Tensor, list[int]], Tensor],
    *,
    control: float = PLAIN,
    most: int | None = None,
) -> RoutedBlocks:
    """All blocks as routers decide: what `routed_pass` does between embedding and head, for whoever runs blocks in another way.

    Args:
        bank: the routers.
        num_blocks: N.
        x_BLD: what would go into the first block.
        mask_BL: bool, False for padding.
        run: ``(layer, x_BLD, rows) -> x_BLD`` behind a visit by these sequences.
        control: see `Decider.decide`.
        most: visits that a sequence may have, at least N; a block is run once instead of twice where those that follow would have no room.
            None for no limit.

    Raises ConfigError for a decision that is none.
    """
    decisions, probabilities, router_s = [], [], 0.0
    used = [0] * len(x_BLD)
    for layer in range(num_blocks):
        started = _now(x_BLD)
        decision_B, probability_B3 = bank.decide(layer, x_BLD, mask_BL, control)
        times = decision_B.tolist()
        router_s += time.perf_counter() - started
        _check(times, layer, len(x_BLD))
        if most is not None:
            behind = num_blocks - layer - 1
            times = [
                min(wanted, EXECUTE) if before + wanted + behind > most else wanted
                for before, wanted in zip(used, times, strict=True)
            ]
        used = [before + wanted for before, wanted in zip(used, times, strict=True)]
        for visit in (EXECUTE, REPEAT):
            rows = [row for row, wanted in enumerate(times) if wanted >= visit]
            if rows:
                x_BLD = run(layer, x_BLD, rows)
        decisions.append(torch.tensor(times))
        probabilities.append(probability_B3.float().cpu())
    return RoutedBlocks(x_BLD, torch.stack(decisions, 1), torch.stack(probabilities, 1), router_s)


def _now(x_BLD: Tensor) -> float:
    """Seconds; on an accelerator, when it has done what it was told before."""
    if x_BLD.device.type == "cuda":
        torch.cuda.synchronize(x_BLD.device)
    return time.perf_counter()


def _check(times: list[int], layer: int, batch: int) -> None:
    wrong = next((one for one in times if one not in (0, EXECUTE, REPEAT)), None)
    if wrong is not None or len(times) != batch:
        found = f"{wrong!r}" if wrong is not None else f"{len(times)} decisions on {batch} sequences"
        raise ConfigError(f"the router of block {layer} decided {found}; it must be 0, 1 or 2 for each sequence")
