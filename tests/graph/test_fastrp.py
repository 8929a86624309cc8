"""FastRP is the dense algebra of its equations, whatever the backend, the chunks, the threads and the form of the graph."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import coo_array, csr_array

from anabranch.errors import BackendError, ConfigError, DataError, InputError
from anabranch.graph import Graph
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.datasets import load_dataset
from anabranch.graph.evaluate import classify_nodes, hold_out_edges, link_auc
from anabranch.graph.fastrp import FastRP
from anabranch.graph.projection import gaussian_rows, keys_of, sparse_rows


def drawn(seed=0, nodes=40, edges=150, directed=False, weighted=True, names=None):
    generator = np.random.default_rng(seed)
    source, target = generator.integers(0, nodes - 1, (2, edges))  # the last node has no edge
    weight = generator.random(edges) + 0.2 if weighted else None
    return Graph.from_edges(source, target, weight, directed, nodes, names=names)


def blocks(size=20, seed=0, within=0.5, between=0.02):
    """A graph of three groups, and the group of each node."""
    generator = np.random.default_rng(seed)
    group_N = np.repeat(np.arange(3), size)
    chance = np.where(group_N[:, None] == group_N, within, between)
    edge = np.triu(generator.random(chance.shape) < chance, 1)
    return Graph.from_edges(*np.nonzero(edge), num_nodes=3 * size), group_N


def random_rows(graph, model, first=0):
    """R by the module that is tested elsewhere."""
    keys = np.arange(graph.num_nodes, dtype=np.uint64) if graph.names is None else keys_of(graph.names)
    if model.projection == "gaussian":
        return gaussian_rows(keys, first, model.dim, model.seed, np.float64)
    return sparse_rows(keys, first, model.dim, model.s, model.seed).to_scipy().toarray()


def dense_reference(graph, model, random_ND=None):
    """The docstring's equations with dense matrices: L R, N_1 ... N_q, and the vectors."""
    A = graph.to_scipy(np.float64).toarray()
    if graph.is_directed:
        A = {"out": A, "in": A.T, "both": A + A.T}[model.direction]
    out, into = np.abs(A).sum(1), np.abs(A).sum(0)

    def inverse(d, power):
        return np.array([x**-power if x else 0.0 for x in d])

    if model.matrix == "transition":
        P = np.diag(inverse(out, 1)) @ A
    elif model.matrix == "symmetric":
        P = np.diag(inverse(out, 0.5)) @ A @ np.diag(inverse(into, 0.5))
    else:
        P = A
    seen = np.where(out > 0, out, min(out[out > 0], default=1.0))
    random_ND = random_rows(graph, model) if random_ND is None else random_ND
    powers = [np.diag(seen**model.beta) @ random_ND / np.sqrt(model.dim)]
    for _ in model.weights:
        powers.append(P @ powers[-1])

    def unit(x):
        return x / np.where(np.linalg.norm(x, axis=1) > 0, np.linalg.norm(x, axis=1), 1)[:, None]

    terms = [w * (unit(x) if model.normalize else x) for w, x in zip(model.weights, powers[1:], strict=True) if w]
    if model.self_weight:
        terms.insert(0, model.self_weight * unit(powers[0]))
    found = np.concatenate(terms, 1) if model.concatenate else sum(terms)
    if model.standardize:
        deviation = found.std(0)
        found = (found - found.mean(0)) / np.where(deviation > 1e-9, deviation, np.inf)
    return powers, found


# The equations


def test_a_path_by_hand():
    """0 - 1 - 2, beta 0, one column per node's own entry: N_1 and N_2 are P and P P times R."""
    model = FastRP(40, (1.0, 2.0), 0.0, normalize=False, standardize=False, s=1)
    graph = Graph.from_edges([0, 1], [1, 2])
    r0, r1, r2 = random_rows(graph, model) / np.sqrt(40)
    first = [r1, (r0 + r2) / 2, r1]
    second = [(r0 + r2) / 2, r1, (r0 + r2) / 2]
    expected = np.array(first) + 2 * np.array(second)
    assert model.fit_transform(graph) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("backend", ["numba", "scipy", "torch"])
@pytest.mark.parametrize("projection", ["sparse", "gaussian"])
@pytest.mark.parametrize("matrix", ["transition", "adjacency", "symmetric"])
@pytest.mark.parametrize(
    "graph", [drawn(), drawn(weighted=False), drawn(directed=True)], ids=["weighted", "plain", "directed"]
)
def test_powers_and_vectors_are_those_of_dense_matrices(backend, projection, matrix, graph):
    model = FastRP(
        45,
        (0.5, 0, 1, 3),
        -0.6,
        projection=projection,
        matrix=matrix,
        s=5.0,
        backend=backend,
        dtype="float64",
        self_weight=0.3,
    )
    powers, expected = dense_reference(graph, model)
    found = model.powers(graph)
    assert found.start_ND == pytest.approx(powers[0], abs=1e-10)
    for ours, theirs in zip(found.power_KND, powers[1:], strict=True):
        assert np.abs(ours - theirs).max() < 1e-9 * max(1, np.abs(theirs).max())
    assert np.abs(model.fit_transform(graph) - expected).max() < 1e-8
    single = FastRP(**{**model.get_params(), "dtype": "float32"})
    for ours, theirs in zip(single.powers(graph).power_KND, powers[1:], strict=True):
        assert np.abs(ours - theirs).max() < 1e-5 * max(1, np.abs(theirs).max())
    assert np.abs(single.fit_transform(graph) - expected).max() < 2e-3


@pytest.mark.parametrize("direction", ["out", "in", "both"])
@pytest.mark.parametrize("weights", [(1.0,), (0, 1), (0.5, 0.25, -1)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize": False},
        {"standardize": False},
        {"normalize": False, "standardize": False},
        {"concatenate": True},
        {"concatenate": True, "normalize": False, "self_weight": 2.0},
        {"self_weight": -0.5},
        {"self_weight": 0.5, "normalize": False},
        {"s": 2.0},
        {"keep_powers": True, "self_weight": 0.5},
    ],
    ids=str,
)
def test_every_option_is_the_dense_algebra(direction, weights, options):
    graph = drawn(directed=True)
    model = FastRP(33, weights, -0.4, direction=direction, dtype="float64", **{"s": 5.0, **options})
    rounded = 2e-6 if direction == "both" else 1e-8  # sums of weights are kept in 32 bits
    assert np.abs(model.fit_transform(graph) - dense_reference(graph, model)[1]).max() < rounded


def test_defaults_are_those_of_the_interface():
    model = FastRP()
    assert (model.dim, tuple(model.weights), model.beta, model.normalize) == (256, (0, 0, 1, 6), -0.65, True)
    found = FastRP(dim=256, seed=0).fit_transform(drawn())
    assert found.shape == (40, 256)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    assert np.isfinite(found).all()
    assert FastRP(20, dtype="float64").fit_transform(drawn()).dtype == np.float64


def test_the_threads_of_torch_stay_as_they_are():
    FastRP(dim=8).fit_transform(load_dataset("karate").graph)
    assert torch.get_num_threads() == 1


def test_the_default_sparsity_is_the_square_root_of_nodes_as_a_power_of_2():
    # 40 nodes: sqrt is 6.3, 2^round(2.66) = 8
    graph = drawn()
    assert np.array_equal(FastRP(20).fit_transform(graph), FastRP(20, s=8).fit_transform(graph))


def test_linear_in_weights():
    model = FastRP(32, (1.0, 1.0, 1.0), normalize=False, standardize=False, s=4.0)
    powers = model.powers(drawn())
    both = model.combine(powers, (1.0, 2.0, -3.0))
    parts = (
        model.combine(powers, (1.0, 0, 0))
        + 2 * model.combine(powers, (0, 1.0, 0))
        - 3 * model.combine(powers, (0, 0, 1.0))
    )
    assert both == pytest.approx(parts, abs=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("concatenate", [True, False])
def test_combined_powers_are_the_fitted_vectors(normalize, concatenate):
    model = FastRP(40, (0, 0.5, 2), normalize=normalize, concatenate=concatenate, self_weight=0.5)
    graph = drawn()
    powers = model.powers(graph)
    before = [power.copy() for power in (powers.start_ND, *powers.power_KND)]
    tolerance = 0 if normalize else 1e-5  # without normalising, fit adds as it goes
    assert np.abs(model.combine(powers) - model.fit_transform(graph)).max() <= tolerance
    model.combine(powers, (3.0,))
    for old, new in zip(before, (powers.start_ND, *powers.power_KND), strict=True):
        assert np.array_equal(old, new)
    assert powers.nbytes == sum(array.nbytes for array in before)


def test_shape_of_concatenated_vectors():
    model = FastRP(24, (1, 1, 1), concatenate=True)
    assert model.fit_transform(drawn()).shape == (40, 72)
    assert FastRP(24, (0, 1, 1), concatenate=True).fit_transform(drawn()).shape == (40, 48)


# The same to the bit


@given(st.integers(0, 2**20), st.integers(1, 130), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.booleans())
def test_chunks_and_threads_change_no_bit(seed, dim, chunk, count, weighted, normalize):
    graph = drawn(seed, weighted=weighted)
    options = {
        "seed": seed,
        "normalize": normalize,
        "self_weight": float(seed % 2),
        "projection": ("sparse", "gaussian")[seed % 3 == 0],
    }
    whole = FastRP(dim, threads=1, chunk=dim, **options).fit_transform(graph)
    assert np.array_equal(FastRP(dim, threads=count, chunk=32 * chunk, **options).fit_transform(graph), whole)


def test_columns_are_those_of_fewer_dimensions():
    """Columns are keyed: before rows are normalised, a smaller dim is a part of a larger one, but for the scale."""
    large, small = (FastRP(dim, normalize=False).fit_transform(drawn()) for dim in (96, 50))
    assert large[:, :50] == pytest.approx(small, abs=2e-5)


def test_seeds():
    graph = drawn()
    assert np.array_equal(FastRP(32, seed=3).fit_transform(graph), FastRP(32, seed=3).fit_transform(graph))
    for seed in (4, -1, 2**70):
        assert not np.array_equal(FastRP(32, seed=3).fit_transform(graph), FastRP(32, seed=seed).fit_transform(graph))


# Names


@pytest.mark.parametrize("named", [True, False])
def test_renumbered_nodes_keep_their_vectors(named):
    names = [f"node {i}" for i in range(40)] if named else np.arange(40)
    graph = drawn(names=names)
    order = np.random.default_rng(1).permutation(40)  # place of each old node
    source, target, weight = graph.edges()
    moved_names = np.empty(40, object)
    moved_names[order] = names
    moved = Graph.from_edges(
        order[source], order[target], weight, num_nodes=40, names=moved_names if named else moved_names.astype(int)
    )
    assert FastRP(32, s=4).fit_transform(moved)[order] == pytest.approx(FastRP(32, s=4).fit_transform(graph), abs=1e-4)
    if not named:  # names 0 ... N - 1 are what numbers would be
        assert np.array_equal(FastRP(32).fit_transform(graph), FastRP(32).fit_transform(drawn()))


def test_nodes_that_come_leave_the_rest_as_it_was():
    graph, model = drawn(), FastRP(48, standardize=False, s=8)
    source, target, weight = graph.edges()
    # a second component of 25 nodes
    larger = Graph.from_edges(
        np.append(source, np.arange(40, 64)),
        np.append(target, np.arange(41, 65)),
        np.append(weight, np.ones(24)),
        num_nodes=65,
    )
    assert np.array_equal(model.fit_transform(larger)[:40], model.fit_transform(graph))


# Forms of graphs


@pytest.mark.filterwarnings("ignore:Sparse")
def test_all_forms_of_a_graph_give_the_same():
    graph = drawn(directed=True)
    matrix = graph.to_scipy()
    expected = FastRP(32).fit_transform(graph)
    tensor = torch.sparse_csr_tensor(*map(torch.tensor, (matrix.indptr, matrix.indices, matrix.data)), matrix.shape)
    for form in (matrix, matrix.tocoo(), matrix.tocsc(), tensor):
        assert np.array_equal(FastRP(32).fit_transform(form), expected)
    plain = drawn(weighted=False)
    ends = plain.edges()[:2]
    for form in (ends, np.column_stack(ends)):
        assert np.array_equal(FastRP(32).fit_transform(form), FastRP(32).fit_transform(Graph.from_edges(*ends)))


@pytest.mark.parametrize("weighted", [True, False])
def test_a_graph_that_stays_on_disk(weighted, tmp_path):
    graph = drawn(weighted=weighted)
    graph.save(tmp_path / "g.anb")
    mapped = Graph.load(tmp_path / "g.anb", mmap=True)
    assert np.array_equal(FastRP(32).fit_transform(mapped), FastRP(32).fit_transform(graph))


def test_it_can_be_pickled():
    model = FastRP(16, keep_powers=True).fit(drawn())
    copied = pickle.loads(pickle.dumps(model))
    assert np.array_equal(copied.embedding_, model.embedding_)
    assert np.array_equal(copied.transform(np.ones((1, 40))), model.transform(np.ones((1, 40))))


def test_entries_given_twice_are_added_up_and_self_loops_kept():
    once = csr_array([[2.0, 3.0], [3.0, 0.0]])
    twice = coo_array(([1.0, 1, 1, 2, 3], ([0, 0, 0, 0, 1], [0, 0, 1, 1, 0])), shape=(2, 2))
    assert np.array_equal(FastRP(16).fit_transform(twice), FastRP(16).fit_transform(once))
    without_loop = csr_array([[0.0, 3.0], [3.0, 0.0]])
    assert not np.array_equal(FastRP(16).fit_transform(without_loop), FastRP(16).fit_transform(once))


def test_directions():
    graph = drawn(directed=True)
    source, target, weight = graph.edges()
    turned = Graph.from_edges(target, source, weight, True, 40)
    assert np.array_equal(FastRP(16, direction="in").fit_transform(graph), FastRP(16).fit_transform(turned))
    undirected = drawn()
    for direction in ("in", "both"):
        assert np.array_equal(
            FastRP(16, direction=direction).fit_transform(undirected), FastRP(16).fit_transform(undirected)
        )


# Edges of what is defined


def test_an_isolated_node_is_a_zero_row_before_columns_are_standardised():
    graph = drawn()
    raw, found = (FastRP(32, standardize=standardize).fit_transform(graph) for standardize in (False, True))
    assert (raw[-1] == 0).all()
    assert found[-1] == pytest.approx(-raw.mean(0) / raw.std(0), abs=1e-4)
    own = FastRP(32, standardize=False, self_weight=0.5).fit_transform(graph)
    assert np.linalg.norm(own[-1]) == pytest.approx(0.5, abs=1e-6)


def test_a_column_that_does_not_vary_is_0():
    # all nodes of a ring of two are alike but for R; in a graph without edges all rows are 0
    found = FastRP(16).fit_transform(Graph.from_edges([], [], num_nodes=3))
    assert (found == 0).all()
    star = Graph.from_edges([0, 0], [1, 2])  # rows 1 and 2 are the same
    found = FastRP(64, (1,), s=4).fit_transform(star)
    assert np.array_equal(found[1], found[2])
    assert np.isfinite(found).all()
    one = FastRP(8).fit_transform(Graph.from_edges([0], [0]))
    assert one.tolist() == [[0.0] * 8]  # one row: nothing varies


@pytest.mark.parametrize("backend", ["numba", "scipy", "torch"])
@pytest.mark.parametrize(
    "options", [{}, {"concatenate": True}, {"normalize": False}, {"self_weight": 1.0}, {"matrix": "symmetric"}]
)
def test_no_nodes(backend, options):
    found = FastRP(16, (1.0,), backend=backend, **options).fit_transform(Graph.from_edges([], [], num_nodes=0))
    assert found.shape == (0, 32 if options == {"concatenate": True, "self_weight": 1.0} else 16)


def test_weights_of_0_cost_nothing_and_change_nothing():
    graph = drawn()
    assert np.array_equal(FastRP(32, (0, 1.0, 0, 0)).fit_transform(graph), FastRP(32, (0, 1.0)).fit_transform(graph))
    only_own = FastRP(32, (0, 0), self_weight=1.0, standardize=False, s=4.0).fit_transform(graph)
    rows = random_rows(graph, FastRP(32, s=4.0))
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    assert only_own == pytest.approx(rows / np.where(norms, norms, 1), abs=1e-6)


def test_signed_graphs():
    source, target, weight = [0, 1, 2, 3], [1, 2, 3, 0], [1.0, -2.0, 0.5, -1.0]
    graph = Graph.from_edges(source, target, weight, allow_negative=True)
    with pytest.raises(InputError, match="negative"):
        FastRP(16).fit_transform(graph)
    model = FastRP(16, (1, 2), s=4.0, allow_negative=True, dtype="float64")
    assert np.abs(model.fit_transform(graph) - dense_reference(graph, model)[1]).max() < 1e-8
    matrix = graph.to_scipy(np.float64)
    assert np.array_equal(model.fit_transform(matrix), model.fit_transform(graph))


def test_values_beyond_the_type_are_refused():
    heavy = Graph.from_edges([0, 1, 2], [1, 2, 0], [1e30, 1e30, 1e30])
    with pytest.raises(InputError, match="leave the range of float32"):
        FastRP(16, matrix="adjacency", normalize=False, beta=0).fit_transform(heavy)
    with pytest.raises(InputError, match="beta = -3"):
        FastRP(16, beta=-3).fit_transform(heavy)
    assert np.isfinite(FastRP(16, beta=-1).fit_transform(heavy)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"dim": 2.5}, "dim is 2.5"),
        ({"dim": True}, "dim is True"),
        ({"weights": ()}, r"weights is \(\)"),
        ({"weights": 3}, "weights is 3"),
        ({"weights": (0, 0)}, "all weights are 0"),
        ({"weights": (1, float("nan"))}, "weight 2 is nan"),
        ({"weights": (1, "a")}, "weight 2 is 'a'"),
        ({"beta": float("inf")}, "beta is inf"),
        ({"beta": None}, "beta is None"),
        ({"s": 0.5}, "s is 0.5"),
        ({"s": float("nan")}, "s is nan"),
        ({"projection": "dense"}, "projection is 'dense'; it must be one of sparse, gaussian"),
        ({"matrix": "trans"}, "matrix is 'trans'"),
        ({"direction": "up"}, "direction is 'up'"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"backend": "cupy"}, "backend is 'cupy'"),
        ({"feature_ratio": 1.5}, "feature_ratio is 1.5"),
        ({"self_weight": float("nan")}, "self_weight is nan"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"chunk": 0}, "chunk is 0"),
        (
            {"chunk": 2**53},
            "chunk is 9007199254740992; it must be a whole number, at least 1 and at most 2,147,483,647",
        ),
        ({"normalize": "no"}, "normalize is 'no'; it must be True or False"),
        ({"keep_powers": 2}, "keep_powers is 2; it must be True or False"),
        ({"threads": -1}, "threads is -1"),
    ],
)
def test_arguments_that_are_not_allowed(options, message):
    with pytest.raises(InputError, match=message):
        FastRP(**options)


@pytest.mark.parametrize("given", [1, 0, "no"])
def test_files_hold_what_was_given_before_it_was_looked_at(tmp_path, given):
    path = tmp_path / "m.anb"
    model = FastRP(8).fit(Graph.from_edges([0, 1, 2], [1, 2, 3]))
    model.save(path)
    found = read_arrays(path, "fastrp")
    meta = {**found.meta, "params": {**found.meta["params"], "normalize": given, "standardize": given}}
    write_arrays(path, "fastrp", {name: np.array(array) for name, array in found.arrays.items()}, meta, found.version)
    read = FastRP.load(path)
    assert (read.normalize, read.standardize) == (bool(given), bool(given))
    assert np.array_equal(read.vectors([0, 3]), model.vectors([0, 3]))
    assert FastRP(8, normalize=1, keep_powers=0).fit(Graph.from_edges([0, 1, 2], [1, 2, 3])).embedding_.shape == (4, 8)


@pytest.mark.parametrize(
    "graph", [None, "x", np.eye(3), csr_array(np.ones((2, 3))), csr_array([[np.nan]]), csr_array([[np.inf]])]
)
def test_what_is_no_graph(graph):
    with pytest.raises((InputError, DataError)):
        FastRP(8).fit_transform(graph)


def test_a_graph_made_by_hand_with_nan():
    graph = Graph(np.array([0, 1, 2]), np.array([1, 0], np.int32), np.array([1, np.nan], np.float32))
    with pytest.raises(InputError, match="edge weight 1 is not finite"):
        FastRP(8).fit_transform(graph)


def test_a_device_that_is_not_there():
    with pytest.raises(BackendError, match="device 'cuda:99'"):
        FastRP(8, backend="torch", device="cuda:99").fit_transform(drawn())


# Features


def test_features_fill_their_share_of_columns():
    graph = drawn()
    features = np.random.default_rng(0).normal(3, 2, (40, 5))
    model = FastRP(40, features=features, feature_ratio=0.25, s=5.0, dtype="float64")
    combined = features @ gaussian_rows(np.arange(5, dtype=np.uint64), 0, 10, ~0, np.float64)
    combined /= np.sqrt((combined**2).mean())
    random_ND = np.concatenate([random_rows(graph, FastRP(30, s=5.0)), combined], 1)
    assert np.abs(model.fit_transform(graph) - dense_reference(graph, model, random_ND)[1]).max() < 1e-8
    assert (
        np.abs(
            model.set_params(features=csr_array(features)).fit_transform(graph)
            - dense_reference(graph, model, random_ND)[1]
        ).max()
        < 1e-8
    )
    assert (combined**2).mean() == pytest.approx(1)


@pytest.mark.parametrize("ratio", [1.0, 0.9, 0.1])
def test_chunks_with_features_change_no_bit(ratio):
    graph = drawn()
    options = {"features": np.eye(40)[:, :7], "feature_ratio": ratio, "dim": 100}
    whole = FastRP(**options, threads=1).fit_transform(graph)
    assert np.array_equal(FastRP(**options, chunk=32, threads=2).fit_transform(graph), whole)
    assert np.array_equal(FastRP(**options, backend="scipy", chunk=64).fit_transform(graph), whole)


def test_features_alone_tell_groups_apart():
    graph, group_N = blocks(within=0.3, between=0.02)
    features = np.eye(3)[group_N] + np.random.default_rng(0).normal(0, 0.3, (60, 3))
    found = FastRP(16, (1.0,), features=features, feature_ratio=1.0).fit_transform(graph)
    assert classify_nodes(found, group_N, train_fraction=0.5).micro > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_ratio": 0.5}, "features is None"),
        ({"features": np.ones((40, 2))}, "leaves them no column"),
        ({"features": np.ones((39, 2)), "feature_ratio": 0.5}, r"\(39, 2\); it must be \[40, features\]"),
        ({"features": np.ones(40), "feature_ratio": 0.5}, r"\(40,\)"),
        ({"features": np.full((40, 2), np.nan), "feature_ratio": 0.5}, "finite"),
        ({"features": np.full((40, 2), "a"), "feature_ratio": 0.5}, "finite numbers"),
    ],
)
def test_features_that_do_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        FastRP(16, **options).fit_transform(drawn())


# New nodes


@pytest.mark.parametrize("matrix", ["transition", "adjacency"])
@pytest.mark.parametrize("options", [{}, {"self_weight": 0.5}, {"normalize": False}, {"concatenate": True}], ids=str)
def test_new_nodes_that_no_old_one_leads_to_are_exact(matrix, options):
    old = drawn(directed=True)
    generator = np.random.default_rng(5)
    rows = np.where(generator.random((4, 40)) < 0.2, generator.random((4, 40)).astype(np.float32), 0)
    rows[3] = 0
    whole = np.block([[old.to_scipy(np.float64).toarray(), np.zeros((40, 4))], [rows, np.zeros((4, 4))]])
    model = FastRP(40, (1, 0, 2), matrix=matrix, s=5.0, dtype="float64", standardize=False, keep_powers=True, **options)
    expected = FastRP(**model.get_params()).fit_transform(csr_array(whole))
    found = model.fit(old).transform(csr_array(rows))
    assert np.abs(found - expected[40:]).max() < 1e-6 * np.abs(expected).max()
    assert np.array_equal(model.transform(rows), found)
    assert np.abs(model.embedding_ - expected[:40]).max() < 1e-9 * np.abs(expected).max()


@pytest.mark.parametrize("matrix", ["transition", "adjacency", "symmetric"])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_new_nodes_with_features_and_edges_between_them_are_exact(matrix, ratio):
    """As many as old ones and of the same features, whose mean square is then that of all."""
    old, generator = drawn(directed=True), np.random.default_rng(5)
    rows = np.where(generator.random((40, 80)) < 0.1, generator.random((40, 80)).astype(np.float32), 0)
    rows[3] = 0
    if matrix == "symmetric":
        # Else what comes into old nodes would be more.
        rows[:, :40] = 0
    whole = np.block([[old.to_scipy(np.float64).toarray(), np.zeros((40, 40))], [rows]])
    features = generator.normal(2, 1, (40, 3)) if ratio else None
    own = {"features": None if features is None else np.vstack([features, features]), "feature_ratio": ratio}
    model = FastRP(
        40, (1, 0, 2), matrix=matrix, s=5.0, dtype="float64", standardize=False, keep_powers=True, self_weight=0.5
    )
    expected = FastRP(**{**model.get_params(), **own}).fit_transform(csr_array(whole))[40:]
    model.set_params(features=features, feature_ratio=ratio).fit(old)
    found = model.transform(csr_array(rows), features=features)
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()


def test_edges_of_new_nodes_by_name():
    graph = Graph.from_edges([0, 1, 2], [1, 2, 3], num_nodes=4, names=["a", "b", "c", "d"])
    model = FastRP(8, s=2, keep_powers=True).fit(graph)
    rows, names = model.edges_of_new(["x", "x", "y"], ["a", "y", "y"], [2.0, 3.0, 1.0])
    assert names == ["x", "y"]
    assert rows.toarray().tolist() == [[2, 0, 0, 0, 0, 3], [0, 0, 0, 0, 3, 1]]
    assert model.transform(rows, names=names).shape == (2, 8)
    directed = FastRP(8, s=2, keep_powers=True).fit(graph.to_directed())
    rows, names = directed.edges_of_new(["x", "y"], ["y", "z"])
    assert names == ["x", "y", "z"]
    assert rows.toarray().tolist() == [[0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 1], [0] * 7]
    for edges, message in (
        ((["a"], ["x"]), "node 'a' was fitted"),
        ((["x"], ["a", "b"]), "1 sources and 2 targets"),
        ((["x"], ["a"], [1, 2]), r"weight has the shape \(2,\)"),
    ):
        with pytest.raises(InputError, match=message):
            model.edges_of_new(*edges)


@pytest.mark.parametrize("before", [{"chunk": 2**40}, {"workers": 2**33}, {"s": 1e200}, {"weights": [1, 1e38]}])
def test_files_of_before_are_read_where_only_a_new_fit_would_be_refused(before, tmp_path):
    graph, path = drawn(), tmp_path / "m.anb"
    model = FastRP(8, (1, 2), keep_powers=True).fit(graph)
    model.save(path)
    found = read_arrays(path, "fastrp")
    arrays = {name: np.array(array) for name, array in found.arrays.items()}
    write_arrays(path, "fastrp", arrays, {**found.meta, "params": {**found.meta["params"], **before}}, found.version)
    read = FastRP.load(path)
    assert {name: read.get_params()[name] for name in before} == before
    assert np.array_equal(read.vectors([3, 1]), model.vectors([3, 1]))
    assert read.transform(np.ones((2, 40))).shape == (2, 8)
    read.save(tmp_path / "n.anb")
    assert np.array_equal(FastRP.load(tmp_path / "n.anb").embedding_, model.embedding_)
    with pytest.raises(InputError, match=f"^({next(iter(before))}|weight 2) is "):
        read.fit(graph)
    wrong = dict.fromkeys(before, -1)
    write_arrays(path, "fastrp", arrays, {**found.meta, "params": {**found.meta["params"], **wrong}}, found.version)
    with pytest.raises(DataError, match=f"{next(iter(before))} is "):
        FastRP.load(path)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("options", [{}, {"matrix": "symmetric", "concatenate": True}, {"feature_ratio": 0.5}])
def test_saved_and_read_back(named, options, tmp_path):
    graph = drawn()
    if named:
        graph = Graph(graph.indptr, graph.indices, graph.weights, False, np.array([f"n{i}" for i in range(40)], object))
    features = np.random.default_rng(0).normal(size=(40, 3)) if "feature_ratio" in options else None
    model = FastRP(8, (1, 2), self_weight=0.5, keep_powers=True, features=features, **options).fit(graph)
    model.save(tmp_path / "m.anb")
    found = FastRP.load(tmp_path / "m.anb")
    rows, own = np.ones((2, 40)), None if features is None else features[:2]
    assert np.array_equal(found.embedding_, model.embedding_)
    assert np.array_equal(found.transform(rows, features=own), model.transform(rows, features=own))
    asked = ["n3", "n1"] if named else [3, 1]
    assert np.array_equal(found.vectors(asked), model.embedding_[[3, 1]])
    assert {**found.get_params(), "weights": (1, 2), "features": None} == {**model.get_params(), "features": None}
    plain = FastRP(8).fit(graph)
    plain.save(tmp_path / "p.anb")
    with pytest.raises(InputError, match="keep_powers=True"):
        FastRP.load(tmp_path / "p.anb").transform(rows)
    damaged = bytearray((tmp_path / "m.anb").read_bytes())
    damaged[-100] ^= 1
    (tmp_path / "m.anb").write_bytes(damaged)
    with pytest.raises(DataError):
        FastRP.load(tmp_path / "m.anb")
    with pytest.raises(InputError, match="not fitted yet"):
        FastRP(8).save(tmp_path / "n.anb")


@pytest.mark.parametrize("matrix", ["transition", "adjacency", "symmetric"])
@pytest.mark.parametrize("directed", [True, False])
def test_new_rows_that_are_old_ones_fall_on_them(matrix, directed):
    graph = drawn(directed=directed)
    model = FastRP(40, keep_powers=True, matrix=matrix).fit(graph)
    np.testing.assert_allclose(model.transform(graph.to_scipy()), model.embedding_, atol=1e-4)


def test_names_of_new_nodes():
    graph = drawn()
    model = FastRP(40, (1.0,), self_weight=1.0, keep_powers=True, s=4).fit(graph)
    rows = np.ones((2, 40))
    assert np.array_equal(model.transform(rows, names=[40, 41]), model.transform(rows))
    named = model.transform(rows, names=["x", "y"])
    assert not np.array_equal(named[0], named[1])
    assert np.array_equal(model.transform(rows, names=["y", "x"]), named[::-1])
    with pytest.raises(InputError, match="2 rows and 1 names"):
        model.transform(rows, names=["x"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.ones((2, 39)), r"\[new nodes, 40\]"),
        (np.ones(40), r"\(40,\)"),
        (-np.ones((1, 40)), "not negative"),
        (np.full((1, 40), np.nan), "finite"),
        (np.full((1, 40), "a"), "entries of rows .new nodes, 40. are real numbers, not <U1"),
    ],
)
def test_new_rows_that_do_not_fit(rows, message):
    with pytest.raises(InputError, match=message):
        FastRP(8, keep_powers=True).fit(drawn()).transform(rows)


def test_transform_says_what_it_needs():
    with pytest.raises(InputError, match="keep_powers=True"):
        FastRP(8).fit(drawn()).transform(np.ones((1, 40)))
    with pytest.raises(InputError, match="keep_powers=True"):
        FastRP(8, keep_powers=True).transform(np.ones((1, 40)))
    features = FastRP(8, keep_powers=True, features=np.eye(40), feature_ratio=0.5, self_weight=1.0).fit(drawn())
    with pytest.raises(InputError, match="give those of the new nodes, 40 each"):
        features.transform(np.ones((1, 40)))
    with pytest.raises(InputError, match="features have 39 columns, those that were fitted 40"):
        features.transform(np.ones((1, 40)), features=np.ones((1, 39)))
    with pytest.raises(InputError, match=r"\(2, 40\); it must be \[1, features\]"):
        features.transform(np.ones((1, 40)), features=np.ones((2, 40)))
    with pytest.raises(InputError, match="fitted without features"):
        FastRP(8, keep_powers=True).fit(drawn()).transform(np.ones((1, 40)), features=np.ones((1, 3)))


def test_powers_and_weights_that_do_not_fit():
    model = FastRP(8)
    with pytest.raises(InputError, match="order is 0"):
        model.powers(drawn(), 0)
    with pytest.raises(InputError, match="5 weights and 2 powers"):
        model.combine(model.powers(drawn(), 2), (1, 1, 1, 1, 1))
    with pytest.raises(InputError, match="all weights are 0"):
        model.combine(model.powers(drawn(), 2), (0, 0))


# As an estimator


def test_scikit_learn_can_clone_it():
    base = pytest.importorskip("sklearn.base")
    model = FastRP(24, [0.0, 1.0], -0.3, features=np.eye(40), feature_ratio=0.5, seed=4)
    copied = base.clone(model)
    assert copied is not model
    assert {**copied.get_params(), "features": None} == {**model.get_params(), "features": None}
    graph = drawn()
    assert np.array_equal(copied.fit_transform(graph), model.fit_transform(graph))
    assert not hasattr(base.clone(model), "embedding_")


def test_parameters_are_stored_as_given_and_can_be_changed():
    weights = [0.0, 1.0]
    model = FastRP(24, weights)
    assert model.weights is weights
    assert model.set_params(dim=12, beta=0.0) is model
    assert (model.dim, model.beta) == (12, 0.0)
    with pytest.raises(InputError, match="dim is 0"):
        model.set_params(dim=0, beta=-1.0)
    assert (model.dim, model.beta) == (12, 0.0)
    with pytest.raises(ConfigError, match="no parameter 'dims'"):
        model.set_params(dims=3)
    assert "dim=12" in repr(model)


def test_fit_keeps_what_it_says():
    graph = drawn()
    model = FastRP(16).fit(graph)
    assert np.array_equal(model.embedding_, FastRP(16).fit_transform(graph))
    assert not hasattr(model, "powers_")
    kept = FastRP(16, keep_powers=True).fit(graph)
    assert len(kept.powers_.power_KND) == 4
    assert np.array_equal(kept.embedding_, model.embedding_)


# Memory


def test_peak_bytes_by_hand():
    # 1,000 nodes, 64 columns: two of four weights are not 0: 2 x 64; two chunks of 64; R: s = 32, so 64 x 2 / 32 bytes a node; 40 more
    assert FastRP(64).peak_bytes(1000, 5000) == 4 * 1000 * (2 * 64 + 2 * 64) + 4 * 1000 + 40_000
    assert FastRP(64, chunk=32).peak_bytes(1000, 5000) == 4 * 1000 * (2 * 64 + 2 * 32) + 2 * 1000 + 40_000
    assert FastRP(64, matrix="symmetric").peak_bytes(1000, 5000) - FastRP(64).peak_bytes(1000, 5000) == 20_000
    assert FastRP(64, normalize=False).peak_bytes(1000, 5000) == 4 * 1000 * (64 + 2 * 64) + 4 * 1000 + 40_000


# Search


def test_tuning_by_labels_finds_what_is_no_worse():
    graph, group_N = blocks(within=0.25, between=0.04)
    model = FastRP(48, (0, 1, 1), seed=2)
    found = model.tune(graph, group_N, trials=9, dim=32, train_fraction=0.3, shuffles=(0, 1))
    assert len(found.trials) == 9
    assert found.objective == "macro_f1"
    best = max(trial.score for trial in found.trials)
    assert (found.best.beta, found.best.weights) in {(t.beta, t.weights) for t in found.trials if t.score == best}
    assert found.best.dim == 48
    assert found.best.seed == 2
    assert all(
        -1 <= trial.beta <= 0 and trial.weights[:2] == (0, 1) and 1 <= trial.weights[2] <= 64 for trial in found.trials
    )
    assert len({trial.beta for trial in found.trials}) == 3  # 4 + 4 + 1: powers are used again
    assert len({trial.weights for trial in found.trials}) == 9
    trial = found.trials[4]
    again = FastRP(32, trial.weights, trial.beta, seed=2).fit_transform(graph)
    assert classify_nodes(again, group_N, train_fraction=0.3, seeds=(0, 1)).macro == pytest.approx(trial.score)
    assert found.trials == model.tune(graph, group_N, trials=9, dim=32, train_fraction=0.3, shuffles=(0, 1)).trials


def test_tuning_tries_longer_walks_too():
    """Each order in turn, and then around the best; a trial is what its own weights alone give."""
    graph, group_N = blocks(within=0.25, between=0.04)
    found = FastRP(32, seed=2).tune(graph, group_N, trials=12, dim=32, orders=(2, 3, 5), train_fraction=0.3)
    lengths = [len(trial.weights) for trial in found.trials]
    assert lengths[:6] == [2, 3, 5, 2, 3, 5]
    assert len(set(lengths[8:])) == 1
    for trial in found.trials[1:4]:
        again = FastRP(32, trial.weights, trial.beta, seed=2).fit_transform(graph)
        assert classify_nodes(again, group_N, train_fraction=0.3, seeds=(0,)).macro == pytest.approx(trial.score)


def test_tuning_by_edges():
    graph, _ = blocks()
    held = hold_out_edges(graph, 0.1)
    found = FastRP(48).tune(None, edges=held, trials=5, dim=32, order=2)
    assert found.objective == "auc"
    assert len(found.best.weights) == 2
    trial = found.trials[0]
    vectors = FastRP(32, trial.weights, trial.beta).fit_transform(held.graph)
    assert trial.score == link_auc(vectors, held.positive_E2, held.negative_E2, operator="cosine")
    assert max(trial.score for trial in found.trials) > 0.8
    assert FastRP(8).tune(None, edges=held, trials=1, dim=8, order=1).best.weights == (1.0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either labels or edges"),
        ({"labels": np.zeros(60, int), "edges": 1}, "either labels or edges"),
        ({"labels": np.zeros(60, int), "trials": 0}, "trials is 0"),
        ({"labels": np.zeros(60, int), "objective": "accuracy"}, "objective is 'accuracy'"),
        ({"labels": np.zeros(60, int), "order": 0}, "order is 0"),
        ({"labels": np.zeros(60, int), "orders": ()}, r"order is \(\)"),
        ({"labels": np.zeros(60, int), "orders": (3, 0)}, r"order is \(3, 0\)"),
        ({"labels": np.zeros(60, int), "order": 2, "orders": (3,)}, "either order or orders"),
    ],
)
def test_tuning_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        FastRP(8).tune(blocks()[0], **options)


# It works


def test_groups_of_a_graph_are_found():
    graph, group_N = blocks()
    found = FastRP(64).fit_transform(graph)
    assert classify_nodes(found, group_N, train_fraction=0.3).micro > 0.95


def test_hidden_edges_are_found():
    graph, _ = blocks()
    held = hold_out_edges(graph, 0.1)
    found = FastRP(64).fit_transform(held.graph)
    assert link_auc(found, held.positive_E2, held.negative_E2, operator="cosine") > 0.85


@pytest.mark.slow
def test_the_published_figures_on_blogcatalog():
    """Notebook of the published code: 0.3723 / 0.2281 at 10%, 0.4122 / 0.2753 at 50%."""
    try:
        data = load_dataset("blogcatalog")
    except Exception as error:
        pytest.skip(str(error))
    model = FastRP(512, (0, 0, 1, 6.67), -0.64)
    tenth = [
        classify_nodes(
            FastRP(**{**model.get_params(), "seed": s}).fit_transform(data.graph), data.labels_NC, seeds=(s,), C=0.1
        )
        for s in (0, 1, 2)
    ]
    assert np.mean([score.micro for score in tenth]) > 0.3723 - 0.005
    assert np.mean([score.macro for score in tenth]) > 0.2281 - 0.007


CHANGES = {
    "weights": (1.0, 1.0, 2.0),
    "concatenate": True,
    "dim": 8,
    "normalize": False,
    "self_weight": 1.0,
    "dtype": "float64",
    "matrix": "symmetric",
    "beta": 0.0,
    "seed": 5,
    "projection": "gaussian",
    "s": 2.0,
    "standardize": False,
    "direction": "in",
    "allow_negative": True,
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_fitted_is_asked_with_the_arguments_that_it_was_fitted_with(tmp_path, name):
    """`concatenate` read a mean beyond its end, other `weights` were a raw IndexError, `save` wrote what could not be read."""
    graph = Graph.from_edges(np.arange(30), (np.arange(30) * 7 + 1) % 30, num_nodes=30)
    model = FastRP(4, weights=(1.0, 1.0), keep_powers=True).fit(graph)
    rows = np.ones((2, 30))
    right = model.transform(rows)
    model.save(tmp_path / "m.anb")
    for one in (model, FastRP.load(tmp_path / "m.anb")):
        before = getattr(one, name)
        one.set_params(**{name: CHANGES[name]})
        for ask in (lambda one=one: one.transform(rows), lambda one=one: one.save(tmp_path / "n.anb")):
            with pytest.raises(InputError, match=f"{name} is .* when this FastRP was fitted"):
                ask()
        assert not (tmp_path / "n.anb").exists()
        np.testing.assert_array_equal(one.set_params(**{name: before}, workers=2).transform(rows), right)


@pytest.mark.parametrize("s", [0, -3, 0.5, float("nan"), float("inf")])
def test_a_file_whose_projection_has_no_share_is_damaged(tmp_path, s):
    """Transform divided by it."""
    graph = Graph.from_edges(np.arange(30), (np.arange(30) * 7 + 1) % 30, num_nodes=30)
    path = tmp_path / "m.anb"
    FastRP(4, weights=(1.0, 1.0), keep_powers=True, self_weight=1.0).fit(graph).save(path)
    found = read_arrays(path, "fastrp")
    arrays = {key: np.array(value) for key, value in found.arrays.items()}
    write_arrays(path, "fastrp", arrays, {**found.meta, "start": {**found.meta["start"], "s": str(s)}})
    with pytest.raises(DataError, match="is damaged"):
        FastRP.load(path)


@pytest.mark.parametrize(
    "name", ["embedding", "mean", "factor", "key", "scale", "power0", "power1", "power2", "num_random", "right"]
)
@pytest.mark.parametrize("change", ["wide", "narrow", "flat", "text", "half", "long"])
def test_arrays_of_another_width_than_the_model_s_are_a_damaged_file(tmp_path, name, change):
    """With right sums: `transform` read and wrote beyond them."""
    graph = Graph.from_edges(np.arange(30), (np.arange(30) * 7 + 1) % 30, num_nodes=30)
    path = tmp_path / "m.anb"
    FastRP(4, weights=(1.0, 1.0), keep_powers=True, matrix="symmetric", self_weight=1.0).fit(graph).save(path)
    found = read_arrays(path, "fastrp")
    arrays, meta = {key: np.array(value) for key, value in found.arrays.items()}, dict(found.meta)
    if name == "num_random":
        meta["start"] = {**meta["start"], name: {"wide": 1 << 19, "narrow": 2, "flat": -1}.get(change, "4")}
    else:
        one = arrays[name]
        arrays[name] = {
            "wide": lambda: np.concatenate([one, one], axis=-1),
            "narrow": lambda: one[..., :-1],
            "flat": lambda: one.reshape(-1) if one.ndim > 1 else one.reshape(-1, 1),
            "text": lambda: one.astype("U4"),
            # Other types of the same kind, which no kernel is made for.
            "half": lambda: one.astype(f"{one.dtype.kind}2"),
            "long": lambda: one.astype(np.longdouble),
        }[change]()
    write_arrays(path, "fastrp", arrays, meta)
    if name == "num_random" and change not in ("wide", "narrow", "flat"):
        # It says the same.
        FastRP.load(path).transform(np.ones((2, 30)))
        return
    with pytest.raises(DataError, match="is damaged"):
        FastRP.load(path)


@pytest.mark.parametrize("name", ["feature_columns", "feature_random", "num_random below", "num_random beyond"])
def test_a_file_with_features_of_another_width_is_damaged(tmp_path, name):
    graph = Graph.from_edges(np.arange(30), (np.arange(30) * 7 + 1) % 30, num_nodes=30)
    features = np.random.default_rng(0).standard_normal((30, 3)).astype(np.float32)
    path = tmp_path / "m.anb"
    settings = {"features": features, "feature_ratio": 0.5, "keep_powers": True, "self_weight": 1.0}
    FastRP(8, weights=(1.0, 1.0), **settings).fit(graph).save(path)
    assert FastRP.load(path).transform(np.ones((2, 30)), features=features[:2]).shape == (2, 8)
    found = read_arrays(path, "fastrp")
    arrays, meta = {key: np.array(value) for key, value in found.arrays.items()}, dict(found.meta)
    if name.startswith("num_random"):
        meta["start"] = {**meta["start"], "num_random": -1 if name.endswith("below") else 9}
    else:
        arrays[name] = arrays[name][:, :-1]
    write_arrays(path, "fastrp", arrays, meta)
    with pytest.raises(DataError, match="is damaged"):
        FastRP.load(path)
