"""Replay by hand: which recorded decision each item gets, what is not found, and what learns."""

import itertools
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anabranch.errors import AnabranchError, ConfigError, DataError
from anabranch.nn.context import recomputed
from anabranch.routing import (
    UNUSED,
    Router,
    RoutingContext,
    RoutingTrace,
    SwitchLoss,
    TopK,
    TraceBuilder,
    TraceLayer,
    record_routing,
    replay_routing,
)
from anabranch.routing.destinations import Destinations
from anabranch.routing.replay import _Recorded
from anabranch.routing.trace_schema import METADATA_KEY

D, E, K = 6, 5, 2


class Tower(nn.Module):
    """Routers one after another, over the same items; by ``order`` some are skipped or visited again."""

    def __init__(self, num_layers=2, seed=0, balance=(), top_k=K, **router):
        super().__init__()
        config = Router.Config(select=TopK.Config(top_k=top_k), balance=balance)
        generator = torch.Generator().manual_seed(seed)
        self.routers = nn.ModuleList(
            Router(config, D, E, layer=n, generator=generator, **router) for n in range(num_layers)
        )

    def forward(self, x_ND, context, order=None, run=None):
        weights = []
        for number in range(len(self.routers)) if order is None else order:

            def block(x_ND, context, number=number):
                routing = self.routers[number](x_ND, context)
                weights.append((routing.index_NK, routing.weight_NK))
                return x_ND * (1 + routing.weight_NK.sum(-1, keepdim=True))

            x_ND = block(x_ND, context) if run is None else run(block, x_ND, context)
        return x_ND


def items(num=6, seed=0):
    return torch.randn(num, D, generator=torch.Generator().manual_seed(seed))


def hand_made(index_NK, weight_NK, item_N, position_N=0):
    """A trace of the first router of a tower."""
    builder = TraceBuilder()
    layer = TraceLayer(layer=0, name="routers.0", num_destinations=E, top_k=K)
    builder.add(layer, index_NK, weight_NK, item_N=item_N, position_N=position_N)
    return builder.trace()


def test_decisions_are_found_by_item_and_position():
    model = Tower(num_layers=1)
    index_NK = [[0, 1], [2, UNUSED], [3, 4], [UNUSED, UNUSED]]
    weight_NK = [[0.5, 0.25], [1.0, 0.0], [2.0, 3.0], [0.0, 0.0]]
    trace = hand_made(index_NK, weight_NK, item_N=[2**60, 7, 7, -3], position_N=[0, 1, 0, 5])
    state = {"item_N": torch.tensor([7, -3, 9, 2**60, 7]), "position_N": torch.tensor([0, 5, 9, 0, 1])}
    mask_N = torch.tensor([True, True, False, True, True])
    with replay_routing(model, trace):
        routing = model.routers[0](items(5), RoutingContext(state=state, item_mask_N=mask_N))
    assert routing.index_NK.tolist() == [[3, 4], [UNUSED] * 2, [UNUSED] * 2, [0, 1], [2, UNUSED]]
    assert routing.weight_NK.tolist() == [[2.0, 3.0], [0.0] * 2, [0.0] * 2, [0.5, 0.25], [1.0, 0.0]]


def test_what_was_recorded_twice_is_taken_in_that_order_and_then_again():
    model = Tower(num_layers=1)
    trace = hand_made([[0, 1], [1, 2], [2, 3]], [[1.0, 1.0]] * 3, item_N=[4, 5, 4])
    context = lambda: RoutingContext(state={"item_N": torch.tensor([5, 4])})  # noqa: E731
    with replay_routing(model, trace):
        found = [model.routers[0](items(2), context()).index_NK.tolist() for _ in range(3)]
        both = model.routers[0](items(2), RoutingContext(state={"item_N": torch.tensor([4, 4])})).index_NK.tolist()
    assert found == [[[1, 2], [0, 1]], [[1, 2], [2, 3]], [[1, 2], [0, 1]]]
    assert both == [[2, 3], [0, 1]]


@given(st.data())
def test_any_order_of_items_is_found_as_a_dictionary_finds_it(data):
    keys = data.draw(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 3)), min_size=1, max_size=12))
    item_N, position_N = (np.array(values) for values in zip(*keys, strict=True))
    num = len(keys)
    trace = hand_made([[n % E, UNUSED] for n in range(num)], [[n / 8, 0.0] for n in range(num)], item_N, position_N)
    recorded, lists, taken, passes = _Recorded(trace, 0), {}, {}, itertools.count()
    for row, key in enumerate(keys):
        lists.setdefault(key, []).append(row)
    for _ in range(3):
        asked = data.draw(st.lists(st.sampled_from(sorted(lists)), min_size=1, max_size=8))
        expected = []
        for key in asked:
            turn = taken[key] = taken.get(key, -1) + 1
            expected.append(lists[key][turn % len(lists[key])])
        row_N = recorded.rows(*(np.array(values) for values in zip(*asked, strict=True)), next(passes))
        # Equal neighbours of one item, position and rank are still decisions of their own.
        assert recorded.decisions.weight_NK[row_N, 0].tolist() == [row / 8 for row in expected]


@pytest.mark.parametrize("order", [None, (0, 0, 1), (1,), (0, 1, 0, 1)])
def test_the_same_passes_are_the_same_to_the_bit(order):
    model, other = Tower(), Tower(seed=1)
    contexts = lambda: (RoutingContext(sequence_length=3), RoutingContext(), RoutingContext(sequence_length=2))  # noqa: E731

    def run(model):
        return [model(items(seed=seed), context, order) for seed, context in enumerate(contexts())]

    with record_routing(model) as recorder:
        expected = run(model)
    for same in (model, other):  # routers with other weights: they do not run
        with replay_routing(same, recorder.trace()):
            assert all(map(torch.equal, run(same), expected))
    assert not torch.equal(run(other)[0], expected[0])


@settings(max_examples=25)
@given(
    recorded=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    replayed=st.lists(st.integers(1, 3), min_size=1, max_size=3),
)
def test_a_pass_visits_a_layer_as_often_as_it_was_recorded_to(recorded, replayed):
    """Passes of one, two or three visits: replayed they are these passes, or the first other one is told of."""
    model = Tower(num_layers=1)

    def run(visits):
        return [model(items(seed=seed), RoutingContext(), (0,) * number) for seed, number in enumerate(visits)]

    with record_routing(model) as recorder:
        expected = run(recorded)
    trace = recorder.trace()
    assert trace.layers[0].visits == max(recorded)
    replayed = replayed[: len(recorded)]
    if replayed == recorded[: len(replayed)]:
        with replay_routing(model, trace):
            assert all(map(torch.equal, run(replayed), expected))
        return
    more = next(theirs > ours for ours, theirs in zip(recorded, replayed, strict=False) if ours != theirs)
    with pytest.raises(DataError, match="visit") as raised, replay_routing(model, trace):
        run(replayed)
    if more:
        assert "more often than it was recorded to" in str(raised.value)


def test_visits_are_those_of_each_item():
    """Two sequences of one pass, of which one visits the layer again; and a trace file tells it."""
    model = Tower(num_layers=1)

    def run(*calls):
        context = RoutingContext()
        for names in calls:
            context.state["item_N"] = torch.tensor(names)
            model.routers[0](items(len(names)), context)

    with record_routing(model) as recorder:
        run([4, 5], [4])
    with replay_routing(model, recorder.trace()):
        run([4, 5], [4])
        run([5], [4], [4])
    for calls, seen in (
        (([5], [5]), "2 times, not 1"),
        (([4], [4], [4]), "3 times, not 2"),
        (([4, 5],), "1 of 2 times"),
    ):
        with pytest.raises(DataError, match=seen), replay_routing(model, recorder.trace()):
            run(*calls)
    # The next pass does not go on where this one stopped.
    done = []

    def passes():
        for calls in (([4],), ([4], [4])):
            run(*calls)
            done.append(calls)

    with pytest.raises(DataError, match="1 of 2 times"), replay_routing(model, recorder.trace()):
        passes()
    assert done == [([4],)]


class FailureError(Exception):
    pass


@pytest.mark.parametrize("before", [0, 1, 2, 3])
@pytest.mark.parametrize("alone", [False, True])
def test_a_pass_that_fails_midway_and_is_run_again_takes_its_decisions_again(before, alone):
    """As an engine runs a step: once for all, and where that fails once more, or for each request alone; two steps of two visits."""
    model = Tower(num_layers=2)
    names, done = [4, 5], []

    def step(names, fails_after=None):
        done.clear()
        context = RoutingContext(state={"item_N": torch.tensor(names), "when_done": done})
        x_ND = items()[names]
        for count, number in enumerate((0, 1, 0, 1)):
            if count == fails_after:
                raise FailureError
            x_ND = model(x_ND, context, (number,))
        for each in done:
            each()
        done.clear()
        return x_ND

    with record_routing(model) as recorder:
        expected = [step(names), step(names)]
    trace = recorder.trace()
    for layer in (0, 1):
        # What it decides by itself would be something else.
        torch.nn.init.normal_(model.routers[layer].score.weight)
    with replay_routing(model, trace):
        for number in range(2):
            with pytest.raises(FailureError):
                step(names, before)
            if alone:
                with pytest.raises(FailureError):
                    step([4], before)
                found = torch.cat([step([4]), step([5])])
            else:
                found = step(names)
            assert torch.equal(found, expected[number])
        # One more that is not run again leaves nothing behind.
        with pytest.raises(FailureError):
            step(names, before)


def test_a_trace_from_before_visits_were_counted_is_replayed_in_order(tmp_path):
    model = Tower(num_layers=1)
    with record_routing(model) as recorder:
        expected = model(items(), RoutingContext(), (0, 0))
    recorder.trace().write(tmp_path / "trace.parquet")
    known = RoutingTrace.read(tmp_path / "trace.parquet")
    assert known.layers[0].visits == 2
    old = RoutingTrace(known.table, [replace(known.layers[0], visits=1)])
    assert b"visits" not in old.table.schema.metadata[METADATA_KEY]
    with replay_routing(model, old):
        assert torch.equal(model(items(), RoutingContext(), (0, 0)), expected)


@pytest.mark.parametrize("ends", ["before the backward pass", "after it"])
def test_a_backward_pass_finds_what_the_forward_pass_found(ends):
    """Recomputed, two passes whose decisions differ give the gradients that they give where nothing is recomputed."""
    model, other = Tower(), Tower(seed=1)
    order = (0, 1, 1)
    for tower in (model, other):
        tower.routing_order = [tower.routers[number] for number in order]
    with record_routing(model) as recorder:
        for seed in range(2):
            model(items(seed=seed), RoutingContext(), order)

    def gradients(run):
        x_ND, y_ND = (items(seed=seed).requires_grad_() for seed in range(2))
        with ExitStack() as block:
            block.enter_context(replay_routing(other, recorder.trace()))
            first, second = (other(part_ND, RoutingContext(), order, run) for part_ND in (x_ND, y_ND))
            if ends == "before the backward pass":
                block.close()
            return torch.autograd.grad((first * second).sum(), (x_ND, y_ND))

    assert all(map(torch.equal, gradients(recomputed), gradients(None)))
    assert not torch.equal(*gradients(None))


def test_a_repetition_that_cannot_be_told_from_a_visit_is_refused():
    model = Tower(num_layers=1)
    with record_routing(model) as recorder:
        model(items(), RoutingContext())

    def plainly(block, x_ND, context):
        return torch.utils.checkpoint.checkpoint(block, x_ND, context, use_reentrant=False)

    with replay_routing(model, recorder.trace()):
        y_ND = model(items().requires_grad_(), RoutingContext(), None, plainly)
        with pytest.raises(AnabranchError, match=r"recompute in context.fork"):
            y_ND.sum().backward()


def test_destinations_alone_with_the_routers_own_weights_and_gradient():
    model, other = Tower(num_layers=1), Tower(num_layers=1, seed=1)
    with record_routing(model) as recorder:
        model(items(), RoutingContext())
    with replay_routing(other, recorder.trace(), weights="own"):
        routing = other.routers[0](items(), RoutingContext())
    assert np.array_equal(routing.index_NK.numpy(), recorder.trace().decisions(0).index_NK)
    score_NE = other.routers[0](items(), RoutingContext()).score_NE
    assert torch.equal(routing.weight_NK, score_NE.gather(1, routing.index_NK))
    routing.weight_NK.sum().backward()
    assert other.routers[0].score.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("weights", ["recorded", "own"])
def test_balancers_see_replayed_decisions_only_where_asked(weights):
    model, other = (Tower(num_layers=1, seed=seed, balance=(SwitchLoss.Config(),)) for seed in range(2))
    with record_routing(model) as recorder:
        model(items(), RoutingContext())
    quiet, asked = RoutingContext(training=True), RoutingContext(training=True)
    with replay_routing(other, recorder.trace(), weights=weights):
        other(items(), quiet)
    assert not quiet.losses
    with replay_routing(other, recorder.trace(), weights=weights, learn=True):
        y_ND = other(items(), asked)
    assert asked.losses["load_balancing"]
    if weights == "recorded":
        with replay_routing(other, recorder.trace()):
            assert torch.equal(y_ND, other(items(), RoutingContext()))


def test_half_precision_is_replayed_and_double_only_in_its_destinations():
    for dtype in (torch.bfloat16, torch.float32):
        model = Tower().to(dtype)
        with record_routing(model) as recorder:
            expected = model(items().to(dtype), RoutingContext())
        with replay_routing(model, recorder.trace()):
            assert torch.equal(model(items().to(dtype), RoutingContext()), expected)
    single, model = recorder.trace(), Tower().double()
    with record_routing(model) as recorder:
        expected = model(items().double(), RoutingContext())
    for trace, recorded in ((single, "float32"), (recorder.trace(), "float64")):
        with (
            replay_routing(model, trace),
            pytest.raises(DataError, match=f"recorded of {recorded} .* has weights of float64"),
        ):
            model(items().double(), RoutingContext())
    other = Tower()
    with (
        replay_routing(other, recorder.trace()),
        pytest.raises(DataError, match=r"of float64 .* has weights of float32"),
    ):
        other(items(), RoutingContext())
    with replay_routing(model.double(), recorder.trace(), weights="own"):
        assert torch.equal(model(items().double(), RoutingContext()), expected)


def test_a_wrapper_in_front_of_the_names_is_no_other_model():
    model = Tower()
    with record_routing(model) as recorder:
        expected = model(items(), RoutingContext())
    with replay_routing(nn.ModuleDict({"module": model}), recorder.trace()):
        assert torch.equal(model(items(), RoutingContext()), expected)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    with replay_routing(compiled, recorder.trace()):
        assert torch.equal(compiled(items(), RoutingContext()), expected)


def test_messages():
    model = Tower(destinations=Destinations("group", own_start=1))
    with record_routing(model) as recorder:
        model(items(), RoutingContext(sequence_length=3))
    trace = recorder.trace()
    for other, message in (
        (Tower(num_layers=1), "the trace has a layer 1, the model routes in 0"),
        (Tower(top_k=1), r"top_k of layer 0 \(routers.0\) is 1 in the model, but 2 in the trace"),
        (
            Tower(destinations=Destinations("other", own_start=1)),
            r"pool of layer 0 \(routers.0\) is other in the model, but group in the trace",
        ),
        (Tower(destinations=Destinations("group")), r"own_start of layer 0 \(routers.0\) is 0 in the model, but 1"),
    ):
        with pytest.raises(DataError, match=message), replay_routing(other, trace):
            pass
    other = Tower(num_layers=2)
    other.routers[0].num_destinations = 4
    with (
        pytest.raises(DataError, match=r"num_destinations of layer 0 .* is 4 in the model, but 5"),
        replay_routing(other, trace),
    ):
        pass
    renamed = nn.Module()
    renamed.gates = model.routers
    with (
        pytest.raises(DataError, match=r"layer 0 is gates.0 in the model, but routers.0 in the trace"),
        replay_routing(renamed, trace),
    ):
        pass
    with (
        pytest.raises(DataError, match="the trace has no layer"),
        replay_routing(model, RoutingTrace(TraceBuilder().take(), [])),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="weights is 'mine'; use recorded or own"),
        replay_routing(model, trace, weights="mine"),
    ):
        pass
    with pytest.raises(ConfigError, match="Linear has no Router"), replay_routing(nn.Linear(2, 2), trace):
        pass
    with replay_routing(model, trace):
        model(items(), RoutingContext(sequence_length=3))
        with pytest.raises(
            DataError,
            match=r"no decision of item 2 at position 0 in layer 0 \(routers.0\); of this pass's 6 items it lacks 6",
        ):
            model(items(), RoutingContext(sequence_length=3))
    skipped = Tower()
    with record_routing(skipped) as recorder:
        skipped(items(), RoutingContext(), (0,))
    with (
        replay_routing(skipped, recorder.trace()),
        pytest.raises(DataError, match=r"the trace does not have layer 1 \(.*\), in which"),
    ):
        skipped(items(), RoutingContext())
