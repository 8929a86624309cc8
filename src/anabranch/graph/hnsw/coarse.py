"""What short rows leave of vectors, where that is too little: told, since it is no error, and ranks suffer."""
# Shapes: N vectors, D dimension, S sample, L live slots

import warnings

import numpy as np

from anabranch.graph.hnsw.centres import FEW, OFF, are_many, spread_places
from anabranch.graph.hnsw.encoding import Encoding
from anabranch.graph.hnsw.groups import LOOKED_AT, distinct, squares_between
from anabranch.graph.hnsw.storage import Storage
from anabranch.graph.hnsw.strays import far_among

# A row says too little of a vector that lies farther from what it says than this share of the way to its nearest among some.
TOO_FAR = 0.5

# Of half precision, numbers have so many times as many steps as of 8 bits.
STEPS = 16.0

# Rows that are looked at together.
PIECE = 1 << 13


def warn_of_coarse(vector_ND: np.ndarray, encoding: Encoding, what: str) -> None:
    """Tell of vectors ("l2") that came to be rounded to rows of "f16" or "i8" and of which these say too little; not of a few.

    They are looked at as they came, some of them, about the centre that there is now.
    """
    if encoding.metric != "l2" or encoding.dtype not in ("f16", "i8") or len(vector_ND) < FEW:
        return
    place_S = spread_places(len(vector_ND), LOOKED_AT)
    place_S = place_S[distinct(vector_ND[place_S])]
    sample_SD = vector_ND[place_S]
    near_S = np.sqrt(squares_between(sample_SD).min(1))
    is_coarse_S = encoding.error_of(sample_SD) > TOO_FAR * near_S
    if not are_many(is_coarse_S):
        return
    way = "with dtype 'f32'" if encoding.rerank else "with rerank=True, or dtype 'f32'"
    message = (
        f"row {place_S[int(np.argmax(is_coarse_S))]} of {what} and others, {is_coarse_S.mean():.0%} of {len(sample_SD)} looked at, are "
        f"rounded with dtype {encoding.dtype!r} by as much as they lie from their neighbours, since they are far from the centre of all: "
        f"searches miss these; build the index {way}"
    )
    warnings.warn(message, stacklevel=4)


def told_of_strays(vector_ND: np.ndarray, held: Storage, what: str) -> str | None:
    """What is to be told of vectors that lie far from what codes were learned from, and of which these say too little; not of a few.

    They are looked at as they came, some of them, and by the codes that there are now.
    """
    if held.coded is None or not held.coded.is_trained or len(vector_ND) < FEW:
        return None
    place_S = spread_places(len(vector_ND), LOOKED_AT)
    sample_SD = vector_ND[place_S]
    is_coarse_S = far_among(sample_SD, held)
    if not are_many(is_coarse_S):
        return None
    place_S = place_S[kept_S := distinct(sample_SD)]
    sample_SD, is_coarse_S = sample_SD[kept_S], is_coarse_S[kept_S]
    is_coarse_S &= held.coded.error_of(sample_SD) > np.sqrt(squares_between(sample_SD).min(1))
    if not are_many(is_coarse_S):
        return None
    return (
        f"row {place_S[int(np.argmax(is_coarse_S))]} of {what} and others, {is_coarse_S.mean():.0%} of {len(sample_SD)} looked at, lie far "
        f"from what codes of {held.coded.quantization!r} were learned from, so that these say little of them, and searches miss them: "
        "train() learns codes anew, which helps where such vectors are one in 100 or more; or build the index without quantization"
    )


def count_worse(before: tuple[np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray], dtype: str) -> int:
    """How many rows, recoded from what they said before, keep errors that rows of such vectors would not have; of rows and aux each."""
    if dtype == "i8":
        return int((before[1][:, 0] > OFF * after[1][:, 0]).sum())
    count = 0
    for begin in range(0, len(before[0]), PIECE):
        old_P, new_P = (
            np.abs(one[0][begin : begin + PIECE].view(np.float16).astype(np.float32)).max(1) for one in (before, after)
        )
        count += int((old_P > STEPS * new_P).sum())
    return count


def warn_of_worse(number: int, total: int) -> None:
    """Tell of elements for which `count_worse` is not 0."""
    message = (
        f"{number:,} of {total:,} elements came when others lay about another centre, and are known no better than they were rounded then "
        "(rerank=False keeps no vectors to round anew): give their vectors again by update, or build the index with rerank=True"
    )
    warnings.warn(message, stacklevel=4)
