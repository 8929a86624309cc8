"""Runs that learn together in rounds (``parallel.diloco``), as the trainer sees them: something before a step, and something after it.

anabranch cluster master --listen 0.0.0.0:48148
anabranch train demo --out runs/a --set parallel.diloco.master=10.0.0.1:48148 --set parallel.diloco.every=50 --set parallel.diloco.worker=0
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Self

from torch import nn

from anabranch.bounds import MOST_SEED
from anabranch.cluster.keyed_random import random_key
from anabranch.cluster.pccl import Communicator, DiLoCo, MasterLost, PeerLost
from anabranch.errors import ConfigError
from anabranch.train.config import DiLoCoConfig, RunConfig, TaskRunConfig
from anabranch.train.parallel import Workers
from anabranch.train.task import TaskContext

log = logging.getLogger(__name__)

# Seconds of waiting after which it is said.
_TELL_S = 3.0
_WAITING = "waiting at %s for the runs that this one learns with"


def own_order(context: TaskContext, config: DiLoCoConfig) -> TaskContext:
    """The context by which a worker orders its training data: its number is part of the seed, and that of worker 0 is the run's own."""
    if config.master is None or not config.worker:
        return context
    seed = random_key(context.settings.seed, config.worker) % MOST_SEED
    return replace(context, settings=context.settings.replace(seed=seed))


class Outer:
    """This run among those that it learns with. It joins them before its first step.

    Args:
        config: of ``parallel.diloco``.
        model: whose parameters learn together.

    Attributes:
        is_stopped: whether the run was told to stop, so that it waits for nobody any more.
    """

    def __init__(self, config: DiLoCoConfig, model: nn.Module) -> None:
        self._config, self._model = config, model
        self.is_stopped: Callable[[], bool] = lambda: False
        self._peers: Communicator | None = None
        self._rounds: DiLoCo | None = None

    @classmethod
    def of(cls, config: RunConfig | TaskRunConfig, model: nn.Module, workers: Workers) -> Self | None:
        """That of a run; None where it learns alone. Raises ConfigError for what does not go together."""
        asked, steps = config.parallel.diloco, config.train.steps
        if asked.master is None:
            return None
        if workers.size > 1:
            raise ConfigError(
                f"parallel.diloco.master is {asked.master!r}, and torchrun started {workers.size} processes; runs that learn together in "
                "rounds are one process each"
            )
        if steps % asked.every:
            raise ConfigError(
                f"parallel.diloco.every is {asked.every}, which does not divide train.steps={steps}: the last round would have no end"
            )
        return cls(asked, model)

    def before(self, step: int) -> int | None:
        """Before a step, ``step`` being finished ones. Returns how many the group has finished, which a newcomer goes on from.

        None where the run was told to stop while it waited for others.
        """
        try:
            if self._rounds is None:
                self._rounds = self._joined(step)
            return self._rounds.steps if self._rounds.begin_step() else step
        except (PeerLost, MasterLost):
            if self.is_stopped():
                return None
            raise

    def after(self, *, is_last: bool = False) -> bool:
        """After a step; the last takes what is still on its way, so that what is evaluated and saved is what was trained.

        Where the run was told to stop while it waited for others at the end of a round, its weights stay those that it has trained itself,
        and this returns False.
        """
        assert self._rounds is not None
        with self._own_if_stopped():
            told = self._rounds.end_step()
            if is_last:
                told = self._rounds.finish() or told
            if told is not None:
                log.info("round %d: %d peers, delta %.3g", told.number, told.peers, told.delta_norm)
            return True
        return False

    def finish(self) -> None:
        """At the end of the training, also where it ended with the others' last step: take what is still on its way."""
        if self._rounds is not None:
            with self._own_if_stopped():
                self._rounds.finish()

    @contextlib.contextmanager
    def _own_if_stopped(self) -> Iterator[None]:
        try:
            yield
        except (PeerLost, MasterLost):
            if not self.is_stopped():
                raise
            log.warning(
                "told to stop while others still trained this round: its weights are its own, not the mean of all"
            )

    def close(self) -> None:
        """Leave the others, who go on."""
        if self._peers is not None:
            # First, so that a reduction that waits for others ends.
            self._peers.close()
            self._peers = None
        if self._rounds is not None:
            self._rounds.close()

    def _joined(self, step: int) -> DiLoCo:
        config = self._config
        assert config.master is not None
        # Where nobody else is waited for it is a matter of milliseconds.
        told = threading.Timer(_TELL_S, log.warning, (_WAITING, config.master))
        told.daemon = True
        told.start()
        try:
            self._join(config, config.master)
        finally:
            told.cancel()
        assert self._peers is not None
        return DiLoCo(
            self._model,
            self._peers,
            every=config.every,
            learning_rate=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            quantise=config.quantise,
            asynchronous=config.asynchronous,
            rounds=step // config.every,
            done=step % config.every,
        )

    def _join(self, config: DiLoCoConfig, master: str) -> None:
        self._peers = Communicator(
            master,
            group=config.group,
            pool=config.pool,
            listen=config.listen,
            advertise=config.advertise,
            wait_s=config.wait_s,
            gives_up=lambda: self.is_stopped(),
        ).connect()
        self._peers.wait_for(config.peers)
