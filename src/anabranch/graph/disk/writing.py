"""Writing the file of a disk index: slots are given out, and blocks filled and sealed a piece at a time."""
# Shapes: N vectors, D dimension, L room for links, E elements of the entry layer, R roots, U blocks, P elements of a piece

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.graph.array_file import Shape, filling_arrays
from anabranch.graph.codes import ProductCodes
from anabranch.graph.disk.blocks import LABEL, NUMBER, PAGE, block_of, element_bytes, padded_width, seal
from anabranch.graph.disk.packing import packed
from anabranch.graph.disk.source import Source
from anabranch.graph.disk.stored import KIND, VERSION
from anabranch.graph.workers import Workers


@dataclass(frozen=True)
class Graph:
    """Who is linked with whom, by row.

    Attributes:
        link_NL: int32 [N, L], rows + 1; 0 for none. Written to.
        root_R: rows from which all others can be reached.
        row_E: rows of the entry layer.
        link_EL: int32, numbers in that layer; -1 for none.
        num_shards: in which it was built.
    """

    link_NL: np.ndarray
    root_R: np.ndarray
    row_E: np.ndarray
    link_EL: np.ndarray
    num_shards: int


def write(
    path: str | Path,
    source: Source,
    codes: ProductCodes,
    graph: Graph,
    degree_N: np.ndarray,
    id_N: np.ndarray | None,
    meta: dict[str, Any],
    piece: int,
    workers: int,
) -> None:
    """Write an index, all or nothing. ``meta`` has all but what is told here; ``degree_N`` is as of `packed`. Raises as `atomic_file`."""
    count, links = source.count, int(meta["links"])
    block, per = block_of(source.dim, links)
    order_N, slot_N = packed(graph.link_NL, degree_N, per)
    by_id_N = slot_N if id_N is None else slot_N[np.argsort(id_N, kind="stable")]
    small: dict[str, np.ndarray] = {
        "centres": codes.centre_MWK,
        "slots": by_id_N,
        "roots": np.sort(slot_N[graph.root_R]),
        "entry_slots": slot_N[graph.row_E],
        "entry_links": _packed_left(graph.link_EL),
    }
    if id_N is not None:
        small["ids"] = np.sort(id_N)
    shapes = {name: Shape(array.dtype, array.shape) for name, array in small.items()}
    shapes["codes"] = Shape(np.uint8, (count, codes.num_parts))
    shapes["blocks"] = Shape(np.uint64, (-(-count // per), block // 8), PAGE)
    step = max(1, piece // per)
    with filling_arrays(path, KIND, shapes, meta, VERSION) as file, Workers(workers) as pool:
        for name, array in small.items():
            file.put(name, 0, array)
        for first in range(0, -(-count // per), step):
            row_P = order_N[first * per : (first + step) * per]
            vector_PD = source.take(row_P)
            link_PL = _slots_of(graph.link_NL[row_P, :links], slot_N)
            label_P = row_P.astype(np.int64) if id_N is None else id_N[row_P]
            block_UW = filled(vector_PD, label_P, link_PL)
            seal(block_UW, first, int(meta["seed"]))
            file.put("blocks", first, block_UW)
            file.put("codes", first * per, codes.encode(vector_PD, pool))


def _slots_of(link_PL: np.ndarray, slot_N: np.ndarray) -> np.ndarray:
    """Slots of rows + 1; -1 for 0."""
    return np.where(link_PL > 0, slot_N[link_PL - 1], -1).astype(np.int32)


def _packed_left(link_EL: np.ndarray) -> np.ndarray:
    """The same links, with nothing between or before them."""
    order = np.argsort(link_EL < 0, axis=1, kind="stable")
    return np.take_along_axis(link_EL, order, 1)


def filled(vector_PD: np.ndarray, label_P: np.ndarray, link_PL: np.ndarray) -> np.ndarray:
    """Blocks of elements in the order of their slots, without digests: uint64 [U, W]. Links are slots; -1 behind the last."""
    (count, dim), links = vector_PD.shape, link_PL.shape[1]
    (block, per), size = block_of(dim, links), element_bytes(dim, links)
    block_UB = np.zeros((-(-count // per), block), np.uint8)
    parts = [
        (0, np.ascontiguousarray(vector_PD, "<f4")),
        (4 * padded_width(dim), label_P.astype("<i8")[:, None]),
        (4 * padded_width(dim) + LABEL, (link_PL >= 0).sum(1, dtype="<i4")[:, None]),
        (4 * padded_width(dim) + LABEL + NUMBER, link_PL.astype("<i4")),
    ]
    for place in range(min(per, count)):
        for start, array in parts:
            found = np.ascontiguousarray(array[place::per])
            if found.size:
                found = found.view(np.uint8).reshape(len(found), -1)
                begin = place * size + start
                block_UB[: len(found), begin : begin + found.shape[1]] = found
    return block_UB.view(np.uint64)
