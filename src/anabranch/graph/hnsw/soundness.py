"""Whether the arrays of a file fit together: kernels follow links without looking, so whatever they follow is looked at here."""
# Shapes: N slots

from typing import Any

import numpy as np

from anabranch.errors import DataError
from anabranch.graph.hnsw.groups import groups_in
from anabranch.graph.hnsw.measuring import MOST
from anabranch.graph.hnsw.raw import get_i32, kernel

MAX_LEVEL = 64

# Of an element in a file that is deleted and in no list: a vacant place. 1 is one that is deleted, and perhaps in lists.
VACANT = 2

# Rows of lists that are looked at at once.
ROWS = 1 << 16

# Shape and type of an array by its name.
Wanted = dict[str, tuple[tuple[int, ...], Any]]


def check_shapes(arrays: dict[str, np.ndarray], wanted: Wanted, optional: Wanted, source: str) -> None:
    """Raise DataError naming ``source`` unless there are these arrays, and perhaps the optional ones, of these shapes and types."""
    if {*arrays} - {*optional} != {*wanted}:
        raise DataError(f"{source} is damaged: it holds the arrays {sorted(arrays)}")
    for name, (shape, dtype) in {**wanted, **optional}.items():
        if name in arrays and (arrays[name].shape != shape or arrays[name].dtype != dtype):
            found = f"{arrays[name].dtype} {list(arrays[name].shape)}"
            raise DataError(f"{source} is damaged: {name!r} is {found}, not {np.dtype(dtype)} {list(shape)}")
    if "centre" in arrays and not np.isfinite(arrays["centre"]).all():
        raise DataError(f"{source} is damaged: its centre is not finite")


def wanted_groups(arrays: dict[str, np.ndarray], name: str, dim: int) -> Wanted:
    """What an array of the centres of groups, if there is one, must be: 2 to `MOST` of them."""
    found = arrays.get(name)
    count = len(found) if found is not None and found.ndim == 2 else 0
    return {name: ((min(max(count, 2), MOST), dim), np.float32)}


def check_groups(centre_GD: np.ndarray, aux: np.ndarray, source: str) -> None:
    """Raise DataError naming ``source`` unless rows are of groups that there are: kernels look for that part of a query without asking."""
    if not np.isfinite(centre_GD).all():
        raise DataError(f"{source} is damaged: its centre is not finite")
    if groups_in(aux).max(initial=0) >= len(centre_GD):
        raise DataError(f"{source} is damaged: a row is of a group that is not there; build the index again")


def check_links(arrays: dict[str, np.ndarray], entry: int, top: int, source: str) -> None:
    """Raise DataError naming ``source`` unless links, levels and ids can be those of an index. Vectors are not looked at."""
    if not _is_sound(arrays, entry, top):
        raise DataError(f"{source} is damaged: its links or levels do not fit together; build the index again")


def vacant_in(arrays: dict[str, np.ndarray], entry: int) -> np.ndarray:
    """Slots that are vacant, int64 [S], rising."""
    deleted = arrays["deleted"]
    if "suspect" in arrays:
        return np.flatnonzero(deleted == VACANT)
    # Files of version 1 do not say which are. Those have no id, but what such a file's reader linked again has none either.
    slot_S = np.flatnonzero((arrays["label"] < 0) & (deleted != 0))
    slot_S = slot_S[slot_S != entry]
    if not len(slot_S):
        return slot_S
    is_linked_N = np.zeros(len(deleted), bool)
    for links in (arrays["links"], arrays["upper"]):
        for begin in range(0, len(links), ROWS):
            piece = np.asarray(links[begin : begin + ROWS])
            is_linked_N[piece[(piece >= 0) & (piece < len(deleted))]] = True
    return slot_S[~is_linked_N[slot_S] & (arrays["links"][slot_S, 0] < 0)]


def _is_sound(arrays: dict[str, np.ndarray], entry: int, top: int) -> bool:
    count, num_upper = len(arrays["label"]), len(arrays["upper"])
    if not count:
        return entry == top == -1
    if arrays["deleted"].max() > (VACANT if "suspect" in arrays else 1):
        return False
    level, first = arrays["level"].astype(np.int64), arrays["first"].astype(np.int64)
    is_live = arrays["deleted"] == 0
    live, highest = arrays["label"][is_live], int(level.max())
    # Nothing leads to a place that is vacant, and no walk begins there.
    level_N = np.array(arrays["level"])
    level_N[vacant_in(arrays, entry)] = -1
    if not (level.min() >= 0 and highest <= MAX_LEVEL and _leads_in(level_N, is_live, entry, top)):
        return False
    if first.min() < 0 or (first + level).max() > num_upper or len(np.unique(live)) != len(live):
        return False
    if live.min(initial=0) < 0:
        return False
    # No two have a list in common: one that is taken out would take the other's along.
    above = np.flatnonzero(level > 0)
    above = above[np.argsort(first[above], kind="stable")]
    if (first[above][1:] < (first + level)[above][:-1]).any():
        return False
    lists = [arrays["links"]]
    lists += [
        np.ascontiguousarray(arrays["upper"][first[level >= number] + number - 1]) for number in range(1, highest + 1)
    ]
    return all(links_are_sound(links.ctypes.data, *links.shape, level_N, number) for number, links in enumerate(lists))


def _leads_in(level_N: np.ndarray, is_live_N: np.ndarray, entry: int, top: int) -> bool:
    """Whether walks begin at an element of the highest level of those in the graph. Deleted ones that left it may have had a higher one."""
    if entry == top == -1:
        return not is_live_N.any()
    return 0 <= entry < len(level_N) and level_N[entry] == top >= level_N[is_live_N].max(initial=0)


@kernel
def links_are_sound(links, num_rows, cap, level_N, level):
    """Whether every link is -1, with nothing behind it, or a slot that has the level; ``links`` is an address."""
    for row in range(num_rows):
        is_over = False
        for place in range(cap):
            slot = get_i32(links, row * cap + place)
            if slot < -1 or slot >= len(level_N) or (slot >= 0 and (is_over or level_N[slot] < level)):
                return False
            is_over = slot < 0
    return True
