"""Nano-operations: ranges partition the batch, dependences are those of brute force over tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError, InputError
from anabranch.serving.planning.cost import Workload
from anabranch.serving.planning.graph import LayerGraph, Operation, even_cuts, layer_graph, split_range
from anabranch.serving.planning.hardware import find_hardware
from anabranch.serving.planning.shape import find_shape

LLAMA, A100 = find_shape("llama-2-70b"), find_hardware("a100", 8)
cut_lists = st.lists(st.integers(-2, 22), max_size=6)


@st.composite
def layers(draw):
    """A layer of up to five operations over parts of 20 tokens, and cuts for each."""
    count = draw(st.integers(1, 5))
    made = []
    for number in range(count):
        start = draw(st.integers(0, 19))
        end = draw(st.integers(start + 1, 20))
        after = draw(st.sets(st.integers(0, number - 1))) if number else set()
        names = tuple(str(other) for other in sorted(after))
        made.append(
            Operation(str(number), draw(st.sampled_from(["compute", "memory", "network"])), start, end, names, float)
        )
    cuts = {str(number): draw(cut_lists) for number in range(count)}
    return LayerGraph(tuple(made), 20, ("0",), (str(count - 1),)), cuts


@given(st.integers(0, 20), st.integers(0, 20), cut_lists)
def test_ranges_partition(start, size, cuts):
    ranges = split_range(start, start + size, cuts)
    assert [token for low, high in ranges for token in range(low, high)] == list(range(start, start + size))
    assert all(low < high for low, high in ranges)


@given(layers())
def test_dependences_are_those_of_tokens(drawn):
    layer, cuts = drawn
    graph = layer.split(cuts)
    after = {operation.name: operation.after for operation in layer.operations}
    for number, op in enumerate(graph.ops):
        own = set(range(op.start, op.end))
        earlier = {
            other
            for other, before in enumerate(graph.ops)
            if before.op in after[op.op] and own & set(range(before.start, before.end))
        }
        assert set(graph.before[number]) == earlier
        previous = {
            other
            for other, before in enumerate(graph.ops)
            if op.op in layer.first and before.op in layer.last and own & set(range(before.start, before.end))
        }
        assert set(graph.before_next[number]) == previous


@given(layers())
def test_splitting_again_by_a_graphs_cuts_gives_the_same(drawn):
    layer, cuts = drawn
    graph = layer.split(cuts)
    assert layer.split(graph.cuts).ops == graph.ops
    for operation in layer.operations:
        parts = [op for op in graph.ops if op.op == operation.name]
        assert [token for op in parts for token in range(op.start, op.end)] == list(
            range(operation.start, operation.end)
        )


@pytest.mark.parametrize(
    ("batch", "parts", "cuts"),
    [(2048, 2, [1024]), (2048, 3, [640, 1280]), (256, 4, [128]), (255, 2, []), (100, 2, []), (1024, 1, [])],
)
def test_cuts_are_whole_tiles(batch, parts, cuts):
    assert even_cuts(batch, parts) == cuts


def test_a_layer_of_several_devices_in_both_forms():
    gather = layer_graph(LLAMA, A100, Workload(), "gather")
    names = [operation.name for operation in gather.operations]
    assert names == [
        "kqv",
        "decode_attention",
        "prefill_attention",
        "ag_attention",
        "o",
        "ag_o",
        "up_gate",
        "down",
        "ar_down",
    ]
    reduce = layer_graph(LLAMA, A100, Workload(), "reduce")
    assert [operation.name for operation in reduce.operations][3:5] == ["o", "ar_o"]
    assert " ".join(operation.resource[0] for operation in reduce.operations) == "c m c c n c c n"
    with pytest.raises(ConfigError, match="form"):
        layer_graph(LLAMA, A100, Workload(), "ring")


def test_one_device_has_no_network_and_experts_have_a_gate():
    names = [
        operation.name
        for operation in layer_graph(find_shape("olmoe-1b-7b"), find_hardware("a100"), Workload()).operations
    ]
    assert names == ["kqv", "decode_attention", "prefill_attention", "o", "gate", "up_gate", "down"]


def test_layers_together_take_what_the_table_says():
    from anabranch.serving.planning.cost import estimate

    table = {op.name: op.duration_s for op in estimate(LLAMA, A100).operations}
    graph = layer_graph(LLAMA, A100, Workload(), "gather").split()
    ours = {op.op: 80 * op.duration_s for op in graph.ops}
    for name in ("kqv", "o", "up_gate", "down", "decode_attention", "prefill_attention"):
        assert ours[name] == pytest.approx(table[name])
    assert sum(ours[name] for name in ("ag_attention", "ag_o", "ar_down")) == pytest.approx(table["network"])


def test_pieces_read_the_weights_again():
    layer = layer_graph(LLAMA, A100, Workload(), "gather")
    whole, halves = layer.split(), layer.split({operation.name: [1024] for operation in layer.operations})
    assert halves.sequential_s > whole.sequential_s


def test_mistakes_are_told():
    first = Operation("a", "compute", 0, 2, (), float)
    with pytest.raises(InputError, match="waits for 'b'"):
        LayerGraph((Operation("a", "compute", 0, 2, ("b",), float),), 2, ("a",), ("a",))
    with pytest.raises(InputError, match="two operations"):
        LayerGraph((first, first), 2, ("a",), ("a",))
    with pytest.raises(InputError, match="no operation 'z'"):
        LayerGraph((first,), 2, ("a",), ("a",)).split({"z": [1]})
