import pytest
import torch

from anabranch.lm import Decoder
from anabranch.train.meter import LoadMeter

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
