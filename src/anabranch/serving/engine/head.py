"""`StepHead`: logits of rows of a step, which came of one pass or several; a head that routes is told which items they are."""
# Shapes: R rows that sample or score, M of them with or without adapters, D width, V vocabulary

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.lm.decoder import Decoder
from anabranch.nn.context import ForwardContext
from anabranch.nn.linear import takes_context
from anabranch.serving.engine.served_adapters import ServedAdapters
from anabranch.serving.engine.steady import steady
from anabranch.serving.engine.ways import Ways

__all__ = ["RowsOfPass", "StepHead"]


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


class StepHead:
    """The head of a model, for one step at a time.

    Args:
        model: the model.
        ways: how requests run it.
        is_steady: see `anabranch.serving.engine.steady`.
    """

    def __init__(self, model: Decoder, ways: Ways, *, is_steady: bool = False) -> None:
        self._model, self._ways, self._is_steady = model, ways, is_steady
        # All of the step under way, for a head that routes.
        self._passes: list[RowsOfPass] = []

    def begin(self) -> None:
        """A step begins; one that failed may have left its passes."""
        self._passes = []

    def ran(self, context: ForwardContext, numbers: Sequence[int], rows: Sequence[int]) -> None:
        """A pass has run; see `RowsOfPass`."""
        if takes_context(self._model.head):
            self._passes.append(RowsOfPass(context, list(numbers), list(rows)))

    def plain(self, x_RD: Tensor, first: int = 0) -> Tensor:
        """logits_RV of hidden states of the step, from the ``first`` on."""
        # A listener may have come or gone since the layers ran, so hidden states are of either path.
        fast = self._ways.compiled()
        if fast is not None:
            return fast.logits(x_RD.float())
        with steady(self._model) if self._is_steady else nullcontext():
            return _logits_of(self._model, x_RD.to(self._model.embedding.weight.dtype), first, self._passes)

    def adapted(self, x_RD: Tensor, first: int, *, adapters: ServedAdapters, ids: Sequence[str]) -> Tensor:
        """The same with what adapters add to it; ``ids`` are the requests of all rows of the step."""
        ids = ids[first : first + len(x_RD)]
        groups = [[row for row, id in enumerate(ids) if adapters.is_of(id) == is_own] for is_own in (False, True)]
        if self._ways.compiled() is not None or takes_context(self._model.head) or not all(groups):
            # Rows are computed apart by itself, or there is nothing to be apart from.
            logits_RV = self.plain(x_RD, first)
        else:
            made = [self.plain(x_RD[rows]) for rows in groups]
            logits_RV = made[0].new_empty(len(ids), made[0].shape[-1])
            for rows, made_MV in zip(groups, made, strict=True):
                logits_RV[rows] = made_MV
        return adapters.add_to_head(logits_RV, x_RD, ids)


def _logits_of(model: Decoder, x_RD: Tensor, first: int, passes: Sequence[RowsOfPass]) -> Tensor:
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
