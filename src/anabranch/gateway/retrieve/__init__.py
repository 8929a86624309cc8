"""Nearest vectors, kept apart by namespace.

from anabranch.gateway.retrieve import Exact

index = Exact.Config().build(384)
ids = index.add(vector_ND, namespace="tenant-7")
found, similarity = index.search(vector_D, k=5, namespace="tenant-7")
"""

from anabranch.gateway.retrieve.clustered import Clustered
from anabranch.gateway.retrieve.exact import Exact
from anabranch.gateway.retrieve.hnsw import Hnsw
from anabranch.gateway.retrieve.index import Index

__all__ = ["Clustered", "Exact", "Hnsw", "Index"]
