"""What routers beside matrices leave for tokens whose routes are wanted."""

import gc
import types
import weakref

import torch

from anabranch.routing import Routing, RoutingContext
from anabranch.serving.engine.pass_adapters import PassAdapters, Routes


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


def test_a_pass_that_has_run_is_gone_at_once():
    """Of three tokens two are of a request with layers beside matrices: their rows know the pass, which knows them."""
    use = types.SimpleNamespace(has_layers=True, key="u")
    adapters = PassAdapters.of([((use, 1.0),), ()], [2, 1])
    context = RoutingContext(state=adapters.state(1, torch.device("cpu")))
    index = torch.tensor(adapters.number_T)
    gc.disable()
    try:
        [(number, row_M)] = adapters.groups(index)
        group = adapters.rows(index, number, row_M, context)
        assert (group.item_M.tolist(), group.request_M.tolist()) == ([0, 1], [0, 0])
        assert adapters.rows(index, number, row_M, context) is group
        held = [weakref.ref(context), weakref.ref(group), weakref.ref(index)]
        adapters.end()
        del context, group, index
        assert [ref() for ref in held] == [None] * 3
    finally:
        gc.enable()
