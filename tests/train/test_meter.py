from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from anabranch.lm import Decoder
from anabranch.nn import MoE
from anabranch.routing import HashScore, Router, TopK
from anabranch.train.meter import Counted, LoadMeter

TOKENS = torch.arange(48).view(3, 16)


def loads_of(model, tokens):
    """Destinations named by each router in one forward pass, by hand."""
    seen = {}

    def note(name):
        def hook(module, args, routing):
            seen[name] = torch.bincount(routing.index_NK.flatten(), minlength=routing.num_destinations)

        return hook

    hooks = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if getattr(module, "is_router", False)
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return list(seen.values())


def test_measures_are_those_of_the_loads(routed_model):
    model = Decoder(routed_model).eval()
    loads = loads_of(model, TOKENS)
    meter = LoadMeter(model)
    model(TOKENS)
    measures = meter.read(training=False)
    expected = [float(load.max() / load.float().mean() - 1) for load in loads]
    assert measures["max_violation_by_layer"] == pytest.approx(expected)
    assert measures["max_violation"] == pytest.approx(sum(expected) / 4)
    pools = [loads[0] + loads[1], loads[2] + loads[3]]
    assert measures["pool_max_violation"] == pytest.approx(
        max(float(pool.max() / pool.float().mean() - 1) for pool in pools)
    )
    assert measures["candidates_open"] == [8, 8, 8, 8]
    meter.reset()
    meter.close()
    model(TOKENS)
    assert meter.read(training=False)["max_violation"] != measures["max_violation"]  # nan: nothing was counted


def test_closed_destinations_are_not_idle_in_training(routed_model):
    model = Decoder(routed_model).train()  # at step 0, 4 of 8 are open
    meter = LoadMeter(model)
    model(TOKENS, TOKENS)
    measures = meter.read(training=True)
    assert measures["candidates_open"] == [4, 4, 4, 4]
    assert all(violation < 3 for violation in measures["max_violation_by_layer"])
    assert measures["idle_fraction"] < 0.5


def test_recompute_counts_once(routed_model):
    plain, recomputed = (Decoder(routed_model).train() for _ in range(2))
    recomputed.recompute = True
    measures = []
    for model in (plain, recomputed):
        meter = LoadMeter(model)
        model(TOKENS, TOKENS).loss.backward()
        measures.append((meter.read(training=True), [counter.load_E.sum().item() for counter in meter._counters]))
    assert measures[0] == measures[1]
    assert measures[0][1] == [96] * 4  # 48 tokens, 2 places


def test_a_model_that_does_not_route(dense_model):
    assert LoadMeter(Decoder(dense_model)).read(training=True) == {}


def test_routers_may_be_called_with_named_arguments(routed_model, by_keyword):
    model = Decoder(routed_model).train()
    meter = LoadMeter(model)
    model(TOKENS, TOKENS)
    expected = meter.read(training=True)
    meter.reset()
    by_keyword()
    model(TOKENS, TOKENS)
    assert meter.read(training=True) == expected


def test_nan_scores_are_counted_where_a_router_does_not_look_itself(routed_model, monkeypatch):
    """As on a GPU, in a compiled graph, or among several processes."""
    for place in ("routing.nan", "train.meter"):
        monkeypatch.setattr(f"anabranch.{place}.is_seen_at_once", lambda score_NE: False)
    model = Decoder(routed_model).train()
    meter = LoadMeter(model)
    model(TOKENS, TOKENS)
    assert meter.layers_with_nan() == []
    with torch.no_grad():
        model.blocks[2].feed_forward.router.score.weight[0, 0] = torch.nan
    model(TOKENS, TOKENS)
    assert meter.layers_with_nan() == [2, 3]
    meter.reset()
    assert meter.layers_with_nan() == []


def test_masks_of_single_items_close_no_destination_of_a_layer(token_mask_model):
    """Each token has four candidates of its own, so any of the eight may be busy."""
    model = Decoder(token_mask_model).train()
    meter = LoadMeter(model)
    model(TOKENS, TOKENS)
    counted, measures = meter.count(training=True), meter.read(training=True)
    assert measures["candidates_open"] == [4, 4, 4, 4]
    assert measures["max_violation_by_layer"] == [load.max() / load.mean() - 1 for load in counted.loads]
    assert all(load_E.size == 8 for load_E in counted.loads_while_open().values())


def test_a_router_without_parameters_is_counted():
    router = Router.Config(score=HashScore.Config(), select=TopK.Config(top_k=1), balance=())
    layer = MoE.Config(num_experts=4, hidden_dim=8, router=router)
    model = Decoder.Config(vocab_size=64, dim=16, num_layers=1, feed_forward=layer).build(seed=0)
    assert not list(model.blocks[0].feed_forward.router.parameters())
    meter = LoadMeter(model)
    model(TOKENS)
    assert meter.count(training=False).loads[0].sum() == 48


def test_layers_of_a_pool_are_named_by_the_first_and_the_last():
    """In whatever order a set has 7 and 8."""
    routers: Any = [SimpleNamespace(layer=layer, destinations=SimpleNamespace(pool="p")) for layer in (7, 8)]
    counted = Counted(routers, [np.array([1, 2]), np.array([3, 4])], [None, np.array([True, False])])
    loads = counted.loads_while_open()
    assert {name: load_E.tolist() for name, load_E in loads.items()} == {"layers 7 to 8": [2.0, 6.0]}


def test_nan_scores_are_not_counted_where_a_router_looks_itself(routed_model, monkeypatch):
    monkeypatch.setattr("anabranch.train.meter.count_nan", None)
    model = Decoder(routed_model).train()
    meter = LoadMeter(model)
    model(TOKENS, TOKENS)
    assert meter.layers_with_nan() == []


def test_counters_are_where_the_routers_are():
    """Of a router without a tensor of its own, where the model is."""
    router = Router.Config(score=HashScore.Config(), select=TopK.Config(top_k=1), balance=())
    for config in (MoE.Config(router=router), MoE.Config()):
        with torch.device("meta"):
            model = Decoder.Config(num_layers=1, feed_forward=config).build()
        assert [counter.load_E.device.type for counter in LoadMeter(model)._counters] == ["meta"]
