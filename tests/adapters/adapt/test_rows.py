"""Rows of tasks: read, parted, encoded."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.adapters.adapt.rows import Row, digest_of, encoded, parted, read_rows
from anabranch.data import ByteTokenizer
from anabranch.errors import DataError

BYTES = ByteTokenizer.Config().build()


def written(tmp_path, *rows, name="rows.jsonl"):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_the_forms_of_rows(tmp_path, name):
    path = written(
        tmp_path,
        {"task": "a", "input": "x", "output": "y"},
        {"prompt": "x", "completion": "y"},
        {"instruction": "do", "target": 7},
        "",
        {"task": "b", "definition": "do", "input": "x", "output": ["first", "second"], "split": "TEST"},
        {"instruction": "do", "input": "", "output": "y", "more": {"is": "kept apart"}},
        name=name,
    )
    assert read_rows(path) == [
        Row("a", "x", "y"),
        Row("", "x", "y"),
        Row("", "do", "7"),
        Row("b", "do\n\nx", "first", "test"),
        Row("", "do", "y"),
    ]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2: this is no JSON"),
        ("[1]", "line 2: .* is no object"),
        ('{"output": "y"}', "line 2: nothing is asked"),
        ('{"input": "x"}', "line 2: there is no answer"),
        ('{"input": "x", "output": []}', "line 2: there is no answer"),
        ('{"input": {"a": 1}, "output": "y"}', "line 2: input is .*; it must be a text"),
        ('{"input": "x", "output": true}', "line 2: output is"),
        ('{"input": "x", "output": "y"}', "line 2: the row names no task"),
        ("[" * 5000, "line 2: this is no JSON"),
    ],
)
def test_lines_that_are_no_rows(tmp_path, line, told):
    path = written(tmp_path, {"task": "a", "input": "x", "output": "y"}, line)
    with pytest.raises(DataError, match=told):
        read_rows(path, needs_task=True)


def test_files_that_hold_none(tmp_path):
    for path, told in [(tmp_path, "folder"), (tmp_path / "no", "cannot read"), (written(tmp_path, ""), "no rows")]:
        with pytest.raises(DataError, match=told):
            read_rows(path)
    (tmp_path / "bad").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match="UTF-8"):
        read_rows(tmp_path / "bad")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"x" * 99)[:20])
    with pytest.raises(DataError, match="cannot read"):
        read_rows(tmp_path / "cut.gz")


def test_rows_are_held_out_as_they_say():
    rows = [Row("a", str(number), "y", split) for number, split in enumerate(["", "train", "dev", "example", "test"])]
    kept, out = parted(rows, 0.5)
    assert [row.prompt for row in out] == ["2", "4"]
    assert [row.prompt for row in kept] == ["0", "1", "3"]


@given(st.integers(20, 200), st.sampled_from([0.0, 0.1, 0.5]))
def test_or_by_a_share_of_what_they_are(number, share):
    rows = [Row("a", str(place // 2), str(place)) for place in range(number)]
    kept, out = parted(rows, share)
    assert sorted([*kept, *out], key=rows.index) == rows
    assert not {row.prompt for row in kept} & {row.prompt for row in out}
    more = [*rows, Row("b", "new", "y")]
    assert [row for row in parted(more, share)[1] if row in rows] == out
    assert bool(share) or not out


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), min_size=1, max_size=40),
    st.sampled_from([0.1, 0.5, 0.9, 0.999]),
)
def test_tasks_keep_something_to_learn_and_questions_stand_on_one_side(drawn, share):
    rows = [Row(task, f"question {number}", "y") for task, number in drawn]
    kept, out = parted(rows, share)
    assert {row.task for row in kept} == {row.task for row in rows}
    assert not {row.prompt for row in kept} & {row.prompt for row in out}
    again = parted(rows[::-1], share)[1]
    assert sorted(row.prompt for row in again) == sorted(row.prompt for row in out)
    prompts = {task: {row.prompt for row in rows if row.task == task} for task in "abc"}
    can_spare = any(all({prompt} != theirs for theirs in prompts.values()) for prompt in {row.prompt for row in rows})
    assert bool(out) == can_spare


def test_nothing_left_to_learn():
    with pytest.raises(DataError, match=r"all 2 rows of a/b\.jsonl say that they are held out \(split: dev, test\)"):
        parted([Row("a", "x", "y", split, "a/b.jsonl, line 1") for split in ("test", "dev")], 0.1)
    assert parted([Row("a", "x", "y")] * 2, 0.99) == ([Row("a", "x", "y")] * 2, [])


def test_the_digest_is_of_content_and_order():
    one, two = Row("a", "x", "y"), Row("a", "x", "z")
    assert digest_of([one, two]) == digest_of([one, two])
    assert len({digest_of([one, two]), digest_of([two, one]), digest_of([one])}) == 3


def test_tokens_by_hand():
    made = encoded([Row("a", "ab", "c"), Row("b", "d", "ef")], [0, 1], BYTES, "<{prompt}>", 16)
    eos = BYTES.eos_id
    assert made.token_NL.tolist() == [[60, 97, 98, 62, 99, eos], [60, 100, 62, 101, 102, eos]]
    assert (made.start_N.tolist(), made.length_N.tolist(), made.task_N.tolist()) == ([4, 3], [6, 6], [0, 1])
    assert made.num_cut == 0


def test_what_is_too_long_loses_the_front_of_its_prompt_and_then_the_end_of_its_answer():
    made = encoded([Row("a", "{}abc", "xy"), Row("a", "abc", "vwxyz")], [0, 0], BYTES, "{prompt}", 4)
    eos = BYTES.eos_id
    assert made.token_NL.tolist() == [[99, 120, 121, eos], [99, 118, 119, 120]]
    assert made.start_N.tolist() == [1, 1]
    assert made.num_cut == 2


def test_measured_rows_are_spread_over_tasks():
    from anabranch.adapters.adapt.rows import spread_rows

    rows = [Row(task, "x", "yy") for task in "aaaabb"]
    made = encoded(rows, [0, 0, 0, 0, 1, 1], BYTES, "{prompt}", 16)  # 4 tokens each
    assert spread_rows(made, None).tolist() == [0, 1, 2, 3, 4, 5]
    assert spread_rows(made, 8).tolist() == [0, 4]
    assert spread_rows(made, 17).tolist() == [0, 1, 4, 5]
    assert spread_rows(made, 1).tolist() == [0]


@pytest.mark.parametrize(
    "row",
    [
        {"input": "2+2?", "output": ["four", 4], "choices": ["four", "4", "5"]},
        {"input": "2+2?", "output": "four", "answer": 4, "choices": ["four", "4", "5"]},
        {"input": "2+2?", "output": 4, "answer": "four", "choices": {"text": ["four", 4, 5]}},
    ],
)
def test_an_answer_that_is_a_number_is_no_wrong_choice(tmp_path, row):
    (found,) = read_rows(written(tmp_path, row))
    assert {found.answer, *found.others} == {"four", "4"}
    assert found.wrong == ("5",)


@pytest.mark.parametrize("name", ["task", "input", "output", "split"])
def test_half_a_character_is_told_where_it_stands(tmp_path, name):
    row = {"task": "t", "input": "x", "output": "y"} | {name: "a\ud800"}
    with pytest.raises(DataError, match=r"line 2: a text holds half of a character \(.ud800\)"):
        read_rows(written(tmp_path, {"task": "t", "input": "x \U0001f600", "output": "y"}, row))


def test_what_nobody_reads_may_be_anything(tmp_path):
    row = {"task": "t", "input": "x", "output": "y", "meta": {"source": "\ud800"}}
    assert len(read_rows(written(tmp_path, row))) == 1


def test_the_first_answer_that_is_not_empty(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"input": "a", "output": ["", null, "b", "c"]}')
    assert [row.answer for row in read_rows(tmp_path / "rows.jsonl")] == ["b"]
    (tmp_path / "rows.jsonl").write_text('{"input": "a", "output": ["", ""]}')
    with pytest.raises(DataError, match="there is no answer"):
        read_rows(tmp_path / "rows.jsonl")
