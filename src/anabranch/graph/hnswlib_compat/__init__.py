"""The interface of hnswlib 0.8 on our index: ``import anabranch.graph.hnswlib_compat as hnswlib`` runs code written for it.

The same classes, methods, arguments, defaults, properties and errors (RuntimeError, or ValueError where theirs is one), so also what people
trip over: a fixed ``max_elements``, and an error where fewer than k results are found. New code has neither with `anabranch.graph.HNSW`.

What differs, on purpose:

- files and pickles are in our checked format; those of hnswlib are not read, nor does it read ours
- an error leaves the index as it was: hnswlib may have added the first part of the vectors
- a Python filter is called once per element and call, not once per visited element and query
- elements put into the places of deleted ones are inserted anew and all lists that pointed there are mended
- labels end at 2**63 - 1; vectors that are not finite are refused; a query of a wrong dimension is an error, not a read beyond its end
"""

from anabranch.graph.hnswlib_compat.brute import BFIndex
from anabranch.graph.hnswlib_compat.index import Index

__all__ = ["BFIndex", "Index"]
