"""The vector store of LlamaIndex: its base class's contract, and the same answers as LlamaIndex's own store, which measures everything."""

import numpy as np
import pytest

from anabranch.errors import InputError

pytest.importorskip("llama_index.core", reason="needs the extra llama-index")

from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)

from anabranch.graph.adapters.llama_index import AnabranchVectorStore

ROWS = np.random.default_rng(0).normal(size=(60, 5))


def nodes(count=40):
    return [
        TextNode(
            id_=f"n{number}",
            text=f"text {number}",
            metadata={"number": number, "kind": "ab"[number % 2]},
            embedding=ROWS[number].tolist(),
            relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=f"doc{number % 4}")},
        )
        for number in range(count)
    ]


def made():
    ours, theirs = AnabranchVectorStore(), SimpleVectorStore()
    assert ours.add(nodes()) == theirs.add(nodes()) == [f"n{number}" for number in range(40)]
    return ours, theirs


def same(ours, theirs, **options):
    for row in ROWS[40:50]:
        query = VectorStoreQuery(query_embedding=row.tolist(), **{"similarity_top_k": 6, **options})
        found, wanted = ours.query(query), theirs.query(query)
        assert found.ids == wanted.ids
        np.testing.assert_allclose(found.similarities, wanted.similarities, atol=1e-6)
        assert [node.node_id for node in found.nodes] == found.ids


def only(**values):
    return MetadataFilters(filters=[MetadataFilter(key=key, value=value) for key, value in values.items()])


def test_answers_are_those_of_their_own_store():
    ours, theirs = made()
    assert isinstance(ours, BasePydanticVectorStore)
    assert (ours.stores_text, ours.is_embedding_query, ours.class_name()) == (True, True, "AnabranchVectorStore")
    same(ours, theirs)
    same(ours, theirs, filters=only(kind="a"))
    same(
        ours,
        theirs,
        filters=MetadataFilters(filters=[MetadataFilter(key="number", value=7, operator=FilterOperator.GT)]),
    )
    same(ours, theirs, filters=only(kind="none"))
    same(ours, theirs, node_ids=["n3", "n5", "nobody"])
    for store in (ours, theirs):
        store.delete("doc1")
        store.delete_nodes(["n0", "nobody"])
        store.delete_nodes(filters=only(number=2))
        store.add([*nodes(8)[4:], *nodes(60)[40:42]])
    same(ours, theirs, similarity_top_k=50)
    for store in (ours, theirs):
        store.clear()
    same(ours, theirs)


def test_nodes_come_back_whole():
    ours, _ = made()
    (node,) = ours.get_nodes(["n7", "nobody"])
    assert (node.text, node.metadata["number"], node.ref_doc_id) == ("text 7", 7, "doc3")
    assert [node.node_id for node in ours.get_nodes(filters=only(number=9))] == ["n9"]
    assert len(ours.get_nodes()) == len(ours.client) == 40
    found = ours.query(VectorStoreQuery(query_embedding=ROWS[7].tolist(), similarity_top_k=3, doc_ids=["doc3"]))
    assert found.ids[0] == "n7"
    assert {node.ref_doc_id for node in found.nodes} == {"doc3"}


@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
def test_persisted(tmp_path, metric):
    ours = AnabranchVectorStore(metric, M=8)
    ours.add(nodes())
    ours.persist(str(tmp_path / "store"))
    again = AnabranchVectorStore.from_persist_path(tmp_path / "store")
    assert again.metric == metric
    query = VectorStoreQuery(query_embedding=ROWS[50].tolist(), similarity_top_k=5)
    assert again.query(query).ids == ours.query(query).ids
    assert again.query(query).similarities == ours.query(query).similarities
    assert again.get_nodes(["n3"])[0].text == "text 3"


def test_what_it_does_not_do():
    ours, _ = made()
    with pytest.raises(InputError, match="the mode is hybrid"):
        ours.query(VectorStoreQuery(query_embedding=ROWS[0].tolist(), mode=VectorStoreQueryMode.HYBRID))
    with pytest.raises(InputError, match="has no embedding"):
        ours.query(VectorStoreQuery(query_str="x"))
    with pytest.raises(ValueError, match="embedding"):
        ours.add([TextNode(text="without")])
    assert len(ours.get_nodes()) == 40
