"""Rewards by name: what is right of questions with options, and of answers that say nothing."""

import json

import pytest

from anabranch.errors import DataError
from anabranch.questions import question_rows
from anabranch.rl.tokens.rewards import find_reward


@pytest.fixture
def row(tmp_path):
    def made(**fields):
        (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "x", **fields}) + "\n")
        return next(iter(question_rows(tmp_path / "q.jsonl")))

    return made


@pytest.mark.parametrize(
    ("options", "answer", "right", "wrong"),
    [
        (["B cells", "T cells"], "A", "A", "B"),
        (["Paris", "Rome"], "Rome", "(B)", "A."),
        (["A", "B"], "B", "B", "A"),
        # Options that are letters themselves.
        (["B", "A"], "B", "B", "A"),
    ],
)
def test_the_letter_of_an_option(row, options, answer, right, wrong):
    reward, question = find_reward("letter"), row(options=options, answer=answer)
    reward.check(question)
    assert [reward(question, said) for said in (right, wrong, "", "none of them")] == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "answer"), [("exact", " "), ("match", ""), ("match", " "), ("f1", " \n"), ("boxed", " ")]
)
def test_an_answer_that_says_nothing_is_refused(row, name, answer):
    with pytest.raises(DataError, match=r"q\.jsonl.*answer"):
        find_reward(name).check(row(answer=answer))
    both = row(answer=[answer, r"\boxed{Paris}"])
    find_reward(name).check(both)
    assert [find_reward(name)(both, said) for said in ("", " ", "the")] == [0.0, 0.0, 0.0]
    assert find_reward(name)(both, r"\boxed{Paris}") == 1.0


@pytest.mark.parametrize("name", ["match", "f1"])
@pytest.mark.parametrize("answer", ["A", "the", "+", "!!!"])
def test_an_answer_of_articles_or_signs_alone_is_none_that_says_nothing(row, name, answer):
    reward, question = find_reward(name), row(answer=answer)
    reward.check(question)
    assert [reward(question, said) for said in (answer, "", " ", "Paris")] == [1.0, 0.0, 0.0, 0.0]
