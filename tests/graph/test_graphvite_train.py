"""The update of GraphVite: kernel and micro-batches against autograd, definitions and each other."""

import numpy as np
import pytest
import torch

from anabranch.errors import BackendError, CapacityError
from anabranch.graph import Graph
from anabranch.graph.alias import build_alias
from anabranch.graph.graphvite import GraphVite
from anabranch.graph.graphvite import torch_executor as device
from anabranch.graph.graphvite.train import MOMENTS, OPTIMIZERS, Rate, Rule, negative_stream, train_block
from negatives import drawn

EXACT = 1e-6  # float32 against float64 of numbers near 1
RATE = Rate(100, 1000)


def block(dim=5, moments=0, heads=3, tails=3, seed=0):
    """Random parameters of a head part and a tail part, and a table of negatives."""
    generator = np.random.default_rng(seed)

    def side(count):
        values = generator.standard_normal((count, dim)).astype(np.float32)
        return [values] + [generator.random((count, dim)).astype(np.float32) for _ in range(moments)]

    table = build_alias(np.array([0, tails]), generator.random(tails) + 0.1)
    return side(heads), side(tails), (table.keep_M, table.other_M)


def samples_of(count, heads=3, tails=3, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, heads, count, np.int32), generator.integers(0, tails, count, np.int32)


def by_autograd(V, C, samples, negatives, rule):
    """The definition in float64: after every pair, a step along the gradient of its weighted loss and its decay."""
    V, C = (torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in (V, C))
    total = 0.0
    for number, (head, tail) in enumerate(zip(*samples, strict=True)):
        lr = rule.lr * max(1 - (RATE.first + number) / RATE.total, 1e-4)
        pairs = [(target, rule.negative_weight, -1.0) for target in negatives[number]] + [(tail, 1.0, 1.0)]
        for target, weight, sign in pairs:
            loss = -torch.nn.functional.logsigmoid(sign * (V[head] @ C[target]))
            decay = rule.weight_decay / 2 * ((V[head] ** 2).sum() + (C[target] ** 2).sum())
            gradients = torch.autograd.grad(weight * (loss + decay), (V, C))
            with torch.no_grad():
                V -= lr * gradients[0]
                C -= lr * gradients[1]
            total += weight * float(loss.detach()) / (1 + rule.negatives * rule.negative_weight)
    return V.detach().numpy(), C.detach().numpy(), total


@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dim", [1, 5, 33])
def test_updates_are_those_of_autograd(negatives, weight_decay, dim):
    rule = Rule(lr=0.3, weight_decay=weight_decay, negatives=negatives, negative_weight=2.5)
    head, tail, table = block(dim)
    samples, state = samples_of(4), negative_stream(1, 2, 3)
    chosen = drawn(table, state, 4 * negatives).reshape(4, negatives)
    V, C, loss = by_autograd(head[0], tail[0], samples, chosen, rule)
    found = train_block(head, tail, samples, table, state, rule, RATE)
    scale = max(1.0, np.abs(V).max(), np.abs(C).max())
    assert np.abs(head[0] - V).max() < EXACT * scale
    assert np.abs(tail[0] - C).max() < EXACT * scale
    assert found == pytest.approx(loss, rel=EXACT)


def test_one_update_by_hand():
    # D = 1, no negatives: z = 2 * 0.5 = 1, p = 0.731059; step = 0.1 (p - 1) = -0.0268941
    # V = 2 + 0.0268941 * 0.5, C = 0.5 + 0.0268941 * 2; loss = -ln p = 0.313262
    head, tail = [np.array([[2]], np.float32)], [np.array([[0.5]], np.float32)]
    rule = Rule(lr=0.1, weight_decay=0, negatives=0)
    table = (np.ones(1, np.float32), np.zeros(1, np.int32))
    one = (np.zeros(1, np.int32), np.zeros(1, np.int32))
    loss = train_block(head, tail, one, table, np.uint64(1), rule, Rate(0, 10**9))
    assert head[0][0, 0] == pytest.approx(2.0134471, abs=EXACT)
    assert tail[0][0, 0] == pytest.approx(0.5537883, abs=EXACT)
    assert loss == pytest.approx(0.3132617, abs=EXACT)


def test_the_rate_falls_to_its_floor():
    assert Rate(0, 100).at(0.5, 0) == 0.5
    assert Rate(30, 100).at(0.5, 20) == pytest.approx(0.25)
    assert Rate(90, 100).at(0.5, 50) == pytest.approx(0.5e-4)


def test_large_scores_do_not_overflow():
    head, tail = [np.full((1, 4), 60, np.float32)], [np.full((1, 4), -60, np.float32)]
    one = (np.zeros(1, np.int32), np.zeros(1, np.int32))
    table = (np.ones(1, np.float32), np.zeros(1, np.int32))
    loss = train_block(head, tail, one, table, np.uint64(1), Rule(lr=1e-6, weight_decay=0), RATE)
    assert loss == pytest.approx(14400 / 6, rel=1e-4)  # the positive alone is wrong: -log p = 14400
    assert np.isfinite(head[0]).all()


def by_definition(optimizer, x, moments, gradient, lr):
    """One parameter in float64."""
    if optimizer == "momentum":
        a = 0.999 * moments[0] + 0.001 * gradient
        return x - lr * a, [a]
    if optimizer == "adagrad":
        a = moments[0] + gradient**2
        return x - lr * gradient / (np.sqrt(a) + 1e-10), [a]
    if optimizer == "rmsprop":
        a = 0.999 * moments[0] + 0.001 * gradient**2
        return x - lr * gradient / np.sqrt(a + 1e-8), [a]
    a, b = 0.999 * moments[0] + 0.001 * gradient, 0.99999 * moments[1] + 0.00001 * gradient**2
    return x - lr * a / (np.sqrt(b) + 1e-8), [a, b]


@pytest.mark.parametrize("optimizer", ["momentum", "adagrad", "rmsprop", "adam"])
def test_optimisers_with_moments_are_their_definitions(optimizer):
    rule = Rule(optimizer, lr=0.3, weight_decay=0.1, negatives=2, negative_weight=2.5)
    head, tail, table = block(4, MOMENTS[optimizer])
    samples, state = samples_of(3), negative_stream(1, 2, 3)
    chosen = drawn(table, state, 6).reshape(3, 2)
    V, C = ([array.astype(np.float64) for array in side] for side in (head, tail))
    for number, (u, v) in enumerate(zip(*samples, strict=True)):
        lr = RATE.at(rule.lr, number)
        for target, weight, label in [*((t, 2.5, 0) for t in chosen[number]), (v, 1.0, 1)]:
            x, c = V[0][u].copy(), C[0][target].copy()
            error = 1 / (1 + np.exp(-x @ c)) - label
            for side, row, gradient in ((V, u, error * c + 0.1 * x), (C, target, error * x + 0.1 * c)):
                new, moments = by_definition(optimizer, side[0][row], [m[row] for m in side[1:]], weight * gradient, lr)
                for array, value in zip(side, [new, *moments], strict=True):
                    array[row] = value
    train_block(head, tail, samples, table, state, rule, RATE)
    for found, expected in zip(head + tail, V + C, strict=True):
        assert np.abs(found - expected).max() < 3 * EXACT


# Micro-batches of torch


def as_tensors(arrays):
    return [torch.from_numpy(array.copy()) for array in arrays]


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_a_micro_batch_of_one_is_the_kernel(optimizer):
    rule = Rule(optimizer, lr=0.1, weight_decay=0.1, negatives=2, negative_weight=2.5)
    head, tail, table = block(8, MOMENTS[optimizer], 4, 6)
    samples, state = samples_of(9, 4, 6), negative_stream(1, 2, 3)
    theirs = as_tensors(head), as_tensors(tail)
    loss = device.train_block(*theirs, samples, tuple(as_tensors(table)), int(state), rule, RATE, 1)
    assert float(loss) == pytest.approx(train_block(head, tail, samples, table, state, rule, RATE), rel=EXACT)
    for found, expected in zip(theirs[0] + theirs[1], head + tail, strict=True):
        assert np.abs(found.numpy() - expected).max() < 3 * EXACT


def test_a_micro_batch_adds_up_gradients_of_the_values_before():
    rule = Rule(lr=0.1, weight_decay=0.0, negatives=0)
    head, tail, table = block(4)
    samples = (np.array([0, 0, 1], np.int32), np.array([2, 1, 2], np.int32))
    V, C = head[0].astype(np.float64), tail[0].astype(np.float64)
    new_V, new_C = V.copy(), C.copy()
    for number, (u, v) in enumerate(zip(*samples, strict=True)):
        step = RATE.at(0.1, number) * (1 / (1 + np.exp(-V[u] @ C[v])) - 1)
        new_V[u] -= step * C[v]
        new_C[v] -= step * V[u]
    theirs = as_tensors(head), as_tensors(tail)
    device.train_block(*theirs, samples, tuple(as_tensors(table)), 1, rule, RATE, 3)
    assert np.abs(theirs[0][0].numpy() - new_V).max() < EXACT
    assert np.abs(theirs[1][0].numpy() - new_C).max() < EXACT


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_negatives_of_the_device_are_those_of_the_kernel(seed):
    table = build_alias(np.array([0, 9]), np.arange(1.0, 10.0))
    state = negative_stream(seed, 3, 5)
    found = device.draw_negatives(int(state), 500, *as_tensors((table.keep_M, table.other_M)))
    assert np.array_equal(found.numpy(), drawn((table.keep_M, table.other_M), state, 500))


def test_micro_batch_is_as_large_as_the_busiest_node_allows():
    assert device.auto_micro_batch(np.ones(4096), 4) == 8192
    assert device.auto_micro_batch(np.ones(100), 1) == 512  # 8 * 100 = 800
    assert device.auto_micro_batch(np.ones(100), 4) == 128  # a block has a quarter of the heads
    assert device.auto_micro_batch(np.array([50.0, *np.ones(50)]), 1) == 16  # half of all: 8 / 0.5
    assert device.auto_micro_batch(np.array([9.0]), 1) == 8


def ring(nodes=400, chords=3, seed=0):
    generator = np.random.default_rng(seed)
    source = np.repeat(np.arange(nodes), 1 + chords)
    target = (source + generator.integers(1, 12, len(source))) % nodes
    return Graph.from_edges(source, target)


def test_threads_and_torch_agree_on_the_loss_curve():
    graph, options = ring(100), {"dim": 8, "epochs": 12, "pool_size": 600, "augmentation": 2, "lr": 0.2}
    threads = GraphVite(**options).fit(graph)
    batches = GraphVite(**options, executor="torch", micro_batch=1).fit(graph)
    assert len(threads.history) == len(batches.history) > 5
    for ours, theirs in zip(threads.history, batches.history, strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)  # spec: 2% at an equal micro-batch
    assert threads.history[-1]["loss"] < 0.9 * threads.history[0]["loss"]  # it did train


def test_micro_batches_end_at_the_loss_of_threads():
    graph, options = ring(), {"dim": 16, "epochs": 60, "pool_size": 12_000, "augmentation": 2, "lr": 0.05}
    threads = GraphVite(**options).fit(graph)
    batches = GraphVite(**options, executor="torch").fit(graph)
    assert batches.history[-1]["loss"] == pytest.approx(threads.history[-1]["loss"], rel=0.02)


@pytest.mark.parametrize(
    "options",
    [{}, {"workers": 2}, {"memory_limit": 128, "partitions": 16, "workers": 3}, {"partitions": 2, "workers": 4}],
    ids=str,
)
def test_torch_with_micro_batches_of_one_is_threads(options):
    graph = ring(32, 1)
    base = {"dim": 4, "epochs": 4, "augmentation": 1, "partitions": options.get("partitions", 4), "pool_size": 100}
    one = GraphVite(**base).fit(graph)
    other = GraphVite(**{**base, **options}, executor="torch", micro_batch=1).fit(graph)
    assert np.abs(one.vertex_ND - other.vertex_ND).max() < 1e-5
    assert np.abs(one.context_ND - other.context_ND).max() < 1e-5


def test_result_of_torch_does_not_depend_on_who_trains():
    graph = ring(64)
    found = [
        GraphVite(dim=8, epochs=5, partitions=4, executor="torch", **more).fit(graph).vertex_ND
        for more in ({}, {"workers": 2}, {"workers": 4, "memory_limit": 4 * 16 * 8 * 4}, {"samplers": 0})
    ]
    assert all(np.array_equal(found[0], other) for other in found[1:])


def test_devices_that_are_not_there():
    graph = ring(32)
    with pytest.raises(BackendError, match="device is 'abacus', which PyTorch does not know"):
        GraphVite(dim=4, epochs=1, device="abacus").fit(graph)
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="device is 'cuda', but there are 0 CUDA devices"):
            GraphVite(dim=4, epochs=1, device="cuda").fit(graph)
        with pytest.raises(BackendError, match="there is no CUDA device"):
            GraphVite(dim=4, epochs=1, device="cuda:*").fit(graph)


def test_a_device_needs_room_for_four_parts():
    with pytest.raises(CapacityError, match="two parts under work and two being fetched need 512; use more partitions"):
        GraphVite(dim=4, epochs=1, executor="torch", partitions=4, memory_limit=300).fit(ring(32))
