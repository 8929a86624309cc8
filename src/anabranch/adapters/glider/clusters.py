"""Clusters of experts, by how alike the vectors are by which tokens find them; a baseline of GLIDER.

    s_ij = mean over matrices of (1 + cos(v_i, v_j)) / 2                 vectors without a sign: (1 + |cos|) / 2
    rows of D^-1/2 U, U the G greatest eigenvectors of D^-1/2 S D^-1/2   normalised spectral clustering (Shi and Malik 2000), s_ii = 0
    k-means of these rows

An expert of each cluster then takes the place of its members (`merge_clusters`), or a token chooses a cluster first and its experts among
the members of that (``GliderConfig(clusters=G)``).

Source: the baselines of UNITES-Lab/glider (MIT), whose spectral clustering is scikit-learn's, with these defaults.
"""
# Shapes: E experts, G clusters, C inputs

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.adapters.algebra import combine
from anabranch.adapters.glider.folder import check_bases, describe_expert, expert_folders, read_described
from anabranch.adapters.glider.vectors import standardised, vector_of
from anabranch.adapters.peft_folder import Adapter, read_peft, write_peft
from anabranch.errors import CheckpointError, ConfigError
from anabranch.files import atomic_folder
from anabranch.kmeans import kmeans

__all__ = ["Clusters", "Merge", "clusters_of", "merge_clusters", "similarity", "spectral_clusters"]

Merge = Literal["mean", "svd"]
# Of one expert: v_C by matrix, and whether it has a sign.
Vectors = Mapping[str, tuple[Tensor, bool]]


def similarity(experts: Sequence[Vectors]) -> np.ndarray:
    """s_EE, 0 to 1: of the matrices that two experts both have; 1/2, as of vectors at right angles, where there is none."""
    total_EE, count_EE = torch.zeros(2, len(experts), len(experts), dtype=torch.float64)
    for module in dict.fromkeys(module for vectors in experts for module in vectors):
        number_M = torch.tensor([number for number, vectors in enumerate(experts) if module in vectors])
        told = [experts[number][module] for number in number_M.tolist()]
        v_MC = F.normalize(torch.stack([v_C.double() for v_C, _ in told]), dim=1)
        cosine_MM = v_MC @ v_MC.T
        is_signed_M = torch.tensor([is_signed for _, is_signed in told])
        cosine_MM = torch.where(is_signed_M[:, None] & is_signed_M, cosine_MM, cosine_MM.abs())
        pair = number_M[:, None], number_M
        total_EE.index_put_(pair, (1 + cosine_MM) / 2, accumulate=True)
        count_EE.index_put_(pair, torch.ones_like(cosine_MM), accumulate=True)
    found: np.ndarray = torch.where(count_EE > 0, total_EE / count_EE.clamp_min(1), 0.5).numpy()
    return found


def spectral_clusters(similarity_EE: np.ndarray, num_clusters: int, *, seed: int = 0) -> np.ndarray:
    """label_E, int64: clusters numbered as their first members come; fewer than G where experts are the same.

    Args:
        similarity_EE: symmetric, none below 0.
        num_clusters: G.
        seed: of k-means, the best of 10 starts of which is kept.

    Raises ConfigError for a G below 1 or above E.
    """
    count = len(similarity_EE)
    if not 1 <= num_clusters <= count:
        raise ConfigError(f"clusters is {num_clusters}; of {count} experts there are 1 to {count}")
    # Nobody is its own neighbour, and whoever has none stays alone.
    edge_EE = np.where(np.eye(count, dtype=bool), 0.0, similarity_EE)
    degree_E = edge_EE.sum(1)
    root_E = 1 / np.sqrt(np.where(degree_E > 0, degree_E, 1.0))
    normal_EE = edge_EE * root_E * root_E[:, None] + np.diag(degree_E == 0)
    _, vector_EE = np.linalg.eigh(normal_EE)
    embedded_EG = vector_EE[:, count - num_clusters :] * root_E[:, None]
    _, label_E = kmeans(embedded_EG, num_clusters, num_starts=10, seed=seed)
    order = {int(label): number for number, label in enumerate(dict.fromkeys(label_E.tolist()))}
    return np.array([order[label] for label in label_E.tolist()], np.int64)


def clusters_of(experts: Mapping[str, Vectors], num_clusters: int) -> dict[str, int]:
    """The cluster of each expert, by its vectors. Raises ConfigError as `spectral_clusters`."""
    label_E = spectral_clusters(similarity(list(experts.values())), num_clusters)
    return dict(zip(experts, label_E.tolist(), strict=True))


@dataclass(frozen=True, eq=False)
class Clusters:
    """What `merge_clusters` found.

    Attributes:
        members: names of the experts of each, by the name of the one that takes their place.
        similarity_EE: of the experts, in the order of their names.
        errors: how far each merged expert is from the mean of what its members add, as a share of it.
    """

    members: dict[str, tuple[str, ...]]
    similarity_EE: np.ndarray
    errors: dict[str, float]


def merge_clusters(
    pool: str | Path,
    num_clusters: int,
    out: str | Path | None = None,
    *,
    method: Merge = "mean",
    rank: int | None = None,
    local: Literal["phatgoose", "arrow"] = "phatgoose",
) -> Clusters:
    """One expert of each cluster of a pool, ``cluster-1`` and so on, written as a pool of their own.

    Its gates are the means of its members' where they all have one, and its instruction theirs one after another; each of theirs is kept as
    another wording of it.

    Args:
        pool: a folder of adapters' folders, as of `GliderPool.load`.
        num_clusters: G.
        out: not there, or empty; None merges nothing and writes nothing.
        method: ``mean`` of A and of B, as the reference, which needs equal ranks; ``svd``, the mean of what they add, factored again.
        rank: of ``svd``; None for the greatest of the members'.
        local: vectors that are compared: gates, and prototypes of those without, or prototypes alone.

    Raises ConfigError for a number of clusters that there cannot be, adapters of several base models, and as `combine`; CheckpointError as
    `read_peft` and where there is no pool; DataError where ``out`` holds something.
    """
    folders = expert_folders(pool)
    adapters = {name: read_peft(folder) for name, folder in folders.items()}
    described = {name: read_described(folder) for name, folder in folders.items()}
    gates = {name: dict(one.gates or {}) for name, one in described.items()}
    for name, adapter in adapters.items():
        adapter.check_low_rank("clusters are of plain LoRA alone", str(folders[name]))
    _check_widths(adapters)
    check_bases({name: adapter.table.get("base_model_name_or_path") for name, adapter in adapters.items()})
    vectors = {
        name: {module: vector_of(pair, gates[name].get(module), local) for module, pair in adapter.pairs.items()}
        for name, adapter in adapters.items()
    }
    similarity_EE = similarity(list(vectors.values()))
    label_E = spectral_clusters(similarity_EE, num_clusters).tolist()
    members = {
        f"cluster-{number + 1}": tuple(name for name, label in zip(folders, label_E, strict=True) if label == number)
        for number in range(max(label_E) + 1)
    }
    if out is None:
        return Clusters(members, similarity_EE, {})
    made = {
        cluster: combine([adapters[name] for name in names], [1 / len(names)] * len(names), method, rank=rank)
        for cluster, names in members.items()
    }
    with atomic_folder(out) as temporary:
        for cluster, names in members.items():
            write_peft(temporary / cluster, made[cluster].adapter)
            texts = [text for name in names for text in described[name].instructions[:1]]
            wordings = [text for name in names for text in described[name].instructions]
            # Each once: of a cluster of one its instruction is no other wording of itself.
            instruction = list(dict.fromkeys(["\n".join(dict.fromkeys(texts)), *wordings])) if texts else None
            gate = _mean_gates([gates[name] for name in names])
            describe_expert(temporary / cluster, instruction=instruction, gate=gate or None)
    return Clusters(members, similarity_EE, {cluster: one.error for cluster, one in made.items()})


def _check_widths(adapters: Mapping[str, Adapter]) -> None:
    """Raise CheckpointError for a matrix that two experts have with other inputs."""
    first: dict[str, tuple[str, int]] = {}
    for name, adapter in adapters.items():
        for module, pair in adapter.pairs.items():
            other, width = first.setdefault(module, (name, pair.a_RC.shape[1]))
            if pair.a_RC.shape[1] != width:
                raise CheckpointError(
                    f"{module} has {width} inputs in expert {other!r} and {pair.a_RC.shape[1]} in {name!r}; a pool is of one base model"
                )


def _mean_gates(gates: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Of the matrices of which all have one."""
    shared = [module for module in gates[0] if all(module in own for own in gates)]
    return {module: torch.stack([standardised(own[module]) for own in gates]).mean(0) for module in shared}
