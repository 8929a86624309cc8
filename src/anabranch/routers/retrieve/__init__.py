"""Nearest vectors, kept apart by namespace.

from anabranch.routers.retrieve import Exact

index = Exact.Config().build(384)
ids = index.add(vector_ND, namespace="tenant-7")
found, similarity = index.search(vector_D, k=5, namespace="tenant-7")
"""

from anabranch.routers.retrieve.clustered import Clustered
from anabranch.routers.retrieve.exact import Exact
from anabranch.routers.retrieve.hnsw import Hnsw, WalkedRows
from anabranch.routers.retrieve.index import Index

__all__ = ["Clustered", "Exact", "Hnsw", "Index", "WalkedRows"]
