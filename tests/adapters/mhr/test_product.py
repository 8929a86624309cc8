"""Rows with the adapters of their tasks, and the backward pass by hand: against a loop over rows, autograd, and finite differences."""

import pytest
import torch

from anabranch.adapters.mhr import MultiHeadRouted
from anabranch.adapters.mhr.product import add_rows, rows_through
from anabranch.adapters.tasks import told_tasks
from anabranch.nn import BuildContext
from anabranch.nn.linear import Product, Projection, Rows
from anabranch.routing import RoutingContext

SCALE = 1.5


def made(rows=5, length=3, tasks=3, heads=2, skills=3, in_dim=4, out_dim=6, rank=2):
    """([y, x, alpha, a, b], place)."""
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (rows, length, out_dim),
        (rows, length, in_dim),
        (tasks, heads, skills),
        (heads, skills, in_dim // heads, rank),
        (heads, skills, rank, out_dim // heads),
    )
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return tensors, torch.randint(tasks, (rows,), generator=generator)


def naive(y, x, alpha, a, b, place):
    """Row by row, head by head."""
    rows = []
    for row, task in enumerate(place.tolist()):
        heads = range(len(a))
        half_a = torch.cat([torch.einsum("k,kpr->pr", alpha[task, head], a[head]) for head in heads])
        half_b = torch.cat([torch.einsum("k,krp->rp", alpha[task, head], b[head]) for head in heads], 1)
        rows.append(y[row] + SCALE * (x[row] @ half_a @ half_b))
    return torch.stack(rows)


# Short rows are gathered by task; long ones are taken as they lie, in several pieces where there are many.
@pytest.mark.parametrize("length", [1, 3, 40, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("heads", [1, 2])
def test_values_and_gradients_are_those_of_a_loop(heads, dtype, length):
    tensors, place = made(heads=heads, in_dim=40, out_dim=70, length=length)
    dy = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for run, kind in (
        (lambda *given: add_rows(*given, place, SCALE), dtype),
        (lambda *given: naive(*given, place), torch.float64),
    ):
        leaves = [value.to(kind).requires_grad_() for value in tensors]
        y = run(*leaves)
        found.append([y, *torch.autograd.grad(y, leaves, dy.to(kind))])
    # Sums of some hundred products of numbers of some tens.
    limit = {} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-2}
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), theirs, **limit)


@pytest.mark.parametrize("length", [3, 40])
@pytest.mark.parametrize("has_bias", [False, True])
def test_with_a_frozen_matrix_it_is_what_the_matrix_makes_and_that_added(has_bias, length):
    (y, *tensors), place = made(length=length)
    generator = torch.Generator().manual_seed(3)
    weight, bias = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((6, 4), (6,)))
    found = []
    for run in (
        lambda x, *skills: rows_through(weight, bias if has_bias else None, x, *skills, place, SCALE),
        lambda x, *skills: naive(x @ weight.T + (bias if has_bias else 0), x, *skills, place),
    ):
        leaves = [value.clone().requires_grad_() for value in tensors]
        made_y = run(*leaves)
        found.append([made_y, *torch.autograd.grad(made_y, leaves, y)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("length", [3, 40])
@pytest.mark.parametrize("has_matrix", [False, True])
def test_skills_of_a_wider_type_are_multiplied_in_it_and_rounded_once(has_matrix, length):
    """As a base in bfloat16 has them, whose adapters stay in float32."""
    (y, x, *skills), place = made(length=length, in_dim=16, out_dim=8)
    y, x = y.bfloat16(), x.bfloat16()
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(3)).bfloat16()
    leaves = [x.requires_grad_(), *(value.float().requires_grad_() for value in skills)]
    run = (lambda *given: rows_through(weight, None, *given)) if has_matrix else (lambda *given: add_rows(y, *given))
    found = run(*leaves, place, SCALE)
    base = torch.nn.functional.linear(x, weight) if has_matrix else y
    wanted = naive(base.double(), *(leaf.double() for leaf in leaves), place)
    assert found.dtype == torch.bfloat16
    # The exact sum rounded to the nearest is at most half a step of 2^-7 away; another 2^-16 or so is float32's.
    torch.testing.assert_close(found.double(), wanted, rtol=2**-8 + 1e-5, atol=1e-4)
    dy = torch.randn(found.shape, generator=torch.Generator().manual_seed(4)).bfloat16()
    ours = torch.autograd.grad(found, leaves, dy)
    theirs = torch.autograd.grad(wanted, leaves, dy.double())
    assert [gradient.dtype for gradient in ours] == [leaf.dtype for leaf in leaves]
    torch.testing.assert_close(ours[0].double(), theirs[0].double(), rtol=2**-6, atol=5e-2)
    for own, other in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(own.double(), other.double(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("number", range(5))
def test_each_gradient_alone(number):
    tensors, place = made()
    leaf = tensors[number].requires_grad_()
    found, wanted = (
        torch.autograd.grad(y.square().sum(), leaf)[0]
        for y in (add_rows(*tensors, place, SCALE), naive(*tensors, place))
    )
    torch.testing.assert_close(found, wanted)


def test_gradients_of_any_order():
    tensors, place = made(rows=3, length=2)
    leaves = [value.requires_grad_() for value in tensors]
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for run, inputs in (
        (lambda *given: add_rows(*given, place, SCALE), leaves),
        (lambda *given: rows_through(weight, None, *given, place, SCALE), leaves[1:]),
    ):
        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradgradcheck(run, inputs)


CASES = {
    # (of each row its task, length, what else)
    "mixed": ([0, 2, 0, 1], 3, {}),
    "one task": ([1, 1, 1, 1], 3, {}),
    "decoding, one task": ([2, 2, 2, 2], 1, {}),
    "decoding, mixed": ([2, 0, 2, 1], 1, {}),
    "the average": (None, 3, {"unknown": "average"}),
    "uniform": (None, 3, {"uniform": True}),
    "outputs": ([0, 2, 0, 1], 3, {"heads": 1, "mixes": "outputs"}),
    "no rows": ([], 3, {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_layer_around_a_matrix_adds_what_it_says_it_adds(case, is_frozen):
    """`around`, which multiplies and adds at once, against y and what `forward` gives; and their gradients."""
    tasks, length, more = CASES[case]
    config = MultiHeadRouted.Config(tasks=("a", "b", "c"), **{"skills": 3, "heads": 2, "rank": 2, "alpha": 3.0, **more})
    generator = torch.Generator().manual_seed(2)
    layer = config.build(Projection("blocks.0.attention.q", 4, 6, parts={"q": 6}), BuildContext(4, generator=generator))
    layer.inventory.b.data.normal_(generator=generator)
    x = torch.randn(4 if tasks is None else len(tasks), length, 4, generator=generator).requires_grad_()
    matrix = torch.randn(6, 4, generator=generator)
    # Of a fused matrix, in whose rows other parts stand, too; or a plain one in which nothing learns, whose product it makes itself.
    rows = Rows(
        Product(x, lambda x: torch.nn.functional.linear(x, torch.cat([matrix, matrix])), lambda: (matrix, None)), 6, 6
    )
    if is_frozen:
        plain = torch.nn.Linear(4, 6, bias=False).requires_grad_(False)
        plain.weight.copy_(matrix)
        rows = Rows(Product(x, plain, lambda: (matrix, None), plain))
        assert rows.frozen() == (plain.weight, None)

    def context():
        state = {} if tasks is None else told_tasks(torch.tensor(tasks, dtype=torch.int64), length)
        return RoutingContext(state=state, training=True)

    found = layer.around(rows, context())
    wanted = x @ matrix.T + layer(x, context())
    torch.testing.assert_close(found, wanted)
    if is_frozen:
        with torch.no_grad():
            y = x @ matrix.T
            layer.add_to(y, x, context())
        torch.testing.assert_close(y, wanted.detach())
    learns = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    gradients = (torch.autograd.grad(y.square().sum(), learns, allow_unused=True) for y in (found, wanted))
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)
