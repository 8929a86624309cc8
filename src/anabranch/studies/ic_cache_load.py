"""Routing under load: arrivals of the Azure trace, measured qualities and service times, two stations of servers, one policy.

Sixteen servers. A policy that uses one arm has them all; one that routes has twelve for the large arm and four for the small one. Each
arrival is a measured request, drawn at random from those the policies did not learn from. First come, first served.
"""
# Shapes: R measured requests, N arrivals

import csv
import gzip
import heapq
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from anabranch.places import data_file
from anabranch.routers.ic_cache.baselines import StaticThreshold
from anabranch.routers.ic_cache.critic import Critic
from anabranch.routers.ic_cache.router import Router
from anabranch.studies.reading import TRACE

SERVERS, LARGE_SERVERS = 16, 12
ARMS = ("small", "large")

# Share of requests that somebody rates.
ASKED = 0.02


@dataclass(frozen=True)
class Measured:
    """What is known of each request.

    Attributes:
        x_RI: what the bandit sees.
        quality_R2: of the small arm with examples, and of the large one.
        service_R2: seconds on one server.
    """

    x_RI: np.ndarray
    quality_R2: np.ndarray
    service_R2: np.ndarray

    def rows(self, at: np.ndarray) -> "Measured":
        """Some of them."""
        return Measured(self.x_RI[at], self.quality_R2[at], self.service_R2[at])


def arrivals(limit: int | None = None) -> np.ndarray:
    """Seconds since the first of 19,366 conversation requests (Azure LLM inference trace, 2023)."""
    with gzip.open(data_file(TRACE), "rt") as file:
        stamps = [row["TIMESTAMP"][:26] for row in csv.DictReader(file)]
    times = np.array([datetime.fromisoformat(stamp).timestamp() for stamp in stamps[:limit]])
    return np.sort(times) - times.min()


class Station:
    """Servers with one queue.

    Args:
        servers: how many.
    """

    def __init__(self, servers: int) -> None:
        self.servers = servers
        self._free = [0.0] * servers
        self._finish: list[float] = []

    def load(self, now: float) -> float:
        """Requests in it, waiting or served, over servers."""
        while self._finish and self._finish[0] <= now:
            heapq.heappop(self._finish)
        return len(self._finish) / self.servers

    def serve(self, now: float, seconds: float) -> float:
        """Seconds until it is done."""
        start = max(now, heapq.heappop(self._free))
        heapq.heappush(self._free, start + seconds)
        heapq.heappush(self._finish, start + seconds)
        return start + seconds - now


# Context, load of the large station, now -> arm.
Policy = Callable[[np.ndarray, float, float], int]


def ours(train: Measured, seed: int, *, lambda0: float = 1.0) -> tuple[Policy, Router]:
    """The bandit, taught both arms' qualities of the training requests."""
    config = Router.Config(
        critic=Critic.Config(hidden=(128, 64)), lambda0=lambda0, temperature=0.0, explore=0.0, ask_share=0.0
    )
    router = Router(config, ARMS, [0.3, 1.0], train.x_RI.shape[1] - 8, seed=seed)
    random = np.random.default_rng(seed)
    for _ in range(20):
        for row in random.permutation(len(train.x_RI)):
            for arm in (0, 1):
                router.critic.rate(train.x_RI[row], arm, float(train.quality_R2[row, arm]))
            router.critic.train(1)

    def choose(x_I: np.ndarray, load: float, now: float) -> int:
        router.observe_load(load, now)
        return ARMS.index(router.choose(x_I).arm)

    return choose, router


def static(train: Measured, threshold: float) -> Policy:
    """RouteLLM's way: a classifier of "the small one will do", and a fixed threshold."""
    router = StaticThreshold("small", "large", threshold=threshold)
    router.fit(train.x_RI, train.quality_R2[:, 0] >= train.quality_R2[:, 1] - 1e-9)
    return lambda x_I, load, now: ARMS.index(router.choose(x_I))


def make_policy(name: str, train: Measured, seed: int) -> tuple[Policy, Router | None, tuple[int, int]]:
    """A policy by name, its bandit where it is one, and the servers of each arm."""
    if name in ARMS:
        arm = ARMS.index(name)
        return lambda x_I, load, now: arm, None, (SERVERS, SERVERS)
    split = (SERVERS - LARGE_SERVERS, LARGE_SERVERS)
    if name.startswith("static"):
        return static(train, float(name.removeprefix("static"))), None, split
    return (*ours(train, seed, lambda0=0.0 if name == "ours-no-load" else 1.0), split)


def simulate(name: str, measured: Measured, rho: float, seed: int, times: np.ndarray) -> dict[str, float]:
    """Mean quality, latencies in large service times, and the share of the large arm.

    Args:
        name: of the policy.
        measured: requests; half are learned from, half arrive.
        rho: arrivals over what sixteen large servers can do.
        seed: of the halves, the draws and the bandit.
        times: arrivals.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(len(measured.x_RI))
    train, test = measured.rows(order[::2]), measured.rows(order[1::2])
    policy, router, servers = make_policy(name, train, seed)
    stations = [Station(count) for count in servers]
    mean_large = float(test.service_R2[:, 1].mean())
    # So that arrivals are rho of capacity.
    scale = rho * SERVERS / (len(times) / times[-1]) / mean_large
    drawn = random.integers(len(test.x_RI), size=len(times))
    asked = random.random(len(times)) < ASKED
    quality, latency, large = np.zeros(len(times)), np.zeros(len(times)), np.zeros(len(times))
    for number, (now, row) in enumerate(zip(times.tolist(), drawn.tolist(), strict=True)):
        arm = policy(test.x_RI[row], stations[1].load(now), now)
        latency[number] = stations[arm].serve(now, float(test.service_R2[row, arm]) * scale)
        quality[number], large[number] = test.quality_R2[row, arm], arm
        if router is not None and asked[number]:
            router.rate(test.x_RI[row], ARMS[arm], float(test.quality_R2[row, arm]))
    latency /= mean_large * scale
    return {
        "quality": float(quality.mean()),
        "p50": float(np.quantile(latency, 0.5)),
        "p99": float(np.quantile(latency, 0.99)),
        "large": float(large.mean()),
    }


def sweep(
    name: str,
    measured: Measured,
    rhos: tuple[float, ...],
    seed: int,
    progress: Callable[[str], None],
    limit: int | None,
) -> dict[str, float]:
    """`simulate` at each load; metrics are named ``quality@0.5`` and so on."""
    times = arrivals(limit)
    found: dict[str, float] = {}
    for rho in rhos:
        progress(f"load {rho:g}")
        found |= {f"{metric}@{rho:g}": value for metric, value in simulate(name, measured, rho, seed, times).items()}
    return found
