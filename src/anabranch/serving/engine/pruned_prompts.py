"""`PrunedPrompts`: when a skipper decides what blocks compute of a prompt, and what becomes of prompts that come in pieces.

It decides about a whole prompt at once (`anabranch.serving.engine.skips`). One that comes in pieces runs whole before its first piece; the
pieces take what was computed then.
"""
# Shapes: R rows of a step, D width

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from anabranch.serving.core.batch import Chunk
from anabranch.serving.engine.pruned import Ahead, PrunedPasses
from anabranch.serving.engine.skips import Skips
from anabranch.serving.engine.under_way import UnderWay
from anabranch.serving.engine.ways import Ways

__all__ = ["PrunedPrompts"]


class PrunedPrompts:
    """Has requests run whose blocks pass over tokens.

    Args:
        skips: the skipper.
        requests: that the runner has.
        ways: how they run the model.
        passes: what runs them.

    Attributes:
        ahead: prompts that ran before their pieces were due, by id.
    """

    def __init__(self, skips: Skips, requests: UnderWay, ways: Ways, passes: PrunedPasses) -> None:
        self._skips, self._requests, self._ways, self.passes = skips, requests, ways, passes
        self.ahead: dict[str, Ahead] = {}

    def forget(self, id: str) -> None:
        """A request is gone."""
        self.ahead.pop(id, None)

    def look_ahead(self, chunk: Chunk) -> None:
        """Run a prompt that comes in pieces whole, before its first piece: what blocks pass over depends on all of it.

        So, too, one that comes with tokens that the request was given elsewhere: what blocks pass over does not depend on them.
        """
        prompt = self._skips.prompt_of(chunk.id)
        if prompt is None or len(chunk.tokens) == len(prompt):
            return
        whole = replace(chunk, tokens=prompt, start=0)
        ahead = self.passes.ahead(whole, self._skips.choosing(chunk.id), is_compiled=self._is_compiled(chunk))
        self._skips.chosen(chunk.id, ahead.kept)
        if self._ways.is_watched or self.ahead:
            # Recorders inside the model are told of tokens where their pieces run, so these run again; and what was computed is kept for
            # one prompt at a time, which is what memory is planned for.
            self._requests.variants.decided(chunk.id)
        else:
            self.ahead[chunk.id] = ahead

    def hidden(self, chunks: Sequence[Chunk], tokens: Sequence[int], rows: Sequence[int]) -> Tensor:
        """x_RD of ``rows`` after the last norm, of chunks of which each block computes some tokens."""
        first, skips = chunks[0], self._skips
        is_compiled = self._is_compiled(first)
        if skips.prompt_of(first.id) is not None:
            # Alone, as its variant says.
            choosing = skips.choosing(first.id)
            x_RD, kept = self.passes.chosen(first, tokens, rows, choosing, is_compiled=is_compiled)
            skips.chosen(first.id, kept)
            self._requests.variants.decided(first.id)
            return x_RD
        # Alone, too, as long as there is something.
        if (ahead := self._taken_ahead(first)) is not None:
            return self.passes.take(first, rows, ahead)
        kept_N = [skips.kept(chunk.id) for chunk in chunks]
        return self.passes.hidden(chunks, tokens, rows, kept_N, is_compiled=is_compiled)

    def _is_compiled(self, chunk: Chunk) -> bool:
        """Whether a request runs by compiled blocks."""
        return self._ways.compiled() is not None and not self._ways.of(chunk).is_adapted

    def _taken_ahead(self, chunk: Chunk) -> Ahead | None:
        """What ran ahead of a piece of a prompt; None where it did not, or where the piece goes on behind the prompt."""
        ahead, end = self.ahead.get(chunk.id), chunk.start + len(chunk.tokens)
        if ahead is None or self._ways.is_watched:
            return None
        if end >= ahead.kept.num_prompt:
            del self.ahead[chunk.id]
            self._requests.variants.decided(chunk.id)
        return ahead if end <= ahead.kept.num_prompt else None
