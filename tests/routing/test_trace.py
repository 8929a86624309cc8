"""The trace: a table worked by hand, exact round trips, files, and what is said about broken ones."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from anabranch.errors import CapacityError, DataError
from anabranch.routing.decision import Routing
from anabranch.routing.trace import RoutingTrace, concat
from anabranch.routing.trace_builder import TraceBuilder, TraceWriter
from anabranch.routing.trace_schema import SCHEMA, TraceLayer

LAYER = TraceLayer(layer=3, name="layers.3.router", num_destinations=4, top_k=2)


def built(index_NK, weight_NK=None, layer=LAYER, **columns):
    index_NK = np.asarray(index_NK)
    builder = TraceBuilder()
    columns.setdefault("item_N", np.arange(len(index_NK)))
    builder.add(layer, index_NK, np.where(index_NK < 0, 0, 0.5) if weight_NK is None else weight_NK, **columns)
    return builder.trace()


def test_rows_of_a_case_worked_by_hand():
    # Three items over 4 destinations: the first uses both choices, the second only its second, the third none.
    trace = built(
        [[2, 0], [-1, 1], [-1, -1]],
        [[0.75, 0.25], [0.0, 0.5], [0.0, 0.0]],
        item_N=[7, 7, 9],
        position_N=[0, 1, 0],
        token_N=[65, 66, 67],
        domain="code",
    )
    rows = trace.table.to_pydict()
    assert rows == {
        "item": [7, 7, 7, 9],
        "position": [0, 0, 1, 0],
        "layer": [3, 3, 3, 3],
        "rank": [0, 1, 1, 0],
        "destination": [2, 0, 1, -1],
        "weight": [0.75, 0.25, 0.5, 0.0],
        "token": [65, 65, 66, 67],
        "domain": ["code"] * 4,
    }
    assert trace.load_E(3).tolist() == [1, 1, 1, 0]
    assert trace.domains == ["code"]
    assert trace.table.schema.equals(SCHEMA)


@st.composite
def decisions(draw):
    shape = draw(st.tuples(st.integers(0, 6), st.integers(1, 4)))
    num_destinations = draw(st.integers(1, 5))
    index_NK = draw(arrays(np.int64, shape, elements=st.integers(-1, num_destinations - 1)))
    weight = arrays(np.float32, shape, elements=st.floats(-4, 4, width=32))
    return index_NK, np.where(index_NK < 0, np.float32(0), draw(weight)), num_destinations


@given(decisions())
def test_a_routing_comes_back_exactly(case):
    index_NK, weight_NK, num_destinations = case
    layer = TraceLayer(layer=0, name="r", num_destinations=num_destinations, top_k=index_NK.shape[1])
    # Where all choices are used, one item may even come several times in a row: its ranks start again.
    trace = built(index_NK, weight_NK, layer, item_N=np.arange(len(index_NK)) * (index_NK < 0).any())
    routing = trace.routing(0)
    assert torch.equal(routing.index_NK, torch.from_numpy(index_NK))
    assert torch.equal(routing.weight_NK, torch.from_numpy(weight_NK))
    expected = Routing(
        torch.from_numpy(index_NK), torch.from_numpy(weight_NK), torch.zeros(len(index_NK), num_destinations)
    )
    assert torch.equal(routing.load_E(), expected.load_E())
    assert trace.load_E(0).tolist() == expected.load_E().tolist()


def test_scores_are_the_weights_of_the_chosen():
    score_NE = torch.tensor([[0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])
    weight_NK, index_NK = score_NE.topk(3)
    trace = built(index_NK, weight_NK, TraceLayer(layer=0, name="r", num_destinations=3, top_k=3))
    assert torch.equal(trace.routing(0).score_NE, score_NE)


def two_layers():
    builder = TraceBuilder()
    generator = np.random.default_rng(0)
    for batch, domain in enumerate(["books", None, "code"]):
        for number in (1, 0):  # layers need not come in order
            layer = TraceLayer(
                layer=number, name=f"r{number}", num_destinations=6, top_k=2, pool="group0", own_start=3 * number
            )
            index_NK = np.stack([generator.permutation(6)[:2] for _ in range(5)])
            token_N = generator.integers(0, 99, 5) if batch else -1
            item_N, position_N = np.full(5, batch), np.arange(5)
            builder.add(
                layer,
                index_NK,
                generator.random((5, 2)),
                item_N=item_N,
                position_N=position_N,
                token_N=token_N,
                domain=domain,
            )
    return builder.trace()


def test_each_layer_is_found_among_the_rows_of_others():
    trace = two_layers()
    for number in (0, 1):
        rows = trace.table.filter(pa.compute.equal(trace.table["layer"], number))
        decided = trace.decisions(number)
        assert decided.index_NK.reshape(-1).tolist() == rows["destination"].to_pylist()
        assert decided.item_N.tolist() == [0] * 5 + [1] * 5 + [2] * 5
        assert decided.position_N.tolist() == [0, 1, 2, 3, 4] * 3
        assert decided.domain_N.tolist() == [0] * 5 + [-1] * 5 + [1] * 5
        assert (decided.token_N == -1).tolist() == [True] * 5 + [False] * 10
    assert [layer.layer for layer, _ in trace] == [0, 1]
    assert trace.load_LE().sum(1).tolist() == [30, 30]
    assert trace.load_LE("code").sum(1).tolist() == [10, 10]


def test_pool_slots_owned_by_each_layer():
    trace = two_layers()
    assert [layer.layer for layer in trace.pools["group0"]] == [0, 1]
    assert trace.own_slots(0) == range(0, 3)
    assert trace.own_slots(1) == range(3, 6)
    assert built([[0, 1]]).pools == {"layers.3.router": [LAYER]}
    assert built([[0, 1]]).own_slots(3) == range(4)


def test_loads_of_layers_of_different_width_are_padded():
    wide = TraceLayer(layer=1, name="wide", num_destinations=6, top_k=1)
    trace = concat([built([[0, 1]]), built([[5]], layer=wide)])
    assert trace.load_LE().tolist() == [[0, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 0]]


def test_file_round_trip(tmp_path):
    trace = two_layers()
    trace.write(tmp_path / "deep" / "trace.parquet")
    read = RoutingTrace.read(tmp_path / "deep" / "trace.parquet")
    assert read.table.equals(trace.table)
    assert read.layers == trace.layers
    assert read.domains == ["books", "code"]
    only = RoutingTrace.read(tmp_path / "deep" / "trace.parquet", layers=[1])
    assert only.layers == trace.layers[1:]
    assert only.table.to_pydict() == trace.table.filter(pa.compute.equal(trace.table["layer"], 1)).to_pydict()


def test_empty_trace(tmp_path):
    trace = concat([])
    trace.write(tmp_path / "t.parquet")
    read = RoutingTrace.read(tmp_path / "t.parquet")
    assert len(read) == 0
    assert read.domains == []
    assert read.load_LE().shape == (0, 0)
    nothing = built(np.empty((0, 2), int))
    assert nothing.routing(3).index_NK.shape == (0, 2)
    assert nothing.load_E(3).tolist() == [0, 0, 0, 0]


def test_writer_streams_row_groups(tmp_path):
    whole = TraceBuilder()
    with TraceWriter(tmp_path / "t.parquet", rows_per_group=8) as writer:
        for batch, domain in enumerate(["a", "b", None]):
            for sink in (writer, whole):
                sink.add(LAYER, [[0, 1]] * 5, [[0.5, 0.5]] * 5, item_N=np.arange(5) + 5 * batch, domain=domain)
    assert pq.ParquetFile(tmp_path / "t.parquet").num_row_groups == 4  # 10 + 10 + 10 rows, and an empty rest
    read = RoutingTrace.read(tmp_path / "t.parquet")
    assert read.table.to_pydict() == whole.trace().table.to_pydict()
    assert read.load_E(3, "b").tolist() == [5, 5, 0, 0]


def test_writer_leaves_nothing_after_an_error(tmp_path):
    def fail():
        with TraceWriter(tmp_path / "t.parquet") as writer:
            writer.add(LAYER, [[0, 1]], [[0.5, 0.5]], item_N=[0])
            raise FileNotFoundError("of the caller")

    with pytest.raises(FileNotFoundError, match="of the caller"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_concat_renumbers_and_keeps_the_widest_top_k():
    narrow = built([[0], [1]], layer=TraceLayer(layer=3, name="layers.3.router", num_destinations=4, top_k=1))
    both = concat([built([[0, 1]]), narrow, built([[0, 1]])], renumber=True)
    assert both.table["item"].to_pylist() == [0, 0, 1, 2, 3, 3]
    assert both.layers == (LAYER,)
    assert concat([narrow, narrow]).table["item"].to_pylist() == [0, 1, 0, 1]


def test_domains_of_joined_traces_agree():
    both = concat([built([[0, 1]], domain="code"), built([[0, 2]], domain="books"), built([[3, 2]])])
    assert both.domains == ["books", "code"]
    assert both.load_E(3, "code").tolist() == [1, 1, 0, 0]
    assert both.load_E(3, "books").tolist() == [1, 0, 1, 0]
    assert both.load_E(3).tolist() == [2, 1, 2, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: built([[0, 4]]), r"layer 3 has destination 4; -1 to 3 are allowed"),
        (
            lambda: concat(
                [built([[0, 1]]), built([[0]], layer=TraceLayer(layer=3, name="x", num_destinations=9, top_k=1))]
            ),
            "in two ways",
        ),
        (lambda: RoutingTrace(built([[0, 1]]).table, []), "rows name layer 3, but the trace describes none"),
        (lambda: RoutingTrace(pa.table({"item": [1]}), [LAYER]), "needs a column 'position'; this table has item"),
        (
            lambda: RoutingTrace(_cast("token", pa.int64()), [LAYER]),
            "column 'token' of a routing trace is int32, not int64",
        ),
        (
            lambda: RoutingTrace(built([[0, 1]]).table.append_column("x", [[1, 2]]), [LAYER]),
            "columns of a routing trace are item, ",
        ),
        (lambda: built([[0, 1]]).load_E(4), "no layer 4; it has 3"),
        (lambda: built([[0, 1]], domain="code").load_E(3, "prose"), "no domain 'prose'; it has code"),
    ],
)
def test_messages(make, message):
    with pytest.raises(DataError, match=message):
        make()


def _cast(name, dtype):
    table = built([[0, 1]]).table
    return table.set_column(table.schema.get_field_index(name), name, table[name].cast(dtype))


def test_messages_about_files(tmp_path):
    path = tmp_path / "t.parquet"
    with pytest.raises(DataError, match="no routing trace at"):
        RoutingTrace.read(path)
    path.write_bytes(b"not parquet")
    with pytest.raises(DataError, match="cannot be read as a Parquet file: "):
        RoutingTrace.read(path)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(DataError, match="is a Parquet file but no routing trace"):
        RoutingTrace.read(path)
    for metadata, message in [
        ('{"version": 99, "layers": []}', "of version 99; this program reads version 1"),
        ("{", "damaged trace metadata"),
        ('{"version": 1, "layers": [{"no": 1}]}', "damaged trace metadata"),
    ]:
        pq.write_table(SCHEMA.empty_table().replace_schema_metadata({"anabranch.trace": metadata}), path)
        with pytest.raises(DataError, match=message):
            RoutingTrace.read(path)
    pq.write_table(
        pa.table({"a": [1]}).replace_schema_metadata({"anabranch.trace": '{"version": 1, "layers": []}'}), path
    )
    with pytest.raises(DataError, match=r"t\.parquet: a routing trace needs a column 'item'"):
        RoutingTrace.read(path)
    built([[0, 1]]).write(path)
    with pytest.raises(DataError, match="has no layer 5; it has 3"):
        RoutingTrace.read(path, layers=[5])
    path.write_bytes(path.read_bytes()[:-100])  # cut short, as a copy that failed
    with pytest.raises(DataError, match="cannot be read as a Parquet file"):
        RoutingTrace.read(path)


def test_bad_place_to_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        built([[0, 1]]).write(tmp_path / "file" / "t.parquet")


def test_columns_that_may_be_empty():
    assert [field.name for field in SCHEMA if field.nullable] == ["token", "domain"]


def scored(scores=True):
    """Two items by hand: the second goes to one destination alone, in its second place, and was not drawn."""
    builder = TraceBuilder(scores=scores)
    builder.add(
        LAYER,
        [[2, 0], [-1, 1]],
        [[0.75, 0.25], [0.0, 0.5]],
        item_N=[7, 8],
        score_NE=[[0.25, 0.0, 0.75, 0.0], [0.5, 0.5, 0.0, 0.0]],
        propensity_NK=[[0.875, 0.5], [np.nan, np.nan]],
    )
    return builder.trace()


def test_scores_and_propensities_by_hand(tmp_path):
    trace = scored()
    rows = trace.table.to_pydict()
    assert rows["scores"] == [[0.25, 0.0, 0.75, 0.0], None, [0.5, 0.5, 0.0, 0.0]]
    assert rows["propensity"] == [0.875, 0.5, None]
    trace.write(tmp_path / "t.parquet")
    with TraceWriter(tmp_path / "streamed.parquet", rows_per_group=1, scores=True) as writer:
        for part, item in enumerate((7, 8)):
            decided = trace.decisions(3)
            writer.add(
                LAYER,
                decided.index_NK[[part]],
                decided.weight_NK[[part]],
                item_N=[item],
                score_NE=decided.score_NE[[part]],
                propensity_NK=decided.propensity_NK[[part]],
            )
    for again in (trace, *(RoutingTrace.read(tmp_path / name) for name in ("t.parquet", "streamed.parquet"))):
        assert again.table.equals(trace.table)
        decided, routing = again.decisions(3), again.routing(3)
        assert decided.score_NE.tolist() == [[0.25, 0.0, 0.75, 0.0], [0.5, 0.5, 0.0, 0.0]]
        assert np.array_equal(decided.propensity_NK, np.float32([[0.875, 0.5], [np.nan, np.nan]]), equal_nan=True)
        assert routing.score_NE.tolist() == decided.score_NE.tolist()
        assert routing.propensity_NK[0].tolist() == [0.875, 0.5]
        assert np.isnan(again.column("propensity", 3)).tolist() == [False, False, True]


def test_a_trace_without_scores_is_what_it_always_was(tmp_path):
    """Older versions read it: neither a column nor a word of the metadata is new."""
    trace = scored(scores=False)
    assert trace.table.schema.equals(SCHEMA)
    assert trace.table.schema.metadata == {
        b"anabranch.trace": b'{"version": 1, "layers": [{"layer": 3, "name": "layers.3.router", "num_destinations": 4, "top_k": 2, '
        b'"pool": "layers.3.router", "own_start": 0, "pool_size": 4}]}'
    }
    decided = trace.decisions(3)
    assert decided.score_NE is None
    assert decided.propensity_NK is None
    assert trace.routing(3).score_NE.tolist() == [[0.25, 0.0, 0.75, 0.0], [0.0, 0.5, 0.0, 0.0]]
    with pytest.raises(DataError, match="the trace has no column 'propensity' of one value per row; it has item, "):
        trace.column("propensity", 3)


def test_traces_with_and_without_scores_are_joined():
    both = concat([scored(scores=False), scored()], renumber=True)
    assert np.isnan(both.decisions(3).score_NE[:2]).all()
    assert both.decisions(3).score_NE[2:].tolist() == scored().decisions(3).score_NE.tolist()
    assert both.routing(3).score_NE[:2].tolist() == scored(scores=False).routing(3).score_NE.tolist()


def test_weights_that_were_rounded_say_so(tmp_path):
    layer = TraceLayer(layer=3, name="x", num_destinations=4, top_k=1, weight_dtype="float64")
    trace = concat(
        [built([[1]], layer=TraceLayer(layer=3, name="x", num_destinations=4, top_k=1)), built([[0]], layer=layer)]
    )
    trace.write(tmp_path / "t.parquet")
    assert RoutingTrace.read(tmp_path / "t.parquet").layers == (layer,)


def test_scores_are_written_before_they_take_more_memory_than_rows_may(tmp_path):
    layer = TraceLayer(layer=0, name="x", num_destinations=32, top_k=1)
    with TraceWriter(tmp_path / "t.parquet", rows_per_group=10, scores=True) as writer:
        for item in range(4):
            writer.add(layer, [[3]], [[1.0]], item_N=[item], score_NE=np.full((1, 32), item))
    groups = pq.ParquetFile(tmp_path / "t.parquet").metadata
    assert [groups.row_group(number).num_rows for number in range(groups.num_row_groups)][:2] == [2, 2]
    assert RoutingTrace.read(tmp_path / "t.parquet").decisions(0).score_NE.mean(1).tolist() == [0.0, 1.0, 2.0, 3.0]


def test_more_scores_than_a_table_holds_are_told(monkeypatch):
    monkeypatch.setattr("anabranch.routing.trace_builder.MOST_SCORES", 8)
    with pytest.raises(CapacityError, match=r"there are 8 scores, and a table in memory holds 8; record to a file"):
        scored()


def test_messages_about_scores():
    with pytest.raises(DataError, match=r"scores of layer 3 have shape \[1, 2\]; it has 4 destinations"):
        TraceBuilder(scores=True).add(LAYER, [[0]], [[1.0]], item_N=[0], score_NE=[[1.0, 2.0]])
    table = scored().table
    for name, values, message in (
        ("scores", [[1.0] * 4, None, [1.0] * 3], "layer 3 has 3 scores of one item; it has 4 destinations"),
        ("scores", [[1.0] * 4, None, [1.0, 1.0, 1.0, None]], "a score is missing among those of one item"),
        ("propensity", [0.5, 1.5, None], "a propensity is 1.5; probabilities are 0 to 1"),
    ):
        place = table.schema.get_field_index(name)
        wrong = table.set_column(place, table.schema.field(place), pa.array([*values], table.schema.field(place).type))
        with pytest.raises(DataError, match=message):
            RoutingTrace(wrong, [LAYER])
    swapped = table.select([*SCHEMA.names, "propensity", "scores"])
    with pytest.raises(DataError, match=r"not item, .*\(scores, propensity, predicted may follow\)"):
        RoutingTrace(swapped, [LAYER])


def test_a_builder_that_was_emptied_begins_anew():
    builder = TraceBuilder()
    builder.add(LAYER, [[0, 1]], [[0.5, 0.5]], item_N=[0])
    assert builder.num_rows == 2
    assert builder.take().num_rows == 2
    assert builder.num_rows == 0
    assert builder.take().num_rows == 0
