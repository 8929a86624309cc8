"""Wrong choices of a row, and what is learned from them (T-Few, Liu et al. 2022, arXiv 2205.05638, section 3.2).

    unlikelihood         L_UL = -1 / (sum_n T_n) sum_n sum_t log(1 - p(wrong_n,t | prompt, wrong_n,<t))         over the wrong choices n
    length-normalised    L_LN = -log( exp b(right) / (exp b(right) + sum_n exp b(wrong_n)) ),   b(y) = 1/T sum_t log p(y_t | prompt, y_<t)

The paper adds both to the likelihood of the answer, each with factor 1. A row without wrong choices has neither.
"""
# Shapes: B rows, W wrong choices of a row, T tokens of one, X wrong choices of a batch, L positions, M tokens of answers, R rows of a pass

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.adapters.adapt.answers import Rows
from anabranch.adapters.adapt.lesson import Lesson, Seen
from anabranch.adapters.adapt.rows import Row
from anabranch.data import Tokenizer

__all__ = ["Choices", "Wrong", "encoded_choices", "lesson_of_choices", "likeliest", "wrong_choices"]

# 1 - p is at least this, of a p that rounding made 1.
_LEAST = 1e-6


@dataclass(frozen=True)
class Choices:
    """The wrong choices of rows as tokens, with the end of text.

    Attributes:
        token_NWT: int32 ids, padded on the right.
        length_NW: tokens of each; 0 where a row has fewer.
    """

    token_NWT: Tensor
    length_NW: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Both, in this order."""
        return self.token_NWT, self.length_NW


def encoded_choices(rows: Sequence[Row], tokenizer: Tokenizer, most_tokens: int, most_choices: int) -> Choices:
    """Of each row the first ``most_choices`` wrong ones, of which each leaves a token of ``most_tokens`` to the prompt."""
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    said = [
        [(tokenizer.encode(text, parse_special=False) + end)[: most_tokens - 1] for text in row.wrong[:most_choices]]
        for row in rows
    ]
    most = max([1, *map(len, said)])
    longest = max([1, *(len(ids) for of_row in said for ids in of_row)])
    token_NWT = torch.zeros(len(rows), most, longest, dtype=torch.int32)
    length_NW = torch.zeros(len(rows), most, dtype=torch.int64)
    for number, of_row in enumerate(said):
        for place, ids in enumerate(of_row):
            token_NWT[number, place, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
            length_NW[number, place] = len(ids)
    return Choices(token_NWT, length_NW)


@dataclass(frozen=True)
class Wrong:
    """The wrong choices of a batch, each behind its row's prompt.

    Attributes:
        token_XL: int64 ids, padded on the right.
        start_X: where the choice begins.
        length_X: tokens of each.
        row_X: whose it is.
        place_X: which of its row's it is.
    """

    token_XL: Tensor
    start_X: Tensor
    length_X: Tensor
    row_X: Tensor
    place_X: Tensor

    def losses(
        self, nats_M: Tensor, row_M: Tensor, mean_R: Tensor, rows: int, most_choices: int
    ) -> tuple[Tensor, Tensor]:
        """(unlikelihood_B, length-normalised loss_B); 0 for a row that has no wrong choice.

        Args:
            nats_M: of the tokens of answers, in which the X wrong ones are the last of R rows, and the B right ones the first.
            row_M: of each token, the row of the pass.
            mean_R: mean of a row's nats.
            rows: B.
            most_choices: W.
        """
        first = len(mean_R) - len(self.row_X)
        is_wrong_M = row_M >= first
        unlikely_M = -torch.log((1 - (-nats_M[is_wrong_M]).exp()).clamp_min(_LEAST))
        owner_M = self.row_X[row_M[is_wrong_M] - first]
        total_B = nats_M.new_zeros(rows).index_add(0, owner_M, unlikely_M)
        count_B = nats_M.new_zeros(rows).index_add(0, owner_M, torch.ones_like(unlikely_M))
        score_BZ = nats_M.new_full((rows, 1 + most_choices), -torch.inf)
        score_BZ = torch.cat([-mean_R[:rows, None], score_BZ[:, 1:]], 1)
        score_BZ = score_BZ.index_put((self.row_X, 1 + self.place_X), -mean_R[first:])
        return total_B / count_B.clamp_min(1), score_BZ.logsumexp(1) - score_BZ[:, 0]


def wrong_choices(
    token_BL: Tensor, start_B: Tensor, token_BWT: Tensor, length_BW: Tensor, most_tokens: int
) -> Wrong | None:
    """The wrong choices of a batch; None where there is none.

    Args:
        token_BL: ids of the rows, of which the prompts are taken.
        start_B: where their answers begin.
        token_BWT, length_BW: as in `Choices`.
        most_tokens: of a prompt and a choice; a prompt loses its front first.
    """
    row_X, place_X = (length_BW > 0).nonzero(as_tuple=True)
    if not len(row_X):
        return None
    said_X, start_X = length_BW[row_X, place_X], start_B[row_X]
    cut_X = (start_X + said_X - most_tokens).clamp_min(0)
    length_X = start_X + said_X - cut_X
    at_XL = torch.arange(int(length_X.max()), device=token_BL.device) + cut_X[:, None]
    asked_XL = token_BL[row_X].long().gather(1, at_XL.clamp_max(token_BL.shape[1] - 1))
    behind_XL = (at_XL - start_X[:, None]).clamp(0, token_BWT.shape[2] - 1)
    said_XL = token_BWT[row_X, place_X].long().gather(1, behind_XL)
    token_XL = torch.where(at_XL < start_X[:, None], asked_XL, said_XL)
    return Wrong(token_XL, start_X - cut_X, length_X, row_X, place_X)


def lesson_of_choices(
    rows: Rows,
    token_BWT: Tensor,
    length_BW: Tensor,
    factors: tuple[float, float],
    most_tokens: int,
    most_choices: int,
) -> Lesson:
    """Both losses, means over all ``rows`` of a batch, by the names ``wrong_choices`` and ``preference``.

    Args:
        rows: whose prompts stand before the choices.
        token_BWT, length_BW, most_tokens: see `wrong_choices`.
        factors: of the unlikelihood and of the length-normalised loss; one of 0 is left out.
        most_choices: of a row.
    """
    token_BL, start_B, _, task_B = rows
    wrong = wrong_choices(token_BL, start_B, token_BWT, length_BW, most_tokens)

    def losses(seen: Seen, own: slice) -> dict[str, Tensor]:
        found_B = (seen.nats_M.new_zeros(len(task_B)),) * 2
        if wrong is not None:
            found_B = wrong.losses(seen.nats_M, seen.row_M, seen.nats_R, len(task_B), most_choices)
        weighed = zip(("wrong_choices", "preference"), factors, found_B, strict=True)
        return {name: factor * loss_B.mean() for name, factor, loss_B in weighed if factor}

    if wrong is None:
        return Lesson(losses)
    return Lesson(losses, rows=(wrong.token_XL, wrong.start_X, wrong.length_X, task_B[wrong.row_X]))


def likeliest(right_B: Tensor, wrong_X: Tensor, row_X: Tensor) -> Tensor:
    """bool_B: whether each row's right choice has fewer nats per token than all of its wrong ones."""
    best_B = torch.full_like(right_B, torch.inf).scatter_reduce(0, row_X, wrong_X, "amin")
    return right_B < best_B
