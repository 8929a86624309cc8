"""What observations come to in the regressions of a bandit: sums over calls, which add up over the processes that made them.

    G = sum z z^T,   h = sum quality z,   calls and dollars        by model, z along the same directions everywhere

Directions are given (a warm start, vectors that are short, a seed), or were chosen from the first vectors seen; until then the vectors
themselves are kept beside the sums, so that these can be made anew along directions that another process has chosen.
"""
# Shapes: M models, D dimensions of z, V of a vector, S observations kept as they came, N vectors

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from anabranch.errors import InputError
from anabranch.routers.contract.strategy import Arrays, Facts

# Directions that follow from config and start alone; random ones, for as long as little was seen.
FIXED, SEEDED = "fixed", "seeded"


def turned(vector_NV: np.ndarray, centre_V: np.ndarray, direction_DV: np.ndarray) -> np.ndarray:
    """z = [1, R (x - centre)], ``[N, D]``."""
    return np.column_stack((np.ones(len(vector_NV)), (vector_NV.astype(float) - centre_V) @ direction_DV.T))


@dataclass(slots=True)
class Sums:
    """See the module.

    Attributes:
        dim: D.
        models: names, in the order of the arrays.
        gram_MDD, moment_MD: G and h.
        count_M: observations with a quality.
        calls_M, spent_M: observations with a cost, and their dollars.
        basis: which directions: `FIXED`, `SEEDED`, or a digest of chosen ones.
        centre_V, direction_DV: those, where they were chosen.
        seen_SV, seen_S2: vectors; place of the model and quality. All observations, or none.
        length: V; 0 if not known yet.
    """

    dim: int = 0
    models: list[str] = field(default_factory=list)
    gram_MDD: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0)))
    moment_MD: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    count_M: np.ndarray = field(default_factory=lambda: np.zeros(0))
    calls_M: np.ndarray = field(default_factory=lambda: np.zeros(0))
    spent_M: np.ndarray = field(default_factory=lambda: np.zeros(0))
    basis: str = FIXED
    centre_V: np.ndarray = field(default_factory=lambda: np.zeros(0))
    direction_DV: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    seen_SV: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    seen_S2: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    length: int = 0

    @property
    def steps(self) -> int:
        """Observations with a quality."""
        return int(self.count_M.sum())

    @property
    def is_whole(self) -> bool:
        """All observations are there as they came."""
        return len(self.seen_SV) == self.steps

    def place(self, model: str) -> int:
        """Of a model; a new one has none of anything."""
        if model not in self.models:
            self.models.append(model)
            dim = self.dim
            self.gram_MDD = np.concatenate((self.gram_MDD.reshape(-1, dim, dim), np.zeros((1, dim, dim))))
            self.moment_MD = np.concatenate((self.moment_MD.reshape(-1, dim), np.zeros((1, dim))))
            self.count_M, self.calls_M, self.spent_M = (
                np.append(value_M, 0.0) for value_M in (self.count_M, self.calls_M, self.spent_M)
            )
        return self.models.index(model)

    def observe(self, model: str, z_D: np.ndarray, quality: float) -> None:
        """One answer with a quality."""
        at = self.place(model)
        self.gram_MDD[at] += np.outer(z_D, z_D)
        self.moment_MD[at] += quality * z_D
        self.count_M[at] += 1

    def paid(self, model: str, cost: float) -> None:
        """One answer with a cost, in dollars."""
        at = self.place(model)
        self.calls_M[at] += 1
        self.spent_M[at] += cost

    def keep(self, model: str, vector_V: np.ndarray, quality: float) -> None:
        """Keep an observation as it came, too."""
        vector_SV = self.seen_SV.reshape(-1, len(vector_V))
        self.seen_SV = np.vstack((vector_SV, np.asarray(vector_V, np.float32)))
        self.seen_S2 = np.vstack((self.seen_S2, (self.place(model), quality)))

    def add(self, other: "Sums") -> None:
        """Take in the sums of another, along the same directions."""
        places = [self.place(name) for name in other.models]
        for name in ("gram_MDD", "moment_MD", "count_M", "calls_M", "spent_M"):
            getattr(self, name)[places] += getattr(other, name)
        for vector_V, (at, quality) in zip(other.seen_SV, other.seen_S2, strict=True):
            self.keep(other.models[int(at)], vector_V, float(quality))

    def less(self, part: "Sums") -> "Sums":
        """Without what an earlier state of them held. Raises InputError for what was never part of them."""
        if part.models and part.basis != self.basis:
            part = part.along(self.centre_V, self.direction_DV, self.basis)
        if part.models and (part.dim, part.length) != (self.dim, self.length):
            raise InputError("these sums were observed along other directions")
        if not set(part.models) <= set(self.models):
            raise InputError(f"these sums hold nothing of {', '.join(sorted(set(part.models) - set(self.models)))}")
        places = [self.place(name) for name in part.models]
        made = replace(self, models=list(self.models))
        for name in ("gram_MDD", "moment_MD", "count_M", "calls_M", "spent_M"):
            left = np.array(getattr(self, name))
            left[places] -= getattr(part, name)
            setattr(made, name, left)
        if (made.count_M < 0).any() or (made.calls_M < 0).any():
            raise InputError("these sums hold less than is to be taken from them")
        # In the order in which they came: the earlier ones are the first.
        made.seen_SV, made.seen_S2 = self.seen_SV[part.steps :], self.seen_S2[part.steps :]
        return made if made.is_whole else made.bare()

    def without_qualities(self, models: Sequence[str]) -> "Sums":
        """Without the observations of these models that have a quality; what calls cost stays."""
        places = [self.models.index(name) for name in models]
        made = replace(self, models=list(self.models))
        for name in ("gram_MDD", "moment_MD", "count_M"):
            left = np.array(getattr(self, name))
            left[places] = 0
            setattr(made, name, left)
        is_kept_S = ~np.isin(self.seen_S2[:, 0], places)
        made.seen_SV, made.seen_S2 = self.seen_SV[is_kept_S], self.seen_S2[is_kept_S]
        return made

    def bare(self) -> "Sums":
        """The sums alone."""
        return replace(self, seen_SV=np.zeros((0, 0), np.float32), seen_S2=np.zeros((0, 2)))

    def along(self, centre_V: np.ndarray, direction_DV: np.ndarray, basis: str) -> "Sums":
        """The same observations along other directions. Raises InputError if they are not there as they came."""
        if not self.is_whole:
            raise InputError("what was observed is only known along other directions")
        made = Sums(
            len(direction_DV) + 1, basis=basis, centre_V=centre_V, direction_DV=direction_DV, length=len(centre_V)
        )
        if len(self.seen_SV):
            z_SD = turned(self.seen_SV, centre_V, direction_DV)
            for z_D, vector_V, (at, quality) in zip(z_SD, self.seen_SV, self.seen_S2, strict=True):
                made.observe(self.models[int(at)], z_D, float(quality))
                made.keep(self.models[int(at)], vector_V, float(quality))
        for at, model in enumerate(self.models):
            place = made.place(model)
            made.calls_M[place], made.spent_M[place] = self.calls_M[at], self.spent_M[at]
        return made

    # As a store keeps them

    def state(self) -> tuple[Arrays, Facts]:
        """Named arrays, and facts ready for JSON."""
        names = (
            "gram_MDD",
            "moment_MD",
            "count_M",
            "calls_M",
            "spent_M",
            "centre_V",
            "direction_DV",
            "seen_SV",
            "seen_S2",
        )
        return {name: np.array(getattr(self, name)) for name in names}, {
            "dim": self.dim,
            "models": list(self.models),
            "basis": self.basis,
            "length": self.length,
        }

    @classmethod
    def read(cls, arrays: Arrays, facts: Facts) -> Self:
        """What `state` gave. Raises InputError for anything else."""
        try:
            dim, models, basis = int(facts["dim"]), [str(name) for name in facts["models"]], str(facts["basis"])
            length = int(facts["length"])
            copied = {name: np.array(value) for name, value in arrays.items()}
            made = cls(dim, models, basis=basis, length=length, **copied)
            made._check()
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(f"these are no sums of observations: {type(error).__name__}: {error}") from None
        return made

    def _check(self) -> None:
        """Raises ValueError if the arrays do not fit one another."""
        count, dim = len(self.models), self.dim
        shapes: dict[str, tuple[int, ...]] = {
            "gram_MDD": (count, dim, dim),
            "moment_MD": (count, dim),
            "count_M": (count,),
            "calls_M": (count,),
            "spent_M": (count,),
            "seen_S2": (len(self.seen_SV), 2),
        }
        for name, shape in shapes.items():
            value: Any = getattr(self, name)
            if (value.shape != shape and value.size + int(np.prod(shape))) or not np.isfinite(value).all():
                raise ValueError(
                    f"{name} has shape {list(value.shape)} where {list(shape)} is due, or holds what is no number"
                )
        place_S = self.seen_S2[:, 0]
        if len(set(self.models)) < count or ((place_S < 0) | (place_S >= count)).any():
            raise ValueError("models are named twice, or not at all")
        directions = (dim - 1, *self.centre_V.shape)
        if self.basis not in (FIXED, SEEDED) and self.direction_DV.shape != directions:
            raise ValueError("its directions do not fit")


def joined(parts: Sequence[Sums]) -> Sums:
    """All of them together. Where some were made along directions that others had chosen, all are made along these.

    Raises InputError for parts along directions that cannot be brought together.
    """
    parts = [part for part in parts if part.models]
    if not parts:
        return Sums()
    chosen = next((part for part in parts if part.basis not in (FIXED, SEEDED)), None)
    first = parts[0] if chosen is None else chosen
    made = Sums(
        first.dim, basis=first.basis, centre_V=first.centre_V, direction_DV=first.direction_DV, length=first.length
    )
    for part in parts:
        if part.basis != made.basis and part.basis == SEEDED and chosen is not None:
            part = part.along(made.centre_V, made.direction_DV, made.basis)
        if (part.basis, part.dim, part.length) != (made.basis, made.dim, made.length):
            raise InputError("these were observed along different directions")
        made.add(part)
    return made if made.is_whole else made.bare()
