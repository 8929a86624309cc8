"""Items of a pass: what a layer that gets some of them is told, and what it carries on counts for them and for nobody else."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from anabranch.nn.context import ForwardContext
from anabranch.nn.items import Items, no_rows, of_items, on_items
from anabranch.nn.visits import on_rows
from anabranch.routing import OfPass, RoutingContext
from anabranch.routing.sequences import StreamSequence


def context_of(batch: int, length: int, **options: Any) -> ForwardContext:
    """A pass whose numbers all tell which sequence and position they are of."""
    place_BL = torch.arange(batch * length).view(batch, length)
    options = {
        "position_BL": place_BL % max(length, 1) + 3,
        "rotary": (place_BL.float().view(batch, 1, length, 1), -place_BL.float().view(batch, 1, length, 1)),
        "token_BL": 100 + place_BL,
        "sequence_length": length,
        **options,
    }
    return ForwardContext(**options)


FORMS = st.sampled_from(["flat", "by sequence"])


@st.composite
def passes(draw):
    """(B, L, sequences that are run, which items of them, the form of what is carried, D)."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rows = draw(st.lists(st.integers(0, batch - 1), unique=True, min_size=1))
    items = draw(st.lists(st.integers(0, batch * length - 1), unique=True, min_size=1))
    return batch, length, rows, items, draw(FORMS), draw(st.integers(1, 4))


def carried(form: str, batch: int, length: int, width: int) -> torch.Tensor:
    shape = (batch * length, width) if form == "flat" else (batch, length, width)
    return torch.arange(batch * length * width, dtype=torch.float64).view(shape)


@given(passes())
def test_what_is_carried_keeps_its_shape_and_changes_for_its_items_alone(case):
    batch, length, rows, items, form, width = case
    before = carried(form, batch, length, width)

    def run(x, part):
        part.carry["changed"] = part.carry["changed"] * 2 + 1
        return x

    def check(context, changed_N):
        assert context.carry["kept"] is before
        expected = before.clone().view(-1, width)
        expected[changed_N] = expected[changed_N] * 2 + 1
        assert torch.equal(context.carry["changed"], expected.view_as(before))

    context = context_of(batch, length, carry={"kept": before, "changed": before})
    on_items(run, torch.zeros(len(items), 2), context, torch.tensor(items), batch * length)
    check(context, items)
    context = context_of(batch, length, carry={"kept": before, "changed": before})
    on_rows(run, torch.zeros(batch, length, 2), context, rows)
    check(context, [row * length + place for row in rows for place in range(length)])


@given(passes())
def test_what_was_not_carried_before_is_zero_for_the_other_items(case):
    batch, length, rows, _, form, width = case

    def run(x_RLD, part):
        part.carry["new"] = carried(form, len(rows), length, width) + 1
        return x_RLD

    context = context_of(batch, length)
    on_rows(run, torch.zeros(batch, length, 2), context, rows)
    expected = torch.zeros(batch, length, width, dtype=torch.float64)
    expected[rows] = (carried(form, len(rows), length, width) + 1).view(len(rows), length, width)
    assert torch.equal(context.carry["new"].view_as(expected), expected)
    if form == "by sequence" or length > 1:
        assert context.carry["new"].shape == carried(form, batch, length, width).shape


def test_parts_that_are_cut_out_of_parts_come_back():
    before = torch.arange(24.0).view(4, 3, 2)
    context = context_of(4, 3, carry={"sum": before})

    def inner(x_RD, part):
        assert part.rows == [3, 1]
        part.carry["sum"] = part.carry["sum"] + 100
        return x_RD

    def outer(x_RLD, part):
        # Of the sequences 1 and 3, the last position of 3 and the first of 1.
        on_items(inner, torch.zeros(2, 5), part, torch.tensor([5, 0]), 6)
        return x_RLD

    on_rows(outer, torch.zeros(4, 3, 5), context, [1, 3])
    expected = before.clone()
    expected[3, 2] += 100
    expected[1, 0] += 100
    assert torch.equal(context.carry["sum"], expected)


@pytest.mark.parametrize("experts", [2, 4, 6])
def test_what_is_of_no_single_item_is_carried_as_it_is(experts):
    """Also a matrix of as many experts as there are items, in the pass (6) or in the part (2)."""
    words, count, matrix = ["a"], torch.tensor(3), OfPass(torch.eye(experts))
    given = {"words": words, "count": count, "matrix": matrix}
    for call in (
        lambda run, context: on_items(run, torch.zeros(2, 1), context, torch.tensor([1, 2]), 6),
        lambda run, context: on_rows(run, torch.zeros(2, 3, 1), context, [1]),
    ):
        context = context_of(2, 3, carry=dict(given), state=dict(given))

        def run(x_RD, part):
            assert part.carry["words"] is words
            assert part.carry["matrix"] is part.state["matrix"] is matrix
            part.carry["count"] = part.carry["count"] + 1
            part.carry["matrix"] = OfPass(2 * part.carry["matrix"].value)
            return x_RD

        call(run, context)
        assert context.carry["words"] is words
        assert context.carry["count"] == 4
        assert torch.equal(context.carry["matrix"].value, 2 * torch.eye(experts))


def test_a_tensor_that_is_of_no_item_and_does_not_say_so_warns():
    context = context_of(2, 3, carry={"matrix": torch.eye(4)})
    with pytest.warns(
        DeprecationWarning, match=r"context.carry\['matrix'\] has shape \[4, 4\], so it is of none of the 6 items"
    ):
        of_items(context, torch.tensor([1]), 6)
    context = context_of(2, 3, state={"matrix": torch.eye(4)})
    with pytest.warns(
        DeprecationWarning, match=r"context.state\['matrix'\].*wrap what is of the whole pass in anabranch.routing"
    ):
        on_rows(lambda x_RLD, part: x_RLD, torch.zeros(2, 3, 1), context, [1])

    def run(x_RD, part):
        part.carry["made"] = torch.eye(4)
        return x_RD

    context = context_of(2, 3)
    with pytest.warns(
        DeprecationWarning, match=r"context.carry\['made'\] has shape \[4, 4\], so it is of none of the 2 items"
    ):
        on_items(run, torch.zeros(2, 1), context, torch.tensor([1, 2]), 6)
    assert torch.equal(context.carry["made"], torch.eye(4))


@pytest.mark.parametrize(("before", "value"), [("float32", "bfloat16"), ("int64", "float32"), ("bfloat16", "float32")])
def test_nobody_loses_digits_where_precisions_meet(before, value):
    before, value = getattr(torch, before), getattr(torch, value)
    items = Items(torch.tensor([1]), (3, 1), (1, 1))
    old, new = torch.tensor([257, 257, 257]).to(before), torch.tensor([0.1]).to(value)
    whole = items.put_back(old, new)
    assert whole.dtype == torch.float32
    assert whole.tolist() == [old[0].item(), new.item(), old[2].item()]


def test_what_has_another_width_than_before_begins_with_zeros():
    items = Items(torch.tensor([2]), (3, 1), (1, 1))
    assert items.put_back(torch.ones(3, 2), torch.full((1, 4), 5.0)).tolist() == [[0.0] * 4, [0.0] * 4, [5.0] * 4]


def test_gradients_go_to_the_items_and_past_them():
    before = torch.ones(3, 1, requires_grad=True)
    context = context_of(1, 3, carry={"state": before})

    def run(x_RD, part):
        part.carry["state"] = part.carry["state"] * 7
        return x_RD

    on_items(run, torch.zeros(1, 1), context, torch.tensor([1]), 3)
    context.carry["state"].sum().backward()
    assert before.grad is not None
    assert before.grad[:, 0].tolist() == [1, 7, 1]


def test_what_is_emitted_for_some_items_counts():
    context = context_of(2, 2)
    sink: Any = object()

    def run(x_RD, part):
        part.emit_loss("loss", torch.tensor(2.0))
        part.emit_metric("metric", torch.tensor(3.0))
        part.emit_load(sink, torch.ones(2))
        return x_RD

    on_items(run, torch.zeros(1, 1), context, torch.tensor([1]), 4)
    assert context.mean_losses() == {"loss": 2}
    assert context.mean_metrics() == {"metric": 3}
    assert [load[0] for load in context.loads] == [sink]


def test_without_a_context_there_is_none():
    assert on_items(lambda x_RD, context: x_RD if context is None else -x_RD, torch.ones(1, 1), None, None, 1) == 1


def test_items_are_sequences_of_length_one_with_places_of_their_own():
    """Two streams of two sequences of three positions, of which the pass is rows 5 and 8 of a cache, and one item of each stream."""
    cache: Any = object()
    context = context_of(
        4,
        3,
        num_streams=2,
        sequences=["a", "b"],
        rows=[5, 8, 15, 18],
        cache=cache,
        attention_mask=torch.ones(4, 1, 3, 3, dtype=torch.bool),
        item_mask_N=torch.arange(12) != 10,
        state={"said": torch.arange(12)},
    )
    part = of_items(context, torch.tensor([4, 6, 10]), 12)
    assert part.position_BL.tolist() == [[4], [3], [4]]
    assert part.token_BL.tolist() == [[104], [106], [110]]
    cosine, sine = part.rotary
    assert cosine.shape == sine.shape == (3, 1, 1, 1)
    assert cosine.flatten().tolist() == [4, 6, 10]
    assert sine.flatten().tolist() == [-4, -6, -10]
    assert part.rows == [8, 15, 18]
    assert part.sequences == [StreamSequence.of("b", 0), StreamSequence.of("a", 1), StreamSequence.of("b", 1)]
    assert part.all_sequences == ["a", "b"]
    assert part.item_mask_N.tolist() == [True, True, False]
    assert part.state["said"].tolist() == [4, 6, 10]
    assert (part.sequence_length, part.num_streams) == (1, 1)
    assert part.cache is None
    assert part.attention_mask is None
    assert not part.is_causal


def test_angles_that_all_sequences_share_are_those_of_the_position():
    context = context_of(2, 3, rotary=(torch.arange(3.0).view(1, 1, 3, 1),) * 2)
    assert of_items(context, torch.tensor([5, 0, 4]), 6).rotary[0].flatten().tolist() == [2, 0, 1]


def test_parts_of_parts_know_all_sequences_of_the_pass():
    context = context_of(2, 3, sequences=["a", "b"])
    part = of_items(context, torch.tensor([5, 0]), 6)
    again = of_items(part, torch.tensor([1]), 2)
    assert again.sequences == [StreamSequence.of(part.sequences[1], 0)]
    assert again.all_sequences == ["a", "b"]
    assert again.rows == [0]
    assert again.token_BL.tolist() == [[100]]


def test_a_context_of_no_language_model_is_cut_as_well():
    context = RoutingContext(sequence_length=2, carry={"bl": torch.arange(4.0).view(2, 2), "n": torch.arange(4.0)})
    part = of_items(context, torch.tensor([3, 1]), 4)
    assert part.carry["bl"].tolist() == [[3], [1]]
    assert part.carry["n"].tolist() == [3, 1]
    # Items that are no sequences have no positions.
    with pytest.warns(DeprecationWarning, match="of none of the 4 items"):
        part = of_items(RoutingContext(carry={"bl": torch.zeros(2, 2)}), torch.tensor([3, 1]), 4)
    assert part.carry["bl"].shape == (2, 2)


def test_whom_nobody_goes_to_has_a_gradient_of_zero():
    layer, x_0D = nn.Linear(2, 2), torch.zeros(0, 2)
    y_0D = no_rows([layer], x_0D)
    assert y_0D.shape == (0, 2)
    y_0D.sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()
