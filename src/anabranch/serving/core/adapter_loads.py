"""`AdapterLoads`: what operators have asked to be loaded and is not done yet, and whose word counts.

The last word about a name counts. What is done with a name therefore calls off whatever was asked for it before and is still under way:
else that would come back over it, once it has had room or its turn.

To ask for the same once more is no other word: it joins what waits, and ends as that does.
"""

import itertools
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic

from anabranch.serving.core.adapter_entry import Entry, H

__all__ = ["AdapterLoads", "Load"]


@dataclass(eq=False)
class Load(Generic[H]):
    """One of them.

    Attributes:
        entry: the adapter.
        came: when it was asked for, by a count.
        told: its facts, or why it is not loaded.
        waits_as: the id as which it waits for room or uses it; "" before it does.
    """

    entry: Entry[H]
    came: int
    told: "Future[dict[str, Any]]" = field(default_factory=Future)
    waits_as: str = ""

    def is_same(self, other: "Load[H]") -> bool:
        """Whether both are of one name, and of one place."""
        return self._place == other._place

    @property
    def _place(self) -> tuple[str, str, str | None]:
        return self.entry.name, self.entry.folder, self.entry.root


class AdapterLoads(Generic[H]):
    """See the module. Not for several threads at once.

    Whoever is given a load by `end`, `end_before` or `end_all` is the one that tells it how it ended.
    """

    def __init__(self) -> None:
        # By name, in the order in which they came; no name without any.
        self._loads: dict[str, list[Load[H]]] = {}
        self._serial = itertools.count()

    def begin(self, entry: Entry[H]) -> Load[H]:
        """One more, which nobody can cancel: it goes on also where nobody waits for it any more."""
        load = Load(entry, next(self._serial))
        load.told.set_running_or_notify_cancel()
        self._loads.setdefault(entry.name, []).append(load)
        return load

    def __contains__(self, load: Load[H]) -> bool:
        return load in self._own(load)

    def end(self, load: Load[H]) -> bool:
        """It is under way no more; whether it was."""
        was_there = load in self
        if was_there:
            self._keep(load.entry.name, [other for other in self._own(load) if other is not load])
        return was_there

    def before(self, load: Load[H]) -> Load[H] | None:
        """The last of its name that came before it and is under way; None where there is none."""
        return next((other for other in reversed(self._own(load)) if other.came < load.came), None)

    def join(self, load: Load[H], other: Load[H]) -> None:
        """It is under way no more, and is told what ``other`` of its name is told, which is from now on the word that it was."""
        self.end(load)
        other.came = load.came
        self._keep(load.entry.name, sorted(self._own(load), key=lambda each: each.came))

        def tell(done: "Future[dict[str, Any]]") -> None:
            if (error := done.exception()) is not None:
                load.told.set_exception(error)
            else:
                load.told.set_result(done.result())

        other.told.add_done_callback(tell)

    def end_before(self, load: Load[H]) -> list[Load[H]]:
        """Those of its name that came before it, which are under way no more."""
        own = self._own(load)
        self._keep(load.entry.name, [other for other in own if other.came >= load.came])
        return [other for other in own if other.came < load.came]

    def end_all(self, name: str) -> list[Load[H]]:
        """Those of a name, which are under way no more, in the order in which they came."""
        return self._loads.pop(name, [])

    def _own(self, load: Load[H]) -> list[Load[H]]:
        """Those of its name."""
        return self._loads.get(load.entry.name, [])

    def _keep(self, name: str, own: list[Load[H]]) -> None:
        if own:
            self._loads[name] = own
        else:
            self._loads.pop(name, None)
