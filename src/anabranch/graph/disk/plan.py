"""What a limit of memory allows: how long codes are, and in how many shards the graph is built.

Counted are arrays of ours: those of an index that is open, or those of the step of the build that has most. Not counted are the
interpreter with its libraries, and the system's cache of files, which it takes back when memory is wanted.
"""
# Shapes: N vectors, D dimension, M parts of a code

from dataclasses import dataclass

from anabranch.bounds import is_whole, shown
from anabranch.errors import CapacityError, InputError
from anabranch.graph.codes import CENTRES, ENOUGH
from anabranch.graph.disk.blocks import padded_width

# Numbers of a vector for each byte of its code, unless memory or the caller says otherwise; and most where memory is short.
NUMBERS, MOST_NUMBERS = 4, 16
LEAST_CODE = 16

# Bytes of an element in the tables that a build keeps: shards, degree, order, slot, and copies of two of them while it is sorted.
TABLES = 28

# Of an open index: the slot of an id, and its share of the entry layer.
HELD = 9

# Room in shards beyond twice the vectors, since each holds at most so many.
SLACK = 1.15

# Of an `HNSW` beside vectors and links on level 0: places, levels, ids, their table, links above, marks and scratch of threads.
BESIDE = 80

LEAST_SHARD, MOST_SHARDS = 256, 30_000
FLOOR = 1 << 20
MOST_MEMORY = 1 << 60


@dataclass(frozen=True)
class Plan:
    """How an index is made.

    Attributes:
        code_bytes: of a vector.
        num_shards: 1, or more in which each vector is twice.
        shard: most vectors in one.
        sample: vectors that codes are trained on.
        piece: rows that are read at once.
    """

    code_bytes: int
    num_shards: int
    shard: int
    sample: int
    piece: int


def planned(
    count: int,
    dim: int,
    memory: int,
    M: int,
    *,
    code_bytes: int | None = None,
    has_ids: bool = False,
    num_shards: int | None = None,
    is_built: bool = False,
) -> Plan:
    """A plan within ``memory`` bytes; ``is_built``: there is a graph already.

    Raises CapacityError where there is none, with the least that suffices, and InputError for a length of codes that vectors cannot have.
    """
    if code_bytes is not None and (not is_whole(code_bytes) or not 1 <= code_bytes <= dim):
        raise InputError(f"code_bytes is {shown(code_bytes)}; vectors of {dim} numbers have codes of 1 to {dim} bytes")

    def tried(size: int) -> Plan | None:
        return _within(count, dim, size, M, code_bytes, has_ids, num_shards, is_built)

    found = tried(memory)
    if found is not None:
        return found
    least, enough = memory, 2 * memory
    while tried(enough) is None:
        if enough > MOST_MEMORY:
            raise CapacityError(f"{num_shards} shards are more than {MOST_SHARDS:,}, or memory cannot hold one of them")
        least, enough = enough, 2 * enough
    while enough - least > 1:
        middle = (least + enough) // 2
        least, enough = (middle, enough) if tried(middle) is None else (least, middle)
    raise CapacityError(
        f"memory is {memory:,} bytes, and an index on disk of {count:,} vectors of {dim} numbers needs {enough:,} while it is made and "
        "searched; allow more"
    )


def _within(
    count: int,
    dim: int,
    memory: int,
    M: int,
    code_bytes: int | None,
    has_ids: bool,
    num_shards: int | None,
    is_built: bool,
) -> Plan | None:
    """A plan, or None where memory does not suffice."""
    parts = _code_bytes(count, dim, memory, code_bytes, has_ids)
    row = 4 * padded_width(dim)
    piece = max(16, min(1 << 16, memory // (48 * row)))
    sample = max(CENTRES, min(count, CENTRES * ENOUGH, memory // (6 * row)))
    fixed = count * (TABLES + 16 * has_ids) + 6 * piece * row + 1024 * dim + FLOOR
    most = (memory - fixed) // int(1.05 * (row + 8 * M + BESIDE))
    if parts is None or fixed > memory or 3 * sample * row > memory:
        return None
    if is_built:
        return Plan(parts, 1, count, sample, piece)
    if num_shards is None:
        num_shards = 1 if most >= count else max(3, int(-(-2 * SLACK * count // max(most, 1))))
    # As even as they may be.
    shard = count if num_shards == 1 else min(count, int(2 * SLACK * count / num_shards) + 1)
    if shard > most or most < min(count, LEAST_SHARD) or num_shards > MOST_SHARDS:
        return None
    return Plan(parts, num_shards, shard, sample, piece)


def _code_bytes(count: int, dim: int, memory: int, asked: int | None, has_ids: bool) -> int | None:
    """The bytes of a code; None where memory is short."""
    room = (memory - count * (HELD + 8 * has_ids) - 1024 * dim - FLOOR) // count
    wanted = min(dim, max(LEAST_CODE, -(-dim // NUMBERS))) if asked is None else asked
    least = -(-dim // MOST_NUMBERS) if asked is None else asked
    return None if room < least else min(wanted, room)
