"""What an engine takes beside its weights, keys and values: while a step runs, and while the model is loaded. Bounds, from sizes alone.

They are of the compiled step (`anabranch.serving.fast`, kernels/step_work.h) and of the same step module by module, whichever takes more.
"""
# Shapes: T tokens of a step, D width, H heads, G key heads, W head width, K experts per token, F hidden, E experts, V vocabulary

from typing import Any

from torch import nn

from anabranch.lm.decoder import Decoder
from anabranch.lm.outline import weight_bytes
from anabranch.nn import RMSNorm
from anabranch.nn.moe import MoE
from anabranch.nn.packed import AT_ONCE
from anabranch.nn.pool import ExpertPool
from anabranch.nn.quantize import FewBitLinear, QuantizedPool
from anabranch.routing import Score
from anabranch.serving.engine.score import TILE
from anabranch.serving.expertflow.direct import CHUNK
from anabranch.serving.memory.forms import Form

__all__ = ["load_bytes", "step_bytes"]

FLOAT = 4

# Bytes for each token of the vocabulary: a row of logits that is sampled from is there as itself, adjusted, sorted (with its places),
# summed up and drawn from; one of a prompt that is scored as itself, its copy and its log-softmax.
SAMPLED, SCORED = 48, 12

# Rows behind a step's that the activations of a product are padded with, so that it takes whole tiles (SPARE_ROWS in kernels/packed.h).
SPARE_ROWS = 32

# Bytes of a weight while it is rounded: itself in float32, scaled, rounded, and as an integer of several types.
ROUNDED = 24

# What is counted for tensors as they are stored, of which one or two are in memory while they are read.
READ_BYTES = 64_000_000

# A page, where each matrix of the compiled step begins.
PAGE = 4096


def step_bytes(
    form: Form,
    max_batched_tokens: int,
    max_seqs: int,
    max_positions: int,
    *,
    prompt_lookup: int = 0,
    workers: int = 0,
    is_adapted: bool = False,
) -> int:
    """Of the largest step, at most.

    Args:
        form: the model.
        max_batched_tokens: rows of the step.
        max_seqs: of them, that are sampled from.
        max_positions: of the longest request.
        prompt_lookup: guesses before each row that is sampled from.
        workers: threads that load experts from disk; 0 where all are in memory.
        is_adapted: whether rows may have adapters, whose outputs are there beside those of the matrices.
    """
    model, tokens = form.model, max_batched_tokens
    config: Any = model.config
    attention: Any = config.attention
    heads, width = attention.num_heads, sum(attention.kept(config.dim))
    row = 12 * config.dim + 4 * heads * attention.width(config.dim) + 4 * attention.kv_heads * width
    row += max((_row_of_experts(module) for module in model.modules() if isinstance(module, MoE)), default=0)
    row += (5 if is_adapted else 3) * max((_width(module) for module in model.blocks.modules()), default=0)
    logits = max(min(TILE, tokens) * SCORED, max_seqs * SAMPLED) * config.vocab_size
    if prompt_lookup:
        # Those of guesses lie there until it is their turn, and whose turn it is are copied.
        logits += FLOAT * (min(tokens, max_seqs * prompt_lookup) + max_seqs) * config.vocab_size
    padding = SPARE_ROWS * max((_depth(module) for module in model.blocks.modules()), default=0)
    # Whoever waits for an expert may read it too, with a buffer as loading threads have.
    buffers = (workers + 1) * CHUNK if workers else 0
    return FLOAT * (tokens * row + padding) + logits + _scores(model, tokens, max_positions) + _beside(model) + buffers


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | FewBitLinear)


def _width(module: nn.Module) -> int:
    """Outputs of a linear layer."""
    return module.out_features if isinstance(module, nn.Linear | FewBitLinear) else 0


def _depth(module: nn.Module) -> int:
    """Inputs of a linear layer, or the most of one of an expert's."""
    if isinstance(module, ExpertPool | QuantizedPool):
        return max(getattr(module, "hidden_dim", 0), getattr(module, "dim", 0))
    return module.in_features if isinstance(module, nn.Linear | FewBitLinear) else 0


def _row_of_experts(layer: Any) -> int:
    """Numbers of one token's row in a layer of experts."""
    pool, config = layer.experts, layer.config
    chosen = min(config.num_choices, pool.num_experts)
    return chosen * (3 * getattr(pool, "hidden_dim", 0) + 3 * getattr(pool, "dim", 0) + 16) + 4 * pool.num_experts


def _scores(model: Decoder, tokens: int, max_positions: int) -> int:
    """Of attention that no kernel computes: the scores of a step whose tokens are all of one sequence, and their softmax."""
    config: Any = model.config
    kinds = [config.attention, *([] if config.local_attention is None else [config.local_attention])]
    odd = [kind for kind in kinds if not kind.is_plain]
    if not odd:
        return 0
    return max(2 * FLOAT * kind.num_heads * tokens * max_positions for kind in odd)


def _beside(model: Decoder) -> int:
    """What the compiled step keeps beside the weights: norms, routers and biases in float32, and where matrices begin."""
    small = [
        parameter
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if isinstance(module, RMSNorm | Score) or parameter.dim() == 1
    ]
    matrices = sum(_is_matrix(module) or isinstance(module, ExpertPool | QuantizedPool) for module in model.modules())
    return FLOAT * sum(parameter.numel() for parameter in small) + 2 * PAGE * matrices


def load_bytes(form: Form, is_rounded: bool, on_disk: bool) -> int:
    """While the model is loaded: tensors as they are stored, and what is rounded or packed and so there twice.

    Args:
        form: the model.
        is_rounded: weights are stored in other bits than those they are served in.
        on_disk: experts stay there.
    """
    modules = list(form.model.modules())
    pools = max(
        (weight_bytes(module) for module in modules if isinstance(module, ExpertPool | QuantizedPool)), default=0
    )
    others = max(
        (weight_bytes(module) for module in modules if _is_matrix(module) or isinstance(module, nn.Embedding)),
        default=0,
    )
    packed = others if on_disk else max(pools, others)
    if not is_rounded:
        # A pool may lie in its file as one tensor, and is in memory whole while it is read.
        return max(packed, READ_BYTES + packed)
    return READ_BYTES + ROUNDED * AT_ONCE + max(pools, packed)
