"""Whatever an argument of a function is given, it is refused by name, shortly, or the function works: no other error."""

import inspect

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch.errors import AnabranchError
from anabranch.graph import Graph, load_dataset, read_graph, write_graph
from anabranch.graph.estimator import most_similar
from anabranch.graph.hnsw import brute_force
from hostile_arguments import GRAPH, HOSTILE, VALUES, VECTORS, refusal

RAGGED = [[[1.0], [2.0, 3.0]], [[1], "a"], np.array([[1.0], [2.0, 3.0]], object), [None], {"a": [1]}]
NAMED = Graph(GRAPH.indptr, GRAPH.indices, names=[f"n{number}" for number in range(GRAPH.num_nodes)])


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """(function, argument): what is called with it, all else as it should be."""
    place = tmp_path_factory.mktemp("functions")
    edges = place / "edges.csv"
    write_graph(NAMED, edges)
    made = {}
    for name in inspect.signature(read_graph).parameters:
        made["read_graph", name] = lambda value, name=name: read_graph(**{"path": edges, name: value})
    for name in inspect.signature(write_graph).parameters:
        given = {"graph": GRAPH, "path": place / "out.csv"}
        made["write_graph", name] = lambda value, name=name, given=given: write_graph(**{**given, name: value})
    for name in inspect.signature(brute_force).parameters:
        given = {"vectors": VECTORS, "queries": VECTORS[:1], "k": 1}
        made["brute_force", name] = lambda value, name=name, given=given: brute_force(**{**given, name: value})
    for name in inspect.signature(most_similar).parameters:
        given = {"embedding_ND": VECTORS, "node": 1, "k": 2}
        made["most_similar", name] = lambda value, name=name, given=given: most_similar(**{**given, name: value})
    made["load_dataset", "name"] = load_dataset
    return made


def is_amount(name, value):
    """Twice as much takes twice as long, or as much memory."""
    return name in ("k", "num_nodes") and isinstance(value, int | np.integer) and value > 64


def asked(calls, function, argument, value, monkeypatch):
    if is_amount(argument, value) or (argument == "path" and isinstance(value, str) and value):
        return
    told = refusal(lambda: calls[function, argument](value), AnabranchError)
    assert told is None or len(told) < 1000, (function, argument, told[:300])


@pytest.mark.parametrize("function", ["read_graph", "write_graph", "brute_force", "most_similar", "load_dataset"])
def test_hostile_values_are_refused_by_name_or_work(calls, function, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = [argument for name, argument in calls if name == function]
    assert arguments
    for argument in arguments:
        for value in [*HOSTILE, *RAGGED]:
            asked(calls, function, argument, value, monkeypatch)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=VALUES)
def test_any_value_is_refused_by_name_or_works(calls, data, value, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked(calls, *data.draw(st.sampled_from(sorted(calls))), value, monkeypatch)


@pytest.mark.parametrize("flag", ["header", "directed", "drop_zero", "allow_negative"])
def test_words_are_no_flags(calls, flag):
    with pytest.raises(AnabranchError, match=f"^{flag} is 'no'; it must be True or False"):
        calls["read_graph", flag]("no")
