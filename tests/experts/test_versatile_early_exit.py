"""The early exit: items sorted by their loops, those that go on first, give what all loops for all items would."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from anabranch.experts.versatile import VersatileFFN
from anabranch.experts.versatile.early_exit import EarlyExit
from anabranch.experts.versatile.paths import Mix
from anabranch.nn import BuildContext, RMSNorm
from anabranch.routing import RoutingContext

LOOPS, DIM = 3, 8


def layer_of(**changes):
    config = VersatileFFN.Config(**{"hidden_dim": 12, "num_experts": 4, "max_loops": LOOPS, **changes})
    return config.build(BuildContext(DIM, init_std=0.4, residual_std=0.4, generator=torch.Generator().manual_seed(0)))


def parts(layer, loops, seed=0):
    """What an early exit is made of, where items take ``loops``."""
    x_ND = torch.randn(len(loops), DIM, generator=torch.Generator().manual_seed(seed))
    loops_N, context = torch.tensor(loops), RoutingContext()
    width = None if layer.paths.router is None else layer.paths.router(x_ND, context)
    share_N1 = (LOOPS - loops_N.unsqueeze(1)) / LOOPS
    share_N1 = share_N1.masked_fill(share_N1 <= layer.config.width_threshold, 0.0)
    mix = Mix(width, F.one_hot(loops_N - 1, LOOPS).float(), loops_N, share_N1)
    return x_ND, layer.branch(RMSNorm(DIM)), mix, context


LAYERS = {
    "fused": {},
    "grouped": {"width_compute": "grouped"},
    "threshold": {"width_threshold": 0.5},
    "own norm": {"norm": "separate"},
    "gelu": {"activation": "gelu"},
}


@pytest.mark.parametrize("name", LAYERS)
@given(loops=st.lists(st.integers(1, LOOPS), min_size=1, max_size=9), seed=st.integers(0, 9))
def test_equals_all_loops_for_all_items(name, loops, seed):
    layer = layer_of(**LAYERS[name])
    with torch.no_grad():
        x_ND, branch, mix, context = parts(layer, loops, seed)
        found = EarlyExit(layer.paths, branch, mix, context).change(x_ND)
        torch.testing.assert_close(found, layer.paths._all_loops(x_ND, branch, mix, context), atol=1e-5, rtol=1e-5)


def test_ranges_by_hand():
    """Loops 1 3 2 1 3, sorted 3 3 2 1 1: five take one loop, three two, two three; all but those of three have a width path."""
    layer = layer_of()
    _, branch, mix, context = parts(layer, [1, 3, 2, 1, 3])
    exits = EarlyExit(layer.paths, branch, mix, context)
    assert exits.order_N.tolist() == [1, 4, 2, 0, 3]
    assert exits.active == [5, 3, 2]
    assert (exits.wide_from, exits.fused_from) == (2, 3)
    _, branch, mix, context = parts(layer_of(width_threshold=0.5), [1, 3, 2, 1, 3])
    exits = EarlyExit(layer_of(width_threshold=0.5).paths, branch, mix, context)
    assert (exits.wide_from, exits.fused_from) == (3, 3)


def test_items_that_are_all_alike_are_left_in_their_order():
    layer = layer_of()
    exits = EarlyExit(layer.paths, *parts(layer, [2, 2, 2])[1:])
    assert not exits.is_sorted
    assert exits.order_N == slice(None)
