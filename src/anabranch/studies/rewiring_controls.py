"""What else could learn from a context in a few steps, beside vectors on router logits: the controls of the study of Rewiring.

    router_lora     LoRA of rank 1 on the weights of every router
    attention_lora  LoRA of rank 4 on queries, keys and values
    hidden          a vector on the last hidden state
    temperature     one factor for the logits of every router

Each starts as the model, and learns with Adam from the loss of the context alone, as ours does without its guard.
"""
# Shapes: O outputs, C inputs, R rank, D width

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from anabranch.lm import Decoder
from anabranch.routing import Router

__all__ = ["CONTROLS", "fitted_control"]

CONTROLS = ("router_lora", "attention_lora", "hidden", "temperature")
_RANKS = {"router_lora": 1, "attention_lora": 4}


class _LowRank(nn.Module):
    """W + B A, B zero at first."""

    def __init__(self, weight_OC: Tensor, rank: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        outputs, inputs = weight_OC.shape
        self.a = nn.Parameter((torch.randn(rank, inputs, generator=generator) / inputs**0.5).to(weight_OC.dtype))
        self.b = nn.Parameter(torch.zeros(outputs, rank, dtype=weight_OC.dtype))

    def forward(self, weight_OC: Tensor) -> Tensor:
        return weight_OC + self.b @ self.a


class _Scaled(nn.Module):
    """exp(t) W: a temperature of what the weights make."""

    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.zeros(()))

    def forward(self, weight_OC: Tensor) -> Tensor:
        return weight_OC * self.t.exp()


@contextmanager
def fitted_control(model: Decoder, name: str, context: Sequence[int], *, rate: float, steps: int) -> Iterator[None]:
    """The model with what learned from the context, in the block; behind it the model is what it was."""
    with _added(model, name) as parameters:
        optimizer = torch.optim.Adam(parameters, lr=rate)
        token_BL = torch.tensor([list(context)])
        with torch.enable_grad():
            for _ in range(steps):
                logits_BLV = model(token_BL[:, :-1]).logits_BLV
                loss = F.cross_entropy(logits_BLV[0].float(), token_BL[0, 1:])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        yield


@contextmanager
def _added(model: Decoder, name: str) -> Iterator[list[nn.Parameter]]:
    if name == "hidden":
        vector_D = nn.Parameter(torch.zeros(model.config.dim, dtype=model.embedding.weight.dtype))
        handle = model.norm.register_forward_hook(lambda module, given, x_BLD: x_BLD + vector_D)
        try:
            yield [vector_D]
        finally:
            handle.remove()
        return
    holders = list(_holders(model, attention=name == "attention_lora"))
    try:
        made = []
        for module, weight in holders:
            part: Any = _Scaled() if name == "temperature" else _LowRank(weight, _RANKS[name])
            parametrize.register_parametrization(module, "weight", part)
            made += list(part.parameters())
        yield made
    finally:
        for module, _ in holders:
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


def _holders(model: Decoder, *, attention: bool) -> Iterator[tuple[nn.Module, Tensor]]:
    """Modules whose matrix is called weight: routers' scores, or what makes queries, keys and values."""
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            continue
        if attention and ".attention." in name and _makes_queries(name):
            yield module, weight
        elif not attention and any(part for part in _routers(model) if name.startswith(f"{part}.")):
            yield module, weight


def _makes_queries(name: str) -> bool:
    return name.rpartition(".")[2] in ("q", "v", "qkv")


def _routers(model: Decoder) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Router)]
