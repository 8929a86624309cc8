"""Scores that are not numbers: whatever decides in a model ends the pass, says where, and asks whom it may."""

import pytest
import torch

from anabranch.depth.duo_llm import DuoFFN, learned_router
from anabranch.errors import NotFiniteError
from anabranch.experts.chain import Chain
from anabranch.experts.versatile import VersatileFFN
from anabranch.lm import Decoder
from anabranch.nn import MoE
from anabranch.routing import RoutingContext
from anabranch.routing.layer_overrides import own_layers
from anabranch.routing.nan import refuse_nan

DESIGNS = {
    "moe": MoE.Config(num_experts=4, hidden_dim=8),
    "chain": Chain.Config(num_experts=4, hidden_dim=8),
    "duo": DuoFFN.Config(big=8, small=4, router=learned_router()),
    "versatile": VersatileFFN.Config(hidden_dim=16, num_experts=4),
    "loops alone": VersatileFFN.Config(hidden_dim=16, num_experts=4, fusion="depth_only"),
    "mixed loops": VersatileFFN.Config(hidden_dim=16, num_experts=4, gate="soft"),
}


@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("training", [False, True])
def test_whatever_decides_refuses_items_that_are_not_finite(name, training):
    model = Decoder.Config(vocab_size=8, dim=16, num_layers=2, feed_forward=DESIGNS[name]).build(seed=0)
    x_ND = torch.randn(5, 16)
    x_ND[2, 3] = torch.nan
    padding_N = torch.tensor([True, True, False, True, True])
    layers = own_layers(model)
    assert layers
    for layer in layers:
        decide = layer.router
        with pytest.raises(NotFiniteError, match=rf"of layer {decide.layer} has NaN scores for 1 of 5 items"):
            decide(x_ND, RoutingContext(training=training))
        assert decide(x_ND, RoutingContext(training=training, refuses_nan=False)).num_items == 5
        assert decide(x_ND, RoutingContext(training=training, item_mask_N=padding_N)).num_items == 5


def test_a_loop_gate_says_that_it_is_one():
    model = Decoder.Config(vocab_size=8, dim=16, num_layers=2, feed_forward=DESIGNS["loops alone"]).build(seed=0)
    x_ND = torch.full((1, 16), torch.inf)
    with pytest.raises(NotFiniteError, match=r"the loop gate of layer 1 .* or the loop gate's weights, are not finite"):
        model.blocks[1].feed_forward.paths.loops(x_ND, RoutingContext())


def test_the_row_of_a_batch_is_named():
    score_NE = torch.zeros(6, 3)
    score_NE[4, 1] = torch.nan
    with pytest.raises(NotFiniteError, match="1 of 6 items, first in row 2 of the batch: what comes"):
        refuse_nan(score_NE, RoutingContext(sequence_length=2), 0)


def test_the_row_is_that_of_a_real_item_and_of_no_stream():
    score_NE = torch.zeros(6, 3)
    score_NE[1, 0] = score_NE[4, 1] = torch.nan
    real_N = torch.arange(6) != 1
    with pytest.raises(NotFiniteError, match="1 of 6 items, first in row 2 of the batch: what comes"):
        refuse_nan(score_NE, RoutingContext(sequence_length=2, item_mask_N=real_N), 0)
    # Of two streams, rows 0 to 2 are the same sequences as rows 3 to 5.
    with pytest.raises(NotFiniteError, match="2 of 6 items: what comes"):
        refuse_nan(score_NE, RoutingContext(sequence_length=1, num_streams=2), 0)
