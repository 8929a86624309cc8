"""Token ids that a vocabulary has: where they come in, before anything computes with them.

Of an id that it does not have a packed table gives zeros or another row, and one on a GPU ends the process's use of that GPU.
"""
# Shapes: B batch, L positions

from collections.abc import Sequence

import torch
from torch import Tensor

from anabranch.bounds import is_whole, shown
from anabranch.errors import ConfigError
from anabranch.nn.kernels.operands import PLAIN

__all__ = ["check_batch", "check_token_ids"]


def check_token_ids(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raise ConfigError for an empty prompt, one with ids outside the vocabulary, and what is no list of ids."""
    if not isinstance(prompts, Sequence) or isinstance(prompts, str | bytes):
        raise ConfigError(f"prompts is {shown(prompts)}; give lists of token ids")
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, Sequence) or not all(map(is_whole, prompt)):
            raise ConfigError(f"prompt {number} is {shown(prompt)}; a prompt is a list of token ids, whole numbers")
        if not prompt:
            raise ConfigError(f"prompt {number} is empty; give at least one token")
        if max(prompt) >= vocab_size or min(prompt) < 0:
            raise ConfigError(f"prompt {number} has a token outside 0 to {vocab_size - 1}; is it another tokenizer's?")


def check_batch(token_BL: Tensor, vocab_size: int) -> None:
    """Raise ConfigError for a batch in memory with ids outside the vocabulary; with ``torch.func.vmap``, in any sample.

    What lies on a GPU is not waited for, and what has no numbers (``FakeTensorMode``, a graph that is being traced) is not looked at.
    """
    # A mode may take the place of every operator, also on plain tensors.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0:
        return
    # The ids of all samples, of which each that vmap shows is a part.
    while torch._C._functorch.is_functorch_wrapped_tensor(token_BL):
        token_BL = torch._C._functorch.get_unwrapped(token_BL)
    if type(token_BL) not in PLAIN or token_BL.device.type != "cpu" or token_BL.numel() == 0:
        return
    least, most = map(int, token_BL.aminmax())
    if least < 0 or most >= vocab_size:
        outside = least if least < 0 else most
        raise ConfigError(
            f"token_BL has the token {outside}; the model has 0 to {vocab_size - 1}; is it another tokenizer's?"
        )
