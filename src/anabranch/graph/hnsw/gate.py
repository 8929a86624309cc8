"""Where searches of one query come in: a flag and a count that compiled code reads and changes in one step each.

A search of one query is one call of compiled code, which says itself that it is there and that it has gone. No handler of a signal can
come between, as handlers run between steps of the interpreter; so it needs none of what readers written in Python need to be safe from
them, which takes as long as the search.

The flag says that nobody may come in. Who wants to be alone raises it, then waits until the count is 0; who comes in counts itself, then
looks at the flag. Both steps are ordered for all threads (sequentially consistent), so one of the two sees the other.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from anabranch.graph.hnsw.raw import address, helper, int64_at, intrinsic, kernel

# Looks at the other side before one goes to sleep: some microseconds, as long as a search or a step of a writer.
LOOKS = 20_000


def new_gate() -> np.ndarray:
    """A flag and a count, int64 [2]; nobody is in, anybody may come."""
    return np.zeros(2, np.int64)


@intrinsic
def _add(typingctx, place, value):
    """Add to a number at an address, in one step that is ordered among all; what it was."""

    def codegen(context, builder, signature, arguments):
        return builder.atomic_rmw("add", int64_at(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _put(typingctx, place, value):
    """Write a number at an address, in one step that is ordered among all."""

    def codegen(context, builder, signature, arguments):
        builder.atomic_rmw("xchg", int64_at(builder, arguments[0]), arguments[1], "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _get(typingctx, place):
    """A number at an address, as it is in the order of all steps."""

    def codegen(context, builder, signature, arguments):
        return builder.load_atomic(int64_at(builder, arguments[0]), "seq_cst", 8, typ=ir.IntType(64))

    return types.int64(types.int64), codegen


@helper
def come_in(gate):
    """Count oneself; False, and nothing has happened, where nobody may."""
    # Not of the array type, whose loads may be moved.
    place: Any = address(gate)
    one, looks = np.int64(1), 0
    # A writer is often done within microseconds. Who may not come in does not keep it waiting.
    while _get(place) != 0:
        if looks == LOOKS:
            return False
        looks += 1
    _add(place + 8, one)
    if _get(place) != 0:
        _add(place + 8, -one)
        return False
    return True


@helper
def go_out(gate):
    """Count oneself out."""
    _add(address(gate) + 8, np.int64(-1))


@kernel
def turn(gate, is_shut):
    """Let nobody come in, or anybody; how many are in, after some waiting where nobody may come."""
    place = address(gate)
    _put(place, np.int64(is_shut))
    inside = _get(place + 8)
    look = 0
    while is_shut and inside != 0 and look < LOOKS:
        inside = _get(place + 8)
        look += 1
    return inside
