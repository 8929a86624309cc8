"""Activations of feed-forward layers: what is made of the first matrix's outputs, and its derivative.

    swiglu          silu(gate) * up         Shazeer 2020, arXiv 2002.05202
    geglu           gelu(gate) * up         the same paper
    geglu_tanh      the same, with gelu's approximation by tanh (Gemma)
    clamped_swiglu  (up + 1) * gate * sigmoid(1.702 gate), gate at most 7, up within +-7 (gpt-oss, arXiv 2508.10925)
    gelu            gelu(up)                Hendrycks and Gimpel 2016, arXiv 1606.08415; the exact one, by the error function
    identity        up                      a product of two matrices, as low-rank adapters are; no feed-forward layer has it

Those with a gate take the rows of both parts from one matrix, the gate's first.
"""
# Shapes: R rows, F hidden, Z what the first matrix gives: 2F with a gate, else F

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.errors import ConfigError

__all__ = ["ACTIVATIONS", "Activation", "ActivationName", "activation_of", "swiglu"]

ActivationName = Literal["swiglu", "geglu", "geglu_tanh", "clamped_swiglu", "gelu"]
# Of clamped_swiglu.
SLOPE, LIMIT = 1.702, 7.0
Pullback = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Activation:
    """One of them.

    Attributes:
        parts: names of the first matrix's parts, in the order of its rows.
        apply: a_RF of z_RZ.
        linearize: of z_RZ: (a_RF, what makes dz_RZ of da_RF).
        keeps_width: whether the second matrix leads back to the width of the items, as in a feed-forward layer.
    """

    parts: tuple[str, ...]
    apply: Callable[[Tensor], Tensor]
    linearize: Callable[[Tensor], tuple[Tensor, Pullback]]
    keeps_width: bool = True

    def rows(self, hidden_dim: int) -> dict[str, int]:
        """Rows of each part of the first matrix, for F hidden units."""
        return dict.fromkeys(self.parts, hidden_dim)

    @property
    def num_matrices(self) -> int:
        """Matrices of ``D x F`` that a feed-forward of it has, the last one counted."""
        return len(self.parts) + 1


def swiglu(z_R2F: Tensor) -> Tensor:
    """silu(gate) * up of rows whose first half is the gate."""
    gate_RF, up_RF = z_R2F.chunk(2, dim=-1)
    return F.silu(gate_RF) * up_RF


def _linear_swiglu(z_R2F: Tensor) -> tuple[Tensor, Pullback]:
    gate, up = z_R2F.chunk(2, dim=-1)
    silu, sigmoid = F.silu(gate), torch.sigmoid(gate)

    def pull(da: Tensor) -> Tensor:
        return torch.cat([da * up * (sigmoid + silu * (1 - sigmoid)), da * silu], dim=-1)

    return silu * up, pull


def _geglu(z_R2F: Tensor, approximate: str = "none") -> Tensor:
    gate, up = z_R2F.chunk(2, dim=-1)
    return F.gelu(gate, approximate=approximate) * up


def _linear_geglu(z_R2F: Tensor, approximate: str = "none") -> tuple[Tensor, Pullback]:
    gate, up = z_R2F.chunk(2, dim=-1)
    gelu = F.gelu(gate, approximate=approximate)

    def pull(da: Tensor) -> Tensor:
        dgate = torch.ops.aten.gelu_backward(da * up, gate, approximate=approximate)
        return torch.cat([dgate, da * gelu], dim=-1)

    return gelu * up, pull


def _clamped_swiglu(z_R2F: Tensor) -> Tensor:
    gate, up = z_R2F.chunk(2, dim=-1)
    gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
    return (up + 1) * (gate * torch.sigmoid(SLOPE * gate))


def _linear_clamped_swiglu(z_R2F: Tensor) -> tuple[Tensor, Pullback]:
    gate, up = z_R2F.chunk(2, dim=-1)
    is_free = gate <= LIMIT, up.abs() <= LIMIT
    gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
    sigmoid = torch.sigmoid(SLOPE * gate)
    glu = gate * sigmoid

    def pull(da: Tensor) -> Tensor:
        slope = sigmoid * (1 + SLOPE * gate * (1 - sigmoid))
        return torch.cat([da * (up + 1) * slope * is_free[0], da * glu * is_free[1]], dim=-1)

    return (up + 1) * glu, pull


def _linear_gelu(z_RF: Tensor) -> tuple[Tensor, Pullback]:
    return F.gelu(z_RF), lambda da: torch.ops.aten.gelu_backward(da, z_RF)


def _identity(z_RF: Tensor) -> Tensor:
    return z_RF


def _linear_identity(z_RF: Tensor) -> tuple[Tensor, Pullback]:
    return z_RF, _identity


ACTIVATIONS: dict[str, Activation] = {
    "swiglu": Activation(("gate", "up"), swiglu, _linear_swiglu),
    "geglu": Activation(("gate", "up"), _geglu, _linear_geglu),
    "geglu_tanh": Activation(
        ("gate", "up"), partial(_geglu, approximate="tanh"), partial(_linear_geglu, approximate="tanh")
    ),
    "clamped_swiglu": Activation(("gate", "up"), _clamped_swiglu, _linear_clamped_swiglu),
    "gelu": Activation(("up",), F.gelu, _linear_gelu),
    "identity": Activation(("up",), _identity, _linear_identity, keeps_width=False),
}


def activation_of(name: str) -> Activation:
    """The activation ``name``. Raises ConfigError if there is none."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation is {name!r}; use one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
