"""Questions of one's own by split: the same whatever else is in the file, in its order, and known again by their digest."""

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import CheckpointError, DataError
from anabranch.rl.tokens.questions import OwnQuestions, check_began

ROWS = [{"prompt": f"question {number}", "answer": str(number)} for number in range(40)]


def written(tmp_path, rows=ROWS):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompts(questions, split):
    return [row.prompt for row in questions[split]]


def share_of(prompt):
    """Where a question stands between 0 and 1."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "big") / 2**64


def test_those_for_tests_are_told_by_a_digest_of_their_text(tmp_path):
    found = OwnQuestions(written(tmp_path), 0.25)
    asked = [row["prompt"] for row in ROWS]
    assert prompts(found, "test") == [prompt for prompt in asked if share_of(prompt) < 0.25]
    assert prompts(found, "train") == [prompt for prompt in asked if share_of(prompt) >= 0.25]
    assert [row.answers for row in found["test"]] == [(prompt.split()[1],) for prompt in prompts(found, "test")]


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(40)), count=st.integers(20, 40), held_out=st.floats(0.2, 0.8))
def test_a_question_stays_in_its_split_whatever_else_is_there(tmp_path_factory, order, count, held_out):
    folder = tmp_path_factory.mktemp("q")
    whole = OwnQuestions(written(folder), held_out)
    part = OwnQuestions(written(folder, [ROWS[place] for place in order[:count]]), held_out)
    for split in ("train", "test"):
        assert set(prompts(part, split)) <= set(prompts(whole, split))
        assert prompts(part, split) == sorted(prompts(part, split), key=[f"question {n}" for n in order].index)


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        (lambda rows: None, True),
        (lambda rows: rows[0].update(answer="other"), False),
        (lambda rows: rows[0].update(prompt="other"), False),
        (lambda rows: rows[0].update(entry_point="f"), False),  # a reward may look at any field
        (lambda rows: rows.reverse(), False),
        (lambda rows: rows.pop(), False),
        (lambda rows: rows.append(rows[0]), False),
    ],
)
def test_the_digest_is_of_what_is_asked_and_right_in_its_order(tmp_path, change, is_same):
    before = OwnQuestions(written(tmp_path), 0.25).digest
    rows = [dict(row) for row in ROWS]
    change(rows)
    after = OwnQuestions(written(tmp_path, rows), 0.25).digest
    assert (after == before) is is_same
    assert len(before) == 16
    # How many are held out is the config's, and no part of the file.
    assert OwnQuestions(written(tmp_path), 0.5).digest == before


@pytest.mark.parametrize(("held_out", "split"), [(0.0, "test"), (1.0, "train")])
def test_a_split_without_questions_is_told(tmp_path, held_out, split):
    with pytest.raises(
        DataError, match=f"has no question for {split}; it needs more of them, or another held_out than {held_out}"
    ):
        OwnQuestions(written(tmp_path), held_out)


def test_blank_questions_and_those_without_an_answer(tmp_path):
    path = written(tmp_path, [*ROWS, {"prompt": "  ", "answer": "x"}])
    with pytest.raises(DataError, match="line 41: the question is blank"):
        OwnQuestions(path, 0.25)
    path = written(tmp_path, [*ROWS, {"prompt": "who"}])
    with pytest.raises(DataError, match="line 41: there is no answer"):
        OwnQuestions(path, 0.25)
    found = OwnQuestions(path, 0.25, needs_answer=False)
    assert [row.answers for split in ("train", "test") for row in found[split] if row.prompt == "who"] == [()]


def test_half_a_surrogate_is_a_question_like_others(tmp_path):
    found = OwnQuestions(written(tmp_path, [*ROWS, {"prompt": "\ud800", "answer": "\udfff"}]), 0.25)
    assert "\ud800" in prompts(found, "train") + prompts(found, "test")


def test_a_run_that_began_with_other_files_is_not_gone_on_with():
    check_began({"questions": "ab", "reward": "cd"}, {"questions": "ab", "reward": "cd"})
    # Checkpoints of before there were digests have none.
    check_began({}, {"questions": "ab"})
    with pytest.raises(
        CheckpointError, match=r"the reward of the run changed since it began \(cd, now ef\); put back what was there"
    ):
        check_began({"questions": "ab", "reward": "cd"}, {"questions": "ab", "reward": "ef"})
