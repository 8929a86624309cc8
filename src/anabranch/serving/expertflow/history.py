"""What each sequence of a model has read so far, for predictors: from an engine's batches, or from calls of a decoder."""
# Shapes: B batch, L positions

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.lm.cache import KeyValueCache
from anabranch.serving.core.batch import PENDING, Batch, Sampled
from anabranch.serving.expertflow.predictors.base import Row

# Name in a key-value cache's state.
STATE = "expertflow"


class BatchHistory:
    """Tokens of the requests of an engine."""

    def __init__(self) -> None:
        self._ids: dict[str, list[int]] = {}
        self._prompt: dict[str, int] = {}

    def rows(self, batch: Batch, tokens: Sequence[int]) -> list[Row]:
        """One of each chunk; ``tokens`` are those of all chunks, known ones."""
        for request in batch.new:
            self._prompt[request.id] = len(request.prompt)
            # What a prefix cache holds is not run, but was read.
            self._ids[request.id] = list(request.prompt)
        rows, start = [], 0
        for chunk in batch.chunks:
            new = list(tokens[start : start + len(chunk.tokens)])
            start += len(new)
            ids = self._ids.get(chunk.id, [])
            self._ids[chunk.id] = ids = ids[: chunk.start] + new + ids[chunk.start + len(new) :]
            so_far = np.array(ids[: chunk.start + len(new)], np.int32)
            rows.append(Row(chunk.id, so_far, len(new), self._prompt.get(chunk.id, len(ids))))
        return rows

    def sampled(self, sampled: Sequence[Sampled]) -> None:
        """The next token of each of these requests is known."""
        for one in sampled:
            if one.error is None and one.token != PENDING and one.id in self._ids:
                self._ids[one.id].append(one.token)

    def next_row(self, id: str) -> Row:
        """Of a request that decodes, with its next token as the only new one."""
        ids = self._ids[id]
        return Row(id, np.array(ids, np.int32), 1, self._prompt[id])

    def forget(self, ids: Sequence[str]) -> None:
        """These requests are over."""
        for id in ids:
            self._ids.pop(id, None)
            self._prompt.pop(id, None)


class CacheHistory:
    """Tokens of the sequences of a key-value cache; it lies in the cache's state and follows when rows leave."""

    def __init__(self) -> None:
        # Names of its own: the cache gives those that it has away again when its first batch comes.
        self.keys: list[object] = []
        self.ids: list[np.ndarray] = []
        self.prompt: list[int] = []

    def add(self, token_BL: Tensor, mask_BL: Tensor | None) -> list[Row]:
        """The rows of a forward pass over these tokens."""
        tokens = token_BL.cpu().numpy().astype(np.int32)
        real = np.ones(tokens.shape, bool) if mask_BL is None else mask_BL.cpu().numpy().astype(bool)
        new = [row[keep] for row, keep in zip(tokens, real, strict=True)]
        if not self.ids:
            self.keys = [object() for _ in new]
            self.ids = [np.empty(0, np.int32) for _ in new]
            self.prompt = [len(ids) for ids in new]
        self.ids = [np.concatenate((old, more)) for old, more in zip(self.ids, new, strict=True)]
        rows = zip(self.keys, self.ids, new, self.prompt, strict=True)
        return [Row(key, ids, len(more), prompt) for key, ids, more, prompt in rows]

    def keep_rows(self, row_B: Tensor) -> None:
        """Follow `KeyValueCache.keep_rows`. Copies of a sequence go on under names of their own."""
        kept = torch.arange(len(self.ids), device=row_B.device)[row_B].tolist()
        is_copy = [number in kept[:place] for place, number in enumerate(kept)]
        self.keys = [object() if copy else self.keys[number] for number, copy in zip(kept, is_copy, strict=True)]
        self.ids, self.prompt = [self.ids[number] for number in kept], [self.prompt[number] for number in kept]


def call_rows(arguments: tuple[Any, ...], options: dict[str, Any]) -> list[Row]:
    """The rows of a call ``decoder(token_BL, cache=..., token_mask_BL=...)``."""
    token_BL = arguments[0] if arguments else options["token_BL"]
    cache: KeyValueCache | None = options.get("cache")
    history = CacheHistory()
    if cache is not None:
        history = cache.state.setdefault(STATE, history)  # type: ignore[assignment]
    return history.add(token_BL, options.get("token_mask_BL"))
