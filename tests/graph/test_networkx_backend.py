"""networkx's own PageRank is the oracle: equal to rounding, errors included, whatever the call."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from decimal import Decimal
from fractions import Fraction
from importlib.metadata import entry_points
from pathlib import Path

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import MissingExtraError
from anabranch.graph import networkx_backend
from anabranch.graph.networkx_backend import backend, get_info

ROOT = Path(__file__).parents[2]
WEIGHTS = st.sampled_from([0.0, 0.1, 1 / 3, 1, 2.5, 1e6])
SHARES = st.sampled_from([0, 0.25, 1, 3])
oracle = networkx.pagerank.orig_func if hasattr(networkx.pagerank, "orig_func") else networkx.pagerank


@st.composite
def networks(draw):
    """A networkx graph of any class, nodes of any kind; with loops, parallel edges, nodes without edges, weights on some edges."""
    made = draw(st.sampled_from([networkx.Graph, networkx.DiGraph, networkx.MultiGraph, networkx.MultiDiGraph]))()
    count = draw(st.integers(0, 7))
    nodes = draw(
        st.sampled_from([list(range(count)), [f"n{i}" for i in range(count)], [("a", i) for i in range(count)]])
    )
    made.add_nodes_from(nodes)
    if nodes:
        ends = st.tuples(st.sampled_from(nodes), st.sampled_from(nodes))
        for u, v in draw(st.lists(ends, max_size=16)):
            made.add_edge(u, v, **draw(st.one_of(st.just({}), st.fixed_dictionaries({"weight": WEIGHTS}))))
    return made


@st.composite
def calls(draw):
    graph = draw(networks())
    of_nodes = st.dictionaries(st.sampled_from([*graph, "no node"]), SHARES, max_size=8)
    options = {
        "alpha": st.sampled_from([0.5, 0.85, 1]),
        "personalization": of_nodes,
        "max_iter": st.sampled_from([1, 5, 100]),
        "tol": st.sampled_from([1e-3, 1e-6, 1e-12]),
        "nstart": of_nodes,
        "weight": st.sampled_from([None, "weight", "other"]),
        "dangling": of_nodes,
    }
    return graph, draw(st.fixed_dictionaries({}, optional=options))


def outcome(function, *args, **options):
    try:
        return function(*args, **options)
    except (ZeroDivisionError, networkx.PowerIterationFailedConvergence) as error:
        return type(error)


def ours(graph, **options):
    weight = options.get("weight", "weight")
    return backend.pagerank(backend.convert_from_nx(graph, edge_attrs={weight: 1} if weight else None), **options)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@settings(deadline=None, max_examples=150)
@given(calls())
def test_equal_to_networkx(call):
    graph, options = call
    expected, found = outcome(oracle, graph, **options), outcome(ours, graph, **options)
    if isinstance(expected, type):
        assert found is expected
    else:
        assert list(found) == list(expected)
        assert found == pytest.approx(expected, abs=1e-9)
        assert all(type(score) is float for score in found.values())


@pytest.mark.parametrize("name", ["alpha", "tol", "max_iter"])
@pytest.mark.parametrize("value", ["0.5", b"1", None, [0.5], (0.5,), Fraction(1, 2), Decimal("0.5"), {}, [[1]]])
def test_what_is_no_number_is_refused_as_there(name, value):
    graph = networkx.path_graph(4)
    for function in (oracle, ours):
        if function is oracle and name == "tol" and isinstance(value, Fraction | Decimal | list | tuple | int):
            continue  # Compared with a float as it is.
        with pytest.raises((TypeError, OverflowError)):
            function(graph, **{name: value})
    assert backend.pagerank(backend.convert_from_nx(networkx.Graph()), **{name: value}) == {}


@pytest.mark.parametrize(
    "value", [True, 1, np.float32(0.5), np.int64(1), np.array(0.25), np.array([0.25]), np.bool_(True), 0.0, -0.5]
)
def test_what_is_a_number_counts_as_there(value):
    graph = networkx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2)])
    assert ours(graph, alpha=value) == pytest.approx(oracle(graph, alpha=value), abs=1e-9)
    assert ours(graph, tol=abs(value)) == pytest.approx(oracle(graph, tol=abs(value)), abs=1e-9) if value else True


def test_one_conversion_serves_every_weight():
    graph = networkx.MultiGraph([("a", "b", {"x": 2.0, "y": 5}), ("a", "b", {"x": 1.0}), ("b", "c", {"y": "text"})])
    kept = backend.convert_from_nx(graph, preserve_edge_attrs=True)
    assert set(kept.attribute_E) == {"x"}  # y is no number everywhere
    assert (len(kept), kept.is_directed(), kept.is_multigraph()) == (3, False, True)
    for weight in (None, "x", "other"):
        assert backend.pagerank(kept, weight=weight) == pytest.approx(oracle(graph, weight=weight), abs=1e-12)
    with pytest.raises(ValueError, match="text"):
        backend.pagerank(kept, weight="y")
    assert backend.convert_to_nx(kept) is graph
    assert backend.convert_to_nx({"a": 1.0}) == {"a": 1.0}


def test_what_it_runs_and_when_that_is_worth_it(monkeypatch):
    assert backend.can_run("pagerank", (), {}) is True
    assert "no hits" in backend.can_run("hits", (), {})
    small, large = networkx.path_graph(10), networkx.path_graph(600)
    assert "fewer than 500" in backend.should_run("pagerank", (small,), {})
    assert backend.should_run("pagerank", (), {"G": large}) is True
    assert backend.should_run("pagerank", (backend.convert_from_nx(small),), {}) is True
    monkeypatch.setattr(networkx_backend.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'anabranch[graph]'" in backend.can_run("pagerank", (), {})


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    def refuse(name, by):
        raise MissingExtraError(f"{by} needs anabranch[{name}]", modules=("numba",), command="pip install it")

    monkeypatch.setattr(networkx_backend, "require", refuse)
    with pytest.raises(MissingExtraError, match="graph"):
        backend.convert_from_nx(networkx.path_graph(3))


def test_the_entry_points_lead_here():
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    for group, expected in (("networkx.backends", backend), ("networkx.backend_info", get_info)):
        module, _, name = points[group]["anabranch"].partition(":")
        assert getattr(importlib.import_module(module), name) is expected
    assert get_info()["functions"].keys() == {"pagerank"}


def environment(folder):
    """Where networkx finds the entry points: of the installed package, or (installed before there were any) of one beside it."""
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    if not entry_points(group="networkx.backends", name="anabranch"):
        info = folder / "anabranch_points-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: anabranch-points\nVersion: 0\n")
        points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
        lines = [f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in named.items()) for group, named in points.items()]
        (info / "entry_points.txt").write_text("\n".join(lines))
        paths.append(str(folder))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


FRONT_DOOR = """
import sys
import networkx

assert not {"numba", "scipy", "torch"} & set(sys.modules), "networkx alone loads none of these"
graph = networkx.gnp_random_graph(60, 0.05, seed=1, directed=True)
networkx.relabel_nodes(graph, {0: "zero"}, copy=False)
options = {"personalization": {"zero": 1, 5: 2}, "dangling": {7: 1}, "tol": 1e-12}
expected = networkx.pagerank(graph, **options)
networkx.config.warnings_to_ignore.add("cache")

def same(found, expected):
    return found.keys() == expected.keys() and all(abs(found[node] - expected[node]) < 1e-9 for node in expected)

assert same(networkx.pagerank(graph, backend="anabranch", **options), expected)
kept = graph.__networkx_cache__["backends"]["anabranch"]
first = next(iter(kept.values()))
assert same(networkx.pagerank(graph, backend="anabranch", weight=None, **options), expected)
assert list(kept.values()) == [first], "converted once"
graph.add_edge("zero", 9, weight=50)
changed = networkx.pagerank(graph, backend="anabranch", **options)
assert not same(changed, expected) and same(changed, networkx.pagerank(graph, **options)), "a change is seen"
with networkx.config(backend_priority=["anabranch"]):
    assert same(networkx.pagerank(graph, **options), changed)
print("done")
"""


def test_through_networkx(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FRONT_DOOR], env=environment(tmp_path), capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("done\n", "")


@pytest.mark.slow
def test_networkx_tests_of_its_own(tmp_path):
    """Its file of tests, with every call that this backend takes sent there."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-c",
            os.devnull,
            "--rootdir",
            str(tmp_path),
            "--log-file",
            str(tmp_path / "log"),
            "--log-file-level",
            "DEBUG",
            "--pyargs",
            "networkx.algorithms.link_analysis.tests.test_pagerank",
        ],
        env={**environment(tmp_path), "NETWORKX_TEST_BACKEND": "anabranch", "NETWORKX_FALLBACK_TO_NX": "true"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\b\d\d passed", done.stdout), done.stdout
    # Not by networkx itself.
    assert (tmp_path / "log").read_text().count("Using backend 'anabranch' for call to 'pagerank'") >= 10
