"""Who is told where peers do not agree: votes one by one, and drawn ones of a newcomer among those who have been through rounds."""

import random

import pytest

from anabranch.cluster.pccl.records import MOST_ANSWERS, MOST_TAGS
from anabranch.cluster.pccl.state import MasterState
from pccl_states import POPULAR, RECEIVE, accepted, begin, shares, through_a_round, with_a_newcomer
from pccl_votes import FIELDS, a_vote, said


def rounds(count):
    """What a peer of ours does, as votes and their answers; the same on all."""
    done = 0
    while done < count:
        reply = yield {"what": "pending"}
        if reply["pending"]:
            reply = yield {"what": "accept"}
            if reply.get("establish"):
                reply = yield {"what": "established", "ok": True}
            if reply.get("error") == "topology":
                continue
        keys = [["w", "float32", [1], f"{done}"]]
        strategy = "enforce_popular" if done else "receive_only"
        yield {"what": "sync", "revision": done + 1, "strategy": strategy, "is_default": True, "keys": keys}
        reply = yield {"what": "synced", "ok": True}
        if "error" in reply:
            continue
        aborted = True
        while aborted:
            reply = yield {"what": "initiate", "tag": 1, "descriptor": {"count": 1}}
            aborted = (yield {"what": "complete", "tag": 1, "seq": reply["seq"], "aborted": False})["aborted"]
        done += 1


class Run:
    """Peers of ours, who vote when it is their turn, and the answers that they were given."""

    def __init__(self, count):
        self.state = MasterState()
        self.peers = [self.state.join(group=0, host="h", port=1, pool=1) for _ in range(2)]
        for peer in self.peers:
            self.state.vote(peer, {"what": "join", "req": 1}, 0.0)
        self.state.vote(self.peers[0], {"what": "established", "ok": True, "req": 2}, 0.0)
        self.state.vote(self.peers[0], {"what": "accept", "req": 3}, 0.0)
        for peer in self.peers:
            self.state.vote(peer, {"what": "established", "ok": True, "req": 4}, 0.0)
        self.programs = {peer: rounds(count) for peer in self.peers}
        self.reqs = dict.fromkeys(self.peers, 10)
        self.turns = dict.fromkeys(self.peers)
        self.heard = set()
        self.hear()

    def hear(self):
        for peer, kind, body in self.state.take():
            assert kind != "kick" or peer not in self.peers, body
            if peer in self.reqs and kind == "reply" and body["req"] == self.reqs[peer]:
                self.turns[peer] = body
                self.heard.add(body.get("error"))
                assert body.get("error") in (None, "lost", "topology"), body

    def go(self, peer):
        """Vote, if it is this peer's turn. False where it waits or is done."""
        if peer not in self.turns:
            return False
        reply = self.turns.pop(peer)
        try:
            vote = self.programs[peer].send(reply)
        except StopIteration:
            del self.programs[peer]
            return False
        self.reqs[peer] += 1
        self.state.vote(peer, {**vote, "req": self.reqs[peer], "low": self.reqs[peer]}, 0.0)
        for found in self.state.jobs():
            self.state.solved(found, is_late=False, now=0.0)
        self.hear()
        return True

    def go_on(self, until=lambda: False):
        """Until all wait for somebody else."""
        while not until() and sum(self.go(peer) for peer in self.peers):
            pass


def as_others(state, peer):
    """What fits to what another waits for; None where none does."""
    for other in state.accepted:
        if other.id != peer and other.initiates:
            return {"what": "initiate", "tag": 1, "descriptor": {"count": 1}}
        if other.id != peer and other.vote is not None and other.vote["what"] == "sync":
            strategy = {"strategy": "receive_only", "is_default": True}
            return {"what": "sync", "revision": 0, **strategy, "keys": [["w", "float32", [1], "x"]]}
        if other.id != peer and other.vote is not None:
            return {"what": other.vote["what"]}
    return None


def that_goes(state, peer, generator):
    """What a peer may vote as it stands, of any program and with any fault; None where it waits."""
    member = state.members[peer]
    running = next((one for one in state.running.values() if peer in one.participants), None)
    fault = {"ok": generator.random() < 0.5, "aborted": generator.random() < 0.7, "accused": generator.randrange(4)}
    if generator.random() < 0.3:
        del fault["accused"]
    if member.vote is not None:
        return None
    if state.forming is not None and peer in state.forming.participants:
        return {"what": "established", **fault, **({} if member.is_accepted else {"ok": generator.random() < 0.9})}
    if 0 in state.syncing and peer in state.syncing[0].participants:
        return {"what": "synced", **fault}
    if running is not None and peer not in running.votes:
        return {"what": "complete", "tag": running.tag, "seq": running.seq, **fault}
    if not member.is_accepted or running is not None or member.initiates:
        return None
    if generator.random() < 0.7:
        return as_others(state, peer)
    counts, tag = ({"count": 1}, {"count": 2}, {"count": 1, "world": 5}), generator.choice((1, 1, 2))
    form, digest = generator.choice(([1], [1], [2])), str(generator.randrange(6))
    last = state.revision.get(0, 0)
    return generator.choice(
        (
            {"what": "pending", "awaits": generator.choice((0, 9))},
            {"what": "accept", "awaits": generator.choice((0, 9))},
            {"what": "optimize"},
            {"what": "initiate", "tag": tag, "descriptor": generator.choice(counts)},
            {
                "what": "sync",
                "revision": generator.choice((0, 1, last, last + 2)),
                "strategy": generator.choice(FIELDS["strategy"]),
                "is_default": generator.random() < 0.5,
                "keys": [["w", "float32", form, digest]],
            },
        )
    )


@pytest.mark.parametrize("seed", range(4))
def test_whatever_a_newcomer_votes_those_who_are_known_hear_of_no_fault_of_theirs(seed):
    """It may be lost to them, or the way to it; they agree with each other, and go on."""
    came = 0
    for one in range(40):
        generator = random.Random(1000 * seed + one)
        run = Run(8)
        run.go_on(lambda run=run: run.state.revision.get(0, 0) == 2)
        assert all(run.state.members[peer].proof for peer in run.peers)
        hostile = run.state.join(group=0, host="h", port=1, pool=1)
        run.state.vote(hostile, {"what": "join", "req": 1}, 0.0)
        run.hear()
        for req in range(2, 80):
            if hostile in run.state.members and run.state.members[hostile].proof == 2:
                # It is one of them now.
                break
            if generator.random() < 0.5 and hostile in run.state.members:
                vote = a_vote(generator) if generator.random() < 0.02 else that_goes(run.state, hostile, generator)
                came += run.state.members[hostile].is_accepted and vote is not None
                if vote is not None:
                    said(run.state, hostile, vote | {"req": req, "low": req}, hear=run.hear)
            else:
                run.go(generator.choice(run.peers))
        run.state.lost(hostile, "it left", 0.0)
        run.hear()
        run.go_on()
        assert not run.programs, run.programs
        assert run.heard <= {None, "lost", "topology"}
        assert [member.id for member in run.state.accepted] == run.peers
    assert came > 40


def test_who_is_accused_twice_is_sent_away_and_once_is_forgiven():
    state, (first, second, third) = accepted(0, 0, 0)
    for attempt in range(2):
        seq = begin(state, [member.id for member in state.accepted], 100 + 2 * attempt)
        for peer in (first, second, third):
            vote = {"what": "complete", "tag": 1, "seq": seq, "aborted": peer == first, "req": 101 + 2 * attempt}
            state.vote(peer, {**vote, "accused": second} if peer == first else vote, 0.0)
        told = [body for _, kind, body in state.take() if kind == "reply"]
        assert [body["aborted"] for body in told] == [True] * 3
        assert state.order == {0: [first, second, third] if not attempt else [first, third]}
    assert dict(state.dropped())[second] == "its neighbours do not reach it"


def test_a_collective_that_went_well_clears_whom_was_accused():
    state, peers = accepted(0, 0)
    for attempt, aborted in enumerate((True, False, True)):
        seq = begin(state, peers, 100 + 2 * attempt)
        for peer in peers:
            vote = {
                "what": "complete",
                "tag": 1,
                "seq": seq,
                "aborted": aborted,
                "accused": peers[1],
                "req": 101 + 2 * attempt,
            }
            state.vote(peer, vote, 0.0)
        state.take()
    assert state.order == {0: peers}


def test_newcomers_that_wait_for_something_else_are_told_when_it_is_known_who_is_odd():
    state, (first, second) = accepted(0, 0)
    for seq in range(2):
        state.take()
        begin(state, [first, second], 100 + 10 * seq)
        for peer in (first, second):
            state.vote(peer, {"what": "complete", "tag": 1, "seq": seq, "aborted": False, "req": 101 + 10 * seq}, 0.0)
        for peer in (first, second):
            state.vote(peer, {"what": "pending", "req": 102 + 10 * seq}, 0.0)
    late = [state.join(group=0, host="h", port=1, pool=1) for _ in range(2)]
    for peer in late:
        state.vote(peer, {"what": "join", "req": 1}, 0.0)
    for peer in (first, second):
        state.vote(peer, {"what": "accept", "req": 130}, 0.0)
    for peer in (first, second, *late):
        state.vote(peer, {"what": "established", "ok": True, "req": 131}, 0.0)
    state.take()
    state.vote(late[0], {"what": "pending", "req": 140}, 0.0)
    state.vote(late[1], {"what": "optimize", "req": 140}, 0.0)
    # Either of them may be right.
    assert state.take() == []
    state.vote(first, {"what": "optimize", "req": 140}, 0.0)
    told = [(peer, kind) for peer, kind, _ in state.take()]
    assert told == [(late[0], "reply"), (late[0], "kick")]
    assert "waits for" in dict(state.dropped())[late[0]]


def test_who_has_been_through_most_is_believed():
    """A newcomer that has shared a state and voted with all is known less than those who have reduced too."""
    state, (first, second) = accepted(0, 0)
    through_a_round(state, [first, second], 100)
    late = with_a_newcomer(state, [first, second], 110)
    revision = state.revision[0] + 1
    shares(state, {first: (revision, POPULAR, "x"), second: (revision, POPULAR, "x"), late: (0, RECEIVE, "y")}, 120)
    for peer in (first, second, late):
        state.vote(peer, {"what": "pending", "req": 130}, 0.0)
    state.take()
    assert [state.members[peer].proof for peer in (first, second, late)] == [2, 2, 1]
    for peer, count in ((first, 1), (second, 1), (late, 2)):
        state.vote(peer, {"what": "initiate", "tag": 1, "descriptor": {"count": count}, "req": 140}, 0.0)
    told = {peer: body for peer, kind, body in state.take() if kind == "reply"}
    assert [told[peer].get("error") for peer in (first, second, late)] == [None, None, "mismatch"]
    assert state.order == {0: [first, second]}


def test_newcomers_for_whom_links_are_not_made_go_before_those_who_run():
    state, (first, second) = accepted(0, 0)
    late = state.join(group=0, host="h", port=1, pool=1)
    state.vote(late, {"what": "join", "req": 1}, 0.0)
    for peer in (first, second):
        state.vote(peer, {"what": "accept", "req": 110}, 0.0)
    # Nothing is heard of one that runs, whatever the newcomer has done to it.
    state.vote(second, {"what": "established", "ok": True, "req": 111}, 0.0)
    state.vote(late, {"what": "established", "ok": True, "req": 2}, 0.0)
    state.take()
    when = state.times.report_s
    state.tick(when)
    assert "could not make their links" in dict(state.dropped())[late]
    assert (first, "abort") in [(peer, kind) for peer, kind, _ in state.take()]
    state.vote(first, {"what": "established", "ok": False, "why": "another peer was lost", "req": 111}, when + 1.0)
    told = {peer: body for peer, kind, body in state.take() if kind == "reply"}
    assert {told[peer]["error"] for peer in (first, second)} == {"topology"}
    state.tick(when + 100.0)
    assert state.order == {0: [first, second]}


def test_nor_does_one_that_hangs_hold_up_the_others_for_ever():
    state, (first, second) = accepted(0, 0)
    late = state.join(group=0, host="h", port=1, pool=1)
    state.vote(late, {"what": "join", "req": 1}, 0.0)
    for peer in (first, second):
        state.vote(peer, {"what": "accept", "req": 110}, 0.0)
    state.vote(second, {"what": "established", "ok": True, "req": 111}, 0.0)
    for now in (25.0, 30.0):
        state.tick(now)
    assert state.dropped()[-1][0] == first
    assert state.order == {0: [second]}


def test_a_collective_of_more_peers_than_are_left_is_told_to_each_at_once():
    state, (first, second, third) = accepted(0, 0, 0)
    vote = {"what": "initiate", "tag": 1, "descriptor": {"count": 1, "world": 3}, "req": 100}
    state.vote(first, vote, 0.0)
    assert state.take() == []
    state.lost(third, "gone", 0.0)
    (told,) = [body for peer, kind, body in state.take() if (peer, kind) == (first, "reply")]
    assert (told["error"], told["why"]) == ("lost", "2 peers are left, and collective 1 is of 3")
    # The other too, which had not asked yet; and from then on.
    for req in (100, 101):
        state.vote(second, {**vote, "req": req}, 0.0)
        assert [body["error"] for _, _, body in state.take()] == ["lost"]
    for peer in (first, second):
        state.vote(peer, {**vote, "descriptor": {"count": 1, "world": 2}, "req": 110}, 0.0)
    assert [body["seq"] for _, _, body in state.take()] == [0, 0]


def test_peers_that_hold_as_many_as_go_and_none_of_them_together_are_told():
    state, peers = accepted(0, 0)
    for place, peer in enumerate(peers):
        for tag in range(MOST_TAGS):
            assert state.take() == []
            body = {"what": "initiate", "tag": tag + place * MOST_TAGS, "descriptor": {}, "req": 100 + tag}
            state.vote(peer, body, 0.0)
    told = state.take()
    assert len(told) == 2 * MOST_TAGS
    assert {body["error"] for _, _, body in told} == {"mismatch"}
    assert "in the same order" in told[0][2]["why"]
    assert begin(state, peers, 300) == 0


def test_a_run_that_waits_for_nobody_does_not_end_those_who_wait():
    state = MasterState()
    first, second, third = (state.join(group=0, host="h", port=1, pool=1) for _ in range(3))
    state.vote(first, {"what": "join", "req": 1}, 0.0)
    state.vote(first, {"what": "established", "ok": True, "req": 2}, 0.0)
    for peer, inside in ((second, [first]), (third, [first, second])):
        state.vote(peer, {"what": "join", "req": 1}, 0.0)
        for one in inside:
            state.vote(one, {"what": "accept", "awaits": 4, "req": 10 + peer}, 0.0)
        state.take()
        for one in (*inside, peer):
            state.vote(one, {"what": "established", "ok": True, "req": 20 + peer}, 0.0)
        assert {body["awaits"] for _, _, body in state.take()} == {4}
        if peer == second:
            for one in (first, second):
                state.vote(one, {"what": "pending", "awaits": 4, "req": 15}, 0.0)
            state.take()
    # A newcomer of another program: it was told for how many they wait, and does something else.
    state.vote(first, {"what": "pending", "awaits": 4, "req": 50}, 0.0)
    state.vote(third, {"what": "initiate", "tag": 1, "descriptor": {}, "req": 50}, 0.0)
    told = {peer: body for peer, kind, body in state.take() if kind == "reply"}
    assert told.keys() == {third}
    assert "peer 0 waits until 4 peers are there (wait_for, parallel.diloco.peers), peer 2 for" in told[third]["why"]
    state.vote(second, {"what": "pending", "awaits": 4, "req": 50}, 0.0)
    assert [body["pending"] for _, _, body in state.take()] == [False, False]


def test_the_number_of_the_best_known_counts_and_then_of_who_came_first():
    state, (first, second) = accepted(0, 0)
    for peer, awaits in ((first, 3), (second, 9)):
        state.vote(peer, {"what": "pending", "awaits": awaits, "req": 100}, 0.0)
    assert [body["awaits"] for _, _, body in state.take()] == [3, 3]
    assert [state.members[peer].gathers for peer in (first, second)] == [True, True]
    through_a_round(state, [first, second], 110)
    # As of one that has been lost, and one that is not known yet with the lower number.
    state.members[first].proof = 0
    for peer, awaits in ((first, 9), (second, 0)):
        state.vote(peer, {"what": "pending", "awaits": awaits, "req": 130}, 0.0)
    assert [body["awaits"] for _, _, body in state.take()] == [0, 0]
    assert [state.members[peer].gathers for peer in (first, second)] == [False, False]


def tries_to_let_in(state, members, req, oks, *, lost=False):
    """Another comes, and those that take part say how their links fared; or it is lost in the midst of it. Returns its number."""
    late = state.join(group=0, host="h", port=1, pool=1)
    state.vote(late, {"what": "join", "req": 1}, 0.0)
    for peer in members:
        state.vote(peer, {"what": "accept", "req": req}, 0.0)
    if lost:
        state.lost(late, "gone", 0.0)
    for peer, ok in zip(members, oks, strict=True):
        state.vote(peer, {"what": "established", "ok": ok, "req": req + 1}, 0.0)
    if not lost:
        state.vote(late, {"what": "established", "ok": True, "req": 2}, 0.0)
    state.take()
    return late


def test_one_that_is_less_known_and_never_has_its_links_does_not_keep_others_out_for_ever():
    state, (first, second) = accepted(0, 0)
    through_a_round(state, [first, second], 100)
    odd = with_a_newcomer(state, [first, second], 110)
    members = [first, second, odd]
    for attempt in range(2):
        assert odd in state.members
        late = tries_to_let_in(state, members, 120 + 10 * attempt, (True, True, False))
        # It is not the newcomer's fault.
        assert state.members[late].failures == 0
    assert odd not in state.members
    assert [member.id for member in state.accepted] == [first, second]


def test_nor_is_it_at_fault_where_another_was_lost():
    state, (first, second) = accepted(0, 0)
    through_a_round(state, [first, second], 100)
    members = [first, second, with_a_newcomer(state, [first, second], 110)]
    for attempt in range(4):
        tries_to_let_in(state, members, 120 + 10 * attempt, (True, False, False), lost=True)
    assert [member.id for member in state.accepted] == members


def known_pair():
    """Two that have been through two rounds, and one that they let in."""
    state, pair = accepted(0, 0)
    through_a_round(state, pair, 100)
    through_a_round(state, pair, 120)
    return state, pair


def told_of(state):
    return {peer: body.get("error") for peer, kind, body in state.take() if kind == "reply"}


@pytest.mark.parametrize("is_older", [False, True])
def test_who_has_proved_itself_to_nobody_else_ends_no_other_group(is_older):
    """What all groups decide together is asked for by one that is alone in its own, where it has reduced and shared as often as others."""
    state, (first, second, alone) = accepted(0, 0, 1)
    if is_older:
        # All who were there from the beginning are gone: the group is as old as they were.
        third, fourth = (
            with_a_newcomer(state, [first, second, alone], 50),
            with_a_newcomer(state, [first, second, alone, 3], 60),
        )
        for peer in (first, second):
            state.lost(peer, "it left", 0.0)
        first, second = third, fourth
    for req in (100, 120):
        revision = state.revision.get(0, 0) + 1
        for member in (first, second, alone):
            revision = state.revision.get(state.members[member].group, 0) + 1
            keys = [["w", "float32", [1], "x"]]
            state.vote(
                member, {"what": "sync", "revision": revision, "strategy": POPULAR, "keys": keys, "req": req}, 0.0
            )
        for member in (first, second, alone):
            state.vote(member, {"what": "synced", "ok": True, "req": req + 1}, 0.0)
        for member in (first, second, alone):
            state.vote(member, {"what": "initiate", "tag": 1, "descriptor": {}, "req": req + 2}, 0.0)
        for running in list(state.running.values()):
            for member in list(running.participants):
                body = {"what": "complete", "tag": 1, "seq": running.seq, "aborted": False, "req": req + 3}
                state.vote(member, body, 0.0)
        for member in (first, second, alone):
            state.vote(member, {"what": "pending", "req": req + 4}, 0.0)
    state.take()
    assert {state.members[peer].proof for peer in (first, second, alone)} == {2}
    state.vote(alone, {"what": "optimize", "req": 160}, 0.0)
    state.vote(first, {"what": "pending", "req": 160}, 0.0)
    state.vote(second, {"what": "pending", "req": 160}, 0.0)
    assert told_of(state) == {first: None, second: None, alone: "mismatch"}


def test_two_that_wait_in_collectives_of_different_tags_do_not_disagree():
    state, (first, second) = known_pair()
    late = with_a_newcomer(state, [first, second], 140)
    for peer, tag in ((first, 1), (second, 2)):
        state.vote(peer, {"what": "initiate", "tag": tag, "descriptor": {}, "req": 200}, 0.0)
    keys = [["x", "float32", [1], "h"]]
    state.vote(late, {"what": "sync", "revision": 9, "strategy": POPULAR, "keys": keys, "req": 200}, 0.0)
    assert told_of(state) == {late: "mismatch"}
    assert "waits for a collective of tag 1" in dict(state.dropped())[late]
    for peer, tag in ((first, 2), (second, 1)):
        state.vote(peer, {"what": "initiate", "tag": tag, "descriptor": {}, "req": 201}, 0.0)
    assert set(state.running) == {(0, 1), (0, 2)}


@pytest.mark.parametrize("what", ["accept", "optimize"])
def test_every_vote_of_all_proves(what):
    """A loop of `update_topology` and `all_reduce` asks nobody whether newcomers wait."""
    state, (first, second) = accepted(0, 0)
    seq = begin(state, [first, second], 100)
    for peer in (first, second):
        state.vote(peer, {"what": "complete", "tag": 1, "seq": seq, "aborted": False, "req": 101}, 0.0)
    for peer in (first, second):
        state.vote(peer, {"what": what, "req": 102}, 0.0)
    assert [state.members[peer].proof for peer in (first, second)] == [2, 2]


@pytest.mark.parametrize(("raised", "form", "error"), [(1, [2], "mismatch"), (0, [1], "revision")])
def test_one_that_has_fetched_the_state_once_is_not_as_well_known(raised, form, error):
    state, (first, second) = known_pair()
    late = with_a_newcomer(state, [first, second], 140)
    revision = state.revision[0] + 1
    shares(state, {first: (revision, POPULAR, "x"), second: (revision, POPULAR, "x"), late: (0, RECEIVE, "y")}, 150)
    for peer in (first, second):
        body = {"revision": revision + 1, "strategy": POPULAR, "keys": [["w", "float32", [1], "q"]], "req": 160}
        state.vote(peer, {"what": "sync", **body}, 0.0)
    body = {"revision": revision + raised, "strategy": POPULAR, "keys": [["w", "float32", form, "q"]], "req": 160}
    state.vote(late, {"what": "sync", **body}, 0.0)
    assert told_of(state) == {first: None, second: None, late: error}


def test_of_peers_of_other_groups_nobody_can_say_that_they_are_at_fault():
    state, (first, second, other) = accepted(0, 0, 1)
    for req in (100, 110):
        state.vote(other, {"what": "initiate", "tag": 1, "descriptor": {}, "req": req}, 0.0)
        seq = state.take()[-1][2]["seq"]
        state.vote(
            other, {"what": "complete", "tag": 1, "seq": seq, "aborted": True, "accused": first, "req": req + 1}, 0.0
        )
    assert [member.failures for member in state.accepted] == [0, 0, 0]
    state.take()
    seq = begin(state, [first, second], 120)
    state.lost(second, "killed", 0.0)
    state.vote(first, {"what": "complete", "tag": 1, "seq": seq, "aborted": True, "accused": second, "req": 121}, 0.0)
    assert first in state.members


def test_answers_are_kept_in_bounds_whatever_a_peer_says_it_knows():
    state, (first, second) = accepted(0, 0)
    for req in range(100, 100 + 4 * MOST_ANSWERS, 2):
        for peer, low in ((first, 0), (second, req)):
            state.vote(peer, {"what": "initiate", "tag": 1, "descriptor": {}, "req": req, "low": low}, 0.0)
        seq = state.take()[-1][2]["seq"]
        for peer, low in ((first, 0), (second, req)):
            body = {"what": "complete", "tag": 1, "seq": seq, "aborted": False, "req": req + 1, "low": low}
            state.vote(peer, body, 0.0)
        state.take()
    assert len(state.members[first].answered) == MOST_ANSWERS
    assert max(state.members[first].answered) == req + 1
    assert len(state.members[second].answered) <= 2
