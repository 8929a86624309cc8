"""S4: which kinds of adapters stand in which layers, as a search over design spaces found (Chen et al. 2023, arXiv 2301.01821).

    layers      four groups from the first to the last, the outer ones half as large as the inner ones (spindle)
    strategies  (adapter, LoRA)   (adapter, prefix)   (adapter, prefix, bias)   (prefix, bias, LoRA)
    sizes       the same in all layers (uniform), and no layer without (all groups learn)

That is the design that the paper names S4; the search itself is not run. Adapters stand behind o and down, LoRA beside q and v, biases
behind every matrix of their group that has neither.
"""

from bisect import bisect_right
from collections.abc import Mapping
from math import floor
from typing import Any

from anabranch.adapters.after import SerialBottleneck, Shift
from anabranch.adapters.low_rank import LowRank
from anabranch.nn import Linear

__all__ = ["GROUPS", "group_of", "layer_at", "prefixed"]

# What each group has: adapter, LoRA, prefix, bias.
GROUPS = (frozenset("AL"), frozenset("AP"), frozenset("APB"), frozenset("PBL"))
# Where groups begin, as shares of all layers.
_BOUNDS = (1 / 6, 1 / 2, 5 / 6)


def group_of(layer: int, num_layers: int) -> int:
    """The group of a layer, 0 to 3; a model of few layers lacks the outer ones."""
    return bisect_right([floor(share * num_layers + 0.5) for share in _BOUNDS], layer)


def prefixed(num_layers: int) -> tuple[int, ...]:
    """Layers whose attention has a prefix."""
    return tuple(layer for layer in range(num_layers) if "P" in GROUPS[group_of(layer, num_layers)])


def layer_at(word: str, layer: int, num_layers: int, options: Mapping[str, Any]) -> Linear.Config | None:
    """What stands at the matrix of this ``word`` (``q``, ``down``) of a layer; None for nothing."""
    strategies = GROUPS[group_of(layer, num_layers)]
    if "A" in strategies and word in ("o", "down"):
        return SerialBottleneck.Config(width=options["width"])
    if "L" in strategies and word in ("q", "v"):
        return LowRank.Config(rank=options["rank"], alpha=float(options["alpha"]))
    return Shift.Config() if "B" in strategies else None
