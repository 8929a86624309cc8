"""Ids of requests and of what is made for them."""

import random

_RANDOM = random.Random()  # seeded by the system; asking the system each time lets go of the interpreter's lock


def new_id(kind: str = "req") -> str:
    """Such as ``req_0123456789abcdef01234567``: 96 random bits."""
    return f"{kind}_{_RANDOM.getrandbits(96):024x}"
