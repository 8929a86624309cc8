"""A rank's connection to the coordinator: what it said that nobody has acted on, and waits that end when it calls.

Every wait of a rank is one of `Control.wait_until`, or of a link that asks `Control.is_called`: whatever it is for, it ends by
`CalledAwayError` when the coordinator announces another layout, or says that training has stopped. No wait has an end of its own: each
beat says for whom a rank waits and how long, so that the coordinator, which hears all, finds the one that holds up the others. A
coordinator that does not answer beats for ``timeout_s`` has stopped as far as this rank is concerned.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from anabranch.cluster.elastic.links import CalledAwayError
from anabranch.cluster.elastic.waiting import BEAT_S, Pulse
from anabranch.cluster.elastic.wire import Body, Channel, Header, connect
from anabranch.errors import AnabranchError, ConfigError, PeerError

__all__ = ["CALLS", "Control", "UnrecoverableError"]

# For so long who leaves waits until the coordinator has heard it.
_PARTING_S = 5.0
# What ends a wait: another layout; or, before training has begun, that one of those who came is gone.
CALLS = ("epoch", "regroup")
# What all who are left must follow, since it holds for the coordinator: a step, and a layout for which all were ready.
DECISIONS = ("commit", "go")
# Of a wait: who or what it is for, as `anabranch.cluster.elastic.waiting` reads it; nothing where it may last.
Of = Callable[[], Header]


class UnrecoverableError(AnabranchError):
    """What was lost is with nobody who is left; the message names the last checkpoint."""


class Control:
    """One rank's.

    Args:
        changed: notified of whatever comes, with which all waits wait.
        timeout_s: after so long a wait is told as a long one, and a coordinator that says nothing counts as gone.
        gives_up: asked once a second while this rank is not in yet; True ends the wait by PeerError.

    Attributes:
        news: what the coordinator said of commits and layouts, oldest first.
        stop: that training has stopped, once it was said.
        answers: by kind, the last word to what this rank asked (``welcome``, ``done``, ``manifest``, ``saved``, ``finished``). Unlike
            news they stay when another layout is announced: what all have done is done, also for who has not looked yet.
        is_in: whether this rank has had a layout.
        epoch: of the layout that this rank acts on.
        noticed_s: when this rank saw that a change was coming that it has not finished.
    """

    def __init__(
        self, changed: threading.Condition, *, timeout_s: float, gives_up: Callable[[], bool] | None = None
    ) -> None:
        self.news: deque[Header] = deque()
        self.stop: Header | None = None
        self.answers: dict[str, Header] = {}
        self.is_in = False
        self.epoch = 0
        self.noticed_s: float | None = None
        self._changed, self._timeout_s = changed, timeout_s
        self._gives_up = gives_up or (lambda: False)
        self._is_closed = self._has_failed = self._stays = False
        self._channel: Channel | None = None
        # What this rank waits for, or None while it works; and since when.
        self._standing: tuple[Of | None, float] = (None, time.monotonic())
        self._heard_s = time.monotonic()

    def connect(self, address: str, secret: bytes) -> None:
        """Open the connection. Raises ConfigError for what is no address, PeerError where nobody answers who knows the secret."""
        where, _, port = address.rpartition(":")
        if not where or not port.isdigit():
            raise ConfigError(f"coordinator is {address!r}; say host:port")
        timeout_s = min(self._timeout_s, 10.0)
        self._channel = connect(
            where.strip("[]"),
            int(port),
            secret,
            timeout_s=timeout_s,
            on_frame=self._on_frame,
            on_close=self._on_close,
            most_body=0,
        )

    def start(self) -> None:
        """Say every half second that this rank lives."""
        threading.Thread(target=self._beat, daemon=True).start()

    def tell(self, kind: str, **more: Any) -> None:
        """Say something to the coordinator."""
        if self._channel is not None:
            self._channel.send({"kind": kind, **more})

    def suspect(self, rank: int) -> None:
        """Tell of a rank whose link broke."""
        if self.noticed_s is None and self.is_in:
            self.noticed_s = time.monotonic()
        self.tell("suspect", epoch=self.epoch, rank=rank)

    def fail(self, error: BaseException, step: int) -> None:
        """Tell by what this rank ends, once; what the coordinator itself said it knows."""
        if self._has_failed or self._is_closed:
            return
        self._has_failed = True
        if self.stop is None:
            self.tell("fail", step=step, why=f"{type(error).__name__}: {error}")

    def part(self, *, is_done: bool) -> bool:
        """Tell that this rank goes; whether it had not told already."""
        if self._is_closed:
            return False
        self._is_closed = True
        if not self._has_failed:
            self.tell("leave" if is_done else "quit")
        return True

    def close(self) -> None:
        """End the connection, when the coordinator has heard all."""
        if self._channel is not None:
            self._channel.close(after_sends=True)
            self._channel.wait_closed(_PARTING_S)

    # Waiting

    def is_called(self) -> bool:
        """Whether what this rank waits for will not come: another layout, or the end."""
        with self._changed:
            return self.stop is not None or any(
                news["kind"] in CALLS and not (self._stays and news.get("is_growth")) for news in self.news
            )

    @contextmanager
    def staying(self) -> Iterator[None]:
        """Nobody is called away by growth while the block lasts: what all do after a step they do in the layout that made it.

        Who comes in with the next step does none of it.
        """
        self._stays = True
        try:
            yield
        finally:
            self._stays = False

    def raise_if_called(self) -> None:
        """Raise CalledAwayError if so."""
        if self.is_called():
            raise CalledAwayError

    def raise_if_stopped(self) -> None:
        """Raise UnrecoverableError or PeerError where training has stopped."""
        if self.stop is None:
            return
        why = str(self.stop["why"])
        if self.stop.get("is_lost"):
            raise UnrecoverableError(f"training cannot go on: {why}")
        raise PeerError(why)

    @contextmanager
    def waiting(self, of: Of | None) -> Iterator[None]:
        """Beats tell of a wait while the block lasts."""
        self._standing = (of or dict, time.monotonic())
        try:
            yield
        finally:
            self._standing = (None, time.monotonic())

    def wait_until(
        self, holds: Callable[[], bool], of: Of | None, *, is_called: bool = False, told: str | None = None
    ) -> None:
        """Until ``holds``. Raises CalledAwayError when called away.

        Args:
            holds: asked with ``changed`` held.
            of: who or what is waited for, which beats tell; None for a wait that may last.
            is_called: whether a rank that is not in yet is called away too.
            told: of a wait before the first beat, which is bounded by the timeout: of what PeerError tells then.
        """
        deadline = time.monotonic() + self._timeout_s
        with self._changed, self.waiting(of):
            while not holds():
                if not self.is_in:
                    self.raise_if_stopped()
                    if self._gives_up():
                        raise PeerError("this rank was told to stop before it was in")
                if self.stop is not None or ((is_called or self.is_in) and self.is_called()):
                    raise CalledAwayError
                if told is not None and time.monotonic() > deadline:
                    raise PeerError(f"{told} in {self._timeout_s:g} s")
                self._changed.wait(1.0)

    def wait_for_news(self, of: Of | None) -> None:
        """Until the coordinator says something of commits or layouts, or that training has stopped."""
        self.wait_until(lambda: bool(self.news) or self.stop is not None, of)

    def ask(self, kind: str, *answers: str, of: Of | None = None, told: str | None = None, **more: Any) -> Header:
        """Tell something, and wait for one of these answers."""
        with self._changed:
            for answer in answers:
                self.answers.pop(answer, None)
        self.tell(kind, **more)
        self.wait_until(lambda: any(answer in self.answers for answer in answers), of, told=told)
        return next(self.answers[answer] for answer in answers if answer in self.answers)

    def agree(self, what: str) -> None:
        """Wait until all ranks of the layout say that they have done ``what``; then it is done for all, whoever is lost.

        Raises CalledAwayError where ranks are lost before: then it is to be done again, in another layout.
        """
        self.ask("done", "done", of=lambda: {"round": what}, epoch=self.epoch, what=what)

    def decided(self, kind: str) -> Header:
        """The next news, which is to be of this kind; CalledAwayError where it is another."""
        self.wait_for_news(lambda: {"what": kind})
        if self.stop is not None or self.news[0]["kind"] != kind:
            raise CalledAwayError
        return self.news.popleft()

    # What comes

    def _beat(self) -> None:
        pulse = Pulse(time.monotonic())
        while not self._is_closed and self._channel is not None and not self._channel.is_closed:
            time.sleep(BEAT_S)
            now = time.monotonic()
            # While this process stands still nobody is silent, and it waits for nobody.
            late_s = pulse.late_s(now)
            self._heard_s = min(self._heard_s + late_s, now)
            with self._changed:
                of, since = self._standing
                since = min(since + late_s, now)
                self._standing = (of, since)
            waits = None if of is None else of()
            self.tell("beat", epoch=self.epoch, waits=waits, is_long=now - since > self._timeout_s)
            if now - self._heard_s > self._timeout_s:
                with self._changed:
                    self.stop = self.stop or {
                        "kind": "stop",
                        "why": f"the coordinator has said nothing for {self._timeout_s:g} s",
                    }
                    self._changed.notify_all()

    def _on_frame(self, channel: Channel, header: Header, body: Body) -> None:
        self._heard_s = time.monotonic()
        with self._changed:
            kind = header["kind"]
            if kind in ("welcome", "done", "manifest", "saved", "finished"):
                self.answers[kind] = header
            elif kind in ("stop", "refuse"):
                self.stop = self.stop or header
            elif kind in CALLS:
                # Whatever was said of an older epoch is over, but for what is decided: the next layout begins from there.
                self.news = deque(news for news in self.news if news["kind"] in DECISIONS)
                self.news.append(header)
            elif kind == "commit":
                self.news.append(header)
                if "live" in header:
                    self.news.append(header["live"])
            elif kind == "go" and int(header["epoch"]) >= self.epoch:
                self.news.append(header)
            self._changed.notify_all()

    def _on_close(self, channel: Channel, why: str) -> None:
        with self._changed:
            if not self._is_closed:
                said = f"the coordinator is gone, or has cast this rank out ({why})"
                self.stop = self.stop or {"kind": "stop", "why": said}
            self._changed.notify_all()
