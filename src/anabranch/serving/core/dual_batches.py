"""`DualBatches`: those that decode, in two steps of half as many each, grouped as somebody sees fit.

ExpertFlow (He et al., arXiv 2410.17954) merges two adjacent batches of decodes and splits them anew, so that tokens which go to the same
experts run together. Here the two batches are the running requests; whoever is not in the first step is in the second.
"""

from collections.abc import Callable, Container, Sequence

from anabranch.errors import InputError
from anabranch.serving.core.state import RequestState

# Ids of two steps and how many are in the first; the same ids, those of the first step before the others.
Order = Callable[[Sequence[str], int], Sequence[str]]


class DualBatches:
    """Says who decodes in the next step.

    Args:
        size: most of a step.
        order: regroups the ids of two steps; None keeps them as they are.
    """

    def __init__(self, size: int, order: Order | None = None) -> None:
        self._size, self._order = size, order
        # Of the pair whose first step has been formed.
        self._second: set[RequestState] = set()

    def take(self, running: Sequence[RequestState]) -> Container[RequestState] | None:
        """Those who decode now; None for all. Raises InputError if ``order`` gives back other ids."""
        ready = [state for state in running if state.decodes]
        second, self._second = [state for state in ready if state in self._second], set()
        if len(ready) <= self._size:
            return None
        # They do not fill the step if some have ended: others may run twice in the pair.
        if second:
            rest = [state for state in ready if state not in second]
            return {*second, *rest[: self._size - len(second)]}
        pair = ready
        # Those who have waited longest.
        if len(ready) > 2 * self._size:
            pair = sorted(ready, key=lambda state: state.last_step)[: 2 * self._size]
        by_id = {state.request.id: state for state in pair}
        ids = list(by_id) if self._order is None else list(self._order(list(by_id), self._size))
        if len(ids) != len(by_id) or set(ids) != by_id.keys():
            raise InputError("order must give back the ids that it was given, each once")
        self._second = {by_id[id] for id in ids[self._size :]}
        return {by_id[id] for id in ids[: self._size]}
