"""How IC-Cache decides: which arm and which examples, and that a part which fails is passed by."""

from anabranch.routers.contract.query import Query
from ic_cache_made import made, prefer, teach

MESSAGES = [{"role": "user", "content": "list the files"}]


def fails(*_, **__):
    raise ValueError("broken")


def test_the_chosen_arm_comes_first_then_the_others_by_their_score():
    cache = made()
    for arm, order in (("small", ("small", "large")), ("large", ("large", "small"))):
        prefer(cache, arm)
        routed = cache.route("list the files", load=0.0)
        assert (routed.arm, routed.order) == (arm, order)
    # Where none of them takes requests, all are tried all the same.
    assert cache.route("list the files", available=["small"], load=0.0).order == ("small",)
    assert set(cache.route("list the files", available=[], load=0.0).order) == {"small", "large"}


def test_a_decision_is_remembered_and_logged_with_what_it_was_made_of():
    cache = made(pending=2)
    prefer(cache, "small")
    routed = [cache.route(Query(text=f"say {at}", tenant="t", user="u"), load=0.0) for at in range(3)]
    assert [cache.pending(one.id) is None for one in routed] == [True, False, False]
    row = cache.log.rows[-1]
    assert (row["id"], row["time_s"], row["tenant"], row["user"], row["arm"]) == (
        routed[-1].id,
        1000.0,
        "t",
        "u",
        "small",
    )
    assert sum(row["probability"]) == 1.0


def test_a_router_that_fails_sends_to_the_dearest_arm_and_logs_nothing():
    cache = made()
    cache.router.choose = fails
    routed = cache.route("list the files", load=0.0)
    assert (routed.choice, routed.order) == (None, ("large", "small"))
    assert len(cache.log.rows) == 0
    assert cache.metrics.value("ic_cache_bypass_total", stage="router") == 1


def test_without_vectors_or_a_selector_there_are_no_examples():
    cache = made()
    teach(cache, "list the files", "ls")
    cache.selector.select = fails
    assert cache.route("list the files", load=0.0).selection.chosen == ()
    cache = made()
    teach(cache, "list the files", "ls")
    cache.embed = fails
    routed = cache.route("list the files", load=0.0)
    assert (routed.vector_D, routed.x_I, routed.selection.chosen) == (None, None, ())


def test_the_small_arm_is_sent_examples_as_far_as_its_window_holds_them():
    cache = made()
    prefer(cache, "small")
    teach(cache, "list the files", "ls")
    routed = cache.route("list the files", load=0.0)
    assert len(routed.selection.chosen) == 1
    assert cache.prepare(routed, "large", MESSAGES) is MESSAGES
    assert cache.prepare(routed, "none", MESSAGES) is MESSAGES
    told = cache.prepare(routed, "small", MESSAGES)
    assert [one["content"] for one in told] == ["list the files", "ls", "list the files"]
    # A prompt that fills the window leaves no room, and what was not shown is not remembered as shown.
    long = cache.route(Query(text="list the files", prompt_tokens=190), load=0.0)
    assert cache.prepare(long, "small", MESSAGES) == MESSAGES
    assert cache.pending(long.id).selection.chosen == ()
