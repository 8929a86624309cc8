"""IC-Cache end to end on made models: it learns to send what the small one can do, keeps to its limits, and is passed by where it fails."""

import json
import math
import pickle

import numpy as np
import pytest

from anabranch.config import from_dict, to_dict
from anabranch.errors import CapacityError, ConfigError, InputError
from anabranch.routers.contract.query import Query
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.ic_cache import Arm, ExamplePool, ICCache
from anabranch.routers.ic_cache.counters import Counters
from anabranch.routers.ic_cache.critic import Critic
from anabranch.routers.ic_cache.off_policy import evaluate
from anabranch.routers.ic_cache.proxy import Logistic
from anabranch.routers.ic_cache.router import Router
from anabranch.routers.ic_cache.threshold import Threshold
from anabranch.routers.ic_cache.upkeep import Manager
from anabranch.routers.retrieve import Exact

EMBEDDER = Hashed.Config(dim=128).build()
CRITIC = Critic.Config(hidden=(16,), learning_rate=3e-3)
WORDS = ("red", "green", "blue", "black", "white", "pink")


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Model:
    """Answers "paint COLOUR" with the colour's number; the small one only where an example in its prompt shows it that colour."""

    def __init__(self, is_small=False):
        self.is_small, self.prompts, self.is_down = is_small, [], False

    def __call__(self, messages):
        if self.is_down:
            raise ConnectionError("no route")
        self.prompts.append(messages)
        colour = messages[-1]["content"].split()[1]
        shown = {message["content"].split()[1] for message in messages[:-1] if message["role"] == "user"}
        return f"paint {WORDS.index(colour)}" if not self.is_small or colour in shown else "what?"


def make(*, embed=EMBEDDER.embed, config=None, small=None, large=None, clock=None, **kwargs):
    """Two arms and a cache that keeps the large one's answers."""
    config = config or ICCache.Config(
        pool=ExamplePool.Config(domains=("",), trust={"large": 1}),
        index=Exact.Config(),
        router=Router.Config(critic=CRITIC, explore=0.0),
        threshold=Threshold.Config(share=0.0),
    )
    arms = [Arm(name="small", cost=0.1, ask=small or Model(True)), Arm(name="large", cost=1.0, ask=large or Model())]
    return ICCache(config, arms=arms, embed=embed, clock=clock or Clock(), **kwargs)


def teach(cache, colour, count=1, **fields):
    return cache.update_cache(
        [Query(text=f"paint {colour}", **fields)] * count, [f"paint {WORDS.index(colour)}"] * count
    )


def force(cache, arm):
    """Make the router prefer an arm."""
    cache.router.critic.utilities = lambda x_I: np.array([float(name == arm) for name in cache.router.arms])


# Empty, full, asked


def test_empty_pool_gives_plain_arms():
    small, large = Model(True), Model()
    cache = make(small=small, large=large)
    for arm, model in (("small", small), ("large", large)):
        force(cache, arm)
        response = cache.generate(["paint red"])[0]
        assert (response.arm, response.routed.selection.chosen) == (arm, ())
        assert model.prompts == [[{"role": "user", "content": "paint red"}]]
        cache.forget()


def test_examples_reach_the_small_arm_and_not_the_large_one():
    small, large = Model(True), Model()
    cache = make(small=small, large=large)
    assert teach(cache, "red")[0].reason == "kept"
    force(cache, "small")
    response = cache.generate(["paint red"])[0]
    assert response.text == "paint 0"
    assert [message["content"] for message in small.prompts[0]] == ["paint red", "paint 0", "paint red"]
    assert response.headers()["x-ic-arm"] == "small"
    assert response.headers()["x-ic-examples"] == "0"
    assert response.headers()["x-ic-scores"] == "small=1.000,large=0.000"
    assert cache.pending(response.headers()["x-ic-id"]).answered == ("small",)
    assert response.admission.reason == "model is not trusted"
    force(cache, "large")
    assert cache.generate(["paint red"])[0].text == "paint 0"
    assert len(large.prompts[0]) == 1


def test_it_learns_to_send_work_to_the_small_arm_once_examples_are_there():
    """The bandit starts blind. Rated 1 or 0, the share of the large arm falls while answers stay right."""
    config = make().config.replace(router=Router.Config(critic=CRITIC, explore=0.1))
    cache, random, history = make(config=config), np.random.default_rng(0), []
    for _ in range(500):
        colour = str(random.choice(WORDS))
        response = cache.generate([f"paint {colour}"])[0]
        is_right = response.text == f"paint {WORDS.index(colour)}"
        cache.feedback(response.routed.id, score=0.9 * is_right + 0.1 * (response.arm == "small") * is_right)
        history.append((response.arm == "small", is_right))
    small, right = np.array(history, float).T
    assert small[:20].mean() < 0.3  # what is unknown goes to the large arm
    assert small[-100:].mean() > 0.7
    assert right[-100:].mean() > 0.95
    rows = cache.log.rows
    value = evaluate(rows[-200:], lambda row: dict(zip(row["arms"], row["probability"], strict=True)))
    assert value.mean == pytest.approx(np.mean([row["reward"] for row in rows[-200:]]), abs=1e-9)  # the policy itself


def test_load_moves_work_to_the_small_arm():
    cache = make()
    cache.router.critic.utilities = lambda x_I: np.array([0.6, 0.9])
    shares = []
    for load in (0.5, 3.0):
        cache.router.load.value, cache.router.load._last_s = load, cache.clock()
        shares.append(np.mean([cache.route("paint red", load=load).arm == "large" for _ in range(50)]))
    assert shares[0] == 1.0
    assert shares[1] == 0.0
    assert cache.metrics.value("ic_cache_load_push") == pytest.approx(math.tanh(8))


# Where things fail


@pytest.mark.parametrize("part", ["embedder", "selector", "router"])
def test_a_part_that_raises_is_passed_by(part):
    cache = make()
    teach(cache, "red")
    force(cache, "small")

    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    if part == "embedder":
        cache.embed = broken
    elif part == "selector":
        cache.selector.proxy.score = broken
    else:
        cache.router.choose = broken
    response = cache.generate(["paint red"])[0]
    assert response.arm == ("small" if part == "selector" else "large")
    assert (response.routed.selection.chosen == ()) == (part != "router")
    assert cache.metrics.value("ic_cache_bypass_total", stage=part) == 1


def test_arms_that_are_down_are_passed_by_and_none_left_is_no_capacity():
    small, large = Model(True), Model()
    cache = make(small=small, large=large)
    force(cache, "small")
    small.is_down = True
    assert cache.generate(["paint blue"])[0].arm == "large"
    assert cache.metrics.value("ic_cache_arm_errors_total", arm="small") == 1
    large.is_down = True
    with pytest.raises(CapacityError, match="no arm answered \\(small: no route; large: no route\\)"):
        cache.generate(["paint blue"])
    with pytest.raises(CapacityError, match="has no ask"):
        ICCache(cache.config, arms=[Arm(name="x", cost=1.0)], dim=128).generate(
            [Query(text="a", vector_D=np.ones(128))]
        )


def told(cache, id, way, value):
    """Feedback of a way."""
    return cache.prefer(id, "small", "large", value) if way == "outcome" else cache.feedback(id, **{way: value})


@pytest.mark.parametrize("way", ["score", "thumb", "outcome"])
@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, -1, 5, -0.1, 1.1, 1 + 2e-6, 10**400, "down", [1], np.array([0, 1]), None]
)
def test_feedback_that_is_no_score_is_ignored_and_counted(way, value):
    """A thumb out of range was learned as the quality of the answer."""
    cache = make()
    teach(cache, "red")
    id = cache.route("paint red").id
    before = pickle.dumps(cache.state())
    assert told(cache, id, way, value) is False
    assert cache.metrics.value("ic_cache_feedback_ignored_total", reason="no score from 0 to 1") == 1
    assert pickle.dumps(cache.state()) == before


@pytest.mark.parametrize("way", ["score", "thumb", "outcome"])
@pytest.mark.parametrize(
    ("value", "learned"), [(True, 1), (0, 0), (np.float32(1.0000001), 1), (-1e-7, 0), (np.bool_(True), 1), (0.25, 0.25)]
)
def test_feedback_is_learned_as_what_it_says_rounded_as_it_may_be(monkeypatch, way, value, learned):
    cache = make()
    id = cache.route("paint red").id
    seen = []
    name = "prefer" if way == "outcome" else "rate"
    learn = getattr(cache.router, name)

    def note(*given, **more):
        seen.append(given[-1])
        return learn(*given, **more)

    monkeypatch.setattr(cache.router, name, note)
    assert told(cache, id, way, value)
    assert seen == [learned]
    assert type(seen[0]) is float


def test_feedback_of_every_kind():
    cache = make()
    id = cache.route("paint red").id
    assert cache.feedback(id, thumb=True)
    assert cache.feedback(id, thumb=False, arm="small")
    assert cache.feedback(id, score=0.25, arm="large")
    assert cache.router.critic.buffer.target_N[:3].tolist() == [1, 0, 0.25]
    assert cache.feedback(id, preferred=("small", "large"))
    assert cache.feedback(id, preferred=("small", "large"), tie=True)
    assert cache.router.wins_M.tolist() == [2.5, 1.5]
    for bad in (("small", "small"), ("small", "x")):
        assert not cache.feedback(id, preferred=bad)
    assert not cache.feedback(id, score=1.0, arm="x")
    assert not cache.feedback("unheard of", score=1.0)
    assert cache.metrics.value("ic_cache_feedback_ignored_total", reason="unknown arm") == 3
    assert cache.metrics.value("ic_cache_feedback_ignored_total", reason="unknown id") == 1


def test_two_arms_answer_an_uncertain_request_and_the_judge_decides():
    calls = []

    def judge(request, first, second):
        calls.append(request)
        return 3.0 if first.startswith("paint") and not second.startswith("paint") else 0.0

    cache = make(judge=judge)  # an untrained critic says 1/2 of both: uncertain
    force(cache, "small")
    cache.router.critic.utilities = lambda x_I: np.array([0.52, 0.5])
    cache.router.config = cache.router.config.replace(temperature=0.0)
    response = cache.generate(["paint red"])[0]  # no example: small says "what?"
    assert (response.arm, response.text) == ("small", "what?")
    assert len(calls) == 16
    assert cache.router.wins_M.tolist() == [1, 2]
    assert cache.router.losses_M.tolist() == [2, 1]

    def broken(request, first, second):
        raise RuntimeError("no judge today")

    cache.judge = broken
    assert cache.generate(["paint red"])[0].text == "what?"
    assert cache.metrics.value("ic_cache_bypass_total", stage="judge") == 1


# What may be kept


def test_store_false_keeps_nothing():
    cache = make()
    force(cache, "large")
    assert cache.generate(["paint red"], store=False)[0].admission.reason == "sender forbids it"
    assert cache.update_cache(["paint red"], ["paint 0"], store=False)[0].id is None
    assert len(cache.pool) == 0
    assert cache.metrics.value("ic_cache_admissions_total", reason="sender forbids it") == 2


def test_clients_answers_need_trust_too():
    cache = make()
    assert cache.update_cache(["paint red"], ["poison"], model="some client")[0].reason == "model is not trusted"
    with pytest.raises(InputError, match="2 requests with 1 responses"):
        cache.update_cache(["a", "b"], ["c"])


def test_erasure_leaves_nothing_of_a_user_anywhere():
    cache = make()
    secret = "paint red xyzzy"
    for user in ("ann", "bob"):
        cache.update_cache([Query(text=f"{secret} of {user}", tenant="t", user=user)], ["paint 0 xyzzy"])
    queries = [
        Query(text=f"paint red xyzzy {n}", tenant="t", user=user) for n, user in enumerate(("ann", "bob", "bob"))
    ]
    routed = [cache.route(query) for query in queries]
    assert [len(r.selection.chosen) for r in routed] == [2, 2, 2]
    for item in routed[:2]:
        cache.feedback(item.id, score=1.0, arm="small")
    assert cache.forget(tenant="t", user="ann") == 1
    assert cache.pending(routed[0].id) is None
    assert [item.example.user for item in cache.pending(routed[2].id).selection.chosen] == ["bob"]
    assert cache.prepare(cache.pending(routed[2].id), "small", [{"role": "user", "content": "q"}])[0][
        "content"
    ].endswith("bob")
    assert [lesson.user for lesson in cache._lessons] == []  # both had seen ann's example
    assert cache.router.critic.buffer.owner_N[:2] == [("t", "bob"), ("", "")]
    assert {row["user"] for row in cache.log.rows} == {"bob"}
    held = pickle.dumps((cache.state(), list(cache._lessons), cache.log.rows, list(cache._pending.values())))
    assert b"of ann" not in held
    assert b"of bob" in held
    assert cache.forget(tenant="t") == 1
    held = pickle.dumps((cache.state(), list(cache._lessons), cache.log.rows, list(cache._pending.values())))
    assert b"xyzzy" not in held


def test_erasure_by_id():
    cache = make()
    teach(cache, "red"), teach(cache, "blue")
    assert cache.forget(ids=[0, 77]) == 1
    assert [example.id for example in cache.pool] == [1]


def test_an_expired_example_is_not_shown():
    clock = Clock()
    cache = make(clock=clock)
    teach(cache, "red")
    clock.now += 29 * 86400
    assert cache.select("paint red", "small").ids == (0,)
    clock.now += 2 * 86400
    assert cache.select("paint red", "small").ids == ()
    assert cache.tick().expired == 1


# Another embedder


def test_another_dimension_is_refused_or_the_pool_is_embedded_anew():
    cache = make()
    teach(cache, "red")
    wide = Hashed.Config(dim=64).build()
    cache.embed = wide.embed
    with pytest.raises(InputError, match=r"shape \[64\], the pool's have 128 numbers"):
        cache.vector(Query(text="paint red"))
    assert cache.generate(["paint red"])[0].routed.selection.chosen == ()  # bypassed
    assert cache.metrics.value("ic_cache_bypass_total", stage="embedder") == 1
    cache.config = cache.config.replace(on_new_dim="reindex")
    assert cache.select("paint red", "small").ids == (0,)
    assert cache.pool.index.dim == cache.router.dim == 64
    assert cache.metrics.value("ic_cache_reindexed_total") == 1
    force(cache, "small")
    assert cache.generate(["paint red"])[0].text == "paint 0"


def test_no_vector_and_no_embedder():
    cache = make(embed=None, dim=128)
    assert (
        cache.generate([Query(text="paint red", vector_D=EMBEDDER.embed(["paint red"])[0])])[0].routed.x_I is not None
    )
    assert cache.generate(["paint red"])[0].arm == "large"
    assert cache.metrics.value("ic_cache_bypass_total", stage="embedder") == 1
    with pytest.raises(InputError, match="needs embed"):
        make(embed=None)


# Learning


def test_ratings_reach_examples_tau_proxy_and_bandit():
    config = ICCache.Config(
        pool=ExamplePool.Config(domains=("",), trust={"large": 1}),
        index=Exact.Config(),
        router=Router.Config(critic=CRITIC),
        threshold=Threshold.Config(share=1.0, grid=(0.3,), start=0.3, min_count=1),
        refit_after=3,
        example_weight=0.0,
    )
    cache = make(config=config)
    teach(cache, "red")
    for _ in range(3):
        routed = cache.route("paint red")
        cache.answered(routed.id, "small")
        cache.feedback(routed.id, score=0.8)
    example = cache.pool.get(0)
    assert (example.uses, example.rated) == (3, 3)
    assert example.helped == pytest.approx(2.4)
    assert example.offloads == 3
    assert cache.threshold.sum_T[0] == pytest.approx(3 * (0.8 - 0.1))
    assert not cache.selector.proxy.is_fitted
    assert cache.tick().expired == 0
    assert cache.selector.proxy.is_fitted
    assert cache.selector.proxy.score(cache.select("paint red", "small").pairs)[0] == pytest.approx(0.8, abs=0.05)
    large = cache.route("paint red")
    cache.answered(large.id, "large")
    cache.feedback(large.id, score=0.1)
    assert (example.uses, example.rated) == (3, 3)  # the large arm was shown nothing


def test_windows_drop_examples_and_what_was_dropped_is_not_credited():
    cache = make()
    cache.arms["small"] = Arm(name="small", cost=0.1, ask=Model(True), context=60)
    for colour in WORDS[:3]:
        teach(cache, colour)
    cache.selector.config = cache.selector.config.replace(min_similarity=-1.0)
    cache.threshold.config = Threshold.Config(grid=(0.0,), start=0.0, share=0.0)
    cache.threshold.__init__(cache.threshold.config)
    routed = cache.route("paint red")
    assert len(routed.selection.chosen) == 3
    built = cache.prepare(routed, "small", [{"role": "user", "content": "paint red"}])
    assert len(built) == 3
    assert [item.example.request for item in cache.pending(routed.id).selection.chosen] == ["paint red"]
    assert len(cache.pending(routed.id).selection.pairs) == 1


def test_replay_through_the_cache_betters_answers_off_peak():
    large = Model()
    config = make().config.replace(manager=Manager.Config(min_gain=0.0))
    cache = make(config=config, large=large, rate=lambda request, answer: float(answer.startswith("paint")))
    cache.update_cache(["paint red"], ["dunno"])
    done = cache.tick()
    assert (done.replayed, done.bettered) == (1, 1)
    assert cache.pool.get(0).response == "paint 0"
    cache.router.load.value = 0.9
    assert cache.tick().replayed == 0
    assert cache.metrics.value("ic_cache_replays_total") == 1


def test_state_reads_back_and_answers_the_same():
    cache = make()
    random = np.random.default_rng(0)
    for _ in range(60):
        response = cache.generate([f"paint {random.choice(WORDS)}"])[0]
        cache.feedback(response.routed.id, score=float(response.text != "what?"))
    cache.refit()
    arrays, facts = cache.state()
    other = make()
    other.load_state({k: v.copy() for k, v in arrays.items()}, json.loads(json.dumps(facts)))
    for colour in WORDS:
        ours, theirs = cache.route(f"paint {colour}"), other.route(f"paint {colour}")
        assert [(i.example.id, i.utility) for i in ours.selection.chosen] == [
            (i.example.id, i.utility) for i in theirs.selection.chosen
        ]
        np.testing.assert_array_equal(ours.choice.mu_M, theirs.choice.mu_M)


def test_same_seed_same_decisions():
    def run(seed):
        cache = make(config=make().config.replace(seed=seed, router=Router.Config(critic=CRITIC, explore=0.5)))
        return [cache.generate([f"paint {colour}"])[0].arm for colour in WORDS * 6]

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_pending_decisions_are_bounded():
    cache = make(config=make().config.replace(pending=3))
    ids = [cache.route("paint red").id for _ in range(5)]
    assert [cache.pending(id) is not None for id in ids] == [False, False, True, True, True]


def test_config_reads_back_and_refuses():
    config = ICCache.Config(index=Exact.Config(), proxy=Logistic.Config(penalty=2.0), style="block")
    assert from_dict(ICCache.Config, json.loads(json.dumps(to_dict(config)))) == config
    with pytest.raises(ConfigError, match="style"):
        ICCache.Config(style="poem")
    with pytest.raises(InputError, match="2 arms with 2 costs"):
        ICCache(config, arms=[Arm(name="a", cost=1.0)] * 2, dim=4)


# Numbers


def test_counters_write_prometheus_text():
    counters = Counters()
    counters.count("b_total", 2, arm='x"y\\z\n')
    counters.count("b_total", arm='x"y\\z\n')
    counters.gauge("a", 0.5)
    assert counters.text() == '# TYPE a gauge\na 0.5\n# TYPE b_total counter\nb_total{arm="x\\"y\\\\z\\n"} 3\n'
    assert Counters().text() == ""


def test_counters_of_the_cache_parse_as_prometheus():
    parser = pytest.importorskip("prometheus_client.parser")
    cache = make()
    cache.generate(["paint red"] * 3)
    cache.tick()
    families = {family.name for family in parser.text_string_to_metric_families(cache.metrics.text())}
    assert {"ic_cache_requests", "ic_cache_pool_examples", "ic_cache_admissions"} <= families
