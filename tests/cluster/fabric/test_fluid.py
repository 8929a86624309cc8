import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.cluster.fabric import (
    SCHEMES,
    Flows,
    Routes,
    Topology,
    busiest,
    collective_flows,
    kernels,
    max_min_rates,
    plan,
    routes,
    simulate,
)
from anabranch.errors import InputError


def naive_rates(paths, capacity):
    """Progressive filling as textbooks have it: raise all alike until a link is full, freeze who crosses it, again.

    ``paths`` is one {link: share} for each piece.
    """
    rates, left, free = [0.0] * len(paths), dict(enumerate(capacity)), set(range(len(paths)))
    while free:
        grows = {link: sum(paths[q].get(link, 0.0) for q in free) for link in left}
        step, full = min((left[link] / grow, link) for link, grow in grows.items() if grow > 1e-12)
        for link, grow in grows.items():
            left[link] -= step * grow
        for q in free:
            rates[q] += step
        free -= {q for q in free if paths[q].get(full, 0.0) > 0}
    return rates


def as_routes(paths):
    link_E = [link for path in paths for link in path]
    weight_E = [share for path in paths for share in path.values()]
    start = np.cumsum([0, *map(len, paths)])
    return Routes(start, np.array(link_E, np.int32), np.array(weight_E, float))


def test_a_parking_lot_by_hand():
    # Links of 10 and 6; one piece crosses both, one each: 3 and 3 on the second, 7 on the first.
    paths = [{0: 1.0, 1: 1.0}, {0: 1.0}, {1: 1.0}]
    assert max_min_rates(as_routes(paths), np.array([10.0, 6.0])).tolist() == pytest.approx([3.0, 7.0, 3.0])
    # Half of a piece is somewhere else: it grows to 4 before link 1 is full (4 / 2 + 4 = 6).
    paths[0] = {0: 1.0, 1: 0.5}
    assert max_min_rates(as_routes(paths), np.array([10.0, 6.0])).tolist() == pytest.approx([4.0, 6.0, 4.0])


@st.composite
def shared_links(draw):
    num_links = draw(st.integers(1, 6))
    link = st.integers(0, num_links - 1)
    shares = st.sampled_from([1.0, 0.5, 0.25])
    paths = draw(st.lists(st.dictionaries(link, shares, min_size=1), min_size=1, max_size=10))
    capacity = draw(st.lists(st.sampled_from([1.0, 2.0, 5.0, 40.0]), min_size=num_links, max_size=num_links))
    return paths, capacity


@given(shared_links())
def test_rates_are_those_of_the_naive_loop(made):
    paths, capacity = made
    found = max_min_rates(as_routes(paths), np.array(capacity))
    assert found.tolist() == pytest.approx(naive_rates(paths, capacity), rel=1e-9)


@given(shared_links())
def test_no_link_is_overfull_and_nobody_could_have_more(made):
    paths, capacity = made
    rates = max_min_rates(as_routes(paths), np.array(capacity))
    used = [
        sum(rate * path.get(link, 0.0) for rate, path in zip(rates, paths, strict=True))
        for link in range(len(capacity))
    ]
    assert all(use <= has * (1 + 1e-9) for use, has in zip(used, capacity, strict=True))
    for rate, path in zip(rates, paths, strict=True):
        # A full link where nobody is faster: the definition of max-min fairness.
        assert any(
            used[link] >= capacity[link] * (1 - 1e-9)
            and rate >= max(r for r, p in zip(rates, paths, strict=True) if link in p) * (1 - 1e-9)
            for link in path
        )


def test_only_the_active_share():
    paths = [{0: 1.0}, {0: 1.0}, {0: 1.0}]
    found = max_min_rates(as_routes(paths), np.array([6.0]), np.array([0, 2]))
    assert found.tolist() == [3.0, 0.0, 3.0]
    assert max_min_rates(as_routes(paths), np.array([6.0]), np.array([], int)).tolist() == [0.0] * 3
    assert max_min_rates(as_routes(paths), np.array([0.0])).tolist() == [0.0] * 3
    with pytest.raises(InputError, match="a piece has no links"):
        max_min_rates(as_routes([{}]), np.array([1.0]))


def test_a_piece_that_ends_leaves_its_rate_to_the_others():
    # 8 Gbit/s up: 1 GB and 2 GB share it, 4 Gbit/s each, so the first ends after 2 s; the rest of 1 GB takes 1 s more.
    topology = Topology.leaf_spine(2, 1, 2, cap_up=8, cap_host=8)
    found = simulate(plan(Flows.of([(0, 2, 10**9), (1, 3, 2 * 10**9)]), topology))
    assert found.finish_F.tolist() == pytest.approx([2.0, 3.0])
    assert (found.completion_s, found.shares) == (pytest.approx(3.0), 2)


def test_a_step_waits_for_what_its_rank_has_to_do_and_for_nobody_else():
    # 8 Gbit/s everywhere. Rank 0 sends 1 GB to 1 (1 s); 2 sends 3 GB to 3 (3 s). Then 1 sends to 0, and 0 sends to 2.
    topology = Topology.leaf_spine(1, 1, 4, cap_up=8, cap_host=8)
    flows = Flows.of([(0, 1, 10**9, 0), (2, 3, 3 * 10**9, 0), (1, 0, 10**9, 1), (3, 0, 10**9, 2)])
    found = simulate(plan(flows, topology))
    # Rank 1 goes on after 1 s though 3 is not through; 3 sends in step 2 what it would after 3 s.
    assert found.finish_F.tolist() == pytest.approx([1.0, 3.0, 2.0, 4.0])


def test_windows_follow_each_other():
    # Three flows of 1 s each to three leaves: together they end after 3 s, one by one after 1, 2 and 3; and then comes the next step.
    topology = Topology.leaf_spine(4, 1, 1, cap_up=8, cap_host=8)
    flows = Flows.of([*((0, host, 10**9, 0) for host in (1, 2, 3)), (0, 1, 10**9, 1)])
    together, apart = (simulate(plan(flows, topology, "whole", window=window)) for window in (None, 1))
    assert together.finish_F.tolist() == pytest.approx([3.0, 3.0, 3.0, 4.0])
    assert sorted(apart.finish_F[:3]) == pytest.approx([1.0, 2.0, 3.0])
    assert apart.finish_F[3] == pytest.approx(4.0)


def naive_run(made):
    """Completion by the plain loop: rates of `naive_rates`, until the next piece ends."""
    flows, found = made.flows, routes(made)
    paths = [
        dict(zip(found.link_E[a:b].tolist(), found.weight_E[a:b].tolist(), strict=True))
        for a, b in zip(found.start[:-1], found.start[1:], strict=True)
    ]
    who = [(int(flows.src_F[f]), int(flows.dst_F[f]), int(flows.step_F[f])) for f in made.flow_Q]
    left, now, finish = dict(enumerate((8.0 * made.size_Q).tolist())), 0.0, {}
    while left:
        ready = [
            q
            for q in left
            if not any(who[p][2] < who[q][2] and who[q][0] in who[p][:2] for p in left)
            and not any(
                (who[p][0], who[p][2]) == (who[q][0], who[q][2]) and made.window_Q[p] < made.window_Q[q] for p in left
            )
        ]
        rates = dict(zip(ready, naive_rates([paths[q] for q in ready], made.topology.capacity_L.tolist()), strict=True))
        step = min(left[q] / rates[q] for q in ready)
        now += step
        for q in ready:
            left[q] -= rates[q] * step
            if left[q] <= 1e-6:
                finish[q] = now
                del left[q]
    return [finish[q] for q in range(len(made))]


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(SCHEMES),
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(1, 9), st.integers(0, 3)), max_size=12),
    st.sampled_from([None, 1, 3]),
)
def test_runs_end_when_the_naive_loop_says(scheme, rows, window):
    topology = Topology.leaf_spine(4, 3, 2, cap_up=5, cap_host=8)
    flows = Flows.of((src, dst, size * 10**8, step) for src, dst, size, step in rows if src != dst)
    made = plan(flows, topology, scheme, window=window)
    assert simulate(made).finish_Q.tolist() == pytest.approx(naive_run(made), rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "algo"), [("all-to-all", None), ("all-reduce", "halving-doubling"), ("all-reduce", "ring")]
)
def test_ethereal_ends_when_spraying_does(kind, algo):
    topology = Topology.leaf_spine(4, 4, 4)
    flows = collective_flows(kind, 16, 16 * 720_720, algo)
    ours, ideal = simulate(plan(flows, topology)), simulate(plan(flows, topology, "spray"))
    assert ours.completion_s == pytest.approx(ideal.completion_s, rel=1e-9)
    # Equal flows of a symmetric step all end at once, when the busiest link has done its work.
    assert ours.completion_s == pytest.approx(busiest(plan(flows, topology)), rel=1e-9)


def test_hashing_takes_longer():
    topology, flows = Topology.leaf_spine(8, 8, 8), collective_flows("permutation", 64, 10**7, seed=2)
    times = {scheme: simulate(plan(flows, topology, scheme)).completion_s for scheme in ("ecmp", "split:4", "ethereal")}
    assert times["ethereal"] < times["split:4"] < times["ecmp"]


def test_a_coarser_clock_is_late_by_little():
    topology, flows = Topology.leaf_spine(4, 4, 8), collective_flows("all-to-all", 32, 32 * 10**6)
    made = plan(flows, topology, "ecmp")
    exact, coarse = simulate(made), simulate(made, resolution=1e-2)
    assert coarse.shares < exact.shares
    assert exact.completion_s <= coarse.completion_s * (1 + 1e-12)
    assert coarse.completion_s <= exact.completion_s * 1.05
    with pytest.raises(InputError, match="resolution is 2"):
        simulate(made, resolution=2)


def test_a_piece_on_a_failed_path_is_told():
    topology = Topology.leaf_spine(2, 1, 1)
    made = plan(Flows.of([(0, 1, 100)]), topology)
    object.__setattr__(made, "topology", topology.with_failed(["leaf0-spine0"]))
    with pytest.raises(InputError, match="from host 0 to 1 never ends: its path 0 has a failed link"):
        simulate(made)


def test_the_same_comes_out_compiled(monkeypatch):
    pytest.importorskip("numba")
    topology, flows = Topology.leaf_spine(4, 4, 4, cap_up=300), collective_flows("all-to-all", 16, 16 * 5000)
    for scheme in ("ecmp", "wrap", "spray"):
        made, found = plan(flows, topology, scheme), []
        for few in (1e18, -1):
            monkeypatch.setattr(kernels, "FEW", few)
            found.append((simulate(made), max_min_rates(routes(made), topology.capacity_L)))
        (interpreted, rates), (compiled, compiled_rates) = found
        assert interpreted.finish_Q.tolist() == pytest.approx(compiled.finish_Q.tolist(), rel=1e-12)
        assert interpreted.shares == compiled.shares
        assert rates.tolist() == pytest.approx(compiled_rates.tolist(), rel=1e-12)


def test_nothing_to_run():
    found = simulate(plan(Flows.of([]), Topology.leaf_spine(2, 1, 1)))
    assert (found.completion_s, len(found.finish_F), found.shares) == (0.0, 0, 0)
