"""The simulator is the network of peers it stands for: the same rankings as `Peer`, the same run for a seed, and what the paper saw."""

import itertools

import numpy as np
import pytest

from anabranch.errors import InputError
from anabranch.graph.rank import (
    NONE,
    Attack,
    Defences,
    Item,
    Network,
    Peer,
    Row,
    library,
    ndcg,
    paper_attack,
    rank_distance,
)

SMALL = {"items": library(40, 8, 2, low=5, high=18), "num_nodes": 10}


def small(**changes):
    return Network(**{**SMALL, **changes})


def peer_of(network, node):
    """The peer that ``node`` of a network stands for: the same library and the same rows."""
    items = [network.items[place] for place in np.flatnonzero(network.library_NI[node])]
    clock = (lambda: float(network.tick)) if network.defences.ttl else None
    peer = Peer(items, f"n{node:03}", network.F, 0.0, network.top_terms, defences=network.defences, clock=clock)
    rows = []
    for row in np.flatnonzero(network.has_NR[node, : network.num_rows]):
        term, place = divmod(int(network.cell_pair[network.row_cell[row]]), network.num_items)
        item, origin = network.items[place], int(network.row_origin[row])
        made = Row(
            f"n{origin:03}",
            int(network.row_number[row]),
            network.terms[term],
            item.id,
            item.title,
            item.artist,
            item.tags,
        )
        rows.append(Row(*made.content()[:-1], float(network.row_tick[row])))
    peer._take([(row, "") for row in rows], is_ours=True)
    return peer


@pytest.mark.parametrize("F", [0.0, 0.7])
@pytest.mark.parametrize(
    "defences",
    [
        *[NONE, Defences(click_cap=2), Defences(saturation="log"), Defences(min_common=3), Defences(rows_per_origin=9)],
        Defences(ttl=60.0),
    ],
    ids=["none", "cap", "log", "common", "window", "ttl"],
)
def test_ranks_as_peers_with_the_same_rows_do(F, defences):
    network = small(
        F=F, defences=defences, seed=4, top_terms=3, attack=Attack(attackers=2, queries=5, join_at=20, attack_at=40)
    )
    network.run(150)
    for node in (0, 3, 11):  # the last one is an attacker
        peer = peer_of(network, node)
        found = network.similarity(node)
        for other in range(network.num_nodes):
            expected = peer.similarity(f"n{other:03}") if f"n{other:03}" in peer.peers() or other == node else 0.0
            assert found[other] == pytest.approx(expected), other
        score_TI, _ = network.scores(node)
        for number, term in enumerate(network.terms):
            ranked = peer.rank(term)
            assert network.rank(node, number).tolist() == [item for item, _ in ranked]
            assert [score_TI[number, item] for item, score in ranked] == pytest.approx([score for _, score in ranked])


def test_unseen_terms_fall_back_as_peers_do():
    """Attackers have no rows of their own before they act, and a tenth of a log at most."""
    network = small(attack=Attack(attackers=3, queries=1, join_at=2, attack_at=900), seed=1, bootstrap_share=0.02)
    network.run(5)
    unseen = 0
    for node in (10, 11, 12):
        peer = peer_of(network, node)
        for number, term in enumerate(network.terms):
            unseen += term not in peer.log.count
            assert network.rank(node, number).tolist() == [item for item, _ in peer.rank(term)]
    assert unseen > 3


@pytest.mark.parametrize("gossip", ["pull", "push"])
def test_one_seed_gives_one_run(gossip):
    attack = {"attackers": 3, "queries": 4, "join_at": 30, "attack_at": 50}
    runs = [
        small(gossip=gossip, seed=seed, attack=Attack(**attack), churn=0.05, away=20).run(120, 40) for seed in (5, 5, 6)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert [found["tick"] for found in runs[0]] == [0, 40, 80, 120]


def test_going_on_is_the_same_as_going_through():
    one, other = small(seed=2), small(seed=2)
    one.run(100, 50)
    other.run(30, 50)
    other.run(70, 50)
    assert one.history == other.history


def synchronised(network):
    network.has_NR[:, : network.num_rows] = True
    return network.evaluate()


def test_a_whole_synchronisation_has_distance_0():
    network = small(F=1.0, defences=NONE, seed=0)
    network.run(100)
    before, after = network.evaluate(), synchronised(network)
    assert before["distance"] > 0
    assert after["distance"] == 0
    assert after["coverage"] == 1.0
    assert after["log_rows"] == network.num_rows == 10 * 8 + 100


def test_distances_by_hand():
    """Two items of one term, two nodes. Node 0 clicks item 0 once and item 1 twice; node 1 clicks item 0 three times: globally 4 to 2."""
    network = Network([Item(0, tags=("t",)), Item(1, tags=("t",))], 2, defences=NONE, explore=0.0, seed=0)
    network._table()
    for node, item in [(0, 0), (0, 1), (0, 1), (1, 0), (1, 0), (1, 0)]:
        network.write(node, 0, item)
    assert network.global_clicks().tolist() == [[4.0, 2.0]]
    found = network.evaluate()
    assert found["distance"] == np.mean([rank_distance([1, 0], [0, 1]), 0]) == 1.0
    assert found["by_term"] == [1.0]
    assert network.evaluate([1])["distance"] == 0.0
    assert network.similarity(0).tolist() == [1.0, 0.0]  # it has no row of the other
    assert network.rank(0, 0).tolist() == [1, 0]
    network.has_NR[0, :6] = True  # 4 clicks on item 0, 2 on item 1
    assert network.similarity(0).tolist() == [1.0, 1.0]
    assert network.rank(0, 0).tolist() == [0, 1]
    assert network.evaluate()["distance"] == 0.0


def test_random_order_is_where_it_starts_and_the_global_order_where_it_tends():
    """(n^2 - 1) / 3 of random orders, the mean over terms; less here, since both orders break their many ties by id."""
    network = Network(num_nodes=30, F=1.0, defences=NONE, seed=3)
    history = network.run(1500, 500)
    expected = np.mean([(len(of) ** 2 - 1) / 3 for of in network.of_term])
    assert 0.7 * expected < history[0]["distance"] < expected
    assert history[-1]["distance"] < 0.1 * history[0]["distance"]
    assert history[-1]["ranked_distance"] < 0.4 * history[0]["ranked_distance"]
    assert history[-1]["coverage"] == 1.0
    assert all(one["coverage"] <= other["coverage"] for one, other in itertools.pairwise(history))


def test_an_isolated_node_keeps_what_it_had():
    network = small(F=1.0, seed=0)
    network.run(300)
    reference = network.global_clicks()
    before = network.evaluate([0, 1], reference)
    others = {int(row) for row in np.flatnonzero(network.has_NR[0, : network.num_rows]) if network.row_origin[row] != 0}
    network.disconnect([0, 1])
    network.run(300)
    after = {int(row) for row in np.flatnonzero(network.has_NR[0, : network.num_rows]) if network.row_origin[row] != 0}
    assert after == others
    assert network.clicks_N[0] > 8 + 20  # and it went on searching
    assert network.failed > 0
    assert network.evaluate([0, 1], reference)["distance"] <= before["distance"] + 8
    network.reconnect([0, 1])
    network.run(200)
    assert network.evaluate([0, 1])["log_rows"] > 0.9 * network.num_rows


def test_nodes_that_leave_neither_search_nor_answer():
    network = small(seed=0, churn=1.0, away=10_000)
    network.run(9)
    there = np.flatnonzero(network.back_N <= network.tick)
    assert len(there) == 2  # no more may leave
    clicks = network.clicks_N.copy()
    network.run(50)
    assert set(np.flatnonzero(network.clicks_N > clicks)) <= set(there.tolist())
    assert network.failed > 0
    back = small(seed=0, churn=0.5, away=3)
    back.run(300)
    assert back.clicks_N.min() > 8


def test_only_who_asked_is_learnt_where_answerers_do_not_learn():
    learning, silent = (small(seed=1, answerer_learns=learns) for learns in (True, False))
    assert learning.known_NN[0, 1] == True  # noqa: E712 - node 1 joined through node 0
    assert not silent.known_NN[0, 1] or silent.known_NN[0].sum() > 0
    assert learning.known_NN.sum() > silent.known_NN.sum()
    assert not np.diagonal(learning.known_NN).any()


def test_quotas_and_sizes_of_messages():
    network = small(seed=0, defences=Defences(reply_rows=5, reply_rows_per_origin=2))
    rows = np.arange(20)
    kept = network._within_quotas(rows)
    assert len(kept) == 5
    assert np.bincount(network.row_origin[kept]).max() <= 2
    network.run(100)
    assert network.rows_sent <= 5 * network.messages
    assert 50 < network.bytes_sent / network.rows_sent < 600
    assert network.largest_bytes <= 5 * network.row_bytes.max()


@pytest.mark.parametrize("aim", ["last", "one"])
def test_sybils_lift_what_stood_last(aim):
    attack = Attack(attackers=5, queries=40, join_at=100, attack_at=200, aim=aim)
    network = Network(num_nodes=20, F=1.0, defences=NONE, attack=attack, seed=0)
    network.run(199)
    before = network.evaluate()
    network.run(401)
    after = network.evaluate()
    assert after["attacked_distance"] > before["attacked_distance"] or aim == "one"
    if aim == "one":
        term, item = attack.target
        assert term == 0
        assert item in network.of_term[0]
        assert after["target_place"] < 1
    written = network.row_origin[: network.num_rows] >= 20
    assert written.sum() >= 5 * 40
    assert (network.cell_pair[network.row_cell[np.flatnonzero(written)[:200]]] // network.num_items == 0).all()


def test_inflation_clicks_everywhere():
    attack = paper_attack("inflation", attackers=2, queries=300, join_at=10, attack_at=20)
    network = small(attack=attack, seed=0)
    network.run(20)
    rows = np.flatnonzero(network.row_origin[: network.num_rows] >= 10)
    assert len(rows) == 600
    terms, items = np.divmod(network.cell_pair[network.row_cell[rows]], network.num_items)
    assert len(set(terms.tolist())) == 8
    assert network.match_TI[terms, items].all()
    assert network.evaluate()["attacked_distance"] is None


def test_signatures_keep_forged_rows_out_and_only_those():
    attack = {"attackers": 3, "queries": 30, "join_at": 20, "attack_at": 40, "forge": True}
    seen = {}
    for signed in (False, True):
        network = small(attack=Attack(**attack), defences=Defences(signed=signed, saturation=None), seed=0)
        network.run(400)
        forged = network.row_forged[: network.num_rows]
        assert forged.sum() == 90
        assert (network.row_origin[: network.num_rows][forged] < 10).all()
        seen[signed] = network.has_NR[:10, : network.num_rows][:, forged].any()
        assert network.has_NR[:10, : network.num_rows][:, ~forged].mean() > 0.5
        assert (
            network.global_clicks().sum() == 10 * 8 + (network.row_origin[: network.num_rows][~forged] < 10).sum() - 80
        )
    assert seen == {False: True, True: False}


def test_push_spreads_by_itself_and_must_be_allowed():
    network = small(gossip="push", seed=0)
    assert not network.defences.pull_only
    network.run(200)
    assert network.evaluate()["coverage"] == 1.0
    with pytest.raises(InputError, match="by pull only"):
        small(gossip="push", defences=Defences())


def test_groups_click_their_own_and_F_0_finds_them():
    """Two groups with opposite tastes: with F = 0 a node ranks what its own group likes."""
    found = {}
    for F in (0.0, 1.0):
        network = Network(num_nodes=30, F=F, groups=2, fidelity=1.0, seed=1)
        network.run(800, 800)
        found[F] = network.history[-1]
        clicked = network.cell_pair[: network.num_cells]
        own = network.group_TI.ravel()[clicked] == network.group_N[network.cell_origin[: network.num_cells]]
        assert own.mean() > 0.95
    assert found[0.0]["ndcg"] > found[1.0]["ndcg"] + 0.1
    assert found[0.0]["ndcg"] > found[0.0]["ndcg_global"] + 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_nodes": 0}, "num_nodes is 0"),
        ({"F": -1}, "F is -1"),
        ({"gossip": "flood"}, "gossip is 'flood'"),
        ({"churn": 1.5}, "churn is 1.5"),
        ({"library_share": -0.1}, "library_share is -0.1"),
        ({"away": 0}, "away is 0"),
        ({"groups": 0}, "groups is 0"),
        ({"items": [Item(1)]}, "no item has a tag"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        small(**arguments)


def test_bad_attacks():
    for arguments in ({"kind": "ddos"}, {"aim": "first"}, {"attackers": 0}, {"join_at": 9, "attack_at": 8}):
        with pytest.raises(InputError, match=r"attack|kind"):
            Attack(**arguments)
    with pytest.raises(InputError, match="targeted, inflation, epic"):
        paper_attack("flood")
    assert paper_attack("epic").attackers == 300
    assert paper_attack("inflation").queries == 1000


@pytest.mark.slow
def test_the_papers_size_runs_through():
    """100 nodes, 10,000 ticks, 10 attackers; seconds, no minute."""
    network = Network(F=1.0, defences=NONE, attack=paper_attack("targeted"), seed=0)
    history = network.run(10_000, 500)
    assert history[-1]["coverage"] == 1.0
    assert history[-1]["distance"] < 0.1 * history[0]["distance"]
    assert max(found["largest_bytes"] for found in history[:10]) < 600_000  # the paper's messages, before the attack


def test_own_tastes_are_measured_as_ndcg_is():
    network = small(groups=2, seed=3)
    network.run(40)
    found = network.evaluate()
    values = []
    for node in range(10):
        score_TI, _ = network.scores(node)
        for term, of in enumerate(network.of_term):
            order = of[np.lexsort((of, -score_TI[term, of]))]
            values.append(ndcg(network.group_TI[term, order] == network.group_N[node], 5))
    assert found["ndcg"] == pytest.approx(np.mean(values))
    assert found["ndcg_local"] > found["ndcg_global"]
