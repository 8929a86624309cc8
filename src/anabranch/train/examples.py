"""`Examples`: tensors in memory as a stream of training batches."""
# Shapes: N examples, B of a batch

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.errors import ConfigError, DataError

__all__ = ["Examples"]


class Examples:
    """An endless, deterministic stream of rows of tensors: every example once an epoch, in an order drawn anew for each.

    Which example comes n-th is a function of (seed, n) alone, so a run resumes anywhere, and any number of processes together see what one
    would.

    Args:
        tensors: of equal length N; a batch is a tuple of their rows ``[B, ...]``.
        seed: decides the order.
        rank, world_size: of ``world_size`` processes with equal batch sizes this is number ``rank``; their batches joined in rank order are
            the batch of a single process.

    Raises DataError if there are no examples or tensors differ in length, ConfigError for a rank outside the world.
    """

    def __init__(self, *tensors: Tensor, seed: int, rank: int = 0, world_size: int = 1) -> None:
        lengths = sorted({len(tensor) for tensor in tensors})
        if len(lengths) != 1 or lengths[0] == 0:
            raise DataError(f"tensors of {lengths} examples; they must all have as many, and at least one")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank is {rank}; it must be 0 to {world_size - 1} in a world of {world_size}")
        self.tensors, self.seed, self.rank, self.world_size = tensors, seed, rank, world_size
        self.position = 0
        self._fingerprint = fingerprint(*tensors)
        self._epoch: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.tensors[0])

    def next_batch(self, batch_size: int) -> tuple[Tensor, ...]:
        """The next ``batch_size`` examples of this process; the stream moves on by ``batch_size * world_size``."""
        first = self.position + self.rank * batch_size
        row_B = torch.tensor([self._row(first + number) for number in range(batch_size)])
        self.position += batch_size * self.world_size
        return tuple(tensor[row_B] for tensor in self.tensors)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is; the same in all processes, so any number of them can go on from it."""
        return {"position": self.position, "seed": self.seed, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where ``state`` says, at once. Raises DataError if it comes from another seed or other examples."""
        for name, mine in self.state_dict().items():
            if name != "position" and state[name] != mine:
                told = f"their {name} was {state[name]!r} and is now {mine!r}"
                if name == "fingerprint":
                    told = "they, or what a tokenizer makes of them, are not those that the run began with"
                raise DataError(f"cannot resume the examples: {told}; bring that back, or start a new run")
        self.position = state["position"]

    def _row(self, number: int) -> int:
        epoch, place = divmod(number, len(self))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self)))
        return int(self._epoch[1][place])


def fingerprint(*tensors: Tensor) -> str:
    """Names tensors by their content."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
