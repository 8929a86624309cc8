"""Requests of a runner: their newest tokens, and that nothing of them is left; and what a step gives each, joined."""

import pytest

from anabranch.serving.core.batch import PENDING, Chunk, Sampled
from anabranch.serving.core.request import Request, Sampling
from anabranch.serving.engine.depths import Depths
from anabranch.serving.engine.explained import TokenRoute
from anabranch.serving.engine.passes import Variant
from anabranch.serving.engine.results import joined, tell_routes
from anabranch.serving.engine.under_way import UnderWay
from anabranch.serving.engine.variants import Variants


def chunk(id, *tokens, **fields):
    return Chunk(id=id, tokens=tokens, start=0, blocks=(0,), **{"samples": True, **fields})


def under_way(**parts):
    return UnderWay(Variants(1, 3), **parts)


def test_pending_tokens_are_the_newest_of_their_own_request():
    requests = under_way()
    later = (Sampled(id="b", token=8), Sampled(id="b", token=9))
    requests.keep_newest([Sampled(id="a", token=5), Sampled(id="b", token=7, later=later)])
    # A chunk that does not sample gives no token, so the one before stays.
    requests.keep_newest([Sampled(id="a", token=PENDING)])
    chunks = [chunk("b", PENDING), chunk("c", 1, 2), chunk("a", PENDING)]
    assert requests.tokens(chunks) == [9, 1, 2, 5]
    requests.forget("a")
    with pytest.raises(KeyError):
        requests.tokens(chunks)


def test_nothing_is_left_of_a_request_that_is_gone():
    requests, empty = (under_way(depths=Depths(bank=None, num_blocks=3, control=0.0, most=6)) for _ in range(2))
    sampling = Sampling(max_tokens=1, prompt_logprobs=2)
    requests.add(Request(id="a", prompt=(1, 2), sampling=sampling, record_routing=True, routes_depth=True))
    requests.keep_newest([Sampled(id="a", token=5)])
    requests.told.end([chunk("a", 1, 2)])
    requests.told.names([chunk("a", 1)])
    assert (requests.recorded, requests.tops) == ({"a"}, {"a": 2})
    assert requests.variants.of("a").chooser == "a"
    assert requests.depths.prompt_behind(chunk("a", 1)) == (1, 2)
    requests.forget("a")
    for name in ("recorded", "tops", "_newest", "depths"):
        assert getattr(requests, name) == getattr(empty, name), name
    for name in ("variants", "told", "pooling"):
        assert vars(getattr(requests, name)) == vars(getattr(empty, name)), name


def test_a_chosen_path_is_told_once():
    depths = Depths(bank=None, num_blocks=3, control=0.0, most=6)
    requests = under_way(depths=depths)
    depths.take_over({"a": ((0, 2), True), "b": ((), False)})
    for id in "abc":
        requests.add(Request(id=id, prompt=(1, 2), sampling=Sampling(max_tokens=1), routes_depth=True))
    assert [requests.variants.of(id) for id in "abc"] == [Variant(1, (0, 2)), Variant(1, ()), Variant(1, chooser="c")]
    assert requests.handed_over() == {"a": ((0, 2), True), "b": ((), False)}
    told = []
    for _ in range(2):
        result = Sampled(id="a", token=1)
        requests.tell_decisions({"a": result})
        told.append(result.path)
    assert told == [(0, 2), None]
    others = {id: Sampled(id=id, token=1) for id in "bc"}
    requests.tell_decisions(others)
    assert [other.path for other in others.values()] == [None, None]


def test_a_path_that_nobody_was_told_goes_with_its_request():
    """One that comes again under its id has a path of its own, or none."""
    depths, empty = (Depths(bank=None, num_blocks=3, control=0.0, most=6) for _ in range(2))
    requests = under_way(depths=depths)
    depths.take_over({"a": ((0, 2), True)})
    requests.add(Request(id="a", prompt=(1, 2), sampling=Sampling(max_tokens=1), routes_depth=True))
    requests.forget("a")
    assert depths == empty
    again = Sampled(id="a", token=1)
    requests.tell_decisions({"a": again})
    assert again.path is None


def test_a_token_scores_and_a_vector_of_one_request_are_one_answer():
    sampled = [Sampled(id="a", token=5), Sampled(id="b", token=6, error="of sampling")]
    scored = {
        "a": Sampled(id="a", token=PENDING, prompt_logprobs=("score",), error="of scores"),
        "b": Sampled(id="b", token=PENDING, error="of scores"),
        "c": Sampled(id="c", token=PENDING, prompt_logprobs=("other",)),
    }
    results = joined(sampled, scored, {"c": Sampled(id="c", token=PENDING, embedding=(1.0,))})
    assert list(results) == ["a", "b", "c"]
    assert [(result.token, result.error) for result in results.values()] == [
        (5, "of scores"),
        (6, "of sampling"),
        (PENDING, None),
    ]
    assert [result.prompt_logprobs for result in results.values()] == [("score",), (), ("other",)]
    assert results["c"].embedding == (1.0,)


def test_each_token_has_the_route_of_the_row_that_sampled_it():
    """The second of two chunks guessed two tokens, of which one held; the third part of a prompt does not sample."""
    later = (Sampled(id="b", token=4),)
    sampled = [Sampled(id="a", token=1), Sampled(id="b", token=3, later=later)]
    chunks = [chunk("a", 7, 7), chunk("c", 7, samples=False), chunk("b", 8, 3, 4, drafts=2)]
    rows = [1, 3, 4, 5]
    routes = {row: TokenRoute() for row in rows}
    for row, route in routes.items():
        route[0] = (row,)
    told = []
    tell_routes(sampled, chunks, rows, routes, lambda id, route: told.append((id, route[0])) or {"of": len(told)})
    assert [result.routing for result in (*sampled, *later)] == [{0: (1,)}, {0: (3,)}, {0: (4,)}]
    # What pools went by counts for tokens that hold, and for no guess beside them.
    assert told == [("a", (1,)), ("b", (3,)), ("b", (4,))]
    assert [result.explained for result in (*sampled, *later)] == [{"of": 1}, {"of": 2}, {"of": 3}]
