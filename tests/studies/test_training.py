import logging

import numpy as np
import pytest

from anabranch.routing import TraceBuilder, TraceLayer
from anabranch.studies.training import _warnings, measure_routing


def trace_of(*layers, one_sequence=False):
    """A trace of (layer, index_NK) pairs with even weights; each token is an item of its own unless they are ``one_sequence``."""
    builder = TraceBuilder()
    for layer, index_NK in layers:
        index_NK = np.array(index_NK)
        token_N, zero_N = np.arange(len(index_NK)), np.zeros(len(index_NK), int)
        where = {"item_N": zero_N, "position_N": token_N} if one_sequence else {"item_N": token_N}
        builder.add(layer, index_NK, np.full(index_NK.shape, 0.5), **where)
    return builder.trace()


def test_two_layers_with_one_pool_by_hand():
    # Two layers of 2 experts share a pool of 4; layer 0 owns slots 0 and 1, layer 1 owns 2 and 3; one place per item.
    first = TraceLayer(layer=0, name="a", num_destinations=4, top_k=1, pool="p", own_start=0)
    second = TraceLayer(layer=1, name="b", num_destinations=4, top_k=1, pool="p", own_start=2)
    found = measure_routing(trace_of((first, [[0], [0], [0], [1]]), (second, [[0], [2], [2], [1]])))
    # Loads: layer 0 is 3 1 0 0 (mean 1, MaxVio 2), layer 1 is 1 1 2 0 (MaxVio 1); together 4 2 2 0 (mean 2, MaxVio 1).
    assert found["max_violation_layer"] == 2.0
    assert found["max_violation_mean"] == 1.5
    assert found["max_violation_pool"] == 1.0
    assert found["idle_fraction"] == 0.25  # slot 3
    assert found["foreign_share"] == 0.25  # none of layer 0's four choices, two of layer 1's
    assert found["same_expert_rate"] == 0.5  # items 0 and 3
    assert found["same_expert_chance"] == 0.25


def test_layers_of_their_own():
    layers = [TraceLayer(layer=number, name=str(number), num_destinations=2, top_k=1) for number in range(2)]
    found = measure_routing(trace_of((layers[0], [[0], [0], [0], [1]]), (layers[1], [[0], [1], [0], [1]])))
    assert found["max_violation_layer"] == found["max_violation_pool"] == 0.5
    assert found["foreign_share"] == 0.0
    assert found["idle_fraction"] == 0.0
    assert found["same_expert_rate"] is None


def test_idle_experts_of_pools_of_several_sizes_count_alike():
    wide = TraceLayer(layer=0, name="wide", num_destinations=6, top_k=1)
    narrow = TraceLayer(layer=1, name="narrow", num_destinations=2, top_k=1)
    found = measure_routing(trace_of((wide, [[0], [1], [2], [0]]), (narrow, [[0], [1], [0], [1]])))
    assert found["idle_fraction"] == pytest.approx(3 / 8)


def test_warnings_of_the_library_are_kept():
    with _warnings() as found:
        logging.getLogger("anabranch.experts.rexmoe").warning("reuse is %d", 6)
        logging.getLogger("anabranch.data").info("nothing to see")
        logging.getLogger("other").warning("not ours")
    logging.getLogger("anabranch").warning("too late")
    assert found == ["reuse is 6"]


def test_consistency_is_the_mean_over_layers_of_windows_of_sixteen_tokens():
    steady = [[0]] * 16 + [[1]] * 16
    restless = [[token % 2] for token in range(32)]
    layers = [TraceLayer(layer=number, name=str(number), num_destinations=2, top_k=1) for number in (0, 1)]
    parts = list(zip(layers, (steady, restless), strict=True))
    alone = [measure_routing(trace_of(part, one_sequence=True))["srp"] for part in parts]
    both = measure_routing(trace_of(*parts, one_sequence=True))["srp"]
    assert both == pytest.approx(sum(alone) / 2)
    assert alone[0] > alone[1]
    assert alone[1] == pytest.approx(2 * 16 / (16 + 32))  # half of every window: all on is best, F1 = 2 m / (on + m)
