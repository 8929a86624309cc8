"""What studies of routing read, by content: the questions that are told apart, what every model earned at them, and how they are split.

Which questions are the same is a rule of code (`anabranch.routers.wording.normal_form`), and so is how they are split. A digest of the
files would say nothing of a change of either; this one does, so that runs on other questions are never paired.
"""
# Shapes: N questions

import hashlib
import json

import numpy as np

from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Pool
from anabranch.routers.data.splits import HOLD_OUT, split


def digest_of(data: Recorded, pool: Pool | None = None, *, embedder: str = "") -> str:
    """Names what a study reads of recorded outcomes: 16 hex digits.

    Args:
        data: as it is split, without copies.
        pool: models with the sizes and descriptions that are read beside it.
        embedder: names what makes the vectors, where that is read too.
    """
    models = [] if pool is None else [(one.name, one.parameters, one.description) for one in pool.models]
    # A rule of splitting that changed shows in the first split as in any.
    tested = split(data, HOLD_OUT, seed=0)[1].query
    told = [list(data.query), list(data.models), list(data.task), models, list(tested), embedder]
    found = hashlib.blake2b(json.dumps(told).encode(), digest_size=8)
    for value in (data.score_NM, data.cost_NM):
        found.update(b"-" if value is None else np.ascontiguousarray(value, "<f8").tobytes())
    return found.hexdigest()
