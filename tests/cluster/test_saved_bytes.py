"""What autograd keeps, in bytes."""

import gc

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
