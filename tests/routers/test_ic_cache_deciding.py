"""How IC-Cache decides: which arm and which examples, and that a part which fails is passed by."""

import numpy as np
import pytest

from anabranch.errors import DataError
from anabranch.routers.contract.query import Query
from anabranch.routers.ic_cache import Arm, ICCache
from ic_cache_made import EMBEDDER, made, prefer, teach

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


def odd(given):
    """An embedder that gives something odd of one text."""

    def embed(texts):
        found_ND = EMBEDDER.embed(texts)
        return np.stack([given if "poison" in text else row_D for text, row_D in zip(texts, found_ND, strict=True)])

    return embed


def taught(cache, rounds):
    for at in range(rounds):
        routed = cache.route(f"list the files {at}", load=0.0)
        cache.answered(routed.id, routed.arm)
        cache.prefer(routed.id, "small", "large", 1.0)


def of_router(cache):
    return cache.router.critic.utilities(np.zeros_like(cache.route("list", load=0.0).x_I))


@pytest.mark.parametrize("carries", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_vector_that_is_not_finite_is_passed_by_and_teaches_nothing(value, carries):
    cache, odd_D = made(), np.full(64, value, np.float32)
    cache.embed = odd(odd_D)
    taught(cache, 10)
    before_M = of_router(cache)
    for _ in range(2):
        routed = cache.route(Query(text="poison", vector_D=odd_D if carries else None), load=0.0)
        assert (routed.vector_D, routed.x_I, routed.choice, routed.arm) == (None, None, None, "large")
        cache.answered(routed.id, routed.arm)
        cache.prefer(routed.id, "small", "large", 1.0)
        assert cache.update_cache([Query(text="poison", vector_D=odd_D if carries else None)], ["x"])[0].id is None
    assert cache.metrics.value("ic_cache_bypass_total", stage="embedder") == 2
    np.testing.assert_array_equal(of_router(cache), before_M)
    taught(cache, 10)
    assert np.isfinite(of_router(cache)).all()
    assert cache.route("list the files 3", load=0.0).choice is not None


@pytest.mark.parametrize("carries", [False, True])
@pytest.mark.parametrize("size", [3e38, 1e9, 1e-30])
def test_a_huge_or_tiny_vector_weighs_as_much_as_any(size, carries):
    huge_D = np.full(64, size, np.float32)
    cache, usual = made(), made()
    cache.embed, usual.embed = odd(huge_D), odd(np.full(64, 1 / 8, np.float32))
    for one, carried_D in ((cache, huge_D), (usual, np.full(64, 1 / 8, np.float32))):
        routed = one.route(Query(text="poison", vector_D=carried_D if carries else None), load=0.0)
        np.testing.assert_allclose(routed.vector_D, 1 / 8, rtol=1e-6)
        one.answered(routed.id, routed.arm)
        one.prefer(routed.id, "small", "large", 1.0)
        [admission] = one.update_cache([Query(text="poison", vector_D=carried_D if carries else None)], ["x"])
        np.testing.assert_allclose(one.pool.index.vectors([admission.id])[0], 1 / 8, rtol=1e-6)
        taught(one, 5)
    np.testing.assert_allclose(of_router(cache), of_router(usual), rtol=1e-4, atol=1e-6)


def test_an_embedder_that_gives_no_vectors_is_said_when_the_cache_is_made_and_when_it_embeds_the_pool_anew():
    with pytest.raises(DataError, match="the embedder gave numbers of shape"):
        ICCache(ICCache.Config(), arms=[Arm(name="a", cost=1.0)], embed=lambda texts: np.zeros(3))
    cache = made(on_new_dim="reindex")
    teach(cache, "list the files", "ls")
    teach(cache, "poison", "no")
    kept = cache.pool.index
    cache.embed = odd(np.full(64, np.nan, np.float32))
    with pytest.raises(DataError, match="not finite"):
        cache.vector(Query(text="list", vector_D=np.ones(3)))
    assert cache.pool.index is kept
    assert cache.router.dim == 64
