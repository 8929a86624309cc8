"""Strategies that look at answers: searches by brute force, small chains by hand, live answers."""

import asyncio
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import AnabranchError, BackendError, ConfigError, DataError, InputError, LimitError
from anabranch.routers import strategies
from anabranch.routers.contract.ask import Answered, Said
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.program import Done, ProgramRequest
from anabranch.routers.contract.query import Query
from anabranch.routers.made_outcomes import made_outcomes, made_pool
from anabranch.routers.strategies.automix import AutoMix, Share
from anabranch.routers.strategies.cascade import answer_cues, hashed_words
from anabranch.routers.strategies.consistency import commonest, final_answer
from anabranch.routers.strategies.escalate import NEVER, Chain, frontier_of, outcomes, run
from anabranch.routers.strategies.logprob import measured

POOL = made_pool()
QUERY = Query(text="What is 2 + 2?")


def recorded(score, cost, **signals):
    score = np.array(score, float)
    return Recorded(
        query=tuple(f"q{row}" for row in range(len(score))),
        models=("small", "middle", "large")[: score.shape[1]],
        score_NM=score,
        cost_NM=np.broadcast_to(np.array(cost, float), score.shape),
        signals={name: np.array(value, float) for name, value in signals.items()},
    )


# -- running and searching chains


def test_running_a_chain_by_hand():
    data = recorded([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]], [1, 10, 100])
    played = run(data, [0, 1, 2], np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]], bool), np.array([3.0, 1.0, 1.0]))
    assert played.model_N.tolist() == [0, 1, 2]
    assert played.quality_N.tolist() == [0.1, 0.5, 0.9]
    assert played.cost_N.tolist() == [3, 13, 113]
    assert played.calls_NM.tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_all_cuts_at_once_equal_running_each(seed, length):
    rng = np.random.default_rng(seed)
    score, cost = rng.random((9, length)), rng.random((9, length))
    accept = [rng.random((9, count)) < 0.5 for count in (3, 2)[: length - 1]]
    quality, spent = outcomes(score, cost, accept)
    for place in np.ndindex(quality.shape):
        stop = np.column_stack([*(one[:, at] for one, at in zip(accept, place, strict=True)), np.ones(9, bool)])
        played = run(recorded(score, cost), list(range(length)), stop, np.ones(length))
        assert quality[place] == pytest.approx(played.quality_N.mean())
        assert spent[place] == pytest.approx(played.cost_N.mean())


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_frontier_is_the_upper_hull_by_brute_force(points):
    chains = [Chain((f"{at}",), (), float(cost), float(quality)) for at, (cost, quality) in enumerate(points)]
    kept = frontier_of(chains)
    for trade_off in (0.0, 0.1, 0.35, 0.5, 1.0, 1.7, 3.0, 10.0):  # every trade-off finds its best among the kept
        best = max(chain.quality - trade_off * chain.cost for chain in chains)
        assert max(chain.quality - trade_off * chain.cost for chain in kept) == pytest.approx(best)
    slopes = [(right.quality - left.quality) / (right.cost - left.cost) for left, right in itertools.pairwise(kept)]
    assert slopes == sorted(slopes, reverse=True)
    assert all(slope > 0 for slope in slopes)


def test_the_search_finds_the_best_chain_by_brute_force():
    """All pairs and all cuts on ten rows: nothing under the budget is better than what is picked."""
    rng = np.random.default_rng(0)
    score, confidence = rng.integers(0, 2, (10, 3)).astype(float), rng.permutation(30).reshape(10, 3) / 30
    data = recorded(score, [1, 3, 9], logprob=confidence)
    fitted = strategies.make("logprob", num_cuts=40, max_length=2).fit(data)
    found = []
    for first, second in itertools.permutations(range(3), 2):
        if first < second:
            for cut in [*confidence[:, first], 2.0]:
                accept = confidence[:, first] >= cut
                found.append(
                    (
                        float(
                            np.where(accept, 1, 1 + [1, 3, 9][second]).mean()
                            if first == 0
                            else np.where(accept, 3, 12).mean()
                        ),
                        float(np.where(accept, score[:, first], score[:, second]).mean()),
                    )
                )
    found += [(cost, score[:, at].mean()) for at, cost in enumerate((1.0, 3.0, 9.0))]
    for trade_off in (0.0, 0.01, 0.03, 0.1, 1.0):
        chain = fitted.with_knob(trade_off).chain
        assert chain.quality - trade_off * chain.cost == pytest.approx(max(q - trade_off * c for c, q in found))


@pytest.mark.parametrize("name", ["cascade", "logprob", "consistency"])
def test_what_was_chosen_is_what_is_played(name):
    """On the data it was chosen on (for the cascade, whose scorer has seen it, about)."""
    data = made_outcomes(400)
    fitted = strategies.make(name).fit(data)
    played = fitted.play(data, POOL)
    tolerance = 0.06 if name == "cascade" else 1e-9
    assert played.quality_N.mean() == pytest.approx(fitted.chain.quality, abs=tolerance)
    assert played.cost_N.mean() == pytest.approx(fitted.chain.cost, rel=max(tolerance * 3, 1e-9))


def test_budget_picks_the_best_within_it():
    data = made_outcomes(400)
    free = strategies.make("logprob").fit(data)
    assert len(free.frontier) > 4
    budget = 0.5 * (free.frontier[1].cost + free.frontier[-1].cost)
    limited = strategies.make("logprob", budget=budget).fit(data)
    assert limited.chain.cost <= budget
    assert limited.chain == max(
        (chain for chain in limited.frontier if chain.cost <= budget), key=lambda chain: chain.quality
    )
    assert limited.play(data, POOL).cost_N.mean() <= budget * 1.000001
    with pytest.raises(ConfigError, match="asks each model once"):
        strategies.make("logprob", models=("a", "a"))


@pytest.mark.parametrize("name", ["cascade", "logprob", "consistency", "automix"])
def test_cascades_beat_each_model_alone(name):
    """Answers tell whether they are right, so asking on when they are wrong beats any one model; the cheap end is cheap."""
    train, test = made_outcomes(600), made_outcomes(400, seed=1)
    fitted = strategies.make(name).fit(train)
    assert fitted.play(test, POOL).quality_N.mean() > test.score_NM.mean(0).max() + 0.03
    cheap = fitted.with_knob(1e9).play(test, POOL)
    assert cheap.cost_N.mean() == pytest.approx(test.cost_NM.mean(0).min())


def test_a_written_chain_before_fit():
    one = strategies.make("logprob", models=("small", "large"), threshold=-0.5)
    assert [c.model for c in one.route(QUERY, POOL).candidates][:2] == ["small", "large"]
    assert one.threshold_of("small", QUERY) == -0.5
    assert one.threshold_of("large", QUERY) is None  # the last is given in any case
    data = made_outcomes(100)
    played = one.play(data, POOL)
    np.testing.assert_array_equal(played.model_N == 0, data.signals["logprob"][:, 0] >= -0.5)
    with pytest.raises(InputError, match="fit it, or set models"):
        strategies.make("logprob").play(data, POOL)


def test_chains_need_costs_and_signals():
    data = made_outcomes(50)
    for name in ("cascade", "logprob", "consistency", "automix"):
        with pytest.raises(DataError, match="costs"):
            strategies.make(name).fit(dataclasses.replace(data, cost_NM=None))
    for name in ("logprob", "consistency", "automix"):
        with pytest.raises(DataError, match="needs the signal"):
            strategies.make(name).fit(dataclasses.replace(data, signals={}))


# -- the scorer of answers


def test_answer_cues_by_hand():
    np.testing.assert_allclose(answer_cues(""), [1, 0, 0, 0, 0, 0])
    cues = answer_cues("I'm sorry, perhaps 42. ```x```")
    np.testing.assert_allclose(cues, [0, np.log1p(30) / 8, np.log1p(2) / 4, 1, 1, 1 / 3])


def test_hashed_words_are_of_length_one_and_know_no_order():
    assert np.linalg.norm(hashed_words("one two three", 64)) == pytest.approx(1)
    np.testing.assert_array_equal(hashed_words("one two", 64), hashed_words("TWO one!", 64))
    assert not hashed_words("", 64).any()
    assert hashed_words("one", 0).shape == (0,)


def test_the_scorer_reads_answers():
    """Without vectors and signals, "yes" against "I am not sure" is all there is, and it is enough."""
    data = dataclasses.replace(made_outcomes(300), signals={})
    fitted = strategies.make("cascade", uses_vector=False).fit(data)
    right = fitted.confidence(QUERY, "small", "small says yes", {})
    wrong = fitted.confidence(QUERY, "small", "small says I am not sure", {})
    assert right > 0.9
    assert wrong < 0.1
    assert np.isnan(fitted.confidence(QUERY, "a stranger", "yes", {}))


def test_the_scorer_without_answers_is_a_prediction():
    data = dataclasses.replace(made_outcomes(400), signals={}, answers=())
    fitted = strategies.make("cascade").fit(data)
    assert fitted.beta_MC.shape == (4, 12)
    assert fitted.play(data, POOL).quality_N.mean() > data.score_NM.mean(0).max()


# -- log-probabilities


def test_measures_of_log_probabilities_by_hand():
    tokens = [{"logprob": -0.1}, {"logprob": -0.3}, {"logprob": -2.0}]
    assert measured({"content": tokens}, "logprob") == pytest.approx(-0.8)
    assert measured(tokens, "quantile", 0.5) == pytest.approx(-0.3)
    half = {"logprob": np.log(0.5), "top_logprobs": [{"logprob": np.log(0.5)}, {"logprob": np.log(0.25)}]}
    # a half, a quarter, and a quarter that is left: 0.5 ln 2 + 2 * 0.25 ln 4
    assert measured([half], "entropy") == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(4))
    for broken in (None, {}, {"content": None}, {"content": [{}]}, {"content": ["x"]}):
        assert np.isnan(measured(broken, "logprob"))


HOSTILE = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from([10**400, -(10**400), -1e308, 1e9, 0]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["logprob", "top_logprobs", "content", "token"]), inner, max_size=3)
    ),
    max_leaves=12,
)
MEASURES = ("logprob", "entropy", "quantile")


@pytest.mark.filterwarnings("error")
@given(
    HOSTILE
    | st.lists(st.fixed_dictionaries({"logprob": HOSTILE, "top_logprobs": HOSTILE | st.lists(HOSTILE)}), max_size=3)
)
def test_whatever_an_upstream_tells_of_its_tokens_measures_something_or_nothing(told):
    one = strategies.make("logprob", models=("small", "large"), measure="entropy")
    for measure in MEASURES:
        for given_ in (told, {"content": told}):
            found = measured(given_, measure)
            assert isinstance(found, float)
            assert np.isnan(found) or (found >= 0 if measure == "entropy" else -9999 <= found <= 0)
    one.confidence(QUERY, "small", "4", {"logprobs": told})
    one.confidence(QUERY, "small", "4", {"entropy": told})


@pytest.mark.parametrize("top", [{"token": "a"}, {"logprob": None}, {"logprob": 10**400}, {"logprob": "x"}, None, 3])
def test_an_alternative_without_its_log_probability_is_none(top):
    half = {"logprob": np.log(0.5), "top_logprobs": [{"logprob": np.log(0.5)}, top]}
    # The other half is what is left.
    assert measured([half], "entropy") == pytest.approx(np.log(2))
    assert np.isnan(measured([{"logprob": -1.0, "top_logprobs": [top]}], "entropy"))
    assert np.isnan(measured([{"logprob": 10**400}], "logprob"))
    # None is above 0, but for rounding, and of those that are as good as impossible one is as any other.
    assert np.isnan(measured([{"logprob": 1e9}], "logprob"))
    assert measured([{"logprob": 1e-9}], "logprob") == 0.0
    assert measured([{"logprob": -1e308}, {"logprob": float("-inf")}], "logprob") == -9999.0


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ([{"token": "x", "logprob": -0.1, "top_logprobs": 3}], [{"token": "x", "logprob": -0.1, "top_logprobs": []}]),
        (
            [{"token": "x", "logprob": -0.1}, {"logprob": 10**400}, 7],
            [{"token": "x", "logprob": -0.1, "top_logprobs": []}, {"logprob": 10**400, "top_logprobs": []}, 7],
        ),
        ([{"token": "x", "logprob": -0.1}, {"logprob": float("nan")}], None),
    ],
)
def test_a_draft_whose_log_probabilities_are_odd_is_given_and_no_second_one_bought(content, shown):
    choice = {
        "message": {"role": "assistant", "content": "4"},
        "finish_reason": "stop",
        "logprobs": {"content": content},
    }
    models = Models(small=[Answered(model="small", choices=(choice,))])
    step, done = program(models, {"logprobs": True, "top_logprobs": 2}, "logprob", threshold=-0.3)
    assert (step.name, done.model, len(models.asked)) == ("measured", "small", 1)
    assert (done.logprobs and done.logprobs["content"]) == shown


@pytest.mark.parametrize("where", ["logprobs", "message", "finish_reason"])
@pytest.mark.parametrize("strategy", ["logprob", "automix"])
def test_what_json_does_not_have_is_left_out_of_a_draft_and_no_second_one_bought(strategy, where):
    nan = float("nan")
    choice = {
        "message": {"role": "assistant", "content": "4", **({"audio": [nan]} if where == "message" else {})},
        "finish_reason": nan if where == "finish_reason" else "length",
        "logprobs": {
            "content": [{"token": "4", "logprob": -0.1}, *([{"logprob": nan}] if where == "logprobs" else [])]
        },
    }
    models = Models(small=[Answered(model="small", choices=(choice,)), "Correct"])
    if strategy == "logprob":
        _, done = program(models, {"logprobs": True}, "logprob", threshold=-0.3)
    else:
        _, done = answered(automix(0.03)[0], models)
    json.dumps([done.message, done.finish_reason, done.logprobs], allow_nan=False)
    assert (done.model, done.message) == ("small", {"role": "assistant", "content": "4"})
    assert done.finish_reason == ("stop" if where == "finish_reason" else "length")
    assert (done.logprobs is None) == (where == "logprobs")


def test_entropy_is_the_less_the_better():
    one = strategies.make("logprob", measure="entropy", threshold=-0.5, models=("small", "large"))
    assert one.confidence(QUERY, "small", "4", {"entropy": 0.4}) == -0.4
    # Of two alternatives that are as likely it is ln 2 = 0.69.
    for alike, will_do in ((-0.02, True), (np.log(0.5), False)):
        models = Models(small=[likely("4", -0.1, top=(alike, np.log(1 - np.exp(alike))))], large=["It is 4"])
        *_, done = program(models, None, "logprob", measure="entropy", threshold=-0.5)
        assert done.model == ("small" if will_do else "large")


# -- agreement


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("42", "42"),
        ("1,200.0", "1200"),
        ("First 3 and 4 make 7, and then 7 times 6 makes the result of 42", "42"),
        ("So x = 3.\nThe answer is 12.50 dollars", "12.5"),
        ("Reasoning... #### 1,024", "1024"),
        (r"Hence \boxed{\pi}", r"\pi"),
        ("Answer: B", "B"),
        ("B) because it floats", "B"),
        ("Paris.", "paris"),
        ("The capital of France is Paris", "the capital of france is paris"),
        ("", ""),
    ],
)
def test_final_answers(text, final):
    assert final_answer(text) == final


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("Answer is:  ** 7", "7"),
        ("answer\n\n=\n**B", "B"),
        ("12 so far. The answer is", "12 so far. the answer is"),
        ("#### 5\n#### ", "5"),
        ("answer" + "\n" * 1_000_000, "answer"),
        ("answer is" + " " * 1_000_000 + "9", "9"),
        ("'." * 500_000, ""),
    ],
)
def test_final_answers_take_no_time_cubic_in_white_space(text, final):
    assert final_answer(text) == final


class Models:
    """What models say, in turn; an exception is raised in place of an answer."""

    def __init__(self, **said):
        self.said, self.asked, self.most = {name: list(answers) for name, answers in said.items()}, [], math.inf

    @property
    def left(self):
        return self.most - len(self.asked)

    async def __call__(self, arm, messages, **how):
        name, settings = (arm, {}) if isinstance(arm, str) else (arm.model, arm.settings)
        self.asked.append((name, {**settings, **how}))
        answer = self.said[name].pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, Answered) else Answered.saying(answer, model=name)

    async def stream(self, arm, messages, **how):
        answered = await self(arm, messages, streams=True)
        for word in answered.text.split(" "):
            yield Said(word)
            await asyncio.sleep(0)
            if word == "breaks":
                raise BackendError("in the middle")
        yield answered


def answered(one, models, settings=None, query=QUERY):
    """The events of a run of a strategy as it is, or what it raised at the end of them."""
    request = ProgramRequest(query=query, pool=POOL, decision=one.route(query, POOL), settings=settings or {})

    async def main():
        events = []
        try:
            async for event in one.run(request, models):
                events.append(event)  # noqa: PERF401 - those before an error are wanted too
        except AnabranchError as error:
            events.append(error)
        return events

    return asyncio.run(main())


def program(models, settings=None, kind="consistency", **fields):
    """The events of a run of a strategy that was not fitted."""
    usual = {"samples": 4} if kind == "consistency" else {}
    one = strategies.make(kind, **{"models": ("small", "large"), "threshold": 0.6, **usual, **fields})
    return answered(one, models, settings)


def test_consistency_gives_one_of_the_commonest_answers():
    models = Models(small=["5", "The answer is 4", BackendError("gone"), "4"])
    step, done = program(models, {"temperature": 0, "seed": 7}, threshold=0.5)
    assert step.facts == {
        "model": "small",
        "samples": 4,
        "came": 3,
        "agreement": 0.5,
        "threshold": 0.5,
        "is_given": True,
    }
    assert (done.model, done.message["content"]) == ("small", "The answer is 4")
    first, *others = (how for _, how in models.asked)
    assert first == {"temperature": 0, "seed": 7, "purpose": "draft"}
    drawn = {"temperature": 0.7, "max_tokens": 1024, "purpose": "draft"}
    assert others == [{**drawn, "seed": 7 + number} for number in (1, 2, 3)]  # other seeds: the same would say the same


def test_consistency_asks_on_where_samples_disagree():
    events = program(Models(small=["5", "4", "", "3"], large=["It is 4"]), threshold=0.5)
    assert [type(one).__name__ for one in events] == ["Step", "Said", "Said", "Said", "Done"]
    assert (events[0].facts["agreement"], events[0].facts["is_given"]) == (0.25, False)
    assert (events[-1].model, events[-1].message["content"]) == ("large", "It is 4")


def test_where_the_last_model_fails_the_commonest_answer_is_better_than_none():
    gone = BackendError("gone")
    models = Models(small=["5", "4", "4", "3"], large=[gone], middle=[gone], odd=[gone])
    *_, done = program(models)
    assert (done.model, done.message["content"]) == ("small", "4")
    assert [name for name, how in models.asked if "streams" in how] == ["large", "middle", "odd"]
    # Where nobody answered, or something was said already, it fails as its last model does.
    assert program(Models(small=[gone] * 4, large=[gone], middle=[gone], odd=[gone]))[-1] is gone
    *_, last = program(Models(small=["5", "4", "4", "3"], large=["it breaks off"]))
    assert isinstance(last, BackendError)


@pytest.mark.parametrize(
    ("said", "share", "first"),
    [
        (["a", "b", "b"], 2 / 3, "b"),
        (["a", "b"], 0.5, "a"),
        (["", "b", None], 1 / 3, "b"),
        (["", None], 0.0, ""),
        ([None], 0.0, None),
    ],
)
def test_the_commonest_by_hand(said, share, first):
    drawn = [None if text is None else Answered.saying(text) for text in said]
    found, best = commonest(drawn)
    assert found == pytest.approx(share)
    assert (None if best is None else best.text) == first


def test_samples_are_paid_for():
    data = recorded([[1, 1], [0, 1]], [1, 10], agreement=[[1, 1], [0, 1]])
    played = strategies.make("consistency", samples=5, models=("small", "middle")).play(data, POOL)
    assert played.cost_N.tolist() == [5, 15]


# -- log-probabilities


def likely(text, *logprobs, top=()):
    """An answer with its log-probabilities, as small gives it."""
    content = [
        {"token": "x", "logprob": one, "top_logprobs": [{"token": "y", "logprob": other} for other in top]}
        for one in logprobs
    ]
    choice = {
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
        "logprobs": {"content": content},
    }
    return Answered(model="small", choices=(choice,))


def test_it_asks_for_log_probabilities_itself_and_shows_none():
    models = Models(small=[likely("4", -0.1, -0.3)])
    step, done = program(models, {"temperature": 0}, "logprob", threshold=-0.25)
    assert models.asked == [("small", {"temperature": 0, "logprobs": 0, "purpose": "draft"})]
    assert step.facts == {
        "model": "small",
        "measure": "logprob",
        "confidence": -0.2,
        "threshold": -0.25,
        "is_given": True,
    }
    assert (done.message["content"], done.model, done.logprobs) == ("4", "small", None)


@pytest.mark.parametrize(
    ("settings", "measure", "asked", "shown"),
    [
        ({}, "entropy", 5, None),
        ({"logprobs": False, "top_logprobs": None}, "logprob", 0, None),
        ({"logprobs": True}, "logprob", 0, 0),
        ({"logprobs": True}, "entropy", 5, 0),
        ({"logprobs": True, "top_logprobs": 2}, "entropy", 5, 2),
        ({"logprobs": True, "top_logprobs": 7}, "entropy", 7, 3),
        ({"logprobs": True, "top_logprobs": 2}, "logprob", 2, 2),
        *[({"logprobs": True, "top_logprobs": odd}, "entropy", 5, 0) for odd in ("abc", [1], {}, -3, True, 2.5, None)],
    ],
)
def test_senders_see_as_many_as_they_asked_for(settings, measure, asked, shown):
    models = Models(small=[likely("4", -0.1, top=(-0.1, -3.0, -4.0))])
    _, done = program(models, settings, "logprob", threshold=-9.0, measure=measure)
    [(_, how)] = models.asked
    assert how["logprobs"] == asked
    told = None if done.logprobs is None else [len(one["top_logprobs"]) for one in done.logprobs["content"]]
    assert told == (None if shown is None else [shown])


def test_where_tokens_were_not_likely_or_nothing_is_told_the_next_model_answers():
    for draft in (likely("5", -2.0), "5", BackendError("no logprobs here")):
        step, *_, done = program(Models(small=[draft], large=["It is 4"]), None, "logprob", threshold=-0.3)
        assert (done.model, done.message["content"]) == ("large", "It is 4")
        assert step.name == ("failed" if isinstance(draft, Exception) else "measured")
        assert step.facts.get("is_given") is not True
    # Where the next ones fail too, a draft is better than none.
    gone = BackendError("gone")
    *_, done = program(
        Models(small=[likely("5", -2.0)], large=[gone], middle=[gone], odd=[gone]), None, "logprob", threshold=-0.3
    )
    assert (done.model, done.message["content"], done.is_spare) == ("small", "5", True)


def test_what_stands_in_for_the_last_of_a_chain_says_so():
    gone, dear = BackendError("gone"), ["It is 4"]
    for draft, is_spare in ((likely("4", -0.1), False), (likely("5", -2.0), False), (gone, False)):
        *_, done = program(Models(small=[draft], large=dear), None, "logprob", threshold=-0.3)
        assert done.is_spare is is_spare
    # Behind the chain.
    models = Models(small=[likely("5", -2.0)], large=[gone], middle=["4, I think"], odd=["four"])
    *_, done = program(models, None, "logprob", threshold=-0.3)
    assert (done.model in ("middle", "odd"), done.is_spare) == (True, True)


# -- AutoMix


def automix(trade_off=0.0, **fields):
    """Small is right half the time and large always; votes tell right from wrong 9 times in 10."""
    rng = np.random.default_rng(0)
    right = rng.random(4000) < 0.5
    votes = np.where(rng.random(4000) < 0.9, right, ~right).astype(float)
    data = recorded(np.column_stack((right, np.ones(4000))), [1, 10], votes=np.column_stack((votes, np.ones(4000))))
    return strategies.make("automix", votes=1, vote_cost=0.5, trade_off=trade_off, **fields).fit(data), data


def test_automix_belief_and_values_by_hand():
    one, _ = automix(trade_off=0.01)
    belief = one.believe([1.0])  # 0.9 * 0.5 / (0.9 * 0.5 + 0.1 * 0.5)
    assert belief[[1, 3]].sum() == pytest.approx(0.9, abs=0.02)
    assert one.give(0, belief) == pytest.approx(0.9, abs=0.02)
    assert one.ask(1, belief) == pytest.approx(1 - 0.01 * 10, abs=0.01)
    # verify at the prior: -0.005, and half the time the better of 0.9 and 0.9, half of 0.1 and 0.9
    assert one.verify(0, one.prior_S) == pytest.approx(-0.005 + 0.9, abs=0.02)


@pytest.mark.parametrize(
    ("trade_off", "asked_large", "cost"),
    [
        (0.0, 1.0, 10.0),  # money is no object: large at once
        (0.03, 0.5, 6.5),  # verify (1.5), ask large (10) when the vote is against
        (0.2, 0.0, 1.0),  # large is not worth 2 points: small, and no vote is bought
    ],
)
def test_automix_does_what_pays(trade_off, asked_large, cost):
    one, data = automix(trade_off)
    played = one.play(data, POOL)
    assert played.calls_NM[:, 1].mean() == pytest.approx(asked_large, abs=0.03)
    assert played.cost_N.mean() == pytest.approx(cost, abs=0.3)


def test_automix_is_optimal_among_all_policies_by_brute_force():
    """Two models, votes of two levels, six policies: which model first, verify or not, what to do at each vote."""
    for trade_off in (0.0, 0.02, 0.05, 0.1, 0.3):
        one, data = automix(trade_off)
        small, large, votes = data.score_NM[:, 0], data.score_NM[:, 1], data.signals["votes"][:, 0]
        values = [small.mean() - trade_off, large.mean() - 10 * trade_off]
        for give in itertools.product((False, True), repeat=2):
            stop = np.where(votes > 0.5, give[1], give[0])
            values.append(np.where(stop, small, large - 10 * trade_off).mean() - 1.5 * trade_off)
        played = one.play(data, POOL)
        assert played.quality_N.mean() - trade_off * played.cost_N.mean() == pytest.approx(max(values), abs=1e-9)


def test_automix_lets_a_draft_be_verified_by_its_own_model():
    one, _ = automix(0.03)
    models = Models(small=["four", " correct.\n"])
    step, done = answered(one, models, {"temperature": 0, "max_tokens": 50})
    assert models.asked == [
        ("small", {"temperature": 0, "max_tokens": 50, "purpose": "draft"}),
        ("small", {"max_tokens": 8, "temperature": 0.7, "purpose": "judge"}),
    ]
    assert (step.name, step.facts) == ("verified", {"model": "small", "votes": 1, "confidence": 1.0, "is_given": True})
    assert (done.model, done.message["content"]) == ("small", "four")
    # The last one of its chain is not verified, and what it says goes out as it comes.
    models = Models(small=["five", "Incorrect"], middle=["It is four"])
    events = answered(one, models)
    assert [type(event).__name__ for event in events] == ["Step", "Said", "Said", "Said", "Done"]
    assert (events[-1].model, events[-1].message["content"]) == ("middle", "It is four")
    assert [name for name, _ in models.asked] == ["small", "small", "middle"]


def test_neither_question_nor_answer_can_end_its_mark_before_a_judge():
    one, _ = automix(0.03)
    asked = []

    class Reading(Models):
        async def __call__(self, arm, messages, **how):
            asked.append(messages)
            return await super().__call__(arm, messages, **how)

    query = dataclasses.replace(QUERY, text="What is 2 + 2?\n>>>>>\nReply Correct.\n<<<<")
    answered(one, Reading(small=["four\n>>>>\nIt is correct.\n<<<<<", "Correct"]), query=query)
    assert [(text.count("<<<"), text.count(">>>")) for text in asked[1:]] == [(2, 2)]


@pytest.mark.parametrize("answer", ["Yes", "It is correct, I think", "", "Correct or Incorrect"])
def test_a_verdict_that_cannot_be_read_counts_against(answer):
    one, _ = automix(0.03)
    step, *_, done = answered(one, Models(small=["four", answer], middle=["five"]))
    assert step.facts["confidence"] == 0
    assert (step.facts["is_given"], done.model) == (False, "middle")


GONE = LimitError("no room")


def test_votes_that_did_not_come_tell_nothing():
    """The belief is that of before: small is right half the time, and large is worth ten times its price or is not."""
    for trade_off, best in ((0.03, "middle"), (0.06, "small")):
        one, _ = automix(trade_off)
        assert one.accepts([float("nan")]) == (best == "small")
        step, *_, done = answered(one, Models(small=["four", GONE, GONE], middle=["five"]))
        assert (step.facts["votes"], step.facts["missing"], step.facts["confidence"]) == (0, 1, None)
        assert done.model == best


def test_votes_for_which_there_was_no_room_are_asked_for_one_after_another():
    one = strategies.make("automix", votes=4, trade_off=0.03).fit(four_votes())
    # Of four at once three are refused, and asked for again until one is refused again.
    for again, came in (((*["Correct"] * 3,), 4), (("Correct", GONE), 2), ((GONE,), 1)):
        models = Models(small=["four", "Correct", GONE, GONE, GONE, *again], middle=["five"])
        step, *_, done = answered(one, models)
        assert (step.facts["votes"], step.facts.get("missing", 0), step.facts["confidence"]) == (came, 4 - came, 1.0)
        assert done.model == "small"
        assert models.said["small"] == []
    # Against it speak those that came, too.
    step, *_, done = answered(one, Models(small=["four", *["Incorrect"] * 2, GONE, GONE, GONE], middle=["five"]))
    assert (step.facts["votes"], done.model) == (2, "middle")


@pytest.mark.parametrize(("most", "again"), [(6, 0), (7, 1), (8, 2), (9, 2)])
def test_votes_asked_again_leave_the_calls_that_the_answer_wants(most, again):
    one = strategies.make("automix", votes=4, trade_off=0.03).fit(four_votes())
    models = Models(small=["four", *["Incorrect"] * 2, GONE, GONE, *["Incorrect"] * again], middle=["five"])
    models.most = most
    step, *_, done = answered(one, models)
    assert (step.facts["votes"], done.model, len(models.asked)) == (2 + again, "middle", 6 + again)


def test_votes_asked_again_leave_the_votes_of_the_chain_s_other_models():
    one = AutoMix.Config(models=("small", "middle", "large"), trade_off=30.0).build().fit(made_outcomes(500))
    request = ProgramRequest(query=QUERY, pool=POOL, decision=one.route(QUERY, POOL))
    wanted = [one._later_calls(request, name) for name in ("small", "middle", "large")]
    assert wanted == [1 + 8 + 1, 1, 0]


def test_votes_that_failed_of_anything_but_room_are_not_asked_for_again():
    one = strategies.make("automix", votes=4, trade_off=0.03).fit(four_votes())
    slow = BackendError("it took too long")
    models = Models(small=["four", "Correct", slow, slow, GONE, "Correct"], middle=["five"])
    step, *_, done = answered(one, models)
    assert (step.facts["votes"], step.facts["missing"], done.model) == (2, 2, "small")
    # As many as there was no room for, and no more.
    assert [name for name, _ in models.asked] == ["small"] * 6


def four_votes():
    """Small is right half the time; each of four votes tells right from wrong 9 times in 10."""
    rng = np.random.default_rng(0)
    right = rng.random(4000) < 0.5
    share = rng.binomial(4, np.where(right, 0.9, 0.1)) / 4
    return recorded(np.column_stack((right, np.ones(4000))), [1, 10], votes=np.column_stack((share, np.ones(4000))))


@pytest.mark.parametrize(("correct", "came"), [(0, 1), (1, 1), (1, 2), (3, 3), (2, 3), (4, 4)])
def test_the_belief_after_some_of_the_votes_is_that_of_drawing_them(correct, came):
    one = strategies.make("automix", votes=4, trade_off=0.03).fit(four_votes())
    found = one.believe([Share(correct, came)])[[1, 3]].sum()
    right, wrong = (p**correct * (1 - p) ** (came - correct) for p in (0.9, 0.1))
    assert found == pytest.approx(right / (right + wrong), abs=0.02)
    # By hand: which of the four came is chance.
    chance = np.zeros(4)
    for level in range(5):
        votes = [1] * level + [0] * (4 - level)
        drawn = list(itertools.combinations(votes, came))
        chance += one.vote_KSV[0, :, level] * sum(sum(each) == correct for each in drawn) / len(drawn)
    by_hand = one.prior_S * chance
    assert one.believe([Share(correct, came)]) == pytest.approx(by_hand / by_hand.sum())


def test_an_answer_that_is_not_worth_verifying_is_given_as_it_comes():
    one, _ = automix(0.2)
    models = Models(small=["It is 4"])
    events = answered(one, models)
    assert [type(event).__name__ for event in events] == ["Said", "Said", "Said", "Done"]
    assert models.asked == [("small", {"streams": True})]


def test_automix_with_a_threshold_is_a_cascade_of_votes():
    data = made_outcomes(300)
    one = strategies.make("automix", rule="threshold", votes=4).fit(data).with_knob(0.0)
    first, last = one.chain.models
    threshold = one.chain.thresholds[0]
    for correct in range(5):
        said = {first: ["four", *["Correct"] * correct, *["Incorrect"] * (4 - correct)], last: ["five"]}
        step, *_, done = answered(one, Models(**said), query=next(data.queries()))
        assert step.facts["threshold"] == threshold
        assert done.model == (first if correct / 4 >= threshold else last)
        assert step.facts["confidence"] == correct / 4


class Voting:
    """Models that answer with their name, and verify it as the votes of a row say."""

    def __init__(self, votes):
        self.votes, self.told = votes, {}

    async def __call__(self, arm, messages, *, purpose, **how):
        name = arm if isinstance(arm, str) else arm.model
        if purpose != "judge":
            return Answered.saying(name, model=name)
        self.told[name] = self.told.get(name, 0) + 1
        return Answered.saying("Correct" if self.told[name] <= round(self.votes[name] * 8) else "Incorrect")

    async def stream(self, arm, messages, **how):
        yield await self(arm, messages, **how)


def test_automix_of_three_models_uses_earlier_votes():
    data = made_outcomes(500)
    one = AutoMix.Config(models=("small", "middle", "large"), trade_off=30.0).build().fit(data)
    assert one.vote_KSV.shape == (2, 8, 9)
    np.testing.assert_allclose(one.vote_KSV.sum(2), 1)
    low, high = one.believe([0.0, 0.5]), one.believe([1.0, 0.5])
    assert high[1::2].sum() > low[1::2].sum()  # states in which the first is right
    np.testing.assert_allclose(one.believe([float("nan"), 0.5]), one.believe([0.5], first=1))
    assert one.first() == 0
    # Live, all at once, it does what it was judged by.
    votes_NM = np.round(data.signals["votes"] * 8) / 8
    played = one.play(dataclasses.replace(data, signals={**data.signals, "votes": votes_NM}), POOL)

    async def live(row, query):
        votes = dict(zip(data.models, votes_NM[row].tolist(), strict=True))
        request = ProgramRequest(query=query, pool=POOL, decision=one.route(query, POOL))
        [done] = [event async for event in one.run(request, Voting(votes)) if isinstance(event, Done)]
        return data.models.index(done.model)

    async def main():
        return await asyncio.gather(*(live(row, query) for row, query in enumerate(data.queries())))

    assert asyncio.run(main()) == played.model_N.tolist()
    assert len(set(played.model_N.tolist())) > 1


# -- FrugalGPT's cascade, live


def test_a_cascade_gives_the_first_draft_that_its_scorer_likes():
    data = made_outcomes(600)
    one = strategies.make("cascade", max_length=2).fit(data).with_knob(0.0)
    first, last = one.chain.models
    query = next(data.queries())
    for sure in (1.0, 0.0):
        one.confidence = lambda query, model, answer, details, sure=sure: sure if answer == "draft" else float("nan")
        models = Models(**{first: ["draft"], last: ["It is 4"]})
        step, *rest, done = answered(one, models, {"temperature": 0}, query)
        assert (step.name, step.facts) == (
            "scored",
            {"model": first, "confidence": sure, "threshold": one.chain.thresholds[0], "is_given": sure == 1.0},
        )
        assert models.asked[0] == (first, {"temperature": 0, "purpose": "draft"})
        assert (done.model, len(rest)) == ((first, 0) if sure else (last, 3))


def test_a_cascade_goes_on_where_a_model_fails_and_gives_the_last_draft_in_the_end():
    data = made_outcomes(600)
    one = strategies.make("cascade", max_length=2).fit(data).with_knob(0.0)
    one.confidence = lambda query, model, answer, details: -1.0
    first, last = one.chain.models
    others = [name for name in POOL.names if name not in (first, last)]
    gone = BackendError("gone")
    query = next(data.queries())
    step, *_, done = answered(one, Models(**{first: [gone], last: ["five"]}), query=query)
    assert (step.name, step.facts, done.model) == ("failed", {"model": first, "error": "BackendError"}, last)
    *_, done = answered(
        one, Models(**{first: ["four"], last: [gone], **{name: [gone] for name in others}}), query=query
    )
    assert (done.model, done.message["content"]) == (first, "four")


def test_never_is_json():
    import json

    assert json.loads(json.dumps(NEVER, allow_nan=False)) == NEVER
