"""Routers beside what they have to beat: baselines at the same number of layers, and the whole range of the control knob."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from anabranch.depth.dr_llm.bank import RouterBank
from anabranch.depth.dr_llm.baselines import early_exit, random_skip, shortgpt
from anabranch.depth.dr_llm.evaluate import Measured, Reference, measure, measure_paths, reference_of
from anabranch.depth.dr_llm.questions import Question
from anabranch.depth.influence import block_influence
from anabranch.depth.routed import PLAIN
from anabranch.depth.stack import BlockStack
from anabranch.lm.generate import evaluating

__all__ = ["BASELINES", "CONTROLS", "baselines_at", "compare"]

BASELINES = ("random", "shortgpt", "early_exit")
# Of the curve: from fewer layers than the router takes to nearly the whole model. From -0.75 down every block is skipped, from 0 up none
# is, whatever routers say.
CONTROLS = (-0.65, -0.6, -0.55, PLAIN, -0.4, -0.25, 0.0)

Progress = Callable[[str], None]


def influence_of(stack: BlockStack, questions: Sequence[Question], limit: int = 64) -> list[float]:
    """Block influence over some prompts, for the baseline that removes the same blocks always.

    Args:
        stack: of the model.
        questions: for calibration, not those that are measured.
        limit: the most prompts.
    """
    with evaluating(stack.module), torch.no_grad():
        return block_influence(stack, (torch.tensor([question.prompt]) for question in questions[:limit]))


def baselines_at(
    stack: BlockStack,
    questions: Sequence[Question],
    mean_layers: float,
    influence: Sequence[float],
    *,
    reference: Reference | None = None,
    seed: int = 0,
) -> dict[str, Measured]:
    """Each of `BASELINES` at a mean number of layers per token, at most that of the whole model."""
    count, num_blocks = len(questions), stack.num_blocks
    # As `measure_paths` counts layers: over all tokens that go through the model.
    tokens = [len(question.prompt) + len(question.answer) - 1 for question in questions]
    mean_layers = min(mean_layers, num_blocks)
    paths = {
        "random": random_skip(num_blocks, mean_layers, count, seed=seed, tokens=tokens),
        "shortgpt": shortgpt(influence, mean_layers, count, seed=seed, tokens=tokens),
        "early_exit": early_exit(num_blocks, mean_layers, count, seed=seed, tokens=tokens),
    }
    return {name: measure_paths(stack, questions, own, reference=reference) for name, own in paths.items()}


def compare(
    stack: BlockStack,
    questions: Sequence[Question],
    bank: RouterBank,
    calibration: Sequence[Question],
    *,
    controls: Sequence[float] = CONTROLS,
    seed: int = 0,
    progress: Progress = lambda text: None,
) -> dict[str, Any]:
    """Routers at each control, and baselines at the layers that the router takes and at each control's.

    Args:
        stack: of the model.
        questions: that are measured.
        bank: of the model.
        calibration: prompts by which blocks are ranked; the questions themselves where there are no others.
        controls: of the curve.
        seed: of baselines.
        progress: is told what is being done.

    Gives ``influence`` of each block, ``curve`` (a row per control: ``control``, ``routed``, and each baseline), all of `Measured.to_dict`.
    """
    progress("the whole model")
    reference = reference_of(stack, questions)
    influence = influence_of(stack, calibration)
    curve = []
    for control in sorted({*controls, PLAIN}):
        progress(f"control {control:g}")
        routed = measure(stack, questions, bank, control=control, reference=reference)
        beside = baselines_at(stack, questions, routed.layers_per_token, influence, reference=reference, seed=seed)
        curve.append(
            {
                "control": control,
                "routed": routed.to_dict(),
                **{name: measured.to_dict() for name, measured in beside.items()},
            }
        )
    return {"influence": influence, "curve": curve}
