import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.config import from_dict, to_dict
from anabranch.errors import ConfigError, InputError
from anabranch.routers import strategies
from anabranch.routers.checks import check_strategy
from anabranch.routers.coe.choice import MapKind, largest_trade_off, table_for
from anabranch.routers.coe.predictor import CompositionOfExperts
from anabranch.routers.coe.quality import table_of_scores
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.predictor import Prediction, Predictor, Ranked
from anabranch.routers.contract.query import Model, Outcome, Pool, Query
from anabranch.routers.money import Price

SIZES = {"tiny": 1.0, "maths": 7.0, "poet": 8.0, "giant": 70.0}
MODELS = tuple(SIZES)
# of each category: how often each model is right; whoever sees only means would ask giant
RIGHT = {"maths": (0.2, 0.9, 0.1, 0.8), "poem": (0.2, 0.1, 0.9, 0.8), "chat": (0.7, 0.6, 0.6, 0.75)}


def made(num_rows=600, *, seed=0, spread=0.25, tasks=True, dim=12):
    """Prompts of three kinds and the answers' scores, 0 or 1."""
    generator, names = np.random.default_rng(seed), list(RIGHT)
    centre_CD = np.random.default_rng(99).normal(size=(3, dim))
    class_N = generator.integers(0, 3, num_rows)
    vector_ND = centre_CD[class_N] / np.linalg.norm(centre_CD[class_N], axis=1, keepdims=True)
    vector_ND = vector_ND + generator.normal(0, spread, vector_ND.shape)
    vector_ND /= np.linalg.norm(vector_ND, axis=1, keepdims=True)
    right_NM = np.array([RIGHT[names[at]] for at in class_N])
    return Recorded(
        query=tuple(f"{names[at]} {row}" for row, at in enumerate(class_N)),
        models=MODELS,
        score_NM=(generator.random(right_NM.shape) < right_NM).astype(float),
        task=tuple(names[at] for at in class_N) if tasks else (),
        vector_ND=vector_ND.astype(np.float32),
    )


def pool(**sizes):
    return Pool(tuple(Model(name=name, parameters=size) for name, size in (sizes or SIZES).items()))


def fitted(data=None, **fields):
    return strategies.make("coe", **{"parameters": SIZES, "head": "knn", **fields}).fit(data or made())


DATA = made()
HELD = made(1500, seed=1)
PART = HELD.take(range(200))


def score(router, at=None):
    return float(router.play(HELD, at or pool()).quality_N.mean())


def first(router, category, at=None, **query):
    """The decision on the held-out prompt of a category that the router is surest of."""
    rows = [row for row, task in enumerate(HELD.task) if task == category]
    confidence = router.predictor.router.predict(HELD.vector_ND).confidence_N
    row = max(rows, key=lambda row: confidence[row])
    return router.route(Query(text=HELD.query[row], vector_D=HELD.vector_ND[row], **query), at or pool())


# What it does


def test_each_category_goes_to_its_expert():
    router = fitted()
    assert [first(router, name).model for name in RIGHT] == ["maths", "poet", "giant"]
    best_single = HELD.score_NM[:, MODELS.index("giant")].mean()
    assert score(router) > best_single + 0.03  # 0.85 expected against 0.78, sd of a mean of 1,500 is 0.01


@pytest.mark.parametrize("head", ["logreg", "mlp"])
def test_other_heads_and_clusters(head):
    by_task = score(fitted())
    assert score(fitted(head=head)) > by_task - 0.03
    assert score(fitted(made(tasks=False), head=head)) > by_task - 0.04
    assert fitted(categories="clusters", num_clusters=5).predictor.router.categories == tuple(
        f"cluster-0{number}" for number in range(5)
    )


def test_details_say_why():
    details = first(fitted(abstain_rate=0.05), "maths").details
    assert json.loads(json.dumps(details)) == details
    assert (details["category"], details["expert"], details["abstained"]) == ("maths", "maths", False)
    assert details["hosted"] == ["maths", "poet", "giant"]
    assert 0.9 < details["confidence"] <= 1
    assert max(details["likely"], key=details["likely"].get) == "maths"


def test_budget_is_kept_and_hosts_are_all_that_is_asked():
    router = fitted(budget_params=16.0)
    assert [first(router, name).model for name in RIGHT] == ["maths", "poet", "tiny"]
    assert {item.model for item in first(router, "chat").candidates} == {"tiny", "maths", "poet"}  # 1 + 7 + 8 = 16
    router = fitted(budget_params=15.0)
    assert {item.model for name in RIGHT for item in first(router, name).candidates} == {"maths", "poet"}
    assert sum(SIZES[name] for name in router.predictor.plan().map.chosen) <= 15
    with pytest.raises(InputError, match=r"the smallest that does is 1$"):
        first(fitted(budget_params=0.5, map="plain"), "maths")


def test_trade_off_and_active_parameters():
    free, priced, dear = fitted(), fitted(trade_off_params=0.002), fitted(trade_off_params=0.5)
    assert first(priced, "chat").model == "tiny"  # 0.05 for 69 billion is below 0.002 each
    assert first(priced, "maths").model == "maths"
    assert {first(dear, name).model for name in RIGHT} == {"tiny"}
    assert fitted(active_params=10.0).predictor.plan().map.active <= 10
    active = [router.predictor.plan().map.active for router in (free, priced, dear)]
    assert active == sorted(active, reverse=True)
    assert len(fitted(max_experts=2).predictor.plan().map.chosen) == 2


def test_automatic_trade_off_stays_at_the_best_single():
    auto = fitted(trade_off_params="auto")
    assert auto.predictor.trade_off > 0
    assert auto.predictor.plan().map.active < 20  # giant has 70
    assert score(auto) > HELD.score_NM.mean(0).max() - 0.04


def test_fallbacks_follow_the_table_within_the_hosts():
    decision = first(fitted(), "maths")
    assert [item.model for item in decision.candidates][:2] == ["maths", "giant"]
    assert {item.model for item in decision.candidates} == set(MODELS)
    hosted = first(fitted(max_experts=3), "maths")  # tiny serves no category
    assert [item.model for item in hosted.candidates] == ["maths", "giant", "poet"]
    qualities = [item.quality for item in hosted.candidates]
    assert qualities == pytest.approx([0.9, 0.8, 0.1], abs=0.1)
    scores = [item.score for item in decision.candidates]
    assert scores == sorted(scores, reverse=True)
    names = {
        name: replace(model, is_available=name != "maths") for name, model in zip(SIZES, pool().models, strict=True)
    }
    assert first(fitted(), "maths", Pool(tuple(names.values()))).model == "giant"


def test_map_beats_the_order_of_values_where_a_limit_says_so():
    """Within A = 30 one of two categories must give giant up although it is better there; what the map says comes first."""
    router = fitted(active_params=30.0, map="plain")
    found = router.predictor.plan().map
    for name in RIGHT:
        assert first(router, name).model == found[name]


def test_unsure_prompts_go_to_the_general_model():
    router = fitted(abstain_rate=0.2)
    share = np.mean([router.route(query, pool()).details["abstained"] for query in PART.queries()])
    assert 0.1 < share < 0.3
    unsure = next(d for q in HELD.queries() if (d := router.route(q, pool())).details["abstained"])
    assert (unsure.details["category"], unsure.model) == ("general", "giant")
    empty = router.route(Query(text="", vector_D=np.zeros(12, np.float32)), pool())
    assert (empty.details["category"], empty.confidence) == ("general", 0.0)


def test_a_task_may_be_called_general():
    data = replace(DATA, task=tuple("general" if name == "chat" else name for name in DATA.task))
    router = fitted(data, abstain_rate=0.1)
    assert router.predictor.plan().map["general"] == "giant"
    assert set(router.predictor.plan().map.choice) == {"general", "maths", "poem"}
    assert score(router) > 0.75


def test_knobs_of_the_sender():
    router = fitted()
    assert first(router, "chat", knobs={"trade_off_params": "0.002"}).model == "tiny"
    assert first(router, "maths", knobs={"budget_params": "8"}).model in ("maths", "poet", "tiny")
    assert first(router, "maths", knobs={"min_confidence": "1"}).details["abstained"]
    assert first(router, "maths").model == "maths"  # the next sender's are not changed
    with pytest.raises(InputError, match="budget_params is 'much'"):
        first(router, "maths", knobs={"budget_params": "much"})
    with pytest.raises(InputError, match=r"budget of 0.1 .* the smallest that does is 1$"):
        first(router, "maths", knobs={"budget_params": "0.1"})


# Pools


def test_sizes_come_from_the_pool_and_may_change():
    router = strategies.make("coe", head="knn", budget_params=80.0).fit(DATA)  # no sizes known at fit time
    hosted = first(router, "maths").details["hosted"]
    assert hosted in (["maths", "giant"], ["poet", "giant"])  # one of the specialists beside the giant: 77 or 78
    shrunk = pool(**{**SIZES, "giant": 20.0})
    assert [first(router, name, shrunk).model for name in RIGHT] == ["maths", "poet", "giant"]
    with pytest.raises(InputError, match="how many parameters 'giant' has is not known"):
        first(router, "maths", Pool((*pool().models[:3], Model(name="giant"))))


def test_models_that_leave_the_pool_are_replaced():
    router = fitted()
    without = pool(**{name: size for name, size in SIZES.items() if name != "maths"})
    assert first(router, "maths", without).model == "giant"
    assert router.play(HELD, without).calls_NM[:, MODELS.index("maths")].sum() == 0
    assert first(router, "maths").model == "maths"
    with pytest.raises(InputError, match="knows none of the models other; it learned of tiny, maths"):
        first(router, "maths", pool(other=3.0))


def test_prices_settle_ties():
    data = replace(DATA, score_NM=np.ones(DATA.score_NM.shape))
    same = dict.fromkeys(SIZES, 5.0)
    router = fitted(data, parameters=same, prices={"tiny": 2.0, "maths": 2.0, "poet": 1.0, "giant": 2.0})
    assert router.route(next(HELD.queries()), pool(**same)).model == "poet"
    priced = [
        Model(name=name, parameters=5.0, price=Price.of_dollars(3 if name != "giant" else 0.5, 0)) for name in SIZES
    ]
    assert router.route(next(HELD.queries()), Pool(tuple(priced))).model == "giant"


def test_one_by_one_equals_all_at_once():
    for fields in (
        {},
        {"budget_params": 16.0, "abstain_rate": 0.1},
        {"trade_off_params": 0.002},
        {"active_params": 30.0},
    ):
        router = fitted(**fields)
        one_by_one = [router.route(query, pool()).model for query in PART.queries()]
        assert one_by_one == [MODELS[at] for at in router.play(PART, pool()).model_N]


# New experts, feedback


def test_new_expert_is_a_new_column():
    old = DATA.only(["tiny", "poet", "giant"])
    router = fitted(old)
    assert first(router, "maths").model == "giant"
    before = router.predictor.router.distribution(HELD.vector_ND)
    router.predictor.add_experts(made(200, seed=3).only(["maths"]))
    assert first(router, "maths").model == "maths"
    assert first(router, "poem").model == "poet"
    assert np.array_equal(before, router.predictor.router.distribution(HELD.vector_ND))
    with pytest.raises(InputError, match="'tiny' is known already"):
        router.predictor.add_experts(DATA)


def tell(router, category, model, quality, times):
    row = HELD.task.index(category)
    query = Query(text="q", vector_D=HELD.vector_ND[row])
    for _ in range(times):
        router.observe(Outcome(query=query, model=model, quality=quality))


def test_feedback_moves_the_map_only_when_it_is_sure():
    router = fitted(refresh_every=10)
    tell(router, "chat", "tiny", 1.0, 10)  # on top of 0.7 in about 200: not surely above giant's 0.75
    assert first(router, "chat").model == "giant"
    tell(router, "chat", "giant", 0.0, 200)
    assert first(router, "chat").model == "tiny"
    tell(router, "maths", "stranger", 1.0, 50)  # a model that was never learned of
    router.observe(Outcome(query=Query(text="q", vector_D=HELD.vector_ND[0]), model="tiny"))  # no score
    assert first(router, "maths").model == "maths"
    still = fitted(refresh_every=0)
    tell(still, "chat", "giant", 0.0, 300)
    assert first(still, "chat").model == "giant"
    still.predictor.refresh()
    assert first(still, "chat").model == "tiny"


# Several processes


def heard(count, seed=0):
    """Scores of answers, as somebody gives them."""
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, len(HELD), count)
    return [
        Outcome(
            query=Query(text="q", vector_D=HELD.vector_ND[row]),
            model=MODELS[generator.integers(4)],
            quality=float(generator.random()),
        )
        for row in rows
    ]


def same_table(one, other):
    ours, theirs = (router.predictor._table for router in (one, other))
    assert (ours.categories, ours.experts) == (theirs.categories, theirs.experts)
    for name in ("quality_CE", "count_CE", "variance_CE", "mean_E"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-9)


@given(st.integers(0, 40), st.integers(2, 4), st.integers(0, 9), st.booleans())
@settings(max_examples=15, deadline=None)
def test_several_that_hear_of_one_another_have_the_table_of_one_that_was_told_all(count, num, seed, lets_go):
    alone, *several = (FITTED() for _ in range(num + 1))
    some, owner = heard(count, seed), np.random.default_rng(seed).integers(0, num, count)
    for outcome, whose in zip(some, owner, strict=True):
        alone.observe(outcome)
        several[whose].observe(outcome)
    parts = [one.part() for one in several]
    for at, one in enumerate(several):
        mine = one.joined([part for other, part in enumerate(parts) if other != at])
        for _ in range(2):
            one.hear(*mine)  # in the place of what it heard before
        if lets_go and at == 0:
            one.disown(*parts[0])
            one.hear(*one.joined(parts))
    alone.predictor.refresh()
    for one in several:
        one.predictor.refresh()
        same_table(one, alone)
    if lets_go:
        assert several[0].predictor.own.cells == {}


def FITTED():
    """Fitted once, read back each time."""
    made = strategies.make("coe", head="knn", parameters=SIZES)
    made.load_state(*_STATE)
    return made


_STATE = fitted().state()


def test_what_others_heard_makes_the_map_anew_once_it_is_enough():
    told, hears = (fitted(refresh_every=150) for _ in range(2))
    tell(told, "chat", "giant", 0.0, 149)
    hears.hear(*told.part())
    assert first(hears, "chat").model == "giant"
    tell(told, "chat", "giant", 0.0, 51)
    hears.hear(*told.part())
    assert first(hears, "chat").model == first(told, "chat").model == "tiny"


def test_parts_that_do_not_fit_are_refused_and_change_nothing():
    router = fitted()
    tell(router, "chat", "tiny", 1.0, 3)
    arrays, facts = router.part()
    before = json.dumps(router.state()[1])
    for bad in (
        ({}, {"cells": []}),
        (arrays, {"cells": [["nowhere", "tiny"]]}),
        (arrays, {"cells": [["chat", "tiny"], ["chat", "giant"]]}),
        ({"sums_K3": np.array([[0.0, 0.0, 0.0]])}, facts),
        ({"sums_K3": np.array([[1.0, np.nan, 0.0]])}, facts),
        ({"sums_K3": np.zeros((2, 3)) + 1}, {"cells": [["chat", "tiny"], ["chat", "tiny"]]}),
    ):
        with pytest.raises(InputError):
            router.hear(*bad)
    with pytest.raises(InputError, match="not among those"):
        router.disown({"sums_K3": np.array([[4.0, 4.0, 4.0]])}, facts)
    assert json.dumps(router.state()[1]) == before


def test_scores_that_an_older_version_wrote_one_by_one_are_read():
    router = fitted(refresh_every=0)
    arrays, facts = router.state()
    del facts["fresh"]
    router.load_state(arrays, {**facts, "heard": [["chat", "giant", 0.0]] * 300})
    assert first(router, "chat").model == "giant"
    router.predictor.refresh()
    assert first(router, "chat").model == "tiny"


# Kind of map


def test_kind_is_chosen_by_validation_and_can_be_fixed():
    assert fitted(map="plain").predictor.kind_of_map == MapKind(kind="plain", m=0.0)
    assert fitted(map="aware", shrinkage=7.0).predictor.kind_of_map == MapKind(kind="aware", m=7.0)
    # Labels that say nothing: what a prompt is taken for does not either, and only the means are left to choose by.
    generator = np.random.default_rng(0)
    noise = replace(DATA, task=tuple(generator.choice(["x", "y"], len(DATA))))
    assert score(fitted(noise)) == pytest.approx(HELD.score_NM[:, 3].mean(), abs=0.02)


def test_largest_trade_off_by_hand():
    """One category; the small model scores 0.5 as the big one does, so any lambda keeps the best single's score."""
    score_NM = np.tile([[1.0, 0.0], [0.0, 1.0]], (20, 1))
    value = largest_trade_off(
        score_NM,
        ("small", "big"),
        ["x"] * 40,
        ["x"] * 40,
        {"small": 1.0, "big": 9.0},
        CompositionOfExperts.Config().build()._limits(0.0),
        kind=MapKind(kind="plain", m=0.0),
        prices={},
        folds=2,
        seed=0,
    )
    assert value == 0.0  # the map never changes: the small one is chosen at once
    score_NM = np.tile([[1.0, 0.9]], (40, 1))
    value = largest_trade_off(
        score_NM,
        ("big", "small"),
        ["x"] * 40,
        ["x"] * 40,
        {"small": 1.0, "big": 9.0},
        CompositionOfExperts.Config().build()._limits(0.0),
        kind=MapKind(kind="plain", m=0.0),
        prices={},
        folds=2,
        seed=0,
    )
    assert value == 0.0  # above 0.1 / 8 the small one would be taken, and lose


def test_rows_without_outcomes_are_filled_from_the_means():
    table = table_of_scores(["x"], np.array([[1.0, 0.5]]), ["a", "b"], categories=["x", "never"])
    assert table_for(table, MapKind(kind="aware", m=20.0)).quality_CE[1].tolist() == [1.0, 0.5]


# State, configs, bad input


@pytest.mark.parametrize("head", ["knn", "logreg", "mlp"])
def test_state_reads_back_to_the_bit(head):
    router = fitted(head=head, abstain_rate=0.1, budget_params=78.0, trade_off_params="auto")
    tell(router, "chat", "tiny", 1.0, 3)
    arrays, facts = router.state()
    facts = json.loads(json.dumps(facts))
    twin = strategies.make(
        "coe", **{name: value for name, value in to_dict(router.config.predictor).items() if name != "kind"}
    )
    twin.load_state(arrays, facts)
    for query in list(HELD.queries())[:50]:
        assert twin.route(query, pool()) == router.route(query, pool())
    router.predictor.refresh()
    twin.predictor.refresh()
    assert twin.predictor.plan().map == router.predictor.plan().map


def test_same_seed_same_decisions():
    first_one, second = (strategies.make("coe", head="mlp", parameters=SIZES).fit(DATA, seed=5) for _ in range(2))
    assert np.array_equal(first_one.play(HELD, pool()).model_N, second.play(HELD, pool()).model_N)


def test_config_reads_back():
    config = CompositionOfExperts.Config(trade_off_params="auto", parameters=SIZES, min_confidence=0.3)
    ranked = Ranked.Config(predictor=config)
    assert from_dict(Ranked.Config, json.loads(json.dumps(to_dict(ranked)))) == ranked


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trade_off_params": -0.1}, "trade_off_params is -0.1"),
        ({"trade_off_params": "some"}, "trade_off_params"),
        ({"budget_params": -1.0}, "budget_params is -1"),
        ({"min_confidence": 1.5}, "min_confidence is 1.5"),
        ({"abstain_rate": 1.0}, "abstain_rate is 1"),
        ({"map": "best"}, "map is 'best'"),
        ({"folds": 1}, "folds is 1"),
    ],
)
def test_fields_that_may_not_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        CompositionOfExperts.Config(**fields)


def test_what_may_not_be():
    with pytest.raises(InputError, match="learns from vectors"):
        fitted(replace(DATA, vector_ND=None))
    with pytest.raises(InputError, match="no recorded query has a task"):
        fitted(made(tasks=False), categories="task")
    with pytest.raises(InputError, match="'auto' needs the size of every model; add 'maths'"):
        fitted(parameters={"tiny": 1.0}, trade_off_params="auto")
    with pytest.raises(InputError, match="vectors have 3 dimensions"):
        fitted().route(Query(text="q", vector_D=np.ones(3, np.float32)), pool())
    with pytest.raises(InputError, match="has not learned yet"):
        strategies.make("coe").route(Query(text="q", vector_D=np.ones(3, np.float32)), pool())


def test_unknown_scores_and_few_rows():
    holes = DATA.score_NM.copy()
    holes[np.random.default_rng(0).random(holes.shape) < 0.5] = np.nan
    holes[:, 0] = np.nan  # never asked
    router = fitted(replace(DATA, score_NM=holes))
    assert "tiny" not in {first(router, name).model for name in RIGHT}
    assert score(router) > 0.75
    few = fitted(DATA.take(range(6)))
    assert first(few, "maths").model in MODELS
    assert fitted(DATA.take([0])).route(next(HELD.queries()), pool()).model in MODELS


def test_some_tasks_may_be_unknown():
    some = replace(DATA, task=tuple(name if row % 4 == 0 else None for row, name in enumerate(DATA.task)))
    router = fitted(some)
    assert score(router) > score(fitted()) - 0.03


# The seam


class Two(Predictor):
    """Says 0.9 of a and 0.8 of b, with 0.2 against a."""

    needs_vector = False

    def __init__(self, penalty=True):
        super().__init__(Predictor.Config())
        self.models, self.penalty, self.met = ("a", "b"), penalty, []

    def meet(self, pool):
        self.met.append(pool.names)

    def predict(self, data):
        rows = np.ones((len(data), 1))
        penalty_NM = rows * [[0.2, 0.0]] if self.penalty else None
        return Prediction(quality_NM=rows * [[0.9, 0.8]], penalty_NM=penalty_NM)


@pytest.mark.parametrize(("penalty", "wanted"), [(True, "b"), (False, "a")])
def test_penalties_order_models_but_do_not_change_what_is_expected(penalty, wanted):
    router = Ranked(Ranked.Config(predictor=CompositionOfExperts.Config()), Two(penalty))
    router.cost_M, router.completion_M = np.full(2, np.nan), np.full(2, np.nan)
    at = Pool((Model(name="c"), Model(name="b"), Model(name="a")))
    decision = router.route(Query(text="q"), at)
    assert decision.model == wanted
    assert {item.model: item.quality for item in decision.candidates} == {"a": 0.9, "b": 0.8}
    data = Recorded(query=("q",), models=("a", "b"), score_NM=np.array([[1.0, 0.5]]))
    assert router.play(data, Pool(at.models[1:])).model_N.tolist() == [("a", "b").index(wanted)]
    assert router.predictor.met == [("c", "b", "a"), ("b", "a")]


@pytest.mark.parametrize(
    "fields", [{}, {"head": "knn", "abstain_rate": 0.1}, {"categories": "clusters", "map": "aware"}]
)
def test_contract(fields):
    check_strategy(CompositionOfExperts.Config(**fields))


@pytest.mark.parametrize("value", ["1.5", "-1", "nan"])
def test_a_confidence_that_nobody_can_have_is_refused(value):
    router = fitted()
    with pytest.raises(InputError, match=r"min_confidence is '.*'; it must be a number from 0 to 1"):
        first(router, "maths", knobs={"min_confidence": value})
    # Sizes have no such bound.
    first(router, "maths", knobs={"budget_params": "100"})
