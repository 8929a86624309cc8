"""What a caller may give for an argument, and what it may be given of: for tests of constructors and of calls."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
from hypothesis import strategies as st

from anabranch.graph import Graph

NODES = 30
GRAPH = Graph.from_edges(np.arange(NODES), (np.arange(NODES) * 7 + 1) % NODES, num_nodes=NODES)
VECTORS = np.random.default_rng(0).standard_normal((NODES, 8)).astype(np.float32)

HOSTILE = [
    *(None, True, False, np.True_, 0, 1, 2, 3, -1, 16, 65_536, 65_537, 2**31 - 1, 2**31, 2**53, 2**53 + 1, 2**63 - 1),
    *(2**63, 2**64, -(2**63) - 1, 10**30, 10**400, 10**5000, -(10**5000), 0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 1e-320),
    *(1e-300, 1e18, 1e19, 1e30, 1e37, 1e300, float("nan"), float("inf"), -float("inf"), 1j),
    *(np.float32(0.5), np.float16(1), np.float64("nan"), np.longdouble(1), np.int8(3), np.int8(-128), np.int64(3)),
    *(np.uint8(255), np.uint64(2**64 - 1), np.str_("no"), np.datetime64("2020-01-01"), np.ma.masked),
    *("", "no", "auto", "x" * 1000, "\0", "\ud800", "1", "a\nb", b"1", bytearray(1)),
    *([], [1], ["sgd"], [[]], (), (1, 2), {}, {"a": 1}, set(), range(3), slice(1), object(), int, len, Ellipsis),
    *(np.array([]), np.array(3), np.array([1.0, 2.0]), np.array([[1], [2]]), np.array(["sgd", "x"]), np.array([None])),
    *(Fraction(1, 2), Decimal("0.5"), Decimal("NaN")),
]

NUMBERS = st.integers() | st.integers(2**53 - 2, 2**64 + 2) | st.floats() | st.floats(0, 1) | st.complex_numbers()
SHORT = st.builds(
    lambda kind, number: kind(number), st.sampled_from([np.int8, np.int16, np.float16, np.float32]), st.integers(-9, 99)
)
VALUES = NUMBERS | SHORT | st.text(max_size=9) | st.binary(max_size=3) | st.booleans() | st.lists(NUMBERS, max_size=3)


def refusal(work, kinds):
    """What ``work`` is refused with, None if it is not. Any other error is one of this test."""
    try:
        work()
    except kinds as error:
        return str(error)
    return None
