"""What a model gets right: exact matches of each kind of question, and existence by its two sides."""
# Shapes: N items, B of a batch, K questions to each, L positions, V words

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anabranch.heads.pvchat.questions import KINDS
from anabranch.train.evaluate import evaluation_mode

if TYPE_CHECKING:
    from anabranch.heads.pvchat.model import PVChat
    from anabranch.heads.pvchat.training import Questions

__all__ = ["KindScore", "Score", "measure"]


@dataclass(frozen=True)
class KindScore:
    """Of the questions of one kind; NaN where there is none.

    Attributes:
        exact: share of answers that are right word by word.
        present, absent: likewise, of clips with the subject and without.
        count: questions.
    """

    exact: float
    present: float
    absent: float
    count: int


@dataclass(frozen=True)
class Score:
    """What a model got right.

    Attributes:
        kinds: of each kind.
        balanced: of existence: mean of the share of yes where the subject is, and of no where it is not; chance is a half.
        yes_share: of existence: how often the answer was yes.
        exact: the mean over kinds of (present + absent) / 2.
    """

    kinds: dict[str, KindScore]
    balanced: float
    yes_share: float
    exact: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; what is not known is None."""
        return _known(asdict(self))


@torch.no_grad()
def measure(model: PVChat, questions: Questions, *, batch_size: int = 32) -> Score:
    """Ask all questions, and compare.

    A greedy answer equals the right one if and only if each of its words is the likeliest behind those before it, so all words of an
    answer are looked at in one pass.
    """
    device = model.queries.query.device
    right: list[Tensor] = []
    yes: list[Tensor] = []
    yes_word = model.vocabulary.encode("yes")[0]
    with evaluation_mode(model):
        for rows in torch.arange(len(questions)).split(batch_size):
            frame = questions.frame_CFCHW[questions.clip_N[rows]].to(device)
            token, target = questions.token_NKL[rows].to(device), questions.target_NKL[rows].to(device)
            logits, _ = model(frame, questions.subject_NS[rows].to(device), token)
            # As when it speaks: nobody says what only fills up rows.
            logits[..., 0] = -torch.inf
            said_BKL = logits.argmax(-1)
            asked_BKL = target != -100
            right.append(((said_BKL == target) | ~asked_BKL).all(-1).cpu())
            first_BK1 = asked_BKL.long().argmax(-1, keepdim=True)
            yes.append((said_BKL.gather(-1, first_BK1)[..., 0] == yes_word).cpu())
    return _score(torch.cat(right), torch.cat(yes), questions.kind_NK, questions.present_N)


def _score(right_NK: Tensor, yes_NK: Tensor, kind_NK: Tensor, present_N: Tensor) -> Score:
    present_NK = present_N[:, None].expand_as(kind_NK)
    kinds: dict[str, KindScore] = {}
    for number, kind in enumerate(KINDS):
        of_kind = kind_NK == number
        there, absent = (_share(right_NK, of_kind & side) for side in (present_NK, ~present_NK))
        kinds[kind] = KindScore(_share(right_NK, of_kind), there, absent, int(of_kind.sum()))
    exists = kind_NK == KINDS.index("existence")
    said_yes, said_no = _share(yes_NK, exists & present_NK), _share(~yes_NK, exists & ~present_NK)
    means = [_mean([kind.present, kind.absent]) for kind in kinds.values()]
    return Score(kinds, (said_yes + said_no) / 2, _share(yes_NK, exists), _mean(means))


def _share(seen: Tensor, among: Tensor) -> float:
    """NaN among none."""
    return float(seen[among].float().mean())


def _mean(values: list[float]) -> float:
    """Of those that are known."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _known(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _known(item) for name, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
