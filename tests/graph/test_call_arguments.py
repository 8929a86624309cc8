"""Whatever an argument of a call is given, it is refused by name or the call works: no other error, and nothing changes before that."""

import inspect
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch.errors import AnabranchError, InputError
from anabranch.graph import HNSW, FastRP, FullyPPR, Graph, GraphVite, PageRank, PowerWalk, disk
from anabranch.graph.fastrp.start import operator_of
from anabranch.graph.fully_ppr.result import FullyPPRResult
from anabranch.graph.hnsw.sharded import ShardedHNSW
from anabranch.graph.powerwalk.query import decompose_one
from anabranch.graph.products import NumbaProducts, ranges
from anabranch.graph.rank import GRank
from anabranch.graph.rows import SparseRows
from anabranch.graph.workers import MOST_THREADS, Workers, num_workers
from hostile_arguments import GRAPH, HOSTILE, NODES, VALUES, VECTORS, refusal

# Beside those of constructors: what is given where lists, mappings or files are meant.
WRONG = [
    *(
        [[1], [2, 3]],
        [[1]],
        {1: -1},
        {1: float("nan")},
        {1: [2]},
        [None, 1],
        [True, False],
        [float("nan")],
        [-1],
        [1, 1],
    ),
    *(
        [2**63 - 1],
        [10**400],
        [10**5000],
        ["\ud800"],
        [1, "a"],
        ([1], [2]),
        ([1, 2], [0.5, 0.5]),
        ([1], [[1]]),
        (1, [2]),
    ),
    *(
        np.array([2**64 - 1], np.uint64),
        np.array([[1], [2, 3]], object),
        np.array(["a"]),
        np.ma.array([1, 2], mask=[0, 1]),
    ),
    *(np.zeros((2, 0)), np.ones((2, 2, 2)), [b"a"], (value for value in ())),
]
EVERYTHING = [*HOSTILE, *WRONG]

# Twice as much takes twice as long, or as much memory.
AMOUNTS = {
    "k",
    "top_k",
    "rounds",
    "order",
    "num_nodes",
    "sample",
    "epochs",
    "count",
    "num_edges",
    "ef",
    "num_shards",
    "beam",
}
MOST = 64

# Sessions, and what is handed on to others.
LEFT_OUT = {"self", "y", "former", "spark", "others", "options", "params", "progress"}


def graph():
    return Graph(GRAPH.indptr, GRAPH.indices)


def hnsw():
    index = HNSW(8, M=4, ef_construction=8, workers=1, compact_at=None)
    index.add(VECTORS)
    return index


def sharded():
    index = ShardedHNSW(8, num_shards=2, M=4, ef_construction=8, workers=1)
    index.add(VECTORS)
    return index


@cache
def folder():
    return Path(tempfile.mkdtemp(prefix="calls"))


def written(name, made):
    """The place of a file of it, which is written once."""
    path = folder() / name
    if not path.exists():
        made.save(path)
    return path


@cache
def walks():
    return PowerWalk(walks=4, workers=1, seed=1).build(GRAPH)


@cache
def scores():
    return FullyPPR(workers=1, engine="local", memory_limit=1 << 30).fit(GRAPH)


@cache
def projected():
    return FastRP(dim=4, workers=1, keep_powers=True).fit(GRAPH)


@cache
def trained():
    return GraphVite(dim=4, epochs=2, workers=1, samplers=0).fit(GRAPH)


@cache
def clicked():
    return GRank().fit([("alice", "jazz", 1), ("bob", "jazz", 2), ("bob", "rock", 3)])


@cache
def on_disk():
    return disk.build(VECTORS, folder() / "disk.anb", code_bytes=4, M=4, ef_construction=8, workers=1)


@cache
def ranks():
    return PageRank()


@cache
def rows():
    return ranks().batch(GRAPH, [1, 2])


ROW = np.ones((1, NODES))

# What is called, of what, and by which arguments it works; calls that change what they are of get a new one each time.
CALLS: list[tuple[str, Any, dict[str, dict[str, Any]]]] = [
    (
        "HNSW",
        hnsw,
        {
            "search": {"queries": VECTORS[:2]},
            "range_search": {"queries": VECTORS[:2], "radius": 1.0},
            "nearest_within": {"queries": VECTORS[:2], "radius": 1.0},
            "prepare_filter": {"ids_or_mask": [1]},
            "vectors": {"ids": [1]},
            "contains": {"ids": [1]},
            "__contains__": {"id": 1},
            "growth_bytes": {"count": 1},
            "add": {"vectors": VECTORS[:1]},
            "update": {"ids": [5], "vectors": VECTORS[:1]},
            "remove": {"ids": [1]},
            "compact": {},
            "save": {"path": Path("x.anb")},
            "load": {"path": lambda: written("hnsw.anb", hnsw())},
        },
    ),
    (
        "ShardedHNSW",
        sharded,
        {
            "search": {"queries": VECTORS[:2]},
            "add": {"vectors": VECTORS[:1]},
            "update": {"ids": [5], "vectors": VECTORS[:1]},
            "remove": {"ids": [1]},
            "__contains__": {"id": 1},
        },
    ),
    (
        "DiskIndex",
        on_disk,
        {
            "search": {"queries": VECTORS[:2]},
            "exact": {"queries": VECTORS[:2]},
            "prepare_filter": {"ids_or_mask": [1]},
            "vectors": {"ids": [1]},
            "contains": {"ids": [1]},
            "__contains__": {"id": 1},
        },
    ),
    (
        "PowerWalk",
        walks,
        {
            "query": {"seeds": 3},
            "inspect": {"seeds": 3},
            "query_batch": {"seeds_list": [3, 4]},
            "fingerprint": {"node": 3},
            "error_bound": {"sample": 2},
            "save": {"path": Path("x.anb")},
            "load": {"path": lambda: written("walks.anb", walks()), "graph": GRAPH},
        },
    ),
    (
        "PowerWalk, new",
        lambda: PowerWalk(walks=4, workers=1),
        {"build": {"graph": GRAPH}, "from_rows": {"graph": GRAPH, "rows": rows}},
    ),
    (
        "PowerWalk, changed",
        lambda: PowerWalk(walks=4, workers=1).build(GRAPH),
        {"update": {"num_nodes": NODES}, "refresh": {}},
    ),
    ("FullyPPR", scores, {"top": {"node": 1}, "save": {"path": Path("x.anb")}}),
    ("FullyPPR, new", lambda: FullyPPR(workers=1, engine="local"), {"fit": {"graph": GRAPH}}),
    (
        "FullyPPRResult",
        lambda: scores().result_,
        {
            "row_of": {"node": 1},
            "top": {"node": 1},
            "top_named": {"name": 1},
            "save": {"path": Path("x.parquet")},
            "load": {"path": lambda: written("scores.anb", scores())},
        },
    ),
    (
        "SparseRows",
        rows,
        {
            "row": {"number": 1},
            "named": {"number": 1},
            "top": {"k": 1},
            "take": {"numbers": [1]},
            "save": {"path": Path("x.anb")},
        },
    ),
    (
        "PageRank",
        ranks,
        {
            "scores": {"graph": GRAPH},
            "prepare": {"graph": GRAPH},
            "personalized": {"graph": GRAPH, "seeds": 1},
            "vector": {"graph": GRAPH, "seeds": 1},
            "batch": {"graph": GRAPH, "seeds_list": [1, 2]},
            "peak_bytes": {"num_nodes": 3, "num_stored_edges": 3},
        },
    ),
    (
        "FastRP",
        projected,
        {
            "vectors": {"nodes": [1]},
            "transform": {"rows": ROW},
            "edges_of_new": {"source": ["new"], "target": [1]},
            "powers": {"graph": GRAPH},
            "combine": {"powers": lambda: projected().powers_},
            "peak_bytes": {"num_nodes": 3, "num_stored_edges": 3},
            "save": {"path": Path("x.anb")},
            "load": {"path": lambda: written("fastrp.anb", projected())},
        },
    ),
    ("FastRP, new", lambda: FastRP(dim=4, workers=1), {"fit": {"graph": GRAPH}}),
    (
        "GraphVite",
        trained,
        {
            "transform": {"nodes": [1]},
            "predict": {"edges": [[1, 2]]},
            "peak_bytes": {"graph": GRAPH},
            "save": {"path": Path("x.npz")},
            "load": {"path": lambda: written("graphvite.anb", trained())},
        },
    ),
    (
        "GraphVite, new",
        lambda: GraphVite(dim=4, epochs=2, workers=1, samplers=0),
        {"fit": {"graph": GRAPH}},
    ),
    (
        "GraphVite, more",
        lambda: GraphVite(dim=4, epochs=2, workers=1, samplers=0).fit(GRAPH),
        {"resume": {"graph": GRAPH, "epochs": 1}},
    ),
    (
        "Graph",
        graph,
        {
            "from_edges": {"source": [0, 1], "target": [1, 0]},
            "from_scipy": {"matrix": np.eye(3)},
            "estimate_bytes": {"num_nodes": 3, "num_edges": 3},
            "neighbors": {"node": 1},
            "place_of": {"node": 1},
            "check_nodes": {"nodes": [1]},
            "ids_of": {"names": [1]},
            "names_of": {"nodes": [1]},
            "resolve": {"nodes": [1]},
            "subgraph": {"nodes": [1, 2]},
            "to_scipy": {},
            "with_weights": {"weights": lambda: np.ones(len(GRAPH.indices))},
            "difference": {"other": GRAPH},
            "equals": {"other": GRAPH},
            "save": {"path": Path("x.anb")},
            "load": {"path": lambda: written("graph.anb", GRAPH)},
        },
    ),
    (
        "GRank",
        clicked,
        {
            "similarity": {"node": "alice"},
            "rank": {"term": "jazz"},
            "score": {"clicks": [("alice", "jazz", 1)]},
            "save": {"path": Path("x.anb")},
            "load": {"path": lambda: written("rank.anb", clicked())},
        },
    ),
    (
        "GRank, new",
        GRank,
        {"fit": {"clicks": [("alice", "jazz", 1)]}, "partial_fit": {"clicks": [("alice", "jazz", 1)]}},
    ),
]


@dataclass(frozen=True)
class Argument:
    """One argument of one call."""

    of: str
    call: str
    name: str

    def __str__(self) -> str:
        return f"{self.of}.{self.call}({self.name})"

    def attempt(self, value: Any) -> bool:
        """Whether it is taken, and the call works; False where it was refused by name."""
        _, make, calls = next(entry for entry in CALLS if entry[0] == self.of)
        if self.name in AMOUNTS and is_large(value):
            # More takes longer, or more memory; what is beyond all bounds is refused at once.
            return True
        rest = {name: other() if callable(other) else other for name, other in calls[self.call].items()}
        call = getattr(make(), self.call)
        said = refusal(lambda: call(**{**rest, self.name: value}), AnabranchError)
        # A path may have an end of line in it.
        line = said and said.replace(value, "") if isinstance(value, str) and value else said
        assert line is None or ("\n" not in line and len(line) < 1000), said
        return said is None


def is_large(value: Any) -> bool:
    try:
        return bool(MOST < abs(value) <= 2**53)
    except Exception:
        return False


def arguments():
    for of, _, calls in CALLS:
        for call in calls:
            kinds = {
                "HNSW": HNSW,
                "ShardedHNSW": ShardedHNSW,
                "Graph": Graph,
                "GRank": GRank,
                "PageRank": PageRank,
                "FastRP": FastRP,
            }
            kinds |= {
                "GraphVite": GraphVite,
                "PowerWalk": PowerWalk,
                "FullyPPR": FullyPPR,
                "FullyPPRResult": FullyPPRResult,
            }
            kinds |= {"SparseRows": SparseRows, "DiskIndex": disk.DiskIndex}
            for name in inspect.signature(getattr(kinds[of.partition(",")[0]], call)).parameters:
                if name not in LEFT_OUT:
                    yield Argument(of, call, name)


ARGUMENTS = list(arguments())


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Where files of hostile names may lie."""
    monkeypatch.chdir(tmp_path)


# Values that say most: each argument is given these, and among the slow ones all there are.
TELLING = [*(10**5000, "no", "x" * 1000, np.array([1.0, 2.0]), [[1], [2, 3]], object(), "\ud800", float("nan"))]


@pytest.mark.parametrize("of", dict.fromkeys(one.of for one in ARGUMENTS))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_says_most_is_refused_by_name_or_works(of):
    mine = [one for one in ARGUMENTS if one.of == of]
    taken = {one: sum(one.attempt(value) for value in TELLING) for one in mine}
    # What is no id is in no index.
    assert all(count < len(TELLING) for one, count in taken.items() if one.call != "__contains__"), taken


@pytest.mark.slow
@pytest.mark.parametrize("of", dict.fromkeys(one.of for one in ARGUMENTS))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_hostile_values_are_refused_by_name_or_work(of):
    for one in ARGUMENTS:
        if one.of == of:
            for value in EVERYTHING:
                one.attempt(value)


@given(st.sampled_from(ARGUMENTS), VALUES | VALUES.map(lambda value: np.array(value, object)))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_value_is_refused_by_name_or_works(argument, value):
    argument.attempt(value)


@pytest.mark.parametrize("flag", ["update", "repair", "reuse"])
@pytest.mark.parametrize("made", [hnsw, sharded])
def test_nothing_is_added_before_flags_are_looked_at(made, flag):
    index = made()
    if flag == "reuse" and made is sharded:
        pytest.skip("it has none")
    for value in (np.array([True, False]), "no", None, 2):
        with pytest.raises(InputError, match=f"^{flag} is .*; it must be True or False$"):
            index.add(VECTORS[:1] + 1, [99], **{flag: value})
    assert len(index) == NODES
    assert 99 not in index


def test_nothing_is_moved_before_flags_are_looked_at():
    index = hnsw()
    with pytest.raises(InputError, match=r"^repair is array"):
        index.update([5], VECTORS[:1], repair=np.array([True, False]))
    assert (index.vectors([5]) == VECTORS[5]).all()
    with pytest.raises(InputError, match=r"^repair is 'no'; it must be True or False$"):
        index.compact(repair="no")
    for call in (index.range_search, index.nearest_within):
        with pytest.raises(InputError, match=r"^exact is 'no'; it must be True or False$"):
            call(VECTORS[:1], 1.0, exact="no")


def test_no_kernel_is_compiled_for_another_kind_of_flag():
    made = walks()
    made.query(3)
    before = len(decompose_one.signatures)
    whole, part = made.query(3, use_index=np.True_), made.query(3, use_index=0)
    assert len(decompose_one.signatures) == before
    assert np.array_equal(whole[1], made.query(3)[1])
    assert part[1].sum() < whole[1].sum()
    with pytest.raises(InputError, match=r"^use_index is 'no'; it must be True or False$"):
        made.query(3, use_index="no")


def test_what_is_no_id_is_not_in_an_index():
    for index in (hnsw(), sharded(), on_disk()):
        assert all(value in index for value in (3, np.int8(3)))
        assert NODES not in index
        assert not any(value in index for value in ("3", None, 3.5, [3], -1, 2**63, 10**5000))


def test_threads_are_never_more_than_there_is_work_for():
    many = FastRP(dim=4, workers=2**31 - 1)
    assert np.array_equal(many.fit(GRAPH).embedding_, FastRP(dim=4, workers=1).fit(GRAPH).embedding_)
    assert num_workers(2**31 - 1) == MOST_THREADS
    assert len(ranges(NODES, 10**9)) == NODES
    with Workers(2**31 - 1) as pool:
        assert len(NumbaProducts(operator_of(GRAPH, "transition", np.float32)[0], pool).runs) <= NODES
