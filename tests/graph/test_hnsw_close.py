"""Neighbours that come in one batch: they find each other, and are found."""

import numpy as np
import pytest
from numba import types

from anabranch.graph import HNSW
from anabranch.graph.hnsw import linking
from anabranch.graph.hnsw.close import BESIDE, OVER_ALL, PLACE

DIM = 16


def around(rng, count, middle):
    return (rng.standard_normal((count, DIM)) + middle).astype(np.float32)


def itself(index, vector_ND, id_N):
    """Share of vectors whose nearest is themselves."""
    return (index.search(vector_ND, 1)[0][:, 0] == id_N).mean()


@pytest.mark.parametrize("away", [2, 3, 50])
@pytest.mark.parametrize("how", ["at once", "behind", "moved"])
def test_a_group_that_comes_together_is_found(away, how):
    rng = np.random.default_rng(1)
    many, group = around(rng, 8000, 0), around(rng, 120, away)
    id_G = np.arange(8000, 8120)
    index = HNSW(DIM, ef_construction=60)
    if how == "at once":
        index.add(np.concatenate([many, group]))
    elif how == "behind":
        index.add(many)
        index.add(group)
    else:
        index.add(np.concatenate([many, around(rng, 120, 0)]))
        index.update(id_G, group)
    assert index.stats()["unreachable"] == 0
    assert itself(index, group, id_G) == 1


def test_rows_sorted_by_their_group_are_found_as_if_they_came_one_by_one():
    rng = np.random.default_rng(1)
    of_N = np.sort(rng.integers(0, 30, 6000))
    vector_ND = (3 * rng.standard_normal((30, DIM))[of_N] + rng.standard_normal((6000, DIM))).astype(np.float32)
    asked = vector_ND[::20]
    nearest = ((asked[:, None] - vector_ND[None]) ** 2).sum(-1).argsort(1)[:, :10]

    def recall(step):
        index = HNSW(DIM, ef_construction=60, seed=1)
        for begin in range(0, 6000, step):
            index.add(vector_ND[begin : begin + step])
        assert index.stats()["unreachable"] == 0
        found = index.search(asked, 10, 100)[0]
        return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, nearest, strict=True)])

    assert recall(6000) > recall(1) - 0.01


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_groups_give_the_same_bytes_with_any_threads(quantization, tmp_path):
    rng = np.random.default_rng(2)
    vector_ND = np.concatenate([around(rng, 3000, 0), around(rng, 300, 40), around(rng, 1500, 0)])
    files = []
    for workers in (1, 3):
        index = HNSW(DIM, ef_construction=40, quantization=quantization)
        index.add(vector_ND, workers=workers)
        index.save(tmp_path / f"{workers}.hnsw")
        files.append((tmp_path / f"{workers}.hnsw").read_bytes())
    assert files[0] == files[1]


def test_which_are_close_by_hand(monkeypatch):
    """The kernel against distances computed here, over whole batches and tried ones."""
    seen = []
    find_close = linking.find_close

    def noted(graph, slot_B, begin, end, step, is_close_B):
        find_close(graph, slot_B, begin, end, step, is_close_B)
        numbers = range(begin, end, step)
        seen.append((slot_B.copy(), list(numbers), is_close_B.copy(), held.links[slot_B].copy()))

    rng = np.random.default_rng(3)
    vector_ND = np.concatenate([around(rng, 6000, 0), *(around(rng, 8, 6) for _ in range(30))])
    order = rng.permutation(2000) + 4240
    vector_ND[4240:6240] = vector_ND[order]
    index = HNSW(DIM, ef_construction=40)
    index.add(vector_ND[:4240])
    held = index._storage
    monkeypatch.setattr(linking, "find_close", noted)
    index.add(vector_ND[4240:], workers=1)
    assert seen
    marks = []
    for slot_B, numbers, is_close_B, link_BC in seen:
        size = len(slot_B)
        steps = [*range(-BESIDE, 0), *range(1, BESIDE + 1)]
        for number in numbers:
            near = {number + step for step in steps if 0 <= number + step < size}
            near |= {(number + turn * max(size // OVER_ALL, 1)) % size for turn in range(1, OVER_ALL + 1)}
            links = link_BC[number][link_BC[number] >= 0]

            def far(others, own=vector_ND[slot_B[number]]):
                return np.sort(((vector_ND[others].astype(float) - own) ** 2).sum(1))

            least = far(links)[min(PLACE, len(links)) - 1]
            closest = far(slot_B[sorted(near - {number})])[0]
            assert is_close_B[number] == (closest < least), (closest, least)
            marks.append(is_close_B[number])
    assert 0 < sum(marks) < len(marks)


def test_batches_of_any_size_are_linked_by_kernels_that_were_compiled_once(monkeypatch):
    """A view of every sixteenth of a batch of 256 was another type: the kernel was compiled again, in the midst of a build."""
    monkeypatch.setattr(linking, "SHARE", 4)
    index = HNSW(DIM, ef_construction=40, workers=1)
    index.add(around(np.random.default_rng(0), 3000, 0))
    index.add(around(np.random.default_rng(1), 1, 0))
    for kernel in (linking.link_new, linking.link_back, linking.find_close):
        assert kernel.signatures
        arrays = [kind for signature in kernel.signatures for kind in signature if isinstance(kind, types.Array)]
        assert {kind.layout for kind in arrays} == {"C"}
    # One for arrays that are written, and one for such as may only be read.
    assert len(linking.link_new.signatures) <= 2


@pytest.mark.parametrize("away", [0, 50])
def test_where_all_are_close_a_few_are_tried(monkeypatch, away):
    """Lists of the others would be worked out to be thrown away."""
    tried, forward = [], linking.Linker._forward
    monkeypatch.setattr(
        linking.Linker,
        "_forward",
        lambda self, slot_B, workers: tried.append(len(slot_B)) or forward(self, slot_B, workers),
    )
    # So that a batch of a small index is large enough.
    monkeypatch.setattr(linking, "LEAST_TRIED", 2 * linking.TRIED)
    rng, count = np.random.default_rng(3), linking.LEAST_TRIED
    index = HNSW(DIM, ef_construction=40, workers=1)
    index.add(around(rng, linking.SHARE * count, 0))
    tried.clear()
    index.add(around(rng, count, away))
    few = len(range(0, count, linking.TRIED))
    assert tried == ([few] if away else [few, count - few])
