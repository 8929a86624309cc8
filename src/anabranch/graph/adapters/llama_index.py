"""`AnabranchVectorStore`: an `HNSW` as a vector store of LlamaIndex. Needs the extra ``llama-index``.

store = AnabranchVectorStore()
store.add(nodes)                                             # with their embeddings
store.query(VectorStoreQuery(query_embedding=vector, similarity_top_k=3))
index = VectorStoreIndex.from_vector_store(store, embed_model=...)
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from anabranch.errors import InputError
from anabranch.extras import require
from anabranch.graph.adapters.documents import Documents

require("llama-index", by=__name__)

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)
from llama_index.core.vector_stores.utils import build_metadata_filter_fn, metadata_dict_to_node, node_to_metadata_dict


class AnabranchVectorStore(BasePydanticVectorStore):
    """Nodes found by their embeddings; it holds their texts too. Any number of threads may use it.

    A similarity is the cosine ("cosine"), the inner product ("ip"), or 1 / (1 + squared distance) ("l2").

    Args:
        metric: as of `HNSW`.
        **options: of the `HNSW` (M, ef_construction, dtype, seed ...).
    """

    stores_text: bool = True
    flat_metadata: bool = False
    metric: str = "cosine"
    _documents: Documents = PrivateAttr()
    _options: dict[str, Any] = PrivateAttr()
    _lock: Any = PrivateAttr()

    def __init__(self, metric: str = "cosine", **options: Any) -> None:
        super().__init__(metric=metric)
        self._options = options
        self._documents, self._lock = Documents(metric=metric, **options), threading.RLock()

    @classmethod
    def class_name(cls) -> str:
        """As LlamaIndex calls it."""
        return "AnabranchVectorStore"

    @property
    def client(self) -> Any:
        """The `HNSW`, None before the first node."""
        return self._documents.index

    def add(self, nodes: Sequence[BaseNode], **_: Any) -> list[str]:
        """Bring nodes in, or put them in the place of those with their ids. Raises as `Documents.put`, ValueError without an embedding."""
        ids = [node.node_id for node in nodes]
        contents = [node_to_metadata_dict(node, remove_text=False, flat_metadata=self.flat_metadata) for node in nodes]
        with self._lock:
            self._documents.put(ids, [node.get_embedding() for node in nodes], contents)
        return ids

    def delete(self, ref_doc_id: str, **_: Any) -> None:
        """Take out all nodes of a document."""
        with self._lock:
            self._documents.drop(self._documents.ids(lambda id, content: content.get("ref_doc_id") == ref_doc_id))

    def delete_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **_: Any) -> None:
        """Take out the nodes that have one of the ids and are let through; None stands for all."""
        with self._lock:
            self._documents.drop(self._wanted(node_ids, filters))

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """The nodes that have one of the ids and are let through, in the order in which they came."""
        with self._lock:
            return [self._node(id) for id in self._wanted(node_ids, filters)]

    def clear(self) -> None:
        """Begin anew, also with another dimension."""
        with self._lock:
            self._documents = Documents(metric=self.metric, **self._options)

    def query(self, query: VectorStoreQuery, **_: Any) -> VectorStoreQueryResult:
        """The nearest nodes of an embedding. Raises InputError for a mode other than the default, or without an embedding."""
        if query.mode != VectorStoreQueryMode.DEFAULT:
            raise InputError(
                f"the mode is {query.mode.value}; this store knows {VectorStoreQueryMode.DEFAULT.value} alone"
            )
        if query.query_embedding is None:
            raise InputError("the query has no embedding")
        with self._lock:
            only = None
            if query.node_ids is not None or query.doc_ids is not None or query.filters is not None:
                only = self._wanted(query.node_ids, query.filters, query.doc_ids)
            found = self._documents.search(query.query_embedding, query.similarity_top_k, only)
            ids = [id for id, _ in found]
            return VectorStoreQueryResult(
                nodes=[self._node(id) for id in ids],
                similarities=[self._similarity(distance) for _, distance in found],
                ids=ids,
            )

    def persist(self, persist_path: str, fs: Any = None) -> None:
        """Write all of it into the folder ``persist_path``. Raises InputError for another file system, and as `Documents.save`."""
        if fs is not None and getattr(fs, "protocol", "file") not in ("file", ("file", "local")):
            raise InputError("this store is written to folders of this machine; give no other file system")
        with self._lock:
            self._documents.save(persist_path)

    @classmethod
    def from_persist_path(cls, persist_path: str | Path, **options: Any) -> "AnabranchVectorStore":
        """Read what `persist` wrote. Nothing in the folder is run. Raises DataError as `Documents.load`."""
        documents = Documents.load(persist_path, **{"metric": "cosine", **options})
        metric = documents.index.metric if documents.index is not None else options.get("metric", "cosine")
        made = cls(**{**options, "metric": metric})
        made._documents = documents
        return made

    def _wanted(
        self, node_ids: list[str] | None, filters: MetadataFilters | None, doc_ids: list[str] | None = None
    ) -> list[str]:
        lets_through: Callable[[str], bool] = build_metadata_filter_fn(self._documents.content, filters)
        nodes, documents = (None if ids is None else set(ids) for ids in (node_ids, doc_ids))
        return self._documents.ids(
            lambda id, content: (
                (nodes is None or id in nodes)
                and (documents is None or content.get("ref_doc_id") in documents)
                and lets_through(id)
            )
        )

    def _node(self, id: str) -> BaseNode:
        return metadata_dict_to_node(self._documents.content(id))

    def _similarity(self, distance: float) -> float:
        return 1 / (1 + distance) if self.metric == "l2" else 1 - distance
