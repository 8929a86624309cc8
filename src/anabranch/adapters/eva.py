"""EVA's start of LoRA: A takes the main directions of what its layer is given (Paischer et al. 2024, arXiv 2410.07170).

    start_by_inputs(model, losses)

The rows of A are the right singular vectors of the layer's inputs X, one row of X a token, with the greatest singular values; B stays 0, so
that nothing is added. Every layer keeps its rank (the paper's rho = 1).
"""
# Shapes: N tokens, C inputs, R rank

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.adapters.low_rank import LowRank
from anabranch.errors import InputError

__all__ = ["start_by_inputs"]


@torch.no_grad()
def start_by_inputs(model: nn.Module, losses: Iterable[Tensor]) -> None:
    """Set A of every `LowRank` of ``model`` by the inputs that it meets while this goes over ``losses``, which are made meanwhile.

    It keeps C x C numbers of each layer, in float64, for that time. Layers that are given nothing, as of an expert that no token chose,
    start as LoRA does, and so do directions beyond those that a layer was given. Raises InputError where inputs are NaN or infinite;
    nothing is changed then.
    """
    layers = [module for module in model.modules() if type(module) is LowRank]
    squares: dict[LowRank, Tensor] = {}

    def seeing(layer: LowRank) -> Callable[..., None]:
        def see(module: nn.Module, given: tuple[Any, ...]) -> None:
            x_NC = given[0].detach().reshape(-1, layer.a.shape[1]).double()
            square_CC = x_NC.mT @ x_NC
            squares[layer] = square_CC if layer not in squares else squares[layer].add_(square_CC)

        return see

    with ExitStack() as stack:
        for layer in layers:
            # What is hooked is called by itself, whatever else stands beside the same matrix.
            stack.callback(layer.register_forward_pre_hook(seeing(layer)).remove)
        for _ in losses:
            pass
    if not all(bool(square_CC.isfinite().all()) for square_CC in squares.values()):
        raise InputError("the main directions of what layers are given cannot be found: some of it is NaN or infinite")
    for layer, square_CC in squares.items():
        value_C, vector_CC = torch.linalg.eigh(square_CC)
        # The greatest come last. What is nothing but rounding is no direction; one token may be a thousand times as large as others.
        is_there_C = value_C > value_C[-1] * len(value_C) * torch.finfo(torch.float64).eps
        top_CR = vector_CC[:, is_there_C].flip(1)[:, : layer.config.rank]
        layer.a[: top_CR.shape[1]] = top_CR.mT.to(layer.a)
