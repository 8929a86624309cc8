"""`GRank` on one log gives what a peer with that log gives, whatever form the clicks come in."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import csv, parquet

from anabranch.errors import DataError, InputError
from anabranch.graph.rank import NONE, Defences, GRank, Item, Peer, Row, read_clicks

CLICKS = [
    *[("ann", "jazz", 1), ("ann", "Jazz ", 1), ("ann", "rock", 2)],
    *[("bob", "jazz", 1), ("bob", "jazz", 3), ("bob", "jazz", 3), ("bob", "jazz", 3), ("bob", "pop", 4)],
    *[("cid", "folk", 5), ("cid", "jazz", 6)],
]


def test_three_nodes_by_hand():
    """As for a peer: S_ann(bob) = (1 + 1) / 4 = 0.5, S_ann(cid) = 1 / 4; over the largest 1 and 0.5."""
    model = GRank(F=0.25, saturation=None).fit(CLICKS)
    assert model.nodes_.tolist() == ["ann", "bob", "cid"]
    assert model.terms_.tolist() == ["folk", "jazz", "pop", "rock"]
    assert model.num_clicks_ == 10
    assert model.similarity("ann").tolist() == [1.0, 1.0, 0.5]
    assert model.rank("jazz", node="ann") == [(1, 3.75), (3, 3.75), (6, 0.75)]
    assert model.rank("JAZZ", node="ann", k=1) == [(1, 3.75)]
    assert model.rank("jazz") == [(1, 3.0), (3, 3.0), (6, 1.0)]  # for everybody: all weigh 1
    assert GRank(click_cap=1).fit(CLICKS).rank("jazz") == [(1, 2.0), (3, 1.0), (6, 1.0)]
    assert model.rank("unheard", k=2) == [(1, 3.0), (3, 3.0)]  # the most clicked of all


MANY = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("stu"), st.integers(0, 5)), min_size=1, max_size=50)


@given(
    MANY,
    st.sampled_from([0.0, 0.5]),
    st.integers(0, 3),
    st.integers(0, 2),
    st.sampled_from(["cap", "log", None]),
    st.data(),
)
def test_equals_a_peer_with_all_rows(clicks, F, top, min_common, saturation, data):
    nodes = sorted({node for node, _, _ in clicks})
    node = data.draw(st.sampled_from(nodes))
    items = [Item(n, tags=("s",)) for n in data.draw(st.sets(st.integers(0, 7)))]
    limits = Defences(saturation=saturation, click_cap=2, min_common=min_common)
    peer = Peer(items, node, F, 0.0, top, defences=limits)
    number = dict.fromkeys(nodes, -1)
    for origin, term, item in clicks:
        if origin == node:
            peer.record(term, item)
        else:
            number[origin] += 1
            peer.merge({"from": origin, "rows": [Row(origin, number[origin], term, item).to_json()]})
    model = GRank(F, top, saturation=saturation, click_cap=2, min_common=min_common).fit(clicks, items=items)
    assert dict(zip(nodes, model.similarity(node), strict=True)) == pytest.approx(
        {j: peer.similarity(j) for j in nodes}
    )
    for term in {term for _, term, _ in clicks}:
        found, expected = model.rank(term, node, k=None), peer.rank(term)
        assert dict(found) == pytest.approx(dict(expected))
        places = {item: place for place, (item, _) in enumerate(expected)}
        scores = [round(score, 9) for _, score in found]
        if len(set(scores)) == len(scores):
            assert [places[item] for item, _ in found] == list(range(len(found)))


@given(MANY, st.integers(0, 50))
def test_counting_in_parts_is_counting_at_once(clicks, cut):
    whole = GRank().fit(clicks)
    parts = GRank().partial_fit(clicks[:cut]).partial_fit(clicks[cut:])
    for name in ("nodes_", "terms_", "items_", "_count_D", "_node_D", "_term_D", "_item_D"):
        assert np.array_equal(getattr(parts, name), getattr(whole, name)), name
    assert parts.rank("s", "a" if "a" in whole.nodes_ else None) == whole.rank(
        "s", "a" if "a" in whole.nodes_ else None
    )


def forms(tmp_path):
    nodes, terms, items = ([row[place] for row in CLICKS] for place in range(3))
    table = pa.table({"node": nodes, "term": terms, "item": items, "other": [0.5] * len(nodes)})
    parquet.write_table(table, tmp_path / "clicks.parquet")
    csv.write_csv(table, tmp_path / "clicks.csv")
    (tmp_path / "clicks.tsv").write_text("item\tterm\tnode\n" + "".join(f"{i}\t{t}\t{n}\n" for n, t, i in CLICKS))
    return {
        "rows": CLICKS,
        "iterator": iter(CLICKS),
        "arrays": (np.array(nodes), np.array(terms), np.array(items)),
        "lists": (nodes, terms, items),
        "table": table,
        "mapping": {"node": nodes, "term": terms, "item": np.array(items)},
        "parquet": tmp_path / "clicks.parquet",
        "csv": str(tmp_path / "clicks.csv"),
        "tsv": tmp_path / "clicks.tsv",
    }


def test_clicks_come_in_many_forms(tmp_path):
    expected = GRank().fit(CLICKS)
    for name, clicks in forms(tmp_path).items():
        model = GRank().fit(clicks)
        assert model.items_.tolist() == [1, 2, 3, 4, 5, 6], name
        assert model.rank("jazz", "ann") == expected.rank("jazz", "ann"), name
    renamed = {"user": ["a"], "query": ["q"], "doc": ["d"]}
    assert GRank().fit(renamed, columns=("user", "query", "doc")).rank("q") == [("d", 1.0)]
    numbers = GRank().fit((np.array([5, 5]), np.array([7, 8]), np.array([1, 2])))  # terms that are numbers are texts
    assert numbers.rank("7", node=5) == [(1, 1.0)]


def test_bad_clicks(tmp_path):
    bad = [
        ([("a", "t")], InputError, "click 0"),
        (["abc"], InputError, "click 0"),
        ((["a"], ["t", "u"], [1, 2]), InputError, "1 nodes, 2 terms and 2 items"),
        ({"node": ["a"], "term": ["t"]}, DataError, "no column 'item'"),
        (pa.table({"node": ["a", None], "term": ["t", "t"], "item": [1, 2]}), DataError, "click 1 has no node"),
        ((["a", ""], ["t", "t"], [1, 2]), DataError, "click 1 has the node ''"),
        ((["a"], ["t"], [1.5]), DataError, "click 0 has the item 1.5"),
        ((["a"], [None], [1]), DataError, "click 0 has the term None"),
        ((["a", 1], ["t", "t"], [1, 2]), DataError, "click 1 has the node 1"),
        ((np.zeros((2, 2), int), ["t"], [1]), InputError, "shape"),
        (tmp_path / "none.parquet", DataError, "cannot read clicks"),
        (tmp_path / "none.csv", DataError, "cannot read clicks"),
        (tmp_path / "clicks.xlsx", DataError, "cannot tell what"),
    ]
    for clicks, kind, message in bad:
        with pytest.raises(kind, match=message):
            read_clicks(clicks)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "ragged.csv").write_text("node,term,item\na,t,1\nb,t\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "gap.csv").write_text("node,term,item\na,t,1\nb,,2\n")
    for name in ("broken.parquet", "ragged.csv", "empty.csv"):
        with pytest.raises(DataError, match="cannot read clicks"):
            read_clicks(tmp_path / name)
    with pytest.raises(DataError, match="click 1 has no term"):
        read_clicks(tmp_path / "gap.csv")


def test_metadata_stand_above_clicks():
    items = [Item(1, tags=("jazz",)), Item(9, "Folk and jazz")]
    model = GRank().fit(CLICKS, items=items)
    assert [item for item, _ in model.rank("jazz", "ann")] == [1, 9, 3, 6]
    assert [item for item, _ in model.rank("folk and")] == [9]  # unseen term, an item that matches
    assert GRank().fit([], items=items).rank("jazz") == [(1, 0.0), (9, 0.0)]
    with pytest.raises(InputError, match="different types"):
        GRank().fit([("a", "jazz", "1")], items=items)


def test_no_clicks_at_all():
    model = GRank().fit([])
    assert model.rank("anything") == []
    assert model.num_clicks_ == 0
    with pytest.raises(InputError, match="no clicks of node 'a'"):
        model.rank("anything", node="a")
    assert model.partial_fit(CLICKS).rank("pop") == [(4, 1.0)]


def test_parameters_like_those_of_scikit_learn():
    model = GRank(F=2.0, click_cap=5)
    assert model.get_params()["F"] == 2.0
    assert GRank(**model.get_params()).get_params() == model.get_params()
    assert model.set_params(F=0.0, top_terms=1) is model
    assert (model.F, model.top_terms) == (0.0, 1)
    with pytest.raises(InputError, match="no parameter 'f'"):
        model.set_params(f=1)
    with pytest.raises(InputError, match="F is -1"):
        GRank(F=-1).fit(CLICKS)
    with pytest.raises(InputError, match="saturation is 'x'"):
        GRank(saturation="x").fit(CLICKS)
    clone = pytest.importorskip("sklearn.base").clone(model)
    assert clone.get_params() == model.get_params()
    fitted = GRank(saturation=None).fit(CLICKS)
    before = fitted.similarity("ann")
    assert not np.array_equal(fitted.set_params(top_terms=0).similarity("ann"), before)  # no stale terms


def test_bad_calls():
    with pytest.raises(InputError, match="call fit"):
        GRank().rank("jazz")
    model = GRank().fit(CLICKS)
    for node in ("zed", 1, ""):
        with pytest.raises(InputError, match="no clicks of node"):
            model.rank("jazz", node=node)
    with pytest.raises(InputError, match="k is 0"):
        model.rank("jazz", k=0)
    with pytest.raises(InputError, match="term"):
        model.rank("  ")
    with pytest.raises(InputError, match="do not mix"):
        model.partial_fit([("a", "t", "text")])


def test_held_out_clicks_are_scored():
    """Item 3 stands second for ann: 1 / log2(3); item 1 first: 1; an item never shown: 0."""
    model = GRank(saturation=None).fit(CLICKS)
    assert model.score([("ann", "jazz", 1)]) == 1.0
    assert model.score([("ann", "jazz", 3), ("new", "jazz", 77)]) == pytest.approx(0.5 / np.log2(3))
    assert model.score([]) == 0.0


def test_terms_with_one_key_are_one_term():
    model = GRank(term_key=lambda term: term[0]).fit(CLICKS)
    assert model.terms_.tolist() == ["J", "f", "j", "p", "r"]
    assert [item for item, _ in model.rank("jungle")] == [3, 1, 6]


def test_saved_and_read_back(tmp_path):
    items = [Item(1, "One", "Who", ("jazz",))]
    model = GRank(F=0.5, click_cap=2).fit(CLICKS, items=items)
    model.save(tmp_path / "model")
    read = GRank.load(tmp_path / "model")
    assert read.get_params() == model.get_params()
    for term in ("jazz", "folk", "unheard"):
        assert read.rank(term, "bob") == model.rank(term, "bob")
    assert read.partial_fit(CLICKS).num_clicks_ == 20
    empty = GRank().fit([])
    empty.save(tmp_path / "empty")
    assert GRank.load(tmp_path / "empty").partial_fit(CLICKS).rank("pop") == [(4, 1.0)]
    Peer((), "a", defences=NONE).save(tmp_path / "peer")
    with pytest.raises(DataError, match="not a rank model"):
        GRank.load(tmp_path / "peer")
    (tmp_path / "model").write_bytes((tmp_path / "model").read_bytes()[:-9])
    with pytest.raises(DataError, match="truncated"):
        GRank.load(tmp_path / "model")
