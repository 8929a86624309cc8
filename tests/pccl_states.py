"""Masters of PCCL for tests, brought into a state by votes."""

from anabranch.cluster.pccl.state import MasterState


def accepted(*groups):
    """A state whose peers, of these groups, all take part; and their numbers. Votes go on from number 100."""
    state = MasterState()
    peers = [state.join(group=group, host="h", port=1, pool=1) for group in groups]
    for peer in peers:
        state.vote(peer, {"what": "join", "req": 1}, 0.0)
    # The first came in at once, and lets in the others.
    state.vote(peers[0], {"what": "established", "ok": True, "req": 2}, 0.0)
    if len(peers) > 1:
        state.vote(peers[0], {"what": "accept", "req": 3}, 0.0)
        for peer in peers:
            state.vote(peer, {"what": "established", "ok": True, "req": 4}, 0.0)
    assert [member.id for member in state.accepted] == peers
    state.take()
    return state, peers


def begin(state, peers, req):
    for peer in peers:
        state.vote(peer, {"what": "initiate", "tag": 1, "descriptor": {}, "req": req}, 0.0)
    return next(body["seq"] for _, _, body in state.take())


def shares(state, votes, req, *, lost=()):
    """A shared state: votes by peer (revision, strategy, hash); those in ``lost`` cannot fetch. Returns plans and verdicts by peer."""
    for peer, (revision, strategy, digest) in votes.items():
        body = {"revision": revision, "strategy": strategy, "keys": [["w", "float32", [1], digest]]}
        state.vote(peer, {"what": "sync", "req": req, **body}, 0.0)
    plans = {peer: body for peer, kind, body in state.take() if kind == "reply"}
    for peer in votes:
        state.vote(peer, {"what": "synced", "ok": peer not in lost, "req": req + 1}, 0.0)
    return plans, {peer: body for peer, kind, body in state.take() if kind == "reply"}


POPULAR, RECEIVE = "enforce_popular", "receive_only"


def through_a_round(state, peers, req):
    """A shared state, a collective, and a vote of all."""
    revision = state.revision.get(0, 0) + 1
    shares(state, dict.fromkeys(peers, (revision, POPULAR, "x")), req)
    seq = begin(state, peers, req + 2)
    for peer in peers:
        state.vote(peer, {"what": "complete", "tag": 1, "seq": seq, "aborted": False, "req": req + 3}, 0.0)
    for peer in peers:
        state.vote(peer, {"what": "pending", "req": req + 4}, 0.0)
    state.take()


def with_a_newcomer(state, peers, req):
    """One is let in."""
    late = state.join(group=0, host="h", port=1, pool=1)
    state.vote(late, {"what": "join", "req": 1}, 0.0)
    for peer in peers:
        state.vote(peer, {"what": "accept", "req": req}, 0.0)
    for peer in (*peers, late):
        state.vote(peer, {"what": "established", "ok": True, "req": req + 1}, 0.0)
    state.take()
    return late
