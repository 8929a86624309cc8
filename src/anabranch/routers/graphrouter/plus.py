"""Mode ``plus`` behind the face that `predictor` uses: training, predictions with standard errors, models that join later."""
# Shapes: N queries, Q asked ones, S shots, M models, T tasks, D, V dimensions, W neighbours beside those used

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from anabranch.extras import require
from anabranch.kmeans import kmeans
from anabranch.routers.contract.strategy import Arrays, Facts
from anabranch.routers.graphrouter import placement
from anabranch.routers.graphrouter.centre import kappa_of, means
from anabranch.routers.graphrouter.graph import WEIGHTS
from anabranch.routers.graphrouter.memory import Looked, Memory, learned_arrays
from anabranch.routers.graphrouter.neighbours import Neighbours
from anabranch.routers.graphrouter.observed import Observed
from anabranch.routers.graphrouter.placement import Placement
from anabranch.routers.graphrouter.settings import PlusConfig

if TYPE_CHECKING:
    from anabranch.routers.graphrouter.plus_network import Material, PlusNetwork

# A cosine from which on two queries are one.
SAME = 1 - 1e-5


@dataclass(frozen=True)
class Said:
    """What the graph predicts of some queries.

    Attributes:
        effect_QM: expected effect.
        cost_QM: expected scaled cost of fitted models; of those that joined later, that of a usual one.
        error_QM: standard error of the effect.
        looked: what it comes from.
    """

    effect_QM: np.ndarray
    cost_QM: np.ndarray
    error_QM: np.ndarray
    looked: Looked


class Plus:
    """See `plus_network`.

    Args:
        config: settings.
        memory: the graph.
        model_MV: vectors of models.
        num_fitted: models that were there in training; those behind them joined later.
    """

    def __init__(self, config: PlusConfig, memory: Memory, model_MV: np.ndarray, num_fitted: int) -> None:
        self.config, self.memory, self.model_MV, self.num_fitted = config, memory, model_MV, num_fitted
        self.placed: dict[int, Placement] = {}

    @classmethod
    def fit(cls, config: PlusConfig, observed: Observed, seed: int) -> "Plus":
        """Train, then make all edges visible, those of validation queries too. ``seed`` is of all randomness.

        The shares of tasks in ``observed`` are told of each query without itself.
        """
        require("lm", by="learning a graph router (deciding needs no torch)")
        from anabranch.routers.graphrouter.plus_network import PlusNetwork, fit_plus

        vector_ND, model_MV, held_N = observed.vector_ND, observed.model_MV, observed.held_N
        effect_NM, cost_NM = observed.effect_NM, observed.cost_NM
        near = Neighbours(vector_ND.shape[1], config.exact_below, seed)
        near.add(vector_ND)
        kappa_2 = (kappa_of(effect_NM[~held_N]), kappa_of(cost_NM[~held_N]))
        network = PlusNetwork(centres(vector_ND[~held_N], config.centres, seed), model_MV.shape[1], config.width, seed)
        material = _material(near, config.neighbours, observed, kappa_2)
        validate = _validation(network, material, config.neighbours, observed) if held_N.any() else None
        fit_plus(network, material, config.episodes, config.neighbours, seed, validate)
        mean_2M = np.stack([means(effect_NM, kappa_2[0]), means(cost_NM, kappa_2[1])])
        stores = near, Neighbours(vector_ND.shape[1], config.exact_below, seed)
        value_2NM = np.stack([effect_NM, cost_NM])
        learned = learned_arrays(network)
        memory = Memory.fill(
            learned, mean_2M, kappa_2, config.neighbours, stores, observed.share_NT, value_2NM, config.capacity
        )
        return cls(config, memory, model_MV, model_MV.shape[0])

    # Predictions

    def say(self, vector_QD: np.ndarray, share_QT: np.ndarray, *, without: np.ndarray | None = None) -> Said:
        """Effect, cost and standard error of every model.

        Args:
            vector_QD: unit vectors.
            share_QT: how much of each task the queries are.
            without: rows of the memory that they are, -1 for none; nothing of them is used.
        """
        memory, old = self.memory, self.num_fitted
        looked = memory.look(vector_QD, share_QT, without=without)
        effect_QM = memory.mean_2M[0] + looked.sum_2QC[0][:, :1] + looked.sum_2QC[0][:, 1:]
        effect_QM[:, :old] += memory.described(vector_QD, self.model_MV[:old])
        cost_QM = memory.mean_2M[1] + looked.sum_2QC[1][:, :1] + looked.sum_2QC[1][:, 1:]
        error_QM = looked.error_QC[:, 1:] * memory.spread_C()[1:]
        if self.placed:
            x_QX, usual_Q = self._known(looked), cost_QM[:, :old].mean(1)
            for model, placed in self.placed.items():
                effect_QM[:, model] += placed.left(x_QX)
                cost_QM[:, model] = usual_Q
                error_QM[:, model] = placed.error(x_QX)
        return Said(effect_QM, cost_QM, error_QM, looked)

    def _known(self, looked: Looked) -> np.ndarray:
        """x: what is left of each fitted model, and the level."""
        return looked.sum_2QC[0][:, : 1 + self.num_fitted].astype(np.float64)

    def quality(self, said: Said) -> np.ndarray:
        """[Q, M]: the effect a choice is made by: less by caution for models that joined later, more by curiosity where that is set."""
        explore, later = self.config.explore, list(self.placed)
        quality_QM = said.effect_QM + explore * said.error_QM if explore else said.effect_QM.copy()
        if later:
            quality_QM[:, later] -= self.config.safety * said.error_QM[:, later]
        return quality_QM

    def nearest(
        self, vector_QD: np.ndarray, share_QT: np.ndarray, count: int
    ) -> list[tuple[int, float, float, dict[int, float]]]:
        """Of one query the rows attended to most, cosine, share of the attention, and what is left of each edge there."""
        memory = self.memory
        looked = memory.look(vector_QD, share_QT)
        alpha_J = looked.alpha_QJ[0] / max(float(looked.alpha_QJ[0].sum()), 1e-9)
        found = []
        for at in np.argsort(-alpha_J, kind="stable")[:count].tolist():
            row = int(looked.row_QJ[0, at])
            store, place = (
                (memory.fitted, row) if row < len(memory.fitted) else (memory.observed, row - len(memory.fitted))
            )
            up_C, weight_C = memory.gates(store, np.array([place]))[0, :2]
            edges = {int(c) - 1: round(float(up_C[c] / weight_C[c]), 4) for c in np.flatnonzero(weight_C) if c}
            like = float(store.near.vector_ND[place] @ vector_QD[0])
            found.append((row, round(like, 4), round(float(alpha_J[at]), 4), edges))
        return found

    # Learning on

    def add_edges(self, vector_ND: np.ndarray, share_NT: np.ndarray, model: int, effect: float, cost: float) -> None:
        """One query with one edge (N = 1); NaN for an effect or a scaled cost that is not known."""
        memory = self.memory
        said = self.say(vector_ND, share_NT)
        value_2NM = np.full((2, 1, memory.num_models), np.nan)
        value_2NM[:, 0, model] = effect, cost
        placed = self.placed.get(model)
        if placed is not None:
            x_X = self._known(said.looked)[0]
            value_2NM[1] = np.nan
            if np.isfinite(effect):
                rest = effect - memory.mean_2M[0, model] - x_X[0]
                value_2NM[0, 0, model] = effect - float(placed.left(x_X[None])[0])
                memory.mean_2M[0, model] += placed.learn(x_X, rest, memory.kappa_2[0] / (1 + memory.kappa_2[0]))
        guess_2N = said.looked.sum_2QC[:, :, 0].astype(np.float64)
        if np.isfinite(value_2NM).any():
            memory.add(vector_ND, share_NT, value_2NM, guess_2N)

    def add_model(self, vector_V: np.ndarray) -> int:
        """A model that nobody has seen yet, placed by its description. Returns its column."""
        memory, old = self.memory, self.num_fitted
        like_M = softened(self.model_MV[:old] @ vector_V)
        weight_X = np.concatenate([[0.0], like_M])
        means_M = memory.mean_2M[0, :old]
        memory.add_model(np.array([like_M @ means_M, memory.mean_2M[1, :old].mean()]))
        self.model_MV = np.concatenate([self.model_MV, vector_V[None].astype(np.float32)])
        column = memory.num_models - 1
        self.placed[column] = placement.unseen(weight_X, float(means_M.std()))
        return column

    def place(self, model: int, vector_SD: np.ndarray, share_ST: np.ndarray, effect_S: np.ndarray) -> None:
        """Place a model by its scores at some queries, stored ones or new (`placement`)."""
        memory = self.memory
        row_SJ, like_SJ = memory.fitted.near.search(vector_SD, 1)
        row_S = np.where(like_SJ[:, 0] >= SAME, row_SJ[:, 0], -1)
        looked = memory.look(vector_SD, share_ST, without=row_S)
        x_SX = self._known(looked)
        level_S, weight_S = memory.levels(row_S, x_SX[:, 0])
        mean = float((weight_S * (effect_S - level_S)).sum() / weight_S.sum())
        placed = placement.place(x_SX, effect_S - level_S - mean, weight_S)
        self.placed[model] = placed
        memory.mean_2M[0, model] = mean
        memory.put(row_S, vector_SD, share_ST, model, effect_S - level_S - mean - placed.left(x_SX), weight_S)

    # Saving

    def state(self) -> tuple[Arrays, Facts]:
        """All of it."""
        arrays, facts = self.memory.state()
        for model, placed in self.placed.items():
            arrays |= placed.state(f"placed.{model}.")
        return {**arrays, "model_MV": self.model_MV}, {
            **facts,
            "num_fitted": self.num_fitted,
            "placed": list(self.placed),
        }

    @classmethod
    def of_state(cls, config: PlusConfig, arrays: Mapping[str, np.ndarray], facts: Facts) -> "Plus":
        """From what `state` gave."""
        dim = arrays["fitted.near.vector_ND"].shape[1]
        first, second = (Neighbours(dim, config.exact_below) for _ in range(2))
        memory = Memory.of_state(arrays, facts, config.neighbours, (first, second), config.capacity)
        made = cls(config, memory, arrays["model_MV"], facts["num_fitted"])
        made.placed = {int(model): Placement.of_state(dict(arrays), f"placed.{model}.") for model in facts["placed"]}
        return made


def softened(like_M: np.ndarray) -> np.ndarray:
    """Weights that add up to 1, by likeness of descriptions."""
    power_M = np.exp(8.0 * (like_M - like_M.max())).astype(np.float64)
    return power_M / power_M.sum()


def centres(vector_ND: np.ndarray, k: int, seed: int, most: int = 20_000) -> np.ndarray:
    """float32 [k, D]: k-means of ``most`` rows at most; fewer centres where there are fewer different rows."""
    if len(vector_ND) > most:
        vector_ND = vector_ND[np.random.default_rng(seed).choice(len(vector_ND), most, replace=False)]
    return kmeans(vector_ND, k, num_starts=1, seed=seed)[0]


def _material(near: Neighbours, neighbours: int, observed: Observed, kappa_2: tuple[float, float]) -> "Material":
    """What episodes are drawn from: twice the neighbours that are used, since half of all queries are hidden."""
    import torch

    from anabranch.routers.graphrouter.plus_network import Material, Support

    row_NW, like_NW = near.search(observed.vector_ND, 2 * neighbours + 1)
    like_NW = np.where(observed.group_N[row_NW] == observed.group_N[:, None], -np.inf, like_NW)
    value_2NM = np.stack((observed.effect_NM, observed.cost_NM))
    support = Support(
        torch.from_numpy(observed.vector_ND),
        torch.from_numpy(observed.share_NT),
        torch.from_numpy(np.nan_to_num(value_2NM)).float(),
        torch.from_numpy(np.isfinite(value_2NM)).float(),
        kappa_2,
    )
    others = (row_NW, like_NW, observed.task_N, observed.model_MV, ~observed.held_N)
    return Material(support, *map(torch.from_numpy, others))


def _validation(
    network: "PlusNetwork", material: "Material", neighbours: int, observed: Observed
) -> Callable[[], float]:
    """What choices on held-out queries earn, each scenario as a share of the spread between its best and its mean choice."""
    import torch

    from anabranch.routers.graphrouter.plus_network import among, taken

    effect_NM, cost_NM, held_N = observed.effect_NM, observed.cost_NM, observed.held_N
    used_S, target_Q = (torch.from_numpy(np.flatnonzero(rows)) for rows in (~held_N, held_N))
    support = material.support
    near = among(material, target_Q, used_S, neighbours)
    visible = taken(support, used_S, support.value_2NM, support.seen_2NM, 1.0)

    def earned() -> float:
        found = network(visible, support.vector_ND[target_Q], support.share_NT[target_Q], *near, material.model_MV)
        effect_QM, cost_QM = (value.numpy() for value in found)
        return sum(
            _share(effect_QM, cost_QM, effect_NM[held_N], cost_NM[held_N], *weights) for weights in WEIGHTS.values()
        )

    return earned


def _share(
    effect_QM: np.ndarray, cost_QM: np.ndarray, true_QM: np.ndarray, paid_QM: np.ndarray, effect: float, cost: float
) -> float:
    value_QM = effect * true_QM - cost * np.nan_to_num(paid_QM)
    seen_QM = np.isfinite(value_QM)
    filled_QM = np.where(seen_QM, value_QM, 0.0)
    choice_Q = np.argmax(np.where(seen_QM, effect * effect_QM - cost * cost_QM, -np.inf), 1)
    some_Q = seen_QM.any(1)
    if not some_Q.any():
        return 0.0
    mean_Q = filled_QM.sum(1) / np.maximum(seen_QM.sum(1), 1)
    gained = (filled_QM[np.arange(len(choice_Q)), choice_Q] - mean_Q)[some_Q].sum()
    most = (np.where(seen_QM, value_QM, -np.inf).max(1)[some_Q] - mean_Q[some_Q]).sum()
    return float(gained / most) if most > 0 else 0.0
