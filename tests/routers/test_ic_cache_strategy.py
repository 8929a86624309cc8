"""`ic_cache` as a strategy: routes by load, rewrites what the small model is sent, keeps what it may, learns from outcomes."""

import json

import numpy as np
import pytest

from anabranch.errors import ConfigError, InputError
from anabranch.routers import strategies
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Model, Outcome, Pool, Query
from anabranch.routers.contract.strategy import Strategy
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.ic_cache import ICCache, ICCacheRouting
from anabranch.routers.ic_cache.critic import Critic
from anabranch.routers.ic_cache.pool import ExamplePool
from anabranch.routers.ic_cache.router import Router
from anabranch.routers.money import Price
from anabranch.routers.strategies import make
from anabranch.testing import check_strategy

EMBEDDER = Hashed.Config(dim=64).build()
CACHE = ICCache.Config(
    router=Router.Config(critic=Critic.Config(hidden=(16,), learning_rate=3e-3), temperature=0.0, explore=0.0)
)


def pool_of(load=0.0, now_s=0.0, down=(), extra=()):
    prices = {"small": 0.1, "large": 5.0, **dict.fromkeys(extra, 9.0)}
    return Pool(
        tuple(
            Model(
                name=name,
                price=Price.of_dollars(price, 4 * price),
                load=load if name == "large" else 0.0,
                is_available=name not in down,
                context=4096,
            )
            for name, price in prices.items()
        ),
        now_s,
    )


def query(text, **fields):
    return Query(text=text, vector_D=EMBEDDER.embed([text])[0], **fields)


def build(**fields):
    return ICCacheRouting.Config(**{"cache": CACHE, "domains": ("",), **fields}).build()


def prefer(router, mu):
    router.cache.router.critic.utilities = lambda x_I: np.array(mu)


def answered(router, text, answer, model="large", quality=None, now_s=0.0, **fields):
    asked = query(text, **fields)
    decision = router.route(asked, pool_of(now_s=now_s))
    router.observe(Outcome(query=asked, model=model, decision=decision, answer=answer, quality=quality))
    return decision


def test_it_is_registered_and_prepare_of_others_is_the_identity():
    assert "ic_cache" in strategies.names()
    assert isinstance(make("ic_cache"), ICCacheRouting)
    messages = [{"role": "user", "content": "x"}]
    assert Strategy(None).prepare(query("x"), "m", messages) is messages


def test_decision_by_hand():
    router = build()
    answered(router, "list the files", "ls")
    prefer(router, [0.8, 0.3])
    decision = router.route(query("list the files"), pool_of())
    assert [c.model for c in decision.candidates] == ["small", "large"]
    assert [c.quality for c in decision.candidates] == [0.8, 0.3]
    assert decision.candidates[1].cost == pytest.approx((500 * 5 + 250 * 20) / 1e6)
    assert decision.reason == "small with 1 examples"
    assert [item["id"] for item in decision.details["examples"]] == [0]
    json.dumps(decision.details)
    prefer(router, [0.3, 0.8])
    assert router.route(query("list the files"), pool_of()).reason == "large with 0 examples"
    facts = router.explain(query("list the files"), pool_of())
    assert facts["candidates"][0]["model"] == "large"


def test_prepare_shows_examples_to_the_small_model_alone():
    router = build()
    answered(router, "list the files", "ls")
    asked, messages = (
        query("list the files"),
        [{"role": "system", "content": "S"}, {"role": "user", "content": "list the files"}],
    )
    decision = router.route(asked, pool_of())
    sent = router.prepare(asked, "small", messages, decision=decision)
    assert [m["content"] for m in sent] == ["S", "list the files", "ls", "list the files"]
    assert router.prepare(asked, "large", messages, decision=decision) is messages
    assert router.prepare(asked, "unheard of", messages, decision=decision) is messages
    assert [m["content"] for m in router.prepare(asked, "small", messages)] == [
        m["content"] for m in sent
    ]  # selected anew
    assert build().prepare(asked, "small", messages) is messages  # has seen no model yet
    router.forget(tenant="")
    assert router.prepare(asked, "small", messages, decision=decision) is messages  # erased meanwhile


def test_assisted_and_trusted_models_may_be_named():
    router = build(assisted=("large",), trusted=("small",))
    answered(router, "list the files", "ls", model="small")
    answered(router, "copy the files", "cp", model="large")
    assert [example.response for example in router.cache.pool] == ["ls"]
    asked, messages = query("list the files"), [{"role": "user", "content": "list the files"}]
    decision = router.route(asked, pool_of())
    assert len(router.prepare(asked, "large", messages, decision=decision)) == 3
    assert router.prepare(asked, "small", messages, decision=decision) is messages


def test_load_of_the_dearest_model_moves_the_order():
    router = build()
    router.route(query("x"), pool_of())
    prefer(router, [0.6, 0.9])
    assert router.route(query("list files"), pool_of(now_s=1.0)).model == "large"
    busy = [router.route(query("list files"), pool_of(load=4.0, now_s=1.0 + s)) for s in range(1, 30)]
    assert busy[-1].model == "small"
    assert "load takes" in busy[-1].reason
    calm = [router.route(query("list files"), pool_of(load=0.1, now_s=30.0 + s)) for s in range(1, 60)]
    assert calm[-1].model == "large"


def test_unavailable_models_are_left_out_and_unknown_ones_come_last():
    router = build()
    router.route(query("x"), pool_of())
    prefer(router, [0.3, 0.9])
    assert [c.model for c in router.route(query("x"), pool_of(down=("large",))).candidates] == ["small"]
    assert {c.model for c in router.route(query("x"), pool_of(down=("large", "small"))).candidates} == {
        "small",
        "large",
    }
    assert [c.model for c in router.route(query("x"), pool_of(extra=("new",))).candidates] == ["large", "small", "new"]
    with pytest.raises(InputError, match="knows none of the models other; it learned of small, large"):
        router.route(query("x"), Pool((Model(name="other"),)))
    with pytest.raises(InputError, match="needs the vector"):
        router.route(Query(text="x"), pool_of())


def test_admission_is_opt_in_and_obeys_the_sender():
    router = build(domains=("code",))
    answered(router, "list files", "ls")
    answered(router, "list files", None, task="code")  # store: false arrives as no answer
    assert len(router.cache.pool) == 0
    answered(router, "list files", "ls", task="code")
    assert [example.domain for example in router.cache.pool] == ["code"]
    nobody = build(domains=())
    answered(nobody, "list files", "ls", task="code")
    assert len(nobody.cache.pool) == 0


def test_redacted_requests_need_an_embedder():
    router = build()
    answered(router, "mail ann@example.org", "ok")
    assert len(router.cache.pool) == 0
    router.connect(embed=EMBEDDER.embed)
    answered(router, "mail ann@example.org", "ok")
    assert [example.request for example in router.cache.pool] == ["mail [email]"]


def test_it_keeps_to_the_contract_of_strategies():
    settings = ICCache.Config(router=Router.Config(critic=Critic.Config(hidden=(8,))))
    check_strategy(ICCacheRouting.Config(cache=settings, domains=("*",), epochs=1))
    assert not ICCacheRouting.Config(domains=()).build().keeps_answers
    assert ICCacheRouting.Config(domains=("code",)).build().keeps_answers


def test_a_drawn_arm_comes_first_and_scores_still_fall():
    router = ICCacheRouting.Config(
        cache=ICCache.Config(router=Router.Config(critic=Critic.Config(hidden=(8,)), explore=1.0))
    ).build()
    firsts = set()
    for _ in range(40):
        decision = router.route(query("x"), pool_of(extra=("new",)))
        scores = [candidate.score for candidate in decision.candidates]
        assert scores == sorted(scores, reverse=True)
        assert np.isfinite(scores).all()
        firsts.add(decision.model)
    assert firsts == {"small", "large", "new"}


def test_upkeep_comes_by_itself():
    router = build(tick_s=60.0)
    answered(router, "list files", "ls", now_s=100.0)
    assert router.metrics.value("ic_cache_pool_examples") == 1  # the first one
    tau = router.metrics.value("ic_cache_tau")
    answered(router, "copy files", "cp", now_s=159.0)
    assert router.metrics.value("ic_cache_pool_examples") == 2  # told at once, and not at the next upkeep
    assert router.metrics.value("ic_cache_tau") == tau
    answered(router, "move files", "mv", now_s=160.0)
    assert router.metrics.value("ic_cache_pool_examples") == 3


def test_outcomes_teach_and_odd_ones_are_passed_over():
    router = build()
    decision = answered(router, "list files", "ls", quality=1.0)
    buffer = router.cache.router.critic.buffer
    assert len(buffer) == 1
    asked = query("list files")
    for outcome in (
        Outcome(query=asked, model="large", quality=1.0),
        Outcome(query=asked, model="unheard of", quality=1.0, decision=decision),
        Outcome(query=asked, model="large", quality=1.0, decision=decision, succeeded=False),
        Outcome(query=asked, model="large", quality=float("nan"), decision=decision),
    ):
        router.observe(outcome)
    assert len(buffer) == 1
    assert router.metrics.value("ic_cache_feedback_ignored_total", reason="no score from 0 to 1") == 1
    build().observe(Outcome(query=asked, model="large", quality=1.0, decision=decision))  # knows nothing yet
    router.observe(Outcome(query=asked, model="small", quality=0.2, decision=decision))  # the fallback answered
    assert buffer.arm_N2[1].tolist() == [0, -1]


def recorded(count=160, seed=0):
    """Even numbers are easy for both; odd ones only for the large model."""
    random = np.random.default_rng(seed)
    kinds = random.integers(0, 2, count)
    texts = tuple(f"{'sum the list' if k == 0 else 'prove a theorem'} number {n}" for n, k in enumerate(kinds.tolist()))
    score = np.array([[1.0, 1.0] if k == 0 else [0.1, 0.9] for k in kinds.tolist()])
    return Recorded(
        query=texts,
        models=("small", "large"),
        score_NM=score,
        cost_NM=np.tile([0.001, 0.05], (count, 1)),
        answers=tuple({"small": f"s{n}", "large": f"l{n}"} for n in range(count)),
    ).with_vectors(EMBEDDER.embed(texts))


def test_fit_learns_who_is_good_and_fills_the_pool_from_the_trusted():
    data = recorded()
    router = build(epochs=12).fit(data, seed=0)
    assert len(router.cache.pool) == 160
    assert {example.model for example in router.cache.pool} == {"large"}
    test = recorded(60, seed=1)
    hard = np.array(["prove" in text for text in test.query])
    played = router.play(test, pool_of())
    assert played.model_N[hard].mean() > 0.9
    mu = np.array([router.route(q, pool_of()).candidates[0].quality for q in test.queries()])
    assert (mu > 0.6).all()
    again = build(epochs=12).fit(data, seed=0)
    assert [again.route(q, pool_of()).model for q in test.queries()] == [
        router.route(q, pool_of()).model for q in test.queries()
    ]
    with pytest.raises(InputError, match="learns from vectors"):
        build().fit(Recorded(query=("x",), models=("a",), score_NM=np.ones((1, 1))))


def test_state_reads_back():
    router = build(epochs=2).fit(recorded(40))
    arrays, facts = router.state()
    other = build()
    other.load_state(arrays, json.loads(json.dumps(facts)))
    for asked in recorded(10, seed=3).queries():
        ours, theirs = router.route(asked, pool_of()), other.route(asked, pool_of())
        assert ours.candidates == theirs.candidates
        assert ours.details["examples"] == theirs.details["examples"]
    blank = build()
    assert blank.state() == ({}, {})
    other.load_state({}, {})
    assert other.cache is None


def test_upkeep_and_erasure_through_the_strategy():
    router = build()
    assert router.forget(tenant="t") == 0
    router.tick()
    answered(router, "list files", "ls", tenant="t", user="u")
    assert router.forget(tenant="t", user="u") == 1
    answered(router, "list files", "ls", tenant="t")
    answered(router, "x", None, now_s=31 * 86400.0)
    router.tick()
    assert len(router.cache.pool) == 0


def test_a_broken_router_leaves_the_dearest_model_first():
    router = build()
    router.route(query("x"), pool_of())

    def broken(*args):
        raise RuntimeError("broken")

    router.cache.router.choose = broken
    decision = router.route(query("x"), pool_of())
    assert [c.model for c in decision.candidates] == ["large", "small"]
    assert decision.reason == "the router failed; the dearest model answers"


def test_answers_to_queries_that_name_no_task_are_kept_unless_the_config_says_otherwise():
    """Whoever asks for it by name wants something kept; tasks that have names opt in one by one."""
    assert build(domains=None)._domains == ("",)
    assert build(domains=()).keeps_answers is False
    kept = ICCacheRouting.Config(cache=ICCache.Config(pool=ExamplePool.Config(domains=("support",)))).build()
    assert kept._domains == ("support",)
    router = ICCacheRouting.Config().build()
    answered(router, "list files", "ls")
    assert len(router.cache.pool) == 1


def test_a_name_of_a_strategy_with_a_slip_is_told_the_one_that_is_near():
    for name, said in (("knnn", "did you mean 'knn'"), ("KNN", "did you mean 'knn'"), ("zzzzzz", "known: .*knn")):
        with pytest.raises(ConfigError, match=f"no strategy '{name}'; {said}"):
            make(name)
