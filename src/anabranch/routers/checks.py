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
import time
import warnings
from dataclasses import replace
from typing import Any, cast

import numpy as np

from anabranch.config import Config, from_dict, to_dict
from anabranch.errors import AnabranchError, DataError, InputError
from anabranch.routers.check_parts import (
    TOLERANCE,
    check_decision,
    check_played,
    chosen_of,
    copied,
    ensure,
    names_of,
    refuses,
    same_arrays,
    through_json,
    through_json_part,
)
from anabranch.routers.contract.ask import Ask
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.knobs import LAMBDA
from anabranch.routers.contract.predictor import Predictor, Ranked
from anabranch.routers.contract.program import Program
from anabranch.routers.contract.query import Decision, Outcome, Pool, Query
from anabranch.routers.contract.strategy import Played, Strategy
from anabranch.routers.made_outcomes import DIM, MODELS, made_outcomes, made_pool
from anabranch.routers.program_checks import check_program

# As long as a fit in the background may be behind what was observed.
FITS_S = 10.0


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
        ask: how it asks models, where it does; a `Program` is run with it too, if it has ``stream``.
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
            checks.runs(fitted)
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
        ensure(self.ask is not None, "it asks models to decide; give check_strategy an ask")
        return asyncio.run(strategy.aroute(query, pool, cast(Ask, self.ask)))

    def fit(self, data: Recorded, seed: int = 0) -> Strategy:
        strategy = self.build()
        ensure(strategy.fit(data, seed=seed) is strategy, "fit does not return the strategy")
        return strategy

    def config(self) -> None:
        if self.kind is not None:
            self.readable()
        strategy = self.build()
        ensure(isinstance(strategy, Strategy), f"the config builds {type(strategy).__name__}, which is no Strategy")
        ensure(isinstance(strategy.name, str) and strategy.name != "", "it has no name")

    def readable(self) -> None:
        """What is registered reads back from the name it is registered under."""
        read = from_dict(type(self.given), json.loads(json.dumps(to_dict(self.given))))
        ensure(read == self.given, "the config does not read back equal from JSON")

    def untrained(self) -> None:
        if self.decides and self.build().needs_fit:
            refuses(lambda: self.route(self.build(), self.query, made_pool()), InputError, "route before fit")

    def decisions(self, fitted: Strategy) -> None:
        twin = self.fit(made_outcomes())
        for query in list(self.test.queries())[:10]:
            for pool in (made_pool(), made_pool(MODELS[::-1]), made_pool(is_available=False)):
                decision = self.route(fitted, query, pool)
                check_decision(decision, pool)
                ensure(
                    chosen_of(decision) == chosen_of(self.route(twin, query, pool)),
                    "fitted twice on the same data with the same seed, it decides differently",
                )
            if type(fitted).aroute is Strategy.aroute:
                facts = fitted.explain(query, made_pool())
                ensure(json.loads(json.dumps(facts)) is not None, "explain is not ready for JSON")
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
                ensure(isinstance(said, bool | np.bool_), f"accept says {said!r}, not whether")
            fitted.accept(self.query, candidates[0].model, "", details)
        fitted.accept(self.query, "a model nobody knows", "an answer", {})

    def runs(self, fitted: Strategy) -> None:
        """Where it answers itself."""
        if isinstance(fitted, Program):
            for query in (self.query, *list(self.test.queries())[1:4]):
                check_program(fitted, query, made_pool(), self.ask if hasattr(self.ask, "stream") else None)

    def pools(self, fitted: Strategy) -> None:
        one = self.route(fitted, self.query, made_pool(("small", "large")))
        ensure(set(names_of(one)) <= {"small", "large"}, "it routes to a model outside the pool")
        models = [
            dataclasses.replace(model, is_available=model.name != one.model)
            for model in made_pool(("small", "large")).models
        ]
        other = self.route(fitted, self.query, Pool(tuple(models)))
        ensure(other.model != one.model or len(names_of(one)) == 1, "it prefers a model that is not available")
        check_decision(self.route(fitted, self.query, made_pool((*MODELS, "new"))), made_pool((*MODELS, "new")))
        for name in ("large", "new"):
            try:
                decision = self.route(fitted, self.query, made_pool((name,)))
            except InputError as error:
                ensure(name in str(error), f"the error for a pool of {name!r} alone does not name it: {error}")
            else:
                ensure(names_of(decision) == [name], f"of a pool of {name!r} alone it chose {decision.model!r}")

    def vectors(self, fitted: Strategy) -> None:
        if not fitted.needs_vector:
            check_decision(self.route(fitted, dataclasses.replace(self.query, vector_D=None), made_pool()), made_pool())
            return
        for vector_D in (None, np.ones(DIM + 1, np.float32)):
            odd = dataclasses.replace(self.query, vector_D=vector_D)
            what = "a missing vector" if vector_D is None else "a vector of another length"
            refuses(functools.partial(self.route, fitted, odd, made_pool()), InputError, what)
        said = fitted.learned_dim
        ensure(said in (None, DIM), f"learned_dim is {said!r}; it learned from vectors of {DIM} dimensions")
        ensure(self.build().learned_dim is None, "learned_dim is no None before fit")

    def _chosen(self, strategy: Strategy) -> Any:
        return chosen_of(self.route(strategy, self.query, made_pool()))

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
        check_decision(self.route(learner, self.query, made_pool()), made_pool())
        twin = self.build()
        twin.load_state(*through_json(learner))
        until_s = time.monotonic() + FITS_S
        while not (agree := self._chosen(twin) == self._chosen(learner)) and time.monotonic() < until_s:
            # Fits that nobody waits for (`best_of`) may be behind in either.
            time.sleep(0.01)
        ensure(agree, "read back after it observed, it decides differently")
        kept = copied(learner.state()[0])
        twin.observe(Outcome(query=self.query, model="small", quality=1.0, cost=1e-4))
        ensure(
            same_arrays(kept, learner.state()[0]),
            "what a strategy read back observes changes the one it was saved from",
        )
        ensure(
            names_of(before) == names_of(self.route(self.fit(made_outcomes()), self.query, made_pool())),
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
        parts = [through_json_part(one) for one in pair]
        for one, part in zip(pair, parts[::-1], strict=True):
            one.hear(*one.joined([part]))
            ours, theirs = (
                self.route(one, self.query, made_pool()).candidates,
                self.route(alone, self.query, made_pool()).candidates,
            )
            ensure(
                [item.model for item in ours] == [item.model for item in theirs],
                "what two of it observed does not add up to the same",
            )
            near = all(abs(a.score - b.score) < TOLERANCE for a, b in zip(ours, theirs, strict=True))
            ensure(near, "what two of it observed does not add up to the same scores")
        first, before = pair[0], [item.score for item in self.route(pair[0], self.query, made_pool()).candidates]
        first.disown(*parts[0])
        first.hear(*first.joined(parts))
        after = [item.score for item in self.route(first, self.query, made_pool()).candidates]
        near = len(before) == len(after) and all(abs(a - b) < TOLERANCE for a, b in zip(before, after, strict=True))
        ensure(near, "what it let go of and heard again is not what it was")

    def saving(self, fitted: Strategy) -> None:
        arrays, facts = through_json(fitted)
        ensure(
            all(isinstance(array, np.ndarray) and array.dtype.kind in "biuf" for array in arrays.values()),
            "state holds what is no plain array",
        )
        twin = self.build()
        twin.load_state(arrays, facts)
        again = twin.state()
        ensure(
            same_arrays(arrays, again[0]) and json.loads(json.dumps(again[1])) == facts,
            "state, read back and saved again, differs",
        )
        same = self.fit(made_outcomes())
        ensure(
            same_arrays(arrays, copied(same.state()[0])),
            "fitted twice on the same data with the same seed, its state differs",
        )
        if self.decides:
            for query in self.test.queries():
                ensure(
                    chosen_of(self.route(twin, query, made_pool()))
                    == chosen_of(self.route(fitted, query, made_pool())),
                    "read back, it decides differently",
                )
        if self.plays:
            played = fitted.play(self.test, made_pool()), twin.play(self.test, made_pool())
            ensure(
                np.array_equal(played[0].model_N, played[1].model_N)
                and np.array_equal(played[0].cost_N, played[1].cost_N),
                "read back, it plays differently",
            )

    def playing(self, fitted: Strategy) -> None:
        state = copied(fitted.state()[0])
        played = fitted.play(self.test, made_pool())
        check_played(played, self.test)
        ensure(same_arrays(state, fitted.state()[0]), "playing changes what it learned")
        twice = fitted.play(self.test, made_pool())
        ensure(np.array_equal(played.model_N, twice.model_N), "playing twice gives different choices")
        narrow = fitted.play(self.test, made_pool(("small", "large")))
        ensure(set(narrow.model_N.tolist()) <= {0, 2}, "playing, it chooses models outside the pool")
        check_played(fitted.play(self.test.take([3]), made_pool()), self.test.take([3]))
        if isinstance(fitted, Ranked):
            self.as_routed(fitted, played)

    def as_routed(self, fitted: Ranked, played: Played) -> None:
        """Playing all at once chooses as routing one by one, but for ties in rounding."""
        quality_NM = fitted.predictor.predict(self.test).quality_NM
        for row, query in enumerate(self.test.queries()):
            at = fitted.predictor.models.index(self.route(fitted, query, made_pool()).model)
            chosen = fitted.predictor.models.index(self.test.models[played.model_N[row]])
            ensure(
                abs(quality_NM[row, at] - quality_NM[row, chosen]) < TOLERANCE,
                f"row {row} is routed otherwise than it is played",
            )
        ensure(
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
                ensure(False, f"the knob {name} is set to {odd!r}, and nobody says that this is no number")
        if LAMBDA in fitted.sender_knobs:
            ensure(fitted.knob == "trade_off", "it reads lambda, which is the trade-off, and has none")

    def knob(self, fitted: Strategy) -> None:
        values = list(fitted.knobs(made_outcomes()))
        if fitted.knob is None:
            ensure(not values, "it has values of a knob, and no knob")
            return
        ensure(all(np.isfinite(value) for value in values), "a value of the knob is not finite")
        if len(values) < 2:
            return
        before = fitted.play(self.test, made_pool())
        dear, cheap = (fitted.with_knob(values[at]) for at in (0, -1))
        ensure(getattr(dear.config, fitted.knob) == values[0], f"with_knob does not set {fitted.knob}")
        spent = [one.play(self.test, made_pool()).cost_N.mean() for one in (dear, cheap)]
        ensure(
            spent[1] <= spent[0] * 1.02,
            f"the last value of the knob spends {spent[1]:.3g}, the first {spent[0]:.3g}: they must run from dear to cheap",
        )
        ensure(
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
            ensure(
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
                    check_decision(decision, made_pool(odd.models))
                if self.plays:
                    test = self.test.only(odd.models)
                    check_played(fitted.play(test, made_pool(odd.models)), test)
                    if odd.cost_NM is not None and fitted.knob is not None:
                        ensure(
                            all(np.isfinite(value) for value in fitted.knobs(odd)),
                            f"{case}: a value of the knob is not finite",
                        )
            except (DataError, InputError) as error:
                ensure(len(str(error)) > 20, f"{case}: the error says only {error}")
            except AnabranchError as error:
                raise AssertionError(
                    f"{case}: {type(error).__name__}; data that cannot be learned from are a DataError"
                ) from error
            except AssertionError as error:
                raise AssertionError(f"{case}: {error}") from error
            except Exception as error:
                raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
