"""`TokenSkipper`: a frozen model whose blocks pass over tokens of a prompt, and which then decodes on.

    prefilled = TokenSkipper(model, schedule, router).prefill(ids)
    logits_BCV = skipper.decode(next_ids, prefilled)

A token that is decoded goes through the blocks that pass over at most half of a prompt. Each block's cache holds the tokens that it has
computed, so cached decoding gives what one pass without a cache gives.
"""
# Shapes: B prompts, L positions, C new positions, I blocks, D width, V vocabulary

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.depth.ftp.cache import BlockCache, SkipCache
from anabranch.depth.ftp.decider import ByPlace, Decider, Schedule
from anabranch.depth.ftp.features import FactorConfig
from anabranch.depth.ftp.items import check_tokens
from anabranch.depth.ftp.passes import Kept, Meter, Tokens, run_blocks
from anabranch.depth.ftp.report import SkipReport, report_of
from anabranch.depth.ftp.router import Mode, TokenRouter
from anabranch.depth.ftp.saving import Stored, read_skipper, write_skipper
from anabranch.depth.ftp.schedule import check_schedule
from anabranch.depth.ftp.static import places_of
from anabranch.depth.ftp.training import DECODE_LIMIT
from anabranch.depth.gathered import gathered
from anabranch.depth.seen import check_mask
from anabranch.depth.stack import BlockStack, stack_of
from anabranch.errors import CheckpointError, ConfigError, InputError
from anabranch.lm.generate import evaluating
from anabranch.routing import Routing, RoutingTrace, TraceBuilder, TraceLayer

__all__ = ["Prefilled", "TokenSkipper"]

_MODES, _KEPT, _BY_PLACE = ("topk", "threshold"), ("drop", "keep"), ("static", "random")


@dataclass
class Prefilled:
    """A pruned prompt.

    Attributes:
        logits_BV: of the token behind each prompt.
        cache: of each block, to decode on.
        report: what was done.
        keep_IBL: what each block computed.
        real_BL: False at padding.
        token_BL: the prompts.
    """

    logits_BV: Tensor
    cache: SkipCache
    report: SkipReport
    keep_IBL: Tensor
    real_BL: Tensor
    token_BL: Tensor


class TokenSkipper:
    """A model with a schedule and a router.

    Args:
        model: or its stack (`anabranch.depth.stack.stack_of`). Nothing in it is copied or changed.
        schedule: the sparsity of each block, from 0 to 1; a block with 1 does not run at all.
        router: that learned, or by place: ``static`` (the first token and the latest), ``random`` (a control). With one that learned the
            first block passes over nothing, whatever the schedule says, since there is no attention to look at before it.
        mode: ``topk`` computes exactly ceil((1 - s) N) tokens, ``threshold`` those that the router wants; of a router that learned.
        kv: ``drop``: tokens that are passed over are seen by nobody in that block; ``keep``: their keys and values are made all the same.
        one_pass: a router that learned decides about all blocks behind the first one.
        factors: constants of what the router looks at.
        seed: of ``random``.

    Raises ConfigError (a ValueError) for a schedule of another length, or a setting that there is not.
    """

    def __init__(
        self,
        model: Any,
        schedule: Sequence[float],
        router: TokenRouter | ByPlace = "static",
        *,
        mode: Mode = "topk",
        kv: Kept = "drop",
        one_pass: bool = False,
        factors: FactorConfig | None = None,
        seed: int = 0,
    ) -> None:
        for name, value, allowed in (("mode", mode, _MODES), ("kv", kv, _KEPT)):
            if value not in allowed:
                raise ConfigError(f"{name} is {value!r}; it must be {' or '.join(map(repr, allowed))}")
        if not isinstance(router, TokenRouter) and router not in _BY_PLACE:
            raise ConfigError(f"router is {router!r}; it must be a TokenRouter, 'static' or 'random'")
        self.stack: BlockStack = stack_of(model)
        self.blocks = gathered(self.stack)
        checked = check_schedule(schedule, self.stack.num_blocks)
        if isinstance(router, TokenRouter):
            checked = (0.0, *checked[1:])
            if router.config.dim not in (None, self.stack.width):
                raise ConfigError(
                    f"the router looks at states of width {router.config.dim}; the model's is {self.stack.width}"
                )
        self.schedule: Schedule = checked
        self.router, self.mode, self.kv, self.one_pass = router, mode, kv, one_pass
        self.factors, self.seed = factors or FactorConfig(), seed

    def with_schedule(self, schedule: Sequence[float]) -> "TokenSkipper":
        """The same with another schedule."""
        return self.changed(schedule=schedule)

    def changed(self, **changes: Any) -> "TokenSkipper":
        """The same with other arguments of the constructor."""
        now = {
            "schedule": self.schedule,
            "router": self.router,
            "mode": self.mode,
            "kv": self.kv,
            "one_pass": self.one_pass,
            "factors": self.factors,
            "seed": self.seed,
            **changes,
        }
        return TokenSkipper(self.stack, **now)

    @property
    def sparsity(self) -> float:
        """Mean of the schedule."""
        return sum(self.schedule) / len(self.schedule)

    @property
    def decodes_by(self) -> list[bool]:
        """Of each block whether a token that is decoded goes through it."""
        return [sparsity <= DECODE_LIMIT for sparsity in self.schedule]

    @torch.no_grad()
    def prefill(self, ids: Any, attention_mask: Tensor | None = None) -> Prefilled:
        """Run prompts through the blocks, each block on the tokens that it computes.

        Args:
            ids: of one prompt, of several of one length, or a tensor ``[B, L]``.
            attention_mask: ``[B, L]``, 0 or False at padding, on either side; padding is neither counted nor kept.

        Raises InputError for ids that the model has not, prompts without a token, and ones longer than the model can be.
        """
        token_BL = check_tokens(ids, self.stack)
        mask_BL = check_mask(attention_mask, token_BL)
        real_BL = torch.ones_like(token_BL, dtype=torch.bool) if mask_BL is None else mask_BL
        length_B = real_BL.sum(1)
        if int(length_B.min()) == 0:
            raise InputError(f"prompt {int(length_B.argmin())} is all padding; give at least one token")
        self._check_length(int(length_B.max()))
        tokens = Tokens(token_BL, real_BL, places_of(real_BL))
        decider = self.decider(real_BL)
        cache = SkipCache([BlockCache() for _ in range(self.stack.num_blocks)], length_B)
        with evaluating(self.stack.module):
            x_BLD, state = self.stack.embed(token_BL, position_BL=tokens.position_BL)
            meter = Meter(self.stack)
            x_BLD, keep_IBL = run_blocks(
                self.blocks,
                x_BLD,
                tokens,
                decider,
                caches=cache.blocks,
                kv=self.kv,
                meter=meter,
                wants_scores=decider.wants_scores,
                own_only=self.factors.causal,
                removed=decider.removed,
            )
            logits_BV = self.stack.head(_last_in_place(x_BLD, real_BL), state, last_only=True)[:, -1]
        if isinstance(self.router, TokenRouter):
            asked = sum(0 < sparsity < 1 for sparsity in self.schedule)
            meter.overhead += self.router.num_parameters * int(length_B.sum()) * asked
        report = report_of(self.schedule, keep_IBL, real_BL, meter, self._dense(length_B.tolist(), 0))
        return Prefilled(logits_BV, cache, report, keep_IBL, real_BL, token_BL)

    @torch.no_grad()
    def decode(self, ids: Any, prefilled: Prefilled) -> Tensor:
        """Logits ``[B, C, V]`` of the tokens behind C new ones of each prompt, which the cache then holds.

        Each new token sees what each block has computed of the prompt, and those before it. ``prefilled.report`` counts them.

        Raises InputError for another number of rows than prompts, ids that the model has not, or more than it has positions for.
        """
        token_BC = check_tokens(ids, self.stack)
        cache, (batch, count) = prefilled.cache, token_BC.shape
        if batch != len(prefilled.real_BL):
            raise InputError(
                f"there are {batch} rows of new tokens and {len(prefilled.real_BL)} prompts; give a row for each"
            )
        self._check_length(int(cache.next_B.max()) + count)
        position_BC = cache.next_B.unsqueeze(1) + torch.arange(count, device=token_BC.device)
        real_BC, goes = torch.ones_like(token_BC, dtype=torch.bool), self.decodes_by
        meter = Meter(self.stack)
        with evaluating(self.stack.module):
            x_BCD, state = self.stack.embed(token_BC, position_BL=position_BC)
            x_BCD, _ = run_blocks(
                self.blocks,
                x_BCD,
                Tokens(token_BC, real_BC, position_BC),
                lambda layer, x, table: real_BC & goes[layer],
                caches=cache.blocks,
                meter=meter,
            )
            logits_BCV = self.stack.head(x_BCD, state)
        report, dense = prefilled.report, self._dense([count] * batch, cache.next_B.tolist())
        prefilled.report = replace(
            report,
            work=tuple(a + b for a, b in zip(report.work, meter.blocks, strict=True)),
            dense=tuple(a + b for a, b in zip(report.dense, dense, strict=True)),
            decoded=report.decoded + batch * count,
        )
        cache.next_B = cache.next_B + count
        return logits_BCV

    def generate(self, ids: Any, max_new_tokens: int = 32, *, stop: Collection[int] = ()) -> list[int]:
        """The likeliest tokens behind one prompt, one after another; a token of ``stop`` ends them and is not among them.

        Raises InputError as `prefill`, and for several prompts.
        """
        prefilled = self.prefill(ids)
        if len(prefilled.logits_BV) != 1:
            raise InputError(f"there are {len(prefilled.logits_BV)} prompts; generate takes one")
        made: list[int] = []
        logits_1V = prefilled.logits_BV
        while len(made) < max_new_tokens:
            token = int(logits_1V.argmax(-1))
            if token in stop:
                break
            made.append(token)
            if len(made) < max_new_tokens:
                logits_1V = self.decode([[token]], prefilled)[:, -1]
        return made

    @torch.no_grad()
    def uncached(self, prefilled: Prefilled, ids: Any = ()) -> Tensor:
        """Logits ``[B, L + C, V]`` of the prompts and C tokens behind them in one pass without caches: what `prefill` and `decode` give.

        Blocks compute what they computed in ``prefilled``; nothing is decided anew.
        """
        after_BC = prefilled.token_BL[:, :0] if not len(ids) else check_tokens(ids, self.stack)
        token_BL = torch.cat((prefilled.token_BL, after_BC), dim=1)
        real_BC = torch.ones_like(after_BC, dtype=torch.bool)
        real_BL = torch.cat((prefilled.real_BL, real_BC), dim=1)
        tokens = Tokens(token_BL, real_BL, places_of(real_BL))
        keeps = [
            torch.cat((keep_BL, real_BC & goes), dim=1)
            for keep_BL, goes in zip(prefilled.keep_IBL, self.decodes_by, strict=True)
        ]
        with evaluating(self.stack.module):
            x_BLD, state = self.stack.embed(token_BL, position_BL=tokens.position_BL)
            x_BLD, _ = run_blocks(
                self.blocks,
                x_BLD,
                tokens,
                lambda layer, x, table: keeps[layer],
                kv=self.kv,
                removed=lambda layer: self.schedule[layer] >= 1,
            )
            return self.stack.head(x_BLD, state)

    def decider(self, real_BL: Tensor) -> Decider:
        """Who decides about prompts, block by block; ``real_BL`` is False at padding."""
        return Decider(
            self.router,
            self.schedule,
            real_BL,
            mode=self.mode,
            factors=self.factors,
            one_pass=self.one_pass,
            seed=self.seed,
        )

    def _check_length(self, length: int) -> None:
        if length > self.stack.max_positions:
            raise InputError(
                f"there are {length} positions; the model takes at most {self.stack.max_positions}, cut the prompt"
            )

    def _dense(self, lengths: list[int], past: int | list[int]) -> list[int]:
        """Multiply-adds of each block of the dense model on so many tokens of each sequence, behind others."""
        before = [past] * len(lengths) if isinstance(past, int) else past
        return [
            sum(self.stack.count(layer, count, other + count) for count, other in zip(lengths, before, strict=True))
            for layer in range(self.stack.num_blocks)
        ]

    def routing(self, prefilled: Prefilled, layer: int) -> Routing:
        """What was decided of the prompts' real tokens in a block: destination 0 passes over, 1 computes."""
        choice_N1 = prefilled.keep_IBL[layer][prefilled.real_BL].long().unsqueeze(1)
        score_N2 = torch.nn.functional.one_hot(choice_N1[:, 0], 2).float()
        return Routing(choice_N1, torch.ones_like(choice_N1, dtype=torch.float32), score_N2)

    def trace(self, prefilled: Prefilled) -> RoutingTrace:
        """All decisions of a prefill, as `anabranch.routing` records them."""
        builder = TraceBuilder()
        row_N, column_N = prefilled.real_BL.nonzero(as_tuple=True)
        for layer in range(self.stack.num_blocks):
            routing = self.routing(prefilled, layer)
            builder.add(
                TraceLayer(layer=layer, name=f"blocks.{layer}.tokens", num_destinations=2, top_k=1),
                routing.index_NK.cpu().numpy(),
                routing.weight_NK.cpu().numpy(),
                item_N=row_N.cpu().numpy(),
                position_N=places_of(prefilled.real_BL)[row_N, column_N].cpu().numpy(),
                token_N=prefilled.token_BL[row_N, column_N].cpu().numpy(),
            )
        return builder.trace()

    def save(self, path: str | Path) -> None:
        """Write schedule, router, constants and the model's fingerprint into one file of less than 10 KB (safetensors)."""
        router = None if isinstance(self.router, str) else self.router
        by_place = self.router if isinstance(self.router, str) else None
        stored = Stored(
            self.schedule,
            router,
            by_place,
            self.mode,
            self.kv,
            self.one_pass,
            self.factors,
            self.seed,
            self.stack.fingerprint(),
        )
        write_skipper(path, stored)

    @classmethod
    def load(cls, path: str | Path, model: Any) -> "TokenSkipper":
        """What `save` wrote, on its model.

        Raises CheckpointError for a file that is missing, damaged, or of another model.
        """
        return cls.of(read_skipper(path), model, str(path))

    @classmethod
    def of(cls, stored: Stored, model: Any, path: str = "the skipper") -> "TokenSkipper":
        """What was read of the file ``path``, on its model. Raises CheckpointError for another one."""
        stack = stack_of(model)
        if len(stored.schedule) != stack.num_blocks:
            raise CheckpointError(
                f"{path} is of a model of {len(stored.schedule)} blocks; this one has {stack.num_blocks}"
            )
        found = stack.fingerprint()
        if stored.fingerprint != found:
            raise CheckpointError(
                f"{path} is of a model with fingerprint {stored.fingerprint[:12]}; this one has {found[:12]}: fit one on this model"
            )
        router: Any = stored.by_place if stored.router is None else stored.router.to(stack.device)
        return cls(
            stack,
            stored.schedule,
            router,
            mode=stored.mode,
            kv=stored.kv,
            one_pass=stored.one_pass,
            factors=stored.factors,
            seed=stored.seed,
        )


def _last_in_place(x_BLD: Tensor, real_BL: Tensor) -> Tensor:
    """x_BLD whose last place holds each prompt's last real token, which is where logits are made."""
    if bool(real_BL[:, -1].all()):
        return x_BLD
    place_L = torch.arange(real_BL.shape[1], device=real_BL.device)
    last_B = torch.where(real_BL, place_L, -1).amax(1)
    row_B = torch.arange(len(last_B), device=real_BL.device)
    return torch.cat((x_BLD[:, :-1], x_BLD[row_B, last_B].unsqueeze(1)), dim=1)
