"""The paper's network, trained: node features, two rounds of messages over visible edges, a product that says how likely an edge is best.

    query  x_q = [W_t task ; W_q query]      model  x_m = W_l description      edge  a = ReLU(W_e (U, c, e) + b_e)
    x'_m = BN_k(x_m + sum_{q visible} (W_k x_q + V_k a_qm) + b_k)    twice, ReLU after the first; x'_q = BN_k(x_q + b_k)
    logit(q, m) = mean(x_q(0) * x_m(2))

``mean`` divides the sum by the number of visible edges. `Hetero` keeps tasks as nodes of their own, sends messages both ways with
weights per kind of edge, takes means, and scores by x_q(2). Since W_k x_q + V_k a is linear, sum and weights change places:
W_k (sum x_q) + V_k (sum a).
"""
# Shapes: N queries, M models, T tasks, E edges, H width of a node (2 hidden), D, V dimensions of vectors

from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Utility, cost, effect.
EDGE = 3


@dataclass(frozen=True)
class Nodes:
    """What the network sees of nodes.

    Attributes:
        query_ND: vectors of queries.
        share_NT: how much of each task a query is.
        task_TV: vectors of tasks.
        model_MV: vectors of models.
    """

    query_ND: Tensor
    share_NT: Tensor
    task_TV: Tensor
    model_MV: Tensor


class Block:
    """Edges as a block: every query with every model, some of them visible.

    Args:
        edge_NM3: features, finite everywhere; only those of visible edges count.
        visible_NM: 1 where an edge is visible, else 0.
    """

    def __init__(self, edge_NM3: Tensor, visible_NM: Tensor) -> None:
        self.edge, self.visible_NM = edge_NM3, visible_NM

    def to_models(self, x_NH: Tensor) -> Tensor:
        """[M, H]: sum over visible edges of what their query holds."""
        return self.visible_NM.T @ x_NH

    def to_queries(self, x_MH: Tensor) -> Tensor:
        """[N, H]: sum over visible edges of what their model holds."""
        return self.visible_NM @ x_MH

    def edges_to_models(self, a: Tensor) -> Tensor:
        """[M, 3]: sum of features of visible edges."""
        return torch.einsum("nm,nma->ma", self.visible_NM, a)

    def edges_to_queries(self, a: Tensor) -> Tensor:
        """[N, 3]: sum of features of visible edges."""
        return torch.einsum("nm,nma->na", self.visible_NM, a)

    def degrees(self) -> tuple[Tensor, Tensor]:
        """Visible edges of each query [N, 1] and each model [M, 1]."""
        return self.visible_NM.sum(1, keepdim=True), self.visible_NM.sum(0)[:, None]


class Edges:
    """The same as a list: the visible edges alone.

    Args:
        query_E: int64, rows.
        model_E: int64, columns.
        edge_E3: features.
        num_queries: N.
        num_models: M.
    """

    def __init__(self, query_E: Tensor, model_E: Tensor, edge_E3: Tensor, num_queries: int, num_models: int) -> None:
        self.query_E, self.model_E, self.edge = query_E, model_E, edge_E3
        self.num_queries, self.num_models = num_queries, num_models

    def _sum(self, value_EH: Tensor, at_E: Tensor, count: int) -> Tensor:
        return value_EH.new_zeros(count, value_EH.shape[1]).index_add(0, at_E, value_EH)

    def to_models(self, x_NH: Tensor) -> Tensor:
        """As of `Block`."""
        return self._sum(x_NH[self.query_E], self.model_E, self.num_models)

    def to_queries(self, x_MH: Tensor) -> Tensor:
        """As of `Block`."""
        return self._sum(x_MH[self.model_E], self.query_E, self.num_queries)

    def edges_to_models(self, a: Tensor) -> Tensor:
        """As of `Block`."""
        return self._sum(a, self.model_E, self.num_models)

    def edges_to_queries(self, a: Tensor) -> Tensor:
        """As of `Block`."""
        return self._sum(a, self.query_E, self.num_queries)

    def degrees(self) -> tuple[Tensor, Tensor]:
        """As of `Block`."""
        one_E1 = self.edge.new_ones(len(self.edge), 1)
        return self._sum(one_E1, self.query_E, self.num_queries), self._sum(one_E1, self.model_E, self.num_models)


class Network(nn.Module):
    """Modes ``reference`` (sums) and ``mean``.

    Args:
        query_dim: D.
        task_dim: V of tasks.
        model_dim: V of models.
        hidden: H / 2.
        mean: divide messages by the number of visible edges.
    """

    def __init__(self, query_dim: int, task_dim: int, model_dim: int, hidden: int, *, mean: bool) -> None:
        super().__init__()
        width = 2 * hidden
        self.mean, self.width = mean, width
        self.task, self.query = nn.Linear(task_dim, hidden), nn.Linear(query_dim, hidden)
        self.model = nn.Linear(model_dim, width)
        self.edge = nn.Linear(EDGE, EDGE)
        self.from_node = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.from_edge = nn.ModuleList(nn.Linear(EDGE, width, bias=False) for _ in range(2))
        self.bias = nn.ParameterList(nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.norm = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(2))

    def start(self, nodes: Nodes) -> tuple[Tensor, ...]:
        """Nodes before any message: x_q(0) [N, H] and x_m(0) [M, H]."""
        task_NH = nodes.share_NT @ self.task(nodes.task_TV)
        return torch.cat([task_NH, self.query(nodes.query_ND)], 1), self.model(nodes.model_MV)

    def score(self, start: tuple[Tensor, ...], edges: Block | Edges, share_NT: Tensor) -> Tensor:
        """Logits [N, M]; the sigmoid of one is the chance that the edge is its query's best."""
        first_NH, model_MH = start
        query_NH = first_NH
        a, (_, degree_M1) = torch.relu(self.edge(edges.edge)), edges.degrees()
        share_M1 = 1 / degree_M1.clamp(min=1) if self.mean else torch.ones_like(degree_M1)
        for layer in range(2):
            message_MH = self.from_node[layer](edges.to_models(query_NH)) + self.from_edge[layer](
                edges.edges_to_models(a)
            )
            model_MH = model_MH + share_M1 * message_MH + self.bias[layer]
            query_NH, model_MH = self._normed(layer, query_NH + self.bias[layer], model_MH)
        return first_NH @ model_MH.T / self.width

    def _normed(self, layer: int, *parts: Tensor) -> list[Tensor]:
        """BatchNorm over all nodes together, and ReLU after the first."""
        value = self.norm[layer](torch.cat(parts))
        return list((torch.relu(value) if layer == 0 else value).split([len(part) for part in parts]))

    def forward(self, nodes: Nodes, edges: Block | Edges) -> Tensor:
        """Logits [N, M]."""
        return self.score(self.start(nodes), edges, nodes.share_NT)


class Hetero(Network):
    """Mode ``hetero``: tasks are nodes; edges task <-> query and query <-> model, both ways, each with weights of its own, in means."""

    def __init__(self, query_dim: int, task_dim: int, model_dim: int, hidden: int) -> None:
        super().__init__(query_dim, task_dim, model_dim, hidden, mean=True)
        width = self.width
        self.task, self.query = nn.Linear(task_dim, width), nn.Linear(query_dim, width)
        self.from_task, self.from_model, self.to_task = (
            nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2)) for _ in range(3)
        )
        self.edge_to_query = nn.ModuleList(nn.Linear(EDGE, width, bias=False) for _ in range(2))

    def start(self, nodes: Nodes) -> tuple[Tensor, ...]:
        """x_q(0) [N, H], x_m(0) [M, H] and x_t(0) [T, H]."""
        return self.query(nodes.query_ND), self.model(nodes.model_MV), self.task(nodes.task_TV)

    def score(self, start: tuple[Tensor, ...], edges: Block | Edges, share_NT: Tensor) -> Tensor:
        """Logits [N, M]."""
        query_NH, model_MH, task_TH = start
        a, (degree_N1, degree_M1) = torch.relu(self.edge(edges.edge)), edges.degrees()
        weight_T1 = share_NT.sum(0)[:, None].clamp(min=1e-6)
        for k in range(2):
            to_model = self.from_node[k](edges.to_models(query_NH)) + self.from_edge[k](edges.edges_to_models(a))
            to_query = self.from_model[k](edges.to_queries(model_MH)) + self.edge_to_query[k](edges.edges_to_queries(a))
            new_NH = query_NH + self.from_task[k](share_NT @ task_TH) + to_query / degree_N1.clamp(min=1) + self.bias[k]
            new_TH = task_TH + self.to_task[k](share_NT.T @ query_NH) / weight_T1 + self.bias[k]
            new_MH = model_MH + to_model / degree_M1.clamp(min=1) + self.bias[k]
            query_NH, model_MH, task_TH = self._normed(k, new_NH, new_MH, new_TH)
        return query_NH @ model_MH.T / self.width
