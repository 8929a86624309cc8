"""`Senders`: what different senders met at one deployment, which tells its own failures from those that one sender's requests bring about.

a failure                                 is the sender's own while others get answers and none of them fails
one that took too long                    likewise while an answer of any other stands, unless `TIMED_OUT` senders fail
a refusal that may be the request's own   is the deployment's once `REFUSED` senders in a row have met one (403, and 404 without a reason)
"""

# Different senders, in a row, whose requests are refused before that is held against the deployment.
REFUSED = 3

# Different senders whose attempts took too long, and who got no answer since, before that is held against a deployment that answers others.
TIMED_OUT = 8

# Senders that are remembered; those seen last.
KEPT = 1000

# What the gateway's own senders are called together.
OWN = "gateway"


def own_sender(what: str) -> str:
    """The sender of what the gateway asks for itself, such as ``shadow``; others are ``team:``, ``user:`` or ``key:`` and a name."""
    return f"{OWN}:{what}"


def is_own(sender: str) -> bool:
    """Whether it is one of the gateway's own."""
    return sender.startswith(f"{OWN}:")


class Senders:
    """Of one deployment.

    Args:
        window_s: how long what somebody met is looked back on, seconds.
        timed_out: see `TIMED_OUT`.
    """

    def __init__(self, window_s: float, timed_out: int = TIMED_OUT) -> None:
        self._window_s, self._timed_out = window_s, timed_out
        self._refused: set[str] = set()
        # By sender, when that was last.
        self._answered: dict[str, float] = {}
        self._failed: dict[str, float] = {}
        self._doubts: dict[str, float] = {}

    def answered(self, sender: str, now: float) -> None:
        """Somebody got an answer."""
        self._refused.clear()
        self._doubts.clear()
        _note(self._answered, sender, now)

    def failed(self, sender: str, now: float) -> bool:
        """A request failed; whether that says something of the deployment."""
        _note(self._failed, sender, now)
        return self._has_other(self._failed, sender, now) or not self._has_other(self._answered, sender, now)

    def timed_out(self, sender: str, now: float) -> bool:
        """A request took too long, which may be for what it asks for; whether that says something of the deployment.

        Two keys of one owner bring that about as easily as one: so an answer to anybody else outweighs it, as long as that one has not
        failed since, but for so many senders that they are hardly all one.
        """
        _note(self._failed, sender, now)
        oldest, never = now - self._window_s, float("-inf")
        failing = sum(at > oldest and at >= self._answered.get(other, never) for other, at in self._failed.items())
        stands = any(
            at > oldest and at > self._failed.get(other, never)
            for other, at in self._answered.items()
            if other != sender
        )
        return failing >= self._timed_out or not stands

    def doubted(self, sender: str, now: float) -> bool:
        """A request was refused for what may be the deployment's own fault; whether that casts doubt on it: see `failed`."""
        _note(self._doubts, sender, now)
        return self._has_other(self._doubts, sender, now) or not self._has_other(self._answered, sender, now)

    def refused(self, sender: str) -> bool:
        """A request was refused, which may be for what is in it; whether that says something of the deployment after all."""
        self._refused.add(sender)
        if len(self._refused) < REFUSED:
            return False
        self._refused.clear()
        return True

    def _has_other(self, seen: dict[str, float], sender: str, now: float) -> bool:
        oldest = now - self._window_s
        return any(at > oldest for other, at in seen.items() if other != sender)


def _note(seen: dict[str, float], sender: str, now: float) -> None:
    seen.pop(sender, None)
    seen[sender] = now
    if len(seen) > KEPT:
        del seen[next(iter(seen))]
