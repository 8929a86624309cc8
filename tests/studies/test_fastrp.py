import json

import numpy as np
import pytest

from anabranch.config import from_dict, to_dict
from anabranch.graph import Graph
from anabranch.graph.datasets import Dataset
from anabranch.graph.generate import barabasi_albert
from anabranch.studies import fastrp, find, names
from anabranch.studies.fastrp import Case, by_svd, factors, judge, make
from anabranch.studies.harness import Results, run_study
from claims import run_only

judge = run_only(judge)


def runs(micro, **others):
    return {
        seed: {"blogcatalog_micro_10": value, **{name: values[seed] for name, values in others.items()}}
        for seed, value in enumerate(micro)
    }


def verdicts(runs):
    return {claim.claim: claim.verdict for claim in judge(Results(runs))}


@pytest.mark.parametrize(
    ("micro", "macro", "verdict"),
    [
        ([0.373, 0.364], [0.22, 0.23], ("holds", "holds", "holds")),
        ([0.373, 0.360], [0.22, 0.21], ("not resolved", "not resolved", "holds")),
        ([0.350, 0.351], [0.20, 0.21], ("does not hold", "does not hold", "does not hold")),
        ([0.373], [0.23], ("not resolved", "not resolved", "not resolved")),
    ],
)
def test_published_figures_are_reached_in_every_seed(micro, macro, verdict):
    found = verdicts({"fastrp": runs(micro, blogcatalog_macro_10=macro)})
    assert found["reproduces the published micro F1 (to 0.01)"] == verdict[0]
    assert found["reproduces the published macro F1 (to 0.01)"] == verdict[1]
    assert found["as good as DeepWalk's published micro F1 (to 0.01)"] == verdict[2]


def test_what_helps_is_paired():
    # fastrp - no-norm: 0.080, 0.082, 0.078; half width 4.303 * 0.002 / sqrt(3) = 0.005; beta0 changes its sign
    found = judge(
        Results(
            {
                "fastrp": runs([0.37, 0.372, 0.368]),
                "no-norm": runs([0.29] * 3),
                "beta0": runs([0.36, 0.373, 0.37]),
                "q1": runs([0.4, 0.402, 0.398]),
            }
        )
    )
    claims = {claim.claim: claim for claim in found}
    assert claims["normalising rows helps"].verdict == "holds"
    assert claims["normalising rows helps"].interval == pytest.approx([0.07503, 0.08497], abs=1e-5)
    assert claims["damping hubs helps"].verdict == "not resolved"
    assert claims["orders beyond the first help"].verdict == "does not hold"


@pytest.mark.parametrize(
    ("svd", "verdict"), [([0.375, 0.365], "holds"), ([0.375, 0.35], "not resolved"), ([0.3, 0.4], "does not hold")]
)
def test_the_reduction_may_change_little(svd, verdict):
    found = verdicts({"fastrp": runs([0.37, 0.37]), "svd": runs(svd)})
    assert found["the similarity matters, not the reduction (blogcatalog: within 0.01 of SVD)"] == verdict
    assert not any("ppi" in claim for claim in found)


@pytest.mark.parametrize(
    ("slopes", "verdict"), [([1.0, 1.14], "holds"), ([1.0, 1.2], "not resolved"), ([1.2, 0.8], "does not hold")]
)
def test_growth(slopes, verdict):
    found = verdicts({"scaling": {seed: {"slope": slope} for seed, slope in enumerate(slopes)}})
    assert found["time grows near-linearly (slope 0.9 to 1.15)"] == verdict


@pytest.mark.parametrize(
    ("micro", "seconds", "verdict"),
    [
        ([0.38, 0.375], [40.0, 30.0], ("holds", "holds")),
        ([0.39, 0.375], [40.0, 20.0], ("not resolved", "not resolved")),
    ],
)
def test_against_walks(micro, seconds, verdict):
    ours, walks = (runs(m, blogcatalog_cpu_s=s) for m, s in (([0.372, 0.372], [0.2, 0.2]), (micro, seconds)))
    found = verdicts({"fastrp": ours, "graphvite": walks})
    assert found["as good as walks and negative sampling (to 0.01)"] == verdict[0]
    assert found["at least 150 times less processor time"] == verdict[1]


def test_arms_differ_as_they_are_named():
    made = {arm.name: arm.config for arm in make(full=True).arms}
    assert made["fastrp"] == Case()
    assert made["fastrp128"] == Case(dim=128)
    assert made["no-norm"] == Case(normalize=False)
    assert made["beta0"] == Case(beta=0.0)
    assert [made[f"q{q}"].weights for q in (1, 2, 3, 5)] == [(1,), (1, 6.67), (0, 1, 6.67), (0, 0, 0, 1, 6.67)]
    assert made["scaling"].edges[0] == 10_000
    assert made["scaling"].edges[-1] == 1_000_000
    assert "graphvite" not in make(full=True).default_arms


def test_configs_are_json():
    for full in (False, True):
        for arm in make(full).arms:
            assert from_dict(Case, json.loads(json.dumps(to_dict(arm.config)))) == arm.config
    assert make(num_shuffles=3).arms[0].config.num_shuffles == 3


def test_it_is_listed():
    assert "fastrp" in names()
    assert find("fastrp") is make


def similarity(graph, weights, beta, normalize):
    """The matrix that is reduced, dense."""
    A = graph.to_scipy(np.float64).toarray()
    P, power, total = A / A.sum(1, keepdims=True), np.diag(A.sum(1) ** beta), 0
    for weight in weights:
        power = P @ power
        total = total + weight * (power / np.linalg.norm(power, axis=1, keepdims=True) if normalize else power)
    return total


@pytest.mark.parametrize("normalize", [False, True])
def test_factors_are_those_of_a_dense_svd(normalize):
    graph, weights = barabasi_albert(60, 4), (0.5, 0.0, 2.0)
    found = factors(graph, Case(dim=30, weights=weights, beta=-0.5, normalize=normalize), 0)
    assert found.shape == (60, 30)
    size = np.linalg.svd(similarity(graph, weights, -0.5, normalize))[1]
    ours = found @ np.linalg.pinv(found) @ similarity(graph, weights, -0.5, normalize)  # onto their span
    rest = np.linalg.norm(similarity(graph, weights, -0.5, normalize) - ours)
    assert rest < 1.02 * np.sqrt((size[30:] ** 2).sum()) + 1e-3 * size[0]
    assert np.linalg.norm(found, axis=0)[:5] == pytest.approx(size[:5], rel=0.05 if normalize else 1e-3)


def test_turned_factors_keep_distances():
    graph = barabasi_albert(100, 4)
    case = Case(dim=40, weights=(1.0, 2.0))
    before, after = factors(graph, case, 0), by_svd(graph, case, 0)
    assert after.std(0) == pytest.approx(np.ones(40), abs=1e-3)
    left, right = np.triu_indices(100, 1)
    near, far = (np.linalg.norm(of[left] - of[right], axis=1) for of in (before, after))
    assert np.corrcoef(near, far)[0, 1] > 0.9


def test_smoke_run(tmp_path, monkeypatch):
    graph = barabasi_albert(120, 4)
    labels = np.random.default_rng(0).random((120, 4)) < 0.4
    monkeypatch.setattr(fastrp, "load_dataset", lambda name: Dataset(graph, labels))
    monkeypatch.setattr(fastrp, "of_graphs", lambda case: "made")
    study = make(dim=16)
    small = study.arms[-2].config.replace(edges=(200, 400))
    chosen = [arm for arm in study.arms if arm.name in ("fastrp", "svd", "q1")]
    outcome = run_study(study, tmp_path, arms=[arm.name for arm in chosen], seeds=[0, 1])
    assert set(outcome.results.runs) == {"fastrp", "svd", "q1"}
    assert (tmp_path / "fastrp.png").stat().st_size > 1000
    metrics = outcome.results.runs["fastrp"][0]
    assert set(metrics) == {"ppi_cpu_s", "ppi_micro_10", "ppi_macro_10"}
    grown = fastrp.run(small, 0, lambda text: None)
    assert set(grown) == {"cpu_s_200", "cpu_s_400", "slope"}


def test_full_runs_classify_at_half_too(monkeypatch):
    graph = Graph.from_edges(*np.nonzero(np.triu(np.random.default_rng(0).random((60, 60)) < 0.2, 1)))
    monkeypatch.setattr(
        fastrp, "load_dataset", lambda name: Dataset(graph, np.random.default_rng(0).random((graph.num_nodes, 3)) < 0.5)
    )
    found = fastrp.run(Case(dim=8), 0, lambda text: None)
    assert {"blogcatalog_micro_50", "ppi_macro_50", "dblp_micro_10"} <= set(found)
    assert "dblp_micro_50" not in found
