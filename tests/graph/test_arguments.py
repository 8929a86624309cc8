"""Whatever an argument is given, it is refused by name or works: no other error, no run without end."""

import inspect
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from anabranch.errors import AnabranchError, ConfigError, InputError
from anabranch.graph import HNSW, FastRP, FullyPPR, Graph, GraphVite, PageRank, PowerWalk
from anabranch.graph.arguments import check_flag, check_one_of, is_number, plain

NODES = 30
GRAPH = Graph.from_edges(np.arange(NODES), (np.arange(NODES) * 7 + 1) % NODES, num_nodes=NODES)
VECTORS = np.random.default_rng(0).standard_normal((NODES, 8)).astype(np.float32)


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
HOSTILE = [
    *(None, True, False, np.True_, 0, 1, 2, 3, -1, 16, 65_536, 65_537, 2**31 - 1, 2**31, 2**53, 2**53 + 1, 2**63 - 1),
    *(2**63, 2**64, -(2**63) - 1, 10**30, 10**400, 10**5000, -(10**5000), 0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 1e-320),
    *(1e-300, 1e18, 1e19, 1e30, 1e37, 1e300, float("nan"), float("inf"), -float("inf"), 1j),
    *(np.float32(0.5), np.float16(1), np.float64("nan"), np.longdouble(1), np.int8(3), np.int8(-128), np.int64(3)),
    *(np.uint8(255), np.uint64(2**64 - 1), np.str_("no"), np.datetime64("2020-01-01"), np.ma.masked),
    *("", "no", "auto", "x" * 1000, "\0", "\ud800", "1", "a\nb", b"1", bytearray(1)),
    *([], [1], ["sgd"], [[]], (), (1, 2), {}, {"a": 1}, set(), range(3), slice(1), object(), int, len, Ellipsis),
    *(np.array([]), np.array(3), np.array([1.0, 2.0]), np.array([[1], [2]]), np.array(["sgd", "x"]), np.array([None])),
    *(Fraction(1, 2), Decimal("0.5"), Decimal("NaN")),
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


def refusal(work, kinds):
    """What ``work`` is refused with, None if it is not. Any other error is one of this test."""
    try:
        work()
    except kinds as error:
        return str(error)
    return None


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


NUMBERS = st.integers() | st.integers(2**53 - 2, 2**64 + 2) | st.floats() | st.floats(0, 1) | st.complex_numbers()
SHORT = st.builds(
    lambda kind, number: kind(number), st.sampled_from([np.int8, np.int16, np.float16, np.float32]), st.integers(-9, 99)
)
VALUES = NUMBERS | SHORT | st.text(max_size=9) | st.binary(max_size=3) | st.booleans() | st.lists(NUMBERS, max_size=3)


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
