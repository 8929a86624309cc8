"""Counter-based randomness for kernels: a stream per (seed, key), the same on any machine and for any number of threads.

A stream is SplitMix64 ("Fast splittable pseudorandom number generators", Steele, Lea and Flood, OOPSLA 2014) started at a hash of seed and
keys. Nothing is shared between streams, so work may be split and ordered in any way:

    state = stream(seed, node, walk)
    state, bits = next_bits(state)          # uint64; to_unit(bits) is uniform in [0, 1), below(bits, n) an integer in 0 ... n - 1

Every function works inside numba kernels; called from Python, states and bits are to be `numpy.uint64`.
"""

import numba as nb
import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_30, _27, _31, _11, _32 = (np.uint64(bits) for bits in (30, 27, 31, 11, 32))
_LOW = np.uint64(0xFFFFFFFF)
_UNIT = 2.0**-53


@nb.njit(inline="always")
def mix(value):
    """A bijection of uint64 whose every output bit depends on every input bit."""
    value = np.uint64(value)
    value = (value ^ (value >> _30)) * _FIRST
    value = (value ^ (value >> _27)) * _SECOND
    return value ^ (value >> _31)


@nb.njit(cache=True, nogil=True)
def stream(seed, first=0, second=0):
    """The state in which the stream of these keys starts."""
    state = mix(np.uint64(seed) + _GOLDEN)
    state = mix(state ^ (np.uint64(first) * _GOLDEN + _FIRST))
    return mix(state ^ (np.uint64(second) * _GOLDEN + _SECOND))


@nb.njit(inline="always")
def next_bits(state):
    """The next state, and 64 random bits."""
    state = np.uint64(state) + _GOLDEN
    return state, mix(state)


@nb.njit(inline="always")
def to_unit(bits):
    """Uniform in [0, 1), of the upper 53 bits."""
    return float(np.uint64(bits) >> _11) * _UNIT


@nb.njit(inline="always")
def below(bits, bound):
    """An integer in 0 ... bound - 1, of the upper 32 bits; ``bound`` below 2**32, bias below bound / 2**32."""
    return np.int64(((np.uint64(bits) >> _32) * np.uint64(bound)) >> _32)


@nb.njit(inline="always")
def low_unit(bits):
    """Uniform in [0, 1), of the lower 32 bits: a second draw from bits whose upper half `below` used."""
    return float(np.uint64(bits) & _LOW) * 2.0**-32
