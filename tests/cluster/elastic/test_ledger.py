"""How far a loss takes a training back: by hand, and by a naive search over random histories."""

from hypothesis import given
from hypothesis import strategies as st

from anabranch.cluster.elastic.layout import Grid, Layout
from anabranch.cluster.elastic.ledger import Ledger

LAYOUT = Layout(Grid.full(replicas=2, stages=2), (3,), 6)
RANKS = LAYOUT.grid.ranks


def held(copies=1, version=0):
    """A ledger whose layout holds at a version, all snapshots of it verified."""
    ledger = Ledger(copies)
    ledger.announce(1)
    tell(ledger, version, copies=copies)
    ledger.hold(LAYOUT, version)
    return ledger


def tell(ledger, version, owners=RANKS, copies=1):
    for owner in owners:
        for holder in LAYOUT.holders(owner, copies):
            ledger.heard(holder=holder, owner=owner, version=version, epoch=1)


def test_the_committed_version_where_its_snapshot_is_verified_and_else_the_one_before():
    ledger = held()
    for version in (1, 2):
        tell(ledger, version)
    assert ledger.floor == 2
    # Ranks 0 and 1 keep each other's; of version 3 that of rank 0 alone has come.
    tell(ledger, 3, [0])
    assert ledger.floor == 2
    assert ledger.way_back({1, 2, 3}, 3).version == 3
    assert ledger.way_back({1, 2, 3}, 3).holders == {0: (1,)}
    assert ledger.way_back({0, 2, 3}, 3).version == 2
    # Of both of them the newest that both have.
    assert ledger.way_back({1, 3}, 3).version == 2
    assert ledger.way_back(set(RANKS), 3).version == 3


def test_a_word_that_comes_late_takes_nothing_back():
    ledger = held()
    for version in (1, 2, 3):
        tell(ledger, version)
    tell(ledger, 1)
    assert ledger.floor == 3
    assert ledger.way_back({1, 2, 3}, 3).version == 3


def test_a_word_that_is_said_twice_is_one():
    # Rank 2 has told of version 1 alone.
    ledger = held()
    tell(ledger, 1)
    tell(ledger, 2, [0])
    tell(ledger, 2, [0])
    assert ledger.way_back({1, 3}, 2).holders == {0: (1,), 2: (3,)}
    assert ledger.way_back({1, 3}, 2).version == 1


def test_a_second_copy_that_is_older_is_not_asked_for_the_newer():
    ledger = held(copies=2)
    first, second = LAYOUT.holders(0, 2)
    ledger.heard(holder=second, owner=0, version=1, epoch=1)
    assert ledger.way_back({1, 2, 3}, 1).holders == {0: (second,)}
    ledger.damaged(holder=second, owner=0)
    way = ledger.way_back({1, 2, 3}, 1)
    assert (way.version, way.holders) == (0, {0: (first,)})


def test_below_the_floor_training_ends_and_says_why():
    ledger = held()
    for version in (1, 2, 3):
        tell(ledger, version)
    assert ledger.way_back({2, 3}, 3).why == "rank 0 is lost, and its neighbour is lost too"
    ledger.damaged(holder=1, owner=0)
    assert ledger.way_back({1, 2, 3}, 3).why == "rank 0 is lost, and the snapshot of it is damaged"
    assert ledger.way_back(set(), 3).why == "no rank is left"


def test_in_the_first_step_too():
    assert held().way_back({2, 3}, 0).why == "rank 0 is lost, and its neighbour is lost too"


def test_without_a_floor_nothing_is_taken_back():
    nobody = held(copies=0)
    assert nobody.floor is None
    assert nobody.way_back(set(RANKS), 5) == Ledger().way_back(set(RANKS), 5)
    assert nobody.way_back(set(RANKS), 5).version == 5
    assert "nobody keeps snapshots" in nobody.way_back({1, 2, 3}, 5).why


def test_what_is_told_of_another_layout_counts_when_that_holds():
    ledger = held()
    tell(ledger, 1)
    ledger.announce(2)
    ledger.heard(holder=1, owner=0, version=9, epoch=2)
    ledger.heard(holder=1, owner=0, version=9, epoch=3)
    assert ledger.way_back({1, 2, 3}, 1).version == 1
    ledger.hold(LAYOUT, 9)
    assert ledger.floor is None
    assert ledger.way_back({1, 2, 3}, 9).version == 9
    assert ledger.way_back({0, 2, 3}, 9).why is not None


WORD = st.tuples(st.sampled_from(RANKS), st.integers(0, 1), st.integers(0, 5))


@given(
    words=st.lists(WORD, max_size=40),
    bad=st.sets(st.tuples(st.sampled_from(RANKS), st.integers(0, 1)), max_size=3),
    alive=st.sets(st.sampled_from(RANKS)),
    version=st.integers(0, 5),
    copies=st.integers(0, 2),
)
def test_as_a_naive_search_says(words, bad, alive, version, copies):
    ledger = held(copies)
    known = {(owner, holder): {0} for owner in RANKS for holder in LAYOUT.holders(owner, copies)}
    for owner, copy, told in words:
        if copy < copies and told <= version:
            holder = LAYOUT.holders(owner, copies)[copy]
            before = ledger.floor
            ledger.heard(holder=holder, owner=owner, version=told, epoch=1)
            assert before is None or ledger.floor >= before
            # Two are kept, the newest.
            known[owner, holder] = set(sorted({*known[owner, holder], told})[-2:])
    if copies:
        assert ledger.floor == min(max(versions) for versions in known.values())
    for owner, copy in bad:
        if copy < copies:
            holder = LAYOUT.holders(owner, copies)[copy]
            ledger.damaged(holder=holder, owner=owner)
            known[owner, holder] = set()
    way = ledger.way_back(alive, version)
    dead = set(RANKS) - alive
    possible = [
        one
        for one in (version, version - 1)
        if one >= (ledger.floor or 0)
        and alive
        and all(any(h in alive and one in known[owner, h] for h in LAYOUT.holders(owner, copies)) for owner in dead)
    ]
    if not dead:
        assert (way.version, way.why) == (version, None)
    elif not possible:
        assert way.why is not None
    else:
        assert (way.version, way.why) == (possible[0], None)
        assert way.holders.keys() == dead
        assert all(h in alive and way.version in known[owner, h] for owner, of in way.holders.items() for h in of)
