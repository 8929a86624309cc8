"""Running one input along many paths: what paths have in common from the start is computed once, and counted.

A tree search asks for hundreds of paths of the same prompt, each one an edit of another. So the states behind every prefix are kept, up to
a number of bytes, and a path begins at its longest prefix that is there. ``blocks`` counts the block passes that were made, ``naive`` what
running each path from the start would have taken.
"""
# Shapes: B sequences, L positions, D width, V vocabulary

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anabranch.depth.dr_llm.masked import embed_masked
from anabranch.depth.dr_llm.moves import Steps
from anabranch.depth.stack import BlockStack, run_path
from anabranch.errors import ConfigError, NotFiniteError

__all__ = ["KEEP_BYTES", "PathRun", "PathRunner", "QuestionRuns", "padded"]

# Of the states that one question's paths may leave behind.
KEEP_BYTES = 256 * 2**20


class PathRunner:
    """One batch of tokens, along any path.

    Args:
        stack: of the model.
        token_BL: int64.
        attention_mask: as of `BlockStack.embed`; or of pairs, ``[B, L, L]``, see `embed_masked`.
        position_BL: likewise.
        keep_bytes: of states; the longest unused go first. 0 keeps none.

    Attributes:
        blocks: block passes made so far.
        naive: those that all paths would have taken from the start.
    """

    def __init__(
        self,
        stack: BlockStack,
        token_BL: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_BL: Tensor | None = None,
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        self._stack, self._keep_bytes = stack, keep_bytes
        with torch.no_grad():
            if attention_mask is not None and attention_mask.dim() == 3:
                assert position_BL is not None, "a mask of pairs comes with positions"
                self._start = embed_masked(stack, token_BL, attention_mask, position_BL)
            else:
                self._start = stack.embed(token_BL, attention_mask, position_BL=position_BL)
        self._kept: OrderedDict[Steps, tuple[Tensor, Any]] = OrderedDict()
        self._bytes = 0
        self.blocks = 0
        self.naive = 0

    @torch.no_grad()
    def hidden(self, path: Steps) -> tuple[Tensor, Any]:
        """(x_BLD behind the last block of ``path``, the state of that pass)."""
        self.naive += len(path)
        done, (x_BLD, state) = self._longest(path)
        for place in range(done, len(path)):
            # The one it came from may lead on along other paths.
            state = self._stack.fork(state)
            x_BLD = self._stack.block(path[place], x_BLD, state)
            self.blocks += 1
            self._keep(path[: place + 1], x_BLD, state)
        return x_BLD, state

    @torch.no_grad()
    def logits(self, path: Steps, *, last_only: bool = False) -> Tensor:
        """``[B, L, V]``, or of the last position alone ``[B, 1, V]``. Raises NotFiniteError where the model gives NaN."""
        x_BLD, state = self.hidden(path)
        logits_BLV = self._stack.head(x_BLD, self._stack.fork(state), last_only=last_only)
        return _finite(logits_BLV, path)

    def _longest(self, path: Steps) -> tuple[int, tuple[Tensor, Any]]:
        for done in range(len(path), 0, -1):
            found = self._kept.get(path[:done])
            if found is not None:
                self._kept.move_to_end(path[:done])
                return done, found
        return 0, self._start

    def _keep(self, prefix: Steps, x_BLD: Tensor, state: Any) -> None:
        if x_BLD.nbytes > self._keep_bytes:
            return
        self._kept[prefix] = (x_BLD, state)
        self._bytes += x_BLD.nbytes
        while self._bytes > self._keep_bytes:
            _, (dropped_BLD, _) = self._kept.popitem(last=False)
            self._bytes -= dropped_BLD.nbytes


class QuestionRuns:
    """Runs of the inputs that a reward asks for while one question is searched; each input has a `PathRunner`.

    Args:
        stack: of the model.
        keep_bytes: of states, of each input.
    """

    def __init__(self, stack: BlockStack, keep_bytes: int = KEEP_BYTES) -> None:
        self.stack, self._keep_bytes = stack, keep_bytes
        self._runners: dict[Any, PathRunner] = {}
        self._decoded = 0

    @property
    def blocks(self) -> int:
        """Block passes made so far."""
        return self._decoded + sum(runner.blocks for runner in self._runners.values())

    @property
    def naive(self) -> int:
        """Block passes that running each path from the start would have taken."""
        return self._decoded + sum(runner.naive for runner in self._runners.values())

    def on(self, path: Steps) -> "PathRun":
        """What a reward is given for ``path``."""
        return PathRun(self, path)

    def runner(self, rows: Sequence[Sequence[int]], mask_BLL: Tensor | None, position_BL: Tensor | None) -> PathRunner:
        """That of some rows of tokens."""
        key = (tuple(map(tuple, rows)), None if mask_BLL is None else mask_BLL.cpu().numpy().tobytes())
        if key not in self._runners:
            token_BL, mask_BL = padded(rows, self.stack.device)
            self._runners[key] = PathRunner(
                self.stack,
                token_BL,
                attention_mask=mask_BL if mask_BLL is None else mask_BLL,
                position_BL=position_BL,
                keep_bytes=self._keep_bytes,
            )
        return self._runners[key]

    def count(self, blocks: int) -> None:
        """Block passes that no prefix helps."""
        self._decoded += blocks


class PathRun:
    """The model on one path, for rewards.

    Attributes:
        stack: the model.
        path: blocks, in order.
    """

    def __init__(self, runs: QuestionRuns, path: Steps) -> None:
        self._runs, self.path = runs, path

    @property
    def stack(self) -> BlockStack:
        """The model."""
        return self._runs.stack

    def logits(
        self,
        rows: Sequence[Sequence[int]],
        *,
        attention_mask: Tensor | None = None,
        position_BL: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """``[B, L, V]`` of rows of tokens, of which shorter ones stand on the left; with ``last_only`` they must be equally long.

        Args:
            rows: tokens.
            attention_mask: bool ``[B, L, L]``, who sees whom; None for causal.
            position_BL: places of the tokens; None for one after the other.
            last_only: of the last position alone.

        Raises NotFiniteError where the model gives NaN.
        """
        if last_only and len({len(row) for row in rows}) > 1:
            raise ConfigError("last_only is of rows that are equally long")
        return self._runs.runner(rows, attention_mask, position_BL).logits(self.path, last_only=last_only)

    @torch.no_grad()
    def generate(self, prompt: Sequence[int], max_tokens: int, stop: Sequence[int] = ()) -> list[int]:
        """The likeliest tokens after ``prompt``, one by one, up to one of ``stop``, which is left out."""
        stack, path = self.stack, self.path
        cache = stack.new_cache(len(prompt) + max_tokens)
        given, said = list(prompt), list[int]()
        while len(said) < max_tokens:
            token_BL = torch.tensor([given], device=stack.device)
            logits_BLV = _finite(run_path(stack, token_BL, path, cache=cache, last_only=True), path)
            self._runs.count(len(path))
            token = int(logits_BLV[0, -1].argmax())
            if token in stop:
                break
            said.append(token)
            given = [token]
        return said


def padded(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor | None]:
    """(token_BL, mask_BL or None where all are equally long), shorter rows on the left."""
    longest = max(map(len, rows))
    token_BL = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask_BL = torch.zeros(len(rows), longest, dtype=torch.bool)
    for place, row in enumerate(rows):
        token_BL[place, : len(row)] = torch.tensor(list(row), dtype=torch.int64)
        mask_BL[place, : len(row)] = True
    return token_BL.to(device), None if bool(mask_BL.all()) else mask_BL.to(device)


def _finite(logits_BLV: Tensor, path: Steps) -> Tensor:
    if not bool(torch.isfinite(logits_BLV).all()):
        told = ",".join(map(str, path))
        raise NotFiniteError(
            f"the model gives NaN or infinite logits on path {told or 'of no block'}; check its weights and dtype"
        )
    return logits_BLV
