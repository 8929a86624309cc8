"""Processes that are killed, hang and start at random: whoever is left goes on."""

import random

import pytest

from anabranch.cluster.pccl.churn import _Storm, churn, peer_of_churn
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
    assert len(told) == found.kills + found.hangs + found.starts + found.master_kills
    # The bound on a hang: a peer that is dead for 2 s is dropped, and 2 s more.
    assert found.longest_gap_s < 15


def test_what_peers_wrote_down_is_counted(tmp_path):
    storm = _Storm(tmp_path, 4, 2, 0.0, 10, random.Random(0), print)
    storm.master.stop()
    (tmp_path / "0.steps").write_text("1 aa 100.0 0 .\n2 bb 101.0 2 .\n3 cc 10")
    (tmp_path / "1.steps").write_text("1 aa 100.5 0 .\n2 bx 101.5 0 .\n4 dd 104.0 1 .\n")
    found = storm.result([])
    assert (found.steps, found.tries, found.lost) == (3, 8, 3)
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
