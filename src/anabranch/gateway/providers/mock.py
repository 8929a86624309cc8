"""A scripted upstream in process, without a socket: for demos and tests. `mock_server` is the same behind HTTP."""

import asyncio
from typing import Any

from anabranch.config import Field, Seed, configclass
from anabranch.gateway.providers.openai import PATHS, unsupported
from anabranch.gateway.providers.provider import (
    Failure,
    Headers,
    HttpCall,
    Provider,
    Reply,
    Transport,
    UpstreamError,
    UpstreamRequest,
    garbage,
)
from anabranch.gateway.providers.scenes import Behaviour, Scene, check_step


class Mock(Provider, kind="mock"):
    """An upstream that answers from a script."""

    stops_when_closed = True
    is_billed = False

    @configclass
    class Config(Provider.Config):
        """How it behaves.

        Attributes:
            latency_s: seconds to the first token.
            tokens_per_s: speed after it; None for all at once.
            tokens: length of an answer.
            reply: what it says; None for words that depend on the prompt.
            logprob: of each token, for those who ask for log-probabilities.
            script: what the first requests get (see `anabranch.gateway.providers.scenes`).
            loops: begin the script again when it ends.
            fails: share of requests that fail, once the script has ended.
            fail_with: how: a step of a script.
            seed: of chance.
        """

        latency_s: float = Field(default=0.0, ge=0)
        tokens_per_s: float | None = Field(default=None, gt=0)
        tokens: int = Field(default=16, ge=2, le=100_000)
        reply: str | None = None
        logprob: float = Field(default=-0.1, le=0)
        script: tuple[str, ...] = ()
        loops: bool = False
        fails: float = Field(default=0.0, ge=0, le=1)
        fail_with: str = "500"
        seed: Seed = 0

        def __post_init__(self) -> None:
            for step in (*self.script, self.fail_with):
                check_step(step)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.behaviour = Behaviour(config)

    def build(self, request: UpstreamRequest) -> HttpCall:
        """As for OpenAI, to nowhere. Raises UpstreamError (``unsupported``) for what it cannot make up: pictures, sound and the like."""
        if request.endpoint not in self.endpoints:
            raise unsupported(f"{request.endpoint} cannot be asked of mock")
        return HttpCall(PATHS[request.endpoint], {}, request.encoded(self.config.model, True))

    def transport(self, http: Transport) -> Transport:
        """Itself."""
        return MockTransport(self.behaviour)


class MockTransport:
    """Plays scenes."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour

    async def open(self, call: HttpCall) -> Reply:
        """The scene of the next request; its status comes with its first bytes."""
        scene = self._behaviour.scene(call.url, call.body)
        if scene.parts and scene.parts[0][0] and "event-stream" not in scene.headers["content-type"]:
            seconds, data = scene.parts[0]
            await asyncio.sleep(seconds)
            scene.parts[0] = (0.0, data)
        return MockReply(scene)


class MockReply:
    """A scene being played."""

    headers: Headers

    def __init__(self, scene: Scene) -> None:
        self.status, self.headers = scene.status, scene.headers
        self._parts, self._ending = list(reversed(scene.parts)), scene.ending
        self._length, self._due = scene.length, 0.0

    def read_ready(self) -> bytes:
        """All that needs no waiting."""
        ready = []
        while self._parts and not self._parts[-1][0]:
            ready.append(self._parts.pop()[1])
        return b"".join(ready)

    async def read_some(self) -> bytes:
        """What comes next."""
        if not self._parts:
            return await self._end()
        seconds, data = self._parts[-1]
        if seconds:
            now = asyncio.get_running_loop().time()
            self._due = self._due or now + seconds
            # Cancelled here, nothing is lost and no time is waited twice.
            await asyncio.sleep(max(self._due - now, 0.0))
            self._due = 0.0
        self._parts.pop()
        return data or await self.read_some()

    async def _end(self) -> bytes:
        if self._ending == "hang":
            await asyncio.Event().wait()
        if self._ending == "reset":
            if self._length is not None:
                raise garbage("the upstream's answer ended early or has another length than it said")
            raise UpstreamError(Failure(kind="cut", message="the upstream broke the connection"))
        return b""

    def close(self) -> None:
        """Stop."""
        self._parts, self._ending = [], "end"
