"""What tells a model from another: routers of depth are of one model, and say nothing about any other."""

import hashlib

import torch
from torch import Tensor, nn

__all__ = ["fingerprint_of"]

# Numbers of a tensor that are looked at, evenly over it.
OF_EMBEDDING, OF_VECTOR = 4096, 16


def fingerprint_of(module: nn.Module, embedding_VD: Tensor, num_blocks: int) -> str:
    """SHA-256 over the sizes of a model, and a sample of its embedding and of all its vectors that are no biases (norms).

    These stay where a model is quantised, and they are rounded to bfloat16: so a model has one fingerprint in every form that it is loaded
    in, and another model another one, also of the same sizes. Matrices of blocks do not count.
    """
    made = hashlib.sha256(repr((num_blocks, *embedding_VD.shape)).encode())
    made.update(_sample(embedding_VD, OF_EMBEDDING))
    for name, parameter in sorted(module.named_parameters()):
        if parameter.dim() == 1 and not name.endswith("bias"):
            made.update(f"{name} {len(parameter)}".encode())
            made.update(_sample(parameter, OF_VECTOR))
    return made.hexdigest()


def _sample(tensor: Tensor, count: int) -> bytes:
    flat_N = tensor.detach().flatten()
    index_K = torch.linspace(0, len(flat_N) - 1, min(count, len(flat_N)), device=flat_N.device).long()
    # As integers, since numpy has no bfloat16.
    return flat_N[index_K].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
