"""The master's decisions alone, without sockets or threads: peers are programs that vote, and a seed says who is heard, lost or restarted.

Every order of messages is one that a network could give. What must hold in all of them: nobody waits for ever, survivors of a collective
hear the same of it, all finish, and no honest peer is ever sent away.
"""

import json
import random
from collections import deque

import pytest

from anabranch.cluster.pccl.journal import from_dict, to_dict
from anabranch.cluster.pccl.state import MasterState
from pccl_states import POPULAR, RECEIVE, accepted, begin, shares

STEPS = 3
# Newcomers that do not fit: another model, another description of a collective, no way to a source, a state that it would have all take,
# another program, one that fails every collective and says that others are at fault, or nobody.
ODD = ("model", "description", "way", "sender", "program", "accuser", "quitter")


class Network:
    """Peers, a master, and messages between them in the order of their connections."""

    def __init__(
        self,
        seed,
        peers,
        *,
        losses=0.03,
        restarts=0.0,
        failures=0.1,
        groups=1,
        gathered=1,
        steps=STEPS,
        odd=(),
        differ=False,
        reduces_from=1,
    ):
        self.random, self.groups, self.gathered, self.steps = random.Random(seed), groups, gathered, steps
        # Whether each waits for a number of its own; and the first round with a collective, as of asynchronous ones.
        self.differ, self.reduces_from = differ, reduces_from
        # What is wrong with those that come when the first have run for a while, see `ODD`.
        self.odd_kinds, self.odd, self.refused = odd, {}, set()
        self.losses, self.restarts, self.failures = losses, restarts, failures
        self.state, self.now = MasterState(), 0.0
        self.to_master, self.to_peer = {}, {}
        self.programs, self.open, self.next_req = {}, {}, {}
        self.tokens, self.aborts, self.verdicts, self.finished, self.kicked = {}, {}, {}, set(), {}
        # Collectives that a peer knows of, those of which one part has failed, and who can only wait to be told of that.
        self.opened, self.broken, self.stuck = {}, set(), {}
        self.started, self.reasons, self.group_of = 0, {}, {}
        self.most = peers
        for _ in range(gathered if odd else 1):
            self.start()

    def start(self):
        group = self.random.randrange(self.groups)
        peer = self.state.join(group=group, host="h", port=1, pool=1)
        self.group_of[peer] = group
        if self.odd_kinds and self.started >= self.gathered:
            self.odd[peer] = self.random.choice(self.odd_kinds)
        self.started += 1
        self.tokens[peer] = self.state.members[peer].token
        self.to_master[peer], self.to_peer[peer], self.aborts[peer] = deque(), deque(), set()
        self.opened[peer] = set()
        self.next_req[peer] = 1
        self.programs[peer] = program(self, peer)
        self.advance(peer, None)

    def advance(self, peer, reply):
        try:
            vote = self.programs[peer].send(reply)
        except StopIteration:
            self.finished.add(peer)
            self.open.pop(peer, None)
            del self.programs[peer]
            self.to_peer.pop(peer)
            self.to_master[peer].append("leave")
            return
        if vote["what"] == "nothing":
            self.stuck[peer] = vote["of"]
            self.open.pop(peer, None)
            return
        self.open[peer] = {**vote, "req": self.next_req[peer], "low": self.next_req[peer]}
        self.next_req[peer] += 1
        self.to_master[peer].append(self.open[peer])

    def collect(self):
        for peer, kind, body in self.state.take():
            if peer in self.to_peer:
                # As it goes over a wire.
                self.to_peer[peer].append((kind, json.loads(json.dumps(body))))
        self.reasons |= dict(self.state.dropped())
        for rings in self.state.jobs():
            self.state.solved({group: ring[::-1] for group, ring in rings.items()}, is_late=False, now=self.now)
            self.collect()

    def deliver(self):
        """One message, somewhere. False where there is none."""
        choices = [("up", peer) for peer, queue in self.to_master.items() if queue]
        choices += [("down", peer) for peer, queue in self.to_peer.items() if queue]
        if not choices:
            return False
        way, peer = self.random.choice(choices)
        if way == "up":
            message = self.to_master[peer].popleft()
            if message == "leave":
                self.state.lost(peer, "it left", self.now)
            else:
                self.state.vote(peer, json.loads(json.dumps(message)), self.now)
        else:
            kind, body = self.to_peer[peer].popleft()
            if kind == "kick":
                self.send_away(peer, body["why"])
            elif kind == "abort":
                # Of what a peer does not know it hears nothing.
                self.aborts[peer] |= {tuple(one) for one in body.get("tags", [])} & self.opened[peer]
                if self.stuck.get(peer) in self.aborts[peer]:
                    del self.stuck[peer]
                    self.advance(peer, None)
            elif self.open.get(peer, {}).get("req") == body["req"]:
                if "seq" in body:
                    self.opened[peer].add((body["tag"], body["seq"]))
                self.advance(peer, body)
        self.collect()
        return True

    def kill(self, peer):
        self.programs.pop(peer).close()
        self.open.pop(peer, None)
        self.stuck.pop(peer, None)
        self.to_peer.pop(peer)
        # What it had sent may still arrive; then its connection ends.
        self.to_master[peer].append("leave")

    def send_away(self, peer, why):
        self.kicked[peer] = why
        self.kill(peer)

    def restart(self):
        """The master dies with all that was on its way, and another reads its journal."""
        table = json.loads(json.dumps(to_dict(self.state)))
        self.state = MasterState()
        from_dict(table, self.state)
        self.state.absent(self.now)
        for queue in (*self.to_master.values(), *self.to_peer.values()):
            queue.clear()
        for peer in list(self.programs):
            if not self.state.resume(peer, self.tokens[peer]):
                # It was sent away, and the word of it was on its way when the master died.
                self.send_away(peer, self.reasons.get(peer, "not known after a restart"))
            elif peer in self.open:
                self.to_master[peer].append(self.open[peer])
        self.collect()

    def is_time(self):
        """For another to come: odd ones come to those who have been through a round."""
        return not self.odd_kinds or all(
            member.is_proven for member in self.state.members.values() if member.id not in self.odd
        )

    def awaited(self):
        """How many a program waits for."""
        return self.random.randint(1, self.gathered) if self.differ else self.gathered

    def run(self):
        for _ in range(20_000):
            chance = self.random.random()
            if chance < self.losses and len(self.programs) > 1:
                self.kill(self.random.choice(sorted(self.programs)))
            elif chance < self.losses + self.restarts:
                self.restart()
            elif self.started < self.most and self.random.random() < 0.05 and self.is_time():
                self.start()
                self.collect()
            elif not self.deliver():
                if self.started < self.most:
                    self.start()
                    continue
                if not self.programs:
                    return
                # Only time helps: it drops who is missing after a restart.
                assert self.state._deadlines, f"{self.open} and {self.stuck} wait for ever"
                self.now += 1.0
                self.state.tick(self.now)
                self.collect()
        raise AssertionError("it does not end")


def established(network, peer, reply):
    if not reply.get("establish"):
        return {"what": "established", "ok": True}
    places = [row[0] for row in reply["ring"]]
    gone = [other for other in places if other not in network.programs]
    # A link may fail though nobody is gone.
    ok = not gone and network.random.random() >= network.failures / 4
    return {"what": "established", "ok": ok, **({} if ok or not gone else {"accused": gone[0]}), "why": "no link"}


def program(network, peer):
    """What `Communicator` does, as votes and their answers."""
    reply = {"error": "topology"}
    while "error" in reply:
        reply = yield {"what": "join"}
        if reply.get("establish"):
            reply = yield established(network, peer, reply)
    odd = network.odd.get(peer, "")
    is_new, has_shared, revision = reply["awaits"] == 0, False, 0
    world = [reply["world"]]
    wanted = reply["awaits"] or network.awaited()

    def let_in(awaits):
        reply = yield {"what": "pending", "awaits": awaits}
        assert "error" not in reply, reply
        told = reply["awaits"]
        if reply["pending"]:
            reply = yield {"what": "accept", "awaits": told}
            if reply.get("establish"):
                reply = yield established(network, peer, reply)
            world[0] = reply.get("world", world[0])
        return told

    def gather(wanted):
        """Whether it has come to its end with others: None where nobody comes any more, False where the first goes on."""
        while world[0] < wanted:
            if network.started == network.most and len(network.programs) < wanted:
                return None
            told = yield from let_in(wanted)
            if not told:
                return False
            wanted = told
        return True

    if not is_new:
        is_there = yield from gather(wanted)
        if is_there is None:
            return
        is_new = not is_there
    while revision < network.steps:
        while not is_new and (told := (yield from let_in(0))):
            is_there = yield from gather(told)
            if is_there is None:
                return
            is_new = not is_there
        is_new = False
        if odd == "program":
            reply = yield {"what": "initiate", "tag": 3, "descriptor": {"count": 1}}
            assert "error" in reply, reply
            network.refused.add(peer)
            return
        state = {
            "revision": revision + 1,
            "strategy": "enforce_popular" if has_shared else "receive_only",
            "is_default": True,
        }
        if odd in ("strategy", "sender"):
            state |= {"strategy": "send_only" if odd == "sender" else "enforce_popular", "is_default": False}
        form = [2] if odd == "model" else [1]
        reply = yield {"what": "sync", **state, "keys": [["w", "float32", form, f"{revision if has_shared else -1}"]]}
        if odd and "error" in reply:
            network.refused.add(peer)
            return
        assert "error" not in reply, reply
        revision_there = reply["revision"]
        ok = "from" not in reply or (reply["from"][0] in network.programs and odd != "way")
        reply = yield {"what": "synced", "ok": ok}
        if "error" in reply:
            assert reply["error"] == "lost"
            continue
        revision, has_shared = revision_there, True
        if revision < network.reduces_from:
            continue
        # Groups are at different revisions, and this all of them do together.
        if revision == 2 and network.groups == 1:
            reply = yield {"what": "optimize"}
            reply = yield {"what": "measured", "rates": {str(row[0]): 100.0 for row in reply["measure"]}}
            if reply.get("establish"):
                reply = yield established(network, peer, reply)
        is_aborted = True
        while is_aborted:
            reply = yield {
                "what": "initiate",
                "tag": 7,
                "descriptor": {"count": -1 if odd == "description" else revision},
            }
            if odd and "error" in reply:
                network.refused.add(peer)
                return
            assert "error" not in reply, reply
            seq, ring = reply["seq"], [row[0] for row in reply["ring"]]
            gone = [other for other in ring if other not in network.programs]
            group = network.group_of[peer]
            if (group, seq) in network.broken and (7, seq) not in network.aborts[peer] and not gone:
                # What others have to send does not come.
                yield {"what": "nothing", "of": (7, seq)}
            failed = bool(gone) or (7, seq) in network.aborts[peer] or network.random.random() < network.failures / 4
            failed = failed or odd in ("accuser", "quitter")
            if failed:
                network.broken.add((group, seq))
            vote = {"what": "complete", "tag": 7, "seq": seq, "aborted": failed}
            if odd == "accuser":
                vote["accused"] = 0
            reply = yield vote
            is_aborted = reply["aborted"]
            assert network.verdicts.setdefault((group, seq), is_aborted) == is_aborted, (
                "survivors hear different things"
            )
            assert is_aborted or not failed


def check(seed, **settings):
    network = Network(seed, **settings)
    network.collect()
    network.run()
    honest = {
        peer: why
        for peer, why in network.kicked.items()
        # Newcomers that all who had the state have left alone are rightly sent away, and those whom their neighbours did not reach twice.
        if "nobody who is left" not in why and "could not reach" not in why and peer not in network.odd
    }
    assert not honest, (seed, honest)
    return network


@pytest.mark.parametrize("seed", range(60))
def test_nobody_waits_for_ever_and_all_hear_the_same(seed):
    check(seed, peers=5, groups=1 + seed % 2, gathered=1 + seed % 3)


@pytest.mark.parametrize("seed", range(60))
def test_nor_where_the_master_is_restarted_again_and_again(seed):
    check(seed, peers=4, losses=0.01, restarts=0.03, groups=1 + seed % 2, gathered=1 + seed % 3)


@pytest.mark.parametrize("reduces_from", [1, 3])
@pytest.mark.parametrize("odd", ODD)
def test_a_newcomer_that_does_not_fit_is_sent_away_alone(odd, reduces_from):
    """Those who run hear nothing of it, also where they have shared a state so far and not reduced anything."""
    came = sent_away = 0
    for seed in range(15):
        settings = {"peers": 5, "losses": 0.0, "failures": 0.0, "gathered": 3, "steps": 8, "reduces_from": reduces_from}
        network = check(seed, odd=(odd,), **settings)
        assert network.finished >= {0, 1, 2}
        came += len(network.odd)
        sent_away += len(network.odd.keys() & (network.kicked.keys() | network.refused))
    assert sent_away > came / 3


def test_a_newcomer_that_names_its_strategy_is_let_in():
    came = set()
    for seed in range(15):
        network = check(seed, peers=5, losses=0.0, failures=0.0, gathered=3, steps=8, odd=("strategy",))
        assert network.finished >= {0, 1, 2} | network.odd.keys()
        came |= network.odd.keys()
    assert came


@pytest.mark.parametrize("seed", range(40))
def test_nobody_ends_for_waiting_for_another_number_than_others(seed):
    """A run with another ``peers`` once ended all who waited."""
    check(seed, peers=5, losses=0.01, gathered=4, differ=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(0, 1000, 100))
def test_three_thousand_schedules(seed):
    for one in range(seed, seed + 100):
        check(one + 1000, peers=6, groups=1 + one % 3, gathered=1 + one % 4)
        check(
            one + 1000,
            peers=6,
            losses=0.0,
            restarts=0.01,
            failures=0.0,
            gathered=3,
            steps=8,
            odd=(*ODD, "strategy"),
            reduces_from=1 + one % 3,
        )
        check(one + 1000, peers=5, losses=0.02, restarts=0.03, groups=1 + one % 3, gathered=1 + one % 4, differ=True)


def test_who_does_not_answer_an_abort_is_dropped_in_time():
    state, (first, second) = accepted(0, 0)
    seq = begin(state, [first, second], 100)
    state.vote(first, {"what": "complete", "tag": 1, "seq": seq, "aborted": True, "req": 101}, 7.0)
    state.tick(11.9)
    assert state.order == {0: [first, second]}
    state.tick(12.0)
    assert state.order == {0: [first]}
    assert "did not answer an abort" in dict(state.dropped())[second]


def test_a_vote_that_is_said_again_gets_the_same_answer_and_counts_once():
    state, (first, second) = accepted(0, 0)
    ask = {"what": "pending", "req": 100}
    state.vote(first, ask, 0.0)
    state.vote(first, ask, 0.0)
    assert state.take() == []
    state.vote(second, ask, 0.0)
    answers = state.take()
    assert len(answers) == 2
    state.vote(first, ask, 0.0)
    assert state.take() == [answer for answer in answers if answer[0] == first]
    # Once it says that it knows, it is forgotten, and would be another vote.
    state.vote(first, {"what": "pending", "req": 101, "low": 101}, 0.0)
    assert state.members[first].answered == {}


def test_groups_that_decide_different_things_together_are_told():
    state, (first, second) = accepted(0, 1)
    assert state.order == {0: [first], 1: [second]}
    state.vote(first, {"what": "optimize", "req": 121}, 0.0)
    assert state.take() == []
    state.vote(second, {"what": "pending", "req": 122}, 0.0)
    told = {peer: body for peer, _, body in state.take()}
    assert {body["error"] for body in told.values()} == {"mismatch"}
    assert told.keys() == {first, second}
    # And they go on.
    for req, peer in enumerate((first, second)):
        state.vote(peer, {"what": "pending", "req": 130 + req}, 0.0)
    assert [body["pending"] for _, _, body in state.take()] == [False, False]


@pytest.mark.parametrize(
    "votes",
    [
        [{"what": "optimize"}, {"what": "measured", "rates": {"²": 1.0}}],
        [{"what": "optimize"}, {"what": "measured", "rates": {"1": float("nan")}}],
        [{"what": "optimize"}, {"what": "measured", "rates": {"1": [1]}}],
        [{"what": "optimize"}, {"what": "measured", "rates": [1]}],
        [{"what": "accept"}, {"what": "established", "ok": False, "accused": [1]}],
        [{"what": "accept"}, {"what": "established", "ok": False, "accused": {}}],
        [{"what": "pending", "accused": "me"}],
        [{"what": "\ud800"}],
        [{"what": "initiate", "tag": 1, "descriptor": {"x": "y" * 2000}}],
        [{"what": "initiate", "tag": [1], "descriptor": {}}],
        [
            {"what": "initiate", "tag": 1, "descriptor": {}},
            {"what": "complete", "tag": 1, "seq": 0, "aborted": True, "accused": [0]},
        ],
        [{"what": "sync", "revision": 1, "strategy": {}, "keys": []}],
        [{"what": "sync", "revision": 1, "strategy": "send_only", "keys": [["w", "f", [1, "2"], "h"]]}],
    ],
)
def test_a_member_that_says_what_no_peer_says_is_dropped_and_nothing_else_happens(votes):
    state, (peer,) = accepted(0)
    # Somebody to be let in, so that there is a ring to make.
    state.vote(state.join(group=0, host="h", port=1, pool=1), {"what": "join", "req": 1}, 0.0)
    for req, vote in enumerate(votes):
        state.vote(peer, {**vote, "req": 100 + req}, 0.0)
        state.jobs()
    assert peer not in state.members
    assert "an illegal vote" in dict(state.dropped())[peer]
    # The other takes its place, or could.
    assert len(state.members) == 1


def test_who_cannot_fetch_takes_another_source_and_is_then_sent_away_alone():
    state, (first, second, late) = accepted(0, 0, 0)
    votes = {first: (1, POPULAR, "x"), second: (1, POPULAR, "x"), late: (0, RECEIVE, "y")}
    plans, told = shares(state, votes, 100, lost=[late])
    assert plans[late]["from"][0] == first
    assert {body["error"] for body in told.values()} == {"lost"}
    # A restart forgets none of it.
    table = json.loads(json.dumps(to_dict(state)))
    state = MasterState()
    from_dict(table, state)
    plans, told = shares(state, votes, 110, lost=[late])
    assert plans[late]["from"][0] == second
    assert "could not fetch the shared state in 2 tries" in dict(state.dropped())[late]
    plans, told = shares(state, {first: votes[first], second: votes[second]}, 120)
    assert {peer: body["revision"] for peer, body in told.items()} == {first: 1, second: 1}
    assert [member.id for member in state.accepted] == [first, second]


def test_a_source_from_which_two_could_not_fetch_what_they_had_from_others_is_sent_away():
    state, (bad, good, third, fourth) = accepted(0, 0, 0, 0)
    votes = {bad: (1, POPULAR, "x"), good: (1, POPULAR, "x"), third: (0, RECEIVE, "y"), fourth: (0, RECEIVE, "z")}
    plans, _ = shares(state, votes, 100, lost=[third])
    assert (plans[third]["from"][0], plans[fourth]["from"][0]) == (bad, good)
    plans, told = shares(state, votes, 110)
    assert plans[third]["from"][0] == good
    assert not any("error" in body for body in told.values())
    # That round went well, and the next begins anew: the other one meets it.
    votes = {
        bad: (2, POPULAR, "x2"),
        good: (2, POPULAR, "x2"),
        third: (2, POPULAR, "x2"),
        fourth: (2, POPULAR, "other"),
    }
    plans, _ = shares(state, votes, 120, lost=[fourth])
    assert plans[fourth]["from"][0] == bad
    plans, _ = shares(state, votes, 130)
    assert plans[fourth]["from"][0] == good
    assert "could not fetch the shared state from it" in dict(state.dropped())[bad]
    assert [member.id for member in state.accepted] == [good, third, fourth]


def test_a_source_that_goes_away_is_nobody_s_fault():
    state, (first, second, late) = accepted(0, 0, 0)
    votes = {first: (1, POPULAR, "x"), second: (1, POPULAR, "x"), late: (0, RECEIVE, "y")}
    shares(state, votes, 100, lost=[late])
    assert state.members[late].unfetched == [first]
    state.lost(first, "killed", 0.0)
    assert state.members[late].unfetched == []
    _, told = shares(state, {second: votes[second], late: votes[late]}, 110)
    assert not any("error" in body for body in told.values())


def test_a_late_tour_leaves_alone_the_ring_of_those_who_came_since():
    state, (first,) = accepted(0)
    state.vote(first, {"what": "optimize", "req": 100}, 0.0)
    state.vote(first, {"what": "measured", "rates": {}, "req": 101}, 0.0)
    (job,) = state.jobs()
    late = state.join(group=0, host="h", port=2, pool=1)
    state.vote(late, {"what": "join", "req": 1}, 0.0)
    state.lost(first, "killed", 0.0)
    assert state.forming.participants == [late]
    state.solved(job, is_late=False, now=0.0)
    state.vote(late, {"what": "established", "ok": True, "req": 2}, 0.0)
    assert [member.id for member in state.accepted] == [late]


def test_a_tour_found_in_the_background_goes_with_the_first_of_its_members():
    state, (first, second, third) = accepted(0, 0, 0)
    state.solved({0: [third, second, first]}, is_late=True, now=0.0)
    state.lost(second, "killed", 0.0)
    for peer in (first, third):
        state.vote(peer, {"what": "accept", "req": 100}, 0.0)
    (told, *_) = [body for _, kind, body in state.take() if kind == "reply"]
    assert [row[0] for row in told["ring"]] == [first, third]


def test_a_tour_found_in_the_background_is_taken_up_when_peers_are_next_let_in():
    state, (first, second, third) = accepted(0, 0, 0)
    state.solved({0: [third, second, first]}, is_late=True, now=0.0)
    for peer in (first, second, third):
        state.vote(peer, {"what": "accept", "req": 100}, 0.0)
    for peer in (first, second, third):
        state.vote(peer, {"what": "established", "ok": True, "req": 101}, 0.0)
    assert state.order == {0: [third, second, first]}


def test_who_comes_back_to_an_aborted_collective_hears_first_that_it_began_and_has_its_time():
    state, (first, second, third) = accepted(0, 0, 0)
    for peer in (first, second, third):
        state.vote(peer, {"what": "initiate", "tag": 4, "descriptor": {}, "req": 100}, 0.0)
    # Killed when the journal was written, and before anybody heard of it.
    table = json.loads(json.dumps(to_dict(state)))
    state = MasterState()
    from_dict(table, state)
    state.absent(0.0)
    tokens = {peer: member.token for peer, member in state.members.items()}
    state.resume(first, tokens[first])
    state.vote(first, {"what": "complete", "tag": 4, "seq": 0, "aborted": True, "req": 101}, 1.0)
    state.resume(third, tokens[third])
    state.take()
    assert state.resume(second, tokens[second])
    assert [(kind, body.get("seq"), body.get("tags")) for peer, kind, body in state.take() if peer == second] == [
        ("reply", 0, None),
        ("abort", None, [[4, 0]]),
    ]
    state.tick(5.9)
    assert second in state.members
    state.tick(6.0)
    assert "did not answer an abort" in dict(state.dropped())[second]


def test_an_older_collective_that_ends_late_leaves_alone_those_that_began_since():
    state, (first, second, third) = accepted(0, 0, 0)
    old = begin(state, [first, second, third], 100)
    state.lost(third, "killed", 0.0)
    for peer in (first, second):
        state.vote(peer, {"what": "initiate", "tag": 2, "descriptor": {}, "req": 101}, 0.0)
    state.take()
    for peer in (first, second):
        state.vote(peer, {"what": "complete", "tag": 1, "seq": old, "aborted": True, "req": 102}, 0.0)
    assert not state.running[0, 2].is_aborted


def test_nor_does_it_miss_an_end_that_comes_between_its_return_and_its_vote():
    state, (first, second) = accepted(0, 0)
    for peer in (first, second):
        state.vote(peer, {"what": "initiate", "tag": 4, "descriptor": {}, "req": 100}, 0.0)
    table = json.loads(json.dumps(to_dict(state)))
    state = MasterState()
    from_dict(table, state)
    state.absent(0.0)
    for peer, member in list(state.members.items()):
        state.resume(peer, member.token)
    state.vote(first, {"what": "complete", "tag": 4, "seq": 0, "aborted": True, "req": 101}, 1.0)
    state.vote(second, {"what": "initiate", "tag": 4, "descriptor": {}, "req": 100}, 1.0)
    assert [kind for peer, kind, _ in state.take() if peer == second][:2] == ["reply", "abort"]


def test_a_tour_that_is_found_while_a_newcomer_s_links_are_made_is_not_taken():
    state, peers = accepted(0, 0, 0)
    late = state.join(group=0, host="h", port=1, pool=1)
    state.vote(late, {"what": "join", "req": 1}, 0.0)
    for peer in peers:
        state.vote(peer, {"what": "accept", "req": 200}, 0.0)
    state.solved({0: peers[::-1]}, is_late=True, now=0.0)
    for peer in (*peers, late):
        state.vote(peer, {"what": "established", "ok": True, "req": 201}, 0.0)
    for peer in (*peers, late):
        state.vote(peer, {"what": "accept", "req": 300}, 0.0)
    assert state.order == {0: [*peers, late]}
    state.lost(late, "it left", 0.0)
    assert state.order == {0: peers}
    # Where it fits, it is.
    state.solved({0: peers[::-1]}, is_late=True, now=0.0)
    for peer in peers:
        state.vote(peer, {"what": "accept", "req": 400}, 0.0)
    for peer in peers:
        state.vote(peer, {"what": "established", "ok": True, "req": 401}, 0.0)
    assert state.order == {0: peers[::-1]}


def drawn_vote(generator, state, peer):
    """What any program may say next, ours or another; None where it has nothing to say."""
    member = state.members[peer]
    running = [one for one in state.running.values() if peer in one.participants]
    faults = {"ok": generator.random() < 0.9, "aborted": generator.random() < 0.2, "accused": generator.randrange(6)}
    if member.vote is not None:
        return None
    if state.forming and peer in state.forming.participants:
        return {"what": "established", **faults}
    if member.group in state.syncing and peer in state.syncing[member.group].participants:
        return {"what": "synced", **faults}
    if peer in state._asked_to_measure and not running:
        return {"what": "measured", "rates": {}}
    if running and peer not in running[0].votes:
        return {"what": "complete", "tag": running[0].tag, "seq": running[0].seq, **faults}
    if not member.is_accepted:
        return {"what": "join"}
    if running or member.initiates:
        return None
    others = [other for other in state.members.values() if other.id != peer]
    if generator.random() < 0.7:
        # As the others, so that something comes of it.
        for other in others:
            if other.vote is not None and other.vote["what"] in ("pending", "accept", "optimize"):
                return {"what": other.vote["what"], "awaits": 0}
            if other.group == member.group and other.initiates:
                return {"what": "initiate", "tag": min(other.initiates), "descriptor": {}}
    revision = state.revision.get(member.group, 0) + 1
    keys = [["w", "float32", [generator.choice((1, 1, 1, 2))], str(generator.randrange(3))]]
    return generator.choice(
        (
            {"what": generator.choice(("pending", "accept")), "awaits": generator.choice((0, 0, 3))},
            {"what": "optimize"},
            {"what": "initiate", "tag": generator.choice((1, 2)), "descriptor": generator.choice(({}, {"world": 2}))},
            {"what": "sync", "revision": revision, "strategy": generator.choice((POPULAR, RECEIVE)), "keys": keys},
        )
    )


@pytest.mark.parametrize("seed", range(60))
def test_whatever_is_voted_lost_or_found_late_each_member_is_in_its_ring_and_nothing_is_raised(seed):
    generator, now, reqs = random.Random(seed), 0.0, {}
    state = MasterState()
    for _ in range(150):
        now += generator.random() * 0.3
        if not state.members or (len(state.members) < 6 and generator.random() < 0.1):
            peer = state.join(group=generator.choice((0, 0, 1)), host="h", port=1, pool=1)
        else:
            peer = generator.choice(list(state.members))
        drawn = generator.random()
        if drawn < 0.03:
            state.lost(peer, "killed", now)
        elif drawn < 0.05:
            state.resume(peer, state.members[peer].token)
        elif drawn < 0.07 and state.members[peer].vote:
            state.withdraw(peer, {"req": state.members[peer].vote["req"]}, now)
        elif drawn < 0.12 and state.order:
            group = generator.choice(list(state.order))
            state.solved({group: generator.sample(state.order[group], len(state.order[group]))}, is_late=True, now=now)
        elif drawn < 0.14:
            now += 3.0
            state.tick(now)
        elif (vote := drawn_vote(generator, state, peer)) is not None:
            reqs[peer] = reqs.get(peer, 0) + 1
            state.vote(peer, {**vote, "req": reqs[peer], "low": generator.choice((0, reqs[peer]))}, now)
        for job in state.jobs():
            state.solved(job, is_late=False, now=now)
        state.take()
        state.dropped()
        assert sorted(peer for ring in state.order.values() for peer in ring) == [one.id for one in state.accepted]
