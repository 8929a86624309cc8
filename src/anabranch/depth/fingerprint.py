"""What tells a model from another: routers of depth are of one model, and say nothing about any other."""
# Shapes: K tokens, D width

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fingerprint_of"]

# Tokens whose embeddings are looked at, evenly over the vocabulary, and numbers of a vector.
TOKENS, OF_VECTOR = 64, 16


def fingerprint_of(module: nn.Module, embedding: Any, *, num_blocks: int, vocabulary: int, width: int) -> str:
    """SHA-256 over the sizes of a model, some of its embeddings, and a sample of all its vectors that are no biases (norms).

    These stay where a model is quantised or packed, and they are rounded to bfloat16: so a model has one fingerprint in every form that it
    is loaded in, and another model another one, also of the same sizes. Matrices of blocks do not count.
    """
    made = hashlib.sha256(repr((num_blocks, vocabulary, width)).encode())
    token_K = torch.linspace(0, vocabulary - 1, min(TOKENS, vocabulary), dtype=torch.float64).long()
    with torch.no_grad():
        made.update(_bytes(embedding(token_K.to(embedding.weight.device))))
    for name, parameter in sorted(module.named_parameters()):
        if parameter.dim() == 1 and not name.endswith("bias"):
            count = len(parameter)
            index_K = torch.linspace(0, count - 1, min(OF_VECTOR, count), dtype=torch.float64).long()
            made.update(f"{name} {count}".encode())
            made.update(_bytes(parameter.detach()[index_K.to(parameter.device)]))
    return made.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    # As integers, since numpy has no bfloat16.
    return tensor.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
