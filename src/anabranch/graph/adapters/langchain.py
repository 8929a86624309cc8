"""`AnabranchVectorStore`: an `HNSW` as a vector store of LangChain. Needs the extra ``langchain``.

store = AnabranchVectorStore(embeddings)
store.add_texts(["a text", "another"], [{"page": 1}, {"page": 2}])
store.similarity_search("some text", k=3, filter={"page": 2})
store.save_local("folder")
"""

import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from anabranch.errors import InputError
from anabranch.extras import require
from anabranch.graph.adapters.documents import Documents

require("langchain", by=__name__)

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance

Filter = dict[str, Any] | Callable[[Document], bool] | None


class AnabranchVectorStore(VectorStore):
    """Documents found by their embeddings.

    A score is a distance, the smaller the nearer; relevance is LangChain's for the metric. Any number of threads may use it.

    Args:
        embedding: of texts and queries.
        metric: as of `HNSW`.
        **options: of the `HNSW` (M, ef_construction, dtype, seed ...).
    """

    def __init__(self, embedding: Embeddings, *, metric: str = "cosine", **options: Any) -> None:
        self._embedding, self._metric = embedding, metric
        self._documents = Documents(metric=metric, **options)
        self._lock = threading.RLock()

    @property
    def embeddings(self) -> Embeddings:
        """What it was made with."""
        return self._embedding

    def __len__(self) -> int:
        return len(self._documents)

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        **_: Any,
    ) -> list[str]:
        """Bring texts in, or put them in the place of those with their ids; the ids. Raises InputError for lists of different lengths."""
        listed = list(texts)
        chosen = [
            id if id is not None else str(uuid.uuid4()) for id in (ids if ids is not None else [None] * len(listed))
        ]
        about = metadatas if metadatas is not None else [{} for _ in listed]
        if not len(listed) == len(chosen) == len(about):
            raise InputError(
                f"there are {len(listed)} texts, {len(about)} metadatas and {len(chosen)} ids; give as many of each"
            )
        if listed:
            vectors = self._embedding.embed_documents(listed)
            contents = [{"text": text, "metadata": dict(one)} for text, one in zip(listed, about, strict=True)]
            with self._lock:
                self._documents.put(chosen, vectors, contents)
        return chosen

    def delete(self, ids: list[str] | None = None, **_: Any) -> bool | None:
        """Take documents out, all of them for None; those that are not there stay so."""
        with self._lock:
            self._documents.drop(self._documents.ids() if ids is None else ids)
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Those of the ids that are there, in their order."""
        with self._lock:
            return [self._document(id) for id in ids if id in self._documents]

    def similarity_search(self, query: str, k: int = 4, filter: Filter = None, **_: Any) -> list[Document]:
        """The k nearest, of those that a filter lets through: values that metadata must have, or a function of a document."""
        return [document for document, _ in self.similarity_search_with_score(query, k, filter)]

    def similarity_search_with_score(
        self, query: str, k: int = 4, filter: Filter = None, **_: Any
    ) -> list[tuple[Document, float]]:
        """As `similarity_search`, with distances."""
        return self._nearest(self._embedding.embed_query(query), k, filter)

    def similarity_search_by_vector(
        self, embedding: list[float], k: int = 4, filter: Filter = None, **_: Any
    ) -> list[Document]:
        """As `similarity_search`, of an embedding."""
        return [document for document, _ in self._nearest(embedding, k, filter)]

    def max_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, filter: Filter = None, **_: Any
    ) -> list[Document]:
        """Of the ``fetch_k`` nearest the k that are near and unlike each other."""
        vector = self._embedding.embed_query(query)
        return self.max_marginal_relevance_search_by_vector(vector, k, fetch_k, lambda_mult, filter)

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Filter = None,
        **_: Any,
    ) -> list[Document]:
        """As `max_marginal_relevance_search`, of an embedding."""
        with self._lock:
            found = [document for document, _ in self._nearest(embedding, fetch_k, filter)]
            if not found:
                return []
            rows = self._documents.vectors([str(document.id) for document in found])
        chosen = maximal_marginal_relevance(np.asarray(embedding, np.float32), list(rows), lambda_mult, k)
        return [found[place] for place in chosen]

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict] | None = None,
        *,
        ids: list[str] | None = None,
        **options: Any,
    ) -> Self:
        """A store of texts; ``options`` as of the class."""
        made = cls(embedding, **options)
        made.add_texts(texts, metadatas, ids=ids)
        return made

    def save_local(self, folder: str | Path) -> None:
        """Write all of it into a folder. Raises as `Documents.save`."""
        with self._lock:
            self._documents.save(folder)

    @classmethod
    def load_local(cls, folder: str | Path, embedding: Embeddings, **options: Any) -> Self:
        """Read what `save_local` wrote. Nothing in the folder is run. Raises DataError as `Documents.load`."""
        made = cls(embedding, **options)
        made._documents = Documents.load(
            folder, metric=made._metric, **{k: v for k, v in options.items() if k != "metric"}
        )
        if made._documents.index is not None:
            made._metric = made._documents.index.metric
        return made

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return {
            "cosine": self._cosine_relevance_score_fn,
            "l2": self._euclidean_relevance_score_fn,
            "ip": self._max_inner_product_relevance_score_fn,
        }[self._metric]

    def _document(self, id: str) -> Document:
        content = self._documents.content(id)
        return Document(page_content=content["text"], metadata=dict(content["metadata"]), id=id)

    def _nearest(self, vector: list[float], k: int, filter: Filter) -> list[tuple[Document, float]]:
        with self._lock:
            only = (
                None if filter is None else self._documents.ids(lambda id, _: _lets_through(filter, self._document(id)))
            )
            return [(self._document(id), distance) for id, distance in self._documents.search(vector, k, only)]


def _lets_through(filter: Filter, document: Document) -> bool:
    if isinstance(filter, dict):
        return all(name in document.metadata and document.metadata[name] == value for name, value in filter.items())
    assert filter is not None
    return filter(document)
