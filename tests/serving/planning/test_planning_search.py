"""Share tables, the simulator and both stages of the search, against brute force."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import CapacityError, ConfigError, DataError, InputError
from anabranch.serving.planning.cost import Workload
from anabranch.serving.planning.graph import LayerGraph, Operation
from anabranch.serving.planning.hardware import find_hardware
from anabranch.serving.planning.interference import PAPER_POINTS, PAPER_TABLE, Curve, ShareTable, monotone
from anabranch.serving.planning.order import (
    branch_and_bound,
    find_order,
    improve,
    layer_time,
    linear_orders,
    list_order,
    milp,
)
from anabranch.serving.planning.search import _Search, find_shares, load_pipeline, search
from anabranch.serving.planning.shape import find_shape
from anabranch.serving.planning.simulate import Schedule, gantt, save_gantt, simulate, violations

LLAMA, A100 = find_shape("llama-2-70b"), find_hardware("a100", 8)
RESOURCES = ("compute", "memory", "network")


def seconds(value):
    return lambda tokens: value * tokens


@st.composite
def graphs(draw, most=6):
    """A layer in a chain or a diamond, cut into at most ``most`` nano-operations."""
    count = draw(st.integers(1, 4))
    made, parts = [], 0
    cuts = {}
    for number in range(count):
        after = (
            tuple(str(other) for other in sorted(draw(st.sets(st.integers(0, number - 1), max_size=2))))
            if number
            else ()
        )
        resource = draw(st.sampled_from(RESOURCES))
        made.append(Operation(str(number), resource, 0, 4, after, seconds(draw(st.integers(1, 9)))))
        cut = draw(st.booleans()) and parts + 2 + (count - number - 1) <= most
        cuts[str(number)] = [2] if cut else []
        parts += 1 + cut
    return LayerGraph(tuple(made), 4, ("0",), (str(count - 1),)).split(cuts)


# Share tables


def test_curves_go_through_their_points_and_rise():
    for name, points in PAPER_POINTS.items():
        curve = PAPER_TABLE.curves[name]
        assert [curve(share) for share, _ in points] == pytest.approx([speed for _, speed in points])
        values = [curve(share / 200) for share in range(201)]
        assert all(low <= high + 1e-12 for low, high in itertools.pairwise(values))
        assert all(value >= share / 200 - 1e-9 for share, value in enumerate(values)), "sharing pays"


@given(st.lists(st.tuples(st.floats(0.01, 0.99), st.floats(0, 1)), max_size=5))
def test_curves_equal_scipy_pchip(points):
    interpolate = pytest.importorskip("scipy.interpolate")
    shares = sorted({round(share, 2) for share, _ in points} | {0.0, 1.0})
    speeds = sorted([0.0, 1.0, *[round(speed, 3) for _, speed in points][: len(shares) - 2]])
    speeds = speeds if len(speeds) == len(shares) else np.linspace(0, 1, len(shares)).tolist()
    curve, theirs = Curve(list(zip(shares, speeds, strict=True))), interpolate.PchipInterpolator(shares, speeds)
    for share in np.linspace(0, 1, 23):
        assert curve(float(share)) == pytest.approx(float(theirs(share)), abs=1e-9)


def test_a_flat_piece_of_a_curve_is_flat_to_the_bit():
    curve = Curve([(0.0, 0.0), (0.1, 1.0), (0.3, 1.0), (1.0, 1.0)])
    assert {curve(0.1 + 0.9 * step / 997) for step in range(998)} == {1.0}


def test_measured_points_become_their_upper_hull():
    assert monotone([(0.5, 0.3), (0.2, 0.4), (0.6, 0.9)]) == [(0.0, 0.0), (0.2, 0.4), (0.6, 0.9), (1.0, 1.0)]
    assert monotone([]) == [(0.0, 0.0), (1.0, 1.0)]
    Curve(monotone([(0.3, 2.0), (-1, 3), (0.7, -0.1)]))


def test_tables_are_checked_and_read_back():
    assert ShareTable.from_dict(json.loads(json.dumps(PAPER_TABLE.to_dict()))).to_dict() == PAPER_TABLE.to_dict()
    for points, message in (
        (((0, 0), (0.5, 0.6), (0.4, 0.7), (1, 1)), "shares must rise"),
        (((0, 0), (0.5, 0.6), (0.6, 0.5), (1, 1)), "must not fall"),
        (((0, 0), (0.9, 1.0)), "must go from"),
    ):
        with pytest.raises(ConfigError, match=message):
            ShareTable({**PAPER_POINTS, "memory": points})
    with pytest.raises(ConfigError, match="no points of network"):
        ShareTable({"compute": ((0, 0), (1, 1)), "memory": ((0, 0), (1, 1))})
    with pytest.raises(ConfigError, match="0 to 1"):
        PAPER_TABLE.speed("memory", 1.5)


# Simulation


def two(first=("compute", 4.0), second=("memory", 3.0)):
    """Two operations of two parts each, one behind the other."""
    made = (
        Operation("a", first[0], 0, 2, (), seconds(first[1] / 2)),
        Operation("b", second[0], 0, 2, ("a",), seconds(second[1] / 2)),
    )
    return LayerGraph(made, 2, ("a",), ("b",)).split({"a": [1], "b": [1]})


def test_a_schedule_by_hand():
    """a.0 0-2; a.1 2-4 beside b.0 2-3.5; b.1 4-5.5; the next layer's a.0 waits only for b.0: 4-6, its a.1 for b.1: 6-8."""
    timeline = simulate(Schedule(two(), (0, 1, 2, 3)), num_layers=2)
    assert [(span.number, span.layer, span.start_s, span.end_s) for span in timeline.spans] == [
        (0, 0, 0.0, 2.0),
        (1, 0, 2.0, 4.0),
        (2, 0, 2.0, 3.5),
        (3, 0, 4.0, 5.5),
        (0, 1, 4.0, 6.0),
        (1, 1, 6.0, 8.0),
        (2, 1, 6.0, 7.5),
        (3, 1, 8.0, 9.5),
    ]
    assert timeline.layer_ends == [5.5, 9.5]
    assert simulate(Schedule(two(), (0, 1, 2, 3)), num_layers=10).period_s == pytest.approx(4.0)


def test_shares_by_hand():
    """b.0 at share 0.2 reaches 0.3: 1.5 / 0.3 = 5 s. Beside it the product a.1 runs at 0.8: 2.5 s of it, done at 4.5."""
    schedule = Schedule(two(), (0, 1, 2, 3), (0.1, 0.1, 0.2, 1.0))
    spans = {span.number: span for span in simulate(schedule, PAPER_TABLE).spans}
    assert (spans[2].start_s, spans[2].end_s) == (2.0, pytest.approx(7.0))
    assert (spans[1].start_s, spans[1].end_s) == (2.0, pytest.approx(4.5))
    assert (spans[3].start_s, spans[3].end_s) == (pytest.approx(7.0), pytest.approx(8.5))
    fixed = {span.number: span for span in simulate(schedule, PAPER_TABLE, is_elastic=False).spans}
    assert fixed[0].end_s == pytest.approx(20.0)  # a tenth of the device for as long as it takes


def test_a_product_speeds_up_when_what_ran_beside_it_ends():
    """a.1 (10 s) starts with b.0 (1 s at 0.2 -> 3.33 s) beside it: 3.33 s at 0.8, the rest at 1."""
    made = (Operation("a", "compute", 0, 2, (), seconds(10.0)), Operation("b", "memory", 0, 2, ("a",), seconds(1.0)))
    graph = LayerGraph(made, 2, ("a",), ("b",)).split({"a": [1], "b": [1]})
    spans = {
        span.number: span for span in simulate(Schedule(graph, (0, 1, 2, 3), (0.1, 0.1, 0.2, 0.2)), PAPER_TABLE).spans
    }
    beside = 1 / 0.3
    assert spans[1].end_s - spans[1].start_s == pytest.approx(beside + (10 - 0.8 * beside))


@settings(max_examples=60, deadline=None)
@given(graphs(), st.randoms(use_true_random=False), st.integers(1, 4), st.booleans())
def test_no_rule_is_broken_and_bounds_hold(graph, random, num_layers, is_elastic):
    orders = list(itertools.islice(linear_orders(graph), 24))
    order = random.choice(orders)
    shares = tuple(random.randint(1, 10) / 10 for _ in graph.ops)
    timeline = simulate(Schedule(graph, order, shares), PAPER_TABLE, num_layers=num_layers, is_elastic=is_elastic)
    assert violations(timeline) == []
    assert timeline.makespan_s >= num_layers * graph.bound_s * (1 - 1e-9)
    points = sorted({span.start_s for span in timeline.spans})
    for at in points:  # the bound of shares, apart from `violations`
        running = [span.number for span in timeline.spans if span.start_s <= at < span.end_s - 1e-9]
        assert sum(shares[number] for number in running) <= 1 + 1e-6
    free = simulate(Schedule(graph, order), num_layers=num_layers)
    assert violations(free) == []
    assert num_layers * graph.bound_s * (1 - 1e-9) <= free.makespan_s <= num_layers * graph.sequential_s * (1 + 1e-9)
    whole = simulate(Schedule(graph, order, (1.0,) * len(order)), PAPER_TABLE, num_layers=num_layers)
    assert whole.makespan_s == pytest.approx(
        num_layers * graph.sequential_s
    )  # the whole device to each: one after the other


def test_violations_see_what_is_wrong():
    good = simulate(Schedule(two(), (0, 1, 2, 3), (0.5, 0.5, 0.5, 0.5)), PAPER_TABLE)
    moved = tuple(type(span)(span.number, span.layer, 0.0, span.end_s) for span in good.spans)
    found = " ".join(violations(type(good)(good.schedule, moved, 1)))
    assert "starts before a.0 is done" in found
    assert "shares its resource" in found
    assert "of the device is shared out" in found
    assert "3 of 4" in " ".join(violations(type(good)(good.schedule, good.spans[:3], 1)))


def test_wrong_schedules_are_refused():
    for order, shares, message in (
        ((0, 1, 2), None, "each of 4"),
        ((2, 0, 1, 3), None, "b.0 stands before a.0"),
        ((0, 1, 2, 3), (0.0, 1, 1, 1), "above 0"),
        ((0, 1, 2, 3), (1.0,), "above 0"),
    ):
        with pytest.raises(InputError, match=message):
            Schedule(two(), order, shares)
    with pytest.raises(InputError, match="needs a share table"):
        simulate(Schedule(two(), (0, 1, 2, 3), (0.5,) * 4))


def test_picture_shows_every_span(tmp_path):
    timeline = simulate(Schedule(two(), (0, 1, 2, 3), (0.5,) * 4), PAPER_TABLE, num_layers=2)
    text = gantt(timeline)
    assert text.count("<title>") == 8
    save_gantt(timeline, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text() == text


# Stage I


def brute_force(graph, num_layers):
    """The least over all permutations, dependences checked by hand."""
    best = float("inf")
    for order in itertools.permutations(range(len(graph.ops))):
        place = {number: at for at, number in enumerate(order)}
        if all(place[other] < place[number] for number in order for other in graph.before[number]):
            best = min(best, layer_time(graph, order, num_layers))
    return best


@settings(max_examples=25, deadline=None)
@given(graphs())
def test_small_graphs_are_ordered_as_by_exhaustive_search(graph):
    best = brute_force(graph, 1)
    order, value = branch_and_bound(graph)
    assert value == pytest.approx(best)
    assert layer_time(graph, order) == pytest.approx(best)
    assert find_order(graph, num_layers=1)[1] == pytest.approx(best)
    assert find_order(graph, num_layers=6)[1] == pytest.approx(brute_force(graph, 6))


def drawn_graph(seed):
    """Four to six nano-operations of three or four operations."""
    draw = np.random.default_rng(seed)
    count = int(draw.integers(3, 5))
    made = [
        Operation(
            str(number),
            RESOURCES[draw.integers(3)],
            0,
            4,
            tuple(str(other) for other in range(number) if draw.random() < 0.6),
            seconds(int(draw.integers(1, 9))),
        )
        for number in range(count)
    ]
    cuts = {str(number): [2] for number in draw.choice(count, 2, replace=False)}
    return LayerGraph(tuple(made), 4, ("0",), (str(count - 1),)).split(cuts)


@pytest.mark.parametrize("seed", range(8))
def test_mixed_integer_programming_agrees(seed):
    pytest.importorskip("scipy.optimize")
    graph = drawn_graph(seed)
    order, value = milp(graph)
    assert value == pytest.approx(brute_force(graph, 1))
    assert layer_time(graph, order) == value
    order, period = milp(graph, is_steady=True)
    ours = min(layer_time(graph, other, 26) for other in linear_orders(graph))
    assert period == pytest.approx(ours, rel=0.03)  # what is simulated has a beginning
    assert layer_time(graph, order, 26) == pytest.approx(ours, rel=0.03)


def test_larger_graphs_reach_what_programming_proves():
    pytest.importorskip("scipy.optimize")
    from anabranch.serving.planning.graph import layer_graph

    layer = layer_graph(LLAMA, A100, Workload(), "reduce")
    graph = layer.split({name: [1024] for name in ("kqv", "decode_attention", "o", "ar_o", "up_gate")})
    _, proven = milp(graph)
    assert branch_and_bound(graph)[1] == pytest.approx(proven, rel=1e-6)
    order = list_order(graph)
    _, local = improve(graph, order, lambda other: layer_time(graph, other), evaluations=1500)
    assert proven * (1 - 1e-6) <= local <= 1.02 * proven


def test_branch_and_bound_gives_up_in_time():
    from anabranch.serving.planning.graph import even_cuts, layer_graph

    layer = layer_graph(LLAMA, A100, Workload(), "gather")
    graph = layer.split({operation.name: even_cuts(2048, 8) for operation in layer.operations})
    with pytest.raises(CapacityError, match="more than 50 nodes"):
        branch_and_bound(graph, max_nodes=50)


# Stage II and the whole


@pytest.mark.parametrize("levels", [(0.2, 0.5, 0.8, 1.0), (0.3, 0.7)])
@pytest.mark.parametrize("ends", [("memory", 3.0), ("network", 5.0), ("compute", 2.0)])
def test_shares_of_small_graphs_are_those_of_exhaustive_search(ends, levels):
    graph = two(second=ends)
    state = _Search(PAPER_TABLE, levels, 10**9, 1e9)
    order, shares, period = find_shares(graph, list_order(graph), state)
    best = min(
        simulate(Schedule(graph, other, given), PAPER_TABLE, num_layers=6).period_s
        for other in linear_orders(graph)
        for given in itertools.product(levels, repeat=len(graph.ops))
    )
    assert period == pytest.approx(best)
    assert simulate(Schedule(graph, order, shares), PAPER_TABLE, num_layers=6).period_s == pytest.approx(period)


@pytest.fixture(scope="module")
def pipelines():
    """The simulated ablation on the paper's devices, each search a few seconds at most."""
    few = {"evaluations": 1500, "budget_s": 1e6}
    return {
        "full": search(LLAMA, A100, **few),
        "no network": search(LLAMA, A100, overlap=("memory",), **few),
        "no memory": search(LLAMA, A100, overlap=("network",), **few),
    }


def test_ablation_has_the_signs_of_the_paper(pipelines):
    full = pipelines["full"]
    assert full.sequential_s / full.split_s < 0.98, "splitting alone costs"
    assert 1.10 <= full.speedup <= 1.25
    assert pipelines["no network"].speedup < full.speedup - 0.03
    assert pipelines["no memory"].speedup < full.speedup - 0.03
    for pipeline in pipelines.values():
        assert pipeline.speedup >= 1
        assert violations(pipeline.timeline()) == []
        assert pipeline.period_s >= max(pipeline.schedule.graph.bound_s, 0)


def test_one_device_still_gains():
    found = search(find_shape("llama-3-8b"), find_hardware("a100"), Workload(dense_batch=1024), evaluations=1000)
    assert found.speedup > 1.03
    assert "network" not in {op.resource for op in found.schedule.graph.ops}


def test_the_same_search_finds_the_same():
    first, again = (
        search(
            find_shape("llama-3-8b"), find_hardware("a100"), Workload(dense_batch=512), evaluations=300, budget_s=1e6
        ).to_dict()
        for _ in range(2)
    )
    assert first == again


def test_ranges_are_whole_tiles(pipelines):
    for cuts in pipelines["full"].schedule.graph.cuts.values():
        assert all(cut % 128 == 0 for cut in cuts)


def test_small_batches_are_not_split_and_memory_bound_ones_are_warned_of(caplog):
    shape, device = find_shape("llama-3-8b"), find_hardware("a100")
    assert search(shape, device, Workload(dense_batch=200)).schedule.graph.cuts == {}
    found = search(shape, device, Workload(dense_batch=256), evaluations=50)
    assert "T_R is" in caplog.text
    assert found.speedup >= 1


def test_a_search_without_time_gives_what_it_has():
    found = search(LLAMA, A100, budget_s=0.0)
    assert not found.is_complete
    assert found.speedup >= 1
    assert violations(found.timeline()) == []


def test_pipelines_are_kept_by_what_they_are_for(pipelines, tmp_path):
    path = tmp_path / "pipeline.json"
    assert load_pipeline(path, LLAMA, A100, Workload()) is None
    full = pipelines["full"]
    full.save(path)
    again = load_pipeline(path, LLAMA, A100, Workload())
    assert again.to_dict() == full.to_dict()
    assert again.timeline().makespan_s == pytest.approx(full.timeline().makespan_s)
    assert load_pipeline(path, LLAMA, A100, Workload(prompt=100)) is None
    assert load_pipeline(path, LLAMA, A100.replace(num_devices=4), Workload()) is None
    assert load_pipeline(path, find_shape("llama-3-70b"), A100, Workload()) is None
    path.write_text(path.read_text().replace('"kqv.0"', '"kqv.9"'))
    with pytest.raises(DataError, match="remove it to search again"):
        load_pipeline(path, LLAMA, A100, Workload())
    path.write_text("[")
    with pytest.raises(DataError, match="no pipeline"):
        load_pipeline(path, LLAMA, A100, Workload())
