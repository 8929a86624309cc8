import copy
import pickle

import pytest
import torch
from torch import nn

from anabranch.nn import BuildContext, Count, ForwardContext
from anabranch.nn.context import set_unregistered


def test_counts_add_up():
    assert Count(1, 2, 3) + Count.dense(10) == Count(11, 12, 23)
    assert sum([Count(1, 1, 1)] * 3, start=Count()) == Count(3, 3, 3)


def test_initial_weights_are_cut_at_three_sigma_and_follow_the_generator():
    def made(seed):
        return BuildContext(64, init_std=0.1, residual_std=0.01, generator=torch.Generator().manual_seed(seed))

    layer = made(0).linear(64, 128, bias=True)
    assert layer.weight.shape == (128, 64)
    assert layer.weight.abs().max() <= 0.3
    assert layer.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert not layer.bias.any()
    assert made(0).linear(64, 128, residual=True).weight.abs().max() <= 0.03
    assert torch.equal(made(0).linear(64, 128).weight, layer.weight)
    assert not torch.equal(made(1).linear(64, 128).weight, layer.weight)


def test_a_shared_module_is_made_once():
    context, made = BuildContext(4), []

    def make():
        made.append(nn.Linear(2, 2))
        return made[-1]

    first, second = context.share("pool", make), context.share("pool", make)
    assert first is second is context.shared["pool"]
    assert len(made) == 1
    assert context.share("other", make) is not first


class Holder(nn.Module):
    """An owner of a module, and a layer that only refers to it."""

    def __init__(self):
        super().__init__()
        self.owned = nn.Linear(2, 2)
        self.layer = nn.Module()
        set_unregistered(self.layer, "reference", self.owned)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda holder: pickle.loads(pickle.dumps(holder))])
def test_hidden_references_are_registered_once_and_stay_shared_in_copies(again):
    holder = Holder()
    assert list(holder.state_dict()) == ["owned.weight", "owned.bias"]
    assert len(list(holder.parameters())) == 2
    twin = again(holder)
    assert twin.layer.reference is twin.owned
    assert twin.owned is not holder.owned


def test_hidden_references_follow_casts_and_moves():
    holder = Holder().double()
    assert holder.layer.reference.weight.dtype == torch.float64
    assert holder.layer.reference.weight is holder.owned.weight


def test_a_forward_context_is_a_routing_context():
    position_BL = torch.zeros(1, 2, dtype=torch.int64)
    context = ForwardContext(position_BL=position_BL, rotary=(position_BL, position_BL), training=True)
    fork = context.fork()
    assert isinstance(fork, ForwardContext)
    assert fork.position_BL is position_BL
    fork.emit_loss("a", torch.tensor(1.0))
    assert context.losses == {}
