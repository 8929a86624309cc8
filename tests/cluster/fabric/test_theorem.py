from fractions import Fraction

import numpy as np
import pytest

from anabranch.cluster.fabric import check_equivalence, planner, schemes, theorem
from anabranch.errors import InputError


def test_every_small_case_holds():
    found = check_equivalence(flows=12, paths=8, mixes=15)
    assert found.holds
    assert (found.cases, found.mixes, found.gap, found.pieces_off, found.worst) == (96, 15, Fraction(0), 0, "")


@pytest.mark.slow
def test_the_theorem_by_exhaustion():
    found = check_equivalence(flows=24, paths=16, mixes=500, seed=1)
    assert found.holds
    assert found.cases == 384


def test_a_planner_that_forgets_to_split_is_found(monkeypatch):
    monkeypatch.setitem(schemes._PLACERS, "ethereal", schemes.round_robin)
    found = check_equivalence(flows=3, paths=2, mixes=0)
    assert not found.holds
    # One flow over two paths: one carries all, and should carry half.
    assert (found.gap, found.worst) == (Fraction(1, 2), "1 flows over 2 paths")
    assert found.pieces_off == 2  # n = 1 and n = 3 over 2


def test_a_planner_that_splits_too_much_is_found(monkeypatch):
    monkeypatch.setattr(
        planner, "placer", lambda scheme: schemes.hashed(2) if scheme == "wrap" else schemes.placer(scheme)
    )
    assert check_equivalence(flows=1, paths=1, mixes=0).pieces_off == 1


def test_a_failed_path_that_is_used_is_found(monkeypatch):
    """With failures the gap is told with the network that it was found in."""
    real = planner.good_paths

    def blind(topology, leaf, to):
        good, capacity = real(topology, leaf, to)
        return (good[:1], capacity[:1]) if len(good) > 1 and not topology.is_up_L.all() else (good, capacity)

    # Spraying knows all good paths, the others only the first.
    spray = planner.exact_loads

    def exact(made):
        if made.scheme == "spray":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(planner, "good_paths", real)
                return spray(made)
        return spray(made)

    monkeypatch.setattr(planner, "good_paths", blind)
    monkeypatch.setattr(theorem, "exact_loads", exact)
    found = check_equivalence(flows=1, paths=4, mixes=10, seed=2)
    assert found.gap > 0
    assert found.worst.startswith("mix ")
    assert "failed ['leaf" in found.worst


def test_mixes_have_failures_and_several_groups():
    random = np.random.default_rng(0)
    made = [theorem._mix(random, 6) for _ in range(20)]
    assert any(not topology.is_up_L.all() for topology, _ in made)
    assert any(len(topology.names) > 8 for topology, _ in made)
    assert all(set(flows.size_F.tolist()) == {theorem.SIZE} for _, flows in made)


@pytest.mark.parametrize(
    ("given", "said"), [({"paths": 17}, "paths is 17"), ({"flows": 0}, "flows is 0"), ({"mixes": -1}, "mixes is -1")]
)
def test_limits_are_told(given, said):
    with pytest.raises(InputError, match=said):
        check_equivalence(**given)
