"""``anabranch rl train grpo`` and ``token-ppo``: a model learns to answer questions of one's own."""

import json

import pytest

from anabranch.cli.main import main
from anabranch.errors import ConfigError, DataError
from anabranch.files import parse_json
from anabranch.lm import load_model
from anabranch.questions import QuestionRow
from anabranch.rl.tokens.rewards import find_reward
from rl_own_models import taught, write_lines

QUESTIONS = [
    {"question": f"{word} ?" + " ?" * number, "answer": "yes"} for number in range(8) for word in ("who", "it", "of")
]
FEW = [
    "--set",
    "task.questions=4",
    "--set",
    "task.world.turn_tokens=4",
    "--set",
    "task.eval_episodes=4",
    "--quiet",
    "--json",
]


def run(capfd, *line):
    code = main([*map(str, line)])
    out, err = capfd.readouterr()
    return code, out, err


def told(result):
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # Half of what it was taught to say is wrong.
    prompts = [(row["question"], f"{said} <eos>") for row in QUESTIONS[:6] for said in ("yes", "no")]
    return taught(tmp_path_factory.mktemp("model"), prompts, steps=60)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "q.jsonl", QUESTIONS)
    return tmp_path


def line(model, name="grpo", *more, samples=16):
    return [
        "rl",
        "train",
        name,
        "--model",
        model,
        "--data",
        "q.jsonl",
        "--samples",
        samples,
        "--out",
        "run",
        *FEW,
        *more,
    ]


@pytest.mark.parametrize("name", ["grpo", pytest.param("token-ppo", marks=pytest.mark.slow)])
def test_a_model_learns_what_is_right(capfd, files, model, name):
    sizes = ["--set", "task.group=4"] if name == "grpo" else ["--set", "task.group=1", "--set", "task.questions=16"]
    more = [*sizes, "--set", "train.learning_rate=0.01", "--set", "task.world.chats=false"]
    made = told(run(capfd, *line(model, name, *more, samples=320)))
    assert made["mean_return"] == made["right"] == 1.0
    records = [json.loads(one) for one in (files / "run/metrics.jsonl").read_text().splitlines()]
    rewards = [one["reward"] for one in records if one.get("kind") == "train"]
    # It began with a guess.
    assert rewards[0] < 0.9 < rewards[-1]
    assert parse_json((files / "run/config.json").read_text())["task"]["kind"] == name.replace("-", "_")
    policy, tokenizer = load_model(files / "run")
    assert policy.config.vocab_size >= tokenizer.vocab_size
    told(run(capfd, "rl", "eval", "run", "--csv", "e.csv", "--json"))
    assert (files / "e.csv").read_text().splitlines()[0] == "question,answer,wanted,reward"
    found = told(run(capfd, "rl", "replay", "run", "--out", "t.jsonl", "--episode", 0, "--json"))
    assert found["reward"] == 1.0
    row = json.loads((files / "t.jsonl").read_text())
    assert [one["text"].strip() for one in row["texts"]] == [row["question"], "yes <eos>"]


@pytest.mark.slow
def test_a_run_goes_on_to_the_bit(capfd, files, model):
    told(run(capfd, *line(model, "grpo", "--set", "task.group=2", samples=24)))
    whole = (files / "run").rename(files / "whole")
    told(run(capfd, *line(model, "grpo", "--set", "task.group=2", samples=8)))
    told(run(capfd, "rl", "train", "--out", "run", "--resume", "--samples", 24, "--quiet", "--json"))
    one, other = (dict(load_model(folder)[0].state_dict()) for folder in (whole, files / "run"))
    assert all((one[name] == other[name]).all() for name in one)


def test_a_reward_of_ones_own(capfd, files, model):
    own = files / "mine.py"
    own.write_text("def long(question, answer):\n    assert question.prompt\n    return len(answer.split()) / 4\n")
    made = told(run(capfd, *line(model, "grpo", "--reward", "mine.py:long", "--set", "task.group=2")))
    assert 0 < made["mean_return"] <= 1
    # Another reward is another training.
    own.write_text(own.read_text().replace("/ 4", "/ 8"))
    code, _, err = run(capfd, "rl", "train", "--out", "run", "--resume", "--samples", 32, "--quiet")
    assert (code, "the reward of the run changed" in err) == (2, True), err
    own.write_text("def long(question, answer):\n    return float('nan')\n")
    (files / "run").rename(files / "old")
    code, _, err = run(capfd, *line(model, "grpo", "--reward", "mine.py:long", "--set", "task.group=2"))
    assert (code, "must be a finite number" in err) == (2, True), err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--reward", "exakt"], "there is no reward 'exakt'"),
        (["--reward", "nowhere:name"], "cannot be loaded"),
        (["--reward", "number"], "nothing can be extracted of its answer 'yes'"),
        (["--reward", "examples"], "has no examples"),
        (["--reward", "tests"], "there is no test that is a text"),
        (["--pool", "p.toml"], "--pool does not go with grpo"),
        (["--set", "task.world.held_out=0.999999"], "has no question for train"),
        (["--set", "task.group=1"], "group is 1"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(capfd, files, model, more, message):
    code, _, err = run(capfd, *line(model, "grpo", *more))
    assert code == 2
    assert message in err
    assert err.strip().count("\n") == 0
    assert not (files / "run").exists()


def asked(prompt="p", *answers, **row):
    return QuestionRow("q", prompt, answers, row=row, where="here")


@pytest.mark.parametrize(
    ("name", "answers", "said", "worth"),
    [
        ("exact", ["Ann"], " Ann\n", 1.0),
        ("exact", ["Ann"], "ann", 0.0),
        ("exact", ["Bob", "Ann"], "Ann", 1.0),
        ("letter", ["B"], "(B) because", 1.0),
        ("boxed", ["42"], r"so \boxed{42}", 1.0),
        ("boxed", ["42"], r"so \boxed{43}", 0.0),
        ("number", ["So it is #### 1,042"], "that makes 1042.0", 1.0),
        ("number", ["3"], "no idea", 0.0),
        ("match", ["The Ann Smith"], "ann smith.", 1.0),
        ("f1", ["Ann Smith"], "Ann", 2 / 3),
    ],
)
def test_rewards_by_name(name, answers, said, worth):
    assert find_reward(name)(asked("p", *answers), said) == pytest.approx(worth)


def test_code_is_run_in_the_sandbox():
    reward = find_reward("examples")
    question = asked("Write f.\n>>> f(2)\n4\n")
    assert reward(question, "```python\ndef f(x):\n    return x * x\n```") == 1.0
    assert reward(question, "```python\ndef f(x):\n    return x\n```") == 0.0
    tests = asked("def f(x):\n    'doubles'\n", test="def check(f):\n    assert f(3) == 6\n", entry_point="f")
    assert find_reward("tests")(tests, "    return 2 * x\n") == 1.0
    assert find_reward("tests")(tests, "    return x\n") == 0.0


def test_a_reward_of_ones_own_says_which_question_it_failed_on(tmp_path):
    (tmp_path / "mine.py").write_text("def bad(question, answer):\n    raise KeyError('x')\n\nvalue = 3\n")
    with pytest.raises(DataError, match="fails on question 'q': KeyError"):
        find_reward(f"{tmp_path}/mine.py:bad")(asked(), "a")
    with pytest.raises(ConfigError, match="must be called with a question and an answer"):
        find_reward(f"{tmp_path}/mine.py:value")
