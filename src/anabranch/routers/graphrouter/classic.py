"""Modes ``reference``, ``mean`` and ``hetero`` behind the face that `predictor` uses."""
# Shapes: N queries, M models, T tasks, D, V dimensions

from collections.abc import Mapping

import numpy as np

from anabranch.extras import require
from anabranch.routers.contract.strategy import Arrays
from anabranch.routers.graphrouter.encoding import Encoding
from anabranch.routers.graphrouter.graph import Scenario, utility
from anabranch.routers.graphrouter.observed import Observed
from anabranch.routers.graphrouter.settings import Training


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
        cls, mode: str, scenario: Scenario, hidden: int, settings: Training, observed: Observed, seed: int
    ) -> "Classic":
        """Train, then make all edges visible, those of validation queries too.

        Args:
            mode: which.
            scenario: what the best is.
            hidden: half the width of a node.
            settings: of training.
            observed: what to learn from.
            seed: of weights and masks.
        """
        require("lm", by="learning a graph router (deciding needs no torch)")
        import torch

        from anabranch.routers.graphrouter.encoding import layers
        from anabranch.routers.graphrouter.network import Hetero, Network, Nodes
        from anabranch.routers.graphrouter.train import Table, fit_network

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vectors = observed.vector_ND, observed.task_TV, observed.model_MV
            sizes = (*(vector.shape[1] for vector in vectors), hidden)
            network = Hetero(*sizes) if mode == "hetero" else Network(*sizes, mean=mode == "mean")
        nodes = Nodes(
            *(
                torch.from_numpy(np.ascontiguousarray(value, np.float32))
                for value in (observed.vector_ND, observed.share_NT, observed.task_TV, observed.model_MV)
            )
        )
        table = Table(observed.effect_NM, observed.cost_NM, observed.held_N, scenario)
        fit_network(network, nodes, table, settings, seed)
        made = cls(mode, scenario, Encoding(layers(network), mode, observed.task_TV, observed.model_MV))
        made.add(observed.vector_ND, observed.share_NT, observed.effect_NM, observed.cost_NM)
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
