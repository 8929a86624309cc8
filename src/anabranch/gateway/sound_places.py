"""Where the samples of a track of M4A lie (``stsz``, ``stsc``, ``stco``): tables may put many at one place, to be played many times."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class SamplePlaces:
    """The tables of one track, as they stand in the file.

    Attributes:
        sizes: bytes of each sample, by each table of them.
        runs: (K, 3): from which chunk on, counted from one, a chunk has how many samples, of which config.
        chunks: where each chunk begins.
        is_odd: sizes are told in a way that is not looked at here.
    """

    sizes: list[np.ndarray] = field(default_factory=list)
    runs: list[np.ndarray] = field(default_factory=list)
    chunks: list[np.ndarray] = field(default_factory=list)
    is_odd: bool = False

    def lie_apart(self) -> bool:
        """Whether no byte is in two samples; False where the tables do not fit one another, or one is there twice."""
        if self.is_odd or not len(self.sizes) == len(self.runs) == len(self.chunks) == 1:
            return False
        sizes_N, runs_K3, starts_C = (table[0].astype(np.int64) for table in (self.sizes, self.runs, self.chunks))
        if not (len(sizes_N) and len(runs_K3) and len(starts_C)) or starts_C.min() < 0:
            return False
        firsts_K, spans_K = runs_K3[:, 0], np.diff(runs_K3[:, 0], append=len(starts_C) + 1)
        if firsts_K[0] != 1 or spans_K.min() <= 0:
            return False
        # Samples before the end of each chunk.
        before_C = np.cumsum(np.repeat(runs_K3[:, 1], spans_K))
        if before_C[-1] != len(sizes_N):
            return False
        bytes_C = np.diff(np.concatenate(([0], np.cumsum(sizes_N)))[before_C], prepend=0)
        order = np.argsort(starts_C)
        starts_C, ends_C = starts_C[order], (starts_C + bytes_C)[order]
        return bool((starts_C[1:] >= ends_C[:-1]).all())
