"""Our classifier is that of liblinear, our F1 scikit-learn's, and AUC the count of all pairs."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from anabranch.errors import BackendError, InputError
from anabranch.graph import Graph
from anabranch.graph.evaluate import auc, classify_nodes, f1, fit_one_vs_rest, hold_out_edges, link_auc, top_labels


def drawn(seed=0, nodes=120, dim=6, labels=5, noise=1.0):
    """Vectors, and labels that depend on them."""
    generator = np.random.default_rng(seed)
    x_ND = generator.normal(size=(nodes, dim)) * np.array([10.0, 3, 1, 1, 0.3, 0.1][:dim]) + 0.5
    logit_NC = x_ND @ generator.normal(size=(dim, labels)) / 3 - 1
    return x_ND, logit_NC + noise * generator.logistic(size=logit_NC.shape) > 0


# One-vs-rest logistic regression


@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
@pytest.mark.parametrize(("nodes", "dim"), [(120, 6), (5, 6), (7, 6), (1, 3)])
def test_the_gradient_vanishes_at_the_solution(C, nodes, dim):
    x_ND, label_NC = drawn(nodes=nodes, dim=dim)
    found = fit_one_vs_rest(x_ND, label_NC, C, tol=1e-9)
    for label, has_N in enumerate(label_NC.T):
        if has_N.all() or not has_N.any():
            assert found.bias_C[label] == (np.inf if has_N.all() else -np.inf)
            continue
        weight = np.append(found.weight_DC[:, label], found.bias_C[label])
        augmented = np.column_stack([x_ND, np.ones(nodes)])
        residual = 1 / (1 + np.exp(-augmented @ weight)) - has_N
        gradient = weight + C * augmented.T @ residual
        assert np.linalg.norm(gradient) < 1e-7 * max(1, C * np.abs(augmented).sum())


@pytest.mark.parametrize("C", [0.1, 1.0, 30.0])
def test_equals_liblinear(C):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x_ND, label_NC = drawn()
    found = fit_one_vs_rest(x_ND, label_NC, C, tol=1e-10)
    for label, has_N in enumerate(label_NC.T):
        model = linear_model.LogisticRegression(C=C, solver="liblinear", tol=1e-10, max_iter=5000).fit(x_ND, has_N)
        assert found.weight_DC[:, label] == pytest.approx(model.coef_[0], abs=2e-4)
        assert found.bias_C[label] == pytest.approx(model.intercept_[0], abs=2e-4)


def test_separable_labels_and_huge_values_end_too():
    x_ND = np.linspace(-1e6, 1e6, 50)[:, None]
    found = fit_one_vs_rest(x_ND, x_ND > 0)
    assert (found.decide(x_ND) > 0).tolist() == (x_ND > 0).tolist()
    assert np.isfinite(found.weight_DC).all()


def test_labels_that_all_or_none_have():
    x_ND, label_NC = drawn(labels=3)
    label_NC[:, 0], label_NC[:, 1] = True, False
    found = fit_one_vs_rest(x_ND, label_NC)
    assert found.bias_C[:2].tolist() == [np.inf, -np.inf]
    assert found.weight_DC[:, :2].tolist() == np.zeros((6, 2)).tolist()
    assert np.isfinite(found.decide(x_ND)[:, 2]).all()
    given = top_labels(found.decide(x_ND), np.full(len(x_ND), 2))
    assert given[:, 0].all()  # what all have first, what none has last
    assert not given[:, 1].any()


@given(st.integers(0, 2**16), st.floats(0.01, 100), st.integers(1, 40), st.integers(1, 8))
def test_any_problem_is_solved_to_its_tolerance(seed, C, nodes, dim):
    generator = np.random.default_rng(seed)
    x_ND = generator.normal(size=(nodes, dim)) * 10.0 ** generator.integers(-3, 4, dim)
    has_N1 = generator.random((nodes, 1)) < 0.4
    found = fit_one_vs_rest(x_ND, has_N1, C)
    if not has_N1.all() and has_N1.any():
        augmented = np.column_stack([x_ND, np.ones(nodes)])
        weight = np.append(found.weight_DC, found.bias_C)

        def gradient(weight):
            return weight + C * augmented.T @ (0.5 + 0.5 * np.tanh(augmented @ weight / 2) - has_N1[:, 0])

        assert np.linalg.norm(gradient(weight)) <= 1.01e-6 * np.linalg.norm(gradient(0 * weight)) + 1e-9


# Labels and F1


def test_top_labels_by_hand():
    score_NC = np.array([[0.1, 0.9, 0.5], [0.5, 0.5, 0.5], [1.0, 2.0, 3.0], [-np.inf, 0.0, np.inf]])
    assert top_labels(score_NC, [1, 2, 0, 2]).tolist() == [
        [False, True, False],
        [True, True, False],  # ties to the lowest label
        [False, False, False],
        [False, True, True],
    ]


def test_f1_by_hand():
    true_NC = np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], bool)
    given_NC = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]], bool)
    # label 0: hit 1 of 1 true, 2 given: 2/3; label 1: 1 of 2, 1 given: 2/3; label 2: 0; label 3: nothing, 0
    assert f1(true_NC, given_NC) == (pytest.approx(2 * 2 / (4 + 4)), pytest.approx((2 / 3 + 2 / 3) / 4))
    assert f1(true_NC[:0], given_NC[:0]) == (0.0, 0.0)


@given(st.integers(0, 2**16), st.integers(1, 20), st.integers(1, 6))
def test_f1_is_that_of_scikit_learn(seed, nodes, labels):
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(seed)
    true_NC, given_NC = generator.random((2, nodes, labels)) < 0.4
    if labels == 1:
        true_NC, given_NC = np.column_stack([true_NC, true_NC]), np.column_stack([given_NC, given_NC])
    micro, macro = f1(true_NC, given_NC)
    assert micro == pytest.approx(metrics.f1_score(true_NC, given_NC, average="micro", zero_division=0))
    assert macro == pytest.approx(metrics.f1_score(true_NC, given_NC, average="macro", zero_division=0))


def deepwalk_scores(x_ND, label_NC, fraction, seed, C):
    """The protocol written with scikit-learn, label by label."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    metrics = pytest.importorskip("sklearn.metrics")
    order = np.random.default_rng(seed).permutation(np.flatnonzero(label_NC.any(1)))
    count = int(fraction * len(order))
    train, test = order[:count], order[count:]
    probability_NC = np.zeros((len(test), label_NC.shape[1]))
    for label in range(label_NC.shape[1]):
        model = linear_model.LogisticRegression(C=C, solver="liblinear", tol=1e-8, max_iter=2000)
        probability_NC[:, label] = model.fit(x_ND[train], label_NC[train, label]).predict_proba(x_ND[test])[:, 1]
    given_NC = np.zeros((len(test), label_NC.shape[1]), bool)
    for row, node in enumerate(test):
        given_NC[row, np.argsort(probability_NC[row])[::-1][: label_NC[node].sum()]] = True
    return [metrics.f1_score(label_NC[test], given_NC, average=mean, zero_division=0) for mean in ("micro", "macro")]


def test_classify_nodes_is_deepwalks_protocol():
    x_ND, label_NC = drawn(nodes=200)
    found = classify_nodes(x_ND, csr_array(label_NC), train_fraction=0.5, seeds=(3, 4), C=0.5)
    for place, seed in enumerate((3, 4)):
        micro, macro = deepwalk_scores(x_ND, label_NC, 0.5, seed, 0.5)
        assert found.micro_S[place] == pytest.approx(micro, abs=0.005)
        assert found.macro_S[place] == pytest.approx(macro, abs=0.005)
    assert found.micro == found.micro_S.mean()
    assert found.macro == found.macro_S.mean()
    labelled = int(label_NC.any(1).sum())
    assert (found.num_train, found.num_test) == (labelled // 2, labelled - labelled // 2)


def test_solvers_agree_and_seeds_repeat():
    pytest.importorskip("sklearn")
    x_ND, label_NC = drawn()
    ours = classify_nodes(x_ND, label_NC, train_fraction=0.3)
    assert np.array_equal(ours.micro_S, classify_nodes(x_ND, label_NC, train_fraction=0.3).micro_S)
    theirs = classify_nodes(x_ND, label_NC, train_fraction=0.3, solver="liblinear")
    assert theirs.micro_S == pytest.approx(ours.micro_S, abs=0.02)


def test_labels_of_every_form_and_nodes_without_any():
    x_ND, _ = drawn()
    label_N = (x_ND[:, 0] > 0).astype(int)
    label_N[:10] = -1
    dense = label_N[:, None] == np.arange(2)
    found = [
        classify_nodes(x_ND, labels, seeds=(0,)) for labels in (label_N, dense, dense.astype(int), csr_array(dense))
    ]
    assert len({score.micro for score in found}) == 1
    assert found[0].num_train + found[0].num_test == 110
    assert found[0].micro > 0.9


def test_good_vectors_score_above_bad_ones():
    x_ND, label_NC = drawn(noise=0.1)
    noise_ND = np.random.default_rng(1).normal(size=x_ND.shape)
    good, bad = (classify_nodes(of, label_NC, train_fraction=0.5) for of in (x_ND, noise_ND))
    assert good.micro > bad.micro + 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_fraction": 0.0}, "train_fraction is 0.0"),
        ({"train_fraction": 1.0}, "train_fraction is 1.0"),
        ({"train_fraction": 0.001}, "of 110 labelled nodes"),
        ({"train_fraction": float("nan")}, "train_fraction is nan"),
        ({"seeds": ()}, "seeds is empty"),
        ({"C": 0.0}, "C is 0.0"),
        ({"C": float("nan")}, "C is nan"),
        ({"solver": "lbfgs"}, "solver is 'lbfgs'"),
        ({"labels": np.zeros((7, 2))}, r"labels have the shape \(7, 2\)"),
        ({"labels": np.full(110, -2)}, "has the label -2"),
        ({"embedding_ND": np.zeros(110)}, r"\(110,\)"),
        ({"embedding_ND": np.full((110, 2), np.nan)}, "node 0"),
        ({"embedding_ND": np.full((110, 2), "a")}, "numbers"),
    ],
)
def test_what_cannot_be_classified(change, message):
    x_ND, label_NC = drawn(nodes=110)
    label_NC[:, 0] |= ~label_NC.any(1)
    with pytest.raises(InputError, match=message):
        classify_nodes(**{"embedding_ND": x_ND, "labels": label_NC, **change})


@pytest.mark.parametrize("solver", ["newton", "liblinear"])
def test_without_scikit_learn(solver, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    x_ND, label_NC = drawn()
    with pytest.raises(BackendError, match=r"pip install 'anabranch\[graph\]'"):
        classify_nodes(x_ND, label_NC, solver=solver)


# Links


def pairs_of(graph):
    source_E, target_E, _ = graph.edges()
    return set(zip(source_E.tolist(), target_E.tolist(), strict=True))


@given(st.integers(0, 2**16), st.booleans(), st.booleans(), st.booleans())
def test_hidden_edges_and_non_edges(seed, directed, weighted, connected):
    generator = np.random.default_rng(seed)
    source_E, target_E = generator.integers(0, 20, (2, 60))
    weight_E = generator.random(60) + 0.1 if weighted else None
    graph = Graph.from_edges(source_E, target_E, weight_E, directed, 22, names=[f"n{i}" for i in range(22)])
    found = hold_out_edges(graph, 0.2, seed, keep_connected=connected)
    whole, rest = pairs_of(graph), pairs_of(found.graph)
    hidden = set(map(tuple, found.positive_E2.tolist()))
    assert len(hidden) == len(found.positive_E2) == len(found.negative_E2) == int(0.2 * graph.num_edges)
    assert rest | hidden == whole
    assert not rest & hidden
    assert all(source != target for source, target in hidden)
    non_edges = set(map(tuple, found.negative_E2.tolist()))
    assert len(non_edges) == len(found.negative_E2)
    assert not non_edges & whole
    assert all(source != target and (directed or source < target) for source, target in non_edges)
    assert found.graph.num_nodes == 22
    assert found.graph.is_directed == directed
    assert (found.graph.weights is None) == (weight_E is None)
    assert list(found.graph.names) == list(graph.names)
    again = hold_out_edges(graph, 0.2, seed, keep_connected=connected)
    assert np.array_equal(again.positive_E2, found.positive_E2)
    assert np.array_equal(again.negative_E2, found.negative_E2)
    if connected:
        count = [connected_components(of.to_scipy(), directed=False)[0] for of in (graph, found.graph)]
        assert count[0] == count[1]


def test_kept_weights_stay_with_their_edges():
    graph = Graph.from_edges([0, 1, 2, 3, 0], [1, 2, 3, 4, 4], [1.0, 2, 3, 4, 5])
    found = hold_out_edges(graph, 0.4, seed=1)
    before, after = graph.to_scipy().toarray(), found.graph.to_scipy().toarray()
    assert np.array_equal(after, np.where(after != 0, before, 0))
    assert (after != 0).sum() == 6


def test_non_edges_are_even():
    graph = Graph.from_edges([0], [1], num_nodes=6)
    counts = np.zeros((6, 6))
    for seed in range(300):
        (pair,) = hold_out_edges(Graph.from_edges([0, 0], [1, 2], num_nodes=6), 0.5, seed).negative_E2
        counts[tuple(pair)] += 1
    assert counts[0, 1] == counts[0, 2] == 0
    assert (counts > 0).sum() == 15 - 2
    assert counts.max() < 23.1 + 5 * 4.6  # 300 / 13, five deviations
    assert graph.num_edges == 1


@pytest.mark.parametrize(
    ("fraction", "connected", "message"),
    [(0.0, False, "1 to 4"), (1.0, False, "fraction is 1.0"), (0.1, False, "of 4 edges"), (0.9, True, "1 to 0 can")],
)
def test_what_cannot_be_held_out(fraction, connected, message):
    path = Graph.from_edges([0, 1, 2, 3], [1, 2, 3, 4])
    with pytest.raises(InputError, match=message):
        hold_out_edges(path, fraction, keep_connected=connected)


def test_a_full_graph_has_no_non_edges():
    source, target = np.triu_indices(5, 1)
    with pytest.raises(InputError, match="the graph has 0"):
        hold_out_edges(Graph.from_edges(source, target), 0.3)


def test_auc_by_hand():
    # 3 above 1, 2, ties 3: 2.5 of 3; 1 ties 1: 0.5 of 3
    assert auc([3, 1], [1, 2, 3]) == (2.5 + 0.5) / 6
    assert auc([1], [0]) == 1.0
    assert auc([0], [1]) == 0.0
    assert auc([np.inf], [-np.inf, np.inf]) == 0.75


@given(st.lists(st.integers(0, 4), min_size=1), st.lists(st.integers(0, 4), min_size=1))
def test_auc_counts_all_pairs(positive, negative):
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    assert auc(positive, negative) == wins / (len(positive) * len(negative))


def test_link_auc_by_operator():
    x_ND = np.array([[1.0, 0.0], [5.0, 0.1], [-1.0, 0.0], [0.0, 0.0]])
    edge, non_edges = [[0, 1]], [[0, 2], [0, 3], [1, 1]]
    assert link_auc(x_ND, edge, non_edges) == 2 / 3  # 5 against -1, 0, 25.01
    assert link_auc(x_ND, edge, non_edges, operator="cosine") == 2 / 3  # 0.9998 against -1, 0, 1
    assert link_auc(x_ND, edge, non_edges, operator="l2") == 0.0  # -4 against -2, -1, 0
    assert link_auc(x_ND, edge, non_edges, target_ND=-x_ND) == 1 / 3  # -5 against 1, 0, -25.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive_E2": [[0, 4]]}, r"positive_E2 0 is \(0, 4\)"),
        ({"negative_E2": [[0, 1], [-1, 0]]}, "negative_E2 1"),
        ({"positive_E2": [0, 1]}, "shape"),
        ({"positive_E2": [[0.0, 1.0]]}, "integers"),
        ({"negative_E2": np.empty((0, 2), int)}, "no negative scores"),
        ({"operator": "sum"}, "operator is 'sum'"),
        ({"target_ND": np.ones((3, 2))}, "target_ND has the shape"),
    ],
)
def test_what_has_no_auc(change, message):
    given = {"embedding_ND": np.ones((4, 2)), "positive_E2": [[0, 1]], "negative_E2": [[2, 3]], **change}
    with pytest.raises(InputError, match=message):
        link_auc(**given)
    with pytest.raises(InputError, match="positive score 1 is NaN"):
        auc([0, np.nan], [1])
