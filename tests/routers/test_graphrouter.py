"""GraphRouter end to end on made data: fitting, deciding, models that join, learning on, saving, what it is told and refuses."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest

from anabranch.config import from_dict, to_dict
from anabranch.errors import ConfigError, DataError, InputError
from anabranch.routers import strategies
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.predictor import Ranked
from anabranch.routers.contract.query import Model, Outcome, Pool, Query
from anabranch.routers.graphrouter import GraphRouter
from anabranch.routers.graphrouter.settings import Training
from anabranch.routers.money import Price
from anabranch.testing import check_strategy

MODES = ("reference", "mean", "hetero", "plus")
TASKS, D = ("maths", "code", "poems"), 12
GOOD = np.array([[0.9, 0.2, 0.3], [0.2, 0.9, 0.3], [0.3, 0.3, 0.9], [0.55, 0.55, 0.55]])  # of models at tasks
PRICE = np.array([1.0, 1.0, 1.0, 4.0]) * 1e-4
MODELS = ("mathematician", "coder", "poet", "large")


def made(count=240, seed=0, models=MODELS, missing=0.0, noise=0.15):
    """Queries near one of three directions; each model is good at a task, the last at none and dear."""
    rng = np.random.default_rng(seed)
    task = np.arange(count) % 3
    x = np.eye(3, D)[task] + noise * rng.normal(size=(count, D))
    good = GOOD[[MODELS.index(name) for name in models]]
    score = np.clip(good[:, task].T + 0.1 * rng.normal(size=(count, len(models))), 0, 1)
    score[rng.uniform(size=score.shape) < missing] = np.nan
    cost = PRICE[[MODELS.index(name) for name in models]] * rng.uniform(0.8, 1.2, size=(count, 1))
    texts = tuple(f"question {seed} {row} of {TASKS[task[row]]}" for row in range(count))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return Recorded(
        query=texts, models=models, score_NM=score, cost_NM=cost, task=tuple(TASKS[t] for t in task), vector_ND=x
    )


def config(mode="plus", **fields):
    training = {"steps": 5, "draws": 1, "lr": 0.05}
    plus = {"centres": 8, "neighbours": 10, "episodes": {"steps": 10}, **fields.pop("plus", {})}
    return from_dict(GraphRouter.Config, {"kind": "graph", "mode": mode, "training": training, "plus": plus, **fields})


_FITTED = {}
LONG = Training(steps=120, draws=1, lr=0.05)
SLOW = Training(
    steps=300, draws=1, lr=0.01
)  # the reference's form forgets a task at larger steps, which one depends on the machine


def fitted(mode="plus", **fields):
    """A router of its own, the training done once."""
    key = mode, repr(fields)
    if key not in _FITTED:
        _FITTED[key] = (
            config(mode, **fields).replace(training=SLOW if mode == "reference" else LONG).build().fit(made())
        )
    return copy(_FITTED[key])


def copy(router):
    other = router.config.build()
    other.models = router.models
    arrays, facts = router.state()
    other.load_state({name: value.copy() for name, value in arrays.items()}, facts)
    return other


def same(one, other):
    """Whether arrays are the same to the bit."""
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and value.tobytes() == other[name].tobytes() for name, value in one.items()
    )


def query(data, row=0, **fields):
    return Query(text=data.query[row], task=data.task[row], vector_D=data.vector_ND[row], **fields)


# Fitting and deciding


@pytest.mark.parametrize("mode", MODES)
def test_it_sends_each_task_to_the_model_that_is_good_at_it(mode):
    test = made(90, seed=1)
    choice = fitted(mode).utilities(test).argmax(1)
    assert test.score_NM[np.arange(90), choice].mean() > (0.75 if mode in ("plus", "hetero") else 0.6)


@pytest.mark.parametrize("mode", MODES)
def test_one_and_many_queries_agree(mode):
    router, test = fitted(mode), made(6, seed=2)
    table = router.predict(test)
    for row in range(6):
        one = router.predict_one(query(test, row))
        assert one.quality_NM[0] == pytest.approx(table.quality_NM[row], abs=1e-5)
        assert one.cost_NM[0] == pytest.approx(table.cost_NM[row], rel=1e-4)


def test_plus_predicts_scores_and_dollars():
    test = made(60, seed=3)
    found = fitted().predict(test)
    assert np.abs(found.quality_NM - test.score_NM).mean() < 0.12
    assert np.abs(found.cost_NM / test.cost_NM - 1).mean() < 0.25
    assert ((found.confidence_N > 0.5) & (found.confidence_N <= 1)).all()


def test_the_trade_off_is_said_when_a_query_comes():
    router, test = fitted(), made(3, seed=4, noise=0.0)
    dear = router.models.index("large")
    free, careful = router.utilities(test), router.utilities(test, trade_off=1.0)
    others = [at for at in range(4) if at != dear]
    assert (free[:, dear] - careful[:, dear] > (free - careful)[:, others].max(1) + 0.5).all()
    assert router.decide(query(test), trade_off=0.0) == "mathematician"
    with pytest.raises(InputError, match="only 'plus' takes a trade_off"):
        fitted("mean").utilities(test, trade_off=1.0)


def test_scenarios_of_the_paper_change_what_is_learned():
    test = made(60, seed=5)
    cheap = config("mean", scenario="cost").replace(training=LONG).build().fit(made()).utilities(test).argmax(1)
    assert (cheap != MODELS.index("large")).all()


@pytest.mark.parametrize("mode", MODES)
def test_same_seed_same_router(mode):
    data = made(60)
    one, other = (config(mode).build().fit(data, seed=3) for _ in range(2))
    assert same(one.state()[0], other.state()[0])


@pytest.mark.parametrize("mode", MODES)
def test_missing_scores_and_costs(mode):
    data = made(150, missing=0.4)
    router = config(mode).build().fit(data)
    assert np.isfinite(router.predict(made(9, seed=6)).quality_NM).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("costs", [None, "constant", "unknown"])
def test_costs_that_say_nothing(mode, costs):
    data = made(60)
    cost = {"constant": np.full((60, 4), 1e-3), "unknown": np.full((60, 4), np.nan)}.get(costs)
    data = Recorded(
        query=data.query,
        models=data.models,
        score_NM=data.score_NM,
        cost_NM=cost,
        task=data.task,
        vector_ND=data.vector_ND,
    )
    found = config(mode).build().fit(data).predict(data)
    assert np.isfinite(found.quality_NM).all()
    if costs == "constant":
        assert found.cost_NM == pytest.approx(np.full((60, 4), 1e-3))
    else:
        assert np.isnan(found.cost_NM).all()


@pytest.mark.parametrize("mode", MODES)
def test_one_model_one_task_one_query(mode):
    data = made(1, models=("poet",))
    router = config(mode).build().fit(data)
    assert router.decide(query(data)) == "poet"
    none = config(mode, task="none").build().fit(made(30))
    assert none.tasks.names == ("",)
    assert np.isfinite(none.predict(made(3, seed=7)).quality_NM).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_model_without_a_single_score_is_never_chosen(mode):
    data = made(60)
    score = data.score_NM.copy()
    score[:, 1] = np.nan
    data = Recorded(
        query=data.query,
        models=data.models,
        score_NM=score,
        cost_NM=data.cost_NM,
        task=data.task,
        vector_ND=data.vector_ND,
    )
    router = config(mode).build().fit(data)
    found = router.predict(made(6, seed=8)).quality_NM
    assert (found[:, 1] == -np.inf).all()
    assert np.isfinite(found[:, [0, 2, 3]]).all()


def test_duplicates_are_not_parted_and_constant_scores_are_fine():
    data = made(40)
    twice = Recorded(
        query=data.query * 2,
        models=data.models,
        score_NM=np.full((80, 4), 0.5),
        cost_NM=np.tile(data.cost_NM, (2, 1)),
        task=data.task * 2,
        vector_ND=np.tile(data.vector_ND, (2, 1)),
    )
    for mode in MODES:
        assert np.isfinite(config(mode).build().fit(twice).predict(data).quality_NM).all()


def test_whose_word_is_taken_for_the_task():
    test = made(3, seed=9, noise=0.0)
    asked = query(test, 0)  # near maths
    lied = Query(text=asked.text, task="poems", vector_D=asked.vector_D)
    unknown = Query(text=asked.text, task="never seen", vector_D=asked.vector_D)
    told, given = fitted(task="predicted"), fitted(task="given")
    assert (told.predict_one(asked).quality_NM == told.predict_one(lied).quality_NM).all()
    assert next(iter(given.explain(lied)["task"])) == "poems"
    assert next(iter(given.explain(unknown)["task"])) == "maths"
    assert not np.allclose(given.predict_one(asked).quality_NM, given.predict_one(lied).quality_NM)


def test_validation_costs_have_no_part_in_the_scale():
    data = made(80)
    from anabranch.routers.data.splits import groups
    from anabranch.routers.graphrouter.graph import hold_out
    from anabranch.routers.graphrouter.nodes import Tasks

    place = Tasks.fit(data.vector_ND, data.task)[0].index(data.task)
    held = hold_out(groups(data), place, 0.125, 0)
    assert held.any()
    cost = np.where(held[:, None], 1e6, data.cost_NM)
    other = Recorded(
        query=data.query,
        models=data.models,
        score_NM=data.score_NM,
        cost_NM=cost,
        task=data.task,
        vector_ND=data.vector_ND,
    )
    one, two = (config(plus={"episodes": {"steps": 0}}).build().fit(rows) for rows in (data, other))
    assert (one.costs.scale.low_T == two.costs.scale.low_T).all()
    assert (one.costs.scale.span_T == two.costs.scale.span_T).all()


def test_descriptions_and_vectors_of_descriptions():
    data = made(60)
    texts = {"coder": "writes and mends programs", "poet": "writes verse"}
    described = (
        config(descriptions=texts, task_descriptions={"code": "programs"}, embedder={"kind": "hashed", "dim": 64})
        .build()
        .fit(data)
    )
    assert described.description_dim == 64
    vectors = {name: np.eye(4, dtype=np.float32)[at] for at, name in enumerate(MODELS)}
    given = config("mean").build().fit(data, model_vectors=vectors, task_vectors={"code": np.ones(3)})
    assert given.description_dim == 4
    with pytest.raises(InputError, match="4 and 5 dimensions"):
        given.add_llm("new", vector=np.ones(5))


# Models that join


def shots(name, count, seed=11, models_like=None, stored=False):
    data = made(240 if stored else count, seed=0 if stored else seed)
    data = data.take(np.random.default_rng(seed).permutation(len(data))[:count])
    column = MODELS.index(models_like)
    return Recorded(
        query=data.query,
        models=(name,),
        score_NM=data.score_NM[:, [column]].copy(),
        cost_NM=data.cost_NM[:, [column]],
        task=data.task,
        vector_ND=data.vector_ND,
    )


@pytest.mark.parametrize("stored", [False, True])
def test_a_model_that_is_good_at_one_thing_is_used_for_it(stored):
    known = ("coder", "poet", "large")
    router = config().build().fit(made(models=known))
    before = {name: value.copy() for name, value in router.state()[0].items() if name.startswith("l.")}
    test = made(60, seed=12)
    maths = np.array(test.task) == "maths"
    old = router.utilities(test).argmax(1)
    router.add_llm("mathematician", "", None, shots("mathematician", 60, models_like="mathematician", stored=stored))
    assert router.models == (*known, "mathematician")
    choice = router.utilities(test).argmax(1)
    assert (choice[maths] == 3).mean() > 0.8
    assert (choice[~maths] == 3).mean() < 0.1
    assert (choice[~maths] == old[~maths]).mean() > 0.9
    assert same(
        before, {name: value for name, value in router.state()[0].items() if name in before}
    )  # nothing was trained again


def test_the_lower_confidence_bound_keeps_a_stranger_out_until_it_has_shown_itself():
    router = fitted()
    test = made(60, seed=13)
    lucky = shots("stranger", 3, models_like="poet")
    lucky.score_NM[:] = 1.0  # three good answers
    router.add_llm("stranger", shots=lucky)
    careful = router.utilities(test).argmax(1)
    router.engine.config = router.engine.config.replace(safety=0.0)
    trusting = router.utilities(test).argmax(1)
    assert (careful == 4).mean() < (trusting == 4).mean()
    unknown = fitted()
    unknown.add_llm("nobody", "never seen")
    assert (unknown.utilities(test).argmax(1) != 4).all()


def test_a_bad_model_is_not_used():
    router, test = fitted(), made(60, seed=14)
    bad = shots("bad", 30, models_like="poet")
    bad.score_NM[:] = 0.05
    before = router.utilities(test)
    router.add_llm("bad", shots=bad)
    after = router.utilities(test)
    assert (after.argmax(1) == before.argmax(1)).all()
    assert (after[:, :4] == before).all()  # others are as they were
    assert router.predict(test).quality_NM[:, 4].mean() < 0.2


@pytest.mark.parametrize("mode", MODES)
def test_models_join_in_every_mode_with_and_without_shots(mode):
    router, test = fitted(mode), made(9, seed=15)
    before = router.predict(test).quality_NM
    router.add_llm("unseen", "a description that nobody else has")
    router.add_llm("seen", shots=shots("seen", 20, models_like="poet"))
    found = router.predict(test)
    assert found.quality_NM.shape == found.cost_NM.shape == (9, 6)
    assert np.isfinite(found.quality_NM).all()
    if mode == "hetero":  # new queries move the nodes of their tasks
        assert found.quality_NM[:, :4] == pytest.approx(before, abs=0.05)
    else:
        assert (found.quality_NM[:, :4] == before).all()


def test_what_a_new_model_costs():
    router = fitted(prices={name: Price.of_dollars(1, 1) for name in MODELS})
    test = made(9, seed=16)
    router.add_llm("twice", price=Price.of_dollars(2, 2))
    found = router.predict(test).cost_NM
    assert found[:, 4] == pytest.approx(2 * found[:, :4].mean(1), rel=1e-5)
    router.add_llm("paid", price=Price.of_dollars(2, 2), shots=shots("paid", 50, models_like="large"))
    found = router.predict(test).cost_NM
    assert found[:, 5] == pytest.approx(found[:, 3], rel=0.15)


def test_models_join_after_those_kept_room_for():
    router, test = fitted(), made(4, seed=17)
    for number in range(12):
        router.add_llm(f"new {number}", shots=shots(f"new {number}", 10, models_like="poet"))
    assert router.predict(test).quality_NM.shape == (4, 16)
    assert copy(router).predict(test).quality_NM == pytest.approx(router.predict(test).quality_NM, abs=0)


def test_joining_is_refused():
    router = fitted()
    with pytest.raises(InputError, match="'coder' is in the graph already"):
        router.add_llm("coder")
    with pytest.raises(InputError, match="no model 'other'"):
        router.add_llm("other", shots=shots("new", 5, models_like="poet"))
    data = shots("new", 5, models_like="poet")
    with pytest.raises(InputError, match="vector"):
        router.add_llm("new", shots=Recorded(query=data.query, models=data.models, score_NM=data.score_NM))
    assert router.models == MODELS  # nothing joined halfway


# Learning on


@pytest.mark.parametrize("mode", ["reference", "mean"])
def test_an_observed_edge_is_as_if_it_had_been_there(mode):
    """The sums of a graph that grew are those of one that was read at once."""
    data, router = made(240), fitted(mode)
    new = made(30, seed=18)
    grown, read = copy(router), copy(router)
    for row in range(30):
        column = row % 4
        grown.observe(outcome(new, row, column))
    only = np.full((30, 4), np.nan)
    only[np.arange(30), np.arange(30) % 4] = 1
    share = router.tasks.told(new.vector_ND)
    scaled = router.costs.scaled(new.cost_NM * only, share)
    read.engine.add(new.vector_ND, share, new.score_NM * only, scaled)
    assert grown.engine.encoding.model_MH == pytest.approx(read.engine.encoding.model_MH, abs=1e-4)
    assert grown.edges_M.sum() == data.score_NM.size + 30


def outcome(data, row, column, quality=None, model=None, cost=None):
    score = float(data.score_NM[row, column]) if quality is None else quality
    return Outcome(
        query=query(data, row),
        model=model or MODELS[column],
        quality=score,
        cost=float(data.cost_NM[row, column]) if cost is None else cost,
    )


def test_a_model_that_became_good_is_found_out():
    router, test = fitted(), made(30, seed=19)
    stream = made(300, seed=20)
    large = MODELS.index("large")
    for row in range(300):
        router.observe(outcome(stream, row, large, quality=1.0))
    before, after = fitted().predict(test).quality_NM, router.predict(test).quality_NM
    assert (after[:, large] > before[:, large] + 0.2).all()
    assert after[:, :large] == pytest.approx(before[:, :large], abs=0.12)


@pytest.mark.parametrize("mode", MODES)
def test_what_teaches_nothing_changes_nothing(mode):
    router, test = fitted(mode), made(4, seed=21)
    before = router.state()[0]
    before = {name: value.copy() for name, value in before.items()}
    asked = query(test)
    for nothing in (
        Outcome(query=asked, model="coder"),
        Outcome(query=asked, model="not known", quality=1.0),
        Outcome(query=Query(text="no vector"), model="coder", quality=1.0),
    ):
        router.observe(nothing)
    assert same(before, router.state()[0])


def test_a_newcomer_learns_from_outcomes():
    router, stream, test = fitted(), made(200, seed=22), made(30, seed=23)
    router.add_llm("newcomer", "")
    start = router.predict(test).quality_NM[:, 4]
    for row in range(200):
        router.observe(outcome(stream, row, 0, quality=0.97, model="newcomer"))
    found = router.predict(test).quality_NM[:, 4]
    assert (found > start).all()
    assert found.mean() == pytest.approx(0.97, abs=0.1)
    assert (router.utilities(test).argmax(1) == 4).mean() > 0.8


def test_memory_is_bounded_and_what_was_fitted_stays():
    router = fitted(plus={"capacity": 10})
    held = router.engine.memory.fitted.edge_N4C.copy()
    stream = made(43, seed=24)
    for row in range(43):
        router.observe(outcome(stream, row, row % 4))
    observed = router.engine.memory.observed.near
    assert len(observed) == 10
    assert observed.vector_ND[[3, 4, 9, 0, 2]] == pytest.approx(stream.vector_ND[[33, 34, 39, 40, 42]])
    assert (router.engine.memory.fitted.edge_N4C == held).all()
    assert same(router.state()[0], copy(router).state()[0])


def test_curiosity_makes_models_seldom_seen_count_for_more():
    data = made(120, missing=0.0)
    score = data.score_NM.copy()
    score[5:, 3] = np.nan  # the last model was asked five times
    data = Recorded(
        query=data.query,
        models=data.models,
        score_NM=score,
        cost_NM=data.cost_NM,
        task=data.task,
        vector_ND=data.vector_ND,
    )
    plain, curious = (config(plus={"explore": explore}).build().fit(data) for explore in (0.0, 2.0))
    gain = (curious.predict(data).quality_NM - plain.predict(data).quality_NM).mean(0)
    assert gain[3] > 1.5 * gain[:3].max()
    assert (gain > 0).all()


# Explaining, saving, routing


def test_an_explanation_names_nearest_queries_and_edges():
    router, test = fitted(), made(3, seed=25, noise=0.0)
    facts = router.explain(query(test))
    assert next(iter(facts["task"])) == "maths"
    assert facts["edges"] == dict.fromkeys(MODELS, 240)
    assert len(facts["neighbours"]) == 5
    for near in facts["neighbours"]:
        assert near["query"].startswith("question 0")
        assert near["query"] == made().query[near["row"]]
        assert near["similarity"] > 0.5
        assert near["edges"]["mathematician"] > 0 > near["edges"]["coder"]
    router.observe(outcome(test, 0, 0))
    first = next(near for near in router.explain(query(test))["neighbours"] if near["row"] >= 240)
    assert first["similarity"] == pytest.approx(1, abs=1e-5)
    assert first["query"] == ""  # what was observed is not kept as text
    assert list(first["edges"]) == ["mathematician"]
    assert "neighbours" not in fitted("mean").explain(query(test))
    assert fitted(text_length=0).texts == ()


@pytest.mark.parametrize("exact_below", [2000, 100])
@pytest.mark.parametrize("mode", MODES)
def test_state_comes_back_to_the_bit(mode, exact_below):
    if mode != "plus" and exact_below == 100:
        pytest.skip("only plus stores queries")
    router, test, stream = fitted(mode, plus={"exact_below": exact_below}), made(9, seed=26), made(12, seed=27)
    router.add_llm("new", shots=shots("new", 15, models_like="poet"), price=Price.of_dollars(1, 2))
    for row in range(6):
        router.observe(outcome(stream, row, row % 4))
    router.observe(outcome(stream, 6, 0, model="new"))
    other = copy(router)
    assert same(router.state()[0], other.state()[0])
    for step in range(7, 12):  # and both go on alike
        for made_from in (router, other):
            made_from.observe(outcome(stream, step, 1, model="new" if step % 2 else None))
        one, two = router.predict(test), other.predict(test)
        assert (one.quality_NM == two.quality_NM).all()
        assert (one.cost_NM == two.cost_NM).all()


def test_by_name_behind_a_strategy_and_on_disk(tmp_path):
    from anabranch.routers.fitted import FittedRouter

    strategy = strategies.make("graph", plus=config().plus, trade_off=0.0).fit(made())
    assert isinstance(strategy, Ranked)
    test = made(3, seed=28, noise=0.0)
    pool = Pool(tuple(Model(name=name) for name in (*MODELS, "elsewhere")))
    decision = strategy.route(query(test, 1), pool)
    assert decision.model == "coder"
    assert len(decision.candidates) == 4
    assert decision.details["neighbours"]
    dear = Query(text="x", vector_D=test.vector_ND[1], knobs={"lambda": "100000"})
    assert strategy.route(dear, pool).candidates[-1].model == "large"
    strategy.predictor.add_llm("elsewhere", shots=shots("elsewhere", 30, models_like="poet"))
    assert len(strategy.route(query(test, 1), pool).candidates) == 5
    assert strategy.play(made(9, seed=29), pool).quality_N.shape == (9,)
    FittedRouter(strategy=strategy, models=pool.models).save(tmp_path / "router.safetensors")
    back = FittedRouter.load(tmp_path / "router.safetensors")
    assert back.strategy.route(query(test, 1), pool) == strategy.route(query(test, 1), pool)


def test_configs_read_back():
    made_config = config(descriptions={"a": "b"}, prices={"a": Price.of_dollars(1, 2)})
    assert from_dict(GraphRouter.Config, to_dict(made_config)) == made_config


def test_deciding_needs_no_torch(tmp_path):
    from anabranch.routers.fitted import FittedRouter

    for mode in ("plus", "hetero"):
        strategy = Ranked.Config(predictor=config(mode)).build().fit(made(60))
        FittedRouter(strategy=strategy, models=tuple(Model(name=name) for name in MODELS)).save(
            tmp_path / f"{mode}.safetensors"
        )
    code = """
        import sys
        import numpy as np
        from anabranch.routers.contract.query import Query
        from anabranch.routers.fitted import FittedRouter
        for mode in ("plus", "hetero"):
            router = FittedRouter.load(sys.argv[1] + f"/{mode}.safetensors")
            print(router.strategy.route(Query(text="x", vector_D=np.eye(12, dtype=np.float32)[0]), router.pool).model)
        assert "torch" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# Refusals


def test_before_fitting():
    router = config().build()
    with pytest.raises(InputError, match="fit it on recorded outcomes first"):
        router.predict(made(3))
    with pytest.raises(InputError, match="fit it"):
        router.add_llm("new")
    router.observe(Outcome(query=query(made(3)), model="coder", quality=1.0))  # of a model that it does not know


def test_data_that_cannot_be_learned_from():
    data = made(6)
    with pytest.raises(DataError, match="at least one query"):
        config().build().fit(data.take([]))
    with pytest.raises(DataError, match="embed them first"):
        config().build().fit(Recorded(query=data.query, models=data.models, score_NM=data.score_NM))
    with pytest.raises(DataError, match="lack them"):
        config().build().fit(
            Recorded(query=data.query, models=data.models, score_NM=np.full((6, 4), np.nan), vector_ND=data.vector_ND)
        )
    spoiled = data.with_vectors(np.where(np.arange(6)[:, None] == 2, np.nan, data.vector_ND))
    with pytest.raises(DataError, match="row 2"):
        config().build().fit(spoiled)


def test_queries_that_cannot_be_placed():
    router = fitted()
    with pytest.raises(InputError, match="12 dimensions and was given 5"):
        router.predict_one(Query(text="x", vector_D=np.ones(5, np.float32)))
    with pytest.raises(InputError, match="vector"):
        router.predict_one(Query(text="x"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "graph"}, "mode is 'graph'"),
        ({"scenario": "cost"}, "mode 'plus' has none"),
        ({"validation": 1.0}, "validation is 1.0"),
        ({"hidden": 0}, "hidden is 0"),
        ({"plus": {"safety": -1.0}}, "plus.safety is -1.0"),
        ({"training": {"mask_rate": 1.0}}, "mask_rate is 1.0"),
    ],
)
def test_configs_that_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(GraphRouter.Config, {"kind": "graph", **fields})


def test_an_empty_table():
    for mode in MODES:
        assert fitted(mode).predict(made(3).take([])).quality_NM.shape == (0, 4)


# The contract of strategies


@pytest.mark.parametrize("mode", MODES)
def test_contract(mode):
    check_strategy(config(mode))


@pytest.mark.parametrize(
    "fields",
    [
        {"task": "given"},
        {"task": "none", "validation": 0.0},
        {"plus": {"exact_below": 20, "capacity": 3, "explore": 0.5}},
        {"plus": {"centres": 500, "neighbours": 500, "episodes": {"steps": 3, "most_queries": 20}}},
    ],
)
def test_contract_with_options(fields):
    check_strategy(config(**fields))
