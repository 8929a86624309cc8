"""GaLore: AdamW whose moments live in a few directions of each matrix's gradient (Zhao et al. 2024, arXiv 2403.03507, algorithm 2).

    P_t = U[:, :r] of G_t = U S V^T           every T steps (V[:, :r] where the matrix is taller than wide)
    R_t = P^T G_t                             (G_t P)
    W  <- W - lr (alpha P N_t + weight_decay W)       N_t: AdamW's step for R_t, from moments of the size of R_t

So a matrix of m by n, m at most n, learns with r (m + 2 n) numbers of state in place of 2 m n. What has a side of r or less, or one side
alone, and the embedding, the head and routers, learn as with AdamW, as in the reference code. Moments stay as they are where P changes,
as there.
"""
# Shapes: E matrices of a stack, M rows, N columns, R rank

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["GaLore"]


class GaLore(torch.optim.Optimizer):
    """See above. Its state of a parameter is ``step``, ``exp_avg``, ``exp_avg_sq`` and, of a matrix that is projected, ``projector``.

    Args:
        groups: as of `torch.optim.AdamW`, with ``lr`` and ``weight_decay`` each.
        projected: the parameters that may be, by `id`; stacks of matrices are projected one by one.
        rank: r.
        every: T, steps between two projectors.
        scale: alpha.
        betas, eps: of AdamW.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        projected: Collection[int],
        rank: int = 128,
        every: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "betas": betas, "eps": eps})
        self.rank, self.every, self.scale, self._projected = rank, every, scale, frozenset(projected)

    def is_projected(self, parameter: nn.Parameter) -> bool:
        """Whether its moments are in few directions."""
        return id(parameter) in self._projected and parameter.dim() >= 2 and min(parameter.shape[-2:]) > self.rank

    def shape_of(self, parameter: nn.Parameter, moment: str) -> tuple[int, ...]:
        """The shape of a tensor of its state."""
        if not self.is_projected(parameter):
            return tuple(parameter.shape)
        *stack, rows, columns = parameter.shape
        if moment == "projector":
            return (*stack, min(rows, columns), self.rank)
        return (*stack, self.rank, columns) if rows <= columns else (*stack, rows, self.rank)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move each parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            kept = self.shape_of(parameter, "exp_avg")
            state["exp_avg"], state["exp_avg_sq"] = (gradient.new_zeros(kept) for _ in range(2))
        is_projected, is_wide = (
            self.is_projected(parameter),
            parameter.dim() >= 2 and parameter.shape[-2] <= parameter.shape[-1],
        )
        if is_projected:
            if int(state["step"]) % self.every == 0:
                state["projector"] = _directions(gradient, self.rank, left=is_wide)
            projector = state["projector"]
            gradient = projector.mT @ gradient if is_wide else gradient @ projector
        state["step"] += 1
        (first, second), count = group["betas"], int(state["step"])
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = (state["exp_avg_sq"] / (1 - second**count)).sqrt_().add_(group["eps"])
        step = state["exp_avg"] / (1 - first**count) / root
        if is_projected:
            step = self.scale * (projector @ step if is_wide else step @ projector.mT)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-group["lr"])


def _directions(gradient: Tensor, rank: int, *, left: bool) -> Tensor:
    """The first ``rank`` singular vectors of each matrix, as columns: of its shorter side. In float32, in which it is computed."""
    u, _, vh = torch.linalg.svd(gradient.float(), full_matrices=False)
    found = u[..., :rank] if left else vh[..., :rank, :].mT
    return found.to(gradient.dtype).contiguous()
