"""Headers of files, read strictly: of the right types, or an error about the file, whatever JSON can hold."""

import copy

import numpy as np
import pytest

from anabranch.errors import CapacityError, DataError, InputError
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.header import check_header, described, whole
from anabranch.graph.hnsw import HNSW, ShardedHNSW
from anabranch.graph.hnsw.changing import MOST
from anabranch.graph.names import Names, read_names, write_names
from anabranch.graph.rank import GRank, Item, Peer
from anabranch.graph.rows import SparseRows
from graph_header_fuzz import parts, put

GOOD = {
    "kind": "x",
    "version": 1,
    "meta": {},
    "arrays": [
        {"name": "a", "dtype": "<i4", "shape": [2, 3], "offset": 0, "crc": 7},
        {"name": "b", "dtype": "|u1", "shape": [], "offset": 64, "crc": 0},
    ],
}
START, SIZE = 64, 64 + 64 + 1


def changed(at, value):
    made = copy.deepcopy(GOOD)
    outer = made
    for key in at[:-1]:
        outer = outer[key]
    outer[at[-1]] = value
    return made


def test_a_header_that_is_one():
    check_header(GOOD, START, SIZE)
    check_header(changed(("arrays",), []), START, SIZE)
    check_header(changed(("arrays", 0, "shape"), [0, 2**59]), START, SIZE)


BAD = [
    (("kind",), None, "kind is None, which is no str"),
    (("version",), 1.0, "version is 1.0; it is a whole number"),
    (("version",), True, "version is True"),
    (("meta",), [1], r"meta is \[1\], which is no dict"),
    (("arrays",), {"a": 1}, "arrays is .*, which is no list"),
    (("arrays", 0), 3, "an array is 3, which is no dict"),
    (("arrays", 0, "name"), ["a"], "the name of an array is"),
    (("arrays", 0, "name"), "b", "there are two arrays 'b'"),
    (("arrays", 0, "dtype"), [["a", "i4"]], "the type of 'a' is"),
    (("arrays", 0, "dtype"), "V8", "'a' is of type"),
    (("arrays", 0, "dtype"), "(2,)i4", "'a' is of type"),
    (("arrays", 0, "dtype"), "S0", "'a' is of type"),
    (("arrays", 0, "dtype"), "9" * 5000, "the type of 'a' is '9999"),
    (("arrays", 0, "dtype"), "nothing", "the type of 'a' is 'nothing'"),
    (("arrays", 0, "shape"), "ab", "the shape of 'a' is 'ab'"),
    (("arrays", 0, "shape"), [2.0, 3], "a side of 'a' is 2.0"),
    (("arrays", 0, "shape"), [-1, 3], "a side of 'a' is -1"),
    (("arrays", 0, "shape"), [0, 2**70], "a side of 'a' is 1180591620717411303424"),
    (("arrays", 0, "shape"), [0, 2**62], "a shape that no array has"),
    (("arrays", 0, "shape"), [1] * 65, "a shape that no array has"),
    (("arrays", 0, "shape"), [10**400], "a side of 'a' is a huge number"),
    (("arrays", 0, "offset"), 0.5, "the place of 'a' is 0.5"),
    (("arrays", 0, "offset"), 0.0, "the place of 'a' is 0.0"),
    (("arrays", 0, "offset"), 2**40, "'a' would reach beyond the end"),
    (("arrays", 1, "offset"), 65, "'b' would reach beyond the end"),
    (("arrays", 0, "crc"), None, "the checksum of 'a' is None"),
    (("arrays", 0, "crc"), 2**32, "the checksum of 'a' is 4294967296"),
]


@pytest.mark.parametrize(("at", "value", "message"), BAD)
def test_a_header_that_is_none(at, value, message):
    with pytest.raises(ValueError, match=message):
        check_header(changed(at, value), START, SIZE)


@pytest.mark.parametrize("at", [(0, "name"), (0, "dtype"), (1, "shape"), (1, "offset"), (0, "crc")])
def test_what_is_missing_of_an_array(tmp_path, at):
    path = tmp_path / "file"
    write_arrays(path, "x", {"a": np.arange(6), "b": np.arange(3)})
    header, body = parts(path)
    del header["arrays"][at[0]][at[1]]
    put(path, header, body)
    for mmap in (False, True):
        with pytest.raises(DataError, match="header that this release cannot read"):
            read_arrays(path, "x", mmap=mmap)


def test_whole_numbers():
    assert whole(3, "n") == 3
    assert whole(2**63 - 1, "n") == 2**63 - 1
    assert whole(-1, "n", -1) == -1
    for bad in (True, 1.0, "1", None, -1, 2**63, float("inf"), [1]):
        with pytest.raises(ValueError, match=r"n is .*; it is a whole number from 0 to"):
            whole(bad, "n")


def test_what_goes_wrong_with_a_header_is_told_of_the_file():
    for error in (
        KeyError("x"),
        TypeError("x"),
        AttributeError("x"),
        OverflowError("x"),
        InputError("x"),
        DataError("x"),
        IndexError("x"),
    ):
        with (
            pytest.raises(DataError, match=r"f is damaged: its header does not describe a thing .*x"),
            described("f", "a thing"),
        ):
            raise error
    # Our own, or nobody's fault.
    for error in (DataError("other of f"), CapacityError("other"), MemoryError("other"), AssertionError("other")):
        with pytest.raises(type(error), match="other"), described("f", "a thing"):
            raise error


def drawn(count=60):
    return np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)


META = [
    (("drawn",), -1),
    (("drawn",), 2**70),
    (("drawn",), 2**63 - 1),
    (("changed",), 2**63 - 1),
    (("copies",), 2**63 - 1),
    (("next_id",), -5),
    (("next_id",), 59),
    (("next_id",), 2**63 + 1),
    (("entry",), 2**70),
    (("top",), float("inf")),
    (("top",), 1.0),
    (("options", "ef_construction"), 2**60),
    (("options", "ef_construction"), 2**70),
    (("options", "rerank"), 2**70),
    (("options", "compact_at"), "x"),
    (("options", "dim"), True),
    (("options",), None),
]


@pytest.mark.parametrize(("at", "value"), META)
def test_what_an_index_says_of_itself(tmp_path, at, value):
    path, index = tmp_path / "index", HNSW(4, M=4, ef_construction=8)
    index.add(drawn())
    index.save(path)
    header, body = parts(path)
    outer = header["meta"]
    for key in at[:-1]:
        outer = outer[key]
    outer[at[-1]] = value
    put(path, header, body)
    for mmap in (False, True):
        with pytest.raises(DataError, match="is damaged"):
            HNSW.load(path, mmap=mmap)


@pytest.mark.parametrize("name", ["drawn", "changed", "copies", "next_id"])
def test_the_largest_that_a_file_may_say_is_said_again(tmp_path, name):
    """One more, and what was written could not be read."""
    path = tmp_path / "index"
    for count in (0, 60):
        index = HNSW(4, M=4, ef_construction=8)
        index.add(drawn()[:count])
        index.save(path)
        header, body = parts(path)
        header["meta"][name] = 2**63 if name == "next_id" else MOST
        put(path, header, body)
        loaded = HNSW.load(path)
        loaded.add(drawn()[:1], [1000])
        loaded.add(drawn()[:9] + 1, np.arange(2000, 2009))
        loaded.update([1000], drawn()[:1] + 2)
        loaded.save(path)
        assert len(HNSW.load(path)) == count + 10


@pytest.mark.parametrize(
    ("name", "value", "message"), [("label", -3, "do not fit together"), ("centre", np.nan, "centre is not finite")]
)
def test_numbers_of_an_index_that_cannot_be(tmp_path, name, value, message):
    index = HNSW(4, M=4, ef_construction=8, dtype="i8")
    index.add(drawn(1200) + 100)
    index.remove([5])
    state = index.__getstate__()
    assert name in state["arrays"]
    # One that went may have any.
    state["arrays"]["label"][5] = -1
    HNSW._made(state["arrays"], state["meta"], mapped=False, source="s", workers=1)
    state["arrays"][name][0] = value
    with pytest.raises(DataError, match=message):
        HNSW._made(state["arrays"], state["meta"], mapped=False, source="s", workers=1)


def test_options_that_no_memory_holds():
    for options in ({"ef_construction": 2**70}, {"ef_construction": 2**20 + 1}, {"rerank": 2**70}, {"rerank": 2**31}):
        name = next(iter(options))
        with pytest.raises(InputError, match=f"{name} is .*; it must be at most"):
            HNSW(4, **options)
    with pytest.raises(InputError, match="compact_at is 'x'"):
        HNSW(4, compact_at="x")
    index = HNSW(4, ef_construction=2**20, rerank=2**31 - 1, dtype="i8")
    index.add(drawn(5))
    assert index.search(drawn(1), 2)[0].tolist() == [[0, index.search(drawn(1), 2)[0][0, 1]]]


def test_other_files(tmp_path):
    """One of each of which a header says much: the fuzzer does the rest."""
    index = ShardedHNSW(4, 2, M=4)
    index.add(drawn())
    peer = Peer([Item("x")], "a")
    peer.record("t", "x")
    made = {
        "shards": (index, lambda path: ShardedHNSW.load(path), ("shards",)),
        "peer": (peer, Peer.load, ("held", "a")),
        "grank": (GRank().fit([("a", "t", 1)]), GRank.load, ("names", "terms")),
        "rows": (SparseRows.from_rows([([1], [0.5])], 5), SparseRows.load, ("num_columns",)),
    }
    for name, (held, load, at) in made.items():
        path = tmp_path / name
        held.save(path)
        load(path)
        header, body = parts(path)
        outer = header["meta"]
        for key in at[:-1]:
            outer = outer[key]
        for value in (3.5, [None], None):
            outer[at[-1]] = value
            put(path, header, body)
            with pytest.raises(DataError, match=f"{name}.* is damaged"):
                load(path)


def test_a_file_of_names_without_names(tmp_path):
    path, index = tmp_path / "index", HNSW(4)
    index.add(drawn(3))
    index.save(path)
    place = write_names(path, Names(["a", "b", "c"]))
    header, body = parts(place)
    header["arrays"][1]["name"] = "other"
    put(place, header, body)
    with pytest.raises(DataError, match="does not describe names"):
        read_names(path)
