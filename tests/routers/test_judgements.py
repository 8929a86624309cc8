"""Judged answers as MT-Bench keeps them become outcomes."""

import json
import math

import numpy as np
import pytest

from anabranch.cli.main import main
from anabranch.errors import DataError
from anabranch.routers.data import load_judgements, load_outcomes

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Shorter."]},
    {"question_id": 82, "category": "maths", "turns": ["What is 7 * 8?", "And 9?"], "reference": ["56", "72"]},
    {"question_id": 83, "category": "maths", "turns": ["Nobody judged this."]},
]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def bench(tmp_path):
    write(tmp_path / "question.jsonl", QUESTIONS)
    return tmp_path


def grade(id, model, score, turn=1):
    return {"question_id": id, "model": model, "judge": ["gpt-4", "single-v1"], "score": score, "turn": turn}


def pair(id, first, second, g1, g2, turn=1):
    return {"question_id": id, "model_1": first, "model_2": second, "g1_winner": g1, "g2_winner": g2, "turn": turn}


def test_grades_by_hand(bench):
    rows = [
        grade(81, "a", 9),
        grade(81, "a", 7, 2),
        grade(81, "b", 4),
        grade(81, "b", -1, 2),  # -1: not read
        grade(82, "b", 10),
        grade(82, "a", 2.5),
    ]
    write(bench / "model_judgment/gpt-4_single.jsonl", rows)
    write(
        bench / "model_answer/a.jsonl",
        [{"question_id": 81, "model_id": "a", "choices": [{"turns": ["Roses", "Red"]}]}, {"question_id": 82}],
    )
    data = load_outcomes(bench)
    assert (data.query, data.task, data.models) == (
        ("Write a poem.", "What is 7 * 8?"),
        ("writing", "maths"),
        ("a", "b"),
    )
    np.testing.assert_allclose(data.score_NM, [[0.8, 0.4], [0.25, 1.0]])
    assert data.answers == ({"a": "Roses"}, {})


@pytest.mark.parametrize("score", [-1, -0.1, 10.1, 20, 10**400, -(10**400), 1e308, math.nan, math.inf, -math.inf])
def test_a_grade_that_is_none_is_passed_over(bench, score):
    """A very long number was an OverflowError."""
    write(
        bench / "model_judgment/j.jsonl",
        [grade(81, "a", 5), grade(81, "b", 6), grade(82, "a", score), grade(82, "b", 10 + 1e-8)],
    )
    data = load_outcomes(bench)
    found = dict(zip(data.query, data.score_NM.tolist(), strict=True))
    assert found["Write a poem."] == [0.5, 0.6]
    assert np.isnan(found.get("What is 7 * 8?", [math.nan])[0])


def test_pairs_by_hand(bench):
    """Both orders; ties half; one order alone does not count. Of three models each has the mean over the two others."""
    file = write(
        bench / "pairs.jsonl",
        [
            pair(81, "a", "b", "model_1", "model_1"),
            pair(81, "b", "c", "model_1", "tie"),
            pair(81, "a", "c", "model_1", "model_2"),
            pair(82, "a", "b", "tie", "error"),
            pair(82, "b", "a", "model_1", "model_1"),
            pair(82, "a", "c", "tie", "tie"),
        ],
    )
    data = load_outcomes(file)
    assert data.models == ("a", "b", "c")
    np.testing.assert_allclose(data.score_NM, [[(1 + 0.5) / 2, (0 + 0.75) / 2, (0.25 + 0.5) / 2], [0.25, 1.0, 0.5]])


def test_verdicts_of_people_by_hand(bench):
    rows = [
        {"question_id": 81, "model_a": "a", "model_b": "b", "winner": winner, "judge": judge, "turn": 1}
        for judge, winner in (
            ("expert_0", "model_a"),
            ("expert_1", "tie (inconsistent)"),
            ("author_0", "model_b"),
            ("x", None),
        )
    ]
    data = load_judgements(write(bench / "human.jsonl", rows))
    np.testing.assert_allclose(data.score_NM, [[0.5, 0.5]])


def test_a_router_is_fitted_on_them(tmp_path, capsys):
    generator = np.random.default_rng(0)
    topics = {"writing": "write verses about", "maths": "add the numbers"}
    questions = [
        {"question_id": n, "category": topic, "turns": [f"{topics[topic]} {n}"]}
        for n, topic in enumerate(generator.choice(list(topics), 80).tolist())
    ]
    write(tmp_path / "bench/question.jsonl", questions)
    rows = [
        pair(
            one["question_id"], "poet", "mathematician", *["model_1" if one["category"] == "writing" else "model_2"] * 2
        )
        for one in questions
    ]
    write(tmp_path / "bench/model_judgment/gpt-4_pair.jsonl", rows)
    assert (
        main(f"routers fit {tmp_path}/bench --out {tmp_path}/made --strategy coe --set coe.head=knn --quiet".split())
        == 0
    )
    for text, model in (("write verses about 500", "poet"), ("add the numbers 500", "mathematician")):
        capsys.readouterr()
        assert main(["routers", "route", text, "--router", f"{tmp_path}/made", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["candidates"][0]["model"] == model


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "must hold one file of judgements beside question.jsonl; there is none"),
        (
            {"a.jsonl": [grade(81, "a", 1)], "model_judgment/b.jsonl": [grade(81, "a", 1)]},
            "there is 2: a.jsonl, model_judgment/b.jsonl",
        ),
        ({"a.jsonl": [grade(99, "a", 1)]}, "line 1 judges question 99, which is not in"),
        ({"a.jsonl": [grade(81, "a", -1)]}, "holds no judgement that counts"),
        (
            {"a.jsonl": [grade(81, "a", 1), grade(81, "a", "9")]},
            "line 2 must have a model and a score that is a number",
        ),
        (
            {"a.jsonl": [grade(81, "a", 1), {"question_id": 81, "model_1": "a"}]},
            "line 2 must have a score, or two models",
        ),
        ({"a.jsonl": [grade(81, "a", 1), {"id": 3}]}, "line 2 must be an object with a question_id"),
        (
            {"a.jsonl": [grade(81, "a", 1)], "question.jsonl": [{"question_id": 81, "turns": []}]},
            "line 1 must have turns",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(bench, files, message):
    for name, rows in files.items():
        write(bench / name, rows)
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        load_outcomes(bench)


def test_judgements_without_their_questions_are_told(tmp_path):
    with pytest.raises(DataError, match=r"no question\.jsonl beside or above"):
        load_outcomes(write(tmp_path / "a.jsonl", [grade(81, "a", 1)]))
    for name in ("gateway.toml", "gateway.yaml", "gateway.yml"):
        with pytest.raises(DataError, match=f"^{name} is a config by its name, .* in its store: give the file or URL"):
            load_outcomes(name)
    with pytest.raises(DataError, match="has no ending that is known"):
        load_outcomes(tmp_path)
