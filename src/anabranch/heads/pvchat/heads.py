"""Routed heads in the self- and cross-attention of the upper half of a query former's layers, as ReMoH replaces those of a Q-former."""

from __future__ import annotations

from typing import Any

from torch import nn

from anabranch.heads.config import HeadRouting
from anabranch.heads.gate import HeadGate
from anabranch.heads.pvchat.layers import QueryFormer
from anabranch.heads.routed_heads import RoutedHeads

__all__ = ["put_on", "routed", "router_parameters"]


def put_on(queries: QueryFormer, heads: HeadRouting, *, seed: int = 0) -> None:
    """Wrap the attentions of the upper half of the layers, in place; nothing where ``heads`` are plain."""
    if heads.routing == "none":
        return
    count = 0

    def wrap(attention: nn.MultiheadAttention) -> nn.Module:
        nonlocal count
        made = RoutedHeads.of(attention, heads, layer=count, seed=seed + count)
        count += 1
        return made

    queries.wrap(wrap, first=len(queries.layers) // 2)


def routed(queries: nn.Module) -> list[Any]:
    """The wrapped attentions, in order."""
    return [module for module in queries.modules() if isinstance(module, RoutedHeads)]


def router_parameters(queries: nn.Module) -> set[int]:
    """The ids of the parameters that weigh heads."""
    gates = [module for module in queries.modules() if isinstance(module, HeadGate)]
    return {id(parameter) for gate in gates for parameter in gate.parameters()}
