"""Files of questions: every name that is known, what is right of options, and each line that is no question, by its number."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import DataError
from anabranch.questions import ASKED, QuestionRow, question_rows


def written(tmp_path, *rows, name="q.jsonl"):
    path = tmp_path / name
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def read(tmp_path, *rows, **how):
    return list(question_rows(written(tmp_path, *rows), **how))


def test_a_question_is_what_its_line_says(tmp_path):
    row = {"id": 7, "prompt": "2 + 3 =", "answer": "5", "level": "easy"}
    path = written(tmp_path, row)
    [found] = question_rows(path)
    assert found == QuestionRow("7", "2 + 3 =", ("5",), where=f"{path}, line 1")
    assert found.row == row


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("answered", ["answer", "answers", "output", "target", "completion"])
def test_every_name_of_what_is_asked_and_right(tmp_path, asked, answered):
    [found] = read(tmp_path, {asked: "Who?", answered: "Ann"})
    assert (found.id, found.prompt, found.answers, found.options, found.correct) == ("", "Who?", ("Ann",), (), None)


def test_several_answers_and_numbers_are_texts(tmp_path):
    rows = (
        {"prompt": "a", "answers": ["Ann", "Ann Smith"]},
        {"prompt": 3, "answer": 2.5},
        {"prompt": "c", "answer": ["", 4]},
    )
    assert [(row.prompt, row.answers) for row in read(tmp_path, *rows)] == [
        ("a", ("Ann", "Ann Smith")),
        ("3", ("2.5",)),
        ("c", ("", "4")),
    ]


def test_the_first_name_that_is_there_counts(tmp_path):
    """In the order of the page: prompt before question, answer before output; a name that says null is not there."""
    rows = (
        {"question": "b", "prompt": "a", "output": "y", "answer": "x"},
        {"prompt": "a", "answer": None, "target": "z"},
    )
    assert [(row.prompt, row.answers) for row in read(tmp_path, *rows)] == [("a", ("x",)), ("a", ("z",))]


@pytest.mark.parametrize(("answer", "correct"), [("red", 0), ("A", 0), (" b ", 1), (1, 1), ("C", 0), (2, 2)], ids=str)
def test_options_are_named_by_text_letter_or_number(tmp_path, answer, correct):
    # The text of an option comes before its letter: "C" is the first one's text where it is one.
    options = ["C", "blue", "green"] if answer == "C" else ["red", "blue", "green"]
    for name in ("options", "choices"):
        [found] = read(tmp_path, {"prompt": "Which?", name: options, "answer": answer})
        assert (found.correct, found.answers, found.options) == (correct, (options[correct],), tuple(options))


def test_blank_lines_are_none_and_numbers_of_lines_stay(tmp_path):
    path = written(
        tmp_path, "\ufeff" + json.dumps({"prompt": "a", "answer": "x"}), "", "  ", {"prompt": "b", "answer": "y"}
    )
    assert [row.where for row in question_rows(path)] == [f"{path}, line 1", f"{path}, line 4"]
    assert [row.prompt for row in question_rows(path, limit=1)] == ["a"]
    assert list(question_rows(path, limit=0)) == []


def test_a_limit_looks_at_no_further_line(tmp_path):
    assert len(read(tmp_path, {"prompt": "a", "answer": "x"}, "nonsense", limit=1)) == 1


def test_files_may_be_packed_and_have_the_line_ends_of_windows(tmp_path):
    row = {"prompt": "a", "answer": "x"}
    assert [each.prompt for each in question_rows(written(tmp_path, row, row, name="q.jsonl.gz"))] == ["a", "a"]
    (tmp_path / "w.jsonl").write_bytes(b'{"prompt": "a", "answer": "x"}\r\n\r\n{"prompt": "b", "answer": "y"}\r\n')
    assert [each.prompt for each in question_rows(tmp_path / "w.jsonl")] == ["a", "b"]


def test_without_answers_where_none_are_needed(tmp_path):
    [found] = read(tmp_path, {"prompt": "a", "options": ["x", "y"]}, needs_answer=False)
    assert (found.answers, found.options, found.correct) == ((), ("x", "y"), None)
    # One that is there is held to be one all the same.
    with pytest.raises(DataError, match='answer is "z"; it must be one of the options, its letter, or 0 to 1'):
        read(tmp_path, {"prompt": "a", "options": ["x", "y"], "answer": "z"}, needs_answer=False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "this is no JSON"),
        ("[" * 100_000, "this is no JSON"),
        ("[1]", r"\[1\] is no object"),
        (
            {"answer": "x"},
            "nothing is asked; one of prompt, input, question, instruction, problem, query must be a text",
        ),
        ({"prompt": "", "answer": "x"}, "nothing is asked"),
        ({"prompt": None, "answer": "x"}, "prompt is null; it must be a text"),
        ({"prompt": True, "answer": "x"}, "prompt is true; it must be a text"),
        ({"prompt": "a"}, "there is no answer; one of answer, answers, output, target, completion must say it"),
        ({"prompt": "a", "answer": {"b": 1}}, 'answer is {"b": 1}; it must be a text'),
        ({"prompt": "a", "answers": ["x", None]}, "answers is null; it must be a text"),
        ({"prompt": "a", "answers": []}, r"answers is \[\]; it must be a text"),
        ({"id": 1.5, "prompt": "a", "answer": "x"}, "id is 1.5; it must be a text or a whole number"),
        ({"id": True, "prompt": "a", "answer": "x"}, "id is true"),
        ({"prompt": "a", "options": ["x"], "answer": "x"}, "it must be a list of at least two texts"),
        ({"prompt": "a", "options": ["x", ""], "answer": "x"}, "it must be a list of at least two texts"),
        ({"prompt": "a", "options": "xy", "answer": "x"}, 'options is "xy"'),
        ({"prompt": "a", "options": ["x", "y"], "answer": 2}, "answer is 2; it must be one of the options"),
        ({"prompt": "a", "options": ["x", "y"], "answer": -1}, "answer is -1"),
        ({"prompt": "a", "options": ["x", "y"], "answer": True}, "answer is true"),
        ({"prompt": "a", "options": ["x", "y"], "answer": "c"}, 'answer is "c"'),
        ({"prompt": "a", "options": ["x", "y"], "answer": ""}, 'answer is ""'),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_line_that_is_no_question_is_told_by_its_number(tmp_path, line, message):
    path = written(tmp_path, {"prompt": "fine", "answer": "x"}, line)
    with pytest.raises(DataError, match=message) as caught:
        list(question_rows(path))
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert "\n" not in str(caught.value)


def test_a_line_of_a_book_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("anabranch.questions._LONGEST", 40)
    fits = json.dumps({"prompt": "a", "answer": "x"}).ljust(40)
    assert len(read(tmp_path, fits)) == 1
    with pytest.raises(DataError, match="41 characters; a question has at most 40"):
        read(tmp_path, fits + " ")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="is a folder; name a file of JSON lines"):
        list(question_rows(tmp_path))
    with pytest.raises(DataError, match="cannot read"):
        list(question_rows(tmp_path / "nothing.jsonl"))
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(DataError, match=r"line 1: not UTF-8 \(invalid start byte at byte 12\)"):
        list(question_rows(tmp_path / "b.jsonl"))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), max_size=6))
def test_whatever_is_written_is_read(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("q") / "q.jsonl"
    for is_ascii in (True, False):
        lines = (json.dumps({"prompt": prompt, "answers": answers}, ensure_ascii=is_ascii) for prompt, answers in rows)
        path.write_text("".join(line + "\n" for line in lines), "utf-8", newline="\n")
        assert [(row.prompt, list(row.answers)) for row in question_rows(path)] == rows
