import numpy as np
import pytest

from anabranch.errors import InputError
from anabranch.graph.generate import barabasi_albert


@pytest.mark.parametrize(("nodes", "each"), [(2, 1), (5, 4), (50, 3), (400, 10)])
def test_shape(nodes, each):
    graph = barabasi_albert(nodes, each, seed=1)
    assert (graph.num_nodes, graph.num_edges, graph.num_self_loops) == (nodes, each * (nodes - each), 0)
    assert not graph.is_directed
    source_E, target_E, _ = graph.edges()
    newer_E = np.maximum(source_E, target_E)
    assert (np.bincount(newer_E, minlength=nodes)[each:] == each).all()  # each node came with that many


def test_the_first_node_has_edges_to_all_before_it():
    assert barabasi_albert(5, 4).neighbors(4).tolist() == [0, 1, 2, 3]


def test_degrees_fall_off_as_a_power_law():
    degree_N = barabasi_albert(20_000, 5, seed=3).degree_N
    # P(degree >= d) = m (m + 1) / (d (d + 1)): 30 / (20 * 21) = 0.071 at 20, 30 / (50 * 51) = 0.0118 at 50
    assert (degree_N >= 20).mean() == pytest.approx(0.0714, abs=0.008)
    assert (degree_N >= 50).mean() == pytest.approx(0.0118, abs=0.003)
    assert degree_N.max() > 300


def test_seeds():
    first, again, other = (barabasi_albert(60, 3, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.indices, again.indices)
    assert not np.array_equal(first.indices, other.indices)
    assert barabasi_albert(60, 3, -1).num_edges == 171


@pytest.mark.parametrize(("nodes", "each"), [(5, 0), (5, 5), (1, 1), (0, 1)])
def test_what_cannot_be(nodes, each):
    with pytest.raises(InputError, match="edges_each is"):
        barabasi_albert(nodes, each)
