"""Who has which positions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.cluster.ring import Layout, Placement, Run
from anabranch.errors import InputError

KINDS = ("contiguous", "zigzag", "stripe")


def test_layouts_by_hand():
    assert [Layout("contiguous", 2, 8).places(rank).tolist() for rank in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    # Chunks of 2: rank 0 has the first and the last.
    assert [Layout("zigzag", 2, 8).places(rank).tolist() for rank in range(2)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert [Layout("stripe", 2, 8).places(rank).tolist() for rank in range(2)] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_runs_end_where_documents_and_the_sequence_do():
    layout = Layout("zigzag", 2, 7, documents=(0, 3, 7))
    assert layout.rows == 4
    assert layout.placement.runs[0] == (Run(0, range(0, 2), 0), Run(2, range(6, 7), 1))
    assert layout.placement.runs[1] == (Run(0, range(2, 3), 0), Run(1, range(3, 4), 1), Run(2, range(4, 6), 1))
    assert layout.is_real(0).tolist() == [True, True, True, False]
    assert layout.position_ids(1).tolist() == [2, 0, 1, 2]


def test_positions_may_begin_later():
    layout = Layout("stripe", 2, 5, first=100)
    assert layout.position_ids(1).tolist() == [101, 103, 105]
    assert layout.placement.runs[1] == (Run(0, range(101, 104, 2)),)


def test_places_of_one_placement_stand_behind_those_of_another():
    both = Layout("contiguous", 2, 4).placement.followed_by(Layout("contiguous", 2, 2, first=4).placement)
    assert both == Placement(
        (3, 3), ((Run(0, range(0, 2)), Run(2, range(4, 5))), (Run(0, range(2, 4)), Run(2, range(5, 6))))
    )


@given(st.sampled_from(KINDS), st.integers(1, 6), st.integers(0, 40), st.integers(0, 2), st.randoms())
def test_every_position_is_once_somewhere_and_comes_back(kind, world, length, dim, draw):
    inner = sorted(draw.choices(range(length + 1), k=draw.randrange(4)))
    layout = Layout(kind, world, length, documents=(0, *inner, length))
    found = sorted(place for runs in layout.placement.runs for run in runs for place in run.positions)
    assert found == list(range(length))
    for rank in range(world):
        places = layout.places(rank).tolist()
        for run in layout.placement.runs[rank]:
            assert list(run.positions) == places[run.row : run.row + len(run.positions)]
    whole = torch.arange(1, 1 + 2 * 2 * length).view(2, 2, length).movedim(2, dim)
    parts = [layout.shard(whole, rank, dim=dim, value=-5) for rank in range(world)]
    assert all(part.shape[dim] == layout.rows for part in parts)
    assert torch.equal(layout.unshard(parts, dim=dim), whole)
    assert sum(int((part == -5).sum()) for part in parts) == 4 * (layout.rows * world - length)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Layout("spiral", 2, 8), "layout is 'spiral'; use contiguous, zigzag, stripe"),
        (lambda: Layout("zigzag", 0, 8), "world is 0; there is at least 1 rank"),
        (lambda: Layout("zigzag", 2, -1), "length is -1 and first 0; neither can be negative"),
        (
            lambda: Layout("zigzag", 2, 8, documents=(0, 5, 3, 8)),
            r"documents are \[0, 5, 3, 8\]; they must ascend from 0 to .* 8",
        ),
        (lambda: Layout("zigzag", 2, 8, documents=(0, 7)), r"documents are \[0, 7\]"),
        (lambda: Layout("zigzag", 2, 8).places(2), "rank is 2; use 0 to 1"),
        (lambda: Layout("zigzag", 2, 8).shard(torch.zeros(1, 7), 0), "the tensor has 7 positions, the layout is of 8"),
        (
            lambda: Layout("zigzag", 2, 8).unshard([torch.zeros(1, 4)]),
            r"the parts have \[4\] rows; the layout has 4 on each of 2 ranks",
        ),
    ],
)
def test_what_cannot_be_is_said(make, said):
    with pytest.raises(InputError, match=said):
        make()
