"""Contextual bandits: routers that learn only from the answers that were given.

Every model is an arm with a linear model of its quality, E[quality | x] = theta_M^T z(x), kept by its ridge regression:

    A = ridge I + sum z z^T,    b = sum quality z,    theta = A^-1 b                          over the calls this model got

An observation updates A^-1 in O(d^2) (Sherman and Morrison 1950): A^-1 <- A^-1 - (A^-1 z)(A^-1 z)^T / (1 + z^T A^-1 z). What is tried:

    linucb      theta^T z + alpha sqrt(z^T A^-1 z)               Li et al. 2010 (arXiv 1003.0146, algorithm 1, disjoint models)
    thompson    a draw of theta^T z, theta ~ N(theta, scale^2 A^-1)      Agrawal and Goyal 2013 (arXiv 1209.3352)
    eps_greedy  theta^T z, or with chance epsilon any model              Sutton and Barto 2018, section 2.4

each minus ``trade_off`` times the model's mean cost so far. The draws of the latter two are a hash of seed, step, text and
request id: the same state decides the same of one request.

z(x) is [1, R (x - mean)] with few directions R, since fewer are learned from fewer answers: the principal ones of the recorded
queries after ``fit`` (warm start: every known outcome of the data is an observation of weight ``warm_weight``). Without it seeded
random ones serve for the first ``settle`` observations; then the principal ones of these take their place, and the observations are
learned again.

Drift: with ``discount`` < 1 an observation weighs discount^(observations since) (Russac et al. 2019, arXiv 1909.09146, D-LinUCB);
arms that were not asked grow uncertain again. Forgetting stops where A^-1 would pass the prior's I / ridge by its trace, which
D-LinUCB has its extra ridge term for.
"""
# Shapes: N queries, M arms, P models of the pool, V dimensions of a vector, D of z

from typing import Any, Self

import numpy as np

from anabranch.config import Field, Seed, configclass
from anabranch.errors import InputError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.knobs import LAMBDA, trade_off_of
from anabranch.routers.contract.query import Decision, Model, Outcome, Pool, Query
from anabranch.routers.contract.strategy import Arrays, Facts, Played, Strategy, ordered, playable, played
from anabranch.routers.money import dollars
from anabranch.routers.strategies.fixed import USUAL_COMPLETION, USUAL_PROMPT
from anabranch.routers.strategies.normals import largest_of_normals, normal_of
from anabranch.routers.strategies.regression_sums import FIXED, SEEDED, Sums, turned
from anabranch.routers.strategies.shared_bandit import Pooled
from anabranch.routers.strategies.training import lot, share, training_set

# Observations, beyond which an arm is as uncertain as can be.
MOST_AGE = 10_000

KNOBS = (0.0, *np.logspace(-3, 3, 61).tolist())


class Bandit(Pooled):
    """What the three have in common; a subclass says ``_index``."""

    @configclass
    class Config(Strategy.Config):
        """Learning.

        Attributes:
            dim: directions of the vector that are learned from; all where the vector has no more.
            settle: observations after which a cold start takes its directions from what it saw.
            ridge: of the regressions, in observations' worth.
            trade_off: score given up to save a dollar on one query.
            discount: weight of an observation after each later one; 1 never forgets.
            warm_weight: of a recorded outcome in ``fit`` against an observed one.
            seed: of random directions and draws.
        """

        dim: int = Field(default=16, ge=1)
        settle: int = Field(default=256, ge=2)
        ridge: float = Field(default=0.3, gt=0)
        trade_off: float = Field(default=0.0, ge=0)
        discount: float = Field(default=1.0, gt=0, le=1)
        warm_weight: float = Field(default=1.0, ge=0)
        seed: Seed = 0

    needs_vector = True
    knob = "trade_off"
    sender_knobs = (LAMBDA,)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.models: tuple[str, ...] = ()
        # Of z but for its constant.
        self.direction_DV: np.ndarray | None = None
        self.centre_V = np.zeros(0)
        self.inverse_MDD, self.b_MD, self.theta_MD = np.zeros((0, 0, 0)), np.zeros((0, 0)), np.zeros((0, 0))
        self.last_M = np.zeros(0, np.int64)  # step of the arm's last observation
        # Calls with a known cost, and its mean.
        self.calls_M, self.cost_M = np.zeros(0), np.zeros(0)
        self.steps = 0
        # Vectors; arm and quality, until it settles.
        self.seen_SV, self.seen_S2 = (
            np.zeros((0, 0), np.float32),
            np.zeros((0, 2)),
        )

    # -- z

    @property
    def learned_dim(self) -> int | None:
        """See `Strategy`."""
        return None if self.direction_DV is None else len(self.centre_V)

    def features(self, vector_NV: np.ndarray) -> np.ndarray:
        """z ``[N, D]``. The first vectors seen fix their dimension. Raises InputError for another one."""
        if self.direction_DV is None:
            dim = vector_NV.shape[1]
            rng = np.random.default_rng(self.config.seed)
            basis_DV = np.eye(dim)
            if self.config.dim < dim:
                basis_DV = np.linalg.qr(rng.standard_normal((dim, self.config.dim)))[0].T
                basis_DV *= np.sqrt(dim / self.config.dim)
                self.seen_SV = np.zeros((0, dim), np.float32)
            self._start(np.zeros(dim), basis_DV, SEEDED if self.config.dim < dim else FIXED)
        if vector_NV.shape[1] != len(self.centre_V):
            raise InputError(
                f"{self.name} learns from vectors of {len(self.centre_V)} dimensions and was given {vector_NV.shape[1]}; keep one embedder"
            )
        return turned(vector_NV, self.centre_V, self.direction_DV)  # type: ignore[arg-type]

    def _start(self, centre_V: np.ndarray, direction_DV: np.ndarray, basis: str = FIXED) -> None:
        self.centre_V, self.direction_DV, self.basis = centre_V, direction_DV, basis
        dim = len(direction_DV) + 1
        self.own, self.others = (Sums(dim, basis=basis, length=len(centre_V)) for _ in range(2))
        self.inverse_MDD, self.b_MD, self.theta_MD = np.zeros((0, dim, dim)), np.zeros((0, dim)), np.zeros((0, dim))
        self.models, self.last_M = (), np.zeros(0, np.int64)
        self.calls_M, self.cost_M, self.steps = np.zeros(0), np.zeros(0), 0

    def _arm(self, name: str) -> int:
        """Place of a model's arm; one that is new starts from the prior."""
        if name not in self.models:
            dim = self.b_MD.shape[1]
            self.models = (*self.models, name)
            self.inverse_MDD = np.concatenate((self.inverse_MDD, np.eye(dim)[None] / self.config.ridge))
            self.b_MD, self.theta_MD = (np.vstack((value, np.zeros(dim))) for value in (self.b_MD, self.theta_MD))
            self.last_M = np.append(self.last_M, self.steps)
            self.calls_M, self.cost_M = np.append(self.calls_M, 0.0), np.append(self.cost_M, 0.0)
        return self.models.index(name)

    # -- learning

    def fit(self, data: Recorded, *, seed: int = 0) -> Self:
        """Warm start. What was observed before is forgotten. Needs no chance."""
        training_set(data, self.name)
        vector_NV = np.asarray(data.vector_ND, float)
        self._start(*self._principal(vector_NV))
        self.seen_SV, self.seen_S2 = np.zeros((0, 0), np.float32), np.zeros((0, 2))
        z_ND = self.features(vector_NV)
        for name in data.models:
            self._arm(name)
        for arm in range(len(data.models)):
            self._warm(arm, z_ND, data.score_NM[:, arm])
            if data.cost_NM is not None:
                known_N = np.isfinite(data.cost_NM[:, arm])
                self.calls_M[arm] = known_N.sum()
                self.cost_M[arm] = data.cost_NM[known_N, arm].mean() if known_N.any() else 0.0
        self._first = self._copied()
        return self

    def _principal(self, vector_NV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean of the vectors, and their principal directions, scaled so that z is as long as [1, 1] on average."""
        centre_V = vector_NV.mean(0)
        covariance_VV = np.cov((vector_NV - centre_V).T, bias=True).reshape(len(centre_V), -1)
        size_V, axis_VV = np.linalg.eigh(covariance_VV)
        size_V, axis_VV = size_V[::-1], axis_VV.T[::-1]
        kept = max(1, min(self.config.dim, int((size_V > size_V[0] * 1e-9).sum())))
        scale = np.sqrt(max(float(size_V[:kept].sum()), 0.0))
        return centre_V, axis_VV[:kept] / (scale if scale > 0 else 1.0)

    def _settle(self) -> None:
        """Directions from what was seen, and the same observations once more along them. Costs so far stay."""
        vector_SV, told_S2 = self.seen_SV, self.seen_S2
        models, calls_M, cost_M = self.models, self.calls_M, self.cost_M
        self._start(*self._principal(vector_SV.astype(float)), "chosen")
        self.seen_SV, self.seen_S2 = np.zeros((0, 0), np.float32), np.zeros((0, 2))
        for name in models:
            self._arm(name)
        self.calls_M, self.cost_M = calls_M, cost_M
        for z_D, (arm, quality) in zip(self.features(vector_SV), told_S2, strict=True):
            self._update(int(arm), z_D, float(quality))

    def _warm(self, arm: int, z_ND: np.ndarray, score_N: np.ndarray) -> None:
        known_N = np.isfinite(score_N)
        weighed_ND = self.config.warm_weight * z_ND[known_N]
        dim = z_ND.shape[1]
        self.inverse_MDD[arm] = np.linalg.inv(self.config.ridge * np.eye(dim) + weighed_ND.T @ z_ND[known_N])
        self.b_MD[arm] = weighed_ND.T @ score_N[known_N]
        self.theta_MD[arm] = self.inverse_MDD[arm] @ self.b_MD[arm]

    def observe(self, outcome: Outcome) -> None:
        """One step, if there is a quality and a vector; a cost counts in any case."""
        quality, vector_V = outcome.quality, outcome.query.vector_D
        if vector_V is None or (quality is None and outcome.cost is None):
            return
        z_D = self.features(np.asarray(vector_V)[None])[0]
        arm = self._arm(outcome.model)
        if outcome.cost is not None and np.isfinite(outcome.cost):
            self.calls_M[arm] += 1
            step = max(1 / self.calls_M[arm], 1 - self.config.discount)
            self.cost_M[arm] += (outcome.cost - self.cost_M[arm]) * step
            self.own.paid(outcome.model, outcome.cost)
        if quality is not None and np.isfinite(quality):
            if self._keeps:
                self.own.keep(outcome.model, np.asarray(vector_V), float(quality))
            self._update(arm, z_D, float(quality))
            if self._is_shared:
                self._choose_directions()
            elif self.seen_SV.shape[1]:
                self.seen_SV = np.vstack((self.seen_SV, np.asarray(vector_V, np.float32)))
                self.seen_S2 = np.vstack((self.seen_S2, (arm, quality)))
                if len(self.seen_SV) >= self.config.settle:
                    self._settle()

    def _update(self, arm: int, z_D: np.ndarray, quality: float) -> None:
        """Sherman and Morrison, after what the arm knew has been discounted."""
        self.steps += 1
        inverse_DD = self.inverse_MDD[arm]
        keep = self.config.discount ** (self.steps - self.last_M[arm])
        if keep < 1:
            prior = len(z_D) / self.config.ridge
            keep = max(keep, min(1.0, np.trace(inverse_DD) / prior))
            inverse_DD /= keep
            self.b_MD[arm] *= keep
        image_D = inverse_DD @ z_D
        inverse_DD -= np.outer(image_D, image_D) / (1 + z_D @ image_D)
        self.b_MD[arm] += quality * z_D
        self.theta_MD[arm] = inverse_DD @ self.b_MD[arm]
        self.last_M[arm] = self.steps
        self.own.observe(self.models[arm], z_D, quality)

    # -- deciding

    def route(self, query: Query, pool: Pool) -> Decision:
        """By index, less the weighed cost. A model never asked has the prior's index and no cost but that of its price."""
        mean_P, width_P, cost_P = self._view(query, pool)
        charge_P = trade_off_of(query.knobs, self.config.trade_off) * cost_P
        index_P, how = self._index(query, pool, mean_P, width_P, charge_P)
        candidates = ordered(pool, index_P, quality=mean_P, cost=cost_P)
        best = pool.names.index(candidates[0].model)
        is_open_P = np.isin(pool.names, [candidate.model for candidate in candidates])
        return Decision(
            candidates=candidates,
            strategy=self.name,
            reason=f"{self.name} {how} {candidates[0].model}",
            details={
                "mean": round(float(mean_P[best]), 4),
                "width": round(float(width_P[best]), 4),
                "steps": self.steps,
            },
            probability=self._chance(best, is_open_P, mean_P - charge_P, width_P),
        )

    def _view(self, query: Query, pool: Pool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean and standard error of each model's quality, and its mean cost."""
        if query.vector_D is None:
            raise InputError(f"{self.name} needs the vector of a query; give the gateway an embedder")
        z_D = self.features(np.asarray(query.vector_D)[None])[0]
        mean_P, variance_P = self._beliefs(z_D, pool.names)
        return mean_P, np.sqrt(variance_P), np.array([self._cost(model) for model in pool.models])

    def _beliefs(self, z_D: np.ndarray, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance z^T A^-1 z of each model's quality as of now: variance grows while an arm is not asked, up to the prior's."""
        prior = float(z_D @ z_D) / self.config.ridge
        mean_P, variance_P = np.zeros(len(names)), np.full(len(names), prior)
        # The usual case, without copying the matrices.
        if names == self.models:
            places, arms, inverse_MDD = np.arange(len(names)), np.arange(len(names)), self.inverse_MDD
        else:
            places = np.array([place for place, name in enumerate(names) if name in self.models], np.int64)
            arms = np.array([self.models.index(names[place]) for place in places], np.int64)
            inverse_MDD = self.inverse_MDD[arms]
        if len(arms):
            mean_P[places] = self.theta_MD[arms] @ z_D
            own_M = ((inverse_MDD @ z_D) @ z_D).clip(min=0)
            if self.config.discount < 1:
                aged_M = own_M * self.config.discount ** -np.minimum(self.steps - self.last_M[arms], MOST_AGE).astype(
                    float
                )
                own_M = np.maximum(own_M, np.minimum(aged_M, prior))
            variance_P[places] = own_M
        return mean_P, variance_P

    def _cost(self, model: Model) -> float:
        """Mean cost so far; before the first call the price of a usual one."""
        arm = self.models.index(model.name) if model.name in self.models else -1
        if arm >= 0 and self.calls_M[arm]:
            return float(self.cost_M[arm])
        return dollars(model.price.cost(USUAL_PROMPT, USUAL_COMPLETION))

    def _index(
        self, query: Query, pool: Pool, mean_P: np.ndarray, width_P: np.ndarray, charge_P: np.ndarray
    ) -> tuple[np.ndarray, str]:
        """What to order by, and a verb for the reason."""
        raise NotImplementedError

    def _chance(self, best: int, is_open_P: np.ndarray, value_P: np.ndarray, width_P: np.ndarray) -> float:
        """With which probability the model at ``best`` is the first choice among the open ones, over all that may be drawn."""
        return 1.0

    # -- judging

    def knobs(self, data: Recorded) -> list[float]:
        """0, then ten to a power of ten around what a dollar buys between the dearest and the cheapest model."""
        if data.cost_NM is None or not np.isfinite(data.cost_NM).any():
            return [0.0]
        cost_M = np.array([np.nanmean(cost_N) for cost_N in data.cost_NM.T if np.isfinite(cost_N).any()])
        spread = float(np.ptp(cost_M))
        return [value / spread for value in KNOBS] if spread > 0 else [0.0]

    def with_knob(self, value: float) -> "Bandit":
        """A copy of what was learned, at another trade-off; the two go on apart."""
        other: Bandit = self.config.replace(trade_off=value).build()
        if self.direction_DV is not None:
            other.load_state(*self._copied())
        return other

    def play(self, data: Recorded, pool: Pool) -> Played:
        """Row after row: decide, then observe the one outcome. A copy learns; this one stays as it is."""
        learner = self.with_knob(self.config.trade_off)
        columns = playable(data, pool)
        recorded = Pool(tuple(pool.models[pool.names.index(data.models[column])] for column in columns), pool.now_s)
        choice_N = np.zeros(len(data), np.int64)
        for row, query in enumerate(data.queries()):
            mean_P, width_P, cost_P = learner._view(query, recorded)
            index_P, _ = learner._index(query, recorded, mean_P, width_P, learner.config.trade_off * cost_P)
            model = ordered(recorded, index_P)[0].model
            column = data.models.index(model)
            choice_N[row] = column
            cost = None if data.cost_NM is None else float(data.cost_NM[row, column])
            learner.observe(Outcome(query=query, model=model, quality=float(data.score_NM[row, column]), cost=cost))
        return played(data, choice_N)

    def state(self) -> tuple[Arrays, Facts]:
        """All arms."""
        direction_DV = np.zeros((0, 0)) if self.direction_DV is None else self.direction_DV
        names = ("centre_V", "inverse_MDD", "b_MD", "theta_MD", "last_M", "calls_M", "cost_M", "seen_SV", "seen_S2")
        arrays = {"direction_DV": direction_DV} | {name: getattr(self, name) for name in names}
        return arrays, {"models": list(self.models), "steps": self.steps}

    def _copied(self) -> tuple[Arrays, Facts]:
        arrays, facts = self.state()
        return {name: array.copy() for name, array in arrays.items()}, facts

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave. The arrays are copied, since learning goes on in place."""
        for name, value in arrays.items():
            setattr(self, name, np.array(value))
        if not self.direction_DV.size:  # type: ignore[union-attr]
            self.direction_DV = None
        self.models, self.steps = tuple(facts["models"]), int(facts["steps"])
        self.basis = SEEDED if self.seen_SV.shape[1] else FIXED
        self.own, self.others = (
            Sums(self.b_MD.shape[1], basis=self.basis, length=len(self.centre_V)) for _ in range(2)
        )
        self._first = self._copied()


class LinUCB(Bandit, kind="linucb"):
    """The model whose quality may well be the largest: mean plus ``alpha`` standard errors."""

    @configclass
    class Config(Bandit.Config):
        """Attributes: ``alpha``, standard errors added: in theory 1 + sqrt(ln(2 / delta) / 2), in practice far less."""

        alpha: float = Field(default=0.2, ge=0)

    def _index(
        self, query: Query, pool: Pool, mean_P: np.ndarray, width_P: np.ndarray, charge_P: np.ndarray
    ) -> tuple[np.ndarray, str]:
        return mean_P + self.config.alpha * width_P - charge_P, "hopes for most of"


class Thompson(Bandit, kind="thompson"):
    """The model that is best by one draw from what is believed of each."""

    @configclass
    class Config(Bandit.Config):
        """Attributes: ``scale``, standard deviation of a quality about its mean, and so of the draws."""

        scale: float = Field(default=0.15, gt=0)

    def _index(
        self, query: Query, pool: Pool, mean_P: np.ndarray, width_P: np.ndarray, charge_P: np.ndarray
    ) -> tuple[np.ndarray, str]:
        draw_P = np.array([normal_of(self.config.seed, self.steps, name, *lot(query)) for name in pool.names])
        return mean_P + self.config.scale * width_P * draw_P - charge_P, "drew the most for"

    def _chance(self, best: int, is_open_P: np.ndarray, value_P: np.ndarray, width_P: np.ndarray) -> float:
        """That its draw is the largest, see `largest_of_normals`."""
        chance_P = largest_of_normals(value_P[is_open_P], self.config.scale * width_P[is_open_P])
        # A draw that fell where the integral sees nothing was possible all the same.
        return float(np.clip(chance_P[np.count_nonzero(is_open_P[:best])], 1e-9, 1.0))


class EpsGreedy(Bandit, kind="eps_greedy"):
    """The best model so far; now and then any."""

    @configclass
    class Config(Bandit.Config):
        """Chance of trying.

        Attributes:
            epsilon: chance of a model by lot.
            decay: epsilon is divided by 1 + decay * observations.
        """

        epsilon: float = Field(default=0.3, ge=0, le=1)
        decay: float = Field(default=0.002, ge=0)

    def _index(
        self, query: Query, pool: Pool, mean_P: np.ndarray, width_P: np.ndarray, charge_P: np.ndarray
    ) -> tuple[np.ndarray, str]:
        value_P = mean_P - charge_P
        epsilon = self._epsilon()
        if share(self.config.seed, self.steps, *lot(query)) >= epsilon:
            return value_P, "found best"
        lot_P = np.array([share(self.config.seed, self.steps, name, *lot(query)) for name in pool.names])
        open_P = np.array([model.is_available for model in pool.models])
        open_P |= ~open_P.any()
        drawn = int(np.where(open_P, lot_P, -1.0).argmax())
        value_P = value_P.copy()
        value_P[drawn] = value_P.max() + 1.0
        return value_P, "drew by lot"

    def _epsilon(self) -> float:
        return self.config.epsilon / (1 + self.config.decay * self.steps)

    def _chance(self, best: int, is_open_P: np.ndarray, value_P: np.ndarray, width_P: np.ndarray) -> float:
        """Its share of the lot, and, if it is the best so far, all the rest."""
        epsilon = self._epsilon()
        greedy = int(np.where(is_open_P, value_P, -np.inf).argmax())
        return float(epsilon / is_open_P.sum() + (1 - epsilon) * (best == greedy))
