"""Adapters of experts that transformers has stacked in one parameter (``target_parameters`` of peft): one pair of matrices for all experts.

A holds the ranks of the first expert, then those of the next, in its rows; in B's columns the first rank of each expert comes first. What
stands for gate and up is one product, whose first rows are the gate's. peft before 0.18 took such a parameter for ``[E, inputs, outputs]``,
which these are not, so that A and B stand for the transposed matrix; their sizes tell.
"""
# Shapes: E experts, R rank, C inputs, O outputs, S = E R

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from anabranch.adapters.low_rank import Pair
from anabranch.errors import CheckpointError
from anabranch.lm.decoder import Decoder
from anabranch.nn import MoE
from anabranch.nn.activation import activation_of

__all__ = ["PARAMETERS", "Stack", "expanded"]

# In the order in which peft wraps them: the first innermost.
PARAMETERS = ("gate_up_proj", "down_proj")
_NAME = re.compile(r"(?:.*\.)?layers\.(?P<layer>\d+)\.(?:.*\.)?experts\.(?P<parameter>gate_up_proj|down_proj)")


@dataclass(frozen=True, eq=False)
class Stack:
    """The adapters of all experts of one layer and parameter.

    Attributes:
        a_SC, b_OS: see above.
        rank: R.
        alpha, rslora: see `scale_of`.
    """

    a_SC: Tensor
    b_OS: Tensor
    rank: int
    alpha: float
    rslora: bool = False

    def pairs(self, in_dim: int, out_dim: int) -> list[Pair] | None:
        """One pair for each expert, of matrices with ``in_dim`` inputs and ``out_dim`` outputs; None where they are of others."""
        sizes = self.a_SC.shape[1], self.b_OS.shape[0]
        a_ERC = self.a_SC.unflatten(0, (-1, self.rank))
        b_EOR = self.b_OS.unflatten(1, (self.rank, -1)).permute(2, 0, 1)
        if sizes == (in_dim, out_dim):
            halves = zip(a_ERC, b_EOR, strict=True)
        elif sizes == (out_dim, in_dim):
            halves = zip(b_EOR.transpose(1, 2), a_ERC.transpose(1, 2), strict=True)
        else:
            return None
        return [Pair(a_RC.contiguous(), b_OR.contiguous(), self.alpha, self.rslora) for a_RC, b_OR in halves]


def expanded(stacks: Mapping[str, Stack], config: Decoder.Config, where: str) -> dict[str, Pair]:
    """The pairs of single experts, by the parts of a model of ``config``.

    Raises CheckpointError, which begins with ``where``, for a layer, a number of experts or widths that the model has not.
    """
    found: dict[str, Pair] = {}
    for name, stack in stacks.items():
        match = _NAME.fullmatch(name)
        layer = int(match["layer"]) if match else config.num_layers
        moe = config.feed_forward_of(layer) if layer < config.num_layers else None
        if match is None or not isinstance(moe, MoE.Config) or len(activation_of(moe.activation).parts) != 2:
            raise CheckpointError(
                f"{where} adapts {name}, and the model has no such experts; is it another model's adapter?"
            )
        is_down = match["parameter"] == "down_proj"
        wanted = (moe.hidden_dim, config.dim) if is_down else (config.dim, 2 * moe.hidden_dim)
        pairs = stack.pairs(*wanted)
        if pairs is None or len(pairs) != moe.num_experts:
            given = [stack.a_SC.shape[0] // stack.rank, stack.a_SC.shape[1], stack.b_OS.shape[0]]
            raise CheckpointError(
                f"{where} adapts {name} with [experts, inputs, outputs] {given}, and the model's is {[moe.num_experts, *wanted]}; is it "
                "another model's adapter?"
            )
        place = f"blocks.{layer}.feed_forward.experts"
        for expert, pair in enumerate(pairs):
            if is_down:
                found[f"{place}.{expert}.down"] = pair
                continue
            for part, b_OR in zip(("gate", "up"), pair.b_OR.chunk(2), strict=True):
                found[f"{place}.{expert}.{part}"] = Pair(pair.a_RC, b_OR, pair.alpha, pair.rslora)
    return found
