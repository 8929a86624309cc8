"""`ModulePaths`: requests that run blocks in an order of their own, side by side through the modules of a model."""
# Shapes: T tokens of a step, R rows of it, D width

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anabranch.lm.decoder import Decoder
from anabranch.nn.block import PreNorm, Sandwich
from anabranch.nn.context import ForwardContext
from anabranch.serving.core.batch import Chunk
from anabranch.serving.engine.layout import StepLayout
from anabranch.serving.engine.paged import ToldSlot
from anabranch.serving.engine.steady import steady
from anabranch.serving.fast.paths import Visits, schedule_of

__all__ = ["ModulePaths"]


@dataclass(frozen=True)
class _Part:
    """Some chunks of a step: their rows (None for all), and what the model is told of them."""

    row_R: Tensor | None
    told: ToldSlot
    context: ForwardContext


class ModulePaths:
    """Runs steps over any blocks, of a model whose blocks hand nothing to others beside their output.

    Args:
        model: the model, which it `supports`.
        block_tokens: of the pool.
        context_of: ``(layout, token_1T, chunks, told)`` to the context of a pass by these chunks.
        is_steady: see `anabranch.serving.engine.steady`.
    """

    @staticmethod
    def supports(model: Decoder) -> bool:
        """Plain blocks of attention and a dense feed-forward layer, in one stream: nothing in them routes, or is carried on."""
        config = model.config
        is_dense = not any(config.feed_forward_of(layer).is_routed for layer in range(config.num_layers))
        is_known = all(type(block) in (PreNorm, Sandwich) for block in model.blocks)
        return model.streams is None and is_known and is_dense and not config.linears

    def __init__(
        self,
        model: Decoder,
        block_tokens: int,
        context_of: Callable[[StepLayout, Tensor, Sequence[Chunk], ToldSlot], ForwardContext],
        *,
        is_steady: bool = False,
    ) -> None:
        self._model, self._block_tokens, self._context_of = model, block_tokens, context_of
        self._is_steady = is_steady

    def hidden(
        self, chunks: Sequence[Chunk], tokens: Sequence[int], rows: Sequence[int], visits_N: Sequence[Visits]
    ) -> Tensor:
        """x_RD of ``rows``, after the last norm: each chunk along its visits; those that share one run it together."""
        with steady(self._model) if self._is_steady else nullcontext():
            return self._run(chunks, tokens, rows, visits_N)

    def _run(
        self, chunks: Sequence[Chunk], tokens: Sequence[int], rows: Sequence[int], visits_N: Sequence[Visits]
    ) -> Tensor:
        model = self._model
        device = model.embedding.weight.device
        token_1T = torch.tensor([tokens], dtype=torch.int64, device=device)
        x_1TD = model.embed(token_1T)
        parts: dict[tuple[int, ...] | None, _Part] = {}
        for visits, numbers in schedule_of(tuple(visits_N)):
            if numbers not in parts:
                parts[numbers] = self._part(chunks, token_1T, numbers)
            part = parts[numbers]
            x_1RD = x_1TD if part.row_R is None else x_1TD[:, part.row_R]
            for layer, slot in visits:
                part.told.tell(slot)
                x_1RD = model.blocks[layer](x_1RD, part.context)
            x_1TD = x_1RD if part.row_R is None else x_1TD.index_copy(1, part.row_R, x_1RD)
        return model.norm(x_1TD[:, torch.tensor(rows, dtype=torch.int64, device=device)])[0]

    def _part(self, chunks: Sequence[Chunk], token_1T: Tensor, numbers: tuple[int, ...] | None) -> _Part:
        own, row_R = list(chunks), None
        if numbers is not None:
            ends = np.cumsum([len(chunk.tokens) for chunk in chunks])
            rows = [np.arange(ends[number] - len(chunks[number].tokens), ends[number]) for number in numbers]
            row_R = torch.from_numpy(np.concatenate(rows)).to(token_1T.device)
            own, token_1T = [chunks[number] for number in numbers], token_1T[:, row_R]
        told = ToldSlot()
        layout = StepLayout(own, self._block_tokens, token_1T.device)
        return _Part(row_R, told, self._context_of(layout, token_1T, own, told))
