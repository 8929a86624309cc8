"""Which routers a model has, and in which layers of a trace they route: each once, or as often as the module over them says."""

import pytest
import torch
from torch import nn

from anabranch.routing import Override, Router, RoutingContext, override_routing, record_routing
from anabranch.routing.discovery import RouterLayer, router_layers

D, E = 4, 5


def router(layer=0):
    return Router.Config().build(D, E, layer=layer, generator=torch.Generator().manual_seed(layer))


class Loop(nn.Module):
    """A router that routes ``passes`` times, and says so."""

    def __init__(self, layer, passes):
        super().__init__()
        self.router, self.passes = router(layer), passes

    @property
    def routing_order(self):
        return [self.router] * self.passes

    def forward(self, x_ND, context):
        for each in self.routing_order:
            x_ND = x_ND * (1 + each(x_ND, context).weight_NK.sum(-1, keepdim=True))
        return x_ND


class Tower(nn.Module):
    """Layers with as many passes as ``passes`` says; 0 for a router on its own, of which nobody says anything."""

    def __init__(self, *passes):
        super().__init__()
        self.layers = nn.ModuleList(Loop(n, count) if count else router(n) for n, count in enumerate(passes))

    def forward(self, x_ND, context):
        for layer in self.layers:
            made = layer(x_ND, context)
            x_ND = made if isinstance(layer, Loop) else x_ND * (1 + made.weight_NK.sum(-1, keepdim=True))
        return x_ND


@pytest.mark.parametrize(
    ("passes", "names"),
    [
        ((0, 0), ["layers.0", "layers.1"]),
        ((1, 0), ["layers.0.router", "layers.1"]),
        (
            (0, 3, 0),
            ["layers.0", "layers.1.router.pass0", "layers.1.router.pass1", "layers.1.router.pass2", "layers.2"],
        ),
        ((2, 2), [f"layers.{n}.router.pass{number}" for n in (0, 1) for number in (0, 1)]),
    ],
)
def test_layers_are_numbered_and_named_by_what_is_said_of_their_passes(passes, names):
    model = Tower(*passes)
    layers = router_layers(model)
    assert [layer.name for layer in layers] == names
    assert [layer.number for layer in layers] == list(range(len(names)))
    with record_routing(model) as recorder:
        model(torch.randn(3, D), RoutingContext())
    trace = recorder.trace()
    assert [layer.name for layer in trace.layers] == names
    assert [len(trace.decisions(number).index_NK) for number in range(len(names))] == [3] * len(names)


def test_routers_keep_numbers_of_their_own_where_each_routes_once():
    model = nn.ModuleList([router(3), router(7)])
    assert router_layers(model) == [RouterLayer(3, "0", model[0]), RouterLayer(7, "1", model[1])]
    assert [layer.number for layer in router_layers(model, {"1": model[1]})] == [7]


def test_a_compiled_layer_says_the_same_once():
    model = Tower(2, 0)
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    assert [layer.num_passes for layer in router_layers(model)] == [2, 2, 1]


def test_a_router_that_says_it_itself_is_still_read_with_a_warning():
    model = Tower(0, 0)
    model.layers[1].passes = 2
    with pytest.warns(DeprecationWarning, match="routing_order"):
        assert [layer.name for layer in router_layers(model)] == ["layers.0", "layers.1.pass0", "layers.1.pass1"]


def test_the_base_class_knows_of_no_passes():
    assert not hasattr(router(), "passes")


def test_one_pass_is_overridden_alone():
    model, x_ND = Tower(3), torch.randn(2, D)
    with override_routing(model, {1: Override(index_NK=[4, 0])}), record_routing(model) as recorder:
        model(x_ND, RoutingContext())
    trace = recorder.trace()
    assert trace.decisions(1).index_NK.tolist() == [[4, 0]] * 2
    with record_routing(model) as plain:
        model(x_ND, RoutingContext())
    assert trace.decisions(0).index_NK.tolist() == plain.trace().decisions(0).index_NK.tolist()
