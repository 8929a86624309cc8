"""Which of the found paths routers learn from, and what they say of each block: 0 skip, 1 run, 2 run twice."""
# Shapes: N questions, L blocks, C = 3 decisions

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.depth.decisions import MOST_VISITS
from anabranch.depth.dr_llm.records import PathRow
from anabranch.errors import DataError

__all__ = ["CHOICES", "Labels", "labels_of"]

# Skip, run, repeat.
CHOICES = MOST_VISITS + 1


@dataclass(frozen=True)
class Labels:
    """Prompts and decisions.

    Attributes:
        ids: of the questions.
        prompts: tokens of each.
        decision_NL: int64, how often each block is run.
        num_flips: how many are of questions that the whole model answers wrongly.
        model: fingerprint of the model that was searched; empty for labels of no certain model.
    """

    ids: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    decision_NL: Tensor
    num_flips: int = 0
    model: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_blocks(self) -> int:
        """L."""
        return self.decision_NL.shape[1]

    @property
    def count_C(self) -> Tensor:
        """How often each decision stands anywhere."""
        return torch.bincount(self.decision_NL.flatten(), minlength=CHOICES)

    @property
    def mean_layers(self) -> float:
        """Blocks that a path runs, on average."""
        return float(self.decision_NL.sum(1).double().mean())

    def take(self, index: Sequence[int]) -> "Labels":
        """Some of them."""
        chosen = list(index)
        return Labels(
            tuple(self.ids[place] for place in chosen),
            tuple(self.prompts[place] for place in chosen),
            self.decision_NL[chosen],
            model=self.model,
        )


def labels_of(
    rows: Sequence[PathRow],
    *,
    flips: bool = False,
    quota: int | None = None,
    flip_share: float = 0.3,
) -> Labels:
    """The labels of a search: the shortest right path of each question.

    Args:
        rows: of one search.
        flips: take questions too that the whole model answers wrongly and a path rightly; see the null control.
        quota: the most labels; None for all. Where flips are taken, later ones take the place of others until their share is reached.
        flip_share: of flips among the quota.

    Raises DataError where there is none, or rows are of several models.
    """
    found = [row for row in rows if row.path is not None and (flips or row.base_right)]
    if not found:
        raise DataError(
            f"none of {len(rows)} questions has a right path, so there is nothing to learn; give questions that the model answers"
        )
    if len({row.model for row in found}) > 1:
        raise DataError("the rows are of different models; give those of one search")
    if quota is not None:
        found = _within(found, quota, flip_share)
    num_blocks = found[0].num_blocks
    decisions = torch.tensor([row.decisions for row in found], dtype=torch.int64).view(len(found), num_blocks)
    return Labels(
        tuple(row.id for row in found),
        tuple(row.prompt for row in found),
        decisions,
        sum(not row.base_right for row in found),
        found[0].model,
    )


def _within(rows: Sequence[PathRow], quota: int, flip_share: float) -> list[PathRow]:
    """Up to ``quota`` rows, in order, of which up to ``flip_share`` are flips where there are as many."""
    flips = [row for row in rows if not row.base_right][: round(quota * flip_share)]
    others = [row for row in rows if row.base_right][: quota - len(flips)]
    taken = {row.id for row in (*flips, *others)}
    return [row for row in rows if row.id in taken]
