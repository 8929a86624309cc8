"""A fit that is refused, or that an interrupt ends at any line, leaves what was fitted before: never parts of two graphs."""

import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import anabranch.graph
from anabranch.errors import DataError, InputError
from anabranch.graph import FastRP, FullyPPR, Graph, GraphVite, PowerWalk
from anabranch.graph.rank import GRank

ROOT = str(Path(anabranch.graph.__file__).parent)
FIRST = Graph.from_edges([0, 1, 2, 3, 4], [1, 2, 3, 4, 0])
SECOND = Graph.from_edges([0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0], names=["a", "b", "c", "d", "e", "f"])
CLICKS = [("ann", "jazz", "x"), ("bob", "jazz", "y"), ("ann", "rock", "z")]
MORE = [("cy", "folk", "w"), ("cy", "jazz", "x")]

# What is made, how it is fitted first, and how again.
MODELS = {
    "FastRP": (lambda: FastRP(dim=8, keep_powers=True, workers=1), lambda m: m.fit(FIRST), lambda m: m.fit(SECOND)),
    "FastRP, no powers": (lambda: FastRP(dim=8, workers=1), lambda m: m.fit(FIRST), lambda m: m.fit(SECOND)),
    "GraphVite": (
        lambda: GraphVite(dim=4, epochs=2, workers=1, samplers=0),
        lambda m: m.fit(FIRST),
        lambda m: m.fit(SECOND),
    ),
    "PowerWalk": (lambda: PowerWalk(walks=4, workers=1), lambda m: m.build(FIRST), lambda m: m.build(SECOND, [1, 2])),
    "PowerWalk, a file": (
        lambda: PowerWalk(walks=4, workers=1),
        lambda m: m.build(FIRST),
        lambda m: m.build(SECOND, [1, 2], out="w.anb"),
    ),
    "FullyPPR": (lambda: FullyPPR(walks=20, workers=1), lambda m: m.fit(FIRST), lambda m: m.fit(SECOND)),
    "GRank": (GRank, lambda m: m.fit(CLICKS), lambda m: m.fit(MORE)),
    "GRank, more": (GRank, lambda m: m.fit(CLICKS), lambda m: m.partial_fit(MORE)),
}


def traced(work, at=None):
    """Run ``work``; Ctrl-C comes at line ``at`` of those that this thread runs in `anabranch.graph`. How many there were."""
    seen = 0

    def line(frame, event, _):
        nonlocal seen
        if event == "line":
            seen += 1
            if seen == at:
                raise KeyboardInterrupt
        return line

    def call(frame, event, _):
        return line if frame.f_code.co_filename.startswith(ROOT) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        work()
    finally:
        sys.settrace(before)
    return seen


def taken(model, before):
    """Attributes that are others than before."""
    return {name for name, value in vars(model).items() if name not in before or before[name] is not value}


# The line at which a file is closed may be interrupted as well: Python closes it then, and warns.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", MODELS)
def test_an_interrupt_at_any_line_leaves_one_fit_whole(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, fit, again = MODELS[name]
    # Once for what is compiled and imported.
    again(fit(make()))
    whole = fit(make())
    before = dict(vars(whole))
    count = traced(lambda: again(whole))
    all_taken = taken(whole, before)
    assert all_taken
    # All of the end, where what was made is taken, and some of what comes before.
    left = []
    for at in sorted({*np.linspace(1, count, 12, dtype=int).tolist(), *range(max(1, count - 25), count + 1)}):
        model = fit(make())
        before = dict(vars(model))
        # Not each run takes as many lines.
        with suppress(KeyboardInterrupt):
            traced(lambda model=model: again(model), at)
        assert taken(model, before) in (set(), all_taken), f"line {at} of {count}"
        left.append(not taken(model, before))
    assert any(left)


def test_a_fit_that_is_refused_leaves_what_there_was():
    """Powers were of the second graph, all else of the first."""
    model = FastRP(dim=8, keep_powers=True, matrix="adjacency", s=1.0, workers=1).fit(FIRST)
    rows = np.eye(2, 5)
    before, vectors = dict(vars(model)), model.transform(rows)
    with pytest.raises(InputError, match="vectors leave the range"):
        model.fit(Graph.from_edges([0, 1, 2, 3, 4], [1, 2, 3, 4, 0], [1e30] * 5))
    assert taken(model, before) == set()
    np.testing.assert_array_equal(model.transform(rows), vectors)


def test_what_only_a_fit_before_had_left_is_gone():
    """`powers_` of the first graph stood beside vectors of the second, and held their memory."""
    model = FastRP(dim=8, keep_powers=True, workers=1).fit(FIRST).set_params(keep_powers=False).fit(SECOND)
    assert not hasattr(model, "powers_")
    assert vars(model).keys() == vars(FastRP(dim=8, workers=1).fit(SECOND)).keys()


def test_clicks_that_are_refused_leave_those_there_were():
    model = GRank().fit(CLICKS)
    before = dict(vars(model))
    with pytest.raises(DataError):
        model.fit([("ann", "jazz", 3.5)])
    assert taken(model, before) == set()


def test_weights_that_were_changed_in_place_are_seen():
    """Arrays of four weights were taken for those of three: what lay behind them was read."""
    weights = [0.0, 1.0, 1.0]
    model = FastRP(dim=8, weights=weights, concatenate=True, keep_powers=True, workers=1).fit(FIRST)
    for change in (lambda: weights.__setitem__(0, 1.0), lambda: weights.append(2.0)):
        change()
        with pytest.raises(
            InputError, match=r"weights is .*, and was \[0\.0, 1\.0, 1\.0\] when this FastRP was fitted"
        ):
            model.transform(np.eye(2, 5))
        with pytest.raises(InputError, match="weights is"):
            model.save("never.anb")


@pytest.mark.parametrize("ending", [".anb", ".npz"])
def test_names_that_a_file_would_not_keep_apart_are_refused_before_it_is_written(tmp_path, ending):
    """It was written, and then no release could read it."""
    graph = Graph.from_edges([0, 1, 2], [1, 2, 0], names=[1, "1", 2])
    for model in (GraphVite(dim=4, epochs=2, workers=1).fit(graph), FastRP(dim=4, workers=1).fit(graph)):
        with pytest.raises(InputError, match="names can be saved if all are integers or all are text; 1 is not text"):
            model.save(tmp_path / f"m{ending}")
    scores = FullyPPR(walks=20, workers=1).fit(graph).result_
    for place in (f"s{ending}", "s.parquet"):
        with pytest.raises(InputError, match="names can be saved if all are integers or all are text; 1 is not text"):
            scores.save(tmp_path / place)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("length", [200, 241, 250, 251, 255])
def test_names_of_files_may_be_as_long_as_file_systems_take(tmp_path, length):
    path = tmp_path / ("n" * (length - 4) + ".anb")
    if length > 250:
        with pytest.raises(InputError, match="is too long: it may have 250 bytes, since a folder may lie beside it"):
            FIRST.save(path)
        return
    for _ in range(2):
        FIRST.save(path)
    assert Graph.load(path).equals(FIRST)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
