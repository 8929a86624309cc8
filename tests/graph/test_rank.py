"""A peer ranks and merges as the formulas say: by hand, against a naive loop over the rows, and in any order of merging."""

import itertools
import json
import sqlite3

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import BackendError, DataError, InputError
from anabranch.graph.rank import (
    NONE,
    Defences,
    Item,
    Peer,
    Row,
    SigningKey,
    library,
    matches,
    ndcg,
    normalize,
    rank_distance,
)
from anabranch.graph.rank.formula import raw_similarity, saturated, top_terms, top_terms_mask
from anabranch.graph.rank.log import MORE_ENDS
from anabranch.graph.rank.rows import END, START, Ranges, check_vector, row_from_json

PLAIN = {"explore": 0.0, "defences": NONE}


def rows_of(clicks):
    """Rows of (origin, term, item), numbered by origin."""
    number = {}
    found = []
    for origin, term, item in clicks:
        number[origin] = number.get(origin, -1) + 1
        found.append(Row(origin, number[origin], term, item))
    return found


def message(rows, sender="someone"):
    return {"from": sender, "rows": [row.to_json() for row in rows]}


def peer_with(clicks, node="a", items=(), **others):
    """A peer ``node`` that made its own clicks itself and was handed the others."""
    peer = Peer(items, node, **{**PLAIN, **others})
    for origin, term, item in clicks:
        if origin == node:
            peer.record(term, item)
    peer.merge(message([row for row in rows_of(clicks) if row.origin != node]))
    return peer


THREE = [
    *[("a", "jazz", 1), ("a", "jazz", 1), ("a", "rock", 2)],
    *[("b", "jazz", 1), ("b", "jazz", 3), ("b", "jazz", 3), ("b", "jazz", 3), ("b", "pop", 4)],
    *[("c", "folk", 5), ("c", "jazz", 6)],
]


def test_three_nodes_by_hand():
    """S_a(b): common terms jazz = 1; common clicks (jazz, 1) = 1; items {1, 2} and {1, 3, 4} = 4: (1 + 1) / 4 = 0.5.
    S_a(c): jazz = 1; no common click; {1, 2} and {5, 6} = 4: 1 / 4. Over the largest: 1 and 0.5.
    R(jazz), F = 0.25: item 1: 2 (1 + 0.25) + 1 (1 + 0.25) = 3.75; item 3: 3 * 1.25 = 3.75; item 6: 1 * 0.75; a tie goes to the lower id."""
    peer = peer_with(THREE, F=0.25)
    assert peer.similarity("b") == 1.0
    assert peer.similarity("c") == 0.5
    assert peer.similarity("a") == 1.0
    assert peer.rank("jazz") == [(1, 3.75), (3, 3.75), (6, 0.75)]
    assert peer_with(THREE).rank("  JAZZ ", k=2) == [(1, 3.0), (3, 3.0)]
    assert peer_with(THREE, defences=Defences()).rank("jazz") == [(1, 3.0), (3, 3.0), (6, 0.5)]
    capped = peer_with(THREE, defences=Defences(click_cap=1)).rank("jazz")
    assert capped == [(1, 2.0), (3, 1.0), (6, 0.5)]
    logged = dict(peer_with(THREE, defences=Defences(saturation="log")).rank("jazz"))
    assert logged[1] == pytest.approx(np.log(3) + np.log(2))
    assert logged[3] == pytest.approx(np.log(4))


def test_too_few_common_clicks_weigh_less():
    """m = 2: b has one common click, so 0.5 becomes 0.25; c has none: 0. Over the largest: 1 and 0."""
    peer = peer_with([*THREE, ("d", "jazz", 1), ("d", "rock", 2)], defences=Defences(saturation=None, min_common=2))
    # d: terms jazz, rock = 2; clicks 2; items {1, 2} = 2: (2 + 4) / 2 = 3, at full weight.
    assert peer.similarity("d") == 1.0
    assert peer.similarity("b") == pytest.approx(0.25 / 3)
    assert peer.similarity("c") == 0.0


def naive_similarities(rows, i, top, min_common=0):
    """The definition, from the rows alone."""

    def clicks(node):
        return {(row.term, row.item) for row in rows if row.origin == node}

    def best(node):
        terms = [row.term for row in rows if row.origin == node]
        return set(sorted(set(terms), key=lambda term: (-terms.count(term), term))[:top])

    raw = {}
    for j in {row.origin for row in rows} - {i}:
        common = len(clicks(i) & clicks(j))
        union = {item for _, item in clicks(i)} | {item for _, item in clicks(j)}
        raw[j] = (len(best(i) & best(j)) + common**2) / len(union)
        raw[j] *= min(common, min_common) / min_common if min_common else 1.0
    largest = max(raw.values(), default=0)
    return {j: value / largest if largest else 0.0 for j, value in raw.items()}


def naive_scores(rows, i, term, top, F, weigh=lambda count: count, min_common=0):
    similarity = {**naive_similarities(rows, i, top, min_common), i: 1.0}
    score = {}
    for origin, item in {(row.origin, row.item) for row in rows if row.term == term}:
        count = sum((row.origin, row.term, row.item) == (origin, term, item) for row in rows)
        score[item] = score.get(item, 0.0) + weigh(count) * (similarity[origin] + F)
    return score


CLICKS = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["s", "t", "u"]), st.integers(0, 4)), max_size=40)


@given(CLICKS, st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 3), st.sampled_from([None, 1, 2]), st.integers(0, 2))
def test_equals_the_definition(clicks, F, top, cap, min_common):
    limits = {"saturation": "cap", "click_cap": cap} if cap else {"saturation": None}
    peer = peer_with(clicks, F=F, top_terms=top, defences=Defences(**limits, min_common=min_common))
    rows = rows_of(clicks)
    for node, value in naive_similarities(rows, "a", top, min_common).items():
        assert peer.similarity(node) == pytest.approx(value)
        assert 0 <= value <= 1
    for term in ("s", "t", "u"):
        if any(row.term == term for row in rows):
            weigh = (lambda count: min(count, cap)) if cap else (lambda count: count)
            expected = naive_scores(rows, "a", term, top, F, weigh, min_common)
            found = peer.rank(term)
            assert dict(found) == pytest.approx(expected)
            assert [(score, item) for item, score in found] == sorted(
                ((score, item) for item, score in found), key=lambda entry: (-entry[0], entry[1])
            )


@given(CLICKS, st.data())
def test_counts_kept_up_to_date_equal_those_counted_afresh(clicks, data):
    """Clicks and merges in turns, similarities asked in between: what is cached is never stale."""
    one, rows = Peer((), "a", **PLAIN), []
    for row in rows_of(clicks):
        if row.origin == "a":
            one.record(row.term, row.item)
        else:
            one.merge(message([row]))
        rows.append(row)
        if data.draw(st.booleans()):
            expected = naive_similarities(rows, "a", 10)
            assert {j: one.similarity(j) for j in expected} == pytest.approx(expected)


# Merging


def state(peer):
    log = peer.log
    return (
        {row.key: row for row in log.all_rows()},
        log.vector(),
        log.count,
        {origin: counts for origin, counts in log.clicks.items() if counts},
        log.popularity,
        log.num_bytes,
        set(peer.peers()) - {"someone"},
    )


@given(
    CLICKS, st.randoms(use_true_random=False), st.sampled_from([None, 3, 5]), st.lists(st.integers(0, 40), max_size=4)
)
def test_merging_is_commutative_associative_and_idempotent(clicks, random, window, cuts):
    """Any order, any parts, any repetitions of the rows of others give the same log."""
    rows = [row for row in rows_of(clicks) if row.origin != "a"]
    limits = Defences(saturation=None, rows_per_origin=window)
    whole = Peer((), "a", defences=limits)
    whole.merge(message(rows))
    shuffled = rows + [random.choice(rows) for _ in range(len(rows) // 2)]
    random.shuffle(shuffled)
    parts = Peer((), "a", defences=limits)
    for low, high in itertools.pairwise([0, *sorted(cuts), len(shuffled)]):
        parts.merge(message(shuffled[low:high]))
    assert state(parts) == state(whole)
    assert parts.merge(message(rows)).added == 0
    assert state(parts) == state(whole)
    for term in ("s", "t", "u"):
        assert parts.rank(term) == whole.rank(term)


@given(st.lists(CLICKS, min_size=3, max_size=3))
def test_three_logs_merge_to_one(logs):
    """(x y) z = x (y z), through messages between peers."""
    made = []
    for number, clicks in enumerate(logs):
        peer = Peer((), f"n{number}", **PLAIN)
        for _, term, item in clicks:
            peer.record(term, item)
        made.append(peer)
    left, right = Peer((), "w", **PLAIN), Peer((), "w", **PLAIN)
    for peer in made:
        left.merge(peer.make_reply(left.vector()))
    made[1].merge(made[2].make_reply(made[1].vector()))
    right.merge(made[1].make_reply({}))
    right.merge(made[0].make_reply(right.vector()))
    assert {row.key: row for row in left.log.all_rows()} == {row.key: row for row in right.log.all_rows()}
    assert left.rank("s") == right.rank("s")


def test_a_reply_holds_what_the_asker_lacks_and_no_more():
    giver, taker = peer_with(THREE, "a"), peer_with(THREE[:6], "b")
    reply = giver.make_reply(taker.vector(), "b")
    assert sorted(map(tuple, (row[:2] for row in reply["rows"]))) == [("b", 3), ("b", 4), ("c", 0), ("c", 1)]
    assert not reply["more"]
    assert "b" in giver.peers()  # the answerer learns the asker
    merged = taker.merge(json.loads(json.dumps(reply)))
    assert (merged.added, merged.refused) == (2, {"forged": 2})  # b never wrote its rows 3 and 4
    assert taker.peers()[:1] == ["someone"]
    assert set(taker.peers()) == {"someone", "a", "c"}


def test_quotas_spread_a_log_over_messages():
    giver = Peer((), "a", defences=Defences(reply_rows=5, reply_rows_per_origin=3))
    giver.merge(message(rows_of([("b", "t", n) for n in range(3)])))
    giver.merge(message(rows_of([("c", "t", n) for n in range(3)])))
    for number in range(7):
        giver.record("t", number)
    taker, rounds = Peer((), "z"), []
    while True:
        reply = giver.make_reply(taker.vector())
        rounds.append([row[0] for row in reply["rows"]])
        taker.merge(reply)
        if not reply["more"]:
            break
    assert rounds == [list("aaabb"), list("aaabc"), list("acc")]
    assert taker.log.num_rows == 13
    strict = Peer((), "y", defences=Defences(reply_rows=4, reply_rows_per_origin=2))
    found = strict.merge(
        message([*rows_of([("b", "t", n) for n in range(3)]), *rows_of([("c", "t", n) for n in range(3)])])
    )
    assert (found.added, found.refused) == (3, {"quota": 3})


def test_messages_stay_below_their_limit():
    giver = Peer((), "a", defences=Defences(max_message_bytes=1 << 18))
    for number in range(1000):
        giver.record("t" * 500, number)
    reply = giver.make_reply({})
    size = len(json.dumps(reply, ensure_ascii=False, separators=(",", ":")).encode())
    assert 1 << 17 < size <= 1 << 18
    assert reply["more"]


def test_unsolicited_rows_are_refused_unless_push_is_taken():
    rows = rows_of([("b", "t", 1)])
    assert Peer((), "a").merge(message(rows), solicited=False).refused == {"unsolicited": 1}
    assert Peer((), "a", defences=NONE).merge(message(rows), solicited=False).added == 1


def test_a_key_with_other_content_is_refused_and_its_origin_marked():
    peer = Peer((), "a", **PLAIN)
    first, second = Row("b", 0, "t", 1), Row("b", 0, "t", 2)
    assert peer.merge(message([first])).added == 1
    assert peer.merge(message([second])).refused == {"conflict": 1}
    assert dict(peer.log.marked) == {"b": 1}
    assert peer.rank("t") == [(1, 0.0)]
    assert not peer.log.distrusted  # without signatures anyone could have written either
    assert peer.stats()["marked"] == 1


def test_own_rows_that_come_back():
    peer = peer_with(THREE)
    before = state(peer)
    own = [row for row in peer.log.all_rows() if row.origin == "a"]
    assert peer.merge(message(own)).known == 3
    forged = [Row("a", 0, "jazz", 9), Row("a", 77, "jazz", 9)]
    assert peer.merge(message(forged)).refused == {"forged": 2}
    assert state(peer) == before
    assert not peer.log.marked


GOOD = ["b", 0, "t", 1, "", "", [], [], None, ""]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *[(0, ""), (0, 5), (0, "x" * 129), (1, -1), (1, True), (1, 2**53), (1, 1.0), (1, "0")],
        *[(2, ""), (2, None), (2, "x" * 513), (2, "Not normal"), (2, " t")],
        *[(3, None), (3, ""), (3, 1.5), (3, [1]), (3, True), (3, 2**60), (3, "x" * 129)],
        *[
            (4, None),
            (4, "x" * 513),
            (5, 3),
            (6, "tag"),
            (6, [1]),
            (6, ["t"] * 33),
            (7, [None]),
            (7, [1] * 101),
            (7, None),
        ],
        *[(8, "now"), (8, float("nan")), (8, float("inf")), (8, True), (9, None), (9, "f" * 129)],
    ],
)
def test_a_malformed_row_is_refused_by_itself(place, value):
    bad = [*GOOD[:place], value, *GOOD[place + 1 :]]
    peer = Peer((), "a")
    found = peer.merge({"from": "z", "rows": [bad, ["c", *GOOD[1:]]]})
    assert (found.added, found.refused) == (1, {"malformed": 1})


@pytest.mark.parametrize("rows", [[None], [[]], [GOOD[:9]], [[*GOOD, 1]], ["b"], [{"origin": "b"}]])
def test_rows_of_another_shape_are_malformed(rows):
    assert Peer((), "a").merge({"from": "z", "rows": rows}).refused == {"malformed": 1}


@pytest.mark.parametrize(
    "reply", [None, [], {}, {"from": "b"}, {"rows": []}, {"from": 3, "rows": []}, {"from": "b", "rows": {}}]
)
def test_what_is_no_message_is_an_error(reply):
    with pytest.raises(DataError, match="message"):
        Peer((), "a").merge(reply)


@pytest.mark.parametrize(
    "vector", [[], None, {"b": 3}, {"b": [1]}, {"b": [2, 1]}, {"b": [0, 2, 2, 3]}, {"b": [-1, 2]}, {"": [0, 1]}]
)
def test_what_is_no_vector_is_an_error(vector):
    with pytest.raises(DataError, match="vector"):
        Peer((), "a").make_reply(vector)


def test_an_item_that_the_library_lacks_is_ranked_by_what_rows_say_of_it():
    peer = Peer([Item(1, "one", tags=("jazz",))], "a", **PLAIN)
    peer.merge(
        message([Row("b", 0, "jazz", 9, "Nine", tags=("jazz",)), Row("b", 1, "jazz", 8, "Eight", tags=("rock",))])
    )
    assert [item for item, _ in peer.rank("jazz")] == [1, 9, 8]
    # Three origins say that 9 is no jazz: most of them are believed.
    peer.merge(message([Row(name, 0, "rock", 9, "Nine", tags=("rock",)) for name in "cde"]))
    assert [item for item, _ in peer.rank("jazz")] == [1, 8, 9]
    assert peer.item(9).tags == ("rock",)


# Ranking


@given(CLICKS, st.sets(st.integers(0, 6)), st.sampled_from([0.0, 1.0]))
def test_items_that_match_stand_above_all_others(clicks, tagged, F):
    items = [Item(id, tags=("s",) if id in tagged else ()) for id in range(7)]
    found = [item for item, _ in peer_with(clicks, items=items, F=F).rank("s")]
    assert set(found[: len(tagged)]) == tagged or not any(term == "s" for _, term, _ in clicks)
    assert len(found) == len(set(found))


def test_without_overlap_a_node_weighs_nothing_at_F_0():
    clicks = [("a", "jazz", 1), *[("b", "folk", 7)] * 50, ("c", "jazz", 1), ("c", "folk", 8)]
    peer = peer_with(clicks)
    assert peer.similarity("b") == 0.0
    assert peer.rank("folk") == [(8, 1.0), (7, 0.0)]
    assert peer_with(clicks, F=1.0).rank("folk") == [(7, 50.0), (8, 2.0)]


def test_unseen_terms_fall_back_by_steps():
    items = [Item(1, "Blue Train", "Coltrane"), Item(2, tags=("Free  Jazz",))]
    clicked = [
        Row("b", 0, "pop", 3, tags=("funk",)),
        Row("b", 1, "pop", 4),
        Row("c", 0, "rock", 4),
        Row("c", 1, "x", 2),
    ]
    peer = Peer(items, "a", **PLAIN)
    assert peer.rank("blue train") == [(1, 0.0)]
    assert peer.rank("coltrane") == [(1, 0.0)]
    assert peer.rank("free jazz") == [(2, 0.0)]
    assert peer.rank("train of thought") == []  # offline, nothing known: an empty list, no error
    peer.merge(message(clicked))
    assert [item for item, _ in peer.rank("funk")] == [3]  # tags in the log
    assert [item for item, _ in peer.rank("unheard")] == [4, 2, 3]  # most clicked; ties by id


def test_matching_is_by_whole_words():
    item = Item(1, "The Art of Fugue", "J. S. Bach", ("Classical",))
    assert [
        term for term in ("art", "art of", "rt", "bach", "classical", "class", "fugue the") if matches(term, item)
    ] == [*("art", "art of", "bach", "classical")]


def test_any_metadata_can_match_and_any_terms_can_be_one():
    """Vectors in place of tags: items match within an angle, and clicks count for the nearest anchor."""
    place = {"cat": 0.0, "kitten": 0.1, "car": 3.0, "truck": 3.1}
    vector = {1: 0.05, 2: 3.05}
    peer = Peer(
        [Item(1), Item(2)],
        "a",
        **PLAIN,
        match=lambda term, item: abs(place[term] - vector.get(item.id, 9)) < 0.5,
        term_key=lambda term: min(("cat", "car"), key=lambda anchor: abs(place[anchor] - place[term])),
    )
    assert [item for item, _ in peer.rank("kitten")] == [1]
    peer.merge(message(rows_of([("b", "truck", 7)])))
    assert [item for item, _ in peer.rank("car")] == [2, 7]  # a click for "truck" counts for "car"


def test_a_term_that_has_no_key_is_refused_and_nothing_is_half_taken():
    def key(term):
        if term == "x":
            raise InputError("no key")
        return {"t": "t"}[term]

    peer = Peer((), "a", term_key=key)
    assert peer.merge(message(rows_of([("b", "x", 1), ("b", "t", 1)]))).refused == {"malformed": 1}
    before = state(peer)
    with pytest.raises(KeyError):  # the user's own mistake, told as it is
        peer.merge(message(rows_of([("c", "t", 1), ("c", "u", 1)])))
    assert state(peer) == before


def test_exploration_swaps_two_of_half_the_lists_and_not_more():
    items = [Item(number, tags=("t",)) for number in range(6)]
    kept = Peer(items, "a", explore=0.0)
    assert all(kept.query("t").items == (0, 1, 2, 3, 4, 5) for _ in range(20))
    peer = Peer(items, "a", seed=3)
    moved = [sum(a != b for a, b in enumerate(peer.query("t").items)) for _ in range(400)]
    assert set(moved) == {0, 2}
    assert 150 < sum(map(bool, moved)) < 250
    shown = [
        [again.query("t").items for _ in range(30)] for again in (Peer(items, "a", seed=3), Peer(items, "a", seed=3))
    ]
    assert shown[0] == shown[1]


def test_query_then_click():
    peer = Peer([Item(1, "One", "Who", ("t",)), Item(2, tags=("t",))], "a", explore=0.0)
    shown = peer.query(" T ", k=5)
    assert (shown.term, shown.items, shown.scores) == ("t", (1, 2), (0.0, 0.0))  # k above what there is
    with pytest.raises(InputError, match="did not show"):
        peer.click(shown.qid, 3)
    row = peer.click(shown.qid, 1)
    assert row == Row("a", 0, "t", 1, "One", "Who", ("t",), (1, 2))
    with pytest.raises(InputError, match="not open"):
        peer.click(shown.qid, 2)
    assert peer.query("t", k=1).items == (1,)
    assert len(peer.query("t", k=1).items) == 1
    assert row_from_json(json.loads(json.dumps(row.to_json()))) == row
    assert row.size() == len(json.dumps(row.to_json(), separators=(",", ":")))


def test_an_empty_peer_works_alone():
    peer = Peer((), "a")
    assert peer.query("anything").items == ()
    assert peer.peers() == []
    assert peer.make_reply({})["rows"] == []
    assert peer.make_bootstrap()["rows"] == []
    assert peer.stats()["rows"] == 0


def test_a_whole_synchronisation_ranks_alike_everywhere():
    """Everybody has all rows: plain counts, and so raw rankings, are the global ones (distance 0)."""
    generator = np.random.default_rng(0)
    peers = [Peer((), f"n{number}", F=1.0, **PLAIN) for number in range(5)]
    for _ in range(200):
        peers[generator.integers(5)].record(f"t{generator.integers(3)}", int(generator.integers(8)))
    for _ in range(2):
        for one, other in itertools.permutations(peers, 2):
            one.merge(other.make_reply(one.vector(), one.node_id))
    counts = [
        {term: {item: c.total() for item, c in items.items()} for term, items in peer.log.count.items()}
        for peer in peers
    ]
    assert all(count == counts[0] for count in counts)
    assert sum(sum(items.values()) for items in counts[0].values()) == 200
    order = [sorted(counts[0]["t0"], key=lambda item: (-count["t0"][item], item)) for count in counts]
    assert all(rank_distance(order[0], other) == 0 for other in order)
    assert all(len(peer.peers()) == 4 for peer in peers)


# Windows, time, signatures, limits


def test_only_the_newest_rows_of_an_origin_are_kept():
    peer = Peer((), "a", defences=Defences(saturation=None, rows_per_origin=3), explore=0.0, F=1.0)
    rows = rows_of([("b", "t", number) for number in range(10)])
    peer.merge(message(rows))
    assert sorted(peer.log.rows["b"]) == [7, 8, 9]
    assert peer.vector() == {"b": [0, 10]}  # older ones are not asked for again
    assert {item for item, _ in peer.rank("t")} == {7, 8, 9}
    assert peer.merge(message(rows[:5])).known == 5
    giver = Peer((), "c")
    giver.merge(message(rows))
    assert giver.make_reply(peer.vector())["rows"] == []


def test_one_row_of_a_far_number_drops_no_others():
    """Unsigned rows in another's name may be anybody's: what is kept is so many rows, not so many numbers."""
    peer = Peer((), "a", defences=Defences(rows_per_origin=3))
    rows = rows_of([("b", "t", number) for number in range(4)])
    peer.merge(message(rows[:2]))
    peer.merge(message([Row("b", 2**53 - 1, "t", 9)]))
    assert sorted(peer.log.rows["b"]) == [0, 1, 2**53 - 1]
    assert peer.vector() == {"b": [0, 2, 2**53 - 1, 2**53]}
    # Another that begins late: what it left out may be what it said, and these another's.
    peer.merge(message([Row("c", number, "t", 1) for number in (5, 7, 9)]))
    assert peer.vector()["c"] == [5, 6, 7, 8, 9, 10]
    assert peer.merge(message([Row("c", 3, "t", 1), Row("c", 8, "t", 1)])).known == 1
    assert sorted(peer.log.rows.pop("c")) == [7, 8, 9]
    del peer.log.held["c"]
    # One more than there may be.
    assert peer.merge(message(rows)).added == 2
    assert sorted(peer.log.rows["b"]) == [2, 3, 2**53 - 1]
    assert peer.vector() == {"b": [0, 4, 2**53 - 1, 2**53]}
    assert peer.merge(message(rows)).known == 4


def test_rows_that_expire_leave_few_gaps():
    now = [0.0]
    peer = Peer((), "a", defences=Defences(rows_per_origin=3, ttl=1.0), clock=lambda: now[0])
    for number in range(0, 160, 2):
        now[0] += 10.0
        peer.merge(message([Row("b", number, "t", 1, time=now[0])]))
        assert sorted(peer.log.rows["b"])[-1] == number
        assert number in peer.log.held["b"]
        # Too old to be kept.
        peer.merge(message([Row("b", number + 1_000_000, "t", 1, time=0.0)]))
        assert len(peer.vector()["b"]) <= 4 * 3 + MORE_ENDS
        peer.rank("t")
    assert peer.log.num_rows == 1


@given(
    st.dictionaries(st.sampled_from("abcx"), st.sets(st.integers(0, 30), min_size=1)), st.integers(60, 120), st.data()
)
def test_a_vector_in_parts_asks_for_what_the_whole_one_does(held, room, data):
    """Parts lie behind one another to the end, each within its bytes; what comes of all of them is what lacks, and nothing twice."""
    asker, giver = Peer((), "q", **PLAIN), Peer((), "p", **PLAIN)
    for origin, numbers in held.items():
        asker.merge(message([Row(origin, number, "t", 1) for number in sorted(numbers)]))
    has = data.draw(st.sets(st.tuples(st.sampled_from("abcdx"), st.integers(0, 30))))
    giver.merge(message([Row(origin, number, "t", 1) for origin, number in sorted(has)]))
    begin, came, whole = START, [], {}
    while True:
        vector, end = asker.log.part(begin, room)
        assert len(json.dumps(vector, separators=(",", ":"))) <= room + 2
        for origin, ends in vector.items():
            whole.setdefault(origin, []).extend(ends)
        came += [tuple(row[:2]) for row in giver.make_reply(vector, None, (begin, end))["rows"]]
        if end == END:
            break
        assert end > begin
        begin = end
    assert whole == asker.vector()
    assert len(came) == len(set(came))
    assert set(came) == has - {(origin, number) for origin, numbers in held.items() for number in numbers}


def test_rows_expire_by_the_clock():
    now = [100.0]
    peer = Peer((), "a", defences=Defences(ttl=10.0), clock=lambda: now[0], explore=0.0, F=1.0)
    timed = [Row("b", n, "t", n, time=time) for n, time in enumerate([80.0, 95.0, 99.0, 111.0, None])]
    found = peer.merge(message(timed))
    assert (found.added, found.known, found.refused) == (3, 1, {"future": 1})
    assert [item for item, _ in peer.rank("t")] == [1, 2, 4]
    now[0] = 107.0
    assert [item for item, _ in peer.rank("t")] == [2, 4]
    now[0] = 1000.0
    assert [item for item, _ in peer.rank("t")] == [4]  # a row without a time stays
    assert peer.record("t", 5).time == 1000.0
    assert peer.stats()["rows"] == 2
    assert peer.similarity("b") == 1.0


def test_a_full_log_takes_no_more_from_others():
    peer = Peer((), "a", defences=Defences(max_rows=2))
    found = peer.merge(message(rows_of([("b", "t", 1), ("b", "t", 2), ("b", "t", 3)])))
    assert (found.added, found.refused) == (2, {"full": 1})
    assert peer.record("t", 1).number == 0
    assert peer.vector()["b"] == [0, 2]  # the refused one may come again


def test_signed_rows_cannot_be_forged():
    pytest.importorskip("cryptography")
    signed = Defences(signed=True, saturation=None)
    keys = [SigningKey.generate() for _ in range(3)]
    alice, bob, carol = (Peer((), defences=signed, key=key, explore=0.0) for key in keys)
    alice.record("t", 1)
    row = alice.record("t", 2)
    assert bob.merge(alice.make_reply({})).added == 2
    assert carol.merge(bob.make_reply({})).added == 2  # handed on by a third
    forged = [
        Row(alice.node_id, 2, "t", 3),
        Row(alice.node_id, 2, "t", 3, signature="zz"),
        Row(alice.node_id, 2, "t", 3, signature=row.signature),
        Row("plain", 0, "t", 3, signature=row.signature),
        Row("ed25519:00", 0, "t", 3, signature=row.signature),
    ]
    assert bob.merge(message(forged)).refused == {"signature": 5}
    # Two signed rows of one key are proof: the origin weighs nothing any more.
    twin = Peer((), defences=signed, key=keys[0], explore=0.0)
    twin.record("t", 9)
    bob.record("t", 1)
    assert bob.rank("t")[0] == (1, 2.0)
    assert bob.merge(twin.make_reply({})).refused == {"conflict": 1}
    assert bob.log.distrusted == {alice.node_id}
    assert dict(bob.rank("t")) == {1: 1.0, 2: 0.0}
    # A node that lost its newest rows takes them back from others.
    restored = Peer((), defences=signed, key=keys[0])
    assert restored.merge(carol.make_reply({})).added == 2
    assert restored.record("t", 4).number == 2


def test_keys_are_kept_for_their_owner(tmp_path):
    pytest.importorskip("cryptography")
    key = SigningKey.generate()
    key.save(tmp_path / "key")
    assert (tmp_path / "key").stat().st_mode & 0o077 == 0
    assert SigningKey.load(tmp_path / "key").node_id == key.node_id
    assert Peer((), key=key).node_id == key.node_id
    (tmp_path / "key").write_bytes(b"short")
    with pytest.raises(DataError, match="32 bytes"):
        SigningKey.load(tmp_path / "key")
    with pytest.raises(DataError, match="cannot read"):
        SigningKey.load(tmp_path / "none")
    with pytest.raises(InputError, match="called as its key"):
        Peer((), "me", key=key)


def test_signatures_without_the_package_name_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cryptography", None)
    with pytest.raises(BackendError, match=r"a signed row needs cryptography; pip install 'anabranch\[signatures\]'"):
        SigningKey.generate()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"F": -0.1}, "F is -0.1"),
        ({"F": float("nan")}, "F is nan"),
        ({"F": 10**400}, "F is an integer of about 401 digits"),
        ({"explore": 1.5}, "explore is 1.5"),
        ({"top_terms": -1}, "top_terms is -1"),
        ({"top_terms": 1.5}, "top_terms is 1.5"),
        ({"node_id": ""}, "node_id is ''"),
        ({"node_id": 7}, "node_id is 7"),
        ({"node_id": "x" * 129}, "node_id"),
        ({"items": [1]}, "library holds"),
        ({"items": [Item(1), Item(1, "other")]}, "two items have the id 1"),
        ({"defences": Defences(ttl=1.0)}, "ttl needs a clock"),
        ({"defences": Defences(signed=True)}, "no key"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        Peer(**{"node_id": "a", **arguments})


@pytest.mark.parametrize(
    "field",
    [
        *[{"saturation": "sqrt"}, {"click_cap": 0}, {"min_common": -1}, {"rows_per_origin": 0}, {"ttl": 0.0}],
        *[{"ttl": float("inf")}, {"reply_rows": 0}, {"reply_rows_per_origin": 0}, {"max_message_bytes": 10}],
        *[{"max_rows": 0}, {"click_cap": True}, {"click_cap": 1.5}],
    ],
)
def test_bad_defences(field):
    with pytest.raises(InputError, match=next(iter(field))):
        Defences(**field)


@pytest.mark.parametrize("id", [None, "", True, 1.5, 2**53, "x" * 129])
def test_bad_items(id):
    with pytest.raises(InputError, match="an id is"):
        Item(id)


def test_bad_calls():
    peer = Peer((), "a")
    for term in ("", "  ", "x" * 513, 7, None):
        with pytest.raises(InputError, match="term"):
            peer.query(term)
    for k in (0, -1, 1.5, True):
        with pytest.raises(InputError, match="k is"):
            peer.query("t", k)
    with pytest.raises(InputError, match="not open"):
        peer.click(0, 1)
    with pytest.raises(InputError, match="not a known peer"):
        peer.similarity("b")
    for share in (0, 1.1):
        with pytest.raises(InputError, match="share"):
            peer.make_bootstrap(share)
    with pytest.raises(InputError, match="tags are"):
        Item(1, tags=["a"])


def test_open_queries_are_bounded():
    peer = Peer([Item(1, tags=("t",))], "a")
    first = peer.query("t")
    for _ in range(1000):
        last = peer.query("t")
    with pytest.raises(InputError, match="not open"):
        peer.click(first.qid, 1)
    assert peer.click(last.qid, 1).number == 0


def test_a_bootstrap_is_a_random_share_and_the_rest_comes_later():
    giver = Peer((), "a", seed=1)
    for number in range(100):
        giver.record("t", number)
    taker = Peer((), "b")
    reply = giver.make_bootstrap(0.1, asker="b")
    assert len(reply["rows"]) == 10
    taker.merge(reply)
    assert len(taker.vector()["a"]) > 2  # holes
    assert giver.peers() == ["b"]
    rest = giver.make_reply(taker.vector())
    assert len(rest["rows"]) == 90
    taker.merge(rest)
    assert taker.vector() == {"a": [0, 100]}


# Keeping


def test_saved_and_read_back_goes_on_the_same(tmp_path):
    items = [Item(1, "One", "Who", ("jazz", "rock")), Item("x", tags=("jazz",))]
    peer = peer_with(THREE, items=items, F=0.5, explore=0.5, defences=Defences(click_cap=2, rows_per_origin=4))
    peer.merge(message([Row("b", 4, "jazz", 99)]))
    peer.query("jazz")
    peer.save(tmp_path / "peer")
    read = Peer.load(tmp_path / "peer")
    assert state(read) == state(peer)
    assert (read.F, read.explore, read.defences, read.library) == (0.5, 0.5, peer.defences, peer.library)
    assert read.log.marked == peer.log.marked == {"b": 1}
    assert [read.query("jazz") for _ in range(20)] == [peer.query("jazz") for _ in range(20)]
    assert {j: read.similarity(j) for j in "bc"} == {j: peer.similarity(j) for j in "bc"}
    assert read.record("jazz", 1) == peer.record("jazz", 1)
    with pytest.raises(DataError, match="no such file"):
        Peer.load(tmp_path / "none")
    damaged = bytearray((tmp_path / "peer").read_bytes())
    damaged[damaged.rindex(b"folk")] ^= 1
    (tmp_path / "peer").write_bytes(damaged)
    with pytest.raises(DataError, match="damaged"):
        Peer.load(tmp_path / "peer")


def test_a_store_that_fails_gets_its_rows_later(tmp_path):
    peer = Peer((), "a", store=tmp_path / "log.sqlite", **PLAIN)
    peer._store._database.execute("PRAGMA query_only = ON")
    with pytest.raises(DataError, match="cannot write"):
        peer.record("t", 1)
    assert peer.rank("t") == [(1, 1.0)]
    peer._store._database.execute("PRAGMA query_only = OFF")
    peer.record("t", 2)
    peer.close()
    again = Peer((), "a", store=tmp_path / "log.sqlite", **PLAIN)
    assert [row.item for row in again.log.all_rows()] == [1, 2]
    again.close()


def test_origins_are_bounded_too():
    """Rows too old to be kept must not fill the memory with the names of their origins."""
    peer = Peer((), "a", defences=Defences(max_rows=3, ttl=1.0), clock=lambda: 100.0)
    found = peer.merge(message([Row(f"n{number}", 0, "t", 1, time=5.0) for number in range(9)]))
    assert (found.known, found.refused) == (9, {})
    assert len(peer.vector()) == 3
    # Those that have rows stay, and so does the number of our own next one.
    assert peer.record("t", 1).number == 0
    peer._clock = lambda: 1000.0
    assert peer.rank("t") == []
    found = peer.merge(message([Row(f"m{number}", 0, "t", 1, time=1000.0) for number in range(9)]))
    assert (found.added, found.refused) == (2, {"full": 7})
    assert peer.record("t", 1).number == 1


def test_a_store_holds_every_row_as_it_comes(tmp_path):
    peer = Peer((), "a", store=tmp_path / "log.sqlite", **PLAIN)
    peer.record("t", 1)
    peer.merge(message(rows_of([("b", "t", 1), ("b", "t", 2)])))
    again = Peer((), "a", store=tmp_path / "log.sqlite", **PLAIN)  # the first was never closed: as after a crash
    assert {row.key: row for row in again.log.all_rows()} == {row.key: row for row in peer.log.all_rows()}
    assert again.rank("t") == peer.rank("t")
    assert again.record("t", 5).number == 1
    again.close()
    peer.close()
    with pytest.raises(DataError, match="log of 'a'"):
        Peer((), "b", store=tmp_path / "log.sqlite")
    (tmp_path / "text").write_text("no database at all, but long enough to look at" * 100)
    with pytest.raises(DataError, match="store of rows"):
        Peer((), "a", store=tmp_path / "text")
    with pytest.raises(DataError, match="store of rows"):
        Peer((), "a", store=tmp_path / "none" / "log.sqlite")
    # SQLite would keep such a log in memory, and lose it.
    with pytest.raises(DataError, match=r"':memory:' is no file"):
        Peer((), "a", store=":memory:")
    base = sqlite3.connect(tmp_path / "log.sqlite")
    base.execute("UPDATE rows SET body = '[1]' WHERE origin = 'b'")
    base.commit()
    base.close()
    with pytest.raises(DataError, match="10 fields"):
        Peer((), "a", store=tmp_path / "log.sqlite")


# Parts


@given(st.lists(st.integers(0, 30), max_size=40), st.lists(st.integers(0, 30), max_size=40))
def test_ranges_are_a_set_of_numbers(first, second):
    one, two = Ranges(), Ranges()
    for ranges, numbers in ((one, first), (two, second)):
        for number in numbers:
            ranges.add(number)
        assert [number for number in range(32) if number in ranges] == sorted(set(numbers))
        assert ranges.ends == sorted(set(ranges.ends))  # rising, and no two touch
        assert ranges.end == max(numbers, default=-1) + 1
        assert check_vector({"b": ranges.ends}) == {"b": ranges.ends}
    left = [number for low, high in one.without(two) for number in range(low, high)]
    assert left == sorted(set(first) - set(second))


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), max_size=12))
def test_ranges_take_in_ranges(spans):
    ranges, numbers = Ranges(), set()
    for low, length in spans:
        ranges.add(low, low + length)
        numbers |= set(range(low, low + length))
    assert [number for number in range(32) if number in ranges] == sorted(numbers)
    assert ranges.ends == sorted(set(ranges.ends))


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(0, 7))
def test_top_terms_of_all_nodes_are_those_of_each(counts, number):
    mask = top_terms_mask(np.array(counts), number)
    for row, row_mask in zip(counts, mask, strict=True):
        expected = top_terms({term: count for term, count in enumerate(row) if count}, number)
        assert set(np.flatnonzero(row_mask).tolist()) == expected


def test_formulas_on_numbers_and_arrays():
    counts = np.array([0, 1, 5])
    for limits in (Defences(click_cap=2), Defences(saturation="log"), NONE):
        assert saturated(counts, limits).tolist() == pytest.approx([saturated(int(count), limits) for count in counts])
    assert raw_similarity(3, 2, 7) == 1.0
    assert raw_similarity(np.array([3, 0]), np.array([2, 0]), np.array([7, 0])).tolist() == [1.0, 0.0]
    assert raw_similarity(3, 2, 7, 4) == 0.5


def test_the_made_up_library_has_the_papers_shape():
    items = library(seed=5)
    assert items == library(seed=5)
    assert items != library(seed=6)
    assert len(items) == 256
    assert {len(item.tags) for item in items} == {3}
    sizes = {tag: sum(tag in item.tags for item in items) for item in items for tag in item.tags}
    assert len(sizes) == 39
    assert min(sizes.values()) >= 10
    assert max(sizes.values()) <= 28
    assert len({item.id for item in items}) == 256
    with pytest.raises(InputError, match="do not give"):
        library(10, 39)


def test_normal_terms():
    assert normalize("  Drum  N Bass ") == "drum n bass"
    assert normalize(normalize("İI")) == normalize("İI")


def test_measures_by_hand():
    assert rank_distance([1, 2, 3], [3, 1, 2]) == 1 + 1 + 2
    assert rank_distance(list("abc"), list("abc")) == 0
    assert ndcg([0, 1, 1], 2) == pytest.approx((1 / np.log2(3)) / (1 + 1 / np.log2(3)))
    assert ndcg([1, 1, 0], 5) == 1.0
    assert ndcg([0, 0], 5) == 0.0
    with pytest.raises(InputError, match="same items"):
        rank_distance([1, 2], [1, 3])


@settings(max_examples=20)
@given(st.permutations(range(6)), st.permutations(range(6)))
def test_rank_distance_is_symmetric_and_0_only_for_equal(first, second):
    assert rank_distance(first, second) == rank_distance(second, first)
    assert (rank_distance(first, second) == 0) == (first == second)
