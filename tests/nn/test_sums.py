"""Backward passes of every kind over a pool that several calls share, in any order, against plain autograd over the same weights."""

import weakref
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anabranch.nn import kernels
from anabranch.nn.grouped import expert_mlp, reference_expert_mlp
from anabranch.nn.pool import ExpertPool
from anabranch.nn.sums import PassSums, gather_gradients
from anabranch.routing.context import RoutingContext
from anabranch.routing.decision import Routing
from anabranch.routing.dispatch import plan_dispatch

BACKENDS = ["torch", *(["native"] if kernels.load() is not None else [])]
NUM_ITEMS, NUM_EXPERTS, DIM, HIDDEN = 6, 3, 16, 16
CALLS = 3


def routing_of(seed):
    score = torch.rand(NUM_ITEMS, NUM_EXPERTS, generator=torch.Generator().manual_seed(seed))
    weight, index = score.topk(2, dim=-1)
    return Routing(index, weight, score)


@dataclass
class Graph:
    """One forward pass: layers x -> x + pool(x) one after the other; ``state`` are what goes from one to the next."""

    state: list[Tensor]

    def loss(self, number):
        return self.state[number].square().sum()


class Ours:
    def __init__(self, backend, is_shared=True):
        generator = torch.Generator().manual_seed(0)
        options = {"init_std": 0.5, "is_shared": is_shared, "backend": backend, "generator": generator}
        self.pool = ExpertPool(NUM_EXPERTS, DIM, HIDDEN, **options)
        self.x = torch.randn(NUM_ITEMS, DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()

    @property
    def leaves(self):
        return self.x, self.pool.w13, self.pool.w2

    def layer(self, x, seed, context):
        return x + self.pool(x, routing_of(seed), context=context)

    def forward(self, seed, how):
        context, state = RoutingContext(), [self.x]
        for call in range(CALLS):
            arguments = state[-1], seed + call, context
            is_recomputed = how != "plain" and call != 1
            state.append(
                checkpoint(self.layer, *arguments, use_reentrant=how == "reentrant")
                if is_recomputed
                else self.layer(*arguments)
            )
        return Graph(state)

    def gradients(self):
        return [None if leaf.grad is None else leaf.grad.clone() for leaf in self.leaves]


class Plain(Ours):
    """The same without our operator and without sums."""

    def layer(self, x, seed, context):
        routing = routing_of(seed)
        return x + reference_expert_mlp(x, plan_dispatch(routing), routing.weight_NK, self.pool.w13, self.pool.w2)


class StoppedError(Exception):
    pass


def stop(gradient):
    raise StoppedError


# Each does something with a graph and gives tensors that must be equal to what plain autograd gives.


def partly(model, graph, loss, number):
    """Gradients of one thing alone."""
    wanted = [model.x, model.pool.w13, model.pool.w2, *graph.state[1:]][number]
    return torch.autograd.grad(graph.loss(loss), [wanted], retain_graph=True, allow_unused=True)


def whole(model, graph, loss, number):
    graph.loss(loss).backward(retain_graph=True)
    return ()


def two_losses_at_once(model, graph, loss, number):
    torch.autograd.backward([graph.loss(loss), graph.loss(number % CALLS + 1)], retain_graph=True)
    return ()


def stopped(model, graph, loss, number):
    """An exception in the middle."""
    handle = graph.state[1 + number % loss].register_hook(stop)
    with pytest.raises(StoppedError):
        graph.loss(loss).backward(retain_graph=True)
    handle.remove()
    return ()


def probed(model, graph, loss, number):
    """A hook that differentiates the same graph while it is being differentiated."""
    other, found = graph.loss(CALLS), []

    def probe(gradient):
        handle.remove()  # it comes by here itself
        found.extend(torch.autograd.grad(other, model.leaves, retain_graph=True))

    handle = graph.state[1 + number % loss].register_hook(probe)
    graph.loss(loss).backward(retain_graph=True)
    return found


def twice(model, graph, loss, number):
    """The gradient of a gradient's size."""
    first = torch.autograd.grad(graph.loss(loss), model.leaves, create_graph=True)
    sum(gradient.square().mean() for gradient in first).backward(retain_graph=True)
    return first


DEEDS = [partly, whole, two_losses_at_once, stopped, probed, twice]
step = st.tuples(st.sampled_from(DEEDS), st.integers(0, 3), st.integers(1, CALLS), st.integers(0, 5))
FORWARDS = st.lists(st.sampled_from(["plain", "checkpointed"]), min_size=1, max_size=3)


@settings(max_examples=20)
@given(st.sampled_from(BACKENDS), FORWARDS, st.lists(step, min_size=1, max_size=6))
def test_backward_passes_in_any_order_give_what_plain_autograd_gives(backend, forwards, steps):
    models = Ours(backend), Plain(backend)
    graphs = [[model.forward(seed, how) for seed, how in enumerate(forwards)] for model in models]
    for deed, which, loss, number in steps:
        given, gradients = [], []
        for model, made in zip(models, graphs, strict=True):
            given.append(deed(model, made[which % len(made)], loss, number))
            gradients.append(model.gradients())
        for found, wanted in zip([*given[0], *gradients[0]], [*given[1], *gradients[1]], strict=True):
            assert (found is None) is (wanted is None)
            if wanted is not None:
                scale = max(1.0, wanted.abs().max().item())
                torch.testing.assert_close(found / scale, wanted / scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_asked_for_first_leave_nothing_behind(backend):
    """Saliency of the input, then the training step."""
    ours, once = Ours(backend), Ours(backend)
    graph = ours.forward(0, "plain")
    torch.autograd.grad(graph.loss(CALLS), [ours.x], retain_graph=True)
    graph.loss(CALLS).backward()
    once.forward(0, "plain").loss(CALLS).backward()
    for found, wanted in zip(ours.gradients(), once.gradients(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pass_inside_a_pass(backend):
    """Checkpoints of the older kind run a backward pass of their own within the one that comes to them."""
    ours, plain = Ours(backend), Plain(backend)
    for model, how in ((ours, "reentrant"), (plain, "plain")):
        model.forward(0, how).loss(CALLS).backward()
    for found, wanted in zip(ours.gradients(), plain.gradients(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


def watch(monkeypatch):
    """Weak references to the sums of every pass, with the gradients in them when it takes them or ends."""
    made = []
    initialise = PassSums.__init__

    def watched(self):
        initialise(self)
        made.append(weakref.ref(self))

    monkeypatch.setattr(PassSums, "__init__", watched)
    return made


@pytest.mark.parametrize("deed", [partly, stopped, whole, probed])
def test_sums_go_with_their_pass(deed, monkeypatch):
    made = watch(monkeypatch)
    ours = Ours("torch")
    graph = ours.forward(0, "plain")
    deed(ours, graph, CALLS, 0)
    assert made
    assert [sums() for sums in made] == [None] * len(made)  # though the graph lives, and could be gone through again
    assert graph.loss(CALLS).requires_grad


def test_weights_that_also_have_another_use():
    """An auxiliary loss on what `gather_gradients` gives: its gradient goes through autograd, the rest gathers."""
    pool = ExpertPool(NUM_EXPERTS, DIM, HIDDEN, init_std=0.5, backend="torch")
    x, routing, results = torch.randn(NUM_ITEMS, DIM), routing_of(0), []
    for gathers in (False, True):
        sums, w13, w2 = gather_gradients(pool.w13, pool.w2) if gathers else (None, pool.w13, pool.w2)
        plan = plan_dispatch(routing)
        y = sum(expert_mlp(x * scale, plan, routing.weight_NK, w13, w2, sums=sums) for scale in (1.0, 2.0))
        results.append(torch.autograd.grad(y.square().sum() + w13.square().sum() + w2.sum(), (pool.w13, pool.w2)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


def test_outside_of_a_counted_pass_gradients_go_through_autograd(monkeypatch):
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: -1)
    ours, plain = Ours("torch"), Plain("torch")
    for model in (ours, plain):
        model.forward(0, "plain").loss(CALLS).backward()
    for found, wanted in zip(ours.gradients(), plain.gradients(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
