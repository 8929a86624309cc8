"""The head of a step: logits of rows of one pass or several, where a head that routes is told which items they are."""
# Shapes: R rows that sample or score, D width, V vocabulary

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.lm.decoder import Decoder
from anabranch.nn.context import ForwardContext
from anabranch.nn.linear import takes_context


@dataclass(frozen=True)
class RowsOfPass:
    """The rows of a step that one forward pass made.

    Attributes:
        context: of the pass.
        numbers: which of the step's rows they are.
        rows: where in the pass each of them is.
    """

    context: ForwardContext
    numbers: Sequence[int]
    rows: Sequence[int]


def logits_of(model: Decoder, x_RD: Tensor, first: int, passes: Sequence[RowsOfPass]) -> Tensor:
    """logits_RV of the rows of a step from the ``first`` on, which came of ``passes``."""
    if not takes_context(model.head):
        return model.logits(x_RD[None])[0]
    logits_RV: Tensor | None = None
    for of_pass in passes:
        found = [
            (number - first, row)
            for number, row in zip(of_pass.numbers, of_pass.rows, strict=True)
            if first <= number < first + len(x_RD)
        ]
        if not found:
            continue
        number_W, row_W = torch.tensor(found, device=x_RD.device).T
        # Rows that are scored come in several calls: each is the first of the pass for what is in the head.
        made_WV = model.logits(x_RD[number_W][None], of_pass.context.trial(), keep_L=row_W)[0]
        if logits_RV is None:
            logits_RV = made_WV.new_empty(len(x_RD), made_WV.shape[-1])
        logits_RV[number_W] = made_WV
    return x_RD.new_empty(0, model.config.vocab_size) if logits_RV is None else logits_RV
