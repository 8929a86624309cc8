"""Shared state: the same bits on every peer, only what differs is sent."""

import pickle
import threading

import pytest
import torch

from anabranch.cluster.pccl import Kicked, Mismatch, PeerLost, RevisionError, SharedState
from anabranch.cluster.pccl import communicator as module
from anabranch.cluster.pccl.elections import RECEIVE, elect
from anabranch.cluster.pccl.hashing import tensor_hash
from anabranch.cluster.pccl.links import LinkError
from anabranch.errors import InputError
from pccl_peers import Peer, a_master, together, until_somebody_waits
from waiting import until


@pytest.fixture(scope="module")
def master():
    with a_master() as found:
        yield found


def state_of(number, odd=()):
    """Tensors a and b; those in ``odd`` are another one for each number."""
    return SharedState(
        {name: torch.arange(600.0) + (number + 1 if name in odd else 0) for name in ("a", "b")}, revision=1
    )


def test_the_majority_wins_and_only_what_differs_is_sent(master):
    def work(number, peers):
        state = state_of(number, odd=("b",) if number == 2 else ())
        told = peers.sync_shared_state(state, "enforce_popular")
        state.revision += 1
        again = peers.sync_shared_state(state)
        return state.digest(), told, again

    found = together(master.address, 4, work)
    assert len({digest for digest, _, _ in found}) == 1
    assert [told.fetched for _, told, _ in found] == [(), (), ("b",), ()]
    assert [told.received_bytes for _, told, _ in found] == [0, 0, 2400, 0]
    assert sum(told.sent_bytes for _, told, _ in found) == 2400
    assert [(again.sent_bytes, again.received_bytes, again.revision) for _, _, again in found] == [(0, 0, 2)] * 4


def test_the_sender_wins_against_the_majority_and_who_receives_counts_for_nothing(master):
    def work(number, peers):
        state = state_of(number, odd=("a",) if number == 1 else ())
        told = peers.sync_shared_state(state, {1: "send_only", 2: "receive_only"}.get(number, "enforce_popular"))
        return float(state.tensors["a"][0]), told.received_bytes

    assert together(master.address, 3, work) == [(2.0, 2400), (2.0, 0), (2.0, 2400)]


def test_newcomers_receive_what_others_have(master):
    def work(number, peers):
        state = state_of(number)
        peers.sync_shared_state(state, "enforce_popular")
        late = None
        if number == 0:
            late = Peer(master.address, lambda _, mine: newcomer(mine), 9)
        until(lambda: peers.are_peers_pending())
        peers.update_topology()
        state.revision += 1
        peers.sync_shared_state(state)
        return late and late.wait().value, state.digest()

    def newcomer(peers):
        assert peers.admit()
        mine = SharedState({"a": torch.zeros(600), "b": torch.arange(600.0)})
        told = peers.sync_shared_state(mine)
        return mine.digest(), told.fetched, mine.revision

    (late, digest), (_, other) = together(master.address, 2, work)
    assert late == (digest, ("a",), 2)
    assert other == digest


def test_a_revision_that_is_not_the_next_is_told_to_all(master):
    def work(number, peers):
        state = state_of(number)
        peers.sync_shared_state(state)
        state.revision += 2 if number else 1
        with pytest.raises(RevisionError, match="revision 3, and after the last one comes 2") as told:
            peers.sync_shared_state(state)
        state.revision = 2
        return (told.value.expected, told.value.got), peers.sync_shared_state(state).revision

    assert together(master.address, 2, work) == [((2, 3), 2)] * 2


def test_states_of_other_forms_are_told_by_name(master):
    def work(number, peers):
        state = SharedState({"w": torch.zeros(3 + number)}, revision=1)
        # Whoever came first is told first.
        with pytest.raises(Mismatch, match=r"'w': peer \d+ has float32 \[[34]\], peer \d+ float32 \[[34]\]") as told:
            peers.sync_shared_state(state)
        assert {"[3]", "[4]"} <= set(str(told.value).replace(",", "").split())

    together(master.address, 2, work)


def test_senders_that_disagree_and_groups_that_only_receive_are_sent_away(master):
    def senders(number, peers):
        with pytest.raises(Kicked, match="all send, and not the same"):
            peers.sync_shared_state(state_of(number, odd=("a",)), "send_only")

    def receivers(number, peers):
        with pytest.raises(Kicked, match="nobody who is left has the shared state"):
            peers.sync_shared_state(state_of(number), "receive_only")

    together(master.address, 2, senders)
    together(master.address, 2, receivers)


def test_more_than_half_types_and_empty_tensors(master):
    def work(number, peers):
        tensors = {
            "half": torch.full((5,), number, dtype=torch.bfloat16),
            "bool": torch.tensor([number == 1, True]),
            "none": torch.empty(0),
            "scalar": torch.tensor(float(number)),
            "strided": torch.arange(6.0).reshape(2, 3).t() + number,
        }
        state = SharedState(tensors, revision=1)
        peers.sync_shared_state(state, "send_only" if number == 1 else "receive_only")
        return state.digest(), tensors["strided"].tolist()

    found = together(master.address, 2, work)
    assert found[0] == found[1]
    assert found[0][1][0] == [1.0, 4.0]


def test_hashes_know_bytes_and_nothing_else():
    value = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0))
    other = value.clone()
    assert tensor_hash(value) == tensor_hash(other.reshape(3, -1)) == tensor_hash(other.view(torch.int32))
    other[2_999_999] += 1
    assert tensor_hash(value) != tensor_hash(other)
    swapped = torch.cat([value[1_048_576:2_097_152], value[:1_048_576], value[2_097_152:]])
    assert tensor_hash(value) != tensor_hash(swapped)
    assert tensor_hash(torch.tensor([0.0])) != tensor_hash(torch.tensor([-0.0]))


def test_what_is_no_state_is_told():
    with pytest.raises(InputError, match="share tensors"):
        SharedState({"a": [1.0]})
    with pytest.raises(InputError, match="1 to 256 letters"):
        SharedState({"": torch.zeros(1)})


def test_more_than_a_message_tells_of_is_told_before_it_is_shared():
    one = torch.zeros(1)
    with pytest.raises(InputError, match="20000 tensors"):
        SharedState({f"{number}": one for number in range(20_000)})
    with pytest.raises(InputError, match="short names"):
        SharedState({f"{number:0200}": one for number in range(9_000)})


def vote(digest, revision=1, strategy="enforce_popular"):
    return {"revision": revision, "strategy": strategy, "keys": [["w", "float32", [1], digest]]}


def test_elections_by_hand():
    # The most frequent; equal ones: what the lowest peer has.
    assert elect({0: vote("x"), 1: vote("y"), 2: vote("y")}, None).fetches.keys() == {0}
    assert elect({3: vote("x"), 1: vote("y")}, None).fetches == {3: (1, [["w", "float32", [1], "y"]])}
    # Sources take turns: none serves more than its share.
    votes = {peer: vote("good") for peer in range(3)} | {
        peer: vote(f"bad{peer}", 0, "receive_only") for peer in range(3, 8)
    }
    served = [source for source, _ in elect(votes, 0).fetches.values()]
    assert sorted(map(served.count, range(3))) == [1, 2, 2]
    # One that only receives, and has it already, is a source too.
    assert elect({0: vote("x"), 1: vote("x", 9, "receive_only"), 2: vote("z", 9, "receive_only")}, 0).fetches[2][0] in (
        0,
        1,
    )
    assert elect({0: vote("x", 5)}, 3).error == {"error": "revision", "expected": 4, "got": 5, "peer": 0}


def test_where_nothing_was_shared_the_highest_revision_counts_first():
    """One that begins anew is not what one that goes on with a run from step 1000 has to take."""
    votes = {
        0: vote("anew", 1, RECEIVE),
        1: vote("anew", 1, RECEIVE),
        2: vote("old", 101, RECEIVE),
        3: vote("older", 100, RECEIVE),
    }
    votes = {peer: {**one, "is_default": True} for peer, one in votes.items()}
    found = elect(votes, None)
    assert found.revision == 101
    assert {peer: source for peer, (source, _) in found.fetches.items()} == {0: 2, 1: 2, 3: 2}
    # Of equal revisions the most frequent, then what the lowest peer has.
    del votes[2], votes[3]
    assert elect(votes | {4: {**vote("other", 1, RECEIVE), "is_default": True}}, None).fetches.keys() == {4}
    # One that must win does so.
    assert elect(votes | {5: vote("sent", 0, "send_only")}, None).revision == 0


def test_newcomers_do_not_begin_again_where_there_was_a_state():
    votes = {peer: {**vote("x", 1, RECEIVE), "is_default": True} for peer in range(2)}
    assert elect(votes, 4).kicked.keys() == {0, 1}
    assert elect(votes, None).error is None


def test_who_has_another_form_than_what_is_shared_is_told_alone():
    odd = {"revision": 0, "strategy": RECEIVE, "keys": [["w", "float32", [2], "h"]]}
    found = elect({0: vote("x"), 1: vote("x"), 2: odd}, 0, known={0: 2, 1: 2})
    assert found.error is None
    assert found.apart.keys() == {2}
    assert "peer 2 float32 [2]" in found.apart[2]["why"]
    # One of those who run, or where nothing was shared: nobody knows who is right.
    assert (
        elect({0: vote("x"), 1: {**odd, "strategy": "enforce_popular", "revision": 1}}, 0).error["error"] == "mismatch"
    )
    assert elect({0: vote("x"), 1: odd}, None).error["error"] == "mismatch"


def sent(digest, revision=1, form=(1,)):
    return {"revision": revision, "strategy": "send_only", "keys": [["w", "float32", list(form), digest]]}


def test_a_newcomer_that_names_its_strategy_receives_or_is_told_alone():
    """A program that names one in each call is a newcomer's as well; its revision once ended all."""
    known = {0: 2, 1: 2}
    those = {0: vote("x", 8), 1: vote("x", 8)}
    # However many they are, and whatever revision they bring.
    for revision in (1, 8, 9):
        found = elect(those | {peer: vote("y", revision) for peer in (2, 3, 4)}, 7, known=known)
        assert (found.error, found.revision, found.fetches.keys()) == (None, 8, {2, 3, 4})
    found = elect(those | {2: sent("y", 1)}, 7, known=known)
    assert found.apart == {2: {"error": "revision", "expected": 8, "got": 1, "peer": 2}}
    # One that knows the revision means it.
    assert elect(those | {2: sent("y", 8)}, 7, known=known).fetches.keys() == {0, 1}
    # And not against those who send.
    found = elect({0: sent("x", 8), 1: vote("x", 8), 2: sent("y", 8)}, 7, known=known)
    assert found.kicked.keys() == {2}
    # Nor with another form than all the others have, even where it alone is a source.
    receiving = {peer: vote("x", 0, RECEIVE) for peer in known}
    found = elect(receiving | {2: sent("y", 8, (2,))}, 7, known=known)
    assert found.apart.keys() == {2}
    assert found.apart[2]["error"] == "mismatch"
    # Of one that has run for long all are told, and so are those of whom nobody knows which is right.
    assert elect({0: vote("x", 8), 1: vote("x", 9)}, 7, known=known).error["got"] == 9
    assert elect({2: sent("y", 1)}, 7, known=known).error["got"] == 1


def test_of_those_at_one_revision_who_has_come_furthest_since_is_what_counts():
    votes = {
        peer: {**vote(f"of {steps}", 101, RECEIVE), "is_default": True, "progress": steps}
        for peer, steps in enumerate((2, 8, 2))
    }
    found = elect(votes, None)
    assert {peer: source for peer, (source, _) in found.fetches.items()} == {0: 1, 2: 1}
    # A later revision is further than any progress.
    votes[3] = {**vote("later", 102, RECEIVE), "is_default": True, "progress": 0}
    assert elect(votes, None).revision == 102


@pytest.mark.parametrize("strategy", ["enforce_popular", "send_only"])
def test_those_who_run_go_on_where_a_newcomer_names_its_strategy(master, strategy):
    late, calls = [], 6

    def work(number, peers):
        state = SharedState({"w": torch.full((3,), float(number))})
        while state.revision < calls:
            peers.admit()
            state.revision += 1
            peers.sync_shared_state(state, "enforce_popular")
            if number == 0 and state.revision == 2:
                late.append(Peer(master.address, comes, 9))
                until_somebody_waits(master)
            peers.all_reduce(torch.ones(2))
        return state.tensors["w"].tolist()

    def comes(number, peers):
        state = SharedState({"w": torch.full((3,), 9.0)})
        while state.revision < calls:
            peers.admit()
            state.revision += 1
            peers.sync_shared_state(state, strategy)
            peers.all_reduce(torch.ones(2))
        return state.tensors["w"].tolist()

    found = together(master.address, 2, work)
    newcomer = late[0].wait()
    assert found[0] == found[1] != [9.0] * 3
    if strategy == "enforce_popular":
        assert (newcomer.error, newcomer.value) == (None, found[0])
    else:
        assert isinstance(newcomer.error, RevisionError)
        assert newcomer.error.got == 1


def test_another_source_is_taken_where_there_is_one():
    votes = {0: vote("x"), 1: vote("x"), 2: vote("y", 0, RECEIVE)}
    assert elect(votes, 0).fetches[2][0] == 0
    assert elect(votes, 0, {2: [0]}).fetches[2][0] == 1
    assert elect(votes, 0, {2: [0, 1]}).fetches[2][0] == 0


def test_an_error_of_a_revision_outlives_a_pickle():
    error = pickle.loads(pickle.dumps(RevisionError(3, 7, 2)))
    assert (error.expected, error.got, error.peer) == (3, 7, 2)
    assert "has revision 7" in str(error)


def test_a_newcomer_with_another_model_is_sent_away_and_the_others_go_on(master):
    def work(number, peers):
        state, worlds = SharedState({"w": torch.zeros(3 if number < 9 else 4)}), []
        while state.revision < 40 and 3 not in worlds[:-3]:
            peers.admit()
            state.revision += 1
            peers.sync_shared_state(state)
            worlds.append(peers.all_reduce(torch.ones(1)).world)
            if state.revision == 2 and number == 0:
                late.append(Peer(master.address, work, 9))
            if number == 0 and state.revision == 6:
                late.append(Peer(master.address, work, 8))
        return state.revision

    late = []
    found = together(master.address, 2, work)
    assert found[0] == found[1]
    odd, fits = (peer.wait() for peer in late)
    assert isinstance(odd.error, Mismatch)
    assert "'w'" in str(odd.error)
    assert fits.error is None


@pytest.mark.parametrize("who", ["source", "newcomer"])
def test_who_cannot_send_or_fetch_a_state_does_not_end_the_others(master, monkeypatch, who):
    """Bad memory on one side, a firewall on the other."""
    gate = threading.Event()
    fetched = module.fetch

    def fetches(place, *rest, **more):
        if who == "source" and not sources:
            # Whichever is asked first.
            sources.append(place.peer)
        if (who == "newcomer" and gate.is_set()) or (who == "source" and place.peer == sources[0]):
            raise LinkError(f"peer {place.peer} sent another 'w' than was elected", place.peer)
        return fetched(place, *rest, **more)

    monkeypatch.setattr(module, "fetch", fetches)

    def work(number, peers):
        state = SharedState({"w": torch.full((3,), 1.0 if number < 9 else 2.0)})
        while state.revision < 400 and peers.world_size < 3 and not (late and late[0].error):
            peers.admit()
            state.revision += 1
            try:
                peers.sync_shared_state(state)
            except PeerLost:
                state.revision -= 1
                lost.append(number)
                continue
            told = torch.tensor([float(bool(late and late[0].error))])
            peers.all_reduce(told, op="max")
            if number == 0 and not late:
                gate.set()
                late.append(Peer(master.address, work, 9))
            if told.item():
                break
        while peers.world_size > 2 or number == 9:
            state.revision += 1
            try:
                peers.sync_shared_state(state)
                return state.tensors["w"].tolist()
            except PeerLost:
                state.revision -= 1
                lost.append(number)
        return state.tensors["w"].tolist()

    late, sources, lost = [], [], []
    peers = [Peer(master.address, work, number, 2) for number in range(2)]
    assert [(peer.wait().error, peer.value) for peer in peers] == [(None, [1.0] * 3)] * 2
    late[0].wait()
    if who == "source":
        assert (late[0].error, late[0].value) == (None, [1.0] * 3)
    else:
        assert isinstance(late[0].error, Kicked)
        assert "could not fetch" in str(late[0].error)
    assert lost


@pytest.mark.parametrize("settings", [{"w": "1"}, {"a": ""}, {"a": 1}, {"": "1"}, {"a": "\ud800"}, {"a": "x" * 257}])
def test_settings_that_cannot_be_shared_are_told(settings):
    with pytest.raises(InputError, match=r"the setting .* is none"):
        SharedState({"w": torch.zeros(2)}, settings=settings)


def test_settings_count_in_what_is_shared_and_nothing_of_them_is_fetched(master):
    def work(number, peers):
        state = SharedState({"w": torch.full((2,), float(number))}, revision=1, settings={"v": "7", "x": "8"})
        return peers.sync_shared_state(state), state.tensors["w"].tolist(), state.digest()

    (first, one, digest), (second, other, same) = together(master.address, 2, work)
    assert one == other
    assert digest == same != SharedState({"w": torch.tensor(one)}).digest()
    assert sorted([first.fetched, second.fetched]) == [(), ("w",)]
