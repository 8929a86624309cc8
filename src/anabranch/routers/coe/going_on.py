"""What a map of experts learns while it serves: scores of answers are counted, and every so often it is made anew, steadily."""

from collections.abc import Sequence

from anabranch.errors import InputError
from anabranch.routers.coe.feedback import Feedback
from anabranch.routers.coe.planning import Planning
from anabranch.routers.contract.query import Outcome
from anabranch.routers.contract.strategy import Arrays, Facts


class GoingOn(Planning):
    """See the module.

    Attributes:
        own: scores that were observed here since the start.
        others: those of other processes.
    """

    own: Feedback
    others: Feedback
    # Since the map was made.
    _fresh: Feedback

    def observe(self, outcome: Outcome) -> None:
        """Count a score; after ``refresh_every`` of them, make the map anew, steadily."""
        if outcome.quality is None or outcome.query.vector_D is None or outcome.model not in self.models:
            return
        best = int(self.router.distribution(outcome.query.vector_D[None])[0].argmax())
        for scores in (self._fresh, self.own):
            scores.add(self.router.categories[best], outcome.model, float(outcome.quality))
        self._refresh_if_due()

    def _refresh_if_due(self) -> None:
        if self.config.refresh_every and self._fresh.count >= self.config.refresh_every:
            self.refresh()

    def refresh(self) -> None:
        """Take what was observed into the table and make the map anew; experts keep their categories unless others are surely better."""
        fresh, unknown = self._fresh.split(self.models)
        if not fresh.cells or self._table is None:
            return
        self._incumbents = dict(self.plan().map.choice)
        self._table, self._fresh = self._table.with_feedback(fresh), unknown
        self._plans.clear()

    # Several processes

    def part(self) -> tuple[Arrays, Facts]:
        """See `Strategy`."""
        return self.own.state()

    def hear(self, arrays: Arrays, facts: Facts) -> None:
        """See `Strategy`. It is taken into the table once there is enough, as what is observed here is."""
        heard = Feedback.read(arrays, facts) if facts else Feedback()
        heard.sums(self.router.categories, tuple({expert for _, expert in heard.cells}))
        self._fresh.take(heard)
        self._fresh.take(self.others, -1)
        self.others = heard

    def joined(self, parts: Sequence[tuple[Arrays, Facts]]) -> tuple[Arrays, Facts]:
        """See `Strategy`."""
        made = Feedback()
        for part in parts:
            made.take(Feedback.read(*part))
        return made.state()

    def disown(self, arrays: Arrays, facts: Facts) -> None:
        """See `Strategy`. The table has it until it comes back."""
        part = Feedback.read(arrays, facts)
        if not self.own.holds(part):
            raise InputError("these scores are not among those that were observed here")
        self.own.take(part, -1)
        self._fresh.take(part, -1)
