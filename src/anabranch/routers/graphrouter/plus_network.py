"""Mode ``plus``, trained: messages gated by what an edge says beyond its query's difficulty, and attention between like queries.

    profile of model m    P_mk = sum_q phi_k(q) g_qm / (sum_q phi_k(q) w_qm + n)      gate g: what is left of the edge (`centre`)
    neighbours            R_m(q) = sum_{q' in N(q)} alpha(q, q') g_q'm / (sum alpha w + n)
    predicted edge        mean_m + level(q) + weight_1 phi P + weight_2 phi' P' + weight_3 R + description term

phi has two banks: how much of each task a query is, and a softmax over centres. Each round of messages carries what the one before it
left unsaid: first tasks, then centres, then neighbours. So the graph holds three routers that are hard to beat, the best model of each
task, k-means and k-NN, and each corrects the one before. Effect and cost have heads of their own, so what a dollar is worth is said when
a query comes. What is learned is little (how sharp, how much, how cautious: n, in edges), so that thousands of noisy edges suffice, and
in episodes that look like what comes later: queries wholly hidden, models of which 0.5% to 100% of edges are visible, models without a
description, and virtual models, each of which is another real one in every task.
"""
# Shapes: N supporting queries, Q target queries, M models, C = 1 + M columns, T tasks, K centres, D, V dimensions, J neighbours, A width

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize, softplus

from anabranch.routers.graphrouter.centre import centred
from anabranch.routers.graphrouter.settings import Episodes

# N of tasks, centres and neighbours, where training starts.
CAUTION = (1.0, 10.0, 30.0)


@dataclass(frozen=True)
class Support:
    """The queries that messages come from.

    Attributes:
        vector_ND: their vectors.
        share_NT: how much of each task each is.
        value_2NM: effect and scaled cost; 0 where not seen.
        seen_2NM: 1 where seen, else 0.
        kappa_2: see `centre`.
    """

    vector_ND: Tensor
    share_NT: Tensor
    value_2NM: Tensor
    seen_2NM: Tensor
    kappa_2: tuple[float, float]


class PlusNetwork(nn.Module):
    """See the module.

    Args:
        centre_KD: where centres start (k-means of queries).
        model_dim: V.
        width: of attention and of the description term.
        seed: of the starting weights.
    """

    def __init__(self, centre_KD: np.ndarray, model_dim: int, width: int, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        dim = centre_KD.shape[1]
        self.centre_KD = nn.Parameter(normalize(torch.from_numpy(centre_KD).float(), dim=1))
        # Of tasks (already sharpened) and centres.
        self.sharp_2 = nn.Parameter(torch.tensor([1.0, 25.0]).log())
        self.focus = nn.Parameter(torch.tensor(8.0).log())
        self.attend_DA = nn.Parameter(torch.randn(dim, width, generator=draw) * 0.02)
        # Through a softplus.
        self.caution_23 = nn.Parameter(torch.tensor([CAUTION]).repeat(2, 1).expm1().log())
        self.weight_23 = nn.Parameter(torch.ones(2, len(CAUTION)))
        self.query_DA = nn.Parameter(torch.randn(dim, width, generator=draw) * 0.1)
        self.describe_VA = nn.Parameter(torch.zeros(model_dim, width))

    def banks(self, vector_ND: Tensor, share_NT: Tensor) -> list[Tensor]:
        """phi of both banks: [N, T] and [N, K], rows that add up to 1."""
        sharp_2 = self.sharp_2.exp()
        tasks = torch.softmax(sharp_2[0] * share_NT.clamp(min=1e-6).log(), 1)
        return [tasks, torch.softmax(sharp_2[1] * (vector_ND @ self.centre_KD.T), 1)]

    def forward(
        self, support: Support, vector_QD: Tensor, share_QT: Tensor, near_QJ: Tensor, like_QJ: Tensor, model_MV: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Effect and scaled cost of every model, [Q, M] each.

        Args:
            support: where messages come from.
            vector_QD: vectors of targets.
            share_QT: how much of each task they are.
            near_QJ: rows of ``support`` that are their neighbours.
            like_QJ: cosine to them; -inf where there is none.
            model_MV: descriptions; zeros for none.
        """
        from_NF, to_QF = self.banks(support.vector_ND, support.share_NT), self.banks(vector_QD, share_QT)
        there_QJ = torch.isfinite(like_QJ)
        logit_QJ = torch.where(there_QJ, like_QJ, 0.0) * self.focus.exp() + self._learned(
            vector_QD, support.vector_ND, near_QJ
        )
        logit_QJ = torch.where(there_QJ, logit_QJ, -1e9)
        alpha_QJ = torch.exp(logit_QJ - logit_QJ.max(1, keepdim=True).values) * there_QJ
        found = []
        for head in range(2):
            value_NM, seen_NM, kappa = support.value_2NM[head], support.seen_2NM[head], support.kappa_2[head]
            mean_M = (value_NM * seen_NM).sum(0) / seen_NM.sum(0).clamp(min=1)
            level_N, level_weight_N, left_NM, weight_NM = centred((value_NM - mean_M) * seen_NM, seen_NM, kappa)
            weight_NC = torch.cat([level_weight_N[:, None], weight_NM], 1)
            gate_NC = torch.cat([level_N[:, None], left_NM], 1) * weight_NC
            caution_3, weight_3 = softplus(self.caution_23[head]), self.weight_23[head]
            sum_QC: Tensor = alpha_QJ.new_zeros(())
            for bank in range(2):
                down_FC = from_NF[bank].T @ weight_NC + caution_3[bank]
                profile_FC = weight_3[bank] * (from_NF[bank].T @ gate_NC) / down_FC
                sum_QC = sum_QC + to_QF[bank] @ profile_FC
                # What this bank leaves unsaid.
                gate_NC = gate_NC - weight_NC * (from_NF[bank] @ profile_FC)
            up_QC, down_QC = (
                torch.einsum("qj,qjc->qc", alpha_QJ, value_NC[near_QJ]) for value_NC in (gate_NC, weight_NC)
            )
            sum_QC = sum_QC + weight_3[2] * up_QC / (down_QC + caution_3[2])
            found.append(mean_M + sum_QC[:, :1] + sum_QC[:, 1:])
        return found[0] + (vector_QD @ self.query_DA) @ (model_MV @ self.describe_VA).T, found[1]

    def _learned(self, vector_QD: Tensor, vector_ND: Tensor, near_QJ: Tensor) -> Tensor:
        """The learned part of attention, beside the cosine."""
        own_QA, other_NA = vector_QD @ self.attend_DA, vector_ND @ self.attend_DA
        return torch.einsum("qa,qja->qj", own_QA, other_NA[near_QJ])


@dataclass(frozen=True)
class Material:
    """All that an episode is drawn from.

    Attributes:
        support: all queries.
        near_NW: their nearest others, more than are used, since some are hidden.
        like_NW: cosines; -inf for duplicates of their own.
        task_N: their tasks.
        model_MV: descriptions.
        train_N: bool; the others are for validation.
    """

    support: Support
    near_NW: Tensor
    like_NW: Tensor
    task_N: Tensor
    model_MV: Tensor
    train_N: Tensor


def fit_plus(
    network: PlusNetwork,
    material: Material,
    settings: Episodes,
    neighbours: int,
    seed: int,
    validate: Callable[[], float] | None,
    progress: Callable[[int, float], None] = lambda *_: None,
) -> PlusNetwork:
    """Train in place and leave the best weights in it.

    Args:
        network: fresh.
        material: see `Material`.
        settings: see `Episodes`.
        neighbours: J.
        seed: of episodes.
        validate: what the network as it is earns on held-out queries; None keeps the last weights.
        progress: told step and validation.
    """
    draw = torch.Generator().manual_seed(seed)
    fine = [network.centre_KD, network.attend_DA, network.query_DA, network.describe_VA]
    coarse = [network.sharp_2, network.focus, network.caution_23, network.weight_23]
    optimizer = torch.optim.AdamW(
        [
            {"params": coarse, "lr": settings.lr, "weight_decay": 0.0},
            {"params": fine, "lr": settings.fine_lr, "weight_decay": settings.weight_decay},
        ]
    )
    kept, most = None, -np.inf
    for step in range(settings.steps + 1):
        if validate is not None and (step % settings.check_every == 0 or step == settings.steps):
            with torch.no_grad():
                earned = validate()
            progress(step, earned)
            if earned > most:
                kept, most = {name: value.detach().clone() for name, value in network.state_dict().items()}, earned
        if step < settings.steps:
            loss = episode_loss(network, material, settings, neighbours, draw)
            if loss is None:
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if kept is not None:
        network.load_state_dict(kept)
    return network


def episode_loss(
    network: PlusNetwork, material: Material, settings: Episodes, neighbours: int, draw: torch.Generator
) -> Tensor | None:
    """Squared error over edges of hidden queries; differences between models count fully, levels a tenth. None without such edges."""
    num_models = material.support.value_2NM.shape[2]
    value_2NM, seen_2NM, model_MV = virtual_models(material, settings, draw)
    rows = material.train_N.nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows), generator=draw)[: settings.most_queries]]
    cut = round(settings.hidden * len(rows))
    target_Q, used_S = rows[:cut].sort().values, rows[cut:].sort().values
    if not len(target_Q) or not len(used_S):
        return None
    rate_M = torch.exp(np.log(settings.least_rate) * torch.rand(num_models, generator=draw))
    rate_M = torch.where(torch.rand(num_models, generator=draw) < 0.5, rate_M, 1.0)
    visible_SM = torch.rand(len(used_S), num_models, generator=draw) < rate_M
    heads = network(
        taken(material.support, used_S, value_2NM, seen_2NM, visible_SM.float()),
        material.support.vector_ND[target_Q],
        material.support.share_NT[target_Q],
        *among(material, target_Q, used_S, neighbours),
        model_MV,
    )
    return sum(
        (_loss(found, value_2NM[head, target_Q], seen_2NM[head, target_Q]) for head, found in enumerate(heads)),
        torch.zeros(()),
    )


def taken(support: Support, used_S: Tensor, value_2NM: Tensor, seen_2NM: Tensor, visible_SM: Tensor | float) -> Support:
    """These queries, with these edges of theirs."""
    return Support(
        support.vector_ND[used_S],
        support.share_NT[used_S],
        value_2NM[:, used_S],
        seen_2NM[:, used_S] * visible_SM,
        support.kappa_2,
    )


def among(material: Material, target_Q: Tensor, used_S: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """Neighbours of targets among the queries in use, as places in ``used_S``, and cosines."""
    count = len(material.train_N)
    place_N = torch.full((count,), -1)
    place_N[used_S] = torch.arange(len(used_S))
    near_QW = place_N[material.near_NW[target_Q]]
    like_QW = torch.where(near_QW >= 0, material.like_NW[target_Q], -torch.inf)
    like_QJ, pick_QJ = like_QW.topk(min(neighbours, like_QW.shape[1]), 1)
    return near_QW.gather(1, pick_QJ).clamp(min=0), like_QJ


def _loss(found_QM: Tensor, value_QM: Tensor, seen_QM: Tensor) -> Tensor:
    """See `episode_loss`."""
    count_Q1 = seen_QM.sum(1, keepdim=True)
    error_QM = (found_QM - value_QM) * seen_QM
    level_Q1 = error_QM.sum(1, keepdim=True) / count_Q1.clamp(min=1)
    edges = seen_QM.sum().clamp(min=1)
    return ((error_QM - level_Q1 * seen_QM) ** 2).sum() / edges + 0.1 * mse_loss(
        error_QM, torch.zeros_like(error_QM), reduction="sum"
    ) / edges


def virtual_models(material: Material, settings: Episodes, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Effects and costs, what is seen of them, and descriptions, with some models replaced: a virtual model is in each task a real one."""
    value_2NM, seen_2NM = material.support.value_2NM, material.support.seen_2NM
    num_models, num_tasks = value_2NM.shape[2], int(material.task_N.max()) + 1
    described_M1 = (torch.rand(num_models, generator=draw) >= settings.no_description).float()[:, None]
    if float(torch.rand((), generator=draw)) < 0.5 or settings.virtual == 0:
        return value_2NM, seen_2NM, material.model_MV * described_M1
    is_virtual_M = torch.rand(num_models, generator=draw) < settings.virtual
    other_TM = torch.randint(0, num_models, (num_tasks, num_models), generator=draw)
    source_TM = torch.where(is_virtual_M, other_TM, torch.arange(num_models))
    source_NM = source_TM[material.task_N]
    swap = source_NM.expand(2, *source_NM.shape)
    return (
        value_2NM.gather(2, swap),
        seen_2NM.gather(2, swap),
        material.model_MV * described_M1 * ~is_virtual_M[:, None],
    )
