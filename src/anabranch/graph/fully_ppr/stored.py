"""`StoredScores`: scores that lie in Parquet and may be larger than this machine."""

from functools import cached_property
from typing import Any

import numpy as np

from anabranch.errors import DataError, InputError
from anabranch.graph.fully_ppr.result import FullyPPRResult
from anabranch.graph.stored_folder import SCORES, StoredFolder


class StoredScores(StoredFolder):
    """A folder of scores (``source``, ``target``, ``score``) that a run from files of edges has written.

    Nothing is read before it is asked for: `top` reads the rows of one source, `load` all of them. Whatever else `FullyPPRResult` has is
    there too, and loads.

    Args and attributes as of `StoredFolder`.
    """

    kind = SCORES

    @cached_property
    def facts(self) -> dict[str, Any]:
        """How the scores were made."""
        return self._whole["facts"]

    @property
    def num_nodes(self) -> int:
        """N, of the graph."""
        return self._whole["num_nodes"]

    @property
    def num_scores(self) -> int:
        """How many scores there are, by the files' own notes."""
        import pyarrow.dataset as ds

        return ds.dataset(self.folder, format="parquet").count_rows()

    def top(self, source: Any, k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids (as in the edges) and scores, float32, of the ``k`` best of a source; all that were kept for None.

        Raises InputError for a k below 1 or an id that has no scores.
        """
        if k is not None and k < 1:
            raise InputError(f"k is {k}; it must be at least 1, or None for all")
        import pyarrow as pa
        import pyarrow.dataset as ds

        try:
            data = ds.dataset(self.folder, format="parquet", exclude_invalid_files=False)
            asked = pa.scalar(source, data.schema.field("source").type)
            found = data.to_table(columns=["target", "score"], filter=ds.field("source") == asked)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise InputError(f"source {source!r} is no id of these scores: {error}") from None
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"cannot read the scores in {self.folder}: {error}") from error
        if not len(found):
            raise InputError(f"{source!r} is not one of the sources, or all of its scores are below min_score")
        found = found.sort_by([("score", "descending"), ("target", "ascending")])
        return found["target"].to_numpy()[:k], found["score"].to_numpy()[:k]

    def top_named(self, name: Any, k: int | None = None) -> list[tuple[Any, float]]:
        """The same as pairs of id and score."""
        ids, scores = self.top(name, k)
        return list(zip(ids.tolist(), scores.tolist(), strict=True))

    def load(self) -> FullyPPRResult:
        """All scores in memory; see `FullyPPRResult.load`."""
        return self._loaded

    @cached_property
    def _loaded(self) -> FullyPPRResult:
        return FullyPPRResult.load(self.folder)

    def __getattr__(self, name: str) -> Any:
        # Private names are not looked for: copying and pickling ask for some.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.load(), name)
