"""How a row of a routing table becomes the weights of skills.

    sigmoid            alpha = sigmoid(z) / (sum_k sigmoid(z_k) + EPS)                         the default
    relaxed            the same with a sample of RelaxedBernoulli(logits z) in training        Poly's
    straight_through   sigmoid(z) rounded to 0 or 1, with the gradient of sigmoid(z)
    normalized         z / ||z||_2 over the skills of a head

Then, in this order: dropout of weights, the shared skill (the last skill weighs 1 before normalising), and either normalising or the
average correction (times sqrt(q) / sqrt(K) in its place).
"""
# Shapes: U rows, q heads, K skills

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.config import Config, Field, configclass
from anabranch.errors import ConfigError

__all__ = ["EPS", "Weights"]

EPS = 1e-12


@configclass
class Weights(Config):
    """How weights of skills are made.

    Attributes:
        straight_through: round sigmoid(z), and pass the gradient by.
        relaxed: sample in training; evaluation takes sigmoid(z).
        temperature: of the relaxed Bernoulli.
        form: ``sigmoid``, or ``l2``: z / ||z||, which is not normalised again.
        dropout: share of weights that are zero in a training step.
        shared_skill: the last skill weighs 1 before normalising.
        average_correction: multiply by sqrt(q) / sqrt(K) instead of normalising.
    """

    straight_through: bool = False
    relaxed: bool = False
    temperature: float = Field(default=1.0, gt=0)
    form: Literal["sigmoid", "l2"] = "sigmoid"
    dropout: float = Field(default=0.0, ge=0, lt=1)
    shared_skill: bool = False
    average_correction: bool = False

    def __post_init__(self) -> None:
        if self.straight_through and self.relaxed:
            raise ConfigError(
                "straight_through and relaxed are both set; weights are either rounded or sampled, so set one of them"
            )
        if self.form == "l2" and (self.straight_through or self.relaxed):
            raise ConfigError(
                f"form is 'l2', which has no sigmoid for {'relaxed' if self.relaxed else 'straight_through'} to change; leave one out"
            )

    @property
    def is_random(self) -> bool:
        """Whether a training pass draws them."""
        return self.relaxed or self.dropout > 0

    def of(self, z_UqK: Tensor, *, training: bool = False) -> Tensor:
        """alpha_UqK. ``training`` says whether samples are drawn, from torch's default generator."""
        made = self._raw(z_UqK, training)
        if self.dropout and training:
            made = F.dropout(made, self.dropout)
        if self.shared_skill:
            made = torch.cat([made[..., :-1], torch.ones_like(made[..., :1])], dim=-1)
        if self.average_correction:
            heads, skills = z_UqK.shape[-2:]
            return made * math.sqrt(heads) / math.sqrt(skills)
        return made if self.form == "l2" else made / (made.sum(-1, keepdim=True) + EPS)

    def _raw(self, z_UqK: Tensor, training: bool) -> Tensor:
        if self.form == "l2":
            return F.normalize(z_UqK, dim=-1)
        if self.relaxed and training:
            # Reparameterised: sigmoid((z + log u - log(1 - u)) / temperature).
            tiny = torch.finfo(z_UqK.dtype).eps
            u = torch.rand_like(z_UqK).clamp(tiny, 1 - tiny)
            return torch.sigmoid((z_UqK + u.log() - torch.log1p(-u)) / self.temperature)
        soft = torch.sigmoid(z_UqK)
        return soft + (soft.round() - soft).detach() if self.straight_through else soft
