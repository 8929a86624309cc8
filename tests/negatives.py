"""Draws of negatives in plain Python: what kernels and devices are compared with."""

import numpy as np


def drawn(table, state, count):
    """Draws of a stream of negatives, one by one, as the definition says."""
    keep, other = table
    found, state = [], int(state)
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        bits = state
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            bits = (bits ^ (bits >> shift)) * factor % 2**64
        bits ^= bits >> 31
        slot = (bits >> 32) * len(keep) >> 32
        found.append(slot if (bits & 0xFFFFFFFF) / 2**32 < keep[slot] else int(other[slot]))
    return np.array(found)
