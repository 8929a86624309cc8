"""Values that a field of a `Request` cannot have, in forms that Python lets through."""

import math

import numpy as np
import torch

from anabranch.serving.core.request import Sampling

WRONG = {
    "prompt": [
        ("a", "b"),
        (1.5, 2.0),
        (None,),
        5,
        "abc",
        ((1,),),
        None,
        {1, 2},
        iter((1, 2)),
        np.array([[1, 2]]),
        torch.tensor(1.5),
        (True,),
    ],
    "arrival": ["x", 1j, None, math.nan],
    "priority": ["x", 1j, None, math.nan],
    "sampling": [None, {}, Sampling],
    "options": [5, ("ab",), (("a", 5),), None, (("a", "b", "c"),)],
    "key": [None, 5],
    "cache_salt": [None, b"x"],
    "id": [None, 5, ["a"]],
}
