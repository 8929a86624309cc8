"""Modes ``reference``, ``mean`` and ``hetero`` behind the face that `predictor` uses."""
# Shapes: N queries, M models, T tasks, D, V dimensions

from collections.abc import Mapping

import numpy as np

from anabranch.extras import require
from anabranch.gateway.graphrouter.encoding import Encoding
from anabranch.gateway.graphrouter.graph import Scenario, utility
from anabranch.gateway.graphrouter.settings import Training
from anabranch.gateway.strategy import Arrays


class Classic:
    """The paper's graph: it says how likely each edge is the best of its query, for the scenario it was trained for.

    Args:
        mode: which.
        scenario: what the best is.
        encoding: of models.
    """

    def __init__(self, mode: str, scenario: Scenario, encoding: Encoding) -> None:
        self.mode, self.scenario, self.encoding = mode, scenario, encoding

    @classmethod
    def fit(
        cls, mode: str, scenario: Scenario, hidden: int, settings: Training, vector_ND: np.ndarray, share_NT: np.ndarray,
        task_TV: np.ndarray, model_MV: np.ndarray, effect_NM: np.ndarray, cost_NM: np.ndarray, held_N: np.ndarray, seed: int,
    ) -> "Classic":  # fmt: skip
        """Train, then make all edges visible, those of validation queries too.

        Args:
            mode: which.
            scenario: what the best is.
            hidden: half the width of a node.
            settings: of training.
            vector_ND: of queries.
            share_NT: how much of each task they are.
            task_TV: of tasks.
            model_MV: of models.
            effect_NM: NaN where not observed.
            cost_NM: scaled.
            held_N: validation queries.
            seed: of weights and masks.
        """
        require("lm", by="learning a graph router (deciding needs no torch)")
        import torch

        from anabranch.gateway.graphrouter.encoding import layers
        from anabranch.gateway.graphrouter.network import Hetero, Network, Nodes
        from anabranch.gateway.graphrouter.train import Table, fit_network

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes = (vector_ND.shape[1], task_TV.shape[1], model_MV.shape[1], hidden)
            network = Hetero(*sizes) if mode == "hetero" else Network(*sizes, mean=mode == "mean")
        nodes = Nodes(
            *(
                torch.from_numpy(np.ascontiguousarray(value, np.float32))
                for value in (vector_ND, share_NT, task_TV, model_MV)
            )
        )
        fit_network(network, nodes, Table(effect_NM, cost_NM, held_N, scenario), settings, seed)
        made = cls(mode, scenario, Encoding(layers(network), mode, task_TV, model_MV))
        made.add(vector_ND, share_NT, effect_NM, cost_NM)
        return made

    def add(self, vector_ND: np.ndarray, share_NT: np.ndarray, effect_NM: np.ndarray, cost_NM: np.ndarray) -> None:
        """Take in queries with edges; NaN where there is none. An edge needs both effect and cost."""
        seen_NM = np.isfinite(effect_NM) & np.isfinite(cost_NM)
        edge_NM3 = np.stack([utility(effect_NM, cost_NM, self.scenario), cost_NM, effect_NM], -1)
        edge_NM3 = np.where(seen_NM[..., None], edge_NM3, 0.0).astype(np.float32)
        self.encoding.add(vector_ND, share_NT, edge_NM3, seen_NM.astype(np.float32))
        self.encoding.refresh()

    def predict(self, vector_ND: np.ndarray, share_NT: np.ndarray) -> np.ndarray:
        """The chance of each edge to be the best, float64 [N, M]."""
        return 1 / (1 + np.exp(-self.encoding.logits(vector_ND, share_NT).astype(np.float64)))

    def state(self) -> Arrays:
        """Weights, vectors of nodes before any message, sums."""
        own = self.encoding
        return {**own.weights, **own.state(), "first_MH": own.first_MH, "task_TH": own.task_TH}

    @classmethod
    def of_state(cls, mode: str, scenario: Scenario, arrays: Mapping[str, np.ndarray]) -> "Classic":
        """From what `state` gave."""
        weights = {name: value for name, value in arrays.items() if name.startswith("w.")}
        encoding = Encoding.of_first(weights, mode, arrays["task_TH"], arrays["first_MH"])
        encoding.load_state(arrays)
        return cls(mode, scenario, encoding)
