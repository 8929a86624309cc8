"""Where the parameters lie: V and C, with the optimiser's moments, part after part, in memory or in files beside the disk.

V (vertices, as heads) starts uniform in (-1 / 2D, 1 / 2D), keyed by (seed, node) and so the same for any partition; C (contexts, as
tails) at 0.
"""
# Shapes: N nodes, D dim, P parts

import itertools
import shutil
import tempfile
import threading
import weakref
from pathlib import Path

import numba as nb
import numpy as np

from anabranch.errors import CapacityError
from anabranch.graph.graphvite.partition import Partition
from anabranch.graph.random import next_bits, stream, to_unit

# Second key of the streams of first values.
INITIAL = 3
SIDES = ("head", "tail")


class Parts:
    """Parameters in memory; a part is a view of its rows.

    Attributes:
        arrays: per side (head: V, tail: C) the parameters and their moments, each float32 [N, D] in the order of rows.
        peak_bytes: that parts took in memory at most so far.
    """

    def __init__(self, partition: Partition, dim: int, moments: int) -> None:
        self.partition, self.dim = partition, dim
        shape = (len(partition.row_N), dim)
        self.arrays = {side: [self._zeros(side, number, shape) for number in range(1 + moments)] for side in SIDES}
        self.peak_bytes = sum(array.nbytes for arrays in self.arrays.values() for array in arrays)

    def _zeros(self, side: str, number: int, shape: tuple[int, int]) -> np.ndarray:
        return np.zeros(shape, np.float32)

    def initialize(self, seed: int) -> None:
        """Set V to its first values."""
        _initialize(np.uint64(seed), self.arrays["head"][0], self.partition.node_N)

    def set(self, side: str, number: int, value_ND: np.ndarray) -> None:
        """Take values in the order of nodes."""
        for rows in self._slices():
            self.arrays[side][number][rows] = value_ND[self.partition.node_N[rows]]

    def get(self, side: str, number: int = 0) -> np.ndarray:
        """Values in the order of nodes, float32 [N, D]."""
        return self.arrays[side][number][self.partition.row_N]

    def load(self, side: str, part: int) -> list[np.ndarray]:
        """The arrays of a part, to be changed in place and given back to `store`."""
        rows = slice(self.partition.start_P[part], self.partition.start_P[part + 1])
        return [array[rows] for array in self.arrays[side]]

    def store(self, side: str, part: int, arrays: list[np.ndarray]) -> None:
        """Take the arrays of a part back."""

    def _slices(self) -> list[slice]:
        return [slice(a, b) for a, b in itertools.pairwise(self.partition.start_P)]


class MappedParts(Parts):
    """Parameters in files, mapped into memory; a part that is loaded is a copy in memory.

    Attributes:
        limit_bytes: that parts may take at once.
        resident_bytes: that they take now.
        folder: of the files; removed with this object.
    """

    def __init__(
        self, partition: Partition, dim: int, moments: int, *, limit_bytes: int, folder: str | Path | None = None
    ) -> None:
        needed = 2 * len(partition.row_N) * dim * 4 * (1 + moments)
        self.folder = Path(tempfile.mkdtemp(prefix="graphvite-", dir=folder))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CapacityError(
                f"the parameters need {needed:,} bytes in {self.folder.parent}, {free:,} are free; "
                "choose another folder with `scratch`, or a larger memory_limit"
            )
        super().__init__(partition, dim, moments)
        self.limit_bytes, self.resident_bytes, self.peak_bytes = limit_bytes, 0, 0
        self._lock = threading.Lock()

    def _zeros(self, side: str, number: int, shape: tuple[int, int]) -> np.ndarray:
        return np.memmap(self.folder / f"{side}{number}", np.float32, "w+", shape=shape)

    def get(self, side: str, number: int = 0) -> np.ndarray:
        """Values in the order of nodes, mapped from a file of its own."""
        path = self.folder / f"{side}{number}-by-node"
        # Who holds an earlier one keeps it.
        path.unlink(missing_ok=True)
        found = np.memmap(path, np.float32, "w+", shape=self.arrays[side][number].shape)
        for rows in self._slices():
            found[self.partition.node_N[rows]] = self.arrays[side][number][rows]
        return found

    def load(self, side: str, part: int) -> list[np.ndarray]:
        """A copy of a part in memory."""
        views = super().load(side, part)
        size = sum(view.nbytes for view in views)
        with self._lock:
            self.resident_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.resident_bytes)
            assert self.resident_bytes <= self.limit_bytes, "more parts are loaded than were planned for"
        return [np.array(view) for view in views]

    def store(self, side: str, part: int, arrays: list[np.ndarray]) -> None:
        """Write a part back."""
        for view, array in zip(super().load(side, part), arrays, strict=True):
            view[:] = array
        with self._lock:
            self.resident_bytes -= sum(array.nbytes for array in arrays)


@nb.njit(cache=True, nogil=True)
def _initialize(seed, V_ND, node_N):
    dim = V_ND.shape[1]
    for row in range(len(V_ND)):
        state = stream(seed, node_N[row], INITIAL)
        for i in range(dim):
            state, bits = next_bits(state)
            V_ND[row, i] = (to_unit(bits) - 0.5) / dim
