"""Handing running requests from one process to another at the boundary of a step.

Between processes of one device nothing is computed or copied: the key-value cache is memory that both have mapped, so the scheduler
with its block tables and prefix keys travels as it is (`freeze`, `thaw`). Between devices the full blocks of a request are copied and
published under their keys; the receiver's scheduler then finds them like any cached prefix, and at most a block's tokens are
computed again (`carried`, `adopt`). What the sampler knows follows from a request and its tokens so far.
"""

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from anabranch.serving.core.request import Request
from anabranch.serving.core.scheduler import Scheduler
from anabranch.serving.core.state import RequestState

__all__ = ["Carried", "adopt", "carried", "freeze", "give", "keep_out", "reserve", "thaw"]


@dataclass(frozen=True)
class Carried:
    """A request under way: what it was asked, what it has given, and where its keys and values are.

    Attributes:
        request: as it was submitted.
        output: tokens so far.
        blocks: of the device that it comes from; empty where nothing is stored.
        computed: tokens whose keys and values are in them.
        num_scored: log probabilities of the prompt that were told, see `Scheduler.add`.
        num_cached: tokens of the prompt that were cached when it began; None for one that has not begun.
    """

    request: Request
    output: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()
    computed: int = 0
    num_scored: int = 0
    num_cached: int | None = None


def freeze(scheduler: Scheduler, decided: Mapping[str, Any] = MappingProxyType({})) -> bytes:
    """A scheduler between two steps, to go on in another process, and what was ``decided`` about its requests.

    What is stored of a request whose path routers chose (`anabranch.serving.engine.depths`), or whose prompt blocks passed over in parts
    (`anabranch.serving.engine.skips`), is of use only with that.
    """
    if not scheduler.is_between_steps:
        raise RuntimeError("a step is under way; tell the scheduler what it gave first")
    # One that ended in the last step may still be decided about, and its id may come again with another prompt.
    under_way = {state.request.id for state in scheduler.states()}
    return pickle.dumps((scheduler, {id: one for id, one in decided.items() if id in under_way}), protocol=5)


def thaw(frozen: bytes) -> tuple[Scheduler, dict[str, Any]]:
    """The scheduler that was frozen, and what was decided."""
    scheduler, decided = pickle.loads(frozen)
    return scheduler, decided


def carried(scheduler: Scheduler) -> list[Carried]:
    """All requests of a scheduler between two steps, in the order of rank."""
    return [
        Carried(
            state.request,
            tuple(state.tokens[state.num_prompt :]),
            tuple(state.blocks),
            state.computed,
            state.num_scored,
            state.num_cached,
        )
        for state in scheduler.states()
    ]


def adopt(
    scheduler: Scheduler, parcels: Sequence[Carried], copy: Callable[[Sequence[tuple[int, int]]], None]
) -> tuple[int, int]:
    """Take over requests of another device; gives (tokens whose keys and values came along, tokens to compute again).

    ``copy`` copies blocks, pairs of the number there and the number here. Where there is no room for them, or no prefix cache,
    they are computed again.
    """
    pairs: list[tuple[int, int]] = []
    fresh: list[list[int]] = []
    brought = again = 0
    for parcel in parcels:
        state = scheduler.add(parcel.request, parcel.output, parcel.num_scored, parcel.num_cached)
        keys = _keys(scheduler, state, parcel.computed)
        missing = [index for index, key in enumerate(keys) if scheduler.pool.find(key) is None]
        here = scheduler.pool.allocate(len(missing)) or []
        for index, block in zip(missing, here, strict=False):
            scheduler.pool.publish(block, keys[index])
            pairs.append((parcel.blocks[index], block))
        fresh.append(here)
        full = len(keys) if len(here) == len(missing) else 0
        brought += full * scheduler.config.block_tokens
        again += max(0, parcel.computed - full * scheduler.config.block_tokens)
    copy(pairs)
    for blocks in fresh:
        # Nobody's, but found by their keys.
        scheduler.pool.free(blocks)
    return brought, again


def reserve(scheduler: Scheduler) -> list[int]:
    """Blocks that a scheduler which gets no new requests can never need; they are taken from it, for another one of the device.

    Every request it has may grow to its limit.
    """
    pool, size = scheduler.pool, scheduler.config.block_tokens
    growth = sum(max(0, -(-state.most_tokens // size) - len(state.blocks)) for state in scheduler.states())
    return pool.allocate(max(0, pool.num_free - growth)) or []


def keep_out(scheduler: Scheduler, free: Sequence[int]) -> list[int]:
    """Let a new scheduler use the blocks ``free`` only; gives the others, which are another's until `give`."""
    others = sorted(set(range(scheduler.pool.num_blocks)) - set(free))
    scheduler.pool.hold(others)
    return others


def give(scheduler: Scheduler, blocks: Sequence[int]) -> None:
    """The blocks that were kept out are its own from now on."""
    scheduler.pool.free(blocks)


def _keys(scheduler: Scheduler, state: RequestState, computed: int) -> list[bytes]:
    """Prefix keys of the full blocks of the first ``computed`` tokens; none without a prefix cache."""
    if not scheduler.config.prefix_cache:
        return []
    known = min(computed, state.num_reusable)
    if not state.root:
        state.root = scheduler.root_of(state.request)
    scheduler.prefixes.extend(state.keys, state.root, state.tokens, known)
    return state.keys[: known // scheduler.config.block_tokens]
