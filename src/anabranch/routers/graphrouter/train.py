"""Training of the paper's network: many random masks per step, and the weights that earn most on held-out queries are kept.

Each step draws ``draws`` masks of the training edges. An edge is visible, so that it carries a message, or it is predicted; never both:
its utility and effect are features of the message. The loss is the binary cross-entropy over predicted edges, averaged over draws.
"""
# Shapes: N queries, M models, H width of a node

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from anabranch.routers.graphrouter.graph import Scenario, best, utility
from anabranch.routers.graphrouter.network import Block, Edges, Hetero, Network, Nodes
from anabranch.routers.graphrouter.settings import Training

# Share of observed edges below which they are kept as a list instead of a block.
SPARSE = 0.2


@dataclass(frozen=True)
class Table:
    """What is trained on: effects and scaled costs, NaN where not observed, and which rows only judge.

    Attributes:
        effect_NM: float64.
        cost_NM: float64, scaled.
        held_N: bool, validation queries.
        scenario: what utility is.
    """

    effect_NM: np.ndarray
    cost_NM: np.ndarray
    held_N: np.ndarray
    scenario: Scenario

    @property
    def utility_NM(self) -> np.ndarray:
        """Of each edge; NaN where not observed."""
        return utility(self.effect_NM, self.cost_NM, self.scenario)


def messages(edge_NM3: Tensor, visible_NM: Tensor, *, sparse: bool) -> Block | Edges:
    """The visible edges in the form that is quicker."""
    if not sparse:
        return Block(edge_NM3, visible_NM.float())
    query_E, model_E = visible_NM.nonzero(as_tuple=True)
    return Edges(query_E, model_E, edge_NM3[query_E, model_E], *visible_NM.shape)


def features(table: Table) -> np.ndarray:
    """float32 [N, M, 3]: utility, cost and effect of each edge; zeros where not observed."""
    edge_NM3 = np.stack([table.utility_NM, table.cost_NM, table.effect_NM], -1)
    return np.nan_to_num(edge_NM3, nan=0.0).astype(np.float32)


def fit_network(
    network: Network,
    nodes: Nodes,
    table: Table,
    settings: Training,
    seed: int,
    progress: Callable[[int, float], None] = lambda *_: None,
) -> Network:
    """Train in place, and leave the best weights in it, ready for inference (BatchNorm frozen).

    Args:
        network: fresh.
        nodes: all queries, in the order of ``table``.
        table: edges.
        settings: see `Training`.
        seed: of masks.
        progress: told the step and the utility earned on validation queries, at each look.
    """
    draw = torch.Generator().manual_seed(seed)
    observed_NM = torch.from_numpy(np.isfinite(table.utility_NM))
    train_NM = observed_NM & ~torch.from_numpy(table.held_N)[:, None]
    edge_NM3, label_NM = torch.from_numpy(features(table)), torch.from_numpy(best(table.utility_NM)).float()
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    kept, most = _copy(network), -np.inf
    for step in range(settings.steps + 1):
        if step % settings.check_every == 0 or step == settings.steps:
            earned = _earned(network, nodes, edge_NM3, train_NM, table)
            progress(step, earned)
            if earned > most:
                kept, most = _copy(network), earned
        if step < settings.steps and bool(train_NM.any()):
            _step(network, nodes, edge_NM3, label_NM, train_NM, settings, optimizer, draw)
    network.load_state_dict(kept)
    return network.eval()


def _step(
    network: Network,
    nodes: Nodes,
    edge_NM3: Tensor,
    label_NM: Tensor,
    train_NM: Tensor,
    settings: Training,
    optimizer: torch.optim.Optimizer,
    draw: torch.Generator,
) -> None:
    """One step. Node features do not depend on the mask, so they are made once and their gradients gathered over draws."""
    network.train()
    optimizer.zero_grad()
    made = network.start(nodes)
    start, sparse = tuple(value.detach().requires_grad_() for value in made), is_sparse(train_NM)
    for _ in range(settings.draws):
        visible_NM, predicted_NM = mask(train_NM, settings.mask_rate, draw, whole=isinstance(network, Hetero))
        if not bool(predicted_NM.any()):
            continue
        logit_NM = network.score(start, messages(edge_NM3, visible_NM, sparse=sparse), nodes.share_NT)
        loss = binary_cross_entropy_with_logits(logit_NM[predicted_NM], label_NM[predicted_NM])
        (loss / settings.draws).backward()
    grads = [torch.zeros_like(value) if value.grad is None else value.grad for value in start]
    torch.autograd.backward(made, grads)
    optimizer.step()


def is_sparse(train_NM: Tensor) -> bool:
    """Whether edges are few for so many queries and models."""
    return float(train_NM.float().mean()) < SPARSE


def mask(train_NM: Tensor, rate: float, draw: torch.Generator, *, whole: bool) -> tuple[Tensor, Tensor]:
    """Bool [N, M] twice: visible and predicted edges; together the training edges, never the same.

    With ``whole``, all edges of a query are hidden together, as a new query comes; else its visible edges would tell on the others
    through the query's node.
    """
    shape = (len(train_NM), 1) if whole else train_NM.shape
    hidden_NM = torch.rand(shape, generator=draw) < rate
    return train_NM & ~hidden_NM, train_NM & hidden_NM


@torch.no_grad()
def _earned(network: Network, nodes: Nodes, edge_NM3: Tensor, train_NM: Tensor, table: Table) -> float:
    """Mean utility of what would be chosen for validation queries (training ones where there are none)."""
    network.eval()
    logit_NM = network(nodes, messages(edge_NM3, train_NM, sparse=is_sparse(train_NM))).numpy()
    rows = np.flatnonzero(table.held_N) if table.held_N.any() else np.arange(len(table.held_N))
    value_NM = np.nan_to_num(table.utility_NM[rows], nan=-np.inf)
    seen = np.isfinite(value_NM).any(1)
    choice_N = np.argmax(np.where(np.isfinite(value_NM), logit_NM[rows], -np.inf), 1)[seen]
    return float(value_NM[seen][np.arange(len(choice_N)), choice_N].mean()) if seen.any() else 0.0


def _copy(network: Network) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}
