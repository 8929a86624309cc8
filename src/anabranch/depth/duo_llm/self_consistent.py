"""The self-consistent oracle: left to right, every route is tried for a token whose past keeps the routes chosen for it.

All prefixes of routes of one token run side by side, as if they were positions of a sequence: each sees the keys and values that
earlier tokens left on their chosen routes, and its own, which the attention mask says. So the model's own attention is used as it is.
"""
# Shapes: B sequences, L positions, R prefixes, H heads, D width, Y duo layers

from collections.abc import Sequence

import torch
from torch import Tensor

from anabranch.depth.duo_llm.layer import DuoFFN
from anabranch.depth.duo_llm.results import Minima, token_losses
from anabranch.depth.duo_llm.routes import RouteSpace, Walk, blocks_of
from anabranch.nn.context import ForwardContext


class _Past:
    """Keys and values that the chosen routes left behind, by block, and those of the prefixes under way (a `KeyValueStore`)."""

    def __init__(self, num_blocks: int) -> None:
        self.chosen: list[tuple[Tensor, Tensor] | None] = [None] * num_blocks
        self.tried: list[tuple[Tensor, Tensor] | None] = [None] * num_blocks

    def append(
        self, layer: int, key_BHRD: Tensor, value_BHRD: Tensor, *, visit: int = 0, rows: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, None]:
        self.tried[layer] = key_BHRD, value_BHRD
        past = self.chosen[layer]
        if past is None:
            return key_BHRD, value_BHRD, None
        return torch.cat((past[0], key_BHRD), dim=2), torch.cat((past[1], value_BHRD), dim=2), None

    def choose(self, layer: int, place_B: Tensor) -> None:
        """Keep the prefix ``place_B`` of each sequence."""
        tried = self.tried[layer]
        assert tried is not None
        row_B = torch.arange(place_B.numel(), device=place_B.device)
        key, value = (tensor[row_B, :, place_B].unsqueeze(2) for tensor in tried)
        past = self.chosen[layer]
        self.chosen[layer] = (
            (key, value) if past is None else (torch.cat((past[0], key), 2), torch.cat((past[1], value), 2))
        )


class _Prefixes:
    """The prefixes of one token at one depth: their codes, and for each block so far which prefix each came through."""

    def __init__(self, space: RouteSpace) -> None:
        self.space = space
        self.codes = [0]
        self.depth = 0
        # Per block: place of each prefix's ancestor in that block's attention.
        self.places: list[list[int]] = []

    def enter(self) -> None:
        """A block's attention sees the prefixes as they are."""
        self.places.append(list(range(len(self.codes))))

    def split(self) -> tuple[list[int], list[int]]:
        """Go one duo layer deeper; for each new prefix its parent and its option."""
        parents, digits, codes = [], [], []
        for place, code in enumerate(self.codes):
            for digit in range(len(self.space.options)):
                longer = code | digit << (self.space.bits * self.depth)
                if self.space.allows(self.depth + 1, longer):
                    parents.append(place)
                    digits.append(digit)
                    codes.append(longer)
        self.codes, self.depth = codes, self.depth + 1
        self.places = [[places[parent] for parent in parents] for places in self.places]
        return parents, digits


def run_self_consistent(walk: Walk, token_BL: Tensor, target_BL: Tensor) -> Minima:
    """Minima of one chunk, one budget after the other, since each budget has a past of its own."""
    space = walk.space
    minima = Minima(space, target_BL)
    for row, budget in enumerate([None] if space.budgets is None else space.budgets):
        one = RouteSpace(space.num_layers, space.options, None if budget is None else (budget,))
        past = _Past(len(walk.model.blocks))
        context = walk.model.context(token_BL)
        for position in range(token_BL.shape[1]):
            loss_B, code_B = _step(walk, one, past, context, token_BL, target_BL, position)
            minima.loss_GBL[row, :, position] = loss_B
            minima.code_GBL[row, :, position] = code_B
    return minima


def _step(
    walk: Walk,
    space: RouteSpace,
    past: _Past,
    sequence: ForwardContext,
    token_BL: Tensor,
    target_BL: Tensor,
    position: int,
) -> tuple[Tensor, Tensor]:
    """(loss_B, code_B) of the best route of the token at ``position``; its keys and values join the past."""
    model, prefixes = walk.model, _Prefixes(space)
    token_B1 = token_BL[:, position : position + 1]
    rotary = sequence.rotary[0][:, :, position : position + 1], sequence.rotary[1][:, :, position : position + 1]

    def of_prefixes(num_prefixes: int) -> ForwardContext:
        return ForwardContext(
            position_BL=sequence.position_BL[:, position : position + 1].expand(-1, num_prefixes),
            # All prefixes stand at one position.
            rotary=rotary,
            attention_mask=_mask(num_prefixes, position, token_BL.device),
            is_causal=False,
            cache=past,
            token_BL=token_B1.expand(-1, num_prefixes),
        )

    x_BRD = model.embed(token_B1)
    for block in blocks_of(model):
        context = of_prefixes(x_BRD.shape[1])
        prefixes.enter()
        feed_forward = block.feed_forward
        if not isinstance(feed_forward, DuoFFN):
            x_BRD = block(x_BRD, context)
            continue
        x_BRD = x_BRD + block.attention(block.attention_norm(x_BRD), context)
        normed_BRD = block.feed_forward_norm(x_BRD)
        done = [feed_forward.option(normed_BRD, option, context) for option in space.options]
        added = torch.stack([torch.zeros_like(x_BRD) if y_BRD is None else y_BRD for y_BRD in done])
        parents, digits = prefixes.split()
        x_BRD = x_BRD[:, parents] + added[digits, :, parents].transpose(0, 1)
        walk.layer_passes += len(parents)
    logits_BRV = model.logits(model.norm(x_BRD), of_prefixes(x_BRD.shape[1]))
    target_BR = target_BL[:, position : position + 1].expand(-1, x_BRD.shape[1])
    loss_B, place_B = token_losses(logits_BRV, [target_BR])[0].min(dim=1)
    walk.routes += len(prefixes.codes)
    for layer, places in enumerate(prefixes.places):
        past.choose(layer, torch.tensor(places, device=place_B.device)[place_B])
    return loss_B, torch.tensor(prefixes.codes, device=place_B.device)[place_B]


def _mask(num_prefixes: int, past: int, device: torch.device) -> Tensor:
    """bool ``[1, 1, R, past + R]``: a prefix sees what was before, and itself."""
    before = torch.ones(num_prefixes, past, dtype=torch.bool, device=device)
    return torch.cat((before, torch.eye(num_prefixes, dtype=torch.bool, device=device)), dim=1)[None, None]
