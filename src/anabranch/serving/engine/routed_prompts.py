"""`RoutedPrompts`: passes of prompts whose blocks depth routers choose on the way, once (`anabranch.serving.engine.depths`)."""
# Shapes: L tokens of a prompt, T tokens of a step, R rows of it, D width

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from anabranch.nn.context import ForwardContext
from anabranch.serving.core.batch import Chunk
from anabranch.serving.engine.any_path import AnyPath, RunBlock
from anabranch.serving.engine.depths import Depths
from anabranch.serving.engine.module_passes import ModulePasses
from anabranch.serving.engine.under_way import UnderWay
from anabranch.serving.engine.ways import Ways

__all__ = ["RoutedPrompts"]


class RoutedPrompts:
    """Runs them, each alone.

    Args:
        depths: the routers.
        requests: that the runner has.
        ways: how they run the model.
        modules: passes through its modules.
        any_path: and by compiled blocks, where these can be told apart.
    """

    def __init__(
        self, depths: Depths, requests: UnderWay, ways: Ways, modules: ModulePasses, any_path: AnyPath
    ) -> None:
        self._depths, self._requests, self._ways = depths, requests, ways
        self._modules, self._any_path = modules, any_path

    def look_ahead(self, chunk: Chunk) -> None:
        """Choose for a prompt that comes in pieces, before its first piece runs: routers see all of it, and nothing behind it."""
        prompt = self._depths.prompt_behind(chunk)
        if prompt is None:
            return
        model, device = self._modules.model, self._modules.device
        whole, token_1L = replace(chunk, tokens=prompt, start=0), torch.tensor([prompt], device=device)
        # Whoever records is told of the prompt when it runs for its own sake.
        seen = {"repeated_N": torch.ones(len(prompt), dtype=torch.bool, device=device)}
        context = model.context(token_1L, state=seen)
        with self._modules.running([whole], context):
            self._choose(chunk.id, model.embed(token_1L), self._block_of(context))

    def hidden(self, chunk: Chunk, tokens: Sequence[int], rows: Sequence[int]) -> Tensor:
        """x_RD of ``rows`` of a whole prompt after the last norm, along the path that routers choose on the way."""
        is_plain = not self._ways.of(chunk).is_adapted and chunk.id not in self._requests.recorded
        if is_plain and self._ways.compiled() is not None and self._any_path.takes(is_compiled=True):
            return self._any_path.chosen(chunk, tokens, rows, partial(self._choose, chunk.id))
        model = self._modules.model
        token_1T, context = self._modules.begin([chunk], tokens)
        with self._modules.running([chunk], context):
            x_1TD = self._choose(chunk.id, model.embed(token_1T), self._block_of(context))
            return model.norm(x_1TD[:, list(rows)])[0]

    def _block_of(self, context: ForwardContext) -> RunBlock:
        """What runs a block on the one sequence of ``context``."""
        return lambda layer, x_1LD, _: self._modules.model.blocks[layer](x_1LD, context)

    def _choose(self, id: str, x_1LD: Tensor, run: RunBlock) -> Tensor:
        """x_1LD behind the last block of the path that routers choose, which is the request's from now on."""
        x_1LD, path = self._depths.choose(id, x_1LD, run)
        self._requests.variants.chosen(id, path)
        return x_1LD
