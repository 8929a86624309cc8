"""Processes that are killed, hang and start at random: whoever is left goes on."""

import itertools
import random
import signal

import pytest

from anabranch.cluster.pccl import churn as storms
from anabranch.cluster.pccl.churn import STEP_S, _Storm, churn, peer_of_churn
from anabranch.cluster.pccl.master import Master
from anabranch.errors import InputError


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_run_outlives_its_peers_and_its_master(seed):
    told = []
    found = churn(seconds=15, peers=5, every=(0.2, 0.8), master_every=5.0, numbers=300, seed=seed, on_event=told.append)
    assert found.errors == ()
    assert found.differing == ()
    assert found.is_sound
    assert found.kills + found.hangs >= 3
    assert found.starts >= 3
    assert found.master_kills >= 1
    assert len(told) == found.kills + found.hangs + found.woken + found.starts + found.master_kills
    assert found.recovered <= found.interrupted <= found.begun
    assert 0 < found.completed <= found.begun
    # The bound on a hang: a peer that is dead for 2 s is dropped, and 2 s more.
    assert found.longest_gap_s < 15


@pytest.mark.slow
def test_a_master_that_drops_nobody_is_found_out(monkeypatch):
    """The gap could not be long: who hung was killed after exactly the time in which the master was to drop it."""

    def never(self, address):
        return Master(address, journal=self.folder / "journal", heartbeat_s=0.4, dead_s=600.0).start()

    monkeypatch.setattr(_Storm, "_new_master", never)
    found = churn(seconds=8, peers=4, every=(0.3, 0.6), hangs=1.0, seed=1)
    assert found.hangs >= 1
    assert found.longest_gap_s > STEP_S
    # And it lets one that was gone for so long go on as if nothing had been.
    assert found.woken == sum("did not hear that it was out" in error for error in found.errors)
    assert found.is_sound == (not found.woken)


class Clock:
    """Time that goes on where somebody sleeps."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class FakeRanks:
    """Processes that do what is expected of peers: a step at once, and the end where they wake and were dropped."""

    made, hears = [], True

    def __init__(self, world, function, address, folder, numbers, **_):
        self.folder, self.number, self.signals = storms.Path(folder), 0, []
        FakeRanks.made.append(self)
        for _ in range(world):
            self.join(function)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def join(self, function, *_):
        (self.folder / f"{self.number}.steps").write_text(f"begin 1.0 .\ndone {self.number + 1} aa 2.0 0 .\n")
        self.number += 1
        return self.number - 1

    def expect_end(self, number):
        pass

    def kill(self, number, sign=signal.SIGKILL):
        self.signals.append((storms.time.monotonic(), number, sign))
        if sign == signal.SIGCONT and self.hears:
            with open(self.folder / f"{number}.steps", "a") as notes:
                notes.write("kicked .\n")

    def wait(self):
        pass


@pytest.fixture
def faked(monkeypatch):
    monkeypatch.setattr(storms, "time", Clock())
    monkeypatch.setattr(storms, "Ranks", FakeRanks)
    monkeypatch.setattr(FakeRanks, "made", [])
    restarts = []
    monkeypatch.setattr(_Storm, "_restart_master", lambda self: restarts.append(storms.time.monotonic()))
    return restarts


@pytest.mark.parametrize("seed", range(5))
def test_who_hangs_is_left_to_the_master(faked, seed):
    found = churn(seconds=120, peers=6, hangs=1.0, master_every=5.0, seed=seed)
    (ranks,) = FakeRanks.made
    stops = {number: when for when, number, sign in ranks.signals if sign == signal.SIGSTOP}
    ended = {number: (when, sign) for when, number, sign in ranks.signals if sign != signal.SIGSTOP}
    # All of them to the end, and some of each kind.
    assert stops.keys() <= ended.keys()
    assert all(ended[number][0] - when >= 3 * storms._DEAD_S for number, when in stops.items())
    assert {ended[number][1] for number in stops} == {signal.SIGKILL, signal.SIGCONT}
    assert (found.hangs, found.errors) == (len(stops), ())
    # One bound at a time.
    times = sorted(stops.values())
    assert all(later - earlier > storms._DEAD_S for earlier, later in itertools.pairwise(times))
    assert faked
    assert not [1 for when in times for restart in faked if 0 <= restart - when <= storms._DEAD_S]
    # A death of which the master had not heard yet took the time of a master's and of a peer's together.
    deaths = [when for when, _, sign in ranks.signals if sign == signal.SIGKILL]
    assert not [1 for when in deaths for restart in faked if abs(restart - when) < 1.0]


def test_who_wakes_and_goes_on_as_if_nothing_had_been_is_told(faked, monkeypatch):
    monkeypatch.setattr(FakeRanks, "hears", False)
    found = churn(seconds=60, peers=6, hangs=1.0, seed=0)
    assert len(found.errors) == found.woken > 0
    assert not found.is_sound


@pytest.mark.parametrize(("every", "is_ended"), [(None, False), (1e5, False), (2.0, True)])
def test_the_master_is_ended_only_where_it_was_asked(faked, monkeypatch, every, is_ended):
    """For never it was, where the last strike came to its end a second late."""
    monkeypatch.setattr(_Storm, "_strike", lambda self, ranks, arguments: storms.time.sleep(5))
    churn(seconds=12, peers=4, master_every=every)
    assert bool(faked) == is_ended


def test_what_peers_wrote_down_is_counted(tmp_path):
    storm = _Storm(tmp_path, 4, 2, 0.0, 10, random.Random(0), print)
    storm.master.stop()
    first = "begin 99.0 .\ndone 1 aa 100.0 0 .\nbegin 100.0 .\ndone 2 bb 101.0 2 .\nbegin 101.0 .\ndone 3 cc 10"
    (tmp_path / "0.steps").write_text(first)
    second = (
        "begin 99.0 .\ndone 1 aa 100.5 0 .\nbegin 101.0 .\ndone 2 bx 101.5 0 .\nbegin 101.5 .\ndone 4 dd 104.0 1 .\n"
    )
    (tmp_path / "1.steps").write_text(second)
    # One that took longer than it may, with a loss and without; and one that came to nobody.
    late = "begin 90.0 .\ndone 1 aa 100.5 1 .\nbegin 95.0 .\ndone 2 bb 101.5 0 .\nbegin 102.0 .\nleft .\n"
    (tmp_path / "2.steps").write_text(late)
    found = storm.result([])
    # The step that the first did not finish is given up, where nothing was done to it.
    assert (found.steps, found.begun, found.completed) == (3, 8, 5)
    assert (found.interrupted, found.recovered) == (3, 2)
    assert (found.tries, found.lost) == (11, 4)
    storm.struck.add(0)
    assert (storm.result([]).begun, storm.result([]).completed) == (7, 5)
    assert found.differing == (2,)
    assert found.longest_gap_s == 3.0
    assert not found.is_sound
    assert not storm.result(["rank 1: died"]).is_sound


@pytest.mark.parametrize(
    "wrong", [{"seconds": 0}, {"peers": 1}, {"least": 0}, {"every": (0, 1)}, {"hangs": 2}, {"numbers": 0}]
)
def test_what_cannot_be_is_told(wrong):
    with pytest.raises(InputError):
        churn(**{"seconds": 1, **wrong})


def test_peers_know_the_secret_that_the_environment_says(tmp_path, monkeypatch):
    """The master read it, and its peers said that there was none."""
    monkeypatch.setenv("ANABRANCH_CLUSTER_SECRET", "of this run")
    storm = _Storm(tmp_path, 4, 2, 0.0, 10, random.Random(0), print)
    (tmp_path / "stop").touch()
    try:
        assert peer_of_churn(0, 1, storm.master.address, str(tmp_path), 10) == 1
    finally:
        storm.master.stop()
