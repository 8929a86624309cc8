"""The door for matrices of scipy."""
# Shapes: R rows, C columns

from typing import Any

import numpy as np

from anabranch.errors import InputError
from anabranch.graph.masks import unmasked


def is_sparse(matrix: Any) -> bool:
    """Whether this is a sparse matrix of scipy, which is not imported to find out."""
    return hasattr(matrix, "tocsr") and hasattr(matrix, "tocoo")


def wide_rows(matrix: Any, called: str) -> Any:
    """A matrix by rows, with entries of 64 bits and each place once: `scipy.sparse.csr_array` [R, C] of float64, a copy.

    Scipy adds entries of one place in the type that is there, wherever it makes one format of another: 200 + 100 would be 44 in bytes. So
    they are made wide before.

    Args:
        matrix: a sparse matrix or array of scipy in any format, or what numpy makes a matrix of.
        called: what it is, for errors.

    Raises InputError for entries that are no real numbers, and for what has not two dimensions.
    """
    from scipy.sparse import csr_array

    try:
        entries = matrix.tocoo() if is_sparse(matrix) else np.asarray(unmasked(matrix, called))
        kind = entries.dtype.kind
        if kind not in "biuf":
            raise InputError(f"entries of {called} are real numbers, not {entries.dtype}")
        if len(entries.shape) != 2:
            raise InputError(f"{called} has the shape {tuple(entries.shape)}; it must have two dimensions")
        found = csr_array(entries.astype(np.float64), copy=True)
    except (TypeError, ValueError) as error:
        raise InputError(f"{called} is no matrix of numbers: {error}") from None
    found.sum_duplicates()
    return found
