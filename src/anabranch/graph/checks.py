"""What a graph is checked for before it is built: ends, weights and names, with messages that name the edge."""
# Shapes: N nodes, E edges

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from anabranch import machine
from anabranch.bounds import LARGEST_INT, is_whole, shown
from anabranch.errors import CapacityError, InputError
from anabranch.graph.masks import unmasked


def check_room(num_nodes: int) -> None:
    """Raise CapacityError for more nodes than there is memory for rows of (16 bytes each): one wild id, as a rule."""
    need, have = 16 * (num_nodes + 1), machine.room_bytes()
    if need > have:
        raise CapacityError(
            f"{num_nodes:,} nodes need {need / 2**30:,.1f} GiB for their rows alone, {have / 2**30:,.1f} GiB of memory are free; "
            "number nodes without gaps and pass other ids as `names`"
        )


def checked_ends(source: ArrayLike, target: ArrayLike, num_nodes: int | None) -> tuple[np.ndarray, np.ndarray, int]:
    """Ends as int32 or int64, and the number of nodes. Raises InputError, and CapacityError as `check_room`."""
    source, target = unmasked(source, "source"), unmasked(target, "target")
    try:
        ends = {"source": np.asarray(source), "target": np.asarray(target)}
    except (TypeError, ValueError) as error:
        # Lists within lists, of different lengths.
        raise InputError(f"source and target must be lists of node ids: {error}") from None
    for name, array in ends.items():
        if array.ndim != 1:
            raise InputError(f"{name} has the shape {array.shape}; it must be a list of node ids")
        if array.size and array.dtype.kind not in "iu":
            raise InputError(f"{name} is of type {array.dtype}; node ids are integers (pass names as `names`)")
    source_E, target_E = (_plain_ids(array) for array in ends.values())
    if len(source_E) != len(target_E):
        raise InputError(f"source has {len(source_E):,} ends and target {len(target_E):,}; they must be as many")
    largest = max((int(array.max()) for array in (source_E, target_E) if array.size), default=-1)
    count = largest + 1 if num_nodes is None else checked_count(num_nodes)
    for name, array in (("source", source_E), ("target", target_E)):
        if array.size and (array.min() < 0 or array.max() >= count):
            bad = np.flatnonzero((array < 0) | (array >= count))[0]
            allowed = f"nodes are 0 to {count - 1}" if count > 0 else "there are no nodes"
            raise InputError(f"edge {bad} has the {name} {array[bad]}; {allowed}")
    check_room(count)
    return source_E, target_E, count


def checked_count(num_nodes: Any) -> int:
    """A number of nodes. Raises InputError for others."""
    if not is_whole(num_nodes):
        raise InputError(f"num_nodes is {shown(num_nodes)}; it must be a whole number")
    if num_nodes < 0:
        raise InputError(f"num_nodes is {shown(num_nodes)}; it must not be negative")
    if num_nodes > LARGEST_INT:
        raise InputError(f"num_nodes is {shown(num_nodes)}; it must be at most {LARGEST_INT:,}")
    return int(num_nodes)


def _plain_ids(array: np.ndarray) -> np.ndarray:
    """Ids as int32 or int64, the types kernels are compiled for. uint64 beyond int64 stays, to be refused."""
    if not array.size:
        return array.astype(np.int64)
    if array.dtype.kind == "u" and array.dtype.itemsize == 8:
        return array if array.max() > np.iinfo(np.int64).max else array.astype(np.int64)
    return array.astype(np.int64 if array.dtype.itemsize > 4 or array.dtype == np.uint32 else np.int32, copy=False)


def checked_weights(weight: ArrayLike, count: int, drop_zero: bool, allow_negative: bool) -> np.ndarray:
    """float32 [count]. Raises InputError naming the first bad one."""
    weight = unmasked(weight, "weight")
    try:
        given = np.asarray(weight)
        if given.dtype.kind not in "biuf":
            given = np.asarray(weight, np.float64) if given.dtype.kind == "O" else given
        if given.dtype.kind not in "biuf":
            raise TypeError(f"these are of type {given.dtype}")
        # Infinite as a 32-bit number: refused below.
        with np.errstate(over="ignore"):
            weight_E = given.astype(np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"weights are numbers: {error}") from None
    if weight_E.shape != (count,):
        raise InputError(f"weight has the shape {weight_E.shape}; there are {count:,} edges")
    problem = weight_problem(weight_E, drop_zero, allow_negative)
    if problem:
        place, what = problem
        raise InputError(f"edge {place} has the weight {given[place]}; weights must be {what}")
    return weight_E


def weight_problem(weight_E: np.ndarray, drop_zero: bool, allow_negative: bool) -> tuple[int, str] | None:
    """The place of the first weight that a graph may not have, and what weights must be; None if all are good."""
    if not len(weight_E):
        return None
    low, high = weight_E.min(), weight_E.max()  # NaN if one is
    if low > 0 and high < np.inf:
        return None
    for bad, what in (
        (~np.isfinite(weight_E), "finite (as 32-bit numbers)"),
        ((weight_E < 0) & (not allow_negative), "not negative"),
        ((weight_E == 0) & (not drop_zero), "not 0 (as 32-bit numbers; drop_zero=True leaves such edges out)"),
    ):
        place = np.flatnonzero(bad)
        if place.size:
            return int(place[0]), what
    return None


def checked_names(names: Any, count: int) -> np.ndarray | None:
    """Names as an array of integers or of objects; a list of tuples is a list of names, not a table."""
    if names is None:
        return None
    names = unmasked(names, "names")
    if not np.iterable(names):
        raise InputError(f"names is {shown(names)}; it must be a list, one name per node")
    listed = names if isinstance(names, np.ndarray) else list(names)
    found = np.asarray(listed) if isinstance(listed, np.ndarray) or all(_is_integer(name) for name in listed) else None
    if found is None or found.dtype.kind not in "iu":
        found = np.empty(len(listed), object)
        found[:] = listed.tolist() if isinstance(listed, np.ndarray) else listed
    if found.shape != (count,):
        raise InputError(f"there are {count:,} nodes and names of the shape {found.shape}; give one name per node")
    try:
        distinct = len(set(found.tolist()))
    except TypeError as error:
        raise InputError(f"names must be integers, text or other values that can be hashed: {error}") from None
    if distinct != count:
        twice = next(name for name, count in Counter(found.tolist()).items() if count > 1)
        raise InputError(f"names must be distinct; at least two nodes are called {shown(twice)}")
    return found


def _is_integer(name: Any) -> bool:
    return isinstance(name, (int, np.integer)) and not isinstance(name, bool)


def is_known(name: Any, index: dict[Any, int]) -> bool:
    """Whether a name is there; one that cannot be hashed is not."""
    try:
        return name in index
    except TypeError:
        return False


def has_text(nodes: Any) -> bool:
    """Whether a node, or one of several (a list, tuple or array), is text."""
    if isinstance(nodes, str):
        return True
    if isinstance(nodes, np.ndarray):
        return nodes.dtype.kind in "SU" or (nodes.dtype.kind == "O" and any(isinstance(n, str) for n in nodes.flat))
    return isinstance(nodes, list | tuple) and any(isinstance(node, str) for node in nodes)
