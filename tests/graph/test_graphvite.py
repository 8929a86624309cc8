"""The estimator: results, determinism, resuming, memory, files, errors."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import CapacityError, DataError, InputError
from anabranch.graph import Graph
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.estimator import most_similar
from anabranch.graph.evaluate import classify_nodes
from anabranch.graph.graphvite import GraphVite, storage
from anabranch.graph.graphvite.augmentation import Sampler
from anabranch.graph.graphvite.partition import zig_zag
from anabranch.graph.graphvite.parts import MappedParts, Parts
from ranks import run_ranks

SMALL = {"dim": 8, "epochs": 6, "walk_length": 10, "pool_size": 300}


def communities(count=4, size=20, seed=0):
    """Dense groups with few edges between them, and the group of each node."""
    generator = np.random.default_rng(seed)
    group_N = np.repeat(np.arange(count), size)
    inside = generator.integers(0, size, (2, count * size * 4)) + size * generator.integers(0, count, count * size * 4)
    between = generator.integers(0, count * size, (2, count * size // 3))
    source, target = np.concatenate([inside, between], 1)
    return Graph.from_edges(source, target, num_nodes=count * size), group_N


@pytest.fixture(scope="module")
def graph():
    return communities()[0]


# What it is for


@pytest.mark.parametrize("model", ["deepwalk", "line", "node2vec"])
def test_vectors_tell_communities(model):
    graph, group_N = communities()
    bend = {"p": 0.5, "q": 2.0} if model == "node2vec" else {}
    found = GraphVite(dim=16, model=model, epochs=300, **bend).fit_transform(graph)
    assert found.shape == (80, 16)
    assert found.dtype == np.float32
    assert classify_nodes(found, group_N, train_fraction=0.2).micro > 0.95
    near, _ = most_similar(found, 0, k=5)
    assert (group_N[near] == group_N[0]).all()


def test_edges_score_above_other_pairs():
    graph, _ = communities()
    model = GraphVite(dim=16, epochs=300, augmentation=1).fit(graph)
    source, target, _ = graph.edges()
    edges = np.column_stack([source, target])
    others = np.random.default_rng(0).integers(0, 80, (500, 2))
    assert model.predict(edges).mean() > model.predict(others).mean() + 1
    expected = (model.vertex_ND[edges[:, 0]] * model.context_ND[edges[:, 1]]).sum(1)
    assert model.predict(edges) == pytest.approx(expected, abs=1e-4)
    assert model.predict(edges).dtype == np.float32
    assert model.predict(np.empty((0, 2), int)).shape == (0,)


def test_loss_and_rate_are_told():
    told = []
    graph, _ = communities()
    model = GraphVite(dim=8, epochs=40, pool_size=1000, callbacks=[told.append]).fit(graph)
    assert [round(progress.epoch, 9) for progress in told] == [round(row["epoch"], 9) for row in model.history]
    assert told[0].loss == pytest.approx(np.log(2), rel=0.01)  # all scores begin at 0
    assert told[-1].loss < told[0].loss
    total = 40 * graph.num_edges
    assert all(progress.total == total for progress in told)
    assert told[-2].done < total <= told[-1].done < total + 400  # whole walks
    assert told[0].lr == pytest.approx(0.025 * (1 - (told[0].done - 1) / total))
    assert told[-1].lr == pytest.approx(2.5e-6, rel=1e-3) or told[-1].lr < 1e-4
    assert all(progress.samples_per_second > 0 for progress in told)


# Determinism


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(("partitions", "group"), [(4, "auto"), (4, 2), (6, 3), (1, 1), (16, "auto")])
def test_workers_reproduce_one_worker_to_the_bit(graph, partitions, group, optimizer):
    base = {**SMALL, "partitions": partitions, "group": group, "optimizer": optimizer}
    one = GraphVite(**base).fit(graph)
    for more in ({"workers": 2}, {"workers": 3, "samplers": 0}, {"workers": 16, "samplers": 3}):
        other = GraphVite(**base, **more).fit(graph)
        assert np.array_equal(one.vertex_ND, other.vertex_ND)
        assert np.array_equal(one.context_ND, other.context_ND)
        assert one.history == other.history


@pytest.mark.parametrize(("samplers", "walking"), [(0, 3), (1, 1), (2, 2)])
def test_walks_in_turn_are_made_by_all_workers(graph, monkeypatch, samplers, walking):
    """One thread would bound what several workers gain: walks are a quarter of the work."""
    own, seen = Sampler.pool, set()

    def watched(self, first, count, workers):
        seen.add(workers.count)
        return own(self, first, count, workers)

    monkeypatch.setattr(Sampler, "pool", watched)
    GraphVite(**{**SMALL, "epochs": 2}, workers=3, samplers=samplers).fit(graph)
    assert seen == {walking}


def test_seeds_and_parts_change_the_result_and_nothing_else_does(graph):
    first = GraphVite(**SMALL).fit_transform(graph)
    assert np.array_equal(first, GraphVite(**SMALL).fit_transform(graph))
    assert not np.array_equal(first, GraphVite(**SMALL, seed=1).fit_transform(graph))
    assert not np.array_equal(first, GraphVite(**SMALL, partitions=2).fit_transform(graph))


def test_first_values_do_not_depend_on_the_partition():
    drawn = []
    for num_parts in (1, 3):
        partition = zig_zag(np.arange(50), num_parts)
        parts = Parts(partition, 6, 0)
        parts.initialize(4)
        drawn.append(parts.get("head"))
        assert not parts.get("tail").any()
    assert np.array_equal(*drawn)
    assert np.abs(drawn[0]).max() < 1 / 12
    assert np.abs(drawn[0].mean()) < 4 / 12 / np.sqrt(3 * 300)  # 4 sigma


@given(st.integers(2, 12), st.integers(0, 30), st.booleans(), st.booleans(), st.integers(0, 99))
@settings(max_examples=20)
def test_any_graph_with_an_edge_trains(nodes, edges, directed, weighted, seed):
    generator = np.random.default_rng(seed)
    source, target = np.append(generator.integers(0, nodes, (2, edges)), [[0], [1]], axis=1)
    weight = generator.random(edges + 1) + 0.1 if weighted else None
    graph = Graph.from_edges(source, target, weight, directed, nodes)  # self-loops, dangling and isolated nodes
    found = [GraphVite(dim=4, epochs=3, workers=workers).fit_transform(graph) for workers in (1, 3)]
    assert np.isfinite(found[0]).all()
    assert np.array_equal(*found)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": 1e30}, r"lr is 1e\+30 \(sgd\), negative_weight 5"),
        ({"negative_weight": 1e30}, r"negative_weight 1e\+30"),
        ({"weight_decay": 1e30}, r"weight_decay 1e\+30"),
        ({"lr": 1e30, "executor": "torch"}, r"lr is 1e\+30"),
        ({"lr": 1e37, "optimizer": "momentum"}, r"lr is 1e\+37 \(momentum\)"),
    ],
)
def test_training_that_diverges_says_so(graph, options, said):
    if "executor" in options:
        pytest.importorskip("torch")
    told = []
    model = GraphVite(dim=8, epochs=60, pool_size=400, workers=1, callbacks=[told.append], **options)
    with pytest.raises(InputError, match=f"training diverged: .* (is|are) .*{said}.*take a smaller lr"):
        model.fit(graph)
    assert all(math.isfinite(progress.loss) for progress in told)
    with pytest.raises(InputError, match="fit"):
        model.transform()


@pytest.mark.parametrize("name", ["vertex", "context"])
def test_numbers_that_the_last_pool_spoils_are_told(graph, monkeypatch, name):
    model = GraphVite(dim=8, epochs=1, workers=1).fit(graph)
    kept, own = model.transform().copy(), Parts.get

    def spoiled(self, side, number=0):
        found = own(self, side, number)
        if side == {"vertex": "head", "context": "tail"}[name]:
            found[-1, 3] = np.inf
        return found

    monkeypatch.setattr(Parts, "get", spoiled)
    with pytest.raises(InputError, match=rf"training diverged: 1 of {graph.num_nodes} rows of {name} are not finite"):
        model.resume(graph, 1)
    monkeypatch.undo()
    np.testing.assert_array_equal(model.transform(), kept)


# Memory


def test_parts_beyond_the_limit_lie_on_disk(graph, monkeypatch, tmp_path):
    made = []
    keep = MappedParts.__init__
    monkeypatch.setattr(MappedParts, "__init__", lambda self, *a, **k: (made.append(self), keep(self, *a, **k))[1])
    whole = GraphVite(**SMALL, partitions=8).fit(graph)
    row = 8 * 4
    limit = 4 * 10 * row  # 80 nodes, 8 parts of 10: four parts, so two workers
    mapped = GraphVite(**SMALL, partitions=8, workers=4, memory_limit=limit, scratch=tmp_path).fit(graph)
    assert np.array_equal(whole.vertex_ND, mapped.vertex_ND)
    assert np.array_equal(whole.context_ND, mapped.context_ND)
    (parts,) = made
    assert 0 < parts.peak_bytes == mapped.peak_part_bytes <= limit
    assert whole.peak_part_bytes == 2 * 80 * row
    assert parts.resident_bytes == 0
    files = list(tmp_path.iterdir())
    assert len(files) == 1
    monkeypatch.undo()
    made.clear()
    del parts, mapped
    assert not list(tmp_path.iterdir())  # the files go with the model


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_auto_partitions_grow_until_two_parts_fit(graph, optimizer):
    row = 8 * 4 * (3 if optimizer == "adam" else 1)
    model = GraphVite(**SMALL, memory_limit=2 * 10 * row, optimizer=optimizer).fit(graph)  # parts of 10: 8 of them
    assert np.array_equal(model.vertex_ND, GraphVite(**SMALL, partitions=8, optimizer=optimizer).fit_transform(graph))
    enough = GraphVite(**SMALL, memory_limit=10**9, optimizer=optimizer).fit_transform(graph)
    assert np.array_equal(enough, GraphVite(**SMALL, optimizer=optimizer).fit_transform(graph))


@pytest.mark.parametrize("weighted", [True, False])
def test_graphs_that_stay_on_disk_train_the_same(tmp_path, weighted):
    generator = np.random.default_rng(0)
    source, target = generator.integers(0, 30, (2, 90))
    graph = Graph.from_edges(source, target, generator.random(90) + 0.1 if weighted else None)
    graph.save(tmp_path / "g.anb")
    mapped = Graph.load(tmp_path / "g.anb", mmap=True)
    for options in ({}, {"model": "node2vec", "p": 0.2}, {"executor": "torch"}):
        found = [GraphVite(**SMALL, **options).fit_transform(one) for one in (graph, mapped)]
        assert np.array_equal(*found)


def test_peak_bytes_by_hand(graph):
    # A = 8 * 80 * 8 = 5120; S = 300; s = floor(ln 1600 / ln(285 / 80)) = 5; walks 300 / 5 * 11 / 10 * 4 bytes = 264
    assert graph.num_edges == 285
    assert GraphVite(**SMALL).peak_bytes(graph) == 2 * 5120 + 16 * 300 + 264 + 72 * 80
    assert GraphVite(**SMALL, optimizer="adam").peak_bytes(graph) == 6 * 5120 + 16 * 300 + 264 + 72 * 80


def test_too_little_memory_is_said(graph):
    with pytest.raises(CapacityError, match="memory_limit is 63 bytes; with 64 parts, the most"):
        GraphVite(**SMALL, memory_limit=63).fit(graph)
    with pytest.raises(CapacityError, match="need 1,280; use more partitions"):
        GraphVite(**SMALL, memory_limit=700, partitions=4).fit(graph)


# Going on


@pytest.mark.parametrize("form", ["npz", "anb", None])
@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
def test_a_run_that_was_ended_goes_on_as_if_it_was_not(graph, tmp_path, form, optimizer):
    base = {**SMALL, "optimizer": optimizer}
    whole = GraphVite(**base).fit(graph)
    stopped = GraphVite(**base, callbacks=[lambda progress: progress.epoch < 3]).fit(graph)
    assert len(stopped.history) < len(whole.history)
    assert not np.array_equal(stopped.vertex_ND, whole.vertex_ND)
    if form:
        stopped.save(tmp_path / f"half.{form}")
        stopped = GraphVite.load(tmp_path / f"half.{form}")
    else:
        stopped.set_params(callbacks=())
    stopped.resume(graph)
    assert np.array_equal(stopped.vertex_ND, whole.vertex_ND)
    assert np.array_equal(stopped.context_ND, whole.context_ND)
    assert stopped.history == whole.history


def test_more_epochs_are_a_run_of_their_own(graph):
    model = GraphVite(**SMALL).fit(graph)
    before, rows = model.vertex_ND.copy(), len(model.history)
    model.resume(graph, epochs=4)
    assert not np.array_equal(before, model.vertex_ND)
    assert model.history[rows]["lr"] > model.history[rows - 1]["lr"]
    assert model.history[-1]["epoch"] == pytest.approx(4, abs=0.3)
    again = GraphVite(**SMALL).fit(graph).resume(graph, epochs=4)
    assert np.array_equal(model.vertex_ND, again.vertex_ND)


def test_a_file_cannot_ask_for_a_run_without_end(graph, tmp_path):
    path = tmp_path / "a.anb"
    GraphVite(**SMALL, callbacks=[lambda progress: False]).fit(graph).save(path)
    found = read_arrays(path, "graphvite")
    most = 1_000_000 * graph.num_edges
    for total, is_refused in ((2**63 - 1, True), (most + 1, True), (most, False)):
        meta = {**found.meta, "counters": {**found.meta["counters"], "total": total}}
        write_arrays(
            path, "graphvite", {name: np.array(array) for name, array in found.arrays.items()}, meta, found.version
        )
        model = GraphVite.load(path)
        if is_refused:
            with pytest.raises(InputError, match=f"the run has {total:,} samples, more than the 1,000,000 epochs"):
                model.resume(graph)
        else:
            # It is begun, and broken off.
            model.set_params(callbacks=[lambda progress: False]).resume(graph)
            assert model._counters.done < total


@pytest.mark.parametrize("normalize", [1, 0, "no", ""])
def test_files_hold_what_was_given_before_it_was_looked_at(graph, tmp_path, normalize):
    path = tmp_path / "a.anb"
    GraphVite(**SMALL).fit(graph).save(path)
    found = read_arrays(path, "graphvite")
    meta = {**found.meta, "params": {**found.meta["params"], "normalize": normalize}}
    write_arrays(
        path, "graphvite", {name: np.array(array) for name, array in found.arrays.items()}, meta, found.version
    )
    assert GraphVite.load(path).normalize is bool(normalize)


@pytest.mark.parametrize(
    "before",
    [
        {"epochs": 2e6},
        {"walk_length": 70_000},
        {"walk_length": 70_000, "augmentation": 69_000},
        {"walk_length": 60_000, "augmentation": 50_000},
        {"negatives": 70_000},
        {"samplers": 70_000},
    ],
)
def test_files_of_before_are_read_where_only_a_new_fit_would_be_refused(graph, tmp_path, before):
    path = tmp_path / "a.anb"
    model = GraphVite(**SMALL).fit(graph)
    model.save(path)
    found = read_arrays(path, "graphvite")
    meta = {**found.meta, "params": {**found.meta["params"], **before}}
    arrays = {name: np.array(array) for name, array in found.arrays.items()}
    write_arrays(path, "graphvite", arrays, meta, found.version)
    read = GraphVite.load(path)
    assert {name: read.get_params()[name] for name in before} == before
    assert np.array_equal(read.transform(), model.transform())
    read.save(tmp_path / "b.anb")
    assert np.array_equal(GraphVite.load(tmp_path / "b.anb").predict([[0, 1]]), model.predict([[0, 1]]))
    for refused in (lambda: read.fit(graph), lambda: read.resume(graph)):
        with pytest.raises(InputError, match=f"^({'|'.join(before)}) is "):
            refused()
    assert np.array_equal(read.transform(), model.transform())
    # Others may change, and it goes on for as long as is said.
    read.set_params(workers=2)
    assert {name: read.get_params()[name] for name in before} == before
    if "epochs" in before:
        read.resume(graph, epochs=1)
    read.set_params(**{name: GraphVite(**SMALL).get_params()[name] for name in before}).resume(graph, epochs=1)
    # What never was allowed is no file of before.
    for wrong in ({"epochs": -1}, {"epochs": "2e6"}, {"negatives": 1.5}, {"walk_length": 0}, {"lr": -1}):
        write_arrays(path, "graphvite", arrays, {**meta, "params": {**found.meta["params"], **wrong}}, found.version)
        with pytest.raises(DataError, match=f"{next(iter(wrong))} is "):
            GraphVite.load(path)


def test_what_cannot_go_on_is_said(graph):
    with pytest.raises(InputError, match="not fitted yet; call fit first"):
        GraphVite().resume(graph)
    model = GraphVite(**SMALL).fit(graph)
    with pytest.raises(InputError, match="trained to its end; say for how many more `epochs`"):
        model.resume(graph)
    with pytest.raises(InputError, match="the embedding has 80 nodes, the graph 2; fit anew"):
        model.resume(Graph.from_edges([0], [1]), epochs=1)
    with pytest.raises(InputError, match="epochs is 0"):
        model.resume(graph, epochs=0)
    with pytest.raises(InputError, match="the embedding has dim 8, dim is now 4; fit anew"):
        model.set_params(dim=4).resume(graph, epochs=1)


# Nodes without edges, output


def test_isolated_nodes_keep_their_first_values_or_are_zero():
    graph = Graph.from_edges([0, 1], [1, 2], num_nodes=5)
    model = GraphVite(**SMALL).fit(graph)
    assert model.is_trained_N.tolist() == [True, True, True, False, False]
    start = Parts(zig_zag(np.zeros(5), 1), 8, 0)
    start.initialize(0)
    assert np.array_equal(model.transform([3, 4]), start.get("head")[3:])
    assert not GraphVite(**SMALL, isolated="zero").fit(graph).transform([3, 4]).any()


def test_transform(graph):
    model = GraphVite(**SMALL).fit(graph)
    whole = model.transform()
    assert np.array_equal(whole, model.vertex_ND)
    assert np.array_equal(model.transform(graph), whole)
    assert np.array_equal(model.transform([5, 2]), whole[[5, 2]])
    lengths = np.linalg.norm(model.set_params(normalize=True).transform(), axis=1)
    assert lengths == pytest.approx(np.ones(80), abs=1e-5)
    with pytest.raises(InputError, match="node 80 is not one of the 80"):
        model.transform([80])
    with pytest.raises(InputError, match="80 nodes were fitted"):
        model.transform(Graph.from_edges([0], [1]))
    with pytest.raises(InputError, match="integers, not float64"):
        model.predict([[0.5, 1.0]])
    with pytest.raises(InputError, match=r"shape \[edges, 2\], these \(2,\)"):
        model.predict([0, 1])
    with pytest.raises(InputError, match="not fitted yet"):
        GraphVite().transform()


# Files


def named():
    return Graph.from_edges([0, 1, 2], [1, 2, 3], names=["anna", "bör", "c", "d"])


@pytest.mark.parametrize("form", ["npz", "anb"])
def test_saved_models_read_back_equal(tmp_path, form):
    model = GraphVite(**SMALL, p=1, weight_decay=np.float64(0.01), optimizer="adam").fit(named())
    model.save(tmp_path / f"m.{form}")
    found = GraphVite.load(tmp_path / f"m.{form}")
    assert found.get_params() == {**model.get_params(), "callbacks": ()}
    assert np.array_equal(found.vertex_ND, model.vertex_ND)
    assert np.array_equal(found.predict([[0, 3]]), model.predict([[0, 3]]))
    assert np.array_equal(found.is_trained_N, model.is_trained_N)
    assert found.history == model.history
    found.save(tmp_path / "again.vec")
    assert (tmp_path / "again.vec").read_text(encoding="utf-8").splitlines()[2].startswith("bör ")


def test_word2vec_text(tmp_path):
    model = GraphVite(**SMALL).fit(named())
    model.save(tmp_path / "m.txt")
    lines = (tmp_path / "m.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "4 8"
    assert [line.split()[0] for line in lines[1:]] == ["anna", "bör", "c", "d"]
    found = GraphVite.load(tmp_path / "m.txt")
    assert np.array_equal(found.transform(), model.transform())  # the shortest text that reads back equal
    with pytest.raises(InputError, match="no context here: word2vec text holds vectors only"):
        found.predict([[0, 1]])
    plain = GraphVite(**SMALL).fit(Graph.from_edges([0], [1]))
    plain.save(tmp_path / "p.vec")
    assert (tmp_path / "p.vec").read_text().splitlines()[1].startswith("0 ")
    spaced = GraphVite(**SMALL).fit(Graph.from_edges([0], [1], names=["a b", "c"]))
    with pytest.raises(InputError, match="cannot hold the name 'a b'"):
        spaced.save(tmp_path / "s.vec")
    assert not (tmp_path / "s.vec").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.vec", b"", "line 1: word2vec text begins"),
        ("a.vec", b"2 3\n0 1 2 3\n", "1 vectors where its first line says 2"),
        ("a.vec", b"1 3\n0 1 2\n", "line 2: 2 numbers where 3"),
        ("a.vec", b"1 2\n0 1 nan\n", "line 2: a number is not finite"),
        ("a.vec", b"1 2\n0 1 x\n", "not a saved GraphVite in any form"),
        ("a.vec", b"2 1\na 1\na 2\n", "a name twice"),
        ("a.vec", b"\xff\xfe\x00", "not a saved GraphVite in any form"),
        ("a.npz", b"PK\x03\x04 nothing", "not a saved GraphVite, or is damaged"),
        ("a.anb", b"ANABARR1", "truncated"),
    ],
)
def test_foreign_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        GraphVite.load(tmp_path / name)


def test_damaged_and_foreign_archives_are_refused(tmp_path, graph):
    with pytest.raises(DataError, match="no such file"):
        GraphVite.load(tmp_path / "none.npz")
    graph.save(tmp_path / "graph.anb")
    with pytest.raises(DataError, match="holds a graph, not a graphvite"):
        GraphVite.load(tmp_path / "graph.anb")
    np.savez(tmp_path / "other.npz", vertex=np.zeros(3))
    with pytest.raises(DataError, match="not a saved GraphVite, or is damaged"):
        GraphVite.load(tmp_path / "other.npz")
    model = GraphVite(**SMALL).fit(graph)
    for form in ("npz", "anb"):
        path = tmp_path / f"m.{form}"
        model.save(path)
        whole = path.read_bytes()
        for cut in (len(whole) // 3, len(whole) - 5):
            path.write_bytes(whole[:cut])
            with pytest.raises(DataError):
                GraphVite.load(path)
        for place in (400, len(whole) // 2):
            flipped = bytearray(whole)
            flipped[place] ^= 16
            path.write_bytes(flipped)
            with pytest.raises(DataError):
                GraphVite.load(path)


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim is 0; it must be a whole number of at least 1"),
        ({"dim": 2.5}, "dim is 2.5"),
        ({"model": "word2vec"}, "model is 'word2vec'; it must be one of deepwalk, line, node2vec"),
        ({"optimizer": "lion"}, "optimizer is 'lion'; it must be one of sgd, momentum, adagrad, rmsprop, adam"),
        ({"executor": "spark"}, "executor is 'spark'"),
        ({"isolated": "drop"}, "isolated is 'drop'; it must be one of keep, zero"),
        ({"epochs": 0}, "epochs is 0; it must be a finite number greater than 0"),
        (
            {"lr": 10**400},
            "lr is an integer of about 401 digits; it must be a finite number greater than 0, and at most 1e",
        ),
        ({"negatives": 65_537}, "negatives is 65537; it must be a whole number of at least 0 and at most 65,536"),
        (
            {"walk_length": 2**70},
            "walk_length is 1180591620717411303424; it must be a whole number of at least 1 and at most",
        ),
        ({"epochs": float("inf")}, "epochs is inf"),
        ({"epochs": 1e19}, "epochs is 1e+19; it must be a finite number greater than 0, and at most 1e+06"),
        ({"epochs": 1_000_001}, "epochs is 1000001; it must be a finite number"),
        ({"normalize": "no"}, "normalize is 'no'; it must be True or False"),
        ({"lr": np.array([1.0, 2.0])}, "lr is array([1., 2.]); it must be a finite number"),
        ({"callbacks": 3}, "callbacks is 3; it must be a list of functions"),
        ({"callbacks": [3]}, "callbacks is [3]; it must be a list of functions"),
        ({"scratch": 5}, "scratch is 5; it must be a path, or None"),
        ({"device": 3}, "device is 3; it must be the name of one"),
        ({"dim": 2**31}, "dim is 2147483648; it must be a whole number of at least 1 and at most 2,147,483,647"),
        (
            {"walk_length": 65_536, "augmentation": 65_536},
            "augmentation is 65536 and walk_length 65536, so that a walk gives 2,147,516,416 samples; a pool holds whole walks, of at "
            "most 16,777,216",
        ),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": "fast"}, "lr is 'fast'"),
        ({"weight_decay": -1}, "weight_decay is -1; it must be a finite number of at least 0"),
        ({"negatives": -1}, "negatives is -1"),
        ({"augmentation": 0}, "augmentation is 0; it must be a whole number of at least 1 or 'auto'"),
        ({"augmentation": 41}, "augmentation is 41, beyond the walk_length of 40"),
        ({"walk_length": 0}, "walk_length is 0"),
        ({"partitions": True}, "partitions is True"),
        ({"workers": 0}, "workers is 0"),
        ({"p": 0, "model": "node2vec"}, "p is 0"),
        ({"q": 2.0}, "p and q bend the walks of model='node2vec'; the model is 'deepwalk'"),
        ({"pool_size": 101, "shuffle_base": 2}, "pool_size is 101, not a multiple of shuffle_base, 2; 100 is"),
        ({"memory_limit": 0}, "memory_limit is 0"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"executor": "threads", "device": "cuda"}, "executor='threads' trains on the CPU; device is 'cuda'"),
        ({"executor": "distributed", "memory_limit": 5}, "memory_limit is for one process"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(InputError) as error:
        GraphVite(**options)
    assert message in str(error.value)
    with pytest.raises(ValueError, match=re.escape(message)):
        GraphVite().set_params(**options)


def test_bad_graphs_are_named(graph):
    with pytest.raises(InputError, match="a list is no graph"):
        GraphVite().fit([])
    with pytest.raises(InputError, match="0 nodes and no edges"):
        GraphVite().fit(Graph.from_edges([], []))
    with pytest.raises(InputError, match="3 nodes and no edges"):
        GraphVite().fit(Graph.from_edges([], [], num_nodes=3))
    with pytest.raises(InputError, match="partitions is 81, but the graph has 80 nodes"):
        GraphVite(partitions=81).fit(graph)
    with pytest.raises(InputError, match="group is 3; it must divide the number of parts, 4"):
        GraphVite(group=3).fit(graph)
    negative = Graph.from_edges([0, 1], [1, 2], [1.0, -2.0], allow_negative=True)
    with pytest.raises(InputError, match="weights that are not negative"):
        GraphVite(**SMALL).fit(negative)
    with pytest.raises(ValueError, match="edge 1 has the weight nan"):
        Graph.from_edges([0, 1], [1, 2], [1.0, float("nan")])


def test_without_decay_and_without_negatives(graph):
    for options in ({"weight_decay": 0}, {"negatives": 0}, {"negatives": 3, "negative_weight": 0}):
        assert np.isfinite(GraphVite(**SMALL, **options).fit_transform(graph)).all()


def test_it_is_an_estimator():
    model = GraphVite(dim=3, seed=9)
    assert model.get_params()["dim"] == 3
    assert eval(repr(model)).get_params() == model.get_params()
    assert model.set_params(dim=5).dim == 5


# Processes

SCRIPT = """
import numpy as np
from anabranch.graph import Graph
from anabranch.graph.graphvite import GraphVite, storage
generator = np.random.default_rng(0)
graph = Graph.from_edges(*generator.integers(0, 60, (2, 300)))
model = GraphVite(executor="distributed", **{options}).fit(graph)
np.savez(f"{folder}/{{rank}}.npz", V=model.vertex_ND, C=model.context_ND, loss=[row["loss"] for row in model.history])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("world", "optimizer", "group"), [(2, "adam", "auto"), (3, "sgd", 2)])
def test_processes_reproduce_one_process_to_the_bit(tmp_path, world, optimizer, group):
    options = {
        "dim": 8,
        "epochs": 6,
        "model": "line",
        "partitions": 4,
        "group": group,
        "optimizer": optimizer,
        "pool_size": 600,
    }
    generator = np.random.default_rng(0)
    one = GraphVite(**options).fit(Graph.from_edges(*generator.integers(0, 60, (2, 300))))
    run_ranks(SCRIPT.format(options=options, folder=tmp_path), world)
    for rank in range(world):
        found = np.load(tmp_path / f"{rank}.npz")
        assert np.array_equal(found["V"], one.vertex_ND)
        assert np.array_equal(found["C"], one.context_ND)
        assert found["loss"].tolist() == [row["loss"] for row in one.history]


def test_processes_need_a_group(graph):
    from anabranch.errors import BackendError

    with pytest.raises(BackendError, match="needs an initialised process group"):
        GraphVite(**SMALL, executor="distributed").fit(graph)


@pytest.mark.parametrize("suffix", [".anb", ".npz"])
@pytest.mark.parametrize(
    "change",
    [
        {"vertex": np.full((30, 4), "x")},
        {"vertex": np.ones((30, 4), complex)},
        {"vertex": np.full((30, 4), np.nan, np.float32)},
        {"vertex": np.ones((30, 4), np.int32)},
        {"context": np.ones((30, 5), np.float32)},
        {"trained": np.ones(29, bool)},
        {"trained": np.ones(30, np.float32)},
        {"head1": np.zeros((2, 4), np.float32)},
        {"tail2": np.zeros((30, 4), np.int64)},
        {"names": np.array(["a", "b"])},
        {"names": np.array(["a"] * 30)},
        {"names": np.array([["a", "b"]] * 30)},
        {"names": np.arange(40)},
        {"vertex": np.ones(30, np.float32)},
    ],
)
def test_arrays_that_are_not_of_one_model_are_refused(tmp_path, suffix, change):
    """With right sums they were a raw IndexError or TypeError at the first use, or numbers of nothing."""
    graph = Graph.from_edges(np.arange(30), (np.arange(30) * 7 + 1) % 30, num_nodes=30)
    path = tmp_path / f"m{suffix}"
    GraphVite(dim=4, epochs=1, workers=1, samplers=0).fit(graph).save(path)
    saved = storage.read(path)
    storage.write(path, storage.Saved({**saved.arrays, **change}, saved.meta))
    with pytest.raises(DataError, match=r"m\.(anb|npz) is (not a saved GraphVite|damaged)"):
        GraphVite.load(path)
