"""Runs over questions with answers: which are right, what is learned from them, and that failing ones end no other."""

import asyncio
import json

import pytest

from anabranch.errors import BackendError, DataError
from anabranch.routers.scale import Constant, Given, SelectiveReasoner
from anabranch.routers.scale.traces import (
    Question,
    Solved,
    _meaning,
    attempts,
    is_right,
    learnable,
    read_questions,
    read_traces,
    solution,
    solve_all,
)
from scale_scripted import Models

STEPS = ("Find a.", "Add one.")


def reasoner(**fields):
    return SelectiveReasoner(
        system1="small",
        system2="large",
        decomposer=Given.Config(steps=STEPS).build(),
        assessor=Constant.Config(difficulty=0.1).build(),
        **fields,
    )


def says(model, text, count):
    if "broken" in text:
        return BackendError("no")
    number = next(word for word in text.split() if word.isdigit())
    return rf"Here: \boxed{{{number}.0}}"


def solved(questions, **how):
    asked = []

    def ask():
        asked.append(Models({"solve": says}))
        return asked[-1]

    found = asyncio.run(solve_all(reasoner(), questions, ask, **how))
    return found, asked


def test_right_runs_are_rows_and_others_are_dropped():
    questions = [Question("What is 4 ?", ("4",)), Question("What is 5 ?", ("6", "7")), Question("broken", ("1",))]
    found, asked = solved(questions)
    assert [one.is_right for one in found] == [True, False, False]
    assert found[2].error.startswith("BackendError")
    # Each run is paid apart from the others.
    assert [one.trace.totals.all.completion for one in found[:2]] == [one.spent.completion_tokens for one in asked[:2]]
    (row,) = learnable(found)
    assert row["task"] == "scale"
    assert row["input"] == "What is 4 ?"
    first, second = row["output"].split("\n\n")
    assert first == "Step 1: Find a.\nHere: \\boxed{4.0}"
    assert second.startswith("Step 2: Add one.")
    assert second.endswith(r"\boxed{4.0}")


def test_one_row_of_each_question_and_no_more_than_are_wanted():
    questions = [Question(f"What is {number} ?", (str(number),)) for number in range(5)]
    found, asked = solved(questions, samples=3, at_once=2)
    assert [one.attempt for one in found] == [0, 1, 2] * 5
    assert len(learnable(found)) == 5
    assert [row["input"] for row in learnable(found, most=2)] == ["What is 0 ?", "What is 1 ?"]
    # Attempts have seeds of their own.
    seeds = [how["seed"] for one in asked for *_, how in one.asked]
    assert len(set(seeds)) == len(seeds)


def test_runs_read_back_and_go_on(tmp_path):
    questions = [Question("What is 4 ?", ("4",))]
    found, _ = solved(questions, journals=tmp_path)
    assert [Solved.of(json.loads(json.dumps(one.to_dict()))) for one in found] == found
    again, asked = solved(questions, journals=tmp_path)
    assert asked[0].asked == []
    assert again[0].trace.steps == found[0].trace.steps
    with pytest.raises(DataError, match="a run of SCALE is damaged"):
        Solved.of({"question": "x"})


def test_at_most_so_many_run_at_a_time():
    running = [0, 0]

    class Slow(Models):
        async def __call__(self, *args, **how):
            running[0] += 1
            running[1] = max(running)
            await asyncio.sleep(0.001)
            running[0] -= 1
            return await super().__call__(*args, **how)

    questions = [Question(f"What is {number} ?", ("1",)) for number in range(6)]
    asyncio.run(solve_all(reasoner(), questions, lambda: Slow({"solve": says}), at_once=2))
    assert running[1] == 2


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("at_once", [1, 4])
def test_a_question_that_stands_twice_is_run_twice(tmp_path, samples, at_once):
    questions = [Question(f"What is {number} ?", (answer,)) for number, answer in [(4, "4"), (5, "5"), (4, "3")]]
    found, asked = solved(questions, samples=samples, at_once=at_once, journals=tmp_path)
    assert [one.question for one in found] == [one for one in questions for _ in range(samples)]
    assert [one.attempt for one in found] == [*range(samples), *range(samples), *range(samples, 2 * samples)]
    assert [one.is_right for one in found] == [True] * 2 * samples + [False] * samples
    # Each is a sample of its own, and goes on from its own journal.
    seeds = [[how["seed"] for *_, how in one.asked] for one in asked]
    assert all(len(one) == len(STEPS) for one in seeds)
    assert len({seed for one in seeds for seed in one}) == len(found) * len(STEPS)
    assert len(list(tmp_path.glob("*.jsonl"))) == len(found)
    again, asked = solved(questions, samples=samples, journals=tmp_path)
    assert [one.asked for one in asked] == [[]] * len(found)
    assert [one.trace.steps for one in again] == [one.trace.steps for one in found]
    assert len(learnable(found)) == 2


@pytest.mark.parametrize(
    ("box", "answers", "right"),
    [
        ("4", ("4",), True),
        ("4.0", ("4",), True),
        ("1,200", ("1200",), True),
        ("4", (r"so \boxed{4}",), True),
        ("B", ("b",), False),
        ("Paris", ("paris",), True),
        ("5", ("4", "5"), True),
        (r"\frac{1}{2}", (r"\frac{1}{3}",), False),
        (" ", ("4",), False),
    ],
)
def test_what_is_a_right_answer(box, answers, right):
    models = Models({"solve": rf"\boxed{{{box}}}"})
    trace = asyncio.run(reasoner().solve("x", models))
    assert is_right(trace, answers) is right


def test_a_run_of_one_step_is_its_answer():
    one = SelectiveReasoner(
        system1="small",
        system2="large",
        decomposer=Given.Config(steps=("It.",)).build(),
        assessor=Constant.Config().build(),
    )
    trace = asyncio.run(one.solve("x", Models({"solve": r"<think>hm</think>It is \boxed{4}"})))
    assert solution(trace) == r"It is \boxed{4}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: this is no JSON"),
        ("[]", r"line 1: \[\] is no object"),
        ('{"answer": 1}', "line 1: nothing is asked"),
        ('{"question": null}', "line 1: question is null; it must be a text"),
        ('{"question": " ", "answer": 1}', "line 1: question and answer must be texts that are not empty"),
        ('{"question": "x"}', "line 1: there is no answer"),
        ('{"question": "x", "answer": ""}', "line 1: question and answer must be texts that are not empty"),
        ('{"question": "x", "answers": []}', "line 1: answers is "),
        ('{"question": "x", "answer": true}', "line 1: answer is true; it must be a text"),
        ("", "holds no questions"),
    ],
)
def test_questions_that_are_none(tmp_path, line, message):
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(DataError, match=message):
        read_questions(tmp_path / "q.jsonl")


def test_questions_in_other_words(tmp_path):
    rows = [
        {"problem": "a", "answer": 4},
        {"query": "b", "answers": ["x", 2.5]},
        {"prompt": "c", "answer": None, "target": "y"},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_questions(tmp_path / "q.jsonl") == [
        Question("a", ("4",)),
        Question("b", ("x", "2.5")),
        Question("c", ("y",)),
    ]


@pytest.mark.parametrize(
    ("options", "right", "wrong"),
    [
        # Letters themselves: no other ones beside them.
        (["B", "A", "C"], ["A"], ["B", "C"]),
        # Words that come to the same number: by letter alone.
        (["he left in May 1783", "she came in June 1783", "in 1790"], ["B"], ["A", "he left in May 1783", "C", "1783"]),
        (["red", "blue", "green"], ["B", "blue"], ["A", "C", "red", "green"]),
    ],
)
def test_a_wrong_option_is_never_right_however_it_is_said(tmp_path, options, right, wrong):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "Which?", "options": options, "answer": 1}))
    [question] = read_questions(tmp_path / "q.jsonl")
    meant = {_meaning(one) for one in question.answers}
    assert all(_meaning(rf"\boxed{{{said}}}") in meant for said in right)
    assert not any(_meaning(rf"\boxed{{{said}}}") in meant for said in wrong)


def test_options_that_cannot_be_told_apart_are_refused(tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "Which?", "options": ["A", "A."], "answer": 1}))
    with pytest.raises(DataError, match="cannot be told apart"):
        read_questions(tmp_path / "q.jsonl")


def test_options_are_shown_and_the_right_one_has_a_letter(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "Which?", "options": ["red", "blue"], "answer": 1}')
    assert read_questions(tmp_path / "q.jsonl") == [Question("Which?\n\nA. red\nB. blue", ("blue", "B"))]


def test_written_runs_are_read_back(tmp_path):
    found, _ = solved([Question("What is 4 ?", ("4",)), Question("broken", ("1",))])
    (tmp_path / "t.jsonl").write_text("\n\n".join(json.dumps(one.to_dict()) for one in found))
    assert read_traces(tmp_path / "t.jsonl") == found
    for line in ("{", "[]", "{}", '{"question": "x", "answers": [], "attempt": 0, "error": "", "trace": []}'):
        (tmp_path / "t.jsonl").write_text("\n" + line)
        with pytest.raises(DataError, match=r"t\.jsonl, line 2: "):
            read_traces(tmp_path / "t.jsonl")


def test_attempts_are_counted_by_text():
    first, second = Question("a", ("1",)), Question("b", ("2",))
    assert attempts([first, second, first], 2) == [
        (first, 0),
        (first, 1),
        (second, 0),
        (second, 1),
        (first, 2),
        (first, 3),
    ]


def test_a_journal_of_something_else_ends_all_with_one_error(tmp_path):
    questions = [Question("What is 4 ?", ("4",)), Question("What is 5 ?", ("5",))]
    solved(questions, journals=tmp_path)
    other = SelectiveReasoner(
        system1="tiny",
        system2="large",
        decomposer=Given.Config(steps=STEPS).build(),
        assessor=Constant.Config().build(),
    )
    with pytest.raises(DataError, match="is of another problem, seed or pair of systems"):
        asyncio.run(solve_all(other, questions, lambda: Models({"solve": says}), journals=tmp_path))
