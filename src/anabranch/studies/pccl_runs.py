"""The runs of the study of PCCL (`anabranch.studies.pccl`): a config and a function for each part."""
# Shapes: B sequences, L positions, N peers, V tokens of a vocabulary

import itertools
import socket
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from anabranch.cluster.pccl import Communicator, DiLoCo, Master, PeerLost, Reduction
from anabranch.cluster.pccl.churn import churn
from anabranch.cluster.pccl.relay import Relay
from anabranch.cluster.pccl.tours import best_tour, tour_cost
from anabranch.config import Config, configclass
from anabranch.data import DataConfig
from anabranch.data.config import Data
from anabranch.errors import ConfigError, PeerError
from anabranch.studies.gpipe_runs import token_loss
from anabranch.studies.harness import Metrics, Progress

Way = Literal["ddp", "diloco", "quantised", "asynchronous", "churned"]
# No wait of a study is longer.
_BOUND_S = 600.0


@configclass
class Churn(Config):
    """Peers and the master of a run killed at random."""

    seconds: float = 180.0
    peers: int = 8
    least: int = 3
    every: tuple[float, float] = (0.3, 1.5)
    master_every: float = 30.0


@configclass
class Rings(Config):
    """Tours over drawn bandwidths, against all tours; counted, nothing is sent."""

    draws: int = 200
    peers: int = 6
    # Of a slow direction, over a usual one.
    slow: float = 0.2


@configclass
class Far(Config):
    """Two peers a long way apart: relays that pass on bytes later, a window of them at a time."""

    delay_s: float = 0.05
    window: int = 1 << 17
    numbers: int = 1 << 20
    connections: tuple[int, int] = (1, 8)
    repeats: int = 3


@configclass
class Hidden(Config):
    """Rounds of steps that sleep, beside deltas over a paced link: how much of their way asynchronous rounds hide."""

    rounds: int = 6
    every: int = 10
    step_s: float = 0.05
    numbers: int = 1 << 18
    # Bytes a second of a peer's link.
    rate: float = 4e6


@configclass
class Learn(Config):
    """A small language model of text, learned by several workers."""

    way: Way
    workers: int = 4
    steps: int = 500
    every: int = 50
    width: int = 64
    layers: int = 2
    batch: int = 8
    length: int = 64
    # Of churned: rounds that the others do by themselves after the one in which a worker died.
    absent: int = 0

    def content_digest(self) -> str:
        """Of the text that is learned."""
        return DataConfig(sequence_length=self.length).content_digest()


def run(config: Any, seed: int, progress: Progress) -> Metrics:
    """One arm, one seed."""
    if isinstance(config, Churn):
        return run_churn(config, seed, progress)
    if isinstance(config, Rings):
        return run_rings(config, seed)
    if isinstance(config, Far):
        return run_far(config)
    return run_hidden(config) if isinstance(config, Hidden) else run_learn(config, seed, progress)


def run_churn(config: Churn, seed: int, progress: Progress) -> Metrics:
    """``completed``: share of survivors' steps that were done in time, if need be again with those who were left, ``recovered`` the same of
    those that a loss interrupted (None where there was none); ``uninterrupted``: share of tries that no loss ended; ``sound``: 1 where all
    had equal bits, nobody failed and all who hung heard that they were out; ``gap_s``: the longest between two steps of the group.
    """
    found = churn(
        seconds=config.seconds,
        peers=config.peers,
        least=config.least,
        every=config.every,
        master_every=config.master_every,
        seed=seed,
        on_event=progress,
    )
    for error in (*found.errors, *(f"other bits at step {revision}" for revision in found.differing[:5])):
        progress(error)
    return {
        "completed": found.completed / max(found.begun, 1),
        "recovered": found.recovered / found.interrupted if found.interrupted else None,
        "uninterrupted": 1 - found.lost / max(found.tries, 1),
        "sound": float(found.is_sound),
        "gap_s": found.longest_gap_s,
        "steps": found.steps,
        "begun": found.begun,
        "interrupted": found.interrupted,
        "kills": found.kills,
        "hangs": found.hangs,
        "woken": found.woken,
        "starts": found.starts,
        "master_kills": found.master_kills,
    }


def run_rings(config: Rings, seed: int) -> Metrics:
    """``off``: the largest relative difference of a tour's cost from the cheapest of all; ``searched_off``: the same of the search that is
    for many places; ``gain``: median ratio of the slowest links, tour over order of arrival, where one direction in each order is slow.
    """
    generator = np.random.default_rng(seed)
    off, searched, gains = 0.0, 0.0, []
    for draw in range(config.draws):
        rate_NN = generator.uniform(100, 1000, (config.peers, config.peers))
        place = int(generator.integers(config.peers))
        rate_NN[place, (place + 1) % config.peers] *= config.slow
        cost_NN = np.where(np.eye(config.peers, dtype=bool), 0.0, 1000 / rate_NN)
        cheapest = min(tour_cost(cost_NN, (0, *rest)) for rest in itertools.permutations(range(1, config.peers)))
        tour = best_tour(cost_NN)
        off = max(off, tour_cost(cost_NN, tour) / cheapest - 1)
        if draw < 20:
            found = best_tour(cost_NN, exact_to=0, budget_s=0.05, seed=seed)
            searched = max(searched, tour_cost(cost_NN, found) / cheapest - 1)
        slowest = [
            min(rate_NN[a, b] for a, b in zip(order, np.roll(order, -1), strict=True))
            for order in (tour, range(config.peers))
        ]
        gains.append(slowest[0] / slowest[1])
    return {"off": off, "searched_off": searched, "gain": float(statistics.median(gains))}


def run_far(config: Far) -> Metrics:
    """``gain``: times of one connection over those of several, for the same bytes."""
    taken = {}
    parts = max(config.connections)
    for pool in config.connections:

        def work(number: int, peers: Communicator) -> list[float]:
            chunks = torch.zeros(config.numbers).chunk(parts)
            times = []
            # The first makes the links.
            for _ in range(config.repeats + 1):
                begin = time.perf_counter()
                peers.all_reduce_many(
                    [Reduction(chunk, tag=tag) for tag, chunk in enumerate(chunks)], max_in_flight=parts
                )
                times.append(time.perf_counter() - begin)
            return times[1:]

        taken[pool] = statistics.median(_together(2, work, pool=pool, delay_s=config.delay_s, window=config.window)[0])
    one, several = (taken[pool] for pool in config.connections)
    return {"gain": one / several, "one_s": one, "several_s": several}


def run_hidden(config: Hidden) -> Metrics:
    """``hidden``: share of the time beyond the steps themselves that asynchronous rounds save."""

    def rounds(asynchronous: bool) -> float:
        def work(number: int, peers: Communicator) -> float:
            outer = DiLoCo(
                nn.Linear(config.numbers, 1, bias=False), peers, every=config.every, asynchronous=asynchronous
            )
            times = []
            for _ in range(config.rounds):
                begin = time.perf_counter()
                for _ in range(config.every):
                    outer.begin_step()
                    time.sleep(config.step_s)
                    outer.end_step()
                times.append(time.perf_counter() - begin)
            outer.finish()
            outer.close()
            # The first has nothing on its way.
            return statistics.median(times[1:])

        return max(_together(2, work, rate=config.rate))

    train_s = config.every * config.step_s
    waits = {asynchronous: rounds(asynchronous) - train_s for asynchronous in (False, True)}
    return {"hidden": 1 - waits[True] / waits[False], "plain_wait_s": waits[False], "asynchronous_wait_s": waits[True]}


def run_learn(config: Learn, seed: int, progress: Progress) -> Metrics:
    """``validation``: nats per token after training; ``bytes``: that a worker sent, on average; ``spread``: the largest difference of a
    weight between two workers, which is 0; ``least_world``: workers in the smallest of all reductions.

    Raises ConfigError for a death after which nobody is absent, PeerError where the death was not one in the midst of a reduction.
    """
    is_churned = config.way == "churned"
    if is_churned and not 1 <= config.absent <= config.steps // config.every - config.steps // 2 // config.every - 1:
        raise ConfigError(
            f"absent is {config.absent}; of churned the others do 1 round or more without the one that died, and one more with a newcomer"
        )
    data = DataConfig(sequence_length=config.length).build()
    death = _Death(config.workers - 1, config.workers) if is_churned else None

    def work(number: int, peers: Communicator) -> tuple[nn.Module, int, int]:
        model = _model(config, data.tokenizer.vocab_size, seed)
        stream = data.train(seed=seed, rank=number, world_size=config.workers + 1)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

        def gradient() -> None:
            batch = stream.next_batch(config.batch)
            optimizer.zero_grad()
            token_loss(model(batch.token_BL), batch.target_BL).backward()

        if config.way == "ddp":
            least = _learn_each_step(config, model, optimizer, gradient, peers)
        else:
            least = _learn_in_rounds(config, model, optimizer, gradient, peers, number, death)
        progress(f"{config.way}: worker {number} is done")
        return model, peers.sent_bytes, least

    ended = _together(config.workers, work, death=death)
    models = [model for model, _, _ in ended]
    least_world = min(least for _, _, least in ended)
    if least_world != config.workers - is_churned or len(models) != config.workers:
        raise PeerError(
            f"the smallest reduction had {least_world} workers, and {len(models)} have ended: of {config.workers} "
            f"{'one was to die in the midst of a reduction, and another to come' if is_churned else 'none was to be lost'}"
        )
    weights = [torch.cat([value.detach().reshape(-1) for value in model.parameters()]) for model in models]
    return {
        "validation": _validation(config, models[0], data),
        "bytes": statistics.fmean(sent for _, sent, _ in ended),
        "spread": max(float((weight - weights[0]).abs().max()) for weight in weights),
        "workers": len(models),
        "least_world": least_world,
    }


def _learn_each_step(
    config: Learn, model: nn.Module, optimizer: torch.optim.Optimizer, gradient: Callable[[], None], peers: Communicator
) -> int:
    """Synchronous data parallelism. Returns how many workers were in the smallest reduction, at most all."""
    least = config.workers
    for _ in range(config.steps):
        gradient()
        gradients = [value.grad for value in model.parameters() if value.grad is not None]
        flat = torch.cat([one.reshape(-1) for one in gradients])
        least = min(least, peers.all_reduce(flat, op="avg").world)
        for one, part in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
            one.copy_(part.reshape(one.shape))
        optimizer.step()
    return least


def _learn_in_rounds(
    config: Learn,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    gradient: Callable[[], None],
    peers: Communicator,
    number: int,
    death: "_Death | None",
) -> int:
    """DiLoCo; of ``churned`` the last worker dies in the reduction of the round that ends half-way. The others reduce that round again, do
    the next ones by themselves, and then wait until a newcomer is there. Returns how many were in the smallest reduction, at most all.
    """
    outer = DiLoCo(
        model,
        peers,
        every=config.every,
        quantise="min_max" if config.way == "quantised" else None,
        asynchronous=config.way == "asynchronous",
    )
    half = config.steps // 2 // config.every * config.every
    # Of who was there from the beginning.
    again = half + config.absent * config.every if death is not None and number < config.workers else -1
    least = config.workers
    while outer.steps < config.steps:
        if death is not None and number == death.number and outer.steps == half - 1:
            death.is_due.set()
        if outer.steps == again:
            peers.wait_for(config.workers)
        is_met = outer.begin_step()
        if death is not None and is_met and outer.steps == again - config.every:
            # Those who wait were let in already: it comes to the next.
            death.is_over.set()
        if outer.steps >= config.steps:
            break
        gradient()
        optimizer.step()
        if (told := outer.end_step()) is not None and told.peers:
            least = min(least, told.peers)
    if (told := outer.finish()) is not None:
        least = min(least, told.peers)
    outer.close()
    return least


class _Gone(BaseException):
    """A worker's end, as by kill -9."""


class _Death:
    """Of worker ``number``, in the midst of its next reduction once it ``is_due``; worker ``late`` comes once it ``is_over``."""

    def __init__(self, number: int, late: int) -> None:
        self.number, self.late = number, late
        self.is_due, self.is_over = threading.Event(), threading.Event()

    def __call__(self, moment: str) -> None:
        """Before what a peer is about to do: in the ring its neighbours wait for it."""
        if moment == "ring" and self.is_due.is_set():
            raise _Gone


def _model(config: Learn, vocabulary: int, seed: int) -> nn.Sequential:
    # Models are made one at a time: the generator is the process's.
    with _MAKING, torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Embedding(vocabulary, config.width),
            *(_Causal(config.width) for _ in range(config.layers)),
            nn.LayerNorm(config.width),
            nn.Linear(config.width, vocabulary),
        )


_MAKING = threading.Lock()


class _Causal(nn.Module):
    """A block of attention and feed-forward that sees what came before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        made: Tensor = self.layer(x, src_mask=mask, is_causal=True)
        return made


@torch.no_grad()
def _validation(config: Learn, model: nn.Module, data: Data) -> float:
    model.eval()
    total, count = 0.0, 0
    for batch in data.validation(batch_size=config.batch, num_windows=16 * config.batch):
        total += float(token_loss(model(batch.token_BL), batch.target_BL)) * len(batch.token_BL)
        count += len(batch.token_BL)
    return total / count


def _together(
    count: int,
    work: Callable[[int, Communicator], Any],
    *,
    pool: int = 1,
    delay_s: float = 0.0,
    window: int = 1 << 20,
    rate: float | None = None,
    death: _Death | None = None,
) -> list[Any]:
    """What ``work`` gave in each of ``count`` peers, threads of this process; with a ``death`` one of them dies, and one more comes.

    With a delay or a rate each is reached through a relay alone.
    """
    found: dict[int, Any] = {}
    errors: list[BaseException] = []
    with ExitStack() as stack:
        master = stack.enter_context(Master("127.0.0.1:0", secret=""))

        def peer(number: int) -> None:
            settings: dict[str, Any] = {"pool": pool, "secret": ""}
            if delay_s or rate:
                # The relay knows where to once the peer listens, and the peer must say where the relay is: a port is chosen before.
                port = _free_port()
                relay = stack.enter_context(Relay(("127.0.0.1", port), delay_s=delay_s, window=window, rate=rate))
                settings |= {"listen": f"127.0.0.1:{port}", "advertise": f"127.0.0.1:{relay.port}"}
            if death is not None and number == death.number:
                settings["before"] = death
            communicator = Communicator(master.address, **settings)
            try:
                if death is not None and number == death.late:
                    death.is_over.wait(_BOUND_S)
                    communicator.connect()
                else:
                    communicator.connect().wait_for(count)
                found[number] = work(number, communicator)
            except _Gone:
                # Its sockets are cut, and it says no word of leaving.
                communicator._die()
            except (PeerError, PeerLost) as error:
                errors.append(error)
            finally:
                communicator.close()

        late = [] if death is None else [death.late]
        threads = [threading.Thread(target=peer, args=(number,), daemon=True) for number in (*range(count), *late)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_BOUND_S)
    if errors:
        raise errors[0]
    return [found[number] for number in sorted(found)]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
