"""``anabranch routers curve``: from a file of samples to the number that pays, a picture, and a strategy that is served by it."""

import json
import shlex
import tomllib

import numpy as np
import pytest

from anabranch.cli.main import main
from anabranch.routers.fitted import load_folder
from anabranch.test_time import BetaTTSPM


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Samples in each form: rows of samples, scores of models with costs, a row for each sample."""
    folder = tmp_path_factory.mktemp("curve")
    rng = np.random.default_rng(0)
    rows = rng.random((90, 8)) < rng.beta(0.6, 1.2, (90, 1))
    tasks = ["sums" if at % 2 else "words" for at in range(90)]
    lines = {
        "samples.jsonl": [
            {"question": f"q {at}?", "task": tasks[at], "samples": row.tolist(), "model": "small"}
            for at, row in enumerate(rows)
        ],
        "scores.jsonl": [
            {"query": f"q {at}?", "scores": {"small": row.tolist()}, "cost": {"small": 0.002}}
            for at, row in enumerate(rows)
        ],
        "each.jsonl": [
            {"query": f"q {at}?", "scores": {"small": int(one)}} for at, row in enumerate(rows) for one in row
        ],
        "none.jsonl": [{"question": f"q {at}?", "samples": [False] * 8, "model": "small"} for at in range(100)],
        "mixed.jsonl": [
            {"query": f"q {at}?", "scores": {"small": row.tolist(), "tiny": [0] * 8, "sure": [1] * 8}}
            for at, row in enumerate(rows)
        ],
        "single.jsonl": [{"query": f"q {at}?", "scores": {"small": 1}} for at in range(9)],
    }
    for name, of in lines.items():
        (folder / name).write_text("\n".join(map(json.dumps, of)))
    (folder / "rows.json").write_text(json.dumps(rows.tolist()))
    return folder


@pytest.fixture
def run(place, capsys, monkeypatch):
    """Runs a command in the folder: code, stdout, stderr."""
    monkeypatch.chdir(place)

    def call(line):
        code = main(line.split())
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def curve(place):
    return BetaTTSPM().fit(np.array(json.loads((place / "rows.json").read_text())))


@pytest.mark.parametrize("name", ["samples", "scores", "each"])
def test_samples_in_any_form_give_the_same_curve(run, curve, name):
    code, out, _ = run(f"routers curve {name}.jsonl --eps 0.02 --json")
    assert code == 0
    told = json.loads(out)
    first = told["curves"][0]
    assert (first["f_max"], first["a"], first["b"]) == (curve.f_max, curve.a, curve.b)
    assert (first["questions"], first["stop"]) == (90, curve.saturation(0.02))
    assert [one["task"] for one in told["curves"]] == ([None, "sums", "words"] if name == "samples" else [None])
    config = tomllib.loads(told["config"])["strategies"]["best-of"]
    assert (config["model"], config["least_gain"], config["max_n"]) == ("small", 0.02, curve.saturation(0.02))


def test_what_people_read(run, curve, place):
    code, out, err = run("gateway curve samples.jsonl --picture c.svg --quiet")
    assert (code, err) == (0, "")
    head, _, lines = out.partition("\n\n")
    assert [line.split()[:4] for line in head.splitlines()[2:5]] == [
        ["small", "all", "90", "8"],
        ["small", "sums", "45", "8"],
        ["small", "words", "45", "8"],
    ]
    assert f"{curve.value(curve.saturation(0.01)):.3f}" in head
    assert "gain    at least 0.01 of all questions by one more answer" in head
    config, _, last = lines.partition("wrote")
    assert tomllib.loads(config)["strategies"]["best-of"]["kind"] == "best_of"
    assert last.split()[0] == "c.svg"
    assert "anabranch gateway fit samples.jsonl --strategy best_of --out routers" in last
    assert (place / "c.svg").read_text().startswith("<svg")


def test_worth_and_cost_say_when_to_stop(run, curve):
    told = json.loads(run("routers curve scores.jsonl --value 0.1 --json")[1])
    # As recorded: 0.002 of 0.1.
    assert told["curves"][0]["stop"] == curve.budget(0.1, 0.002)
    assert tomllib.loads(told["config"])["strategies"]["best-of"]["value_usd"] == 0.1
    told = json.loads(run("routers curve samples.jsonl --value 0.1 --cost 0.005 --json")[1])
    assert told["curves"][0]["stop"] == curve.budget(0.1, 0.005)
    # The larger of both gains.
    told = json.loads(run("routers curve samples.jsonl --value 0.1 --cost 0.005 --eps 0.2 --json")[1])
    assert told["curves"][0]["eps"] == 0.2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "samples.jsonl --value 0.1",
            "--value needs what an answer of small costs, which the data do not say; give --cost",
        ),
        ("samples.jsonl --cost 0.1", "--cost is 0.1 without --value; say what a right answer is worth"),
        ("samples.jsonl --cost 0.1 --value 0", "--value is 0; it must be above 0 dollars"),
        ("samples.jsonl --cost -1 --value 1", "--cost is -1; it must be above 0 dollars"),
        (
            "samples.jsonl --cost 2 --value 1",
            "an answer of small costs 2 and a right one is worth 1, so that none pays",
        ),
        ("samples.jsonl --eps 0", "--eps is 0; it must be a share of questions"),
        ("samples.jsonl --model tiny", "no model 'tiny' in the recorded outcomes; known: small"),
        ("samples.jsonl --picture c.pdf", "--picture is 'c.pdf'; its name must end in .png or .svg"),
        ("single.jsonl", "each question has one sample, which shows no curve; give several of each"),
        ("no.jsonl", "cannot read no.jsonl: no such file or directory"),
    ],
)
def test_mistakes_are_one_line(run, line, message):
    code, out, err = run(f"routers curve {line} --quiet")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_answers_none_of_which_was_right_show_no_curve_and_give_no_config(run):
    code, out, err = run("routers curve none.jsonl --json --quiet")
    assert (code, err) == (0, "")
    told = json.loads(out)
    [one] = told["curves"]
    assert told["config"] == ""
    assert (one["f_max"], one["a"], one["b"], one["single"], one["all_same"]) == (None, None, None, None, "wrong")
    # Of 100 questions, 3 % at most are solved within eight: one more gains that at most, and less than 0.01 from the third on.
    assert one["interval"]["f_max"] == [pytest.approx(0, abs=1e-9), 1.0]
    assert one["interval"]["a"] == [0.0, None]
    assert one["interval"]["mean"][1] == pytest.approx(1 - 0.05**0.01)
    assert (one["stop"], one["stop_interval"]) == (0, [0.0, 2.0])
    code, out, err = run("routers curve none.jsonl --picture n.svg --quiet")
    assert code == 0
    assert "small: no answer was right, which bounds the curve and shows none; no config is given for it" in err
    assert "strategies" not in out
    row = next(line for line in out.splitlines() if line.split()[:2] == ["small", "all"])
    assert "0 to 2" in row
    assert row.split().count("-") == 3


def test_one_question_has_no_interval_and_gives_no_config(run, place):
    (place / "alone.jsonl").write_text(
        json.dumps({"question": "q?", "samples": [True, False, False, True], "model": "small"})
    )
    code, out, err = run("routers curve alone.jsonl --json --quiet")
    assert (code, err) == (0, "")
    told = json.loads(out)
    [one] = told["curves"]
    assert told["config"] == ""
    assert (one["questions"], one["too_few_questions"], one["interval"], one["stop_interval"]) == (1, True, None, None)
    code, out, err = run("routers curve alone.jsonl --picture alone.svg --quiet")
    assert code == 0
    assert err == (
        "small: too few questions (1) to tell of others: no 95% is known, and no config is given for it; record at least 10\n"
    )
    row = out.splitlines()[2].split()
    assert row[:4] == ["small", "all", "1", "4"]
    assert row.count("-") == 1
    assert "strategies" not in out


def test_answers_with_their_texts_show_what_a_vote_delivers(run, place):
    rows = [
        {"question": f"q {at}?", "model": "small", "samples": [at % 2, 1, 0, 0], "answers": ["3", "3", "4", "4"]}
        for at in range(40)
    ]
    (place / "said.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, _ = run("routers curve said.jsonl --json --quiet")
    assert code == 0
    [one] = json.loads(out)["curves"]
    assert [n for n, _ in one["vote"]] == [1, 2, 4]
    assert one["vote"][-1][1] < one["observed"][-1] == 1.0
    code, out, _ = run("routers curve said.jsonl --quiet")
    assert code == 0
    assert out.splitlines()[2].split()[-1] == f"{one['vote'][-1][1]:.3f}"
    assert "vote    small: right of the commonest of so many answers: 1 " in out
    assert "vote" not in run("routers curve samples.jsonl --quiet")[1]


def test_models_that_show_a_curve_have_a_config_beside_those_that_do_not(run, curve):
    code, out, err = run("routers curve mixed.jsonl --json --quiet")
    assert (code, err) == (0, "")
    told = json.loads(out)
    config = tomllib.loads(told["config"])["strategies"]
    assert {name: (one["model"], one["max_n"]) for name, one in config.items()} == {
        "best-of": ("small", curve.saturation(0.01))
    }
    sure = next(one for one in told["curves"] if one["model"] == "sure")
    assert (sure["all_same"], sure["stop"], sure["f_max"]) == ("right", 1, None)
    assert sure["interval"]["f_max"] == [pytest.approx(0.05 ** (1 / 90)), 1.0]


def test_fit_counts_each_question_once_with_all_its_samples(run, place):
    code, _, err = run("routers fit samples.jsonl --strategy best_of --hold-out 0 --out routers --quiet")
    assert code == 0, err
    program = load_folder(place / "routers").routers["best_of"].strategy
    assert {task: program.priors.questions("small", task) for task in ("sums", "words")} == {"sums": 45, "words": 45}
    rows = np.array(json.loads((place / "rows.json").read_text()))
    hit = 1 - np.prod([(8 - rows.sum(1) - at).clip(0) / (8 - at) for at in range(4)], axis=0).mean()
    assert program.priors.curve("small").value(4) == pytest.approx(hit, abs=0.05)


def test_scores_on_a_scale_of_their_own_are_as_right_and_wrong(run, place):
    rows = json.loads((place / "rows.json").read_text())
    told = {}
    for name, low, high in (("unit", 0, 1), ("ten", -5, 10)):
        lines = [
            {"question": f"q {at}?", "samples": [high if one else low for one in row]} for at, row in enumerate(rows)
        ]
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        code, out, _ = run(f"routers curve {name}.jsonl --json --scale {low} {high}")
        assert code == 0
        told[name] = json.loads(out)["curves"]
    assert told["unit"] == told["ten"]
    code, _, err = run("routers curve ten.jsonl")
    assert (code, "the question 'q 0?' (line 1 of the file) is " in err, "scores must lie from 0 to 1" in err) == (
        2,
        True,
        True,
    )
    code, _, err = run("routers curve ten.jsonl --scale 3 3")
    assert (code, "scale is [3.0, 3.0]; it must be" in err) == (2, True)
    # The same of a strategy, which is told it in its config.
    code, _, err = run("routers fit ten.jsonl --strategy best_of --out refused")
    assert (code, "scores must lie from 0 to 1" in err) == (2, True)
    # Of a part that was drawn, the line of the file all the same.
    number = int(err.partition("(line ")[2].partition(" ")[0])
    question = json.loads((place / "ten.jsonl").read_text().splitlines()[number - 1])["question"]
    assert f"the question {question!r} (line {number} of the file)" in err
    code, _, err = run(
        "routers fit ten.jsonl --strategy best_of --out kept --hold-out 0 --set best_of.scale=[-5,10] --quiet"
    )
    assert code == 0, err
    run("routers fit unit.jsonl --strategy best_of --hold-out 0 --out expected --quiet")
    kept, expected = (load_folder(place / name).routers["best_of"].strategy for name in ("kept", "expected"))
    told, known = (one.priors.curve("model") for one in (kept, expected))
    assert (told.f_max, told.a, told.b) == (known.f_max, known.a, known.b)


@pytest.mark.parametrize("eps", ["1", "2", "-1", "0"])
def test_a_gain_that_is_no_share_is_refused_as_it_was_said(run, eps):
    """--eps 1 was told as a fault of ours, --eps -1 as "eps is 0.0"."""
    code, _, err = run(f"routers curve samples.jsonl --eps {eps}")
    assert (code, err) == (2, f"error: --eps is {eps}; it must be a share of questions, from 1e-06 to below 1\n")
    code, _, err = run("routers curve samples.jsonl --value 1e9 --cost 1e-9")
    assert (code, "so that gains of less than 1e-06 of all questions would pay" in err) == (2, True)


def fit_of(out):
    """The command of the last line; None where there is none."""
    last = out.splitlines()[-1]
    return shlex.split(last.partition("anabranch ")[2]) if last.startswith("next") else None


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("ten.jsonl --scale 1 10 --right 0.8", {"scale": (1.0, 10.0), "right": 0.8}),
        ("samples.jsonl --rounds", {"rounds": True}),
        ("samples.jsonl", {}),
        ("odd/'of_mine'.csv --columns query=asked,score:small=s --eps 0.2", {}),
        ("scores.jsonl --prices prices.json", {}),
    ],
)
def test_the_next_command_takes_the_file_and_counts_it_alike(run, place, capsys, line, wanted):
    """On a scale of its own it was refused; the config had neither scale nor threshold."""
    rows = json.loads((place / "rows.json").read_text())
    table = [{"question": f"q {at}?", "samples": [10 if one else 4 for one in row]} for at, row in enumerate(rows)]
    (place / "ten.jsonl").write_text("\n".join(map(json.dumps, table)))
    (place / "odd").mkdir(exist_ok=True)
    each = [f"q {at}?,{int(one)}" for at, row in enumerate(rows) for one in row]
    (place / "odd" / "'of_mine'.csv").write_text("\n".join(["asked,s", *each]))
    (place / "prices.json").write_text(json.dumps({"small": {"input": 1, "output": 2}}))
    code, out, err = run(f"routers curve {line} --quiet")
    assert (code, err) == (0, "")
    config = tomllib.loads(out[out.index("[strategies") : out.rindex("next")])["strategies"]["best-of"]
    assert {name: config.get(name) for name in ("scale", "right", "rounds") if name in config} == {
        name: list(one) if isinstance(one, tuple) else one for name, one in wanted.items()
    }
    assert main([*fit_of(out), "--quiet"]) == 0
    made = load_folder(place / "routers").routers["best_of"].strategy
    assert {name: getattr(made.config, name) for name in wanted} == wanted
    capsys.readouterr()


@pytest.mark.parametrize("picture", ["", " --picture few.png"])
@pytest.mark.parametrize("name", ["few", "none"])
def test_where_no_config_is_given_no_fit_is_suggested(run, place, name, picture):
    """Of nine questions there was no config, and a fit that took them without a word."""
    lines = (place / "samples.jsonl").read_text().splitlines()[:9]
    (place / "few.jsonl").write_text("\n".join(lines))
    code, out, _ = run(f"routers curve {name}.jsonl --quiet{picture}")
    assert code == 0
    assert fit_of(out) is None
    assert "fit" not in out.splitlines()[-1]


def test_no_fit_is_suggested_that_another_model_of_the_file_would_end(run, place):
    rows = json.loads((place / "rows.json").read_text())
    lines = [{"query": f"q {at}?", "scores": {"small": row, "big": [7] * 8}} for at, row in enumerate(rows)]
    (place / "beyond.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, out, err = run("routers curve beyond.jsonl --model small --quiet")
    assert (code, fit_of(out)) == (0, None)
    assert "no fit to this file would be taken: a score of big for the question 'q 0?' (line 1 of the file) is 7" in err
    assert run("routers fit beyond.jsonl --strategy best_of --out refused")[0] == 2
