"""What IC-Cache has asked beside requests: better answers to examples, and second answers where the router cannot tell arms apart.

replay     off-peak: the dearest arm answers the request of an example several times; each answer is graded, the best kept (section 4.3)
compare    an uncertain request was answered by one arm: a second one answers too, and which is better teaches the router (section 5)

The judge is a model. It grades an answer alone from 0 to 10, and compares two in both orders (`both_orders`).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anabranch.routers.both_orders import of_both_orders
from anabranch.routers.contract.strategy import Errands
from anabranch.routers.ic_cache.ic_cache import ICCache
from anabranch.routers.judges import grade, grade_prompt, prompt_of, verdict

logger = logging.getLogger(__name__)

# New answers to one example.
ANSWERS = 3
HOT, COLD = 1.0, 0.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """An example whose answer is to be made anew.

    Attributes:
        id, tenant, request, response, quality: see `Example`.
    """

    id: int
    tenant: str
    request: str
    response: str
    quality: float | None


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer that is to be compared with that of a second arm.

    Attributes:
        decision: its id.
        arm: that answered.
        text: what it said.
    """

    decision: str
    arm: str
    text: str


# Replays


def wanted(cache: ICCache) -> list[Wanted]:
    """Those of a round; none if the dearest arm may not enter the pool."""
    pool = cache.config.pool
    if pool.trust.get(cache.dearest, 0) < pool.min_trust:
        return []
    found = cache.manager.wanting(cache.router.load.value)[: cache.config.manager.replays_per_tick]
    return [Wanted(one.id, one.tenant, one.request, one.response, one.quality) for one in found]


async def replay(cache: ICCache, run: Errands) -> None:
    """One round. Raises an AnabranchError as soon as nothing more may be asked."""
    in_vain = 0
    for one in await run.alone(lambda: wanted(cache)):
        if in_vain == cache.config.manager.patience:
            break
        if not run.may_ask(one.tenant, (cache.dearest, run.judge)):
            continue
        # Before it is paid for: what fails is not tried without end.
        await run.alone(lambda: _begin(cache, one.id))  # noqa: B023
        is_better = await _replayed(cache, run, one)
        in_vain = 0 if is_better else in_vain + 1


async def _replayed(cache: ICCache, run: Errands, one: Wanted) -> bool:
    before = one.quality
    if before is None:
        before = await _graded(run, one.request, one.response)
    if before is None:
        return False
    asked = [{"role": "user", "content": one.request}]
    rated: list[tuple[float, str]] = []
    for _ in range(ANSWERS):
        answer = await run.ask(cache.dearest, asked, temperature=HOT)
        quality = await _graded(run, one.request, answer) if answer.strip() else None
        if quality is not None:
            rated.append((quality, answer))
    is_better: bool = await run.alone(lambda: _renew(cache, one, before, rated))
    return is_better


def _begin(cache: ICCache, id: int) -> None:
    if id in cache.pool:
        cache.pool.get(id).replays += 1
        cache.pool.touch(cache.pool.get(id))


def _renew(cache: ICCache, one: Wanted, before: float, rated: Sequence[tuple[float, str]]) -> bool:
    # It may be gone, or another, by now.
    if one.id not in cache.pool or cache.pool.get(one.id).response != one.response:
        return False
    is_better = cache.manager.renew(cache.pool.get(one.id), before, rated)
    cache.metrics.count("ic_cache_replays_total")
    cache.metrics.count("ic_cache_replays_bettered_total", is_better)
    return is_better


async def _graded(run: Errands, request: str, answer: str) -> float | None:
    return grade(
        await run.ask(run.judge, [{"role": "user", "content": grade_prompt(request, answer)}], temperature=COLD)
    )


# Comparisons


async def compare(cache: ICCache, run: Errands, first: Answered) -> None:
    """Let the second arm answer, and learn which answer is better. Raises an AnabranchError if nothing more may be asked."""
    routed = await run.alone(lambda: cache.pending(first.decision))
    second = None if routed is None or routed.choice is None else routed.choice.second
    if routed is None or second is None or not run.may_ask(routed.query.tenant, (second, run.judge)):
        return
    messages: Any = routed.query.messages or [{"role": "user", "content": routed.query.text}]
    sent = await run.alone(lambda: cache.prepare(routed, second, messages))
    other = await run.ask(second, sent, temperature=HOT)
    asked = routed.query.text if len(messages) == 1 else messages
    verdicts = []
    for pair in ((first.text, other), (other, first.text)):
        prompt = [{"role": "user", "content": prompt_of(asked, *pair)}]
        verdicts.append(verdict(await run.ask(run.judge, prompt, temperature=COLD)))
    forth, back = verdicts
    outcome = of_both_orders(forth, None if back is None else 1 - back)
    if outcome is None:
        cache.metrics.count("ic_cache_feedback_ignored_total", reason="unclear verdict")
        return
    await run.alone(lambda: cache.prefer(first.decision, first.arm, second, outcome))
