"""Stored queries of mode ``plus``: vectors, tasks, and what of their edges the banks left unsaid, which is the neighbours' message."""
# Shapes: N stored queries, Q asked ones, C columns, J neighbours, T tasks, A width, D dimensions

from collections.abc import Mapping

import numpy as np

from anabranch.routers.contract.strategy import Arrays, Facts
from anabranch.routers.graphrouter.neighbours import Neighbours, with_room

# Planes: gate and weight, of effect and of cost.
UP_E, WEIGHT_E, UP_C, WEIGHT_C = range(4)


class Rows:
    """A growing table of queries.

    Args:
        near: their vectors, perhaps some already.
        num_tasks: T.
        width: A.
        columns: room for columns.

    Attributes:
        edge_N4C: float32, see the planes; a column of weight 0 is no edge.
        share_NT: how much of each task a query is.
        own_NA: what the learned part of attention compares.
    """

    def __init__(self, near: Neighbours, num_tasks: int, width: int, columns: int) -> None:
        self.near = near
        self.edge_N4C = np.zeros((0, 4, columns), np.float32)
        self.share_NT = np.zeros((0, num_tasks), np.float32)
        self.own_NA = np.zeros((0, width), np.float32)

    def __len__(self) -> int:
        return len(self.near)

    def fill(self, share_NT: np.ndarray, edge_N4C: np.ndarray, own_NA: np.ndarray) -> None:
        """Say all of the queries whose vectors are there."""
        self.share_NT, self.edge_N4C, self.own_NA = share_NT, edge_N4C, own_NA

    def add(self, vector_ND: np.ndarray, share_NT: np.ndarray, edge_N4C: np.ndarray, own_NA: np.ndarray) -> None:
        """Append queries."""
        begin, end = len(self), len(self) + len(vector_ND)
        self.near.add(vector_ND)
        held = (with_room(held, end) for held in (self.share_NT, self.edge_N4C, self.own_NA))
        self.share_NT, self.edge_N4C, self.own_NA = held
        self.share_NT[begin:end], self.edge_N4C[begin:end], self.own_NA[begin:end] = share_NT, edge_N4C, own_NA

    def replace(
        self, row: int, vector_D: np.ndarray, share_T: np.ndarray, edge_4C: np.ndarray, own_A: np.ndarray
    ) -> None:
        """Put another query in the place of one."""
        self.near.replace(row, vector_D)
        self.share_NT[row], self.edge_N4C[row], self.own_NA[row] = share_T, edge_4C, own_A

    def message(self, row_QJ: np.ndarray, alpha_QJ: np.ndarray, columns: int) -> np.ndarray:
        """[Q, 4, C]: sums of the edges of neighbours by attention."""
        # One product, without the copy that fits many queries.
        if len(row_QJ) == 1:
            edge_JX = self.edge_N4C[row_QJ[0]].reshape(row_QJ.shape[1], -1)
            return (alpha_QJ @ edge_JX).reshape(1, 4, -1)[..., :columns]
        return np.einsum("qj,qjpc->qpc", alpha_QJ, self.edge_N4C[row_QJ, :, :columns])

    def widen(self, by: int) -> None:
        """Room for more columns."""
        self.edge_N4C = np.pad(self.edge_N4C, ((0, 0), (0, 0), (0, by)))

    def state(self, prefix: str) -> tuple[Arrays, Facts]:
        """All of it."""
        arrays, facts = self.near.state()
        own = {"edge_N4C": self.edge_N4C, "share_NT": self.share_NT, "own_NA": self.own_NA}
        arrays |= {name: value[: len(self)].copy() for name, value in own.items()}
        return {f"{prefix}{name}": value for name, value in arrays.items()}, {prefix: facts}

    def load_state(self, arrays: Mapping[str, np.ndarray], facts: Facts, prefix: str) -> None:
        """Take back what `state` gave."""
        own = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
        self.near.load_state(own, facts[prefix])
        self.fill(*(np.array(own[name]) for name in ("share_NT", "edge_N4C", "own_NA")))
