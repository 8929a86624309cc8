"""The paper's network at rest, in numpy: the encodings of models, kept up to date edge by edge, and decisions from them.

A model's node needs of all edges four sums only: of x_q(0), of x_q(1), of the edges' features, and their number (in ``hetero`` those of
x_q(0) for tasks too). So an edge more costs O(H^2), whatever the size of the graph, and equals a fresh pass over all edges.
"""
# Shapes: N queries, M models, T tasks, H width of a node

from collections.abc import Mapping

import numpy as np

from anabranch.routers.contract.strategy import Arrays


def layers(network: "object") -> Arrays:
    """A trained network's weights as float32 arrays ``w.*``; BatchNorm as the scale and shift that it comes to when frozen."""
    found = {f"w.{name}": value.detach().numpy().copy() for name, value in network.state_dict().items()}  # type: ignore[attr-defined]
    for k in range(2):
        deviation = np.sqrt(found.pop(f"w.norm.{k}.running_var") + network.norm[k].eps)  # type: ignore[attr-defined]
        scale = found.pop(f"w.norm.{k}.weight") / deviation
        found[f"w.shift.{k}"] = found.pop(f"w.norm.{k}.bias") - found.pop(f"w.norm.{k}.running_mean") * scale
        found[f"w.scale.{k}"] = scale
        del found[f"w.norm.{k}.num_batches_tracked"]
    return {name: np.ascontiguousarray(value, np.float32) for name, value in found.items()}


class Encoding:
    """Encoded models of modes ``reference``, ``mean`` and ``hetero``.

    Args:
        weights: as `layers` gives.
        mode: which.
        task_TV: vectors of tasks.
        model_MV: vectors of models.

    Attributes:
        sums: ``x0`` and ``x1`` [M, H], ``a`` [M, 3], ``count`` [M]; in ``hetero`` ``task`` [T, H] and ``weight`` [T]: float64.
    """

    SUMS = ("x0", "x1", "a", "count", "task", "weight")

    def __init__(self, weights: Arrays, mode: str, task_TV: np.ndarray, model_MV: np.ndarray) -> None:
        self._begin(weights, mode, linear(weights, "task", task_TV), linear(weights, "model", model_MV))

    @classmethod
    def of_first(cls, weights: Arrays, mode: str, task_TH: np.ndarray, first_MH: np.ndarray) -> "Encoding":
        """From nodes as they are before any message, without edges."""
        made = cls.__new__(cls)
        made._begin(weights, mode, task_TH, first_MH)
        return made

    def _begin(self, weights: Arrays, mode: str, task_TH: np.ndarray, first_MH: np.ndarray) -> None:
        self.weights, self.mode = weights, mode
        self.width = weights["w.bias.0"].shape[0]
        self.task_TH, self.first_MH = task_TH, first_MH
        models, tasks = len(first_MH), len(task_TH)
        shapes = {
            "x0": (models, self.width),
            "x1": (models, self.width),
            "a": (models, 3),
            "count": (models,),
            "task": (tasks, self.width),
        }
        self.sums = {name: np.zeros(shape) for name, shape in shapes.items()} | {"weight": np.zeros(tasks)}
        self.refresh()

    def _normed(self, k: int, x: np.ndarray) -> np.ndarray:
        value = x * self.weights[f"w.scale.{k}"] + self.weights[f"w.shift.{k}"]
        return np.maximum(value, 0) if k == 0 else value

    def start(self, query_ND: np.ndarray, share_NT: np.ndarray) -> np.ndarray:
        """x_q(0), [N, H]."""
        query_NH = linear(self.weights, "query", query_ND)
        return query_NH if self.mode == "hetero" else np.concatenate([share_NT @ self.task_TH, query_NH], 1)

    def edge_features(self, edge_NM3: np.ndarray) -> np.ndarray:
        """ReLU(W_e a + b_e)."""
        return np.maximum(linear(self.weights, "edge", edge_NM3), 0)

    def add(self, query_ND: np.ndarray, share_NT: np.ndarray, edge_NM3: np.ndarray, seen_NM: np.ndarray) -> None:
        """Take in queries with their observed edges. Call `refresh` afterwards.

        Args:
            query_ND: their vectors.
            share_NT: how much of each task they are.
            edge_NM3: utility, cost and effect; finite.
            seen_NM: 1 where there is an edge, else 0.
        """
        x0_NH, a_NM3 = self.start(query_ND, share_NT), self.edge_features(edge_NM3)
        x1_NH = self._second(x0_NH, share_NT, a_NM3, seen_NM)
        sums, seen_MN = self.sums, seen_NM.T.astype(np.float64)
        sums["x0"] += seen_MN @ x0_NH
        sums["x1"] += seen_MN @ x1_NH
        sums["a"] += np.einsum("nm,nma->ma", seen_NM, a_NM3)
        sums["count"] += seen_NM.sum(0)
        if self.mode == "hetero":
            sums["task"] += share_NT.T.astype(np.float64) @ x0_NH
            sums["weight"] += share_NT.sum(0)

    def _second(
        self, x0_NH: np.ndarray, share_NT: np.ndarray, a_NM3: np.ndarray | None, seen_NM: np.ndarray | None
    ) -> np.ndarray:
        """x_q(1), [N, H]; without edges for a query that has none yet."""
        weights, value_NH = self.weights, x0_NH + self.weights["w.bias.0"]
        if self.mode == "hetero":
            value_NH = value_NH + (share_NT @ self.task_TH) @ weights["w.from_task.0.weight"].T
            if a_NM3 is not None and seen_NM is not None:
                degree_N1 = np.maximum(seen_NM.sum(1, keepdims=True), 1)
                message = (seen_NM @ self.first_MH) @ weights["w.from_model.0.weight"].T
                message = message + np.einsum("nm,nma->na", seen_NM, a_NM3) @ weights["w.edge_to_query.0.weight"].T
                value_NH = value_NH + message / degree_N1
        return self._normed(0, value_NH)

    def refresh(self) -> None:
        """Encode models (and tasks) anew from the sums."""
        sums, weights = self.sums, self.weights
        value_MH = self.first_MH
        share_M1 = 1.0 if self.mode == "reference" else 1 / np.maximum(sums["count"], 1)[:, None]
        for k, name in enumerate(("x0", "x1")):
            message = (
                sums[name] @ weights[f"w.from_node.{k}.weight"].T + sums["a"] @ weights[f"w.from_edge.{k}.weight"].T
            )
            value_MH = self._normed(k, value_MH + share_M1 * message + weights[f"w.bias.{k}"])
        self.model_MH = value_MH.astype(np.float32)
        if self.mode == "hetero":
            mean_TH = sums["task"] @ weights["w.to_task.0.weight"].T / np.maximum(sums["weight"], 1e-6)[:, None]
            self.task1_TH = self._normed(0, self.task_TH + mean_TH + weights["w.bias.0"]).astype(np.float32)

    def logits(self, query_ND: np.ndarray, share_NT: np.ndarray) -> np.ndarray:
        """[N, M] for queries without edges."""
        x_NH = self.start(query_ND, share_NT)
        if self.mode == "hetero":
            x_NH = self._second(x_NH, share_NT, None, None)
            x_NH = self._normed(
                1, x_NH + (share_NT @ self.task1_TH) @ self.weights["w.from_task.1.weight"].T + self.weights["w.bias.1"]
            )
        return x_NH @ self.model_MH.T / np.float32(self.width)

    def add_model(self, vector_V: np.ndarray) -> None:
        """A model more, without edges yet."""
        self.first_MH = np.concatenate([self.first_MH, linear(self.weights, "model", vector_V[None])])
        for name in ("x0", "x1", "a", "count"):
            self.sums[name] = np.concatenate([self.sums[name], np.zeros_like(self.sums[name][:1])])
        self.refresh()

    def state(self) -> Arrays:
        """The sums, to the bit; the rest is in weights and vectors."""
        return {f"sums.{name}": value for name, value in self.sums.items()}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take back what `state` gave."""
        self.sums = {name: arrays[f"sums.{name}"].copy() for name in self.SUMS}
        self.refresh()


def linear(weights: Arrays, name: str, x: np.ndarray) -> np.ndarray:
    """The layer ``name`` of x."""
    return x @ weights[f"w.{name}.weight"].T + weights[f"w.{name}.bias"]
