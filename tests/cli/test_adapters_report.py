"""``anabranch adapters report``: from folders and rows to a page; what is wrong in one line."""

import json

import pytest

from anabranch.data import ByteTokenizer
from anabranch.lm import save_model
from served_adapters import INSTRUCTIONS, TASKS, make_adapters, make_model, make_routers


@pytest.fixture(scope="module")
def place(work):
    """In ``work/chosen``: a model that reads bytes, adapters, what chooses among them, and rows of tasks."""
    root = work / "chosen"
    save_model(root / "base", make_model(), ByteTokenizer())
    make_adapters(root)
    make_routers(root)
    rows = [
        {"task": name, "input": f"{INSTRUCTIONS[name]} Number {number}.", "output": "Yes."}
        for number in range(3)
        for name in TASKS
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "untold.jsonl").write_text('{"input": "x", "output": "y"}\n')
    return root


@pytest.mark.parametrize(
    ("adapter", "data", "names"),
    [
        ("pool", "rows.jsonl", ["law", "sql", "sum"]),
        ("arrow:pool", "rows.jsonl", ["law", "sql", "sum"]),
        ("routed_low_rank", "rows.jsonl", ["0", "1", "2"]),
        ("multi_head_routed", None, ["skill 0", "skill 1", "skill 2"]),
    ],
)
def test_a_page_for_each_kind(here, place, adapter, data, names, tmp_path):
    kind, sign, own = adapter.rpartition(":")
    given = ["adapters", "report", place / "base", f"{kind}{sign}{place / own}", "--out", tmp_path / "out"]
    given += [] if data is None else ["--data", place / data, "--rows", 2]
    code, out, err = here(*given, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["adapters"] == names
    assert sorted(told["tasks"]) == sorted(TASKS)
    assert all(sum(row) == pytest.approx(1) for row in told["shares"])
    kept = json.loads((tmp_path / "out" / "adapters.json").read_text())
    assert kept["shares"] == told["shares"]
    if adapter == "pool":
        # By what is asked, a task finds its adapter.
        weights = [rows[told["matrices"].index("blocks.0.attention.q")] for rows in told["weights"]]
        best = {task: names[row.index(max(row))] for task, row in zip(told["tasks"], weights, strict=True)}
        assert best == {task: task for task in TASKS}
        # As rows are learned: with a new line behind what is asked; the end of the text is foretold and not read.
        assert told["tokens"][0] == 2 * len(f"{INSTRUCTIONS['sql']} Number 0.\nYes.")
    # Once more, over the first, in words.
    code, out, err = here(*given)
    assert code == 0, err
    assert "is served by" in out
    assert "adapters.html" in out


def test_rows_without_a_task_are_of_one(here, place, tmp_path):
    code, out, err = here(
        "adapters",
        "report",
        place / "base",
        place / "pool",
        "--data",
        place / "untold.jsonl",
        "--out",
        tmp_path,
        "--json",
    )
    assert code == 0, err
    assert json.loads(out)["tasks"] == ["(none)"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["base", "pool"], "so the report needs rows; give some with --data"),
        (["base", "a", "--data", "rows.jsonl"], "has no router: it is one adapter for all rows"),
        (
            ["base", "multi_head_routed", "--data", "rows.jsonl"],
            "routes by task, so the report needs no rows; leave out --data",
        ),
        (["base", "arrow:a", "--data", "rows.jsonl"], "is one adapter, and arrow routes among several"),
        (["base", "arrow:nowhere", "--data", "rows.jsonl"], "nothing that arrow could choose from"),
        (["base", "nowhere", "--data", "rows.jsonl"], "no adapter at"),
        (["base", "pool", "--data", "nowhere"], "nowhere"),
        (["nowhere", "pool", "--data", "rows.jsonl"], "nowhere"),
        (["base", "pool", "--data", "rows.jsonl", "--rows", "0"], "--rows"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_wrong_is_one_line(here, place, tmp_path, line, message):
    def placed(word):
        kind, sign, own = word.rpartition(":")
        return f"{kind}{sign}{place / own}" if (place / own).exists() or own == "nowhere" else word

    code, _, err = here("adapters", "report", *map(placed, line), "--out", tmp_path / "out")
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_replaced(here, place, tmp_path):
    (tmp_path / "adapters.json").write_text("mine")
    code, _, err = here("adapters", "report", place / "base", place / "multi_head_routed", "--out", tmp_path)
    assert code == 2
    assert "is not replaced" in " ".join(err.split())
    assert (tmp_path / "adapters.json").read_text() == "mine"
