"""Movers: both kinds bring the right bytes in any order of wants, keep the budget, and end."""

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from anabranch.errors import DataError
from anabranch.nn import kernels
from anabranch.serving.expertflow.arena import Arena, Kind
from anabranch.serving.expertflow.cache import ExpertCache
from anabranch.serving.expertflow.layout import Expert, Layout
from anabranch.serving.expertflow.mover import Mover
from anabranch.serving.expertflow.native_mover import NativeMover, make_mover
from anabranch.serving.expertflow.policy import make_policy
from anabranch.serving.expertflow.tiers import DequantTier, FileTier, MemoryTier, ThrottledTier, Tier, write_experts
from waiting import until

pytestmark = pytest.mark.skipif(kernels.load() is None, reason="needs a C++ compiler")
LAYERS, EXPERTS, KIND = 3, 8, Kind(32, 32, torch.float32)


def pools() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each number says which expert it is of."""
    number_LE = torch.arange(LAYERS * EXPERTS, dtype=torch.float32).view(LAYERS, EXPERTS, 1, 1)
    return [(one.expand(-1, 64, 32).contiguous(), one.expand(-1, 32, 32).contiguous()) for one in number_LE]


def tiers(name: str, folder: Path) -> Tier:
    if name == "memory":
        return MemoryTier(pools())
    if name == "throttled":
        return ThrottledTier(MemoryTier(pools()), 2e-8)
    tier = write_experts(folder / "experts.bin", pools())
    tier.drop_cache = name == "direct"
    return tier


class Watched:
    """A cache, its mover, and the most bytes that were resident at any event."""

    def __init__(self, tier: Tier, slots: int, policy: str = "plec", native: bool = True) -> None:
        layout = Layout((0, 1, 2), (2,) * LAYERS, (EXPERTS,) * LAYERS, (0,) * LAYERS, (KIND.bytes,))
        self.most = 0
        self.cache = ExpertCache(layout, slots * KIND.bytes, make_policy(policy), self._audit)
        self.arena = Arena([KIND], self.cache.num_slots)
        self.mover = (make_mover if native else Mover)(self.cache, tier, self.arena, workers=3)

    def _audit(self, event: str, expert: Expert, slot: int, resident: int) -> None:
        self.most = max(self.most, resident)

    def step(self, steps: list[list[Expert]]) -> None:
        with self.mover.lock:
            self.cache.begin_step(steps)
            self.mover.pump()
        self.mover.go_on()

    def layer(self, layer: int, wanted: list[Expert]) -> None:
        """As `OffloadEngine` does it, and look at every slot that is given."""
        with self.mover.lock:
            self.mover.check()
            self.cache.begin_layer(layer, wanted)
            self.mover.pump()
        left = len(wanted)
        while left:
            with self.mover.lock:
                while not (ready := self.cache.ready()):
                    self.mover.wait()
                slots = {expert: self.cache.slot_of[expert] for expert in ready}
            self.mover.go_on()
            for expert, slot in slots.items():
                for weight in self.arena.slot(0, slot):
                    assert (weight == expert.pool * EXPERTS + expert.number).all(), expert
            with self.mover.lock:
                self.cache.used(ready)
                self.mover.pump()
            left -= len(ready)


@pytest.fixture
def watched(request: pytest.FixtureRequest) -> Iterator[list[Watched]]:
    made: list[Watched] = []
    yield made
    for one in made:
        one.mover.close()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("policy", ["plec", "lru", "cache_moe", "lru_ahead"])
@pytest.mark.parametrize("name", ["memory", "throttled", "file", "direct"])
def test_random_wants_are_met(name: str, policy: str, native: bool, watched, tmp_path: Path) -> None:
    one = Watched(tiers(name, tmp_path), 9, policy, native)
    watched.append(one)
    assert isinstance(one.mover, NativeMover) == native
    chance = random.Random(f"{name}{policy}")

    def some(layer: int, most: int) -> list[Expert]:
        return [Expert(layer, number) for number in chance.sample(range(EXPERTS), chance.randint(1, most))]

    for _ in range(60):
        wanted = [some(layer, 6) for layer in range(LAYERS)]
        guess = [some(layer, 4) if chance.random() < 0.5 else want for layer, want in enumerate(wanted)]
        one.step([*guess, *(some(layer, 4) for layer in range(LAYERS))])
        for layer, want in enumerate(wanted):
            one.layer(layer, want)
            if chance.random() < 0.3:
                with one.mover.lock:
                    one.cache.expect(LAYERS - 1, some(LAYERS - 1, 4)) if layer < LAYERS - 1 else None
    assert KIND.bytes * 8 <= one.most <= KIND.bytes * 9
    total = one.cache.total()
    assert total.hits + total.late + total.misses == total.accesses
    assert total.loads >= total.misses


def test_a_pass_that_is_given_up_leaves_nothing_behind(watched, tmp_path: Path) -> None:
    one = Watched(tiers("throttled", tmp_path), 6)
    watched.append(one)
    wanted = [[Expert(layer, number) for number in range(3)] for layer in range(LAYERS)]
    for _ in range(5):
        one.step(wanted)
        with one.mover.lock:
            one.cache.begin_layer(0, wanted[0])
            one.mover.pump()
        one.step(wanted)  # nobody has waited for them
        for layer in range(LAYERS):
            one.layer(layer, wanted[layer])


def test_experts_come_while_nobody_asks(watched, tmp_path: Path) -> None:
    one = Watched(tiers("memory", tmp_path), 9)
    watched.append(one)
    named = [[Expert(layer, number) for number in range(3)] for layer in range(LAYERS)]
    one.step(named)

    def are_there() -> bool:
        with one.mover.lock:
            return len(one.cache.resident) == 9

    until(are_there)
    for layer in range(LAYERS):
        one.layer(layer, named[layer])
    assert one.cache.total().hit_rate == 1.0


def test_which_mover_takes_which_tier(watched, tmp_path: Path) -> None:
    class Halved(MemoryTier):
        def load(self, expert, slot):
            yield from super().load(expert, slot)
            slot[0].mul_(0.5)

    table = write_experts(tmp_path / "half.bin", [(w13.half(), w2.half()) for w13, w2 in pools()])
    timed = ThrottledTier(MemoryTier(pools()), 1e-9, clock=lambda: 0.0)
    for tier in (Halved(pools()), DequantTier(pools(), 8), table, timed, ThrottledTier(DequantTier(pools(), 8), 0.0)):
        one = Watched(tier, 6)
        watched.append(one)
        assert type(one.mover) is Mover, type(tier)
    assert isinstance(table, FileTier)


def test_what_fails_natively_is_tried_again_and_told(watched, tmp_path: Path) -> None:
    one = Watched(tiers("file", tmp_path), 6)
    watched.append(one)
    one.mover.retry_s = 1e-4
    path = tmp_path / "experts.bin"
    stored, was = path.read_bytes(), path.stat()
    with path.open("r+b") as file:
        file.truncate(1000)
    one.step([])
    with pytest.raises(DataError, match=r"could not be loaded: .* was written to while it was in use"):
        one.layer(0, [Expert(0, 1)])
    assert one.mover.num_retried == 2
    # The same again, to all appearances.
    path.write_bytes(stored)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    one.step([])
    one.layer(0, [Expert(0, 1)])


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", ["file", "direct", "throttled file"])
def test_experts_of_a_file_that_got_other_numbers_are_refused(name: str, native: bool, watched, tmp_path: Path) -> None:
    """Not even once: those that were read before are of the model, these are not."""
    tier = tiers("direct" if name == "direct" else "file", tmp_path)
    one = Watched(ThrottledTier(tier, 1e-9) if name == "throttled file" else tier, 6, native=native)
    watched.append(one)
    one.mover.retry_s = 1e-4
    assert type(one.mover) is (NativeMover if native else Mover)
    one.step([])
    one.layer(0, [Expert(0, 1)])
    path = tmp_path / "experts.bin"
    was = path.stat()
    with path.open("r+b") as file:
        file.write(bytes(was.st_size))
    # Within the grain of the system's clock, it may be.
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns + 1))
    one.step([])
    with pytest.raises(DataError, match=r"could not be loaded: .* was written to while it was in use"):
        one.layer(1, [Expert(1, 2)])


@pytest.mark.parametrize("native", [True, False])
def test_a_closed_mover_refuses_and_closes_once(native: bool, tmp_path: Path) -> None:
    one = Watched(tiers("throttled", tmp_path), 6, native=native)
    one.step([[Expert(0, 0)]])
    one.mover.close()
    one.mover.close()
    for _ in range(2):
        one.step([[Expert(0, 1)]])  # a step that begins is told by its first layer
        with pytest.raises(DataError, match="closed"):
            one.layer(0, [Expert(0, 3)])


@pytest.mark.parametrize("native", [True, False])
def test_closing_ends_the_wait_of_another_thread(native: bool, tmp_path: Path) -> None:
    told: list[str] = []

    def wanted(one: Watched) -> None:
        one.step([])
        try:
            # Until it is closed.
            while True:
                one.layer(0, [Expert(0, number) for number in range(EXPERTS)])
        except DataError as error:
            told.append(str(error))

    for turn in range(5):
        one = Watched(ThrottledTier(MemoryTier(pools()), 2e-7), 6, native=native)
        thread = threading.Thread(target=wanted, args=(one,))
        thread.start()
        threading.Event().wait(0.01 * turn)
        one.mover.close()
        thread.join(60)
        assert not thread.is_alive()
    assert len(told) == 5
    assert all("closed" in text for text in told)
