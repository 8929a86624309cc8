"""The file of a disk index: what lies in it, and that what comes out of it fits together.

One checked file (`anabranch.graph.array_file`) with the arrays

    codes          uint8 [N, M], by slot
    centres        float32 [M, W, 256], what codes stand for (`anabranch.graph.codes`)
    slots          int32 [N], the slot of each id, ids rising
    ids            int64 [N], rising; not there where they are 0 ... N - 1
    roots          int32 [R], slots from which all others can be reached
    entry_slots    int32 [E], of the entry layer; walks over it begin at the first
    entry_links    int32 [E, L], numbers in that layer; -1 behind the last
    blocks         uint64 [U, W], see `blocks`

All but the blocks are read and compared with their checksums when it is opened; each block has a digest of its own.
"""
# Shapes: N vectors, M parts of a code, E elements of the entry layer, R roots

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.errors import BackendError, DataError
from anabranch.graph.array_file import Left, kind_of, read_beside
from anabranch.graph.codes import ProductCodes
from anabranch.graph.disk.blocks import Form, block_of, element_bytes, padded_width
from anabranch.graph.guarded import held
from anabranch.graph.header import described, whole

KIND = "disk vector index"
VERSION = 1
METRICS = ("l2", "ip", "cosine")

# Other arrays than the codes are small, and kernels take no read-only ones.
_MAPPED = ("codes",)


@dataclass(frozen=True)
class Stored:
    """What a file holds, and the file itself, which is open."""

    form: Form
    left: Left
    metric: str
    M: int
    shards: int
    size_bytes: int
    code_NM: np.ndarray
    codes: ProductCodes
    slot_N: np.ndarray
    id_N: np.ndarray | None
    root_R: np.ndarray
    slot_E: np.ndarray
    link_EL: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of what is in memory, or mapped."""
        arrays = [self.code_NM, self.codes.centre_MWK, self.slot_N, self.root_R, self.slot_E, self.link_EL]
        return sum(array.nbytes for array in arrays) + (0 if self.id_N is None else self.id_N.nbytes)

    def why_bad(self, number: int) -> str:
        """Of a block that did not come as it was written."""
        try:
            came = len(os.pread(self.left.file.fileno(), self.form.block, self.form.place + number * self.form.block))
        except OSError as error:
            return f"cannot be read: {(error.strerror or str(error)).lower()}"
        if came < self.form.block:
            return f"ends after {came:,} of {self.form.block:,} bytes"
        return "is not what was written (its digest or what it holds is wrong); make the index again"


def check_system() -> None:
    """Raises BackendError where files cannot be read at a place."""
    if not hasattr(os, "pread"):
        raise BackendError("an index on disk needs a system that reads at a place of a file (pread)")


def is_on_disk(path: str | Path) -> bool:
    """Whether a file, which may be damaged or missing, says that it is one of these."""
    try:
        return kind_of(path) == KIND
    except DataError:
        return False


def read(path: str | Path, *, mmap: bool) -> Stored:
    """Open a file. Raises DataError as `read_arrays`, and where its parts do not fit together."""
    check_system()
    found, left = read_beside(path, KIND, "blocks", versions=(VERSION,), mmap=mmap)
    try:
        return _described(found.arrays, found.meta, left, f"{path}")
    except BaseException:
        left.file.close()
        raise


def _described(arrays: dict[str, np.ndarray], meta: dict[str, Any], left: Left, source: str) -> Stored:
    # By address; in the checked build between pages that may not be touched.
    arrays = {name: held(array) if name in _MAPPED else np.array(array) for name, array in arrays.items()}
    if any(array.ndim == 0 for array in arrays.values()):
        raise DataError(f"{source} is damaged: it holds a single number")
    needed = {"codes", "centres", "slots", "roots", "entry_slots", "entry_links"}
    if {*arrays} - {"ids"} != needed:
        raise DataError(f"{source} is damaged: it holds the arrays {sorted(arrays)}")
    with described(source, "an index"):
        dim, links = whole(meta["dim"], "dim", 1, 2**16), whole(meta["links"], "links", 0, 2**16)
        M, seed, shards = (whole(meta[name], name) for name in ("M", "seed", "shards"))
        metric = meta["metric"]
        if metric not in METRICS:
            raise ValueError(f"metric is {metric!r:.40}")
    try:
        codes = ProductCodes(dim, arrays["centres"])
    except DataError as error:
        raise DataError(f"{source} is damaged: {error}") from None
    count, parts = len(arrays["codes"]), codes.num_parts
    block, per = block_of(dim, links)
    wanted: dict[str, tuple[Any, tuple[int, ...]]] = {
        "codes": (np.uint8, (count, parts)),
        "slots": (np.int32, (count,)),
        "ids": (np.int64, (count,)),
        "roots": (np.int32, (-1,)),
        "entry_slots": (np.int32, (-1,)),
        "entry_links": (np.int32, (len(arrays["entry_slots"]), -1)),
    }
    for name, (dtype, sides) in wanted.items():
        array = arrays.get(name)
        if array is None:
            continue
        fits = array.dtype == dtype and array.ndim == len(sides)
        if not fits or any(side not in (-1, own) for side, own in zip(sides, array.shape, strict=True)):
            raise DataError(f"{source} is damaged: {name!r} is {array.dtype} {list(array.shape)}")
    if left.shape.dtype != np.uint64 or left.shape.sides != (-(-count // per), block // 8):
        raise DataError(f"{source} is damaged: 'blocks' is {left.shape.dtype} {list(left.shape.sides)}")
    if not _is_sound(arrays, count):
        raise DataError(f"{source} is damaged: its slots, ids or entry layer do not fit together; make the index again")
    form = Form(
        file=left.file.fileno(),
        place=left.place,
        block=block,
        per=per,
        size=element_bytes(dim, links),
        width=padded_width(dim),
        links=links,
        elements=count,
        seed=seed,
        cached=0,
        kind=int(metric != "l2"),
        dim=dim,
    )
    size_bytes = os.fstat(left.file.fileno()).st_size
    return Stored(
        form,
        left,
        metric,
        M,
        shards,
        size_bytes,
        arrays["codes"],
        codes,
        arrays["slots"],
        arrays.get("ids"),
        arrays["roots"],
        arrays["entry_slots"],
        arrays["entry_links"],
    )


def _is_sound(arrays: dict[str, np.ndarray], count: int) -> bool:
    """Kernels follow these numbers without looking."""
    slots, roots, entry, links = (arrays[name] for name in ("slots", "roots", "entry_slots", "entry_links"))
    if not 0 < count < 2**31 - 1 or not len(roots) or not len(entry) or not links.shape[1]:
        return False
    if any(array.min() < 0 or array.max() >= count for array in (slots, roots, entry)):
        return False
    is_taken = np.zeros(count, bool)
    is_taken[slots] = True
    ids = arrays.get("ids")
    has_order = ids is None or (ids[0] >= 0 and bool((ids[1:] > ids[:-1]).all()))
    is_once = len(np.unique(entry)) == len(entry)
    return bool(is_taken.all()) and has_order and is_once and links.min() >= -1 and links.max() < len(entry)
