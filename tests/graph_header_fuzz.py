"""Changes headers of every kind of file by type, with right sums, opens the file (mapped and not) and works on what comes of it.

    python graph_header_fuzz.py FORMAT[,FORMAT] CASES SEED

As if a foreign program, or a release that is wrong, had written them: a number becomes text, a list, a float, a number of 2**70 or one that
is infinite, and things go missing. A case ends with an error that says so, or comes to its end: any other error ends this process. Prints
how many did what, a line for each format.
"""

import copy
import json
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np

from anabranch.errors import AnabranchError
from anabranch.graph import FastRP, GraphVite, hnswlib_compat
from anabranch.graph.array_file import ALIGN, MAGIC
from anabranch.graph.names import Names, read_names, write_names
from anabranch.graph.rank import Defences, GRank, Item, Peer
from graph_file_fuzz import GRAPH, USES, VECTORS
from graph_file_fuzz import made as made_of_arrays

# What may stand in place of anything.
VALUES = [
    *[None, True, False, 0, -1, -5, 1, 7, 2**31, 2**53, 2**60, 2**63, 2**64, 2**70, -(2**70), 10**400],
    *[0.0, 0.5, -0.5, 1.0, 3.0, 1e18, 1e300, float("inf"), float("-inf"), float("nan")],
    *["", "a", "l2", "f32", "9" * 5000, "\ud800", "V8", ">i4", "<f4", "|O", "S0"],
    *[[], [1], ["a"], [[1]], [0, 2**70], [2**40, 0], [0.5], [None], {}, {"a": 1}, [["a", "i4"]]],
]


def parts(path):
    """The header of a file, and what lies behind it."""
    whole = path.read_bytes()
    length = int(np.frombuffer(whole[len(MAGIC) : len(MAGIC) + 8], "<u8")[0])
    begin = len(MAGIC) + 16
    return json.loads(whole[begin : begin + length]), whole[_start(length) :]


def _start(length):
    return -(-(len(MAGIC) + 16 + length + 4) // ALIGN) * ALIGN


def put(path, header, body):
    """Write a file with this header, whose sum is right."""
    text = json.dumps(header).encode()
    start = _start(len(text))
    head = MAGIC + np.array([len(text), start + len(body)], "<u8").tobytes() + text
    head += np.array([zlib.crc32(text)], "<u4").tobytes()
    path.write_bytes(head.ljust(start, b"\0") + body)


def places(value, at=()):
    """Where something stands in JSON: keys and numbers, from the outside in. Of long lists the first and the last."""
    if at:
        yield at
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*at, key))
    if isinstance(value, list):
        for number in sorted({0, len(value) - 1} if len(value) > 8 else range(len(value))):
            if value:
                yield from places(value[number], (*at, number))


def changed(header, draw):
    """A header with something in it changed, missing or twice, and what that is."""
    made = copy.deepcopy(header)
    every = list(places(made))
    at = every[draw.integers(len(every))]
    outer = made
    for key in at[:-1]:
        outer = outer[key]
    what = draw.integers(8)
    if what == 0:
        outer.pop(at[-1])
        return made, (at, "missing")
    if what == 1 and isinstance(outer, list):
        outer.append(outer[at[-1]])
        return made, (at, "twice")
    value = VALUES[draw.integers(len(VALUES))]
    if what == 2 and isinstance(outer[at[-1]], int):
        value = outer[at[-1]] + int(draw.integers(-2, 3))
    if what == 3 and type(outer[at[-1]]) in (int, float):
        value = float(outer[at[-1]])
    outer[at[-1]] = value
    return made, (at, repr(value)[:40])


def use_names(path, mmap):
    read_names(path, np.arange(3))


def use_fastrp(path, mmap):
    model = FastRP.load(path)
    model.vectors([0, 1])
    model.transform(np.ones((1, 40)))


def use_graphvite(path, mmap):
    model = GraphVite.load(path)
    model.transform([0, 3])
    model.predict([[0, 1]])
    model.resume(GRAPH, epochs=1)


def use_peer(path, mmap):
    peer = Peer.load(path)
    peer.query("t")
    peer.record("t", 1)
    peer.save(path)


def use_grank(path, mmap):
    model = GRank.load(path)
    model.rank("t", "a")


def use_hnswlib(path, mmap):
    index = hnswlib_compat.Index("l2", 6)
    index.load_index(path)
    index.knn_query(VECTORS[:2], 3)
    index.add_items(VECTORS[:2], [10**6, 10**6 + 1])


def use_brute(path, mmap):
    index = hnswlib_compat.BFIndex("l2", 6)
    index.load_index(path)
    index.knn_query(VECTORS[:2], 3)
    index.add_items(VECTORS[:2], [10**6, 10**6 + 1])


MORE = {
    "names": use_names,
    "fastrp": use_fastrp,
    "graphvite": use_graphvite,
    "peer": use_peer,
    "grank": use_grank,
    "hnswlib": use_hnswlib,
    "brute": use_brute,
}
ALL = {**USES, **MORE}

# That library has errors of its own.
ERRORS = {kind: RuntimeError if kind in ("hnswlib", "brute") else AnabranchError for kind in ALL}


def made(kind, path):
    """A good file of each format; of names beside an index, which is at ``path``."""
    if kind == "names":
        made_of_arrays("hnsw-f32", path)
        write_names(path, Names([f"n{number}" for number in range(1300)]))
    elif kind == "fastrp":
        FastRP(dim=8, keep_powers=True).fit(GRAPH).save(path)
    elif kind == "graphvite":
        GraphVite(dim=8, epochs=1).fit(GRAPH).save(path)
    elif kind == "peer":
        peer = Peer([Item("x", "y")], "a", defences=Defences(ttl=None))
        peer.merge({"from": "b", "rows": [["b", number, "t", 1, "", "", [], [], None, ""] for number in (0, 1, 5)]})
        peer.query("t")
        peer.save(path)
    elif kind == "grank":
        GRank().fit([("a", "t", 1), ("b", "t", 2), ("b", "u", 1)], [Item(1), Item(2)]).save(path)
    elif kind == "hnswlib":
        index = hnswlib_compat.Index("l2", 6)
        index.init_index(2000, ef_construction=12, M=4)
        index.add_items(VECTORS)
        index.save_index(path)
    elif kind == "brute":
        index = hnswlib_compat.BFIndex("l2", 6)
        index.init_index(2000)
        index.add_items(VECTORS[:300])
        index.save_index(path)
    else:
        made_of_arrays(kind, path)


def main(kind, cases, seed):
    draw, told = np.random.default_rng(seed), {"refused": 0, "used": 0}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.anb"
        made(kind, path)
        ALL[kind](path, False)
        made(kind, path)
        place = path.with_name(f"{path.name}.names") if kind == "names" else path
        header, body = parts(place)
        for _ in range(cases):
            bad, what = changed(header, draw)
            put(place, bad, body)
            mmap = bool(draw.integers(2))
            try:
                ALL[kind](path, mmap)
                told["used"] += 1
            except ERRORS[kind]:
                told["refused"] += 1
            except BaseException as error:
                if "--go-on" not in sys.argv:
                    raise AssertionError(f"{kind}: {what}, {mmap}") from error
                import traceback

                last = traceback.extract_tb(error.__traceback__)[-1]
                print(
                    kind,
                    what,
                    mmap,
                    type(error).__name__,
                    str(error)[:100],
                    f"{Path(last.filename).name}:{last.lineno}",
                )
    print(json.dumps({"format": kind, **told}), flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name in sys.argv[1].split(","):
        main(name, int(sys.argv[2]), int(sys.argv[3]))
