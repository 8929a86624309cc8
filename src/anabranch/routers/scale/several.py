"""Several answers to a hard step: TTSPM inside of System 2, which chooses how many. Taken is the commonest, or the first of such.

    n <- a batch;  draw it side by side;  is the vote decided? is the next answer's chance to solve the step too small? no room? -> vote

How likely an answer is right is not known before: p ~ Beta(1, 1), with a tenth of steps that none solves; where the assessor has learned
what System 2 does (a probe of both systems), that is moved to its p2 (`anabranch.test_time.difficulty`). Rules:
`anabranch.test_time.BudgetController`.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import cast

from anabranch.errors import AnabranchError, BackendError, DataError
from anabranch.routers.contract.ask import Answered
from anabranch.routers.scale.calls import Calls
from anabranch.routers.scale.parsing import final_content
from anabranch.routers.scale.rules import Score
from anabranch.routers.scale.work import Settings
from anabranch.routers.strategies.consistency import final_answer
from anabranch.test_time import BetaTTSPM, BudgetController, Reason
from anabranch.test_time.difficulty import logit, moved

# Completion tokens of a budget below which System 2 is not begun.
LEAST_TOKENS = 16
# What nobody knows of a step.
UNKNOWN = BetaTTSPM(0.9, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Voted:
    """What came of it.

    Attributes:
        taken: the answer that is taken.
        samples: answers that came.
        agreed: of those, that come to the same as the one that is taken.
        reason: why no more were drawn.
    """

    taken: Answered
    samples: int
    agreed: int
    reason: Reason | None


def rules_of(settings: Settings, score: Score | None) -> BudgetController:
    """For a step of this score."""
    curve, most = UNKNOWN, settings.samples2
    if score is not None and score.knows2:
        curve = moved(UNKNOWN, float(logit(score.p2) - logit(UNKNOWN.value(1))))
    return BudgetController(
        curve=curve, value=1.0, cost=0.0, least_gain=settings.least_gain2, batch=min(settings.batch2, most), max_n=most
    )


class Room:
    """What a step has room for, batch by batch; the first answer is drawn in any case.

    Attributes:
        is_cut: there was less room than was wanted.

    Args:
        calls: of the run.
        most: completion tokens of an answer; None for no end.
        later: steps that come after, each of which needs a call.
        is_short: hardly any time is left.
        expected: completion tokens that an answer is expected to need.
    """

    def __init__(
        self,
        calls: Calls,
        *,
        most: int | None,
        later: int,
        is_short: Callable[[], bool],
        expected: Callable[[], float],
    ) -> None:
        self._calls, self._most, self._later = calls, most, later
        self._is_short, self._expected = is_short, expected
        self._is_first = True
        self.is_cut = False

    def next(self, wanted: int) -> tuple[int, int | None, Reason]:
        """Answers of so many wanted, completion tokens of each, and what ends it where it is none."""
        calls, is_first = self._calls, self._is_first
        # A budget in tokens is shared among those that are drawn side by side, no more of them than it has whole answers for: of three
        # that are cut off none says anything. Steps that come have a call each.
        room, free, reason = calls.room, calls.left - self._later, "budget"
        needed = max(float(LEAST_TOKENS), min(self._expected(), math.inf if self._most is None else self._most))
        count = 0
        if not is_first and free >= 1 and not calls.exhausted and self._is_short():
            reason = "deadline"
        elif is_first or not calls.exhausted:
            count = max(int(is_first), int(min(wanted, free, room / needed)))
        self._is_first, self.is_cut = False, self.is_cut or count < wanted
        share = None if math.isinf(room) or count < 1 else max(1, int(room // count))
        limits = [limit for limit in (self._most, share) if limit is not None]
        return count, min(limits, default=None), cast(Reason, reason)


async def vote(
    ask: Callable[[int, int | None], Awaitable[Answered]],
    rules: BudgetController,
    room: Room,
    clock: Callable[[], float] = time.monotonic,
) -> Voted:
    """Draw and vote.

    Args:
        ask: an answer, by its number from 0, of so many completion tokens at most.
        rules: how many.
        room: for them.
        clock: seconds.

    Raises what the last failed with where none came; DataError for a journal of something else.
    """
    allowance, came = rules.begin(), list[Answered]()
    error: AnabranchError | None = None
    while wanted := allowance.next():
        count, most, reason = room.next(wanted)
        if count < 1:
            allowance.stop(reason)
            break
        began = clock()
        numbers = range(allowance.drawn, allowance.drawn + count)
        drawn = await asyncio.gather(*(ask(number, most) for number in numbers), return_exceptions=True)
        for one in drawn:
            if isinstance(one, BaseException):
                if isinstance(one, DataError) or not isinstance(one, AnabranchError):
                    raise one
                error = one
        new = [one for one in drawn if isinstance(one, Answered)]
        came += new
        if not new:
            # Asked again at once, what failed as a whole would fail again.
            break
        # What was cut off decides nothing: others that are whole may still come.
        said = [key for one in new if not is_cut_off(one) and (key := _key(one))]
        allowance.told(count, answers=said, seconds=clock() - began)
    if not came:
        raise error or BackendError("no answer of System 2 could be asked for")
    return _taken(came, allowance.reason)


def _taken(came: Sequence[Answered], reason: Reason | None) -> Voted:
    keys = _keys(came)
    said = [key for key in keys if key]
    if not said:
        return Voted(came[0], len(came), 0, reason)
    best = max(dict.fromkeys(said), key=said.count)
    return Voted(came[keys.index(best)], len(came), said.count(best), reason)


def is_cut_off(found: Answered) -> bool:
    """Whether an answer was ended by its number of tokens."""
    return found.choices[0].get("finish_reason") == "length"


def _keys(answers: Sequence[Answered]) -> list[str]:
    """What each comes to; "" for those that have no vote: the ones that were cut off have one only where no other says anything."""
    whole = ["" if is_cut_off(one) else _key(one) for one in answers]
    return whole if any(whole) else [_key(one) for one in answers]


def _key(found: Answered) -> str:
    """What an answer comes to; "" for one that says nothing but its thoughts."""
    text = final_content(found.text)
    return final_answer(text) if text else ""
