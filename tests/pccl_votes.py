"""Votes of PCCL for tests: any that a peer may send, and how a master takes them."""

import json
import math

from anabranch.cluster.pccl.journal import to_dict
from anabranch.cluster.pccl.wire import HEADER, Kind, Reader, WireError

NAMES = ("join", "pending", "accept", "optimize", "measured", "established", "sync", "synced", "initiate", "complete")
FIELDS = {
    "low": (0, 1, 2, 3),
    "tag": (0, 1, 2, 9),
    "seq": (0, 1),
    "descriptor": ({}, {"count": 1}, {"count": [1]}, {"count": 1, "world": 3}, {"count": 1, "world": 99}),
    "revision": (0, 1, 2),
    "strategy": ("enforce_popular", "receive_only", "send_only"),
    "keys": (
        [["w", "float32", [1], "h"]],
        [["w", "float32", [1], "h"]] * 2,
        [],
        [["w", "x", [-1], "h"]],
        [["\ud800", "x", [1], "h"]],
    ),
    "rates": ({}, {"0": 1.0}, {"1": math.inf}, {"\u0661": 1}, {"9" * 30: 1}),
    "ok": (True, False),
    "why": ("no", "x" * 1000),
    "accused": (0, 1, 2, 3),
    "aborted": (True, False),
    "awaits": (0, 1, 5, 2**20),
    "progress": (0, 1, 2**60),
    "is_default": (True, False),
    "more": ("anything",),
}
WORDS = ("", "w", "\ud800", "\0", "0", "\u0661", "x" * 300)
NUMBERS = (0, 1, 2, -1, 2**62, 2**70, 0.5, math.nan, math.inf, None, True, False)


def drawn(generator, depth=4):
    """Any value of JSON."""
    kind = generator.randrange(4 if depth else 2)
    if kind == 0:
        return generator.choice(NUMBERS)
    if kind == 1:
        return generator.choice(WORDS)
    inner = [drawn(generator, depth - 1) for _ in range(generator.randrange(4))]
    return inner if kind == 2 else {generator.choice(WORDS): value for value in inner}


def a_vote(generator):
    """Of what peers say in most of its parts, so that it gets past the first that is looked at."""
    vote = {"what": generator.choice(NAMES), "req": generator.randrange(1, 7)}
    for name, values in FIELDS.items():
        if generator.random() < 0.8:
            vote[name] = generator.choice(values) if generator.random() < 0.9 else drawn(generator)
    return vote


def written(body):
    """As a hostile one writes it, who is not bound by what `packed` refuses."""
    text = json.dumps(body).encode()
    return HEADER.pack(len(text), Kind.VOTE, 0) + text


def said(state, peer, body, *, withdraws=False, hear=None):
    """As the master takes it; its journal is written after it, and every answer goes over a wire."""
    try:
        frames = Reader().feed(written(body))
    except WireError as error:
        state.lost(peer, str(error), 0.0)
        frames = []
    for frame in frames:
        state.vote(peer, frame.body, 0.0)
        if withdraws:
            state.withdraw(peer, frame.body, 0.0)
    for rings in state.jobs():
        state.solved(rings, is_late=False, now=0.0)
    if hear is not None:
        hear()
    return state.take(), json.dumps(to_dict(state)), state.dropped()
