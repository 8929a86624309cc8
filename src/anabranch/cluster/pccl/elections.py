"""Whose shared state counts: an election by content, and who fetches what from whom.

Pure functions of what peers say they have: equal votes, equal plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from anabranch.cluster.pccl.wire import WireError, number, word

POPULAR, RECEIVE, SEND = "enforce_popular", "receive_only", "send_only"
STRATEGIES = (POPULAR, RECEIVE, SEND)
MOST_NAMES = 16_384
MOST_DIMS = 16


@dataclass
class Election:
    """What came of it.

    Attributes:
        revision: of what was elected.
        fetches: by peer that must fetch, its source and the entries ``[name, dtype, shape, hash]`` that it lacks.
        kicked: by peer that must leave, why.
        apart: by newcomer that does not fit to what is shared, what it is told before it must leave.
        error: what all are told instead; None where there is a winner.
    """

    revision: int = 0
    fetches: dict[int, tuple[int, list[list[Any]]]] = field(default_factory=dict)
    kicked: dict[int, str] = field(default_factory=dict)
    apart: dict[int, dict[str, Any]] = field(default_factory=dict)
    error: dict[str, Any] | None = None


def check_vote(body: dict[str, Any]) -> None:
    """Raises WireError for what is no description of a state."""
    number(body, "revision")
    number(body, "progress", default=0)
    if body.get("strategy") not in STRATEGIES:
        raise WireError(f"a strategy other than {', '.join(STRATEGIES)}")
    keys = body.get("keys")
    if not isinstance(keys, list) or len(keys) > MOST_NAMES:
        raise WireError(f"a state that is no list of at most {MOST_NAMES} tensors")
    for entry in keys:
        if not isinstance(entry, list) or len(entry) != 4:
            raise WireError("a tensor that is not [name, dtype, shape, hash]")
        name, dtype, shape, digest = entry
        for text in (name, dtype, digest):
            word({"a text of a tensor": text}, "a text of a tensor")
        if not isinstance(shape, list):
            raise WireError("a tensor that is not [name, dtype, shape, hash]")
        if len(shape) > MOST_DIMS or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
            raise WireError(f"tensor {name!r} has a shape that is none")
    if len({entry[0] for entry in keys}) < len(keys):
        raise WireError("two tensors of one name")


def best_known(standing: Mapping[int, Any]) -> list[int]:
    """Those that are known best; nobody where nobody is known.

    Args:
        standing: by peer that is known, how well; all of what compares.
    """
    return [peer for peer in sorted(standing) if standing[peer] == max(standing.values())]


def odd(said: Mapping[int, Any], standing: Mapping[int, Any]) -> list[int]:
    """Who says otherwise than those who are known best. Nobody where these do not agree themselves, or have said nothing.

    Args:
        said: by peer, what it votes, does or has.
        standing: as of `best_known`.
    """
    known = [said[peer] for peer in best_known(standing) if peer in said]
    if not known or any(one != known[0] for one in known):
        return []
    return [peer for peer in said if said[peer] != known[0]]


def elect(
    votes: Mapping[int, dict[str, Any]],
    last: int | None,
    unfetched: Mapping[int, Collection[int]] | None = None,
    known: Mapping[int, Any] | None = None,
) -> Election:
    """Elect by popularity of the whole content; ties go to what the lowest peer has.

    Where nothing was shared before, the highest revision counts first, then who has done most since: who goes on with a run comes before
    who begins anew. Where something was, a newcomer receives, whatever strategy its program names; one that says ``send_only`` must
    know the revision. What does not fit of it is told to it alone.

    Args:
        votes: by peer: ``revision``, ``progress``, ``strategy``, ``keys`` and whether the strategy ``is_default``.
        last: revision of what was shared before; None where nothing was.
        unfetched: by peer, sources from which it could not fetch: others are taken where there are any.
        known: by peer that was there when it was shared, how well it is known; the others are newcomers. None for all, and equally.
    """
    standing = dict.fromkeys(votes, 0) if known is None else {peer: known[peer] for peer in votes if peer in known}
    standing = standing if last is not None else {}
    best = best_known(standing)
    if last is not None:
        votes = {peer: vote if peer in standing else _as_newcomer(vote) for peer, vote in votes.items()}
    senders = [peer for peer in sorted(votes) if votes[peer]["strategy"] == SEND]
    offers = senders or [peer for peer in sorted(votes) if votes[peer]["strategy"] == POPULAR]
    if not offers and last is None:
        # Nothing was ever shared: what newcomers brought is the beginning.
        offers = [peer for peer in sorted(votes) if votes[peer].get("is_default")]
    if not offers:
        why = "nobody who is left has the shared state" + ("" if last is None else f" of revision {last}")
        return Election(kicked=dict.fromkeys(votes, why))
    if last is None and not senders:
        newest = max(_way(votes[peer]) for peer in offers)
        offers = [peer for peer in offers if _way(votes[peer]) == newest]
    if unfit := _wrong_revisions(votes, last):
        late = {peer: told for peer, told in unfit.items() if peer not in best}
        return Election(apart=late) if late and best else Election(error=next(iter(unfit.values())))
    contents = {peer: _content(votes[peer]) for peer in votes}
    if senders and len({contents[peer] for peer in senders}) > 1:
        wrong = odd({peer: contents[peer] for peer in senders}, standing) or senders
        return Election(kicked=dict.fromkeys(wrong, f"peers {senders} all send, and not the same state"))
    counted = Counter(contents[peer] for peer in offers)
    most = max(counted.values())
    winner = next(peer for peer in offers if counted[contents[peer]] == most)
    forms = {peer: _form(votes[peer]) for peer in sorted(votes)}
    if apart := odd(forms, standing):
        # It is they who do not fit to what the others have.
        return Election(apart={peer: _apart(votes, best[0], peer) for peer in apart})
    for other, form in forms.items():
        if form != forms[winner]:
            return Election(error=_apart(votes, winner, other))
    sources = [peer for peer in sorted(votes) if _keys(votes[peer]) == _keys(votes[winner])]
    return Election(revision=votes[winner]["revision"], fetches=_fetches(votes, winner, sources, unfetched or {}))


def _as_newcomer(vote: dict[str, Any]) -> dict[str, Any]:
    return {**vote, "strategy": RECEIVE} if vote["strategy"] == POPULAR else vote


def _way(vote: dict[str, Any]) -> tuple[int, int]:
    """How far a run has come."""
    return vote["revision"], vote.get("progress", 0)


def _wrong_revisions(votes: Mapping[int, dict[str, Any]], last: int | None) -> dict[int, dict[str, Any]]:
    """What is told of each peer whose revision is not the next."""
    if last is None:
        return {}
    return {
        peer: {"error": "revision", "expected": last + 1, "got": votes[peer]["revision"], "peer": peer}
        for peer in sorted(votes)
        if votes[peer]["strategy"] != RECEIVE and votes[peer]["revision"] != last + 1
    }


def _fetches(
    votes: Mapping[int, dict[str, Any]], winner: int, sources: list[int], unfetched: Mapping[int, Collection[int]]
) -> dict[int, tuple[int, list[list[Any]]]]:
    """Sources take turns, so that none serves more than its share."""
    found: dict[int, tuple[int, list[list[Any]]]] = {}
    for peer in sorted(votes):
        held = {entry[0]: entry[3] for entry in votes[peer]["keys"]}
        if lacking := [entry for entry in votes[winner]["keys"] if held[entry[0]] != entry[3]]:
            others = [source for source in sources if source not in unfetched.get(peer, ())] or sources
            found[peer] = (others[len(found) % len(others)], lacking)
    return found


def _keys(vote: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted((name, dtype, tuple(shape), digest) for name, dtype, shape, digest in vote["keys"]))


def _content(vote: dict[str, Any]) -> tuple[Any, ...]:
    return (vote["revision"], _keys(vote))


def _form(vote: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(name, dtype, shape) for name, dtype, shape, _ in _keys(vote)]


def _apart(votes: Mapping[int, dict[str, Any]], winner: int, other: int) -> dict[str, Any]:
    left, right = ({entry[0]: entry for entry in votes[peer]["keys"]} for peer in (winner, other))
    name = next(name for name in sorted(left.keys() | right.keys()) if _row(left, name) != _row(right, name))
    return {
        "error": "mismatch",
        "why": f"shared state {name!r:.80}: peer {winner} has {_row(left, name)}, peer {other} {_row(right, name)}",
    }


def _row(entries: dict[str, Any], name: str) -> str:
    if name not in entries:
        return "none of that name"
    _, kind, shape, digest = entries[name]
    # A setting has a value where tensors have a type, and no bytes.
    return f"{kind} {shape}" if digest else str(kind)
