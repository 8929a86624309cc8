"""``anabranch routers scale`` and ``probe``: questions to right runs and rows to learn from; judged steps to a probe that is run by."""

import json
import tomllib

import pytest

from anabranch.cli.main import main
from anabranch.locks import locked
from anabranch.routers.scale import Probe
from anabranch.routers.scale.traces import Solved
from gateway_scripted import scripted, whole
from scale_scripted import outline_of, stage_of, step_of, text_of

QUESTIONS = [{"question": f"What is {number} plus 1?", "answer": number + 1} for number in range(4)]


def model(asked):
    """Plans two steps; the answer to the last is right for even numbers."""

    def says(body):
        asked.append(body["model"])
        stage, text = stage_of(body["messages"]), text_of(body["messages"])
        if stage in ("outline", "select", "score"):
            said = {"outline": outline_of(("Say it.", "Add one.")), "select": "version1", "score": "0.9"}[stage]
        else:
            number = next(int(word) for word in text.split() if word.isdigit())
            said = rf"{body['model']}: {step_of(text)[:9]} \boxed{{{number + 1 + number % 2}}}"
        usage = {"prompt_tokens": 20, "completion_tokens": 6, "total_tokens": 26}
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
        return whole(
            {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
        )

    return says


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Runs a command beside an endpoint: code, stdout, stderr; and what the endpoint was asked."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    asked = []
    with scripted({"v1": model(asked)}) as url:

        def call(line):
            code = main(line.replace("URL", f"{url}/v1").split())
            return code, *capsys.readouterr()

        call.asked = asked
        yield call


def test_right_runs_become_rows_that_adapt_reads(run, tmp_path):
    line = (
        "routers scale q.jsonl --url URL --system1 small --system2 large --out runs --set decomposer.k=1 --quiet --json"
    )
    code, out, err = run(line)
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert (told["runs"], told["right"], told["failed"], told["rows"]) == (4, 2, 0, 2)
    assert told["tokens"] == 6 * told["calls"] == 6 * len(run.asked)
    assert {"small", "large"} == set(run.asked)
    rows = [json.loads(line) for line in (tmp_path / "runs/rows.jsonl").read_text().splitlines()]
    assert [row["input"] for row in rows] == ["What is 0 plus 1?", "What is 2 plus 1?"]
    assert rows[0]["output"].startswith("Step 1: Say it.\nlarge: ")
    assert rows[0]["output"].endswith(r"\boxed{1}")
    runs = [Solved.of(json.loads(line)) for line in (tmp_path / "runs/traces.jsonl").read_text().splitlines()]
    assert [one.is_right for one in runs] == [True, False, True, False]
    # Asked again it asks nobody, and says the same.
    before = len(run.asked)
    code, again, _ = run(line)
    assert (code, len(run.asked)) == (0, before)
    assert json.loads(again) == told


def test_questions_may_stand_twice(run, tmp_path):
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, [*QUESTIONS[:2], QUESTIONS[0]])))
    code, out, err = run(
        "routers scale q.jsonl --url URL --system1 small --out runs --set decomposer.k=1 --quiet --json"
    )
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert (told["runs"], told["right"], told["failed"], told["rows"]) == (3, 2, 0, 1)
    runs = [json.loads(line) for line in (tmp_path / "runs/traces.jsonl").read_text().splitlines()]
    assert [(one["question"], one["attempt"]) for one in runs] == [
        ("What is 0 plus 1?", 0),
        ("What is 1 plus 1?", 0),
        ("What is 0 plus 1?", 1),
    ]


def test_runs_on_other_questions_are_not_replaced(run, tmp_path):
    line = "routers scale q.jsonl --url URL --system1 small --out runs --set decomposer.k=1 --quiet --json"
    names = ("traces.jsonl", "rows.jsonl")
    assert run(f"{line} --samples 2")[0] == 0
    kept = [(tmp_path / "runs" / name).read_bytes() for name in names]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS[1:3])))
    asked = len(run.asked)
    code, out, err = run(line)
    assert (code, out, len(run.asked)) == (2, "", asked)
    assert (
        "error: runs/traces.jsonl would be replaced, and 6 of its 8 runs are on other questions, or further samples"
        in err
    )
    assert [(tmp_path / "runs" / name).read_bytes() for name in names] == kept
    # More of them go on, and ask for what is new alone.
    (tmp_path / "q.jsonl").write_text(
        "\n".join(map(json.dumps, [*QUESTIONS, {"question": "What is 8 plus 1?", "answer": 9}]))
    )
    code, out, err = run(f"{line} --samples 2")
    assert (code, err, json.loads(out)["runs"]) == (0, "", 10)
    # As many calls for each run as before.
    assert len(run.asked) == asked * 10 // 8
    # Rows of nobody knows what stay, and so does a file that is none.
    (tmp_path / "runs/traces.jsonl").unlink()
    assert "runs/rows.jsonl would be replaced, and no traces.jsonl says what it is of" in run(line)[2]
    (tmp_path / "runs/traces.jsonl").write_text("notes")
    assert "runs/traces.jsonl, line 1: " in run(line)[2]
    assert (tmp_path / "runs/traces.jsonl").read_text() == "notes"


@pytest.mark.parametrize("more", ["", " --system2 other --seed 5"])
def test_runs_whose_calls_are_gone_are_not_made_anew(run, tmp_path, more):
    line = "routers scale q.jsonl --url URL --system1 small --out runs --set decomposer.k=1 --quiet --json"
    assert run(line)[0] == 0
    names, asked = ("traces.jsonl", "rows.jsonl"), len(run.asked)
    kept = [(tmp_path / "runs" / name).read_bytes() for name in names]
    (journal, *_) = (tmp_path / "runs/journals").glob("*.jsonl")
    journal.unlink()
    code, out, err = run(f"{line}{more}")
    assert (code, out, len(run.asked)) == (2, "", asked)
    assert "runs/traces.jsonl would be replaced, and the calls of 1 of its 4 runs are not in runs/journals" in err
    assert [(tmp_path / "runs" / name).read_bytes() for name in names] == kept


def test_a_run_that_was_done_stays_where_it_fails_now(run, tmp_path):
    line = "routers scale q.jsonl --url URL --system1 small --out runs --set decomposer.k=1 --quiet --json"
    assert run(line)[0] == 0
    kept = (tmp_path / "runs/rows.jsonl").read_bytes()
    right = [json.loads(text)["right"] for text in (tmp_path / "runs/traces.jsonl").read_text().splitlines()]
    for journal in (tmp_path / "runs/journals").glob("*.jsonl"):
        # Its first line says what it is of; the calls are lost.
        journal.write_text(journal.read_text().splitlines(keepends=True)[0])
    run(line.replace("URL", "http://127.0.0.1:9/v1"))
    assert (tmp_path / "runs/rows.jsonl").read_bytes() == kept
    found = [json.loads(text) for text in (tmp_path / "runs/traces.jsonl").read_text().splitlines()]
    assert [one["right"] for one in found] == right
    assert all(one["error"] == "" for one in found)


def test_a_folder_has_one_writer(run, tmp_path):
    (tmp_path / "runs").mkdir()
    with locked(tmp_path / "runs/.scale.lock"):
        code, _, err = run("routers scale q.jsonl --url URL --system1 small --out runs --quiet")
    assert (code, len(run.asked)) == (2, 0)
    assert "runs is in use by another run; wait for its end, or take another folder" in err


def test_what_people_read(run):
    code, out, err = run(
        "gateway scale q.jsonl --url URL --system1 small --out runs --set decomposer.k=1 --samples 2 --most 1 --quiet"
    )
    assert (code, err) == (0, "")
    head, numbers = out.splitlines()[1:3]
    assert head.split()[:4] == ["runs", "right", "failed", "degraded"]
    assert numbers.split()[:4] == ["8", "4", "0", "0"]
    assert numbers.split()[-1] == "1"
    assert "next    anabranch adapt MODEL runs/rows.jsonl --out adapted" in out
    assert set(run.asked) == {"small"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q.jsonl --url URL --system1 s --out runs --set tua=1", "no field 'tua'"),
        (
            "q.jsonl --url URL --system1 s --out runs --set seed=1",
            "seed is a field of the config, and an option of the command line",
        ),
        ("none.jsonl --url URL --system1 s --out runs", "cannot read none.jsonl"),
        ("q.jsonl --url nowhere --system1 s --out runs", "nowhere"),
        (
            "q.jsonl --url http://127.0.0.1:9/v1 --system1 s --out runs",
            "no run was done; the first failed with BackendError",
        ),
        ("q.jsonl --url URL --system1 s --out runs --config none.toml", "cannot read none.toml"),
    ],
)
def test_mistakes_are_one_line(run, line, message):
    code, _, err = run(f"routers scale {line} --quiet")
    assert code == 2, err
    assert message in err
    assert [part for part in err.splitlines() if part.startswith("error: ")] == err.splitlines()[-1:]


# Probes


@pytest.fixture
def steps(tmp_path):
    rows = [
        {"step": f"{word} of {number}", "right1": right, "right2": 1 if number % 7 else 0}
        for number in range(60)
        for word, right in (("sum", 1), ("proof", 0))
    ]
    (tmp_path / "steps.jsonl").write_text("\n".join(map(json.dumps, rows)))
    outcomes = [{"query": row["step"], "scores": {"a": row["right1"], "b": row["right2"]}} for row in rows]
    (tmp_path / "outcomes.jsonl").write_text("\n".join(map(json.dumps, outcomes)))
    (tmp_path / "alone.jsonl").write_text('{"step": "sum", "right1": 1}\n{"step": "proof", "right1": 0}')


def test_a_probe_is_judged_on_steps_it_has_not_seen_and_learns_from_all(run, steps, tmp_path):
    code, out, err = run("routers probe steps.jsonl --out probe.json --quiet --json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    first, second = told["systems"]
    assert (told["steps"], first["right"], second["right"]) == (120, 0.5, pytest.approx(51 / 60))
    assert first["auc"] > 0.95
    assert first["log_loss"] < 0.5 < first["log_loss_of_mean"]
    easy, hard = Probe.Config(path=str(tmp_path / "probe.json")).build().predict(["sum", "proof"])
    assert easy.difficulty < 0.3 < 0.7 < hard.difficulty
    assert easy.knows2
    # The same of outcomes of two models.
    assert run("gateway probe outcomes.jsonl --system1 a --system2 b --out other.json --quiet")[0] == 0
    other = Probe.Config(path=str(tmp_path / "other.json")).build().predict(["sum", "proof"])
    assert [one.difficulty for one in other] == pytest.approx([easy.difficulty, hard.difficulty])


def test_what_people_read_of_a_probe_is_a_config(run, steps, tmp_path):
    code, out, err = run("routers probe alone.jsonl --out probe.json --quiet")
    assert code == 0
    assert "nobody says how right System 2 was (right2)" in err
    line = out.rpartition("[strategies.scale] ")[2]
    assert tomllib.loads(line)["assessor"] == {"kind": "probe", "path": "probe.json"}
    # It scores, and asks nobody.
    code, out, err = run(
        "routers scale q.jsonl --url URL --system1 small --system2 large --out runs --set decomposer.kind=identity "
        f"--set assessor.kind=probe --set assessor.path={tmp_path}/probe.json --quiet --json"
    )
    assert code == 0, err
    assert json.loads(out)["overhead_tokens"] == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("steps.jsonl --out probe.toml", "--out is 'probe.toml'; its name must end in .json"),
        ("steps.jsonl --out p.json --system2 b", "--system2 is 'b' without --system1"),
        ("steps.jsonl --out p.json --hold-out 0.001", "--hold-out is 0.001, which leaves one side of 120 steps empty"),
        ("outcomes.jsonl --out p.json", "line 1: right1 is missing"),
        ("outcomes.jsonl --system1 c --out p.json", "no model 'c' in the recorded outcomes"),
        ("steps.jsonl --out p.json --embedder x", "x"),
    ],
)
def test_probes_that_cannot_be(run, steps, line, message):
    code, out, err = run(f"routers probe {line} --quiet")
    assert (code, out) == (2, "")
    assert message in err
