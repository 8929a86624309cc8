"""What training may add to the loss of a model that routes by task. All are off unless they are given a weight.

    sparsity         mean of max(0, sigmoid(Z) - 1/K): L1 above the free bits
    prediction       -log p(task | its row of Z), by a linear head
    information      -I(task; skill) = mean_t H(alpha_t) - H(mean_t alpha_t), in nats, of the weights
    orthogonality    mean squared cosine of two skills, over A and over B
    unlikelihood     -log(1 - p(answer)) where a row is told another row's task; made of a batch (`Poly.lessons`)

The reference code has these terms without a formula in the paper; the forms are ours.
"""
# Shapes: T tasks, q heads, K skills

import torch
from torch import Tensor

from anabranch.adapters.mhr.table import RoutingTable
from anabranch.config import Config, Field, configclass

__all__ = ["Penalties", "information", "orthogonality", "sparsity"]

_TINY = 1e-12


@configclass
class Penalties(Config):
    """Attributes: the weight of each, see the top of this file; 0 for none."""

    sparsity: float = Field(default=0.0, ge=0)
    prediction: float = Field(default=0.0, ge=0)
    information: float = Field(default=0.0, ge=0)
    orthogonality: float = Field(default=0.0, ge=0)
    unlikelihood: float = Field(default=0.0, ge=0)

    def of(self, table: RoutingTable, a_qKCR: Tensor, b_qKRO: Tensor) -> dict[str, Tensor]:
        """The losses of one layer that have a weight, weighted, by name."""
        made = {}
        if self.sparsity:
            made["mhr_sparsity"] = self.sparsity * sparsity(table.z)
        if self.prediction:
            made["mhr_prediction"] = self.prediction * table.task_loss()
        if self.information:
            number_T = torch.arange(len(table.tasks), device=table.z.device)
            made["mhr_information"] = self.information * information(table(number_T))
        if self.orthogonality:
            made["mhr_orthogonality"] = self.orthogonality * (orthogonality(a_qKCR) + orthogonality(b_qKRO)) / 2
        return made


def sparsity(z_TqK: Tensor) -> Tensor:
    """mean max(0, sigmoid(z) - 1/K)."""
    return (torch.sigmoid(z_TqK) - 1 / z_TqK.shape[-1]).clamp_min(0).mean()


def information(alpha_TqK: Tensor) -> Tensor:
    """The negative mutual information of task and skill, mean over heads: least where each task has skills of its own."""
    share_TqK = alpha_TqK / (alpha_TqK.sum(-1, keepdim=True) + _TINY)
    return _entropy(share_TqK).mean() - _entropy(share_TqK.mean(0)).mean()


def orthogonality(skill_qKXY: Tensor) -> Tensor:
    """The mean squared cosine of two skills of a head; 0 for one skill."""
    flat_qKN = skill_qKXY.flatten(2)
    skills = flat_qKN.shape[1]
    if skills < 2:
        return flat_qKN.sum() * 0
    unit_qKN = flat_qKN / (flat_qKN.norm(dim=-1, keepdim=True) + _TINY)
    cosine_qKK = unit_qKN @ unit_qKN.transpose(1, 2)
    off_qKK = cosine_qKK - torch.diag_embed(cosine_qKK.diagonal(dim1=1, dim2=2))
    return off_qKK.square().sum() / (len(off_qKK) * skills * (skills - 1))


def _entropy(share: Tensor) -> Tensor:
    """In nats, over the last axis."""
    return -(share * (share + _TINY).log()).sum(-1)
