"""Who is told where peers do not agree: by drawn votes of a newcomer among those who have been through rounds with each other."""

import random

import pytest

from anabranch.cluster.pccl.state import MasterState
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
