"""The right to erasure in IC-Cache: of a user, a tenant, one decision, everybody, and of nobody else."""

import pytest

from anabranch.routers.contract.query import Query
from ic_cache_made import made, prefer, teach


@pytest.fixture
def cache():
    """With examples and decisions of two users of one tenant, and of one of another."""
    made_one = made()
    prefer(made_one, "small")
    for tenant, user in (("t", "u"), ("t", "v"), ("s", "u")):
        teach(made_one, f"text of {tenant} and {user}", "an answer", tenant=tenant, user=user)
        routed = made_one.route(Query(text=f"text of {tenant} and {user}", tenant=tenant, user=user), load=0.0)
        made_one.answered(routed.id, "small")
        made_one.feedback(routed.id, score=1.0)
    return made_one


def left(cache):
    """Whose examples, decisions, rows and lessons are there."""
    return {
        "pool": sorted((one.tenant, one.user) for one in cache.pool),
        "pending": sorted((one.query.tenant, one.query.user) for one in cache._pending.values()),
        "log": sorted((row["tenant"], row["user"]) for row in cache.log.rows),
        "buffer": sorted(cache.router.critic.buffer.owner_N[: len(cache.router.critic.buffer)]),
    }


ALL = [("s", "u"), ("t", "u"), ("t", "v")]


def test_nothing_is_gone_before(cache):
    assert left(cache) == dict.fromkeys(("pool", "pending", "log", "buffer"), ALL)
    assert sorted((one.tenant, one.user) for one in cache._lessons) == ALL


@pytest.mark.parametrize(
    ("named", "stays"),
    [({"tenant": "t", "user": "u"}, [ALL[0], ALL[2]]), ({"tenant": "t"}, ALL[:1]), ({"tenant": "none"}, ALL)],
)
def test_a_user_or_a_tenant_is_gone_from_everywhere_and_nobody_else(cache, named, stays):
    assert cache.forget(**named) == 3 - len(stays)
    assert left(cache) == dict.fromkeys(("pool", "pending", "log", "buffer"), stays)
    # Of others in the tenant those go too that were shown what is gone.
    assert {(one.tenant, one.user) for one in cache._lessons} <= set(stays)
    assert {id for one in cache._lessons for id in one.ids} <= {one.id for one in cache.pool}


def test_single_examples_go_with_the_lessons_and_prompts_that_hold_them(cache):
    [mine] = [one for one in cache.pool if (one.tenant, one.user) == ("t", "u")]
    assert cache.forget(tenant="t", ids=[mine.id]) == 1
    found = left(cache)
    assert found["pool"] == [ALL[0], ALL[2]]
    assert (found["pending"], found["log"]) == (ALL, ALL)
    assert all(mine.id not in routed.selection.ids for routed in cache._pending.values())
    assert all(mine.id not in lesson.ids for lesson in cache._lessons)


def test_one_decision_takes_its_answer_with_it(cache):
    routed = cache.route(Query(text="another one", tenant="t", user="u"), load=0.0)
    cache.admit(routed, "its answer", "large")
    assert len(cache.pool) == 4
    assert cache.forget_decision(routed.id) == 1
    assert left(cache)["pool"] == ALL
    assert cache.pending(routed.id) is None
    assert all(row["id"] != routed.id for row in cache.log.rows)
    assert cache.forget_decision("none") == 0


def test_everybody_is_gone(cache):
    assert cache.forget_all() == 3
    assert left(cache) == {"pool": [], "pending": [], "log": [], "buffer": []}
    assert not cache._lessons
