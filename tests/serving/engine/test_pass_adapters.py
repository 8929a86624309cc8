"""What routers beside matrices leave for tokens whose routes are wanted."""

import torch

from anabranch.routing import Routing
from anabranch.serving.engine.pass_adapters import Routes


def routing(index_MK):
    return Routing(index_MK, torch.ones(index_MK.shape), torch.zeros(len(index_MK), 3))


def test_a_route_is_the_union_over_streams_each_adapter_once():
    """Three tokens in two streams: item 4 is token 1 again. Token 2 is not asked for."""
    of_row = {0: {}, 1: {}}
    routes = Routes(of_row, 3)
    routes.note("q", ("x", "y", "z"), torch.tensor([0, 1, 2]), routing(torch.tensor([[0, -1], [2, 1], [0, 1]])))
    routes.note("q", ("x", "y", "z"), torch.tensor([4, 5]), routing(torch.tensor([[1, 0], [2, 2]])))
    routes.note("k", ("x", "y", "z"), torch.tensor([1]), routing(torch.tensor([[0, 0]])))
    assert of_row == {0: {"q": ("x",)}, 1: {"q": ("z", "y", "x"), "k": ("x",)}}
