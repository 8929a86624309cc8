"""What a trajectory is worth: its form, its answer, and what it cost. Pure functions, and one window of costs.

    R_format in {-1, 0};   R_outcome = exact match or token F1;   R_cost = 1 - clip((u - lo) / (hi - lo), 0, 1),  u = sqrt(c)
    R = -1                                          if the form is broken
      = 0                                           if the answer is wrong  (code; in the paper's sum the cost term stays)
      = (1 - alpha) R_outcome + alpha R_cost        otherwise

c = sum over calls of tokens x price per million, in raw units (a dollar is a million). lo and hi are the 5th and 95th percentile of the
last 1,000 values of u, this one among them.
"""

import math
import re
import string
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from anabranch.errors import InputError

Basis = Literal["completion", "all"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Answers that are right or wrong as a whole.
_WHOLE = ("yes", "no", "noanswer")


def normalized(text: str) -> str:
    """Lower case, without punctuation and articles, one space between words.

    Where nothing would be left of an answer, what would have emptied it stays: articles ("A" of a question with letters), and
    punctuation where there is nothing else ("+"). "" for white space alone.
    """
    lower = text.lower()
    words = lower.translate(_PUNCTUATION)
    forms = (" ".join(form.split()) for form in (_ARTICLES.sub(" ", words), words, lower))
    return next(filter(None, forms), "")


def exact_match(answer: str | None, wanted: Sequence[str]) -> float:
    """1 where an answer is one of those wanted, as `normalized` has them; 0 for a blank one, which says nothing."""
    said = "" if answer is None else normalized(answer)
    return float(bool(said) and said in {normalized(one) for one in wanted})


def token_f1(answer: str | None, wanted: Sequence[str]) -> float:
    """The best F1 of words over those wanted; yes, no and noanswer are all or nothing."""
    return 0.0 if answer is None else max((_f1(normalized(answer), normalized(one)) for one in wanted), default=0.0)


def _f1(answer: str, wanted: str) -> float:
    if (answer in _WHOLE or wanted in _WHOLE) and answer != wanted:
        return 0.0
    ours, theirs = answer.split(), wanted.split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def raw_cost(calls: Iterable[tuple[float, float, float, float]], basis: Basis = "completion") -> float:
    """c of a trajectory.

    Args:
        calls: prompt tokens, completion tokens, and the price of a million of each.
        basis: ``completion`` tokens alone (code), or ``all``.

    Raises InputError for a price or a count that is none.
    """
    total = 0.0
    for prompt, completion, prompt_price, price in calls:
        numbers = (prompt, completion, prompt_price, price)
        if not all(math.isfinite(number) and number >= 0 for number in numbers):
            raise InputError(f"a call has tokens and prices {numbers}; they must be numbers of at least 0")
        total += completion * price + (prompt * prompt_price if basis == "all" else 0.0)
    return total


class CostWindow:
    """R_cost by what trajectories cost lately.

    Args:
        size: values of u that are kept.
    """

    def __init__(self, size: int = 1000) -> None:
        if size < 1:
            raise InputError(f"size of the window is {size}; it must be at least 1")
        self._values: deque[float] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self._values)

    def reward(self, cost: float) -> float:
        """Take a cost in, and tell its reward: 1 the cheapest, 0.5 where all cost the same. Raises InputError for what is no cost."""
        if not (math.isfinite(cost) and cost >= 0):
            raise InputError(f"a trajectory cost {cost!r}; it must be a number of at least 0")
        value = math.sqrt(cost)
        self._values.append(value)
        return self.told(value)

    def told(self, value: float) -> float:
        """The reward of u in the window as it is."""
        values = np.array(self._values)
        low, high = (values.min(), values.max()) if len(values) < 2 else np.percentile(values, [5, 95])
        if high - low < 1e-8:
            return 0.5
        return 1.0 - min(1.0, max(0.0, float((value - low) / (high - low))))

    def state(self) -> list[float]:
        """Its values, oldest first."""
        return list(self._values)

    def load_state(self, values: Sequence[float]) -> None:
        """Take back what `state` gave."""
        self._values.clear()
        self._values.extend(float(value) for value in values)


def total_reward(
    is_well_formed: bool, outcome: float, cost: float, alpha: float, *, cost_only_if_correct: bool = True
) -> float:
    """R of a trajectory.

    Args:
        is_well_formed: no rule of the format is broken.
        outcome: 0 to 1.
        cost: R_cost, 0 to 1.
        alpha: weight of the cost, 0 to 1.
        cost_only_if_correct: a wrong answer is worth 0 however cheap it was (code): else the router learns to be cheap and wrong.

    Raises InputError for numbers outside of 0 to 1, NaN among them.
    """
    for name, value in (("outcome", outcome), ("cost", cost), ("alpha", alpha)):
        if not 0 <= value <= 1:
            raise InputError(f"{name} is {value!r}; it must be from 0 to 1")
    if not is_well_formed:
        return -1.0
    if cost_only_if_correct and outcome == 0:
        return 0.0
    return (1 - alpha) * outcome + alpha * cost
