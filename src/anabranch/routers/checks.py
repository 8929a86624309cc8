"""The contract of strategies: what every one, ours and anyone's, must do. `anabranch.testing` gives it out as ``check_strategy``.

    from anabranch.testing import check_strategy

    def test_contract():
        check_strategy(MyStrategy.Config())

A predictor's config is checked as `Ranked` by it. Each check runs on small made outcomes and raises AssertionError that says what
is broken.
"""
# Shapes: N queries, M models, D dimensions of a vector

import asyncio
import dataclasses
import functools
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np

from anabranch.config import Config, from_dict, to_dict
from anabranch.errors import AnabranchError, DataError, InputError
from anabranch.routers.contract.ask import Ask
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.knobs import LAMBDA
from anabranch.routers.contract.predictor import Predictor, Ranked
from anabranch.routers.contract.query import Decision, Model, Outcome, Pool, Query
from anabranch.routers.contract.strategy import Played, Strategy
from anabranch.routers.money import Price

DIM = 12
FRUIT = ("apples", "pears", "figs")
MODELS = ("small", "middle", "large", "odd")
PRICES = (0.1, 0.4, 1.5, 0.4)  # dollars per million tokens

# Of scores: a product of one row is summed in another order than of many.
TOLERANCE = 1e-4


def made_outcomes(num_rows: int = 160, *, seed: int = 0) -> Recorded:
    """Outcomes with all there can be: scores that depend on the vector, costs, tasks, tokens, latencies, answers and signals of them."""
    rng = np.random.default_rng(seed)
    # The same for every seed.
    world = np.random.default_rng(7)
    vector_ND = rng.standard_normal((num_rows, DIM)).astype(np.float32)
    vector_ND /= np.linalg.norm(vector_ND, axis=1, keepdims=True)
    chance_NM = 1 / (1 + np.exp(-5 * vector_ND @ world.standard_normal((DIM, len(MODELS))) - [-0.5, 0.0, 0.8, 0.0]))
    score_NM = (rng.random(chance_NM.shape) < chance_NM).astype(float)
    tokens_NM2 = np.stack(
        (np.repeat(rng.integers(10, 200, (num_rows, 1)), len(MODELS), 1), rng.integers(20, 400, chance_NM.shape)),
        axis=2,
    ).astype(float)
    noise_NM = rng.normal(0, 0.2, chance_NM.shape)
    task = tuple("abc"[int(at)] for at in (vector_ND[:, :3]).argmax(1))
    texts = [
        f"question {row} of kind {task[row]}: how many {FRUIT[row % 3]} are {row % 7} + {row % 5}?"
        for row in range(num_rows)
    ]
    said = ("I am not sure", "yes")
    return Recorded(
        query=tuple(texts),
        models=MODELS,
        score_NM=score_NM,
        cost_NM=tokens_NM2.sum(2) * np.array(PRICES) / 1e6,
        task=task,
        tokens_NM2=tokens_NM2,
        latency_NM=0.5 + rng.random(chance_NM.shape) * [1, 2, 4, 2],
        vector_ND=vector_ND,
        answers=tuple(
            {name: f"{name} says {said[int(right)]}" for name, right in zip(MODELS, row, strict=True)}
            for row in score_NM
        ),
        signals={
            "logprob": -0.8 + 0.5 * score_NM + noise_NM,
            "entropy": 0.8 - 0.5 * score_NM - noise_NM,
            "quantile": -1.5 + score_NM + noise_NM,
            "votes": np.clip(np.round((0.3 + 0.4 * score_NM + noise_NM) * 8), 0, 8) / 8,
            "agreement": np.clip(np.round((0.4 + 0.5 * score_NM + noise_NM) * 3), 1, 3) / 3,
        },
    )


def made_pool(names: tuple[str, ...] = MODELS, **changes: Any) -> Pool:
    """Models with prices; names that are not of the made outcomes cost a dollar a million tokens."""
    price = dict(zip(MODELS, PRICES, strict=True))
    return Pool(
        tuple(
            Model(name=name, price=Price.of_dollars(price.get(name, 1.0), price.get(name, 1.0)), **changes)
            for name in names
        )
    )


def check_strategy(
    config: Config,
    *,
    decides: bool = True,
    plays: bool = True,
    ask: Ask | None = None,
) -> None:
    """The contract of the families ``strategy`` and ``predictor``.

    Args:
        config: of a strategy, or of a predictor. Small sizes keep the check quick.
        decides: it routes live queries; False for what only plays recorded outcomes.
        plays: it plays recorded outcomes.
        ask: how it asks models, where it does; a `Program` is run with it too.
    """
    checks = _Checks(config, decides, plays, ask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checks.config()
        checks.untrained()
        fitted = checks.fit(made_outcomes())
        if decides:
            checks.decisions(fitted)
            checks.pools(fitted)
            checks.vectors(fitted)
            checks.observations(fitted)
            checks.sender_knobs(fitted)
            checks.sharing()
        checks.saving(fitted)
        if plays:
            checks.playing(fitted)
            checks.knob(fitted)
        checks.odd_data()


class _Checks:
    def __init__(self, config: Any, decides: bool, plays: bool, ask: Ask | None) -> None:
        is_predictor = issubclass(config.owner, Predictor)
        self.kind = config.owner.kind
        self.given = Ranked.Config(predictor=config) if is_predictor else config
        self.decides, self.plays, self.ask = decides, plays, ask
        self.test = made_outcomes(40, seed=1)
        self.query = next(self.test.queries())

    def build(self) -> Strategy:
        strategy: Strategy = self.given.build()
        return strategy

    def route(self, strategy: Strategy, query: Query, pool: Pool) -> Decision:
        """What it decides, having asked where it asks."""
        if type(strategy).aroute is Strategy.aroute:
            return strategy.route(query, pool)
        _is(self.ask is not None, "it asks models to decide; give check_strategy an ask")
        return asyncio.run(strategy.aroute(query, pool, cast(Ask, self.ask)))

    def fit(self, data: Recorded, seed: int = 0) -> Strategy:
        strategy = self.build()
        _is(strategy.fit(data, seed=seed) is strategy, "fit does not return the strategy")
        return strategy

    def config(self) -> None:
        if self.kind is not None:
            self.readable()
        strategy = self.build()
        _is(isinstance(strategy, Strategy), f"the config builds {type(strategy).__name__}, which is no Strategy")
        _is(isinstance(strategy.name, str) and strategy.name != "", "it has no name")

    def readable(self) -> None:
        """What is registered reads back from the name it is registered under."""
        read = from_dict(type(self.given), json.loads(json.dumps(to_dict(self.given))))
        _is(read == self.given, "the config does not read back equal from JSON")

    def untrained(self) -> None:
        if self.decides and self.build().needs_fit:
            _refuses(lambda: self.route(self.build(), self.query, made_pool()), InputError, "route before fit")

    def decisions(self, fitted: Strategy) -> None:
        twin = self.fit(made_outcomes())
        for query in list(self.test.queries())[:10]:
            for pool in (made_pool(), made_pool(MODELS[::-1]), made_pool(is_available=False)):
                decision = self.route(fitted, query, pool)
                _check_decision(decision, pool)
                _is(
                    _chosen(decision) == _chosen(self.route(twin, query, pool)),
                    "fitted twice on the same data with the same seed, it decides differently",
                )
            if type(fitted).aroute is Strategy.aroute:
                facts = fitted.explain(query, made_pool())
                _is(json.loads(json.dumps(facts)) is not None, "explain is not ready for JSON")
                twin.explain(query, made_pool())
        if fitted.reads_answers:
            self.answers(fitted)

    def answers(self, fitted: Strategy) -> None:
        candidates = self.route(fitted, self.query, made_pool()).candidates
        for details in (
            {},
            {"logprobs": {"content": [{"logprob": -0.1, "top_logprobs": []}]}},
            {"samples": ["yes", "no"]},
        ):
            for candidate in candidates:
                said = fitted.accept(self.query, candidate.model, "an answer", details)
                _is(isinstance(said, bool | np.bool_), f"accept says {said!r}, not whether")
            fitted.accept(self.query, candidates[0].model, "", details)
        fitted.accept(self.query, "a model nobody knows", "an answer", {})

    def pools(self, fitted: Strategy) -> None:
        one = self.route(fitted, self.query, made_pool(("small", "large")))
        _is(set(_names(one)) <= {"small", "large"}, "it routes to a model outside the pool")
        models = [
            dataclasses.replace(model, is_available=model.name != one.model)
            for model in made_pool(("small", "large")).models
        ]
        other = self.route(fitted, self.query, Pool(tuple(models)))
        _is(other.model != one.model or len(_names(one)) == 1, "it prefers a model that is not available")
        _check_decision(self.route(fitted, self.query, made_pool((*MODELS, "new"))), made_pool((*MODELS, "new")))
        for name in ("large", "new"):
            try:
                decision = self.route(fitted, self.query, made_pool((name,)))
            except InputError as error:
                _is(name in str(error), f"the error for a pool of {name!r} alone does not name it: {error}")
            else:
                _is(_names(decision) == [name], f"of a pool of {name!r} alone it chose {decision.model!r}")

    def vectors(self, fitted: Strategy) -> None:
        if not fitted.needs_vector:
            _check_decision(
                self.route(fitted, dataclasses.replace(self.query, vector_D=None), made_pool()), made_pool()
            )
            return
        for vector_D in (None, np.ones(DIM + 1, np.float32)):
            odd = dataclasses.replace(self.query, vector_D=vector_D)
            what = "a missing vector" if vector_D is None else "a vector of another length"
            _refuses(functools.partial(self.route, fitted, odd, made_pool()), InputError, what)

    def observations(self, fitted: Strategy) -> None:
        learner = self.fit(made_outcomes())
        before = self.route(fitted, self.query, made_pool())
        for row, query in enumerate(self.test.queries()):
            decision = self.route(learner, query, made_pool())
            for fields in (
                {"quality": 1.0, "cost": 1e-4},
                {"latency_s": 1.0},
                {"succeeded": False},
                {"quality": float(row % 2)},
            ):
                learner.observe(Outcome(query=query, model=decision.model, decision=decision, **fields))
        learner.observe(
            Outcome(query=dataclasses.replace(self.query, vector_D=None), model="a model nobody knows", quality=0.5)
        )
        _check_decision(self.route(learner, self.query, made_pool()), made_pool())
        twin = self.build()
        twin.load_state(*_through_json(learner))
        _is(
            _chosen(self.route(twin, self.query, made_pool())) == _chosen(self.route(learner, self.query, made_pool())),
            "read back after it observed, it decides differently",
        )
        kept = _copied(learner.state()[0])
        twin.observe(Outcome(query=self.query, model="small", quality=1.0, cost=1e-4))
        _is(_same(kept, learner.state()[0]), "what a strategy read back observes changes the one it was saved from")
        _is(
            _names(before) == _names(self.route(self.fit(made_outcomes()), self.query, made_pool())),
            "learning of one changes another",
        )

    def sharing(self) -> None:
        """Where it adds up, two that hear of each other know what one does that was told all."""
        alone = self.fit(made_outcomes())
        if not alone.adds_up:
            return
        pair = [self.fit(made_outcomes()) for _ in range(2)]
        for one in pair:
            one.hear({}, {})
        for row, query in enumerate(self.test.queries()):
            outcome = Outcome(
                query=query, model=MODELS[row % len(MODELS)], quality=float(row % 3 == 0), cost=1e-4 * row
            )
            alone.observe(outcome)
            pair[row % 2].observe(outcome)
        parts = [_through_json_part(one) for one in pair]
        for one, part in zip(pair, parts[::-1], strict=True):
            one.hear(*one.joined([part]))
            ours, theirs = (
                self.route(one, self.query, made_pool()).candidates,
                self.route(alone, self.query, made_pool()).candidates,
            )
            _is(
                [item.model for item in ours] == [item.model for item in theirs],
                "what two of it observed does not add up to the same",
            )
            near = all(abs(a.score - b.score) < TOLERANCE for a, b in zip(ours, theirs, strict=True))
            _is(near, "what two of it observed does not add up to the same scores")
        first, before = pair[0], [item.score for item in self.route(pair[0], self.query, made_pool()).candidates]
        first.disown(*parts[0])
        first.hear(*first.joined(parts))
        after = [item.score for item in self.route(first, self.query, made_pool()).candidates]
        near = len(before) == len(after) and all(abs(a - b) < TOLERANCE for a, b in zip(before, after, strict=True))
        _is(near, "what it let go of and heard again is not what it was")

    def saving(self, fitted: Strategy) -> None:
        arrays, facts = _through_json(fitted)
        _is(
            all(isinstance(array, np.ndarray) and array.dtype.kind in "biuf" for array in arrays.values()),
            "state holds what is no plain array",
        )
        twin = self.build()
        twin.load_state(arrays, facts)
        again = twin.state()
        _is(
            _same(arrays, again[0]) and json.loads(json.dumps(again[1])) == facts,
            "state, read back and saved again, differs",
        )
        same = self.fit(made_outcomes())
        _is(
            _same(arrays, _copied(same.state()[0])),
            "fitted twice on the same data with the same seed, its state differs",
        )
        if self.decides:
            for query in self.test.queries():
                _is(
                    _chosen(self.route(twin, query, made_pool())) == _chosen(self.route(fitted, query, made_pool())),
                    "read back, it decides differently",
                )
        if self.plays:
            played = fitted.play(self.test, made_pool()), twin.play(self.test, made_pool())
            _is(
                np.array_equal(played[0].model_N, played[1].model_N)
                and np.array_equal(played[0].cost_N, played[1].cost_N),
                "read back, it plays differently",
            )

    def playing(self, fitted: Strategy) -> None:
        state = _copied(fitted.state()[0])
        played = fitted.play(self.test, made_pool())
        _check_played(played, self.test)
        _is(_same(state, fitted.state()[0]), "playing changes what it learned")
        twice = fitted.play(self.test, made_pool())
        _is(np.array_equal(played.model_N, twice.model_N), "playing twice gives different choices")
        narrow = fitted.play(self.test, made_pool(("small", "large")))
        _is(set(narrow.model_N.tolist()) <= {0, 2}, "playing, it chooses models outside the pool")
        _check_played(fitted.play(self.test.take([3]), made_pool()), self.test.take([3]))
        if isinstance(fitted, Ranked):
            self.as_routed(fitted, played)

    def as_routed(self, fitted: Ranked, played: Played) -> None:
        """Playing all at once chooses as routing one by one, but for ties in rounding."""
        quality_NM = fitted.predictor.predict(self.test).quality_NM
        for row, query in enumerate(self.test.queries()):
            at = fitted.predictor.models.index(self.route(fitted, query, made_pool()).model)
            chosen = fitted.predictor.models.index(self.test.models[played.model_N[row]])
            _is(
                abs(quality_NM[row, at] - quality_NM[row, chosen]) < TOLERANCE,
                f"row {row} is routed otherwise than it is played",
            )
        _is(
            np.allclose(
                quality_NM.max(1),
                quality_NM[
                    np.arange(len(quality_NM)),
                    [fitted.predictor.models.index(self.test.models[at]) for at in played.model_N],
                ],
            ),
            "without a trade-off it does not take the largest quality",
        )

    def sender_knobs(self, fitted: Strategy) -> None:
        for name in fitted.sender_knobs:
            for odd in ("x", "-1", "nan", ""):
                query = replace(self.query, knobs={name: odd})
                try:
                    fitted.route(query, made_pool())
                except InputError:
                    continue
                _is(False, f"the knob {name} is set to {odd!r}, and nobody says that this is no number")
        if LAMBDA in fitted.sender_knobs:
            _is(fitted.knob == "trade_off", "it reads lambda, which is the trade-off, and has none")

    def knob(self, fitted: Strategy) -> None:
        values = list(fitted.knobs(made_outcomes()))
        if fitted.knob is None:
            _is(not values, "it has values of a knob, and no knob")
            return
        _is(all(np.isfinite(value) for value in values), "a value of the knob is not finite")
        if len(values) < 2:
            return
        before = fitted.play(self.test, made_pool())
        dear, cheap = (fitted.with_knob(values[at]) for at in (0, -1))
        _is(getattr(dear.config, fitted.knob) == values[0], f"with_knob does not set {fitted.knob}")
        spent = [one.play(self.test, made_pool()).cost_N.mean() for one in (dear, cheap)]
        _is(
            spent[1] <= spent[0] * 1.02,
            f"the last value of the knob spends {spent[1]:.3g}, the first {spent[0]:.3g}: they must run from dear to cheap",
        )
        _is(
            np.array_equal(fitted.play(self.test, made_pool()).model_N, before.model_N),
            "with_knob changes the strategy it was asked of",
        )
        if isinstance(fitted, Ranked):
            cost_NM = fitted.predictor.predict(self.test).cost_NM
            cost_NM = np.broadcast_to(fitted.cost_M if cost_NM is None else cost_NM, self.test.score_NM.shape)
            choice_N = [
                fitted.predictor.models.index(self.test.models[at])
                for at in fitted.with_knob(1e12).play(self.test, made_pool()).model_N
            ]
            _is(
                np.allclose(cost_NM[np.arange(len(cost_NM)), choice_N], cost_NM.min(1)),
                "with an endless trade-off it does not take the cheapest",
            )

    def odd_data(self) -> None:
        data = made_outcomes()
        rng = np.random.default_rng(3)
        holes_NM = np.where(rng.random(data.score_NM.shape) < 0.3, np.nan, data.score_NM)
        lacking_NM = data.score_NM.copy()
        lacking_NM[:, 1] = np.nan
        cases = {
            "holes in the scores": dataclasses.replace(data, score_NM=holes_NM),
            "a model without scores": dataclasses.replace(data, score_NM=lacking_NM),
            "constant scores": dataclasses.replace(data, score_NM=np.full(data.score_NM.shape, 0.5)),
            "scores on another scale": dataclasses.replace(data, score_NM=data.score_NM * 100 - 30),
            "one model": data.only(["large"]),
            "two models": data.only(["small", "large"]),
            "one row": data.take([0]),
            "the same row again": data.take([0] * 30),
            "no costs": dataclasses.replace(data, cost_NM=None),
            "no tasks": dataclasses.replace(data, task=(None,) * len(data)),
            "neither answers nor signals": dataclasses.replace(data, answers=(), signals={}),
            "no rows": data.take([]),
            "no scores": dataclasses.replace(data, score_NM=np.full(data.score_NM.shape, np.nan)),
            "no vectors": dataclasses.replace(data, vector_ND=None),
        }
        for case, odd in cases.items():
            try:
                fitted = self.fit(odd)
                if self.decides:
                    decision = self.route(fitted, self.query, made_pool(odd.models))
                    _check_decision(decision, made_pool(odd.models))
                if self.plays:
                    test = self.test.only(odd.models)
                    _check_played(fitted.play(test, made_pool(odd.models)), test)
                    if odd.cost_NM is not None and fitted.knob is not None:
                        _is(
                            all(np.isfinite(value) for value in fitted.knobs(odd)),
                            f"{case}: a value of the knob is not finite",
                        )
            except (DataError, InputError) as error:
                _is(len(str(error)) > 20, f"{case}: the error says only {error}")
            except AnabranchError as error:
                raise AssertionError(
                    f"{case}: {type(error).__name__}; data that cannot be learned from are a DataError"
                ) from error
            except AssertionError as error:
                raise AssertionError(f"{case}: {error}") from error
            except Exception as error:
                raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error


def _check_decision(decision: Decision, pool: Pool) -> None:
    names = _names(decision)
    _is(len(names) > 0, "a decision has no candidate")
    _is(len(set(names)) == len(names), f"a decision names a model twice: {names}")
    _is(set(names) <= set(pool.names), f"a decision names {sorted(set(names) - set(pool.names))}, not in the pool")
    scores = [candidate.score for candidate in decision.candidates]
    _is(
        bool(np.isfinite(scores).all()) and scores == sorted(scores, reverse=True),
        f"scores are not finite and falling: {scores}",
    )
    _is(bool(decision.strategy) and bool(decision.reason), "a decision names no strategy, or gives no reason")
    _is(decision.confidence is None or 0 <= decision.confidence <= 1, f"confidence is {decision.confidence}")
    chance = decision.probability
    _is(chance is None or 0 < chance <= 1, f"probability is {chance}; it must be above 0 and at most 1, or None")
    _is(json.loads(json.dumps(dict(decision.details), allow_nan=False)) is not None, "details are not ready for JSON")


def _check_played(played: Played, data: Recorded) -> None:
    rows = np.arange(len(data))
    _is(
        played.model_N.shape == (len(data),) and played.calls_NM.shape == data.score_NM.shape,
        "what was played has other shapes than the data",
    )
    _is(
        np.array_equal(played.quality_N, data.score_NM[rows, played.model_N], equal_nan=True),
        "qualities are not those of the chosen models",
    )
    _is(bool(played.calls_NM[rows, played.model_N].all()), "the model whose answer was given was not asked")
    if data.cost_NM is not None:
        asked_N = np.where(played.calls_NM, data.cost_NM, 0).sum(1)
        _is(bool((played.cost_N >= asked_N * (1 - 1e-9)).all()), "a call is not counted in the cost")


def _chosen(decision: Decision) -> Any:
    """What must agree between twins; details may tell of caches."""
    return decision.candidates, decision.confidence


def _names(decision: Decision) -> list[str]:
    return [candidate.model for candidate in decision.candidates]


def _through_json(strategy: Strategy) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """State as a file keeps it."""
    arrays, facts = strategy.state()
    return _copied(arrays), json.loads(json.dumps(facts, allow_nan=False))


def _through_json_part(strategy: Strategy) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Its part as a store keeps it."""
    arrays, facts = strategy.part()
    return _copied(arrays), json.loads(json.dumps(facts, allow_nan=False))


def _copied(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in arrays.items()}


def _same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(
        np.asarray(first[name]).dtype == np.asarray(second[name]).dtype
        and np.array_equal(first[name], second[name], equal_nan=first[name].dtype.kind == "f")
        for name in first
    )


def _refuses(call: Callable[[], Any], error: type[Exception], what: str) -> None:
    try:
        call()
    except error:
        return
    except Exception as other:
        raise AssertionError(f"{what} raises {type(other).__name__}, not {error.__name__}: {other}") from other
    raise AssertionError(f"{what} is not refused")


def _is(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
