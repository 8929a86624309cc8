"""`StoredVectors`: vectors that lie in Parquet and may be larger than this machine."""
# Shapes: N nodes, D dim

from typing import Any

import numpy as np

from anabranch.graph.stored_folder import VECTORS, StoredFolder, read_table


class StoredVectors(StoredFolder):
    """A folder of vectors (``node``, ``vector``) that a run from files of edges has written, in the order of rising ids.

    Args and attributes as of `StoredFolder`.
    """

    kind = VECTORS

    @property
    def facts(self) -> dict[str, Any]:
        """``num_nodes``, ``dim``, and how the vectors were made (``facts``). Raises DataError where the folder is not whole."""
        return self._whole

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids [N] and vectors [N, D], all of them in memory."""
        dim, table = self.facts["dim"], read_table(self.folder)
        flat = table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return table["node"].to_numpy(), flat.reshape(len(table), dim)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = self.load()[1]
        return found if dtype is None else found.astype(dtype)
