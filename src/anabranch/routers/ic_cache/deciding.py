"""How IC-Cache decides: examples and an arm for a request, and what the arm is sent."""
# Shapes: D dimensions, M arms, I inputs of the critic

import uuid
from collections.abc import Sequence

import numpy as np

from anabranch.routers.contract.query import Query
from anabranch.routers.ic_cache.core import Core
from anabranch.routers.ic_cache.prompt import Messages, build, fit
from anabranch.routers.ic_cache.records import Routed, as_query, shortened
from anabranch.routers.ic_cache.router import Choice
from anabranch.routers.ic_cache.selector import Selection


class Deciding(Core):
    """See the module. A selector or a router that fails is passed by."""

    def select(self, request: Query | str, target_model: str, *, vector_D: np.ndarray | None = None) -> Selection:
        """Examples for a request, with scores and reasons; none if anything fails."""
        query = as_query(request)
        try:
            vector_D = self.vector(query) if vector_D is None else vector_D
            tau, is_trial = self.threshold.draw(self._random)
            return self.selector.select(query, vector_D, target_model, tau=tau, now_s=self.clock(), is_trial=is_trial)
        except Exception:
            return self._bypassed("selector", Selection())

    def route(
        self, request: Query | str, *, available: Sequence[str] | None = None, load: float | None = None
    ) -> Routed:
        """Examples and an arm for a request.

        Args:
            request: text, or a query.
            available: arms that take requests; None for all.
            load: of the dearest arm now; None asks the ``load`` that was given.
        """
        query, vector_D, x_I, choice = as_query(request), None, None, None
        selection = Selection()
        try:
            vector_D = self.vector(query)
        except Exception:
            self._bypassed("embedder", None)
        if vector_D is not None:
            selection = self.select(query, self.assisted, vector_D=vector_D)
        try:
            self.router.observe_load(self.load() if load is None else load, self.clock())
            if vector_D is not None:
                tokens = query.prompt_tokens or self.selector.count_tokens(query.text)
                x_I = self.router.context(vector_D, selection, tokens)
                choice = self.router.choose(x_I, available)
        except Exception:
            self._bypassed("router", None)
        order = self._order(choice, available)
        routed = Routed(
            id=uuid.uuid4().hex,
            query=query,
            vector_D=vector_D,
            selection=selection,
            choice=choice,
            arm=order[0],
            order=order,
            x_I=x_I,
        )
        self._remember(routed)
        return routed

    def _order(self, choice: Choice | None, available: Sequence[str] | None) -> tuple[str, ...]:
        """The chosen arm, then the others by score; by falling cost where the router said nothing."""
        names = list(self.arms)
        if choice is None:
            names.sort(key=lambda name: -self.arms[name].cost)
        else:
            score = dict(zip(choice.arms, choice.score_M.tolist(), strict=True))
            names.sort(key=lambda name: (name != choice.arm, -score[name]))
        is_open = [name for name in names if available is None or name in available]
        return tuple(is_open or names)

    def _remember(self, routed: Routed) -> None:
        self._pending[routed.id] = routed
        while len(self._pending) > self.config.pending:
            self._pending.popitem(last=False)
        choice = routed.choice
        if choice is not None:
            self.log.append(
                {
                    "id": routed.id,
                    "time_s": self.clock(),
                    "tenant": routed.query.tenant,
                    "user": routed.query.user,
                    "arm": choice.arm,
                    "arms": list(choice.arms),
                    "probability": choice.probability_M.tolist(),
                    "mu": choice.mu_M.tolist(),
                    "push": choice.push,
                    "second": choice.second,
                    "tau": routed.selection.tau,
                    "examples": list(routed.selection.ids),
                }
            )
        self.metrics.count("ic_cache_requests_total", arm=routed.arm)
        self.metrics.count("ic_cache_examples_selected_total", len(routed.selection.chosen))
        self.metrics.count("ic_cache_selection_seconds_total", routed.selection.took_s)
        self.metrics.gauge("ic_cache_load_push", self.router.push)

    def prepare(self, routed: Routed, arm: str, messages: Messages) -> Messages:
        """What to send to an arm: the messages with as many of the examples as its window holds, if it is given any."""
        if arm not in self.arms or not self.shows_examples(arm) or not routed.selection.chosen:
            return messages
        kept = fit(
            messages,
            routed.selection.chosen,
            context=self.arms[arm].context,
            max_tokens=routed.query.max_tokens,
            prompt_tokens=routed.query.prompt_tokens,
            style=self.config.style,
            count_tokens=self.selector.count_tokens,
        )
        if len(kept) < len(routed.selection.chosen):
            self.metrics.count("ic_cache_examples_dropped_total", len(routed.selection.chosen) - len(kept))
            self._replace(routed.id, selection=shortened(routed.selection, kept))
        return build(messages, kept, style=self.config.style)
