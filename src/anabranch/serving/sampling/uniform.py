"""Random numbers of one request: the i-th is a function of its seed and i alone."""

import numpy as np
from numpy.typing import NDArray

# Numbers made at a time.
_BLOCK = 64


class Uniforms:
    """Uniform numbers in [0, 1), one per token.

    Counter-based (Philox4x64, Salmon et al., SC'11), so that the number of token i is the same whoever else is in the batch, and
    after a request was preempted, computed again, or moved to another engine.

    Args:
        seed: any integer; taken modulo 2**64.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed % 2**64
        self._block = -1
        self._values: NDArray[np.float64] = np.empty(0)

    def __getitem__(self, index: int) -> float:
        """Number ``index``, from 0."""
        block, place = divmod(index, _BLOCK)
        if block != self._block:
            # A counter that starts at block * 2**64 leaves every block more numbers than it takes.
            philox = np.random.Philox(key=self.seed, counter=[0, block, 0, 0])
            self._block, self._values = block, np.random.Generator(philox).random(_BLOCK)
        return float(self._values[place])
