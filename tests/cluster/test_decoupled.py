"""A backward in two parts gives, to the bit, what one at once gives; and what it keeps between the two."""

import gc
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from anabranch.cluster import SavedBytes
from anabranch.cluster.decoupled import backward_of_inputs

WIDTH, ITEMS = 4, 3


def made_of(count, shape=(WIDTH, WIDTH), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(count)]


def inputs_of(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(ITEMS, WIDTH, generator=generator) for _ in range(count)]


def gradients(roots, given, inputs, puts_off, saved):
    if not puts_off:
        torch.autograd.backward(roots, given)
        return [x.grad for x in inputs]
    before = {id(x): x.grad for x in inputs}
    found, later = backward_of_inputs(roots, given, inputs, meter=SavedBytes(), saved=saved)
    assert all(x.grad is before[id(x)] for x in inputs)
    later.finish()
    return found


def check(function, parameters, *, inputs=1, steps=3):
    """``function`` of ``inputs`` tensors gives one or several; their gradients add up over steps."""
    found = []
    for puts_off in (False, True):
        for parameter in parameters:
            parameter.grad = None
        of_inputs = []
        for step in range(steps):
            given = [x.clone().requires_grad_() for x in inputs_of(inputs, seed=step)]
            saved = []
            with SavedBytes().watch(saved):
                made = function(*given)
            roots = [y for y in (made if isinstance(made, tuple) else (made,)) if y.requires_grad]
            of_inputs += gradients(roots, [torch.full_like(y, 0.5) for y in roots], given, puts_off, saved)
        found.append([*of_inputs, *(None if one.grad is None else one.grad.clone() for one in parameters)])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.layout == other.layout and torch.equal(one.to_dense(), other.to_dense()))


def test_by_hand():
    w = nn.Parameter(torch.tensor([[2.0]]))
    x = torch.tensor([[3.0]], requires_grad=True)
    # y = (w x)^2, so dy/dx = 2 w^2 x = 24 and dy/dw = 2 w x^2 = 36.
    found, later = backward_of_inputs([F.linear(x, w).square()], [torch.ones(1, 1)], [x])
    assert found[0].item() == 24
    assert w.grad is None
    later.finish()
    assert w.grad.item() == 36
    assert x.grad is None


W, V = made_of(2)
BIAS, OTHER = made_of(2, (WIDTH,))
WHOLE, MORE = made_of(2, (ITEMS, WIDTH))


def looked_up(table, *rows):
    """[ITEMS, WIDTH]; the gradient of the table is sparse."""
    return F.embedding(torch.tensor(rows), table, sparse=True)


class Double(torch.autograd.Function):
    """x w, whose backward computes both gradients, or those that it is asked for."""

    calls = 0

    @staticmethod
    def forward(ctx, x, w, in_parts):
        ctx.save_for_backward(x, w)
        ctx.in_parts = in_parts
        return x @ w

    @staticmethod
    def backward(ctx, dy):
        Double.calls += 1
        x, w = ctx.saved_tensors
        return dy @ w.T, x.T @ dy, None


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.linear(torch.tanh(F.linear(x, W, BIAS)), V, OTHER),
        # torch's own split raises here, or counts twice.
        lambda x: F.linear(torch.tanh(F.linear(x, W, BIAS)), V, BIAS),
        lambda x: F.linear(torch.tanh(F.linear(F.linear(x, W), V)), W),
        # There both would have one tensor as gradient.
        lambda x: torch.tanh(x + WHOLE + MORE),
        # There it would be left out.
        lambda x: (torch.tanh(x), (WHOLE * 2).exp()),
        lambda x: (torch.tanh(x), WHOLE + MORE),
        lambda x: torch.tanh(x) * WHOLE + WHOLE.sum(),
        lambda x: (torch.tanh(x) * WHOLE, WHOLE.exp()),
        # Made of parameters before they enter.
        lambda x: F.linear(x, W * torch.tanh(V)) + F.linear(x, V.double().float()),
        lambda x: F.linear(x, W).split(2, dim=-1)[1].exp(),
        # Beside the inputs alone.
        lambda x: F.linear(WHOLE, W, BIAS),
        lambda x: (x, x * 2),
        lambda x: WHOLE,
        lambda x: Double.apply(Double.apply(x, W, True), V, False),
        pytest.param(
            lambda x: checkpoint(lambda x: torch.tanh(F.linear(x, W)), F.linear(x, V), use_reentrant=False),
            marks=pytest.mark.slow,
        ),
        lambda x: F.layer_norm(F.linear(x, W), (WIDTH,), BIAS, OTHER),
        lambda x: F.embedding(torch.tensor([0, 2, 2]), V) * x,
        # Gradients that are sparse, several times, and with dense ones in either order.
        lambda x: looked_up(V, 0, 2, 2) * x,
        lambda x: looked_up(V, 1, 3, 3) + torch.tanh(x) * looked_up(V, 2, 3, 0),
        lambda x: looked_up(V, 1, 3, 3) + F.linear(x, V) * looked_up(V, 2, 3, 0),
        lambda x: F.linear(torch.tanh(F.linear(x, V)) + looked_up(V, 1, 3, 3), V),
        lambda x: (looked_up(W, 0, 1, 1), x * looked_up(W * 2, 0, 1, 3)),
        lambda x: looked_up(x + BIAS, 0, 2, 2) * looked_up(x * OTHER, 0, 1, 2),
        lambda x: torch.sparse.mm(torch.eye(ITEMS).to_sparse(), torch.tanh(F.linear(x, W))),
        lambda x: x.new_ones(ITEMS, WIDTH),
        lambda x: copied(F.linear(x, W)),
    ],
)
def test_the_same_bits_as_at_once(function):
    check(function, [W, V, BIAS, OTHER, WHOLE, MORE])


def test_dense_and_sparse_gradients_of_different_steps_are_added():
    """What is there is sparse and what comes is dense, and the other way round, each of the kind that autograd gives."""
    ways = [
        lambda x: looked_up(V, 1, 3, 3) * looked_up(V, 2, 3, 0) * x,
        lambda x: F.linear(torch.tanh(F.linear(x, V)), V),
        lambda x: looked_up(V, 1, 3, 3) * x,
        lambda x: F.linear(x, V),
    ]
    for order in itertools.permutations(ways, 3):
        turns = itertools.cycle(order)
        check(lambda x, turns=turns: next(turns)(x), [V])


def test_several_inputs_of_which_some_learn():
    check(lambda x, y, z: F.linear(x * y.detach(), W) + z, [W], inputs=3)
    x, y = (x.requires_grad_(n == 0) for n, x in enumerate(inputs_of(2)))
    found, later = backward_of_inputs([(F.linear(x, W) * y).sum()], [None], [y, x])
    assert found[0] is None
    assert torch.equal(found[1], F.linear(y, W.T))
    later.release()


def test_where_no_input_learns_all_is_put_off():
    (x,) = inputs_of(1)
    W.grad = None
    found, later = backward_of_inputs([F.linear(x, W).sum()], [None], [x, torch.arange(3)])
    assert found == [None, None]
    assert W.grad is None
    later.finish()
    assert torch.allclose(W.grad, torch.ones(ITEMS, WIDTH).T @ x)


def test_nothing_is_computed_twice():
    """What computes all at once is asked once; what computes what it is asked for, for each part."""
    (x,) = inputs_of(1)
    for in_parts, calls in ((False, 1), (True, 2)):
        Double.calls = 0
        given = x.clone().requires_grad_()
        _, later = backward_of_inputs([Double.apply(given, W, in_parts).sum()], [None], [given])
        assert Double.calls == 1
        later.finish()
        assert Double.calls == calls


def test_hooks_of_tensors_change_a_gradient_once_and_those_of_parameters_are_called_late():
    def function(x, seen=None):
        y = F.linear(x, W)
        y.register_hook(lambda gradient: gradient * 3)
        return torch.tanh(y)

    check(function, [W])
    seen = []
    handles = [W.register_hook(lambda gradient: seen.append("hook")), W.register_post_accumulate_grad_hook(seen.append)]
    x = inputs_of(1)[0].requires_grad_()
    _, later = backward_of_inputs([F.linear(x, W).sum()], [None], [x])
    assert not seen
    later.finish()
    for handle in handles:
        handle.remove()
    assert seen[0] == "hook"
    assert seen[1] is W


@pytest.mark.parametrize("part", ["first", "second"])
def test_an_error_changes_no_gradient_and_keeps_nothing(part):
    x = inputs_of(1)[0].requires_grad_()
    meter = SavedBytes(ignored=[W, V])
    W.grad = V.grad = None
    with meter:
        root = F.linear(F.linear(x, W), V).sum()
    handle = (x if part == "first" else V).register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backward_of_inputs([root], [None], [x], meter=meter)[1].finish()
    handle.remove()
    del root
    gc.collect()
    assert W.grad is V.grad is None
    assert meter.now == 0


def test_what_is_kept_between_the_parts():
    """In bytes: a product keeps its input for later; what it hands on is gone, and the gradient of its output is noted."""
    size = ITEMS * WIDTH * 4
    meter = SavedBytes(ignored=[W])
    x = inputs_of(1)[0].requires_grad_()
    with meter:
        y = torch.tanh(F.linear(x, W))
        root = (y * y.detach().clone()).sum()
    # The input, what tanh gave, and both factors, of which one is that.
    assert meter.now == 3 * size
    _, later = backward_of_inputs([root], [None], [x], meter=meter)
    del y, root
    gc.collect()
    assert meter.now == 2 * size
    later.finish()
    assert meter.now == 0
    assert meter.most == 4 * size


def test_what_only_the_first_part_needs_is_let_go_of_between_them():
    """Sine keeps its input for the first part; products keep theirs for the second, and note the gradients of what they gave."""
    size = ITEMS * WIDTH * 4
    for tells, more in ((False, size), (True, 0)):
        meter, saved = SavedBytes(ignored=[W, V]), []
        W.grad = V.grad = None
        x = inputs_of(1)[0].requires_grad_()
        with meter.watch(saved):
            y = F.linear(torch.sin(F.linear(x, W)), V)
        assert meter.now == 3 * size
        given = torch.ones_like(y)
        _, later = backward_of_inputs([y], [given], [x], meter=meter, saved=saved if tells else ())
        del y
        assert meter.now == 4 * size + more
        later.finish()
        assert meter.now == 0
        assert torch.allclose(V.grad, torch.ones(ITEMS, WIDTH).T @ torch.sin(x @ W.T))


def copied(x):
    y = x * 2
    y[:, 0] = BIAS[:ITEMS]
    return torch.exp(y)


def test_nothing_is_let_go_of_where_an_operator_does_not_tell_what_it_keeps():
    meter, saved = SavedBytes(ignored=[BIAS]), []
    x = inputs_of(1)[0].requires_grad_()
    with meter.watch(saved):
        y = copied(x).sin()
    kept = [reference() for reference in saved]
    _, later = backward_of_inputs([y.sum()], [None], [x], saved=saved)
    assert kept
    assert all(one.tensor is not None for one in kept)
    later.finish()


def test_what_is_let_go_of_is_not_kept():
    meter = SavedBytes(ignored=[W])
    x = inputs_of(1)[0].requires_grad_()
    with meter:
        root = torch.tanh(F.linear(x, W)).sum()
    _, later = backward_of_inputs([root], [None], [x], meter=meter)
    del root
    later.release()
    assert meter.now == 0


OPERATIONS = {
    "linear": lambda a, b, p, q: F.linear(a, p),
    "bias": lambda a, b, p, q: F.linear(a, p, q),
    "add": lambda a, b, p, q: a + b,
    "times": lambda a, b, p, q: a * b * q,
    "tanh": lambda a, b, p, q: torch.tanh(a),
    "apart": lambda a, b, p, q: torch.tanh(p[:ITEMS]) + q,
    "turned": lambda a, b, p, q: a @ (p.T * 0.5),
    "python": lambda a, b, p, q: Double.apply(a, p, False),
    "parts": lambda a, b, p, q: Double.apply(a, p, True),
    "norm": lambda a, b, p, q: F.layer_norm(a, (WIDTH,), q),
    "detached": lambda a, b, p, q: a * b.detach(),
    "looked up": lambda a, b, p, q: looked_up(p, 0, 2, 2),
    "rows": lambda a, b, p, q: torch.tanh(a) * looked_up(p, 3, 0, 3),
}


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(OPERATIONS)), *(st.integers(0, 9) for _ in range(4))), min_size=1, max_size=9
    ),
    st.integers(1, 3),
)
def test_any_graph_gives_the_same_bits(steps, roots):
    """Of parameters that are shared, unused, or enter in several places; and of several inputs and outputs."""
    matrices, vectors = made_of(3, seed=5), made_of(2, (WIDTH,), seed=6)

    def function(*given):
        made = list(given)
        for name, a, b, p, q in steps:
            chosen = made[a % len(made)], made[b % len(made)], matrices[p % 3], vectors[q % 2]
            made.append(OPERATIONS[name](*chosen))
        return tuple(made[-roots:])

    check(function, [*matrices, *vectors], inputs=2, steps=2)
