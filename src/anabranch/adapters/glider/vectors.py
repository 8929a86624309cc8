"""Vectors by which tokens find adapters: gates made comparable, Arrow prototypes, mean activations."""
# Shapes: C inputs, O outputs, R rank, B rows, L positions

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.adapters.attached import attached_on
from anabranch.adapters.low_rank import Pair
from anabranch.adapters.peft_folder import Adapter, read_peft
from anabranch.adapters.pooled import load_pool
from anabranch.errors import ConfigError, InputError
from anabranch.lm.decoder import Decoder
from anabranch.lm.generate import evaluating
from anabranch.nn.linear import Added

__all__ = ["activations_of_rows", "arrow_prototype", "check_gates", "mean_activations", "standardised"]


def standardised(gate_C: Tensor) -> Tensor:
    """LayerNorm of the gate, in float32 at least: gates that were trained apart become comparable. Zero stays zero.

    As the reference does it, with torch's 1e-5 beside the variance: the mean is 0, and the variance v / (v + 1e-5) for one of v before,
    which is 1 for gates that were trained, and less for those that hardly were.
    """
    wide = torch.promote_types(gate_C.dtype, torch.float32)
    return F.layer_norm(gate_C.to(wide), gate_C.shape)


def arrow_prototype(pair: Pair) -> Tensor:
    """v_C: the top right singular vector of B A, of length 1; zero where B A is zero.

    B A is not formed: with A^T = Q_a R_a and B = Q_b R_b it is Q_b (R_b R_a^T) Q_a^T, and the core in brackets is R x R. Singular vectors
    have no sign; this one's greatest component is positive. Computed in float64, given in float32 at least.
    """
    kind = torch.promote_types(torch.promote_types(pair.a_RC.dtype, pair.b_OR.dtype), torch.float32)
    q_CR, r_a = torch.linalg.qr(pair.a_RC.double().T)
    r_b = torch.linalg.qr(pair.b_OR.double()).R
    _, s_R, v_RR = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    if not bool(s_R[0] > 0):
        return torch.zeros(pair.a_RC.shape[1], dtype=kind, device=pair.a_RC.device)
    v_C = q_CR @ v_RR[0]
    return (v_C * v_C[v_C.abs().argmax()].sign()).to(kind)


@torch.no_grad()
def mean_activations(
    folder: str | Path, model: Decoder, token_BL: Tensor, mask_BL: Tensor | None = None
) -> dict[str, Tensor]:
    """mean |u| of what goes into each matrix that the adapter adapts, by the names of transformers: a gate without training.

    The base computes, without the adapter.

    Args:
        folder: of peft's.
        model: the base, without adapters; it is left as it was.
        token_BL: int64, text of the adapter's task.
        mask_BL: bool, False for padding, which stands on the left.
    """
    with _seen_by_matrices(folder, model) as seen:
        seen.mask_BL = mask_BL
        model(token_BL, token_mask_BL=mask_BL)
    return seen.means()


@torch.no_grad()
def activations_of_rows(
    folder: str | Path, model: Decoder, passes: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """`mean_activations` over several passes of rows whose padding stands on the right, ``(token_BL, mask_BL)``; every token counts once.

    Raises InputError where there are no passes.
    """
    with _seen_by_matrices(folder, model) as seen:
        for token_BL, mask_BL in passes:
            # No token sees what stands behind it, so the model need not be told.
            seen.mask_BL = mask_BL
            model(token_BL)
    if not seen.sums:
        raise InputError("there are no rows to make gates of")
    return seen.means()


@dataclass(eq=False)
class _Seen:
    """What goes into matrices: sums of magnitudes by module, of how many items, and which of a pass's are none."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    mask_BL: Tensor | None = None

    def means(self) -> dict[str, Tensor]:
        return {module: sum_C / max(1, self.counts[module]) for module, sum_C in self.sums.items()}

    def keep(self, modules: Sequence[str], args: tuple[Any, ...]) -> None:
        x_NC = args[0].flatten(0, -2).float()
        if self.mask_BL is not None and len(x_NC) == self.mask_BL.numel():
            x_NC = x_NC[self.mask_BL.flatten()]
        sum_C = x_NC.abs().sum(0)
        for module in modules:
            self.sums[module] = self.sums[module] + sum_C if module in self.sums else sum_C
            self.counts[module] = self.counts.get(module, 0) + len(x_NC)


@contextmanager
def _seen_by_matrices(folder: str | Path, model: Decoder) -> Iterator[_Seen]:
    """The adapter's places on the base, which computes without it, and what goes into them."""
    from anabranch.adapters.attach import unload

    load_pool({"adapter": folder}, model)
    try:
        places = {place.part: module for module, place in attached_on(model).names.places.items()}
        seen, hooks = _Seen(), []
        for name, added in model.named_modules():
            if isinstance(added, Added):
                own = [places[".".join([*name.split(".")[:-1], part])] for part in added.beside]
                hooks.append(added.register_forward_pre_hook(lambda _, args, own=own: seen.keep(own, args)))
        try:
            with evaluating(model):
                yield seen
        finally:
            for hook in hooks:
                hook.remove()
    finally:
        unload(model)


def vector_of(pair: Pair, gate_C: Tensor | None, local: str) -> tuple[Tensor, bool]:
    """(v_C, whether it has a sign) by which tokens find an expert at a matrix: its gate made comparable, or its prototype where there is
    none, which is made comparable to gates too unless prototypes alone are compared (``local`` is ``arrow``).
    """
    if local == "phatgoose" and gate_C is not None:
        return standardised(gate_C), True
    vector_C = arrow_prototype(pair)
    return (vector_C, False) if local == "arrow" else (standardised(vector_C), False)


def check_gates(gates: Mapping[str, Tensor], folder: str | Path, adapter: Adapter | None = None) -> None:
    """Raise ConfigError for gates of layers that the adapter has not, of other widths, or with numbers that are not finite."""
    pairs = (read_peft(folder) if adapter is None else adapter).pairs
    for module, gate_C in gates.items():
        if module not in pairs:
            raise ConfigError(f"a gate is for {module}, which the adapter in {folder} does not adapt")
        width = pairs[module].a_RC.shape[1]
        if tuple(gate_C.shape) != (width,):
            raise ConfigError(f"the gate of {module} has shape {list(gate_C.shape)}; the layer has {width} inputs")
        if not bool(gate_C.isfinite().all()):
            raise ConfigError(f"the gate of {module} has numbers that are not finite")
        if not bool(standardised(gate_C).isfinite().all()):
            raise ConfigError(f"the gate of {module} has numbers whose variance is not finite")
