"""Drawing answers: side by side, one after another with what a critic says, or chains of both, under one budget.

    found = await parallel(draw, 8, select)                          draw(histories) -> samples, one for each history
    found = await sequential(draw, 4, critic, select)                each round reads the last answer and what was said to it
    found = await mixed(draw, chains=4, depth=2, critic=critic, select=select)

A `BudgetController` in place of a number ends it as soon as more does not pay. Whoever asks models brings ``draw``: it turns a history
into messages, and gives None for an answer that did not come.
"""

import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from anabranch.bounds import whole
from anabranch.errors import InputError
from anabranch.test_time.controller import Allowance, BudgetController, Reason
from anabranch.test_time.selectors import Chosen, Same, Sample, majority

__all__ = [
    "Chosen",
    "Critic",
    "Draw",
    "History",
    "Sample",
    "Sampled",
    "Select",
    "Verify",
    "mixed",
    "parallel",
    "sequential",
]

# What was answered and said to it, round by round.
History = tuple[tuple[str, str], ...]

Draw = Callable[[Sequence[History]], Awaitable[Sequence[Sample | None]]]
Critic = Callable[[Sample], str]
Select = Callable[[Sequence[Sample]], Chosen | None]
Verify = Callable[[Sequence[Sample]], Awaitable[Sequence[bool | None]]]


@dataclass(kw_only=True)
class Sampled:
    """What came of it.

    Attributes:
        samples: all that came, in the order they were drawn in; of chains round by round.
        verified: of each, where there is a verifier; None of one that it could not tell of.
        chosen: the one to give, and how sure of it; None where nothing came.
        reason: why no more were drawn; None where their number was given, and reached.
        failures: answers that did not come.
    """

    samples: list[Sample] = field(default_factory=list)
    verified: list[bool | None] | None = None
    chosen: Chosen | None = None
    reason: Reason | None = None
    failures: int = 0

    @property
    def answer(self) -> Sample | None:
        """The sample to give."""
        return None if self.chosen is None else self.samples[self.chosen.place]

    @property
    def cost(self) -> float:
        """Of all samples, as far as it is known."""
        return sum(one.cost or 0.0 for one in self.samples)


async def parallel(
    draw: Draw,
    n: int | BudgetController,
    select: Select = majority,
    *,
    same: Same = str.strip,
    verify: Verify | None = None,
    spent: Callable[[], float] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Sampled:
    """Answers that know nothing of one another.

    Args:
        draw: asks for them.
        n: how many, or the rules that say.
        select: which is given, unless one was verified.
        same: what an answer comes to, for the vote that ends it.
        verify: tells right ones, the first of which is given, and says None where it cannot tell. Where it tells of none, it is as if
            there were no verifier.
        spent: money that all draws have cost so far, those that failed among them; None for what samples say.
        clock: seconds.

    Raises InputError for fewer than one, and whatever ``draw`` and ``verify`` raise.
    """
    allowance = _allowance(n)
    found = Sampled(verified=None if verify is None else [])
    while True:
        asked = len(found.samples) + found.failures
        wanted = allowance.next() if isinstance(allowance, Allowance) else allowance - asked
        if wanted <= 0:
            break
        began = clock()
        came = [one for one in await _drawn(draw, [()] * wanted) if one is not None]
        found.failures += wanted - len(came)
        right = take(found, came, None if verify is None or not came else await verify(came))
        if not isinstance(allowance, Allowance):
            continue
        if not came:
            # Asked again at once, what failed as a whole would fail again.
            break
        answers = [same(one.text) for one in votes_of(came, right)]
        # What did not come has used up its place, so that a pool which fails ends.
        _tell(allowance, wanted, came, right, answers, clock() - began, spent)
    found.reason = allowance.reason if isinstance(allowance, Allowance) else None
    choose(found, select)
    return found


async def sequential(
    draw: Draw,
    n: int | BudgetController,
    critic: Critic,
    select: Select | None = None,
    *,
    verify: Verify | None = None,
    spent: Callable[[], float] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Sampled:
    """One answer, thought over again in further rounds; the last one is given, unless ``select`` says another or one was verified.

    Args:
        draw: asks; it is given all rounds so far.
        n: rounds, or the rules that say; of those a round is one sample, whatever their batch is.
        critic: what is said to an answer before the next round.
        select, verify, spent, clock: see `parallel`.
    """
    allowance = _allowance(n)
    if isinstance(allowance, Allowance):
        return await _chains(draw, 1, allowance.rules.max_n, critic, select or _last, verify, allowance, clock, spent)
    return await _chains(draw, 1, allowance, critic, select or _last, verify)


async def mixed(
    draw: Draw,
    *,
    chains: int,
    depth: int,
    critic: Critic,
    select: Select = majority,
    verify: Verify | None = None,
) -> Sampled:
    """Chains side by side, each thought over in further rounds. A chain whose answer does not come ends there.

    Without a verifier, ``select`` sees the last answer of each chain (of a single chain, all its answers).
    """
    return await _chains(draw, whole("chains", chains, 1), whole("depth", depth, 1), critic, select, verify)


async def _chains(
    draw: Draw,
    chains: int,
    depth: int,
    critic: Critic,
    select: Select,
    verify: Verify | None,
    allowance: Allowance | None = None,
    clock: Callable[[], float] = time.monotonic,
    spent: Callable[[], float] | None = None,
) -> Sampled:
    """`mixed`, and what ends it before its depth is reached."""
    found = Sampled(verified=None if verify is None else [])
    histories: list[History] = [()] * chains
    last: list[int | None] = [None] * chains
    open_chains = list(range(chains))
    for _ in range(depth):
        if not open_chains or (allowance is not None and not allowance.next()):
            break
        began = clock()
        drawn = await _drawn(draw, [histories[at] for at in open_chains])
        came = [(at, one) for at, one in zip(open_chains, drawn, strict=True) if one is not None]
        found.failures += len(open_chains) - len(came)
        first = len(found.samples)
        new = [one for _, one in came]
        right = take(found, new, None if verify is None or not new else await verify(new))
        if allowance is not None:
            _tell(allowance, len(open_chains), new, right, [], clock() - began, spent)
        for place, (at, one) in enumerate(came):
            last[at] = first + place
            histories[at] = (*histories[at], (one.text, critic(one)))
        open_chains = [at for at, _ in came]
        if found.verified is not None and any(found.verified):
            break
    if allowance is not None:
        # That it may go no deeper is told by whoever would be asked once more.
        allowance.next()
        found.reason = allowance.reason
    if found.verified is not None and any(found.verified):
        found.reason = "verified"
        choose(found, select)
        return found
    ends = [at for at in last if at is not None]
    places = list(range(len(found.samples))) if chains == 1 else ends
    chosen = select([found.samples[at] for at in places]) if places else None
    found.chosen = None if chosen is None else Chosen(places[chosen.place], chosen.sure)
    return found


def _tell(
    allowance: Allowance,
    count: int,
    came: Sequence[Sample],
    right: Sequence[bool | None] | None,
    answers: Sequence[str],
    seconds: float,
    spent: Callable[[], float] | None,
) -> None:
    costs = [one.cost for one in came if one.cost is not None]
    cost = sum(costs) if len(costs) == len(came) else None
    if spent is not None:
        cost = max(0.0, spent() - allowance.spent)
    allowance.told(count, verified=right, answers=[one for one in answers if one], cost=cost, seconds=seconds)


async def _drawn(draw: Draw, histories: Sequence[History]) -> Sequence[Sample | None]:
    drawn = await draw(histories)
    if len(drawn) != len(histories):
        raise InputError(
            f"draw gave {len(drawn)} answers to {len(histories)} histories; give None for one that did not come"
        )
    return drawn


def _last(samples: Sequence[Sample]) -> Chosen | None:
    return Chosen(len(samples) - 1, math.nan) if samples else None


def _allowance(n: int | BudgetController) -> Allowance | int:
    return n.begin() if isinstance(n, BudgetController) else whole("n", n, 1)


def take(found: Sampled, came: Sequence[Sample], right: Sequence[bool | None] | None) -> list[bool | None] | None:
    """Note samples and what a verifier said of them, which is given back as it is taken. Raises InputError for another number of both."""
    found.samples += came
    if found.verified is None:
        return None
    said = [None if one is None else bool(one) for one in right or ()]
    if len(said) != len(came):
        raise InputError(f"verify said {len(said)} things of {len(came)} answers")
    found.verified += said
    return said


def votes_of(came: Sequence[Sample], right: Sequence[bool | None] | None) -> Sequence[Sample]:
    """Samples whose answers have a vote that ends it: all, where nobody could tell of any whether it is right."""
    return () if right is not None and any(one is not None for one in right) else came


def choose(found: Sampled, select: Select) -> None:
    """The first that was verified; else what is selected of those that may be right."""
    if found.verified is not None and any(found.verified):
        found.chosen = Chosen(found.verified.index(True), 1.0)
        return
    # What was found wrong is given where there is nothing else.
    places = [at for at, right in enumerate(found.verified or ()) if right is None] or range(len(found.samples))
    chosen = select([found.samples[at] for at in places])
    found.chosen = None if chosen is None else Chosen(places[chosen.place], chosen.sure)
