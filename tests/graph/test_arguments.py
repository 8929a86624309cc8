"""Whatever an argument is given, it is refused by name or works: no other error, no run without end."""

import inspect
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from anabranch.errors import AnabranchError, ConfigError, InputError
from anabranch.graph import HNSW, FastRP, FullyPPR, GraphVite, PageRank, PowerWalk
from anabranch.graph.arguments import check_flag, check_one_of, is_number, plain
from hostile_arguments import GRAPH, HOSTILE, VALUES, VECTORS, refusal


def use_index(index):
    if index.dim == VECTORS.shape[1] and index.metric != "hamming":
        index.add(VECTORS)
        index.remove([1])
        index.search(VECTORS, 3)


# What is made with which arguments beside the one that is tried, and how it is used.
SUBJECTS = {
    "FastRP": (FastRP, {"dim": 4, "workers": 1}, lambda made: made.fit(GRAPH).vectors([3])),
    "GraphVite": (GraphVite, {"dim": 4, "epochs": 2, "workers": 1}, lambda made: made.fit(GRAPH).transform([3])),
    "PowerWalk": (PowerWalk, {"walks": 4, "workers": 1}, lambda made: made.build(GRAPH).query(3)),
    "FullyPPR": (FullyPPR, {"workers": 1}, lambda made: made.fit(GRAPH)),
    "FullyPPR by walks": (FullyPPR, {"walks": 4, "workers": 1}, lambda made: made.fit(GRAPH)),
    "FullyPPR by an accuracy": (
        FullyPPR,
        {"eps": 0.5, "delta": 0.1, "p_f": 0.1, "workers": 1},
        lambda made: made.fit(GRAPH),
    ),
    "PageRank": (PageRank, {}, lambda made: made.personalized(GRAPH, 3)),
    "PageRank by walks": (PageRank, {"method": "monte_carlo"}, lambda made: made.personalized(GRAPH, 3)),
    "HNSW": (HNSW, {"dim": 8, "M": 4, "ef_construction": 8, "workers": 1}, use_index),
}

# Sessions and places of other programs, and names of before.
LEFT_OUT = ("spark", "out", "former")

# Twice as much takes twice as long, or as much memory: only small ones are used, others are refused or stored.
AMOUNTS = {
    *("dim", "epochs", "walk_length", "negatives", "augmentation", "samplers", "partitions", "group", "pool_size"),
    *("shuffle_base", "micro_batch", "workers", "threads", "chunk", "walks", "index_walks", "rounds", "max_steps"),
    *("M", "ef_construction", "s", "weights"),
}
MOST = 16

# A walk takes 1 / alpha steps, and walks are more the smaller these are.
SHARES = {"alpha": 0.05, "eps": 0.05, "delta": 0.05, "tol": 1e-12}

# Of a subject that differs from the one of its class in these.
ONLY = {
    "FullyPPR by walks": ("walks", "alpha", "top_k", "min_score", "estimator", "seed"),
    "FullyPPR by an accuracy": ("eps", "delta", "p_f"),
    "PageRank by walks": ("walks", "alpha", "seed"),
}

ARGUMENTS = [
    (subject, name)
    for subject, (cls, _, _) in SUBJECTS.items()
    for name in inspect.signature(cls).parameters
    if name not in LEFT_OUT and name in ONLY.get(subject, (name,))
]


def is_small(name, value):
    """Whether it is used, and not only made."""
    try:
        if name in AMOUNTS:
            return bool(abs(value) <= MOST)
        return name not in SHARES or bool(SHARES[name] <= value)
    except Exception:
        # No number. It was taken, so it stands for itself.
        return True


def try_out(subject, name, value, *, is_used=True):
    """Whether it is taken, and works; False where it was refused by name."""
    cls, others, use = SUBJECTS[subject]
    made = []
    said = refusal(lambda: made.append(cls(**{**others, name: value})), (InputError, ConfigError))
    if said is None:
        # What is called is another's, and so are services.
        if not is_used or callable(value) or (name == "engine" and value == "spark") or not is_small(name, value):
            return True
        # It is the graph, or the machine, that it does not go with.
        said = refusal(lambda: use(made[0]), AnabranchError)
    assert said is None or (said and "\n" not in said and len(said) < 1000)
    return said is None


@pytest.mark.parametrize("subject", SUBJECTS)
def test_hostile_values_are_refused_by_name_or_taken(subject):
    names = [name for of, name in ARGUMENTS if of == subject]
    taken = {name: sum(try_out(subject, name, value, is_used=False) for value in HOSTILE) for name in names}
    # Whether nodes and numbers of each fit is seen when there is a graph.
    assert all(count < len(HOSTILE) for name, count in taken.items() if name not in ("sources", "features"))
    assert sum(taken.values()) > len(taken)


@pytest.mark.slow
@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_hostile_values_that_are_taken_work(subject):
    names = [name for of, name in ARGUMENTS if of == subject]
    assert sum(try_out(subject, name, value) for name in names for value in HOSTILE) > len(names)


@given(st.sampled_from(ARGUMENTS), VALUES | VALUES.map(lambda value: np.array(value, object)))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(("GraphVite", "epochs"), 1e19)
@example(("FullyPPR by an accuracy", "delta"), 5e-324)
@example(("FastRP", "seed"), -(2**70))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_value_is_refused_by_name_or_works(argument, value):
    try_out(*argument, value)


def test_what_they_are():
    for value in (True, np.False_, 0, 1, 1.0, np.int8(1)):
        assert check_flag("normalize", value) is bool(value)
    for value in ("no", 2, None, [], np.array([True]), float("nan")):
        with pytest.raises(InputError, match=r"^normalize is .*; it must be True or False$"):
            check_flag("normalize", value)
    check_one_of("model", np.str_("line"), ("line", "deepwalk"))
    for value in (np.array(["line"]), ["line"], None, "lin"):
        with pytest.raises(InputError, match=r"^model is .*; it must be one of line, deepwalk, or None$"):
            check_one_of("model", value, ("line", "deepwalk"), ", or None")
    assert [is_number(value) for value in (1, 1.5, np.int8(1), np.float16(1), float("nan"))] == [True] * 5
    assert not any(
        is_number(value) for value in (True, np.True_, 1j, "1", None, np.array(1), Fraction(1, 2), Decimal(1))
    )
    assert [type(plain(value)) for value in (np.int8(1), np.float16(1), np.longdouble(1), np.True_, np.str_("a"))] == [
        *(int, float, float, bool, str)
    ]
    assert plain(given := [1]) is given
