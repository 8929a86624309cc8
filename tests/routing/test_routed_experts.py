"""Records of vLLM's `routed_experts`: read in each form, refused where they are damaged, and replayed."""

import base64
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigError, DataError
from anabranch.lm.decoder import Decoder
from anabranch.nn.feed_forward import SwiGLU
from anabranch.nn.moe import MoE
from anabranch.routing import Router, record_routing, replay_routing
from anabranch.routing.routed_experts import routed_experts, routes_of, trace_of


def model(**fields):
    made = {
        "vocab_size": 20,
        "dim": 16,
        "num_layers": 3,
        "init_std": 0.5,
        "feed_forward": MoE.Config(num_experts=4, hidden_dim=16, router=Router.Config(balance=())),
        "dense_feed_forward": SwiGLU.Config(hidden_dim=16),
        "dense_layers": (0,),
    }
    return Decoder.Config(**(made | fields)).build(seed=0).eval()


def encoded(array):
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def recorded(decoder, token_BL):
    """What vLLM would give: all layers, dense ones as zeros, one row less than tokens."""
    with torch.no_grad(), record_routing(decoder) as recorder:
        decoder(token_BL)
    trace = recorder.trace()
    batch, length = token_BL.shape
    found = np.zeros((batch, length - 1, 3, 2), np.uint8)
    for layer in (1, 2):
        decisions = trace.decisions(layer)
        for item, position, index_K in zip(decisions.item_N, decisions.position_N, decisions.index_NK, strict=True):
            if position < length - 1:
                found[item, position, layer] = index_K
    return list(found)


@pytest.mark.parametrize(
    "form", [np.asarray, lambda array: array.tolist(), encoded, lambda array: encoded(array).encode()]
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_every_form_is_read(form, dtype):
    array = np.arange(24, dtype=dtype).reshape(4, 3, 2)
    found = routed_experts(form(array))
    assert found.dtype == np.int64
    assert (found == array).all()


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ("not base64!", "no .npy file in base64"),
        (base64.b64encode(b"abc").decode(), "no .npy file in base64"),
        (np.zeros((2, 3)), r"shape \[2, 3\]"),
        (np.zeros((2, 3, 2)), "float64"),
        (np.zeros((2, 3, 0), np.int64), r"shape \[2, 3, 0\]"),
        (np.full((2, 3, 2), -1), "names expert -1"),
        ([[[1, 2]], [[1]]], "no array"),
        (None, "object"),
    ],
)
def test_what_is_no_record_is_told(record, why):
    with pytest.raises(DataError, match=why):
        routed_experts(record)


@settings(max_examples=15)
@given(st.binary(max_size=200) | st.text(max_size=200))
def test_no_bytes_do_more_than_be_refused(record):
    with pytest.raises(DataError):
        routed_experts(record)


def test_an_array_of_objects_is_not_unpickled():
    with pytest.raises(DataError, match=r"no \.npy file"):
        routed_experts(encoded(np.array([[["a"]]], dtype=object)))


def test_routes_are_told_by_place_and_layer():
    record = np.array([[[0, 0], [1, 2], [3, 0]], [[0, 0], [2, 3], [0, 1]]])
    assert routes_of(record, [1, 2]) == {0: {1: (1, 2), 2: (3, 0)}, 1: {1: (2, 3), 2: (0, 1)}}
    # Of the layers that route alone, in their order.
    assert routes_of(record[:, 1:], [4, 7], start=5)[6] == {4: (2, 3), 7: (0, 1)}
    with pytest.raises(DataError, match="it is of another model"):
        routes_of(record, [4, 7])


def test_a_replayed_record_sends_tokens_where_it_says():
    decoder = model()
    token_BL = torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(0))
    trace = trace_of(decoder, [routed_experts(encoded(each)) for each in recorded(decoder, token_BL)])
    run = token_BL[:, :-1]
    with torch.no_grad():
        expected_BLV = decoder(run).logits_BLV
        with replay_routing(decoder, trace, weights="own"), record_routing(decoder) as again:
            replayed_BLV = decoder(run).logits_BLV
    assert torch.allclose(replayed_BLV, expected_BLV, atol=1e-6)
    for layer in (1, 2):
        ours, theirs = (np.sort(each.decisions(layer).index_NK, axis=1) for each in (again.trace(), trace))
        assert (ours == theirs).all()


def test_it_is_replayed_though_the_router_would_go_elsewhere():
    decoder = model()
    token_BL = torch.randint(0, 20, (1, 6), generator=torch.Generator().manual_seed(1))
    record = recorded(decoder, token_BL)
    with torch.no_grad():
        for block in decoder.blocks[1:]:
            block.feed_forward.router.score.weight.mul_(-1)
    trace = trace_of(decoder, [routed_experts(each) for each in record])
    with torch.no_grad(), replay_routing(decoder, trace, weights="own"), record_routing(decoder) as again:
        decoder(token_BL[:, :-1])
    assert (np.sort(again.trace().decisions(1).index_NK, axis=1) == np.sort(record[0][:, 1], axis=1)).all()


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (np.full((3, 3, 2), [0, 4]), "names expert 4 of layer 1"),
        (np.tile([0, 1, 2], (3, 3, 1)), "has 3 choices"),
        (np.zeros((3, 3, 2), np.int64), "one expert twice in layer 1"),
        (np.tile([0, 1], (3, 1, 1)), "it is of another model"),
    ],
)
def test_records_of_other_models_are_told(record, why):
    with pytest.raises(DataError, match=why):
        trace_of(model(), [record])


def test_a_dense_model_has_nothing_to_replay_into():
    dense = model(feed_forward=SwiGLU.Config(hidden_dim=16), dense_layers=())
    with pytest.raises(ConfigError, match="nothing to replay into"):
        trace_of(dense, [np.zeros((2, 3, 2), np.int64)])
