"""Bandits of several processes that learn as one: each tells what it observed, and takes in what the others did.

A of all = A at the start + G of its own + G of the others, and so for b and the costs: the same numbers, but for rounding, that one
process would have that was told everything. Where directions are chosen from the first vectors seen, the first choice that others can
find is everybody's; until a choice was published, the vectors are kept, so that it can still be given up for another.

With ``discount`` < 1 nothing adds up: how much an observation weighs depends on those that came after it, and each process knows the
order of its own alone.
"""
# Shapes: M arms, D dimensions of z, V of a vector

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from anabranch.errors import InputError
from anabranch.routers.contract.strategy import Arrays, Facts, Strategy
from anabranch.routers.strategies.regression_sums import FIXED, SEEDED, Sums, joined

logger = logging.getLogger(__name__)

# Observations kept for a choice of directions that nobody could be told of, in times of those that it takes.
KEPT = 4


class Pooled(Strategy):
    """What `Bandit` needs for it; the regressions themselves are there."""

    direction_DV: np.ndarray | None
    centre_V: np.ndarray
    models: tuple[str, ...]
    inverse_MDD: np.ndarray
    b_MD: np.ndarray
    theta_MD: np.ndarray
    calls_M: np.ndarray
    cost_M: np.ndarray
    steps: int
    seen_SV: np.ndarray
    seen_S2: np.ndarray

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.basis = FIXED
        # Since the start: observed here, and heard of.
        self.own, self.others = Sums(), Sums()
        self._first: tuple[Arrays, Facts] = ({}, {})
        self._is_shared = False
        # What was said of parts, which are read again and again.
        self._let_go: set[tuple[str, float, float]] = set()

    @property
    def adds_up(self) -> bool:  # type: ignore[override]
        """Unless it forgets."""
        return bool(self.config.discount == 1)

    def features(self, vector_NV: np.ndarray) -> np.ndarray:
        """See `Bandit`."""
        raise NotImplementedError

    def _start(self, centre_V: np.ndarray, direction_DV: np.ndarray, basis: str = FIXED) -> None:
        raise NotImplementedError

    def _arm(self, name: str) -> int:
        raise NotImplementedError

    def _principal(self, vector_NV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError

    # Told and heard

    def vector_dim(self, arrays: Arrays, facts: Facts) -> int | None:
        """Of a part, which says it, or of a state."""
        return int(facts["length"] if "length" in facts else len(arrays["centre_V"])) or None

    def part(self) -> tuple[Arrays, Facts]:
        """What was observed here since the start."""
        return self.own.state()

    def hear(self, arrays: Arrays, facts: Facts) -> None:
        """Take what all others observed in the place of what was heard before. Raises InputError, and nothing has changed."""
        if not self._is_shared:
            self._is_shared = True
            self._keep_so_far()
        if not facts:
            return
        heard = Sums.read(arrays, facts)
        if not heard.models:
            heard = Sums(self.own.dim, basis=self.basis, length=len(self.centre_V))
        elif self.direction_DV is None and heard.length:
            self.features(np.zeros((0, heard.length)))
        if heard.length != len(self.centre_V):
            raise InputError(f"others observed vectors of {heard.length} dimensions, not {len(self.centre_V)}")
        if heard.basis not in (self.basis, SEEDED, FIXED):
            self._turn(heard.centre_V, heard.direction_DV, heard.basis)
        elif heard.basis != self.basis:
            assert self.direction_DV is not None
            heard = heard.along(self.centre_V, self.direction_DV, self.basis)
        self.others = heard
        self._rebuild()
        self._choose_directions()

    def joined(self, parts: Sequence[tuple[Arrays, Facts]]) -> tuple[Arrays, Facts]:
        """Several parts as one. Raises InputError for what is none, or does not fit the others.

        The scores of a model that a part holds are let go where no regression can be made of them (there is a huge vector among them,
        which drowns all others): in the sum they would drown what is learned from then on, too.
        """
        return joined([self._usable(Sums.read(*part)) for part in parts]).state()

    def _usable(self, part: Sums) -> Sums:
        lost, dim = [], part.dim
        # No pivot is less than the ridge: unless the largest sums are very large, the test below would find nothing.
        most = self.config.ridge / (2 * max(dim, 1) * np.finfo(float).eps)
        for at, name in enumerate(part.models):
            gram_DD = part.gram_MDD[at]
            if np.diag(gram_DD).max(initial=0) < most and np.isfinite(part.moment_MD[at]).all():
                continue
            start_DD, moment_D, _, _ = self._at_start(name, *self._first, dim)
            if _solved(start_DD + gram_DD, moment_D + part.moment_MD[at]) is None:
                lost.append(name)
                said = name, float(part.count_M[at]), float(np.diag(gram_DD).max())
                if said not in self._let_go:
                    self._let_go.add(said)
                    logger.warning(
                        "%s: the sums of %s in what was stored (%d scores) are singular or not finite; they are let go, and what "
                        "is learned since counts",
                        self.name,
                        name,
                        part.count_M[at],
                    )
        return part.without_qualities(lost) if lost else part

    def published(self) -> None:
        """The last `part` is where others find it: with it, the choice of directions."""
        if self.basis not in (FIXED, SEEDED):
            self.own = self.own.bare()

    def disown(self, arrays: Arrays, facts: Facts) -> None:
        """Let go of what an earlier `part` told of. Raises InputError for what is none, and nothing has changed."""
        part = Sums.read(arrays, facts)
        if part.models:
            self.own = self.own.less(part)
            self._rebuild()

    # Directions

    def _keep_so_far(self) -> None:
        """From here on the vectors are kept apart from those of a process that is alone."""
        if len(self.seen_SV) == self.own.steps:
            for vector_V, (arm, quality) in zip(self.seen_SV, self.seen_S2, strict=True):
                self.own.keep(self.models[int(arm)], vector_V, float(quality))

    @property
    def _keeps(self) -> bool:
        """What is observed next is kept as it came."""
        return self._is_shared and (self.basis == SEEDED or len(self.own.seen_SV) > 0)

    def _choose_directions(self) -> None:
        """Once enough was seen, here and elsewhere."""
        own, others = self.own, self.others
        if self.basis != SEEDED:
            if len(own.seen_SV) > KEPT * self.config.settle:
                self.published()
            return
        if len(own.seen_SV) + len(others.seen_SV) < self.config.settle or not (own.is_whole and others.is_whole):
            return
        seen_SV = np.vstack([part.seen_SV for part in (own, others) if len(part.seen_SV)])
        centre_V, direction_DV = self._principal(seen_SV.astype(float))
        digest = hashlib.sha256(np.ascontiguousarray(direction_DV).tobytes()).hexdigest()
        self._turn(centre_V, direction_DV, digest)
        self.others = others.along(centre_V, direction_DV, digest)
        self._rebuild()

    def _turn(self, centre_V: np.ndarray, direction_DV: np.ndarray, basis: str) -> None:
        """See along other directions; what others observed is forgotten. Raises InputError if the own vectors are gone."""
        own, models = self.own.along(centre_V, direction_DV, basis), self.models
        self._start(centre_V, direction_DV, basis)
        self.own = own
        for name in models:
            self._arm(name)
        self._rebuild()

    def _rebuild(self) -> None:
        """The regressions from their sums. One that its sums settle nothing of (a huge vector among them) stays as it was."""
        arrays, facts = self._first
        for name in (*self.own.models, *self.others.models):
            self._arm(name)
        for arm, name in enumerate(self.models):
            gram_DD, moment_D, calls, spent = self._at_start(name, arrays, facts, self.b_MD.shape[1])
            for part in (self.own, self.others):
                if name in part.models:
                    at = part.models.index(name)
                    gram_DD, moment_D = gram_DD + part.gram_MDD[at], moment_D + part.moment_MD[at]
                    calls, spent = calls + part.calls_M[at], spent + part.spent_M[at]
            if (solved := _solved(gram_DD, moment_D)) is None:
                logger.warning(
                    "%s: the sums of %s are singular or not finite; its regression stays as it was", self.name, name
                )
            else:
                self.inverse_MDD[arm], self.b_MD[arm], self.theta_MD[arm] = solved[0], moment_D, solved[1]
            self.calls_M[arm], self.cost_M[arm] = calls, spent / calls if calls else 0.0
        self.steps = int(facts.get("steps", 0)) + self.own.steps + self.others.steps

    def _at_start(
        self, name: str, arrays: Arrays, facts: Facts, dim: int
    ) -> tuple[np.ndarray, np.ndarray, float, float]:
        """A, b, calls and dollars of a model before anything was observed or heard; A of NaN where there is none.

        Those of the prior alone where it knew nothing of it along ``dim`` directions.
        """
        if name not in facts.get("models", ()) or arrays["b_MD"].shape[1] != dim:
            return self.config.ridge * np.eye(dim), np.zeros(dim), 0.0, 0.0
        at = facts["models"].index(name)
        calls = float(arrays["calls_M"][at])
        try:
            gram_DD = np.linalg.inv(arrays["inverse_MDD"][at])
        except np.linalg.LinAlgError:
            gram_DD = np.full((dim, dim), np.nan)
        return gram_DD, arrays["b_MD"][at], calls, calls * float(arrays["cost_M"][at])


def _solved(gram_DD: np.ndarray, moment_D: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """A^-1 and A^-1 b; None for what is no A: singular as floats see it, or not finite."""
    if not (np.isfinite(gram_DD).all() and np.isfinite(moment_D).all()):
        return None
    try:
        # Only a positive definite one has such a root; where a part of it is lost in the rounding of the rest, the inverse is noise.
        root_D = np.diag(np.linalg.cholesky(gram_DD))
        if root_D.min() ** 2 <= len(root_D) * np.finfo(float).eps * np.diag(gram_DD).max():
            return None
        inverse_DD = np.linalg.inv(gram_DD)
    except np.linalg.LinAlgError:
        return None
    theta_D = inverse_DD @ moment_D
    return (inverse_DD, theta_D) if np.isfinite(inverse_DD).all() and np.isfinite(theta_D).all() else None
