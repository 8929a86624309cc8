"""`Skips`: requests whose prompts blocks pass over in parts, as a skipper of tokens decides (FTP, `anabranch.depth.ftp`).

What a block computes of a request is decided by its prompt alone and once, so whoever is with it in a step changes nothing, and a request
that is computed again after it was preempted computes the same.
"""
# Shapes: I blocks, N tokens of a prompt, R of them that a block computes, S whose keys its queries see

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.errors import ConfigError, InputError
from anabranch.lm.decoder import Decoder
from anabranch.serving.core.request import Request

__all__ = ["Choosing", "Kept", "Skips", "check_skips", "skipper_of", "stores_of"]


@dataclass(frozen=True)
class Kept:
    """What blocks compute of one request.

    Attributes:
        keep_IN: bool: of each block, which tokens of the prompt.
        goes_I: bool: of each block, whether tokens behind the prompt go through it.
        stores_I: bool: of each block, whether it keeps keys and values of all tokens of the prompt, also of those that it passes over.
    """

    keep_IN: NDArray[np.bool_]
    goes_I: NDArray[np.bool_]
    stores_I: NDArray[np.bool_]

    @cached_property
    def _stored_IN(self) -> NDArray[np.bool_]:
        """Of each block, of which tokens of the prompt it keeps keys and values."""
        return self.keep_IN | self.stores_I[:, None]

    @cached_property
    def _before_IM(self) -> NDArray[np.int64]:
        """Of each block and each number of tokens of the prompt, of how many of these it keeps keys and values."""
        zero_I1 = np.zeros((len(self.keep_IN), 1), np.int64)
        return np.concatenate((zero_I1, self._stored_IN.cumsum(1, dtype=np.int64)), axis=1)

    @property
    def num_prompt(self) -> int:
        """N."""
        return self.keep_IN.shape[1]

    def stored(self, layer: int, position: int) -> int:
        """How much the block has stored before this position."""
        return int(self.stored_I(position)[layer])

    def stored_I(self, position: int) -> NDArray[np.int64]:
        """The same of each block."""
        behind = max(position - self.num_prompt, 0) * self.goes_I
        return self._before_IM[:, min(position, self.num_prompt)] + behind

    def places(self, layer: int, start: int, count: int) -> NDArray[np.int64]:
        """Which of ``count`` tokens from position ``start`` on the block computes, counted from the first of them."""
        of_prompt = np.flatnonzero(self.keep_IN[layer, start : start + count])
        if not self.goes_I[layer]:
            return of_prompt
        return np.concatenate((of_prompt, np.arange(max(self.num_prompt - start, 0), count)))

    def passed(self, layer: int, start: int, count: int) -> NDArray[np.int64]:
        """The `places` of those of which the block makes keys and values alone."""
        return np.flatnonzero(
            self._stored_IN[layer, start : start + count] & ~self.keep_IN[layer, start : start + count]
        )

    def positions(self, layer: int, end: int) -> NDArray[np.int64]:
        """Those of all that the block has stored before position ``end``."""
        of_prompt = np.flatnonzero(self._stored_IN[layer, :end])
        if not self.goes_I[layer]:
            return of_prompt
        return np.concatenate((of_prompt, np.arange(self.num_prompt, max(end, self.num_prompt))))

    @property
    def computed(self) -> tuple[int, ...]:
        """Of each block, how many tokens of the prompt."""
        return tuple(self.keep_IN.sum(1).tolist())

    @property
    def path(self) -> tuple[int, ...]:
        """The blocks of tokens behind the prompt."""
        return tuple(np.flatnonzero(self.goes_I).tolist())


class Choosing:
    """The decisions on one prompt, block by block, as it goes through the model.

    Args:
        skipper: an `anabranch.depth.ftp.TokenSkipper`.
        length: N, of the prompt.
        device: of what it is shown.
    """

    def __init__(self, skipper: Any, length: int, device: torch.device) -> None:
        from anabranch.depth.ftp.features import ScoreTable

        self._goes_I, self._stores_I = np.array(skipper.decodes_by), stores_of(skipper)
        self._own_only = skipper.factors.causal
        self._decider = skipper.decider(torch.ones(1, length, dtype=torch.bool, device=device))
        self._table = ScoreTable()
        self._position_1N = torch.arange(length, device=device).unsqueeze(0)
        self._keep: list[Tensor] = []

    def decide(self, layer: int, x_1ND: Tensor | None) -> NDArray[np.int64]:
        """The tokens that the next block computes, given what goes into it; routers by place look at nothing."""
        assert layer == len(self._keep), "blocks are decided about in order"
        keep_1N = self._decider(layer, x_1ND, self._table)
        self._keep.append(keep_1N[0])
        return np.flatnonzero(keep_1N[0].cpu().numpy())

    def stores(self, layer: int) -> bool:
        """See `Kept.stores_I`."""
        return bool(self._stores_I[layer])

    def passed(self, layer: int) -> NDArray[np.int64]:
        """The tokens of which the block makes keys and values alone."""
        keep_N = self._keep[layer].cpu().numpy()
        return np.flatnonzero(~keep_N) if self._stores_I[layer] else np.zeros(0, np.int64)

    def wants_scores(self, layer: int) -> bool:
        """Whether what the block's tokens attend to is to be `looked` at."""
        return bool(self._keep[layer].any()) and self._decider.wants_scores(layer)

    def looked(
        self, layer: int, query_1HRD: Tensor, key_1GRD: Tensor, looks: Any, passed_1GSD: Tensor | None = None
    ) -> None:
        """Take in the queries and keys of the tokens that the block computed, and keys of those that it `passed`; None for none."""
        from anabranch.depth.ftp.attention_scores import column_means

        keep_1N = self._keep[layer].unsqueeze(0)
        place_1R = self._position_1N[keep_1N].unsqueeze(0)
        place_1S, key_1GSD = place_1R, key_1GRD
        if passed_1GSD is not None:
            # As a skipper has them: first those that are passed over.
            place_1S = torch.cat((self._position_1N[~keep_1N].unsqueeze(0), place_1R), dim=1)
            key_1GSD = torch.cat((passed_1GSD, key_1GRD), dim=2)
        score_1S = column_means(
            query_1HRD, key_1GSD, looks, query_position_BQ=place_1R, key_position_BS=place_1S, own_only=self._own_only
        )
        score_1R = score_1S[:, -place_1R.shape[1] :]
        score_1N = torch.zeros(keep_1N.shape, device=score_1R.device).scatter(1, place_1R, score_1R)
        self._table.update(score_1N, keep_1N)

    def kept(self) -> Kept:
        """All decisions."""
        return Kept(torch.stack(self._keep).cpu().numpy(), self._goes_I, self._stores_I)


@dataclass
class Skips:
    """A skipper, and what it has decided about requests under way.

    Attributes:
        skipper: an `anabranch.depth.ftp.TokenSkipper` of the model.
        device: where the model is.
    """

    skipper: Any
    device: torch.device
    # Prompts of requests that are not decided about yet; of the others what was; and of whom nobody has been told that.
    _waiting: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _kept: dict[str, Kept] = field(default_factory=dict)
    _untold: set[str] = field(default_factory=set)
    # Of requests that come from another process.
    _handed: dict[str, tuple[Kept, bool]] = field(default_factory=dict)

    def handed_over(self) -> dict[str, tuple[Kept, bool]]:
        """By request what was decided, and whether somebody is still to be told that: for who goes on with what is stored of them."""
        return {id: (kept, id in self._untold) for id, kept in self._kept.items()}

    def take_over(self, handed: Mapping[str, Any]) -> None:
        """What another has `handed_over`, before its requests are added; what is said of requests that are not pruned is let be."""
        self._handed = dict(handed)

    def add(self, request: Request) -> None:
        """A request that begins, or goes on here."""
        if not request.skips_tokens:
            return
        if (handed := self._handed.pop(request.id, None)) is not None:
            self._kept[request.id], is_untold = handed
            self._untold |= {request.id} if is_untold else set()
            return
        self._untold.add(request.id)
        length, layers = len(request.prompt), len(self.skipper.schedule)
        if length == 1:
            # Which is never pruned.
            keep_I1 = np.ones((layers, 1), np.bool_)
            self._kept[request.id] = Kept(keep_I1, np.array(self.skipper.decodes_by), stores_of(self.skipper))
        elif isinstance(self.skipper.router, str):
            choosing = Choosing(self.skipper, length, self.device)
            for layer in range(layers):
                choosing.decide(layer, None)
            self._kept[request.id] = choosing.kept()
        else:
            self._waiting[request.id] = request.prompt

    def forget(self, id: str) -> None:
        """One that has ended."""
        self._waiting.pop(id, None)
        self._kept.pop(id, None)
        self._handed.pop(id, None)
        self._untold.discard(id)

    def prompt_of(self, id: str) -> tuple[int, ...] | None:
        """The prompt of a request that waits for its decision; None for any other."""
        return self._waiting.get(id)

    def kept(self, id: str) -> Kept:
        """What was decided about a request."""
        return self._kept[id]

    def choosing(self, id: str) -> Choosing:
        """Decisions on the prompt of a request that waits, which then are `chosen`."""
        return Choosing(self.skipper, len(self._waiting[id]), self.device)

    def chosen(self, id: str, kept: Kept) -> None:
        """It waits no more."""
        del self._waiting[id]
        self._kept[id] = kept

    def take_untold(self, id: str) -> Kept | None:
        """What was decided about a request, once."""
        if id not in self._untold or id not in self._kept:
            return None
        self._untold.discard(id)
        return self._kept[id]


def stores_of(skipper: Any) -> NDArray[np.bool_]:
    """Of each block, whether keys and values of tokens that it passes over are made all the same; never of one that is not there at all."""
    return np.array([skipper.kv == "keep" and sparsity < 1 for sparsity in skipper.schedule])


def check_skips(request: Request, skips: object | None) -> None:
    """Raise InputError for a request that wants its prompt pruned where that cannot be, as ``skips`` is None, or says what does not go
    with it."""
    if not request.skips_tokens:
        return
    if skips is None:
        raise InputError("skips_tokens is set, and the engine has no skipper of tokens (engine.depth.skipper)")
    others = {
        "routes_depth": request.routes_depth,
        "path": request.path is not None,
        "record_routing": request.record_routing,
        "prompt_logprobs": request.sampling.prompt_logprobs is not None,
        "pooling": request.pooling is not None,
    }
    why = {
        "record_routing": "experts of tokens that blocks pass over are not told",
        "prompt_logprobs": "tokens of a pruned prompt are decided about by later ones, so their likelihood would leak these",
        "pooling": "vectors are of whole texts",
    }
    for name, is_set in others.items():
        if is_set:
            raise InputError(
                f"skips_tokens is set, and so is {name}: {why.get(name, 'both say what runs')}; leave one of them out"
            )


def skipper_of(model: Decoder, skipper: Any) -> Any:
    """A skipper of tokens, or that in a file, held against the model; None stays None.

    Raises CheckpointError where the file has none, or that of another model; ConfigError for a loaded one of another model.
    """
    if skipper is None:
        return None
    from anabranch.depth.ftp.skipper import TokenSkipper

    if not isinstance(skipper, TokenSkipper):
        skipper = TokenSkipper.load(skipper, model)
    if skipper.stack.module is not model:
        raise ConfigError("the skipper of tokens is of another model than the engine's")
    return skipper
