"""Priors by question: learned from samples, better than one for all where words tell something, absent where they do not, and kept."""

from dataclasses import replace

import numpy as np
import pytest

from anabranch.errors import DataError, InputError
from anabranch.routers import Outcome, Query, strategies
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Model, Pool
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.money import Price
from anabranch.routers.strategies.difficulty import LEAST_QUESTIONS, DifficultyEncoder
from anabranch.test_time import BetaTTSPM, BudgetController
from anabranch.test_time.difficulty import TASK

POOL = Pool((Model(name="small", price=Price.of_dollars(1, 2)),))
EMBED = Hashed.Config(dim=128).build()


def made(count, samples, seed=0, tells=True):
    """Easy and hard questions that differ by a word, or by nothing: texts, chances, outcomes."""
    rng = np.random.default_rng(seed)
    is_easy_Q = rng.random(count) < 0.5
    p_Q = np.where(is_easy_Q, rng.beta(8, 2, count), rng.beta(0.5, 6, count))
    words = ["add these sums" if easy else "prove that theorem" for easy in is_easy_Q]
    texts = tuple(f"{word if tells else 'solve it'} number {at}" for at, word in enumerate(words))
    return texts, p_Q, rng.random((count, samples)) < p_Q[:, None]


def recorded(texts, right_QM, embed=EMBED):
    samples = tuple({"small": tuple(map(float, row))} for row in right_QM)
    return Recorded(
        query=texts,
        models=("small",),
        score_NM=right_QM.mean(1, keepdims=True),
        samples=samples,
        vector_ND=embed.embed(texts),
    )


@pytest.fixture(scope="module")
def program():
    texts, _, right_QM = made(300, 8)
    return strategies.make("best_of", least_gain=0.05, weight=1).fit(recorded(texts, right_QM))


def asked(text):
    return Query(text=text, vector_D=EMBED.embed([text])[0])


def test_an_easy_question_is_drawn_for_otherwise_than_a_hard_one(program):
    easy, hard = (program.route(asked(text), POOL) for text in ("add these sums please", "prove that theorem please"))
    assert program.needs_vector
    assert easy.details["difficulty"]["chance"] > 0.6 > 0.25 > hard.details["difficulty"]["chance"]
    assert (
        easy.details["difficulty"]["of_task"] == hard.details["difficulty"]["of_task"] == pytest.approx(0.44, abs=0.06)
    )
    assert easy.confidence > hard.confidence
    # One more is worth less where the first is nearly sure.
    assert easy.details["budget"] < 8
    explained = program.explain(asked("add these sums please"), POOL)["details"]
    assert explained["difficulty"]["questions"] == 300
    assert explained["difficulty"]["held_out_gain"] > 0.1
    assert "this question is solved so with" in easy.reason


def worth(p_Q, curves, eps=0.1):
    """Value of right answers less the price of samples, a question."""
    total = 0.0
    for p, one in zip(p_Q, curves, strict=True):
        # Until the next one's chance, given that all before failed, is no more than its price.
        n = next(n for n in range(65) if n == 64 or one.hazard(n) <= eps)
        total += (1 - (1 - p) ** n) - eps * (n if p == 0 else (1 - (1 - p) ** n) / p)
    return total / len(p_Q)


def test_its_priors_are_worth_more_than_one_for_all(program):
    """On other questions: the value of right answers less the price of samples, by the exact rule of either curve."""
    texts, p_Q, _ = made(400, 8, seed=1)
    curve, _ = program.known("small", None)
    own = [program.encoder.prior("small", vector_D, curve) for vector_D in EMBED.embed(texts)]
    assert worth(p_Q, own) > worth(p_Q, [curve] * len(texts)) + 0.02


def test_what_traffic_teaches_of_a_task_moves_the_prior_of_each_question(program):
    twin = strategies.make("best_of", least_gain=0.05, weight=1)
    twin.load_state(*program.state())
    before = twin.route(asked("prove that theorem now"), POOL).details["difficulty"]
    for number in range(900):
        twin.observe(Outcome(query=Query(text="x", request_id=f"r{number}"), model="small", quality=1.0))
    twin.settle()
    after = twin.route(asked("prove that theorem now"), POOL).details["difficulty"]
    assert after["of_task"] > before["of_task"] + 0.1
    assert after["chance"] > before["chance"] + 0.05


def test_it_is_kept_and_read_back_the_same(program):
    arrays, facts = program.state()
    twin = strategies.make("best_of", least_gain=0.05, weight=1)
    assert not twin.needs_vector
    twin.load_state(arrays, facts)
    assert twin.needs_vector
    query = asked("prove that theorem")
    assert twin.route(query, POOL) == program.route(query, POOL)
    for wrong in (
        {**arrays, "difficulty_MD": arrays["difficulty_MD"][:, :0]},
        {**arrays, "difficulty_MD": arrays["difficulty_MD"] * np.nan},
        {name: array for name, array in arrays.items() if name != "difficulty_MD"},
    ):
        with pytest.raises(DataError, match="priors by question are damaged"):
            twin.load_state(wrong, facts)
    for shape in (-1.0, [-1.0, 0.0, 0.0], [1.0, float("nan"), 0.0], [1.0, 0.0], None):
        with pytest.raises(DataError, match="priors by question are damaged"):
            twin.load_state(arrays, {**facts, "difficulty": [["small", shape, 0.1, 3]]})
    # What was read wrongly has changed nothing.
    assert twin.route(query, POOL) == program.route(query, POOL)


@pytest.mark.parametrize("vector", [None, np.ones(3), np.full(128, np.nan)])
def test_a_query_without_its_vector_is_refused(program, vector):
    with pytest.raises(InputError, match="vector"):
        program.route(Query(text="x", vector_D=vector), POOL)


def test_words_that_tell_nothing_and_few_questions_make_no_encoder():
    texts, _, right_QM = made(300, 8, tells=False)
    fitted = strategies.make("best_of").fit(recorded(texts, right_QM))
    assert not fitted.needs_vector
    assert fitted.route(Query(text="x"), POOL).details.keys() == {"curve", "questions", "budget", "sample_usd"}
    assert fitted.told() == [
        "no prior per question: its words tell no more than its task, or there are too few questions"
    ]
    texts, _, right_QM = made(LEAST_QUESTIONS - 1, 8)
    assert not strategies.make("best_of").fit(recorded(texts, right_QM)).needs_vector
    texts, _, right_QM = made(200, 8)
    off = strategies.make("best_of", difficulty=False).fit(recorded(texts, right_QM))
    assert (off.needs_vector, off.learns_vectors, off.told()) == (False, False, ())


def test_single_samples_tell_chances_and_take_the_concentration_of_the_curve():
    texts, _, right_QM = made(400, 1)
    fitted = strategies.make("best_of").fit(recorded(texts, right_QM))
    assert fitted.encoder.heads["small"].shape == TASK
    curve, _ = fitted.known("small", None)
    own = fitted.encoder.prior("small", asked("add these sums").vector_D, curve)
    assert own.a + own.b == pytest.approx(curve.a + curve.b)
    assert own.value(1) > curve.value(1) + 0.1


def test_questions_of_a_task_of_which_hardly_a_sample_is_right_are_told_as_that_hard():
    """They were told as one in a thousand, ten times what was counted, and drawn for as if that were so."""
    texts, p_Q, _ = made(120, 8)
    p_Q[60:] = 1e-4
    right_QM = np.random.default_rng(0).random((120, 1500)) < p_Q[:, None]
    counted = right_QM[60:].mean()
    assert 3e-5 < counted < 3e-4
    data = replace(recorded(texts, right_QM), task=("sums",) * 60 + ("proofs",) * 60)
    fitted = strategies.make("best_of", least_gain=0.05, weight=1e-4).fit(data)
    easy, hard = (
        fitted.route(replace(asked(text), task="proofs"), POOL).details["difficulty"]
        for text in ("add these sums please", "prove that theorem please")
    )
    assert easy["of_task"] == hard["of_task"] == pytest.approx(counted, rel=0.1)
    assert hard["chance"] < counted < easy["chance"]


def test_the_chance_of_a_model_that_it_knows_nothing_of_is_not_told():
    assert DifficultyEncoder().prior("small", None, BetaTTSPM(0.9, 1.0, 1.0)) is None


def test_questions_drawn_for_until_one_was_right_tell_how_sure_their_words_are():
    """Without, they were as sure as the task's curve, and drew on where nothing came."""
    texts, _, right_QM = made(400, 16)
    ended = [tuple(map(float, row[: row.argmax() + 1] if row.any() else row)) for row in right_QM]
    data = Recorded(
        query=texts,
        models=("small",),
        score_NM=np.array([[np.mean(row)] for row in ended]),
        samples=tuple({"small": row} for row in ended),
        vector_ND=EMBED.embed(texts),
    )
    fitted = strategies.make("best_of", least_gain=0.05, weight=1).fit(data)
    # Betas of 6.5 and 10, less what the words do not tell.
    assert 1 < fitted.encoder.heads["small"].shape.total < 10
    curve, _ = fitted.known("small", None)
    texts, p_Q, _ = made(400, 8, seed=1)
    own = [fitted.encoder.prior("small", vector_D, curve) for vector_D in EMBED.embed(texts)]
    assert worth(p_Q, own) > worth(p_Q, [curve] * len(texts)) + 0.02


# Money: draws by the question's prior, by the curve of its task, and the best that the true numbers allow


def betas(a, b, weight):
    """Chances that are Beta(a, b), as weighed points."""
    p = np.linspace(0.0025, 0.9975, 200)
    density = p ** (a - 1) * (1 - p) ** (b - 1)
    return [(weight * float(one), float(at)) for one, at in zip(density / density.sum(), p, strict=True)]


# Of each word the share of all questions and the chance of a sample, exactly.
WORLDS = {
    # Half of all are hopeless, and words tell which with 85 %.
    "hopeless": [[(0.425, 0.0), (0.075, 0.5)], [(0.075, 0.0), (0.425, 0.5)]],
    # All can be solved, and words tell hard ones.
    "hard": [betas(0.5, 6, 0.5), betas(8, 2, 0.5)],
    # Words tell hard ones, and nothing of what is hopeless.
    "both alike": [[(0.2, 0.0), (0.3, 0.15)], [(0.2, 0.0), (0.3, 0.7)]],
    "both": [[(0.3, 0.0), *betas(2, 6, 0.2)], [(0.05, 0.0), *betas(3, 3, 0.45)]],
}
MOST = 64


def value_of(word, draws, price):
    """What questions of a word are worth, exactly: right answers less the price of samples, all of which ended with the first right one."""
    total = 0.0
    for weight, p in word:
        solved = 1 - (1 - p) ** draws
        total += weight * (solved - price * (draws if p == 0 else solved / p))
    return total


def draws_of(curve, price):
    """By the controller, where all fail."""
    rules = BudgetController(curve=curve, value=1.0, cost=price, decides="posterior", batch=1, max_n=MOST)
    question = rules.begin()
    while question.next():
        question.told(1, verified=[False])
    return question.drawn


def drawn_by(words, until_right, *, price, seed=0, count=300, samples=16):
    """Of each word the draws that are best, by the question's prior, and by its task."""
    rng = np.random.default_rng(seed)
    every = [(word, weight, p) for word, of in enumerate(words) for weight, p in of]
    share = np.array([weight for _, weight, _ in every])
    at_Q = rng.choice(len(every), count, p=share / share.sum())
    word_Q, p_Q = np.array([every[at][0] for at in at_Q]), np.array([every[at][2] for at in at_Q])
    rows = (rng.random((count, samples)) < p_Q[:, None]).astype(float)
    ended = [tuple(row[: row.argmax() + 1] if until_right and row.any() else row) for row in rows]
    sight = np.eye(len(words), dtype=np.float32)
    data = Recorded(
        query=tuple(f"{at}" for at in range(count)),
        models=("small",),
        score_NM=np.array([[np.mean(row)] for row in ended]),
        samples=tuple({"small": row} for row in ended),
        vector_ND=sight[word_Q] + rng.normal(0, 0.05, (count, len(words))).astype(np.float32),
    )
    program = strategies.make("best_of").fit(data)
    curve, _ = program.known("small", None)
    best = [max(range(MOST + 1), key=lambda n: value_of(word, n, price)) for word in words]
    own = [draws_of(program.prior_of(Query(text="", vector_D=vector_D), "small")[0], price) for vector_D in sight]
    return best, own, [draws_of(curve, price)] * len(words)


def worths(words, draws, price):
    return sum(value_of(word, of, price) for word, of in zip(words, draws, strict=True))


@pytest.mark.parametrize("until_right", [False, True])
def test_hopeless_questions_are_left_as_early_as_the_true_numbers_have_it(until_right):
    """22 draws where 5 pay, with a question's ceiling of 1 and the concentration of its task."""
    words = WORLDS["hopeless"]
    best, own, task = drawn_by(words, until_right, price=0.01)
    assert best == [4, 9]
    assert own == [pytest.approx(4, abs=2), pytest.approx(9, abs=2)]
    assert worths(words, own, 0.01) > worths(words, best, 0.01) - 0.003 > worths(words, task, 0.01) + 0.003


@pytest.mark.slow
@pytest.mark.parametrize("price", [0.01, 0.05])
@pytest.mark.parametrize("until_right", [False, True])
@pytest.mark.parametrize("name", WORLDS)
def test_a_questions_prior_spends_nearly_as_well_as_the_true_numbers(name, until_right, price):
    words = WORLDS[name]
    best, own, task = drawn_by(words, until_right, price=price)
    assert worths(words, own, price) > worths(words, best, price) - 0.01
    assert worths(words, own, price) > worths(words, task, price) - 0.001


def any_world(seed):
    """Two or three words, each with hopeless ones and a Beta of its own."""
    rng = np.random.default_rng(seed)
    words = []
    for weight in rng.dirichlet(np.full(rng.integers(2, 4), 3.0)):
        hopeless = rng.beta(0.6, 1.2) if rng.random() < 0.8 else 0.0
        a, b = rng.uniform(0.4, 6), rng.uniform(0.4, 8)
        words.append([(weight * hopeless, 0.0), *betas(a, b, weight * (1 - hopeless))])
    return words


@pytest.mark.slow
@pytest.mark.parametrize("until_right", [False, True])
def test_in_no_world_it_is_worth_less_than_the_curve_of_the_task_beyond_noise(until_right):
    gains = []
    for seed in range(20):
        words = any_world(seed)
        for price in (0.01, 0.05):
            _, own, task = drawn_by(words, until_right, price=price, seed=seed)
            gains.append(worths(words, own, price) - worths(words, task, price))
    # 300 questions tell a chance to three points.
    assert min(gains) > -0.012
    assert np.mean(gains) > 0.005
