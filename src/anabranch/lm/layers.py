"""A decoder as a list of layers with their costs: embedding, blocks, head. What a pipeline's stages are cut from."""

from collections.abc import Iterator

import torch
from torch import nn

from anabranch.cluster import LayerCost
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import build_empty
from anabranch.nn.count import Count
from anabranch.nn.linear import count_linear

__all__ = ["layer_costs", "referred_to", "uncut_groups"]


# What a block keeps for its backward pass, over what its matrices make: their inputs, and what lies between them (norms, activations of
# feed-forwards, what attention gives), which is half as much again.
_KEPT = 1.5


def layer_costs(config: Decoder.Config, *, tokens: int, sequence_length: int, dtype: torch.dtype) -> list[LayerCost]:
    """Embedding, blocks, and last norm with head, in order. Nothing is built.

    What a layer keeps for its backward pass is estimated by the sizes of its matrices, with attention that keeps no scores.

    Args:
        config: of the model.
        tokens: of a micro-batch.
        sequence_length: over which attention is counted.
        dtype: of what goes from layer to layer, and of what is kept.
    """
    width = tokens * config.dim * dtype.itemsize
    table = config.vocab_size * config.dim
    # The look-up costs no operations, but the table is memory.
    costs = [
        LayerCost(
            name="embedding",
            flops=0.0,
            parameters=table,
            output_bytes=width,
            saved_bytes=tokens * torch.int64.itemsize,
        )
    ]
    head = Count()
    for number, context in enumerate(config.contexts()):
        count = config.block.count(context, sequence_length)
        costs.append(
            LayerCost(
                name=f"block {number}",
                flops=count.flops * tokens,
                parameters=count.parameters,
                output_bytes=width,
                # Numbers that matrices make of a token are as many as their columns.
                saved_bytes=_KEPT * count.active / config.dim * tokens * dtype.itemsize,
            )
        )
        head = Count(0, 0, 2 * table) if config.tie_embeddings else count_linear(config.head(context), context)
    scores = tokens * config.vocab_size * dtype.itemsize
    costs.append(
        LayerCost(
            name="head",
            flops=head.flops * tokens,
            parameters=head.parameters + config.dim,
            output_bytes=scores,
            # What the norm and the matrix are given, and the logarithms of probabilities of the loss, which are float32.
            saved_bytes=2 * width + tokens * config.vocab_size * torch.float32.itemsize,
            # A stage that has the head alone has the table too.
            tied_to=0 if config.tie_embeddings else None,
        )
    )
    return costs


def uncut_groups(config: Decoder.Config) -> list[range]:
    """Layers of `layer_costs` that use modules together (the pool of a ReXMoE group, a recurrence), so that one stage must have them.

    A group is a range from its first user to its last.
    """
    model = build_empty(config)
    users: dict[int, list[int]] = {}
    for number, block in enumerate(model.blocks):
        for module in referred_to(block, {id(part) for part in model.shared.modules()}):
            users.setdefault(module, []).append(number)
    spans = sorted({(min(found), max(found)) for found in users.values() if len(set(found)) > 1})
    merged: list[tuple[int, int]] = []
    for first, last in spans:
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    # Layer 0 is the embedding.
    return [range(first + 1, last + 2) for first, last in merged]


def referred_to(block: nn.Module, shared: set[int]) -> Iterator[int]:
    """Ids of those of the ``shared`` modules that a block's modules hold without registering them."""
    for module in block.modules():
        for value in vars(module).values():
            if isinstance(value, nn.Module) and id(value) in shared:
                yield id(value)
