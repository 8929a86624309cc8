"""`StoredVectors`: vectors that lie in Parquet and may be larger than this machine."""
# Shapes: N nodes, D dim

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from anabranch.errors import DataError, InputError
from anabranch.files import parse_json
from anabranch.graph.spark.run import FACTS


class StoredVectors:
    """A folder of vectors (``node``, ``vector``) that a run from files of edges has written, in the order of rising ids.

    Args:
        path: the folder, with or without ``file:``.
        known: what lies beside the vectors, where that is known; None to read it.

    Attributes:
        path: as Spark knows it.
    """

    def __init__(self, path: str, known: dict[str, Any] | None = None) -> None:
        self.path, self._known = path, known

    def __repr__(self) -> str:
        return f"StoredVectors({self.path!r})"

    @property
    def folder(self) -> Path:
        """The local folder. Raises InputError where it lies elsewhere."""
        text = self.path.removeprefix("file://").removeprefix("file:")
        if "://" in text:
            raise InputError(f"{self.path} is not on this machine; read it with spark.read.parquet, or copy it here")
        return Path(text)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """``num_nodes``, ``dim``, and how the vectors were made (``facts``). Raises DataError where the folder is not whole."""
        if self._known is not None:
            return self._known
        try:
            return parse_json((self.folder / FACTS).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise DataError(f"{self.folder} holds no vectors that are whole: {error}") from error

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids [N] and vectors [N, D], all of them in memory."""
        import pyarrow.parquet as pq

        dim = self.facts["dim"]
        try:
            tables = [pq.ParquetFile(file).read() for file in sorted(self.folder.glob("part-*.parquet"))]
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"cannot read the vectors in {self.folder}: {error}") from error
        table = pa.concat_tables(tables)
        flat = table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return table["node"].to_numpy(), flat.reshape(len(table), dim)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = self.load()[1]
        return found if dtype is None else found.astype(dtype)
