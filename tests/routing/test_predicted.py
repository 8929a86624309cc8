"""What a model predicts stands beside what it routed: the right token on every row, or an error."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from anabranch.errors import DataError
from anabranch.experts.parscale import ParScale
from anabranch.lm import Decoder
from anabranch.nn import MoE, SelfAttention
from anabranch.routing import RoutingTrace, measure, record_routing
from anabranch.routing.predicted import with_predictions


def model_of(**fields):
    attention = SelfAttention.Config(num_heads=2)
    layer = MoE.Config(num_experts=4, hidden_dim=8)
    config = Decoder.Config(vocab_size=19, dim=16, num_layers=2, attention=attention, feed_forward=layer, **fields)
    return config.build(seed=0).eval()


def recorded(model, batches, **options):
    """A trace of these passes, and what they predict."""
    with record_routing(model, **options) as recorder, torch.no_grad():
        passes = [(token_BL.numpy(), model(token_BL).logits_BLV.argmax(-1).numpy()) for token_BL in batches]
    return recorder.trace(), passes


def tokens(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(19, shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("streams", [1, 2])
def test_every_row_has_what_the_model_predicts_there(scores, streams, tmp_path):
    more = {"streams": ParScale.Config(num_streams=2, prefix_len=2, embedding_dim=8, mlp_dim=8)} if streams == 2 else {}
    trace, passes = recorded(model_of(**more), tokens((3, 7), (2, 7), (1, 4)), scores=scores)
    with_predictions(trace, passes).write(tmp_path / "trace.parquet")
    found = RoutingTrace.read(tmp_path / "trace.parquet")
    assert found.table.column_names == [*trace.table.column_names, "predicted"]
    assert found.table.drop_columns("predicted").equals(trace.table)
    for _, decisions in found:
        seen = {}
        for item, position, token, predicted in zip(
            decisions.item_N, decisions.position_N, decisions.token_N, decisions.predicted_N, strict=True
        ):
            seen.setdefault(int(item), []).append((int(position), int(token), int(predicted)))
        item = 0
        for token_BL, predicted_BL in passes:
            for _ in range(streams):
                for row in range(len(token_BL)):
                    expected = list(
                        zip(range(token_BL.shape[1]), token_BL[row].tolist(), predicted_BL[row].tolist(), strict=True)
                    )
                    assert sorted(seen[item]) == expected
                    item += 1
        assert item == len(seen)
    assert trace.decisions(0).predicted_N is None


def test_predictions_of_other_passes_are_refused():
    trace, passes = recorded(model_of(), tokens((3, 7)))
    with pytest.raises(DataError, match="the trace has 3 sequences, which 2 sequences of predictions do not fit"):
        with_predictions(trace, [(passes[0][0][:2], passes[0][1][:2])])
    with pytest.raises(DataError, match="the trace has positions to 6, and the predictions are of 5"):
        with_predictions(trace, [(passes[0][0][:, :5], passes[0][1][:, :5])])
    with pytest.raises(DataError, match="the tokens of the trace are not those of the predictions"):
        with_predictions(trace, [(passes[0][0] + 1, passes[0][1])])


def test_the_next_token_is_that_of_the_next_position_of_the_item():
    trace, _ = recorded(model_of(), tokens((3, 7), (2, 5)))
    decisions = trace.decisions(1)
    places = list(zip(decisions.item_N.tolist(), decisions.position_N.tolist(), strict=True))
    at = dict(zip(places, decisions.token_N.tolist(), strict=True))
    expected = [at.get((item, position + 1), -1) for item, position in places]
    assert measure.next_tokens(decisions).tolist() == expected
    assert expected.count(-1) == 5
    assert np.array_equal(measure.next_tokens(trace.decisions(0)), measure.next_tokens(decisions))


def test_a_single_sequence_has_its_predictions():
    trace, passes = recorded(model_of(), tokens((1, 4)))
    found = with_predictions(trace, passes).decisions(0).predicted_N
    assert found.tolist() == passes[0][1][0].tolist()


def test_an_empty_trace_and_no_predictions_fit_each_other_alone():
    trace, passes = recorded(model_of(), tokens((2, 4)))
    empty = RoutingTrace(trace.table.slice(0, 0), trace.layers)
    for given in ([], passes):
        found = with_predictions(empty, given)
        assert len(found) == 0
        assert found.table.column_names == [*trace.table.column_names, "predicted"]
    with pytest.raises(DataError, match="the trace has positions to 3, and the predictions are of 0"):
        with_predictions(trace, [])


def test_rows_without_a_token_have_no_prediction():
    """Padding: null in the trace, -1 beside it."""
    trace, ((token_BL, predicted_BL),) = recorded(model_of(), tokens((2, 4)))
    at = (trace.table["item"].to_numpy() == 1) & (trace.table["position"].to_numpy() == 3)
    field = trace.table.schema.field("token")
    column = pa.array(trace.table["token"].to_numpy(), field.type, mask=at)
    padded = trace.table.set_column(trace.table.column_names.index("token"), field, column)
    token_BL, predicted_BL = token_BL.copy(), predicted_BL.copy()
    token_BL[1, 3] = predicted_BL[1, 3] = -1
    found = with_predictions(RoutingTrace(padded, trace.layers), [(token_BL, predicted_BL)])
    assert found.table["predicted"].is_null().to_numpy().tolist() == at.tolist()
