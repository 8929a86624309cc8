"""What IC-Cache learns from: which arm answered, what somebody thinks of an answer, and which of two was better."""

import numpy as np

from anabranch.routers.ic_cache.core import Core
from anabranch.routers.ic_cache.proxy import merge
from anabranch.routers.ic_cache.records import Lesson, Routed
from anabranch.routers.score_scale import unit_score


class Learning(Core):
    """See the module."""

    def answered(self, id: str, arm: str) -> None:
        """Tell that an arm answered; an unknown id is passed over."""
        routed = self._pending.get(id)
        if routed is not None:
            for item in routed.selection.chosen if self.shows_examples(arm) else ():
                item.example.uses += 1
                self.pool.touch(item.example)
            self._replace(id, answered=(*routed.answered, arm))

    def feedback(
        self,
        id: str,
        *,
        thumb: bool | None = None,
        score: float | None = None,
        preferred: tuple[str, str] | None = None,
        tie: bool = False,
        arm: str | None = None,
    ) -> bool:
        """Learn from what somebody thinks of an answer.

        Args:
            id: of the decision.
            thumb: up or down, or how far up: 0 to 1.
            score: 0 to 1.
            preferred: the arm whose answer is better, then the other.
            tie: neither is.
            arm: that gave the rated answer; None for the one that was told of, or else chosen.

        Returns: whether it counted. What is no number, out of range, or of an unknown decision is ignored and counted.
        """
        if preferred is not None:
            return self.prefer(id, *preferred, 0.5 if tie else 1.0)
        quality = _share(score if thumb is None else thumb)
        routed = self._pending.get(id)
        if quality is None or routed is None:
            return self._ignored("unknown id" if routed is None else "no score from 0 to 1")
        arm = arm or (routed.answered[0] if routed.answered else routed.arm)
        if arm not in self.arms:
            return self._ignored("unknown arm")
        self._learn(routed, arm, quality)
        self.metrics.count("ic_cache_feedback_total", kind="thumb" if thumb is not None else "score")
        return True

    def _learn(self, routed: Routed, arm: str, quality: float) -> None:
        cost = float(self.router.cost_M[self.router.arms.index(arm)])
        if routed.x_I is not None:
            self.router.rate(routed.x_I, arm, quality, owner=(routed.query.tenant, routed.query.user))
        if routed.choice is not None and arm == routed.choice.arm:
            self.log.reward(routed.id, quality)
        selection = routed.selection
        if not self.shows_examples(arm):
            return
        examples = [item.example for item in selection.chosen]
        self.manager.shown(examples, quality, cost, is_cheap=arm != self.dearest, now_s=self.clock())
        if selection.pairs is not None and len(selection.pairs):
            query = routed.query
            self._lessons.append(Lesson(selection.pairs, quality, selection.ids, query.tenant, query.user))
            self._new_lessons += 1
        if selection.is_trial:
            share = selection.tokens / max(self.config.selector.max_example_tokens, 1)
            self.threshold.record(selection.tau, quality - cost - self.config.example_weight * share)

    def prefer(self, id: str, winner: str, loser: str, outcome: float = 1.0) -> bool:
        """Learn that one arm's answer was preferred to another's (1), or the other way round (0), or neither (1/2).

        Returns: whether it counted; as of `feedback`.
        """
        routed = self._pending.get(id)
        if routed is None or routed.x_I is None:
            return self._ignored("unknown id")
        if winner not in self.arms or loser not in self.arms or winner == loser:
            return self._ignored("unknown arm")
        worth = _share(outcome)
        if worth is None:
            return self._ignored("no score from 0 to 1")
        self.router.prefer(routed.x_I, winner, loser, worth, owner=(routed.query.tenant, routed.query.user))
        self.metrics.count("ic_cache_feedback_total", kind="preference")
        return True

    def _ignored(self, reason: str) -> bool:
        self.metrics.count("ic_cache_feedback_ignored_total", reason=reason)
        return False

    def refit(self) -> bool:
        """Fit the proxy on what is remembered; whether there was anything."""
        if not self._lessons:
            return False
        found = merge([lesson.pairs for lesson in self._lessons])
        helped_N = np.repeat([lesson.quality for lesson in self._lessons], [len(item.pairs) for item in self._lessons])
        proxy = self.config.proxy.build()
        proxy.fit(found, helped_N, seed=self.config.seed)
        # At once: a request sees the old one or the new one.
        self.selector.proxy = proxy
        self._new_lessons = 0
        self.metrics.count("ic_cache_refits_total")
        return True


def _share(given: object) -> float | None:
    """What somebody says, from 0 to 1; None for what is no number, and for one out of range."""
    try:
        return unit_score(float(given))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
