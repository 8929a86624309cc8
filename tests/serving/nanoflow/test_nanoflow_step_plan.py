"""A searched pipeline for steps of other sizes: its cuts, its order and its shares, and the cores that shares become."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.serving.nanoflow.execute import Threads
from anabranch.serving.nanoflow.step_plan import OPERATIONS, StepPlan
from anabranch.serving.planning.cost import Workload
from anabranch.serving.planning.graph import LayerGraph, Operation
from anabranch.serving.planning.hardware import find_hardware
from anabranch.serving.planning.search import Pipeline, search
from anabranch.serving.planning.shape import find_shape
from anabranch.serving.planning.simulate import Schedule

AFTER = {
    "kqv": (),
    "decode_attention": ("kqv",),
    "prefill_attention": ("kqv",),
    "o": ("decode_attention", "prefill_attention"),
    "up_gate": ("o",),
    "down": ("up_gate",),
}


def layer(total, decodes, resources=OPERATIONS):
    """A step's operations; attention of decodes stands before that of prompts."""
    spans = {"decode_attention": (0, decodes), "prefill_attention": (decodes, total)}
    made = []
    for name, after in AFTER.items():
        start, end = spans.get(name, (0, total))
        if end > start:
            there = tuple(other for other in after if any(each.name == other for each in made))
            made.append(Operation(name, resources[name], start, end, there, float))
    return LayerGraph(tuple(made), total, ("kqv",), ("down",))


def pipeline_of(graph, order, shares):
    return Pipeline({}, find_hardware("a100"), "gather", Schedule(graph, order, shares), 1.0, 1.0, 1.0)


def test_a_step_of_the_searched_size_runs_exactly_what_was_searched():
    graph = layer(8, 4).split({"kqv": [2], "decode_attention": [1, 3], "o": [4], "up_gate": [4], "down": [6]})
    names = [op.name for op in graph.ops]
    first = "kqv.0 decode_attention.0 kqv.1 prefill_attention.0 decode_attention.1 decode_attention.2"
    then = "o.1 o.0 up_gate.1 up_gate.0 down.0 down.1"
    order = tuple(names.index(name) for name in f"{first} {then}".split())
    shares = tuple((number % 10 + 1) / 10 for number in range(len(names)))
    plan = StepPlan.of(pipeline_of(graph, order, shares))
    assert plan.cuts["decode_attention"] == (0.25, 0.75)
    assert plan.cuts["down"] == (0.75,)
    assert plan.cuts["prefill_attention"] == ()
    found = plan.schedule(graph)
    assert found.order == order
    assert found.shares == shares


@settings(max_examples=40, deadline=None)
@given(total=st.integers(2, 300), share=st.floats(0, 1), seed=st.integers(0, 3))
def test_every_step_has_a_schedule_that_keeps_its_dependences(total, share, seed):
    made = searched(seed)
    plan = StepPlan.of(made)
    decodes = round(total * share)
    spans = {each.name: (each.start, each.end) for each in layer(total, decodes).operations}
    cuts = {
        name: [round(start + (end - start) * at) for at in plan.cuts.get(name, ())]
        for name, (start, end) in spans.items()
    }
    graph = layer(total, decodes, plan.resources).split(cuts)
    found = plan.schedule(graph)  # Schedule checks order and dependences
    assert set(found.shares) <= set(made.schedule.shares) | {1.0}


KNOWN = {}


def searched(seed):
    if seed not in KNOWN:
        workload = Workload(dense_batch=512 + 256 * seed, prompt=64 + 300 * seed)
        devices = 1 if seed % 2 else 8
        KNOWN[seed] = search(find_shape("llama-3-8b"), find_hardware("a100", devices), workload, evaluations=60)
    return KNOWN[seed]


def test_collectives_are_left_out():
    made = searched(0)
    assert any(op.resource == "network" for op in made.schedule.graph.ops)
    assert set(StepPlan.of(made).parts) <= set(OPERATIONS)


def test_halves_are_list_scheduled_and_share_nothing_out():
    graph = layer(8, 4).split({"kqv": [4]})
    assert StepPlan.of_cuts().cuts["kqv"] == (0.5,)
    assert StepPlan.of_cuts().schedule(graph).shares is None


@pytest.mark.parametrize(
    ("share", "beside", "alone"),
    [(0.1, 3, 4), (0.5, 2, 4), (1.0, 1, 4)],
)
def test_shares_are_cores_and_a_product_takes_what_is_left(share, beside, alone):
    """a (memory) and b (compute) run side by side, c (compute) alone; four cores."""
    made = (
        Operation("a", "memory", 0, 1, (), float),
        Operation("b", "compute", 0, 1, (), float),
        Operation("c", "compute", 0, 1, ("a", "b"), float),
    )
    graph = LayerGraph(made, 1, ("a", "b"), ("c",)).split()
    schedule = Schedule(graph, (0, 1, 2), (share, 0.1, 0.1))
    both, cores = threading.Barrier(2, timeout=60), {}

    def work(layer, op):
        cores[op.op] = torch.get_num_threads()
        if op.op != "c":
            both.wait()

    before = torch.get_num_threads()
    Threads({"compute": 3, "memory": 1}).run(schedule, work, 1)
    assert cores == {"a": max(round(4 * share), 1), "b": beside, "c": alone}
    assert torch.get_num_threads() == before


def test_the_search_is_found_at_its_old_place_for_one_version():
    import anabranch.serving.nanoflow as old
    from anabranch.serving import planning

    for name in planning.__all__:
        with pytest.warns(DeprecationWarning, match=f"{name} of anabranch.serving.nanoflow is in"):
            assert getattr(old, name) is getattr(planning, name)
