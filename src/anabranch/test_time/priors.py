"""What traffic teaches: for each model and kind of task, at which sample questions were solved first.

Counts add up: of two processes, of two days. From them the curve of a pair is fitted, with what is known of the model on all tasks as
its prior, so that ten questions do not make a curve of their own. A fit takes tens of milliseconds: who has no time for it is told by
`Priors.known` what was fitted so far.
"""
# Shapes: G pairs of model and task, N samples

from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping
from typing import Any, Self

import numpy as np

from anabranch.bounds import whole
from anabranch.errors import DataError, InputError
from anabranch.test_time.curves import BetaTTSPM, Curve, Kind
from anabranch.test_time.figures import numbers
from anabranch.test_time.fitting import fit_counts
from anabranch.test_time.hits import first_counts

# Samples of one question that are told apart, and pairs that are kept: what has no room there counts for its model, of which there may be
# as many again. Who lets senders name tasks says which of them are told apart (`Priors.folded`): the first to come take the room.
MOST_SAMPLES, MOST_PAIRS = 64, 512

# Characters of the name of a task.
LONGEST = 80

# What a pair is called whose model has no room any more, and where no task is named.
OTHERS, ANY = "(others)", ""

# Questions that a prior counts for.
WEIGHT = 20.0

Key = tuple[str, str]


class Priors:
    """Counts by (model, task).

    Attributes:
        prior: the curve before anything was seen.

    Args:
        prior: a fitted `Curve` with numbers as parameters; None for a mixture that solves half of all questions in the end, most of them
            within a few samples.
        weight: questions that the prior counts for.
    """

    def __init__(self, prior: Curve | None = None, *, weight: float = WEIGHT) -> None:
        self.prior = BetaTTSPM(0.9, 1.0, 1.0) if prior is None else prior
        self.weight = weight
        self._counts: OrderedDict[Key, np.ndarray] = OrderedDict()
        # Of each model, on all tasks.
        self._sums: dict[str, np.ndarray] = {}
        # By pair, the questions that were known when it was fitted.
        self._fitted: dict[Key, tuple[int, BetaTTSPM]] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._counts)

    def add(self, model: str, task: str | None, tried: int, solved: bool, *, times: int = 1) -> None:
        """Count a question: ``tried`` samples were looked at, and if it was solved, the last of them solved it. Raises InputError.

        ``times`` counts as many questions that went alike.
        """
        tried = min(whole("tried", tried, 0), MOST_SAMPLES + 1)
        if solved and not tried:
            raise InputError("a question was solved by none of no samples; tried must be at least 1")
        if not whole("times", times, 0):
            return
        count_2N = np.zeros((2, MOST_SAMPLES))
        count_2N[1, : min(tried, MOST_SAMPLES)] = times
        if solved and tried <= MOST_SAMPLES:
            count_2N[0, tried - 1] = times
        self._add((model, (task or ANY)[:LONGEST]), count_2N)

    def add_samples(self, model: str, task: str | None, correct_Q: Any, samples_Q: Any) -> None:
        """Count questions all of whose samples are known, so many right ones of so many, whatever their order. Raises InputError."""
        if len(correct_Q):
            self._add((model, (task or ANY)[:LONGEST]), first_counts(correct_Q, samples_Q, MOST_SAMPLES))

    def questions(self, model: str, task: str | None = None) -> int:
        """How many were counted."""
        return int(self._whole(model, task)[1, 0])

    def curve(self, model: str, task: str | None = None) -> BetaTTSPM:
        """What is known of a model on a task: fitted to what was seen, and to the prior as to so many questions more.

        Of a task that was never seen, it is that of the model on all tasks.
        """
        key = self._seen(model, task)
        num = self.questions(*key)
        if not num and isinstance(self.prior, BetaTTSPM):
            return self.prior
        if self.is_due(*key):
            self._fitted[key] = num, self._fit(*key)
        return self._fitted[key][1]

    def is_due(self, model: str, task: str | None = None) -> bool:
        """Whether a tenth more is known than when it was fitted: what less would move is not worth a fit."""
        key = self._seen(model, task)
        num = self.questions(*key)
        return num > 1.1 * self._fitted[key][0] if key in self._fitted else num > 0

    def known(self, model: str, task: str | None = None) -> BetaTTSPM:
        """What was fitted so far: to the pair, else to the model, else nothing but the prior. Takes no time."""
        for key in (self._seen(model, task), (model, ANY)):
            if key in self._fitted:
                return self._fitted[key][1]
        return self.prior if isinstance(self.prior, BetaTTSPM) else self.curve(model)

    def _seen(self, model: str, task: str | None) -> Key:
        """The pair whose counts are those of a model and a task: tasks that nobody has seen have one and the same."""
        key = model, (task or ANY)[:LONGEST]
        return key if key in self._counts else (model, ANY)

    def _fit(self, model: str, task: str) -> BetaTTSPM:
        prior = self.curve(model) if task != ANY else self.prior
        at = np.arange(MOST_SAMPLES)
        # The prior's questions were given all samples.
        left_N = np.asarray(prior.unsolved(at))
        solved_N = np.minimum(np.asarray(prior.gain(at)), left_N)
        count_2N = self._whole(model, task) + self.weight * np.stack([solved_N, left_N])
        return BetaTTSPM(*fit_counts(count_2N[0], count_2N[1]), kind=prior.kind)

    def _whole(self, model: str, task: str | None) -> np.ndarray:
        """Counts of a pair; of all tasks of the model where that is not known, or none is named."""
        model, task = self._seen(model, task)
        found = self._sums.get(model) if task == ANY else self._counts[model, task]
        return np.zeros((2, MOST_SAMPLES)) if found is None else found

    def _key(self, model: str, task: str) -> Key:
        for key, most in (((model, task), MOST_PAIRS), ((model, ANY), 2 * MOST_PAIRS - 1)):
            if key in self._counts or len(self._counts) < most:
                return key
        return OTHERS, ANY

    def _add(self, key: Key, count_2N: np.ndarray) -> None:
        key = self._key(*key)
        for counts, name in ((self._counts, key), (self._sums, key[0])):
            # Not in place: a fit may read them in another thread.
            counts[name] = counts[name] + count_2N if name in counts else count_2N.copy()  # type: ignore[index]

    # Kept and told

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Counts ``[G, 2, N]`` (solved, tried), the names of their pairs, and what was fitted so far: read back, it says the same."""
        counts, fitted = list(self._counts.values()), list(self._fitted.items())
        array = np.stack(counts) if counts else np.zeros((0, 2, MOST_SAMPLES))
        fits = [[*key, num, curve.f_max, curve.a, curve.b] for key, (num, curve) in fitted]
        return {"count_G2N": array}, {"pairs": [list(key) for key in self._counts], "fits": fits}

    def load_state(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Take back what `state` gave. Raises DataError for what is none, and nothing has changed."""
        counts, fits = _read(arrays, facts), _read_fits(facts.get("fits", ()), self.prior.kind)
        self._counts, self._sums, self._fitted = OrderedDict(), {}, fits
        for key, count_2N in counts:
            self._add(key, count_2N)

    def plus(self, other: "Priors") -> Self:
        """Counts of both, as a new one with this one's prior."""
        made = type(self)(self.prior, weight=self.weight)
        for source in (self, other):
            for key, count_2N in source._counts.items():
                made._add(key, count_2N)
        return made

    def folded(self, tasks: Container[str]) -> Self:
        """With these tasks told apart and no other: all others count for their model alone."""
        made = type(self)(self.prior, weight=self.weight)
        for (model, task), count_2N in self._counts.items():
            made._add((model, task if task in tasks else ANY), count_2N)
        made._fitted = {key: fit for key, fit in list(self._fitted.items()) if key in made._counts or key[1] == ANY}
        return made

    def keep_fits(self, other: "Priors") -> None:
        """Take over what another one fitted; what is known better by now is fitted anew when it is asked for."""
        self._fitted.update(dict(other._fitted))

    def less(self, other: "Priors") -> Self:
        """Without the counts of another, none below zero."""
        made = type(self)(self.prior, weight=self.weight)
        for key, count_2N in self._counts.items():
            made._add(key, np.maximum(count_2N - other._counts.get(key, 0.0), 0.0))
        return made


def _read(arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> list[tuple[Key, np.ndarray]]:
    try:
        array = numbers("count_G2N", arrays["count_G2N"])
        pairs = [(str(model), str(task)) for model, task in facts["pairs"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"counts of test-time samples are damaged: {error}") from None
    if array.shape != (len(pairs), 2, MOST_SAMPLES) or len(set(pairs)) < len(pairs) or len(pairs) > 2 * MOST_PAIRS:
        raise DataError(
            f"counts of test-time samples have shape {list(array.shape)} for {len(pairs)} pairs; they do not fit"
        )
    if not (np.isfinite(array).all() and (array >= 0).all() and (array[:, 0] <= array[:, 1]).all()):
        raise DataError("counts of test-time samples are damaged: solved must be at most tried, and both at least 0")
    return [(pair, counts.copy()) for pair, counts in zip(pairs, array, strict=True)]


def _read_fits(fits: Any, kind: Kind) -> dict[Key, tuple[int, BetaTTSPM]]:
    try:
        return {
            (str(model), str(task)): (whole("questions", num, 0), BetaTTSPM(f_max, a, b, kind))
            for model, task, num, f_max, a, b in fits
        }
    except (TypeError, ValueError) as error:
        raise DataError(f"fits of test-time samples are damaged: {error}") from None
