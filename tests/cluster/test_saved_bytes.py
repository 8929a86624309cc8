"""What autograd keeps, in bytes."""

import gc

import pytest
import torch
from torch import nn

from anabranch.cluster import SavedBytes


def test_by_hand():
    x = torch.randn(10, 10, requires_grad=True)
    with SavedBytes() as meter:
        # exp keeps its output, 400 bytes; the product of two keeps both factors, of which one is that output.
        y = x.exp()
        z = y * y.detach().clone()
        assert meter.now == 800
        z.sum().backward()
    del y, z
    gc.collect()
    assert (meter.now, meter.most) == (0, 800)
    meter.restart()
    assert meter.most == 0


def test_a_storage_counts_once_and_parameters_do_not():
    model = nn.Linear(8, 8)
    x = torch.randn(4, 8)
    with SavedBytes(ignored=model.parameters()) as meter:
        model(x).sum() + model(x).sum()
        assert meter.most == x.nbytes


def test_what_is_held_counts_until_it_is_released():
    meter = SavedBytes()
    x = torch.zeros(100)
    held = meter.hold(x, x[:50])
    assert meter.now == 400
    held.release()
    held.release()
    assert meter.now == 0


def test_a_graph_that_is_dropped_without_a_backward_is_let_go_of():
    """What an operator keeps of its own output knew the operator: neither was ever freed."""
    x = torch.randn(10, 10, requires_grad=True)
    with SavedBytes() as meter:
        y = x.exp().tanh()
    assert meter.now == 800
    del y
    assert meter.now == 0


def compressed(layout, ends, places, *values):
    """Of 4 x 4 numbers; each part has a storage of its own."""
    whole, within, entries = torch.tensor(ends), torch.tensor(places), torch.tensor(values)
    return torch.sparse_compressed_tensor(whole, within, entries, size=(4, 4), layout=layout, check_invariants=True)


EYE = [[1.0, 0.0], [0.0, 1.0]]
KINDS = {
    # Bytes of indices (int64) and of values (float32), of ones on the diagonal.
    "coo": (lambda: torch.eye(4).to_sparse(), 2 * 4 * 8 + 16),
    "csr": (lambda: compressed(torch.sparse_csr, range(5), range(4), 1.0, 1.0, 1.0, 1.0), (5 + 4) * 8 + 16),
    "csc": (lambda: compressed(torch.sparse_csc, range(5), range(4), 1.0, 1.0, 1.0, 1.0), (5 + 4) * 8 + 16),
    "bsr": (lambda: compressed(torch.sparse_bsr, range(3), range(2), EYE, EYE), (3 + 2) * 8 + 32),
    "bsc": (lambda: compressed(torch.sparse_bsc, range(3), range(2), EYE, EYE), (3 + 2) * 8 + 32),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(1, 4)], layout=torch.jagged),
        3 * 8 + 3 * 16,
    ),
    # These do not say.
    "mkl-dnn": (lambda: torch.eye(4).to_mkldnn(), 0),
}


@pytest.mark.filterwarnings(
    "ignore:Sparse .* tensor support is in beta state", "ignore:The PyTorch API of nested tensors"
)
@pytest.mark.parametrize("layout", KINDS)
def test_tensors_of_every_layout_count_with_all_their_parts(layout):
    make, size = KINDS[layout]
    given = make()
    meter = SavedBytes()
    held = meter.hold(given, given)
    assert meter.now == size
    held.release()
    assert meter.now == 0
    if layout != "mkl-dnn":
        ignoring = SavedBytes(ignored=[given])
        ignoring.hold(given)
        assert ignoring.most == 0


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_factors_are_kept_for_the_backward(layout):
    make, size = KINDS[layout]
    factor, x = make(), torch.ones(4, 2, requires_grad=True)
    with SavedBytes(ignored=[x]) as meter:
        y = torch.sparse.mm(factor, x)
    assert meter.now == size
    y.sum().backward()
    del y
    gc.collect()
    assert torch.equal(x.grad, torch.ones(4, 2))
    assert meter.now == 0
