"""The file of an index on disk, byte by byte: blocks, links as slots, and what lies beside them."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.graph.array_file import read_arrays
from anabranch.graph.codes import ProductCodes
from anabranch.graph.disk.blocks import block_of, element_bytes, padded_width, seal
from anabranch.graph.disk.source import Rows
from anabranch.graph.disk.stored import KIND
from anabranch.graph.disk.writing import Graph, _packed_left, _slots_of, filled, write


def elements(block_UW, dim, links):
    """Elements of blocks, parsed by the format: vector, label, links."""
    block, per = block_of(dim, links)
    found, size, width = [], element_bytes(dim, links), padded_width(dim)
    for raw in (row.tobytes() for row in block_UW):
        assert len(raw) == block
        for place in range(per):
            one = raw[place * size : (place + 1) * size]
            vector = struct.unpack_from(f"<{width}f", one)
            label, number = struct.unpack_from("<qi", one, 4 * width)
            link = struct.unpack_from(f"<{links}i", one, 4 * width + 12)
            assert not any(vector[dim:])
            assert all(slot == -1 for slot in link[number:]) or (label, number) == (0, 0)
            found.append((list(vector[:dim]), label, list(link[:number])))
    return found


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 20),
    dim=st.sampled_from([1, 5, 16, 33, 1500]),
    links=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_a_block_holds_vectors_labels_and_links(count, dim, links, seed):
    draw = np.random.default_rng(seed)
    vectors = draw.standard_normal((count, dim)).astype(np.float32)
    labels = draw.integers(0, 2**62, count)
    length = draw.integers(0, links + 1, count)
    link_PL = np.where(np.arange(links) < length[:, None], draw.integers(0, 1000, (count, links)), -1).astype(np.int32)
    block_UW = filled(vectors, labels, link_PL)
    per = block_of(dim, links)[1]
    assert len(block_UW) == -(-count // per)
    found = elements(block_UW, dim, links)
    for row in range(count):
        assert found[row] == (vectors[row].tolist(), labels[row], link_PL[row, : length[row]].tolist())
    # Behind the last there is nothing.
    assert all(one == ([0.0] * dim, 0, []) for one in found[count:])


def test_links_become_slots():
    slot_N = np.array([3, 0, 2, 1], np.int32)
    np.testing.assert_array_equal(_slots_of(np.array([[1, 4, 0], [2, 0, 0]]), slot_N), [[3, 1, -1], [0, -1, -1]])


def test_links_of_the_entry_layer_have_no_gaps():
    np.testing.assert_array_equal(
        _packed_left(np.array([[-1, 5, -1, 2], [7, -1, -1, -1], [-1, -1, -1, -1], [1, 2, 3, 4]])),
        [[5, 2, -1, -1], [7, -1, -1, -1], [-1, -1, -1, -1], [1, 2, 3, 4]],
    )


@pytest.mark.parametrize("ids", [None, [40, 10, 7, 99, 0, 12, 55, 3, 8, 21]])
@pytest.mark.parametrize("piece", [1, 3, 100])
def test_a_whole_file_by_hand(tmp_path, ids, piece):
    count, dim, links = 10, 300, 3
    vectors = np.random.default_rng(0).standard_normal((count, dim)).astype(np.float32)
    # A ring: each leads to the next and the one before it.
    link_NL = np.array([[(row + 1) % count + 1, (row - 1) % count + 1, 0] for row in range(count)], np.int32)
    graph = Graph(link_NL.copy(), np.array([4, 2]), np.array([5, 1]), np.array([[-1, 1], [0, -1]], np.int32), 1)
    codes = ProductCodes.train(vectors, 4, seed=0)
    meta = {"dim": dim, "metric": "l2", "M": 2, "links": links, "seed": 123, "shards": 1}
    id_N = None if ids is None else np.array(ids)
    degree_N = np.full(count, 2, np.int32)
    write(tmp_path / "i.anb", Rows(vectors, "l2"), codes, graph, degree_N, id_N, meta, piece, 1)
    found = read_arrays(tmp_path / "i.anb", KIND).arrays
    label_N = np.arange(count) if id_N is None else id_N
    block_UW, per = found["blocks"], block_of(dim, links)[1]
    # Three in a block, so that pieces end within and between blocks.
    assert (per, len(block_UW)) == (3, 4)
    held = elements(block_UW, dim, links)[:count]
    slot_N = {label: slot for slot, (_, label, _) in enumerate(held)}
    assert sorted(slot_N) == sorted(label_N.tolist())
    for row, label in enumerate(label_N.tolist()):
        vector, _, link = held[slot_N[label]]
        assert vector == vectors[row].tolist()
        assert link == [slot_N[label_N[(row + step) % count]] for step in (1, -1)]
    assert found["slots"].tolist() == [slot_N[label] for label in sorted(slot_N)]
    assert ("ids" in found) == (ids is not None)
    assert ids is None or found["ids"].tolist() == sorted(ids)
    assert found["roots"].tolist() == sorted(slot_N[label_N[row]] for row in (4, 2))
    assert found["entry_slots"].tolist() == [slot_N[label_N[row]] for row in (5, 1)]
    assert found["entry_links"].tolist() == [[1, -1], [0, -1]]
    by_slot = vectors[[label_N.tolist().index(label) for _, label, _ in held]]
    np.testing.assert_array_equal(found["codes"], codes.encode(by_slot))
    np.testing.assert_array_equal(found["centres"], codes.centre_MWK)
    # Each with the digest of its number.
    again = block_UW.copy()
    again[:, -1] = 0
    seal(again, 0, 123)
    np.testing.assert_array_equal(again, block_UW)
