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
from anabranch.errors import PeerError
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
    """``completed``: share of survivors' reductions that no loss ended; ``sound``: 1 where all had equal bits and nobody failed;
    ``gap_s``: the longest between two steps.
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
    return {
        "completed": 1 - found.lost / max(found.tries, 1),
        "sound": float(found.is_sound),
        "gap_s": found.longest_gap_s,
        "steps": found.steps,
        "kills": found.kills + found.hangs,
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
    weight between two workers, which is 0.
    """
    data = DataConfig(sequence_length=config.length).build()
    gone = threading.Event()

    def work(number: int, peers: Communicator) -> tuple[nn.Module, int]:
        model = _model(config, data.tokenizer.vocab_size, seed)
        stream = data.train(seed=seed, rank=number, world_size=config.workers + 1)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

        def gradient() -> None:
            batch = stream.next_batch(config.batch)
            optimizer.zero_grad()
            token_loss(model(batch.token_BL), batch.target_BL).backward()

        if config.way == "ddp":
            _learn_each_step(config, model, optimizer, gradient, peers)
        else:
            _learn_in_rounds(config, model, optimizer, gradient, peers, number, gone)
        progress(f"{config.way}: worker {number} is done")
        return model, peers.sent_bytes

    late = [config.workers] if config.way == "churned" else []
    ended = _together(config.workers, work, late=late, gone=gone)
    models = [model for model, _ in ended]
    weights = [torch.cat([value.detach().reshape(-1) for value in model.parameters()]) for model in models]
    return {
        "validation": _validation(config, models[0], data),
        "bytes": statistics.fmean(sent for _, sent in ended),
        "spread": max(float((weight - weights[0]).abs().max()) for weight in weights),
        "workers": len(models),
    }


def _learn_each_step(
    config: Learn, model: nn.Module, optimizer: torch.optim.Optimizer, gradient: Callable[[], None], peers: Communicator
) -> None:
    """Synchronous data parallelism."""
    for _ in range(config.steps):
        gradient()
        gradients = [value.grad for value in model.parameters() if value.grad is not None]
        flat = torch.cat([one.reshape(-1) for one in gradients])
        peers.all_reduce(flat, op="avg")
        for one, part in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
            one.copy_(part.reshape(one.shape))
        optimizer.step()


def _learn_in_rounds(
    config: Learn,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    gradient: Callable[[], None],
    peers: Communicator,
    number: int,
    gone: threading.Event,
) -> None:
    """DiLoCo; of ``churned`` the last worker dies half-way, and the others go on once a newcomer has taken its place."""
    outer = DiLoCo(
        model,
        peers,
        every=config.every,
        quantise="min_max" if config.way == "quantised" else None,
        asynchronous=config.way == "asynchronous",
    )
    churn = config.way == "churned" and number < config.workers
    while outer.steps < config.steps:
        # Between rounds: in the midst of one the newcomer would meet nobody.
        if churn and outer.steps >= config.steps // 2 and outer.steps % config.every == 0:
            if number == config.workers - 1:
                raise _Gone
            gone.wait(_BOUND_S)
            # It hears here that one left: until then it takes the dead one for there.
            peers.update_topology()
            peers.wait_for(config.workers)
            churn = False
        outer.begin_step()
        if outer.steps >= config.steps:
            break
        gradient()
        optimizer.step()
        outer.end_step()
    outer.finish()
    outer.close()


class _Gone(Exception):  # noqa: N818  # a worker's end, not an error
    pass


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
    late: list[int] | None = None,
    gone: threading.Event | None = None,
) -> list[Any]:
    """What ``work`` gave in each of ``count`` peers, threads of this process; those in ``late`` come once ``gone`` is set.

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
            communicator = Communicator(master.address, **settings)
            try:
                if number in (late or []) and gone is not None:
                    gone.wait(_BOUND_S)
                with communicator as peers:
                    if number not in (late or []):
                        peers.wait_for(count)
                    found[number] = work(number, peers)
            except _Gone:
                communicator.close()
                if gone is not None:
                    gone.set()
            except (PeerError, PeerLost) as error:
                errors.append(error)

        threads = [
            threading.Thread(target=peer, args=(number,), daemon=True) for number in (*range(count), *(late or []))
        ]
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
