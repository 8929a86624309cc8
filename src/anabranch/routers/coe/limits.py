"""The problem of mapping categories to experts, and the answer's form; the solvers are in `exact`, `milp` and `greedy`.

    max  sum_c w_c sum_e Q[c,e] z[c,e]  -  lambda sum_c w_c sum_e P_e z[c,e]
    s.t. sum_e z[c,e] = 1,  z[c,e] <= y_e,  sum_e P_e y_e <= B,  |S| <= k,  sum_c w_c sum_e P_e z[c,e] <= A

Ties: among the best maps the one with the smallest experts in all, then the cheapest, then the first names. Within them each
category takes the smallest of its best experts, then the cheapest, then the first name. Source: arXiv 2412.01868 says "mixed integer
linear program" and "parameter budget"; this form of it is ours.
"""
# Shapes: C categories, E experts

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from anabranch.config import Config, Field, configclass
from anabranch.errors import InputError
from anabranch.routers.coe.quality import QualityTable

# Objectives that differ by less are equal.
TIE = 1e-9


@configclass
class Limits(Config):
    """What a map may use, in billions of parameters.

    Attributes:
        budget: B, of all chosen experts together (what must be hosted); None for no limit.
        trade_off: lambda, score given up to save a billion active parameters on a request.
        max_experts: k, most experts to choose; None for no limit.
        active: A, most parameters that work on a request on average; None for no limit.
    """

    budget: float | None = Field(default=None, ge=0)
    trade_off: float = Field(default=0.0, ge=0)
    max_experts: int | None = Field(default=None, ge=1)
    active: float | None = Field(default=None, ge=0)


@dataclass(frozen=True, kw_only=True)
class ExpertMap:
    """Which expert serves each category.

    Attributes:
        choice: expert of each category.
        chosen: experts that serve one, smallest first.
        objective: what was maximised.
        quality: mean quality, by the table it was made of.
        active: billions of parameters that work on a request on average.
        host: billions of parameters of all chosen experts.
        limits: it keeps.
    """

    choice: Mapping[str, str]
    chosen: tuple[str, ...]
    objective: float
    quality: float
    active: float
    host: float
    limits: Limits

    def __getitem__(self, category: str) -> str:
        """Raises InputError for a category that has no expert."""
        try:
            return self.choice[category]
        except KeyError:
            raise InputError(f"no category {category!r} in the map; it has {', '.join(self.choice)}") from None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The problem in arrays, experts in the order of ties (smallest, cheapest, first name).

    Attributes:
        value_CE: quality - lambda * size; -inf where an expert must not be chosen.
        share_C: weights of categories.
        size_E, price_E: of experts.
        table: qualities, columns in this order.
        limits: to keep.
    """

    value_CE: np.ndarray
    share_C: np.ndarray
    size_E: np.ndarray
    price_E: np.ndarray
    table: QualityTable
    limits: Limits

    @classmethod
    def of(
        cls, table: QualityTable, parameters: Mapping[str, float], prices: Mapping[str, float] | None, limits: Limits
    ) -> Self:
        """Raises InputError for a size that is missing, negative or not finite, and for a category that no expert may serve."""
        size = {name: _size(name, parameters, limits) for name in table.experts}
        price = {name: float((prices or {}).get(name, 0.0)) for name in table.experts}
        table = table.only(sorted(table.experts, key=lambda name: (size[name], price[name], name)))
        unknown_CE = np.isnan(table.quality_CE)
        if unknown_CE.all(1).any():
            name = table.categories[int(np.argmax(unknown_CE.all(1)))]
            raise InputError(f"no expert has a quality in category {name!r}; score at least one there")
        size_E = np.array([size[name] for name in table.experts])
        value_CE = np.where(unknown_CE, -np.inf, np.nan_to_num(table.quality_CE) - limits.trade_off * size_E)
        return cls(
            value_CE=value_CE,
            share_C=table.share_C,
            size_E=size_E,
            price_E=np.array([price[name] for name in table.experts]),
            table=table,
            limits=limits,
        )

    @property
    def budget(self) -> float:
        """B, a rounding error above what was said; infinite for none."""
        limit = self.limits.budget
        return np.inf if limit is None else limit + TIE * max(1.0, limit)

    @property
    def most_active(self) -> float:
        """A, likewise."""
        limit = self.limits.active
        return np.inf if limit is None else limit + TIE * max(1.0, limit)

    @property
    def most_experts(self) -> int:
        """k, or the number of experts."""
        return len(self.size_E) if self.limits.max_experts is None else self.limits.max_experts

    def objective(self, choice_C: np.ndarray) -> float:
        """Of a whole choice."""
        return float(self.share_C @ self.value_CE[np.arange(len(choice_C)), choice_C])

    def active(self, choice_C: np.ndarray) -> float:
        """Mean parameters of a request."""
        return float(self.share_C @ self.size_E[choice_C])

    def key(self, choice_C: np.ndarray) -> tuple:
        """What decides between equal objectives; smaller is better."""
        used = np.unique(choice_C)
        # Rounded, so that the order of a sum does not decide.
        return (
            round(float(self.size_E[used].sum()), 9),
            round(float(self.price_E[used].sum()), 9),
            len(used),
            tuple(sorted(self.table.experts[at] for at in used)),
            round(self.active(choice_C), 9),
            tuple(choice_C.tolist()),
        )

    def is_better(self, choice_C: np.ndarray, other_C: np.ndarray | None) -> bool:
        """Whether a choice beats another (None: there is none)."""
        if other_C is None:
            return True
        difference = self.objective(choice_C) - self.objective(other_C)
        return difference > TIE or (abs(difference) <= TIE and self.key(choice_C) < self.key(other_C))

    def fits(self, choice_C: np.ndarray) -> bool:
        """Whether a choice keeps all limits."""
        used = np.unique(choice_C)
        return bool(
            np.isfinite(self.value_CE[np.arange(len(choice_C)), choice_C]).all()
            and self.size_E[used].sum() <= self.budget
            and len(used) <= self.most_experts
            and self.active(choice_C) <= self.most_active
        )

    def best_within(self, allowed: np.ndarray) -> np.ndarray | None:
        """The best choice of these experts (indices or mask) but for the limit A; None if a category has none."""
        masked_CE = np.full(self.value_CE.shape, -np.inf)
        masked_CE[:, allowed] = self.value_CE[:, allowed]
        best_C1 = masked_CE.max(1, keepdims=True)
        if np.isinf(best_C1).any():
            return None
        # The first: ties go by the order of experts.
        return np.argmax(masked_CE >= best_C1 - TIE, axis=1)

    def kept(self) -> np.ndarray:
        """Experts that some best map may need: none as small, as cheap and everywhere as good comes before them."""
        keep = [at for at in range(len(self.size_E)) if self.size_E[at] <= self.budget]
        dominated = set()
        # Experts are in the order of ties, so only earlier ones can dominate.
        for at in keep:
            for other in keep:
                if other >= at:
                    break
                if other not in dominated and (self.value_CE[:, other] >= self.value_CE[:, at]).all():
                    dominated.add(at)
                    break
        return np.array([at for at in keep if at not in dominated], np.int64)

    def map(self, choice_C: np.ndarray) -> ExpertMap:
        """A choice as users see it."""
        names, used = self.table.experts, np.unique(choice_C)
        rows = np.arange(len(choice_C))
        return ExpertMap(
            choice={name: names[at] for name, at in zip(self.table.categories, choice_C, strict=True)},
            chosen=tuple(names[at] for at in used),
            objective=self.objective(choice_C),
            quality=float(self.share_C @ self.table.quality_CE[rows, choice_C]),
            active=self.active(choice_C),
            host=float(self.size_E[used].sum()),
            limits=self.limits,
        )


def _size(name: str, parameters: Mapping[str, float], limits: Limits) -> float:
    matters = limits.budget is not None or limits.trade_off > 0 or limits.active is not None
    size = parameters.get(name)
    if size is None:
        if matters:
            raise InputError(
                f"how many parameters {name!r} has is not known; say it, in billions, or set no limit on them"
            )
        return 0.0
    if not (np.isfinite(size) and size >= 0):
        raise InputError(f"{name!r} has {size} billion parameters; it must be a finite number of at least 0")
    return float(size)
