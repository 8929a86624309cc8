"""All times of a run in one table, and which of them must be below which.

    times = Times(dead_s=60.0)
    times.check()                  # raises where they do not fit together
    times.withdrawn_s              # a sum: after which a vote that was taken back has an answer, or there is no master

The master tells each peer its own three (`heartbeat_s`, `dead_s`, `connect_s`) when it comes; a peer has the rest. What is a sum of others
stands here and nowhere else, and says in its line what it must outlast. `RULES` are what must hold between them: `Times.check` looks at
each, and so does a test that draws times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from anabranch.errors import InputError

__all__ = [
    "ADDRESS_S",
    "AGAIN_S",
    "ASK_S",
    "COUNT_S",
    "CUT_OFF_S",
    "DRAIN_S",
    "HANDSHAKE_S",
    "LOOK_S",
    "REACH_S",
    "RULES",
    "Rule",
    "Times",
]

# In which a connection must have proved itself.
HANDSHAKE_S = 5.0
# For reaching one of several addresses of a name.
ADDRESS_S = 5.0
# For finding the master's addresses and reaching one of them: a resolver whose first server is dead takes as long as a handshake may.
REACH_S = 15.0
# A flood that measures a link is drained for so long after it should have ended, and its sender waits for the count three times as long.
DRAIN_S, COUNT_S = 5.0, 15.0
# Between two calls to a master that is away.
AGAIN_S = 0.2
# Between two looks whether a link or a collective is still wanted.
LOOK_S = 0.05
# Between two questions whether a caller still waits.
ASK_S = 0.25
# After which a machine that no longer answers, with its network, is a connection that has ended, however long its process may be silent.
CUT_OFF_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Times:
    """In seconds.

    Attributes:
        heartbeat_s: the master's: between two signs of life.
        dead_s: the master's: after which a peer without one is dropped, and in which an abort must be answered.
        connect_s: the master's: in which links of a ring must stand; a peer's own where that is shorter.
        idle_s: a peer's: after which a neighbour that does nothing in the midst of a collective is given up. None: 30, or what outlasts
            ``dead_s`` where that is longer.
        master_wait_s: a peer's: for so long a master may be gone.
    """

    heartbeat_s: float = 1.0
    dead_s: float = 5.0
    connect_s: float = 10.0
    idle_s: float | None = None
    master_wait_s: float = 30.0

    # Sums

    @property
    def answer_s(self) -> float:
        """In which an abort must be answered. A peer looks for one each `LOOK_S`, whatever it waits for."""
        return self.dead_s

    @property
    def report_s(self) -> float:
        """In which a peer must say how its links fared: it has ``connect_s`` for them, and those that it waits for began as much later."""
        return 2 * self.connect_s + self.dead_s

    @property
    def absence_s(self) -> float:
        """For so long peers may stay away from a master that was started again: they see at the latest after ``dead_s`` that it is gone."""
        return 2 * self.dead_s + 2 * AGAIN_S

    @property
    def gone_s(self) -> float:
        """After which a peer at the latest says that its master is gone: it sees it, calls for ``master_wait_s``, and a last time."""
        return self.dead_s + self.heartbeat_s + self.master_wait_s + HANDSHAKE_S

    @property
    def withdrawn_s(self) -> float:
        """In which a vote that was taken back has an answer, or the peer knows that there is no master."""
        return self.gone_s + self.dead_s

    @property
    def idle_limit_s(self) -> float:
        """``idle_s`` as it counts: by itself it outlasts ``dead_s``, so that the master finds who hangs, and no neighbour is accused."""
        return max(30.0, 2 * self.dead_s) if self.idle_s is None else self.idle_s

    @property
    def fetch_s(self) -> float:
        """For reaching a peer that has a shared state, its handshake included."""
        return self.connect_s + HANDSHAKE_S

    def check(self) -> None:
        """Raise InputError for times that do not fit together; a rule that is advice alone is left out, see `advice`."""
        for rule in RULES:
            if rule.is_strict and not rule.holds(self):
                raise InputError(rule.told(self))

    def advice(self) -> list[str]:
        """What of them is allowed, and has a consequence that is hardly meant."""
        return [rule.told(self) for rule in RULES if not rule.is_strict and not rule.holds(self)]


@dataclass(frozen=True)
class Rule:
    """That one time is at most another.

    Attributes:
        name: of it.
        less, more: what is compared; each by what it is and how it comes from `Times`.
        why: what happens otherwise.
        is_strict: whether times that break it are refused.
    """

    name: str
    less: tuple[str, Callable[[Times], float]]
    more: tuple[str, Callable[[Times], float]]
    why: str
    is_strict: bool = True

    def holds(self, times: Times) -> bool:
        """Of these times; sums of floats may differ in their last digit."""
        return self.less[1](times) <= self.more[1](times) * (1 + 1e-9)

    def told(self, times: Times) -> str:
        """For people."""
        return f"{self.less[0]} is {self.less[1](times):g} s, and {self.more[0]} {self.more[1](times):g} s: {self.why}"


RULES = (
    Rule(
        "beats",
        ("twice heartbeat_s", lambda times: 2 * times.heartbeat_s),
        ("dead_s", lambda times: times.dead_s),
        "peers that live would be dropped between two signs of life; raise dead_s, or lower heartbeat_s",
    ),
    Rule(
        "aborts",
        ("two looks for an abort", lambda times: 2 * LOOK_S),
        ("the time to answer one", lambda times: times.answer_s),
        "peers that do all right would be dropped after each loss of another; raise dead_s",
    ),
    Rule(
        "links",
        ("links of two peers that begin after each other", lambda times: 2 * times.connect_s + LOOK_S),
        ("the time to report them", lambda times: times.report_s),
        "peers would be dropped whose links stand; raise dead_s",
    ),
    Rule(
        "absence",
        ("the time to see that a master is gone, and to call again", lambda times: times.dead_s + 2 * AGAIN_S),
        ("the time to come back", lambda times: times.absence_s),
        "peers would be dropped that are on their way back",
    ),
    Rule(
        "withdrawn votes",
        ("the time to see that a master is gone for good", lambda times: times.gone_s),
        ("the wait for the answer to a vote that is taken back", lambda times: times.withdrawn_s),
        "the wait would end before it is known",
    ),
    Rule(
        "idle neighbours",
        ("dead_s", lambda times: times.dead_s),
        ("idle_s", lambda times: times.idle_limit_s),
        "neighbours of a peer that hangs are given up before the master has found it",
        is_strict=False,
    ),
)
