"""The verdict of a log: every figure by hand, copies of questions, choices that the log cannot have made, and who is compared."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.strategy import played
from anabranch.routers.data import pool_of
from anabranch.routers.referee import holm
from anabranch.routers.referee.bounds import Binned
from anabranch.routers.referee.judging import Contender
from anabranch.routers.referee.log_verdict import bounded, verdict_of_log
from anabranch.routers.referee.off_policy import expected
from anabranch.routers.strategies.fixed import Random, Static

MODELS = ("a", "b", "c")


class Chooses(Static, kind="chooses_for_log_verdict"):
    """A model by the last word of a question."""

    by: dict

    def play(self, data, pool):
        return played(data, np.array([MODELS.index(self.by[text.split()[-1]]) for text in data.query]))


def chooses(**by):
    one = Chooses(Static.Config())
    one.by = by
    return one


def always(name):
    return Static(Static.Config(model=name))


def log_of(rows):
    """From (question, model, chance, score, cost) each."""
    score, cost, chance = (np.full((len(rows), len(MODELS)), np.nan) for _ in range(3))
    for at, (_, model, p, value, dollars) in enumerate(rows):
        score[at, MODELS.index(model)], cost[at, MODELS.index(model)], chance[at, MODELS.index(model)] = (
            value,
            dollars,
            p,
        )
    return Recorded(
        query=tuple(row[0] for row in rows),
        models=MODELS,
        score_NM=score,
        cost_NM=cost,
        signals={"probability": chance},
    )


def made_rows(num, seed=0, skill=None, p=(0.5, 0.3, 0.2), copies=()):
    """Hard and easy questions, some of them often; each answered by a model that was drawn."""
    draw = np.random.default_rng(seed)
    skill = skill or {"easy": (0.9, 0.5, 0.5), "hard": (0.2, 0.7, 0.4)}
    texts = [f"q{seed}.{at} {('easy', 'hard')[at % 2]}" for at in range(num)]
    for at, times in copies:
        texts += [texts[at]] * times
    rows = []
    for text in texts:
        model = draw.choice(3, p=p)
        right = float(draw.random() < skill[text.split()[-1]][model])
        rows.append((text, MODELS[model], p[model], right, float(draw.random()) + model))
    return rows


def by_hand(log, choice, best):
    """Gain of each question, what it counts, the most a question may change, and the share that may be wrong."""
    q = np.clip(expected(log, 0), 0, 1)
    counts = defaultdict(int)
    for text in log.query:
        counts[text] += 1
    share = dict(zip(counts, bounded(np.array(list(counts.values()))), strict=True))
    gain, lack, heaviest = defaultdict(float), [defaultdict(float), defaultdict(float)], 0.0
    for row, text in enumerate(log.query):
        asked = int(np.flatnonzero(np.isfinite(log.score_NM[row]))[0])
        weight = 1 / log.signals["probability"][row, asked]
        heaviest = max(heaviest, weight)
        counts_as, worth = share[text] / counts[text], []
        picked = [MODELS.index(one[text.split()[-1]]) for one in (choice, best)]
        for side, model in enumerate(picked):
            match = weight if model == asked else 0.0
            seen = log.score_NM[row, asked] if model == asked else 0.0
            worth.append(q[row, model] + match * (seen - q[row, model]))
            lack[side][model] += counts_as * (1 - match) if picked[0] != picked[1] else 0.0
        gain[text] += counts_as * (worth[0] - worth[1])
    # What one model has too much of is no help to another.
    doubt = sum(max(0.0, value) for side in lack for value in side.values()) / len(counts)
    return np.array(list(gain.values())), heaviest * max(share.values()), doubt


@pytest.mark.parametrize("has_vectors", [False, True])
def test_every_figure_by_hand(has_vectors):
    log = log_of(made_rows(150, copies=[(0, 40), (1, 9), (3, 2)]))
    if has_vectors:
        log = log.with_vectors(np.random.default_rng(3).normal(size=(len(log), 60)))
        assert expected(log, 0).max() > 1 or expected(log, 0).min() < 0  # what cannot be, and is not believed
    learned = log_of(made_rows(150, seed=1, skill={"easy": (0.9, 0.1, 0.1), "hard": (0.9, 0.1, 0.1)}))
    by = {
        "mix": {"easy": "a", "hard": "b"},
        "odd": {"easy": "c", "hard": "a"},
        "b": {"easy": "b", "hard": "b"},
        "two": {"easy": "c", "hard": "b"},
    }
    found = verdict_of_log({name: chooses(**one) for name, one in by.items()}, log, pool_of(MODELS), learned=learned)
    assert (found.best_single, found.chosen_on, found.questions) == ("a", "train", 150)
    p_gain, p_loss = [], []
    for name, one in by.items():
        value, reach, doubt = by_hand(log, one, {"easy": "a", "hard": "a"})
        assert reach == pytest.approx(5 * 3)  # one chance in five, and a question that counts three times
        assert doubt > 0.001
        told = next(each for each in found.gains if each.name == name)
        assert told.gain == pytest.approx(value.mean())
        low = Binned.of(value).lower(0.05 / 8, -reach) - doubt
        high = doubt - Binned.of(-value).lower(0.05 / 8, -reach)
        assert told.interval == pytest.approx([max(low, -1.0), min(high, 1.0)], abs=1e-6)
        p_gain.append(Binned.of(value).p(doubt, -reach))
        p_loss.append(Binned.of(-value).p(doubt, -reach))
        assert told.p == pytest.approx(min(1.0, 2 * min(p_gain[-1], p_loss[-1])), rel=1e-4)
    corrected = [min(1.0, 2 * min(pair)) for pair in zip(holm(p_gain), holm(p_loss), strict=True)]
    assert [{one.name: one.p_holm for one in found.gains}[name] for name in by] == pytest.approx(corrected, rel=1e-4)
    assert len({one.p_holm for one in found.gains}) > 1


def test_a_question_counts_as_often_as_it_came_but_no_more_than_thrice_the_mean():
    assert bounded(np.array([1, 2, 3])).tolist() == [0.5, 1.0, 1.5]
    found = bounded(np.array([1] * 99 + [1000]))
    assert found.max() == pytest.approx(3, rel=1e-6)
    assert found.mean() == pytest.approx(1)
    assert bounded(np.full(7, 25)).tolist() == [1.0] * 7


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=50))
def test_what_questions_count_is_in_their_order_and_bounded(counts):
    found = bounded(np.array(counts))
    assert found.mean() == pytest.approx(1)
    assert found.max() <= 3 * (1 + 1e-6)
    assert all(
        found[a] <= found[b] + 1e-9 for a in range(len(counts)) for b in range(len(counts)) if counts[a] <= counts[b]
    )


def test_popular_questions_take_nothing_from_what_the_others_tell():
    """A few greetings that came 80 times each made the interval of a gain reach beyond 1, and nothing was ever resolved."""
    skill = {"easy": (1.0, 0.0, 0.0), "hard": (0.0, 1.0, 0.0), "hi": (1.0, 1.0, 1.0)}
    plain, more = made_rows(400, skill=skill, p=(0.5, 0.5, 0.0)), []
    draw = np.random.default_rng(5)
    for greeting in range(12):
        for _ in range(80):
            model = int(draw.random() < 0.5)
            more.append((f"{greeting} hi", MODELS[model], 0.5, 1.0, 1.0))
    router = chooses(easy="a", hard="b", hi="b")
    for rows in (plain, plain + more):
        found = verdict_of_log({"router": router}, log_of(rows), pool_of(MODELS[:2]))
        assert found.unfit == {}
        [gain] = found.gains
        assert gain.found == "better"
        assert -1 <= gain.interval[0] <= gain.gain <= gain.interval[1] <= 1
        assert gain.interval[1] - gain.interval[0] < 0.7


@pytest.mark.parametrize(("num", "share"), [(3000, 0.045), (1000, 0.07)])
def test_choices_that_were_never_drawn_make_nobody_better(num, share):
    """On hard questions, which nobody can answer, a model that was never drawn: q is what any model gets, and its gain was no chance."""
    called = []
    for seed in range(2):
        draw = np.random.default_rng(seed)
        rows = []
        for at in range(num):
            kind = "hard" if draw.random() < share else "easy"
            rows.append(
                (
                    f"{at} {kind}",
                    MODELS[int(draw.random() < 0.5)],
                    0.5,
                    float(kind == "easy" and draw.random() < 0.8),
                    1.0,
                )
            )
        found = verdict_of_log({"s": chooses(easy="a", hard="c")}, log_of(rows), pool_of(MODELS))
        called += [one.found for one in found.gains]
    assert "better" not in called


def test_who_draws_as_the_log_did_is_not_compared():
    drawn, texts = Random(Random.Config()), [f"{at} easy" for at in range(300)]
    empty = Recorded(query=tuple(texts), models=MODELS, score_NM=np.zeros((300, 3)))
    rows = [
        (text, MODELS[model], 1 / 3, 1.0, 1.0)
        for text, model in zip(texts, drawn.play(empty, pool_of(MODELS)).model_N, strict=True)
    ]
    found = verdict_of_log({"same": drawn, "other": Random(Random.Config(seed=5))}, log_of(rows), pool_of(MODELS))
    assert found.unfit == {"same": "it draws as the log did; judge it with another seed"}
    assert [one.name for one in found.gains] == ["other"]


def test_the_best_single_model_is_that_of_what_was_learned_from_though_another_did_better_here():
    log = log_of(made_rows(600, skill={"easy": (0.5, 0.9, 0.5), "hard": (0.5, 0.9, 0.5)}))
    learned = log_of(made_rows(600, seed=1, skill={"easy": (0.9, 0.5, 0.5), "hard": (0.9, 0.5, 0.5)}))
    found = verdict_of_log({"c": always("c")}, log, pool_of(MODELS), learned=learned)
    assert (found.best_single, found.chosen_on) == ("a", "train")
    assert "did best on what was learned from (here b did better by 0.4" in found.recommended.reason
    alone = verdict_of_log({"c": always("c")}, log, pool_of(MODELS))
    assert (alone.best_single, alone.chosen_on) == ("b", "test")


def test_another_model_that_is_as_good_and_cheaper_is_found_in_a_log():
    """b is as good as a at a tenth of its cost, and nobody's choice but that of always b."""
    rows = []
    draw = np.random.default_rng(0)
    for at in range(4000):
        model = int(draw.random() < 0.5)
        rows.append((f"{at} easy", MODELS[model], 0.5, 1.0, (10.0, 1.0)[model]))
    learned = log_of([("0 easy", "a", 0.5, 1.0, 10.0), ("1 easy", "b", 0.5, 0.0, 1.0)])
    found = verdict_of_log({"a": always("a")}, log_of(rows), pool_of(MODELS[:2]), learned=learned, margin=0.1)
    assert found.best_single == "a"
    assert (found.equal_quality.kind, found.equal_quality.name) == ("model", "b")
    # All answers of a model cost the same, so that q is right; a question counts one chance in two, twice.
    _, reach, doubt = by_hand(log_of(rows), {"easy": "b"}, {"easy": "a"})
    costs = Contender(
        kind="model",
        name="b",
        gain_N=np.zeros(4000),
        cost_N2=np.tile([1.0, 10.0], (4000, 1)),
        cost_doubt=10 * doubt,
        dearest=20 * 10 * 2.0,
    )
    assert (reach, doubt > 1e-4) == (2.0, True)
    assert found.equal_quality.saving == pytest.approx(0.9)
    assert found.equal_quality.interval == pytest.approx(costs.saved(0.05 / 2))


@pytest.mark.parametrize("times", [8, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("copies", [(), ((0, 60), (1, 60), (2, 20))])
def test_where_models_are_alike_a_log_calls_somebody_better_once_in_twenty_at_most(times, copies):
    """Of every kind of question each model answers as many; a question is hard for all or for none."""
    alarms = 0
    for seed in range(times):
        rows = made_rows(150, seed=seed, skill={"easy": (0.5,) * 3, "hard": (0.5,) * 3}, copies=copies)
        strategies = {"mix": chooses(easy="b", hard="c"), "odd": chooses(easy="a", hard="b")}
        learned = log_of(
            [("0 easy", "a", 0.5, 1.0, 1.0), ("1 easy", "b", 0.5, 0.0, 1.0), ("2 easy", "c", 0.5, 0.0, 1.0)]
        )
        found = verdict_of_log(strategies, log_of(rows), pool_of(MODELS), learned=learned)
        alarms += any(one.found != "not resolved" for one in found.gains)
    assert alarms <= 0.05 * times + 3 * np.sqrt(0.0475 * times)
