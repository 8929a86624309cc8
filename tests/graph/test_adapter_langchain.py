"""The vector store of LangChain, by LangChain's own tests of vector stores."""

import numpy as np
import pytest

from anabranch.errors import InputError

pytest.importorskip("langchain_core", reason="needs the extra langchain")
tests = pytest.importorskip("langchain_tests.integration_tests", reason="needs langchain-tests, LangChain's own tests")

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings

from anabranch.graph.adapters.langchain import AnabranchVectorStore


class TestStandard(tests.VectorStoreIntegrationTests):
    """Theirs."""

    @pytest.fixture
    def vectorstore(self):
        return AnabranchVectorStore(self.get_embeddings())


class Words(Embeddings):
    """One number per letter."""

    def embed_query(self, text):
        return [1.0 + text.count(letter) for letter in "abcdefgh"]

    def embed_documents(self, texts):
        return [self.embed_query(text) for text in texts]


TEXTS = ["aaa", "aab", "bbb", "ccc", "cch"]


def made(**options):
    return AnabranchVectorStore.from_texts(
        TEXTS, Words(), [{"n": n, "odd": n % 2 == 1} for n in range(5)], ids=list("vwxyz"), **options
    )


def test_the_nearest_are_those_of_all_distances():
    store, vectors = made(), np.array(Words().embed_documents(TEXTS))
    query = np.array(Words().embed_query("ab"))
    truth = 1 - vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    found = store.similarity_search_with_score("ab", k=3)
    assert [document.page_content for document, _ in found] == [TEXTS[n] for n in np.argsort(truth, kind="stable")[:3]]
    np.testing.assert_allclose([score for _, score in found], np.sort(truth)[:3], atol=1e-6)
    assert found[0][0] == Document(page_content="aab", metadata={"n": 1, "odd": True}, id="w")
    assert store.similarity_search_by_vector(query.tolist(), 3) == [document for document, _ in found]
    relevant = store.similarity_search_with_relevance_scores("ab", k=3)
    np.testing.assert_allclose([score for _, score in relevant], 1 - np.sort(truth)[:3], atol=1e-6)


def test_filters_and_unlike_ones():
    store = made()
    assert [one.id for one in store.similarity_search("aaa", k=5, filter={"odd": True})] == ["w", "y"]
    assert [one.id for one in store.similarity_search("aaa", k=5, filter=lambda one: one.metadata["n"] > 3)] == ["z"]
    assert store.similarity_search("aaa", k=5, filter={"none": 1}) == []
    chosen = store.max_marginal_relevance_search("aaa", k=2, lambda_mult=0.0)
    assert chosen[0].id == "v"
    assert len({one.id for one in chosen}) == 2
    assert len(store.as_retriever(search_kwargs={"k": 2}).invoke("aaa")) == 2


@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
def test_saved_and_loaded(tmp_path, metric):
    store = made(metric=metric)
    store.delete(["x"])
    store.save_local(tmp_path)
    again = AnabranchVectorStore.load_local(tmp_path, Words())
    assert again.similarity_search_with_relevance_scores("cch", 4) == store.similarity_search_with_relevance_scores(
        "cch", 4
    )
    assert len(again) == 4
    again.delete()
    assert (len(again), again.similarity_search("a")) == (0, [])
    assert again.add_texts(["b"]) != again.add_texts(["b"])


def test_lists_of_different_lengths():
    store = made()
    with pytest.raises(InputError, match="2 texts, 1 metadatas and 2 ids"):
        store.add_texts(["a", "b"], [{}])
    with pytest.raises(InputError, match="cannot be kept"):
        store.add_texts(["a"], [{"x": object()}])
    assert len(store) == 5
