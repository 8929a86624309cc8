"""`PolicyEngine`: the engine of `anabranch serve` in this process, which plays episodes with the weights that learn.

Episodes run side by side, by continuous batching: whoever has written its turn is answered and goes on, while the others write. Tokens come
from the engine and go back to it as they are. Weights are those of the model that learns, in their place: the engine's modules are the
model's, and what its compiled step has packed is written anew (`refresh`), with no engine made again and nothing loaded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from anabranch.errors import AnabranchError, InputError
from anabranch.lm.decoder import Decoder
from anabranch.lm.generate import evaluating
from anabranch.rl.tokens.trajectory import Route, Trajectory
from anabranch.rl.tokens.world import Play, Told
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.batch import Chunk
from anabranch.serving.core.request import Finish, Output, Request, Sampling
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.explained import TokenRoute
from anabranch.serving.engine.messages import Abort, Add, Close, Event, Refused
from anabranch.serving.engine.runner import ModelRunner

__all__ = ["Drawn", "PolicyEngine"]

_BLOCK = 16
# Episodes of a world that waits whose steps are made at a time.
_AT_A_TIME = 10


@dataclass(frozen=True)
class Drawn:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the likeliest.
        top_p: among the likeliest that reach it.
        turn_tokens: most of a turn.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    turn_tokens: int = 128


class RecordingRunner(ModelRunner):
    """A runner that keeps where every token of a request was sent, those of its prompt too.

    Attributes:
        seen: {id: {place: {layer: experts}}} of requests that asked for it.
    """

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.seen: dict[str, dict[int, TokenRoute]] = {}

    def _routes(self, chunks: Sequence[Chunk]) -> dict[int, TokenRoute]:
        routes: dict[int, TokenRoute] = {}
        row = 0
        for chunk in chunks:
            if chunk.id in self.requests.recorded:
                of_request = self.seen.setdefault(chunk.id, {})
                for place in range(len(chunk.tokens)):
                    routes[row + place] = of_request.setdefault(chunk.start + place, TokenRoute())
            row += len(chunk.tokens)
        return routes


@dataclass
class _Turn:
    """A turn under way."""

    number: int
    episode: Trajectory
    play: Play
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    is_over: bool = False


class PolicyEngine:
    """See the module.

    Args:
        model: whose weights act; it may learn in between, in its place.
        slots: episodes that run at a time.
        max_positions: longest episode.
        records: keep where tokens are sent.
        batched_tokens: of a step.

    Attributes:
        layers: numbers of the layers that route, where ``records``; none for a dense model.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        slots: int = 64,
        max_positions: int = 2048,
        records: bool = False,
        batched_tokens: int = 2048,
    ) -> None:
        self.model = model
        self.max_positions = min(max_positions, model.config.max_positions)
        # For as many as run, whole, so that none ever waits for another's end.
        blocks = (slots + 1) * (-(-self.max_positions // _BLOCK))
        config = ServingConfig(
            max_seqs=slots,
            num_blocks=blocks,
            block_tokens=_BLOCK,
            max_batched_tokens=batched_tokens,
            max_positions=self.max_positions,
            # Each step's tokens are looked at before the next is formed, so that a turn ends where it ends.
            scheduling="sync",
            # What was computed for others was recorded for them alone.
            prefix_cache=not records,
        )
        self._records = records
        self._engine = Engine.of(model, config, make_runner=RecordingRunner)
        self._loop = self._engine.loop(self._take)
        self.layers = tuple(sorted(self._engine.runner.tap.layers)) if records else ()
        self._turns: dict[str, _Turn] = {}
        self._drawn, self._seeds = Drawn(), [0]
        self._count = 0
        self._waiting: dict[Future[Told], _Turn] = {}
        # What a world raised, the first of it.
        self._failed: Exception | None = None
        self._threads: ThreadPoolExecutor | None = None

    def refresh(self) -> None:
        """Act with the weights as they are now."""
        runner = self._engine.runner
        if runner.fast is not None:
            runner.fast.reread()
        self._engine.scheduler.reset_prefixes()

    def play(
        self,
        plays: Sequence[Play],
        seeds: Sequence[int],
        drawn: Drawn,
        *,
        waits: bool = False,
        over: threading.Event | None = None,
    ) -> list[Trajectory]:
        """Play episodes to their ends.

        Args:
            plays: the episodes.
            seeds: of what is drawn in each.
            drawn: how.
            waits: worlds take long to answer: they do in threads, while others write.
            over: set, and left so, where the episodes end by an error or an interruption.

        Raises InputError for a prompt that leaves no room for a turn, none is cut; AnabranchError if the engine fails, whose cause is what
        it failed by, and which it has ended with; and whatever a world raises, once the calls of other episodes that are under way have
        ended. The engine can be used again after that. An interruption (KeyboardInterrupt) is raised at once: whoever closes the world
        ends those calls.
        """
        for number, play in enumerate(plays):
            self._check(number, play)
        self._drawn, self._seeds = drawn, list(seeds)
        self._threads = ThreadPoolExecutor(_AT_A_TIME) if waits else None
        episodes = [Trajectory(tuple(play.prompt)) for play in plays]
        self._failed = None
        is_interrupted = False
        try:
            with evaluating(self.model):
                for number, (play, episode) in enumerate(zip(plays, episodes, strict=True)):
                    self._begin(number, play, episode)
                self._run()
        except BaseException as error:
            is_interrupted = not isinstance(error, Exception)
            if over is not None:
                over.set()
            raise
        finally:
            if self._threads is not None:
                self._threads.shutdown(wait=not is_interrupted, cancel_futures=True)
            self._threads = None
            self._turns.clear()
            self._waiting.clear()
            self._seen.clear()
        for play, episode in zip(plays, episodes, strict=True):
            episode.outcome = play.outcome()
        return episodes

    def _check(self, number: int, play: Play) -> None:
        if len(play.prompt) >= self.max_positions:
            raise InputError(
                f"the prompt of episode {number} has {len(play.prompt):,} tokens, and the policy reads {self.max_positions:,} with what it "
                "writes; nothing is cut: use a shorter question"
            )

    def close(self) -> None:
        """Free what the engine holds."""
        self._loop.put(Close())
        self._loop.run()

    # Turn by turn

    @property
    def _seen(self) -> dict[str, dict[int, TokenRoute]]:
        runner = self._engine.runner
        assert isinstance(runner, RecordingRunner)
        return runner.seen

    def _run(self) -> None:
        while True:
            try:
                self._loop.run(until_idle=True)
            except AnabranchError:
                raise
            except Exception as error:
                raise AnabranchError(f"the engine failed: {type(error).__name__}: {error}") from error
            if self._failed is not None:
                raise self._failed
            if not self._waiting:
                return
            done, _ = wait(self._waiting, return_when=FIRST_COMPLETED)
            for future in done:
                self._settle(self._waiting.pop(future), future.result)

    def _begin(self, number: int, play: Play, episode: Trajectory) -> None:
        """A turn of an episode; none where there is no room for it."""
        ids = episode.ids
        room = self.max_positions - len(ids)
        if room < 1:
            episode.is_cut = True
            return
        self._count += 1
        id = f"{self._count}"
        self._turns[id] = _Turn(number, episode, play)
        sampling = Sampling(
            max_tokens=min(self._drawn.turn_tokens, room),
            temperature=self._drawn.temperature,
            top_p=self._drawn.top_p,
            # Of the episode and the turn.
            seed=(self._seeds[number] + 0x9E3779B97F4A7C15 * episode.turns) % 2**63,
            ignore_eos=True,
            logprobs=0,
        )
        self._loop.put(Add(Request(id=id, prompt=ids, sampling=sampling, record_routing=self._records)))

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Refused):
                self._stop(event.reason)
            if isinstance(event, Output):
                self._write(event)
        # Between two steps: who has been answered goes on at once.
        for future in [future for future in self._waiting if future.done()]:
            self._settle(self._waiting.pop(future), future.result)

    def _write(self, output: Output) -> None:
        turn = self._turns.get(output.id)
        if turn is None:
            return
        if output.engine_failed:
            # `_run` is told what it was: an interruption is no error.
            return
        if output.finish is Finish.ERROR:
            raise AnabranchError(output.error or "the engine gave no reason for an error")
        for token, said in zip(output.tokens, output.logprobs, strict=True):
            turn.tokens.append(token)
            turn.log_probs.append(said.logprob)
            if turn.play.ends(turn.tokens):
                turn.is_over = True
                break
        if output.finish is None and not turn.is_over:
            return
        del self._turns[output.id]
        if output.finish is None:
            self._loop.put(Abort(output.id))
        self._end(output.id, turn)

    def _end(self, id: str, turn: _Turn) -> None:
        """A turn is written: have the world answer it."""
        episode, written = turn.episode, tuple(turn.tokens)
        _keep_routes(episode.routes, self._seen.pop(id, {}))
        episode.write(turn.tokens, turn.log_probs)
        if self._failed is not None:
            return
        if self._threads is None:
            self._settle(turn, partial(turn.play.step, written))
        else:
            self._waiting[self._threads.submit(turn.play.step, written)] = turn

    def _settle(self, turn: _Turn, told: Callable[[], Told]) -> None:
        """Go on with what the world says. One that fails ends all episodes, and not the engine, in whose loop this may be."""
        try:
            said = told()
        except Exception as error:
            self._stop(error)
            return
        if self._failed is None:
            self._answered(turn, said)

    def _stop(self, error: Exception) -> None:
        self._failed = self._failed or error
        for id in self._turns:
            self._loop.put(Abort(id))
        self._turns.clear()

    def _answered(self, turn: _Turn, told: Told) -> None:
        """Go on with what the world says, as far as there is room for it: the model has no further places."""
        episode, room = turn.episode, self.max_positions - len(turn.episode.ids)
        episode.told(told.tokens[:room])
        if len(told.tokens) > room:
            episode.is_cut = True
        elif not told.is_done:
            self._begin(turn.number, turn.play, episode)


def _keep_routes(kept: dict[int, Route], seen: Mapping[int, Mapping[Any, Any]]) -> None:
    """Add where tokens were sent; of a place that came by twice, where it was sent first: that is what the tokens behind it saw."""
    for place, route in seen.items():
        kept.setdefault(place, {layer: experts for layer, experts in route.items() if isinstance(layer, int)})
