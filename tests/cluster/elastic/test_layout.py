"""Who has what, and what must travel."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.cluster.elastic import Grid, Layout, Move, census, moves
from anabranch.errors import InputError


def owned_after(before, after, sizes, found, *, lost=()):
    """What each rank owns once the moves were made, number by number."""
    has = {}
    for layer, size in enumerate(sizes):
        for rank, first, end in before.slices(layer, size):
            if rank not in lost:
                for n in range(first, end):
                    has.setdefault((layer, n), set()).add(rank)
    new = {}
    for layer, size in enumerate(sizes):
        for rank, first, end in after.slices(layer, size):
            for n in range(first, end):
                new[layer, n] = rank
    for move in found:
        for n in range(move.first, move.end):
            has.setdefault((move.layer, n), set()).add(move.target)
    return has, new


def test_a_grid_that_loses_and_gets_ranks():
    grid = Grid.full(replicas=2, stages=2)
    assert grid.stages == ((0, 1), (2, 3))
    assert grid.without([1]).stages == ((0,), (2, 3))
    assert grid.without([1]).with_rank(7).stages == ((0, 7), (2, 3))
    assert grid.without([0, 1]).healed().stages == ((3,), (2,))
    assert Grid(((), (5,)), 2).healed().stages == ((5,),)
    assert grid.stage_of(3) == 1


def test_slices_are_of_each_layer_by_itself():
    layout = Layout(Grid.full(replicas=2, stages=2), (1,), 3)
    assert layout.slices(0, 5) == [(0, 0, 3), (1, 3, 5)]
    assert layout.slices(2, 1) == [(2, 0, 1)]
    assert list(layout.layers_of(3)) == [1, 2]


def test_moving_a_layer_is_one_transfer_per_rank():
    grid = Grid.full(replicas=3, stages=2)
    found = moves(Layout(grid, (2,), 4), Layout(grid, (1,), 4), [9, 9, 9, 9])
    assert found == [Move(1, 0, 3, 0, 3), Move(1, 3, 6, 1, 4), Move(1, 6, 9, 2, 5)]


def test_a_lost_slice_comes_from_who_keeps_it():
    before = Layout(Grid.full(replicas=2, stages=1), (), 1)
    after = Layout(before.grid.without([1]), (), 1)
    assert before.holders(1, 1) == (0,)
    assert moves(before, after, [4], alive=[0], holders={1: (0,)}) == [Move(0, 2, 4, 0, 0)]
    with pytest.raises(InputError, match="rank 1 is lost with its slice of layer 0"):
        moves(before, after, [4], alive=[0])


def test_the_second_copy_lies_in_another_stage():
    layout = Layout(Grid.full(replicas=3, stages=2), (1,), 2)
    for rank in layout.grid.ranks:
        first, second = layout.holders(rank, 2)
        assert layout.grid.stage_of(first) == layout.grid.stage_of(rank)
        assert layout.grid.stage_of(second) != layout.grid.stage_of(rank)
        assert sorted(layout.holders(rank, 99)) == sorted(set(layout.grid.ranks) - {rank})
    # A rank that is alone in its stage has its snapshot in another.
    alone = Layout(Grid(((0,), (1,)), 1), (1,), 2)
    assert alone.holders(0, 1) == (1,)
    assert Layout(Grid(((0,),), 1), (), 1).holders(0, 1) == ()


@given(st.data())
def test_after_any_moves_everything_has_one_owner_who_has_it(data):
    replicas, stages = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    layers = data.draw(st.integers(stages, 6))
    sizes = data.draw(st.lists(st.integers(0, 20), min_size=layers, max_size=layers))
    grid = Grid.full(replicas=replicas, stages=stages)

    def cut(count):
        return tuple(sorted(data.draw(st.permutations(range(1, layers)))[: count - 1]))

    before = Layout(grid, cut(stages), layers)
    most = len(grid.ranks) - 1
    lost = data.draw(st.permutations(grid.ranks))[: data.draw(st.integers(0, most))]
    left = grid.without(lost).healed()
    after = Layout(left, cut(len(left.stages)), layers)
    holders = {rank: before.holders(rank, len(grid.ranks)) for rank in lost}
    found = moves(before, after, sizes, alive=left.ranks, holders=holders)
    assert not {move.source for move in found} & set(lost)
    has, new = owned_after(before, after, sizes, found, lost=lost)
    assert all(rank in has[number] for number, rank in new.items())
    census(
        after,
        sizes,
        {
            rank: {
                layer: (first, end)
                for layer, size in enumerate(sizes)
                for owner, first, end in after.slices(layer, size)
                if owner == rank
            }
            for rank in left.ranks
        },
    )


def test_a_census_finds_what_is_missing_twice_or_elsewhere():
    layout = Layout(Grid.full(replicas=2, stages=1), (), 1)
    census(layout, [4], {0: {0: (0, 2)}, 1: {0: (2, 4)}})
    for owned, said in [
        ({0: {0: (0, 2)}, 1: {0: (3, 4)}}, "nobody has the numbers 2 to 3"),
        ({0: {0: (0, 3)}, 1: {0: (2, 4)}}, "two ranks have the numbers 2 to 3"),
        ({0: {0: (0, 2)}}, "nobody has the numbers 2 to 4"),
        ({0: {0: (0, 1)}, 1: {0: (1, 4)}}, "not where the layout says"),
    ]:
        with pytest.raises(InputError, match=said):
            census(layout, [4], owned)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda grid: Grid.full(replicas=0, stages=1), "replicas is 0"),
        (lambda grid: grid.stage_of(9), "rank 9 is in no stage"),
        (lambda grid: grid.without([9]), "rank 9 is in no stage"),
        (lambda grid: grid.with_rank(3), "rank 3 is in stage 1 already"),
        (lambda grid: grid.without(grid.ranks).healed(), "no rank is left"),
        (lambda grid: Layout(grid, (3,), 3), "need 1 bounds that grow"),
        (lambda grid: Layout(grid, (), 3), "need 1 bounds that grow"),
        (lambda grid: Layout(grid.without([0, 1]), (1,), 3), "stage 0 has no rank"),
    ],
)
def test_what_is_no_layout_is_refused(call, said):
    with pytest.raises(InputError, match=said):
        call(Grid.full(replicas=2, stages=2))
