"""How likely held-out answers are, and whether they are likelier than wrong choices: what an evaluation of `AdaptTask` gives."""
# Shapes: B rows, M tokens of answers, X wrong choices

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from anabranch.adapters.adapt.answers import IGNORED, Rows, mean_of_rows
from anabranch.adapters.adapt.choices import likeliest, wrong_choices

__all__ = ["Evaluation"]


class Evaluation:
    """Passes over rows, without any learning.

    Args:
        model: an `Answers`, or what wraps one.
        given: the arguments of a pass over rows.
        batch_size: rows of a pass.
        most_tokens: of a row.
    """

    def __init__(
        self, model: Any, given: Callable[[Rows], dict[str, Any]], *, batch_size: int, most_tokens: int
    ) -> None:
        self.model, self.given, self.batch_size, self.most_tokens = model, given, batch_size, most_tokens

    def measured(
        self, data: tuple[Tensor, ...], names: Sequence[str], on_rows: Callable[[int, int], None]
    ) -> dict[str, Any]:
        """Nats per token of answers: of all, and of each task (``by_task``: nats_per_token, tokens, rows).

        Where wrong choices are learned, ``choice_accuracy`` too: of the rows that have some, the share whose answer is likelier, token by
        token on average, than all of them.

        Args:
            data: (token_NL, start_N, length_N, task_N), and those of wrong choices where they are learned.
            names: of the tasks, by their numbers; -1 is a row of a task that is not learned.
            on_rows: called with the rows that are done, and all.
        """
        # Rows of tasks that are not learned stand behind all others.
        totals = torch.zeros(3, len(names) + 1, dtype=torch.float64)
        done, preferred = 0, []
        for row_B in data[2].argsort(stable=True).split(self.batch_size):
            on_rows(done, len(data[2]))
            done += len(row_B)
            token_BL, start_B, length_B, task_B, *choices = (tensor[row_B] for tensor in data)
            rows = token_BL, start_B, length_B, task_B
            nats_M, row_M = self._nats(rows)
            if choices:
                preferred.append(self._preferred(rows, choices, mean_of_rows(nats_M, row_M, len(row_B))))
            row_M = row_M.cpu()
            own_B = task_B.cpu() % totals.shape[1]
            totals[0].index_add_(0, own_B[row_M], nats_M.double().cpu())
            totals[1].index_add_(0, own_B[row_M], torch.ones(len(row_M), dtype=torch.float64))
            totals[2].index_add_(0, own_B, torch.ones(len(own_B), dtype=torch.float64))
        nats, tokens, _ = totals.sum(1).tolist()
        by_task = {
            name: {"nats_per_token": nats / tokens, "tokens": int(tokens), "rows": int(rows)}
            for name, (nats, tokens, rows) in zip(names, totals.T.tolist(), strict=False)
            if tokens and name
        }
        found = {"nats_per_token": nats / max(tokens, 1), "tokens": int(tokens), "by_task": by_task}
        is_right_X = torch.cat(preferred) if preferred else torch.zeros(0)
        return found | ({"choice_accuracy": float(is_right_X.double().mean())} if len(is_right_X) else {})

    def _nats(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """(-log p of each token of answers, its row)."""
        given = self.given(rows)
        nats_M, *_ = self.model(**given)
        return nats_M, (given["target_BL"] != IGNORED).nonzero()[:, 0]

    def _preferred(self, rows: Rows, choices: Sequence[Tensor], right_B: Tensor) -> Tensor:
        """bool: of the rows that have wrong choices, whether the answer is preferred; ``right_B`` are its nats per token."""
        wrong = wrong_choices(rows[0], rows[1], choices[0], choices[1], self.most_tokens)
        if wrong is None:
            return torch.zeros(0, dtype=torch.bool)
        found = []
        for some_X in torch.arange(len(wrong.row_X), device=rows[0].device).split(self.batch_size):
            of_some = (
                wrong.token_XL[some_X],
                wrong.start_X[some_X],
                wrong.length_X[some_X],
                rows[3][wrong.row_X[some_X]],
            )
            nats_M, row_M = self._nats(of_some)
            found.append(mean_of_rows(nats_M, row_M, len(some_X)))
        is_right_B = likeliest(right_B, torch.cat(found), wrong.row_X)
        return is_right_B[wrong.row_X.unique()].cpu()
