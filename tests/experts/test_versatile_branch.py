"""A feed-forward as the paths of VersatileFFN see it: f(H) = after(down(hidden(norm(H))))."""

import torch
from torch import nn

from anabranch.experts.versatile.branch import Branch


def made(**changes):
    down = nn.Linear(3, 2, bias=False)
    down.weight.data.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]))
    parts = {"norm": lambda x: x / 2, "hidden": lambda h, context: torch.cat((h, h.sum(-1, keepdim=True)), -1)}
    return Branch(**{**parts, "down": down, "dim": 2, "hidden_dim": 3, **changes})


X = torch.tensor([[2.0, 4.0]])


def test_the_change_of_the_stream_by_hand():
    """norm gives (1, 2), hidden (1, 2, 3), down (1, 5)."""
    assert made().change(X).tolist() == [[1.0, 5.0]]
    assert made(after=lambda y: -y).change(X).tolist() == [[-1.0, -5.0]]
    assert made(after=lambda y: -y).output(torch.tensor([[1.0, 1.0, 1.0]])).tolist() == [[-1.0, -2.0]]


def test_one_call_is_taken_where_nothing_stands_behind():
    """What is made at once is of the norm's output, and has no norm behind it."""

    def at_once(h, context):
        return 10 * h

    assert made(at_once=at_once).change(X).tolist() == [[10.0, 20.0]]
    assert made(at_once=at_once, after=lambda y: -y).change(X).tolist() == [[-1.0, -5.0]]


def test_layers_get_the_context_of_their_rows():
    seen, context = [], object()

    def hidden(h, given):
        seen.append(given)
        return torch.zeros(1, 3)

    made(hidden=hidden).change(X, context)
    assert seen == [context]


def test_flops_are_two_for_each_weight():
    assert made().flops == 2 * (2 * 3) * 3
    assert made(num_inputs=1).flops == 2 * (2 * 3) * 2
    assert made().output_flops == 2 * (2 * 3)
