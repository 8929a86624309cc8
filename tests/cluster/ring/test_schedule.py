"""Who sends what when: the paper's counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.cluster.ring import Layout
from anabranch.cluster.ring.pieces import Mask
from anabranch.cluster.ring.schedule import RINGS, Schedule
from anabranch.errors import InputError


def schedule(
    scheme="token_ring", kind="zigzag", world=4, length=None, causal=True, window=None, documents=None
) -> Schedule:
    placement = Layout(kind, world, 8 * world if length is None else length, documents).placement
    return Schedule(scheme, placement, placement, Mask(causal, window))


def rows(found, flow: str) -> int:
    return sum(message.rows[1] - message.rows[0] for message in found if message.flow == flow)


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_zigzag_moves_one_and_a_half_chunks_a_hop_each_way(world):
    """Total 1.5 c N (N - 1) rows of queries, and as many of results; all of them would be 2 c N (N - 1)."""
    chunk = 5
    found = list(schedule(world=world, length=2 * world * chunk).messages(brings_home=True))
    assert rows(found, "travel") == rows(found, "home") == 1.5 * chunk * world * (world - 1)


@pytest.mark.parametrize("scheme", RINGS)
@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_zigzag_gives_all_ranks_the_same_work_at_every_step(world, scheme):
    made = schedule(scheme, world=world, length=2 * world * 6)
    if scheme == "ring2":
        # Halves of a block are apart at one step, and together over all.
        totals = [sum(made.pairs(rank, step) for step in range(world)) for rank in range(world)]
        assert len(set(totals)) == 1
        return
    for step in range(world):
        pairs = {made.pairs(rank, step) for rank in range(world)}
        # Step 0: two triangles and a square; after it 2 c^2.
        assert pairs == {2 * (6 * 7 // 2) + 36 if step == 0 else 2 * 6 * 6}


def test_without_a_mask_whole_blocks_go_n_minus_1_hops():
    found = list(schedule(kind="contiguous", causal=False, world=4, length=40).messages(brings_home=True))
    assert rows(found, "travel") == rows(found, "home") == 4 * 3 * 10
    travel = [(message.step, message.source, message.to) for message in found if message.flow == "travel"]
    assert travel == [(step, rank, (rank + 1) % 4) for step in range(3) for rank in [(o + step) % 4 for o in range(4)]]
    # A result goes to its owner at once, over the distance.
    assert {(message.source - message.to) % 4 == message.step for message in found if message.flow == "home"} == {True}


def test_a_query_block_is_whole_until_it_came_by_rank_0():
    found = schedule(world=4, length=32).messages(brings_home=False)
    blocks = {(message.step, message.source, message.to): message.rows for message in found}
    # Of rank 1: to 0 whole, then its second half to 3 and 2.
    assert blocks[0, 1, 0] == (0, 8)
    assert blocks[1, 0, 3] == (4, 8)
    assert blocks[2, 3, 2] == (4, 8)


def test_contiguous_causal_queries_go_no_further_than_to_rank_0():
    found = list(schedule(kind="contiguous", world=3, length=12).messages(brings_home=True))
    assert [(m.source, m.to) for m in found if m.flow == "travel"] == [(1, 0), (2, 1), (1, 0)]


def test_a_window_keeps_messages_to_neighbours():
    found = list(schedule(kind="contiguous", world=4, length=40, window=10).messages(brings_home=True))
    # Rank 0 has nothing before it; of 10 queries the first 9 see something of the rank before.
    assert [(m.source, m.to, m.rows) for m in found if m.flow == "home"] == [(r - 1, r, (0, 9)) for r in (1, 2, 3)]


def test_the_halves_of_ring2_go_in_opposite_directions():
    found = list(schedule("ring2", "contiguous", 4, 40, causal=False).messages(brings_home=False))
    assert {(message.rows, (message.to - message.source) % 4) for message in found} == {((0, 5), 1), ((5, 10), 3)}


def test_all_gather_sends_from_owners():
    found = list(schedule("all_gather", "contiguous", 4, 40, causal=False).messages(brings_home=False))
    assert sorted((message.source, message.to) for message in found) == [
        (source, to) for source in range(4) for to in range(4) if source != to
    ]


@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
def test_all_gather_sends_each_rank_what_it_wants_and_no_more(kind):
    made = schedule("all_gather", kind, 4, 32, window=9)
    share = made.shares[0]
    for message in made.messages(brings_home=False):
        assert message.rows == made.wanted(share, message.source, message.to)


@given(
    st.sampled_from(RINGS),
    st.sampled_from(("contiguous", "zigzag", "stripe")),
    st.integers(1, 5),
    st.integers(0, 30),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 9)),
)
def test_every_block_is_where_it_is_worked_on(scheme, kind, world, length, causal, window):
    """What arrives has the rows that are wanted there, and those that go on; all pairs are worked on, once."""
    made = schedule(scheme, kind, world, length, causal, window if causal else None)
    for share in made.shares:
        for owner in range(world):
            for step in range(world - 1):
                there, came = made.visitor(share, owner, step + 1), made.hop(share, owner, step)
                for wanted in (
                    made.wanted(share, owner, there),
                    None if made.is_direct else made.hop(share, owner, step + 1),
                ):
                    assert wanted is None or (came is not None and came[0] <= wanted[0] and wanted[1] <= came[1])
    total = sum(made.pairs(rank, step) for rank in range(world) for step in range(world))
    if not causal:
        assert total == length**2
    else:
        reach = length if window is None else min(window, length)
        assert total == reach * (reach + 1) // 2 + (length - reach) * reach


def test_a_scheme_that_is_none_is_said():
    with pytest.raises(InputError, match="scheme is 'star'; use token_ring, ring, ring2, all_gather"):
        schedule("star")
    with pytest.raises(InputError, match="queries are on 2 ranks and keys on 3"):
        Schedule("ring", Layout("zigzag", 2, 8).placement, Layout("zigzag", 3, 12).placement, Mask())
