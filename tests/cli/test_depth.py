"""``anabranch depth``: from questions and a model to paths, routers, measures and a picture."""

import io
import json

import pytest

from anabranch.cli.output import visible
from anabranch.data import ByteTokenizer
from anabranch.depth.dr_llm import RouterBank, read_paths
from anabranch.lm import Decoder, load_model, save_model
from anabranch.nn import SelfAttention, SwiGLU


@pytest.fixture(scope="module")
def deep(work):
    """A folder of a model with 4 blocks that matter."""
    config = Decoder.Config(
        dim=16,
        num_layers=4,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=SwiGLU.Config(hidden_dim=24),
        max_positions=256,
        init_std=0.3,
    )
    save_model(work / "deep", config.build(seed=0), ByteTokenizer())
    return "deep"


@pytest.fixture(scope="module")
def questions(work, deep):
    """Questions of which the model answers every second."""
    import torch

    model, _ = load_model(work / deep)
    right, wrong = [], []
    for number in range(300):
        prompt = f"{number} plus {number * 7}"
        with torch.no_grad():
            said = int(model.eval()(torch.tensor([list(prompt.encode())])).logits_BLV[0, -1].argmax())
        # A byte that is a letter of JSON by itself.
        if said < 128 and len(right) < 8:
            right.append({"id": f"q{2 * len(right)}", "prompt": prompt, "answer": chr(said)})
        elif said != ord("x") and len(wrong) < 8:
            wrong.append({"id": f"q{2 * len(wrong) + 1}", "prompt": prompt, "answer": "x"})
    assert len(right) == len(wrong) == 8
    rows = [row for pair in zip(right, wrong, strict=True) for row in pair]
    (work / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "questions.jsonl"


@pytest.fixture(scope="module")
def text(work):
    (work / "depth.txt").write_text("".join(f"{number} times {number} is {number**2}\n" for number in range(99)))
    return "depth.txt"


def told(result):
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


def test_from_text_to_a_report(here, work, deep, text):
    common = ("--context", 12, "--limit", 10, "--quiet")
    # Any token is right that the whole model says first: the reward is of one's own.
    (work / "my_reward.py").write_text(
        "def half(question, run):\n"
        "    logits = run.logits([question.prompt], last_only=True)[0, -1]\n"
        "    return float(int(logits.argmax()) % 2 == 0)\n"
    )
    search = ("depth", "search", deep, "--data", text, "--out", "paths.jsonl", "--reward", "my_reward.py:half", *common)
    found = told(here(*search, "--simulations", 12, "--json"))
    rows = read_paths(work / "paths.jsonl")
    assert found["questions"] == len(rows) == 10
    assert found["prefix_gain"] > 1
    assert {row.num_blocks for row in rows} == {4}
    again = told(here(*search, "--simulations", 12, "--json"))
    assert again == found
    reward = (work / "my_reward.py").read_text()
    (work / "my_reward.py").write_text(reward.replace("== 0", "== 1"))
    code, _, err = here(*search, "--simulations", 12)
    assert (code, "another search" in err) == (2, True), err
    (work / "my_reward.py").write_text(reward)
    code, out, err = here(*search, "--simulations", 13)
    assert (code, out) == (2, "")
    assert "another search" in err

    made = told(
        here(
            "depth",
            "train",
            deep,
            "paths.jsonl",
            "--out",
            "routers-a",
            "--epochs",
            3,
            "--set",
            "held_out=0.4",
            "--quiet",
            "--json",
        )
    )
    assert made["parameters"] == 4 * (128 * 17 + 3 * 129)
    assert (
        made["questions"] + sum(map(sum, made["held_out"]["confusion"])) // 4
        == len([row for row in rows if row.base_right]) + made["flips"]
    )
    model, _ = load_model(work / deep)
    from anabranch.depth.stack import stack_of

    assert RouterBank.load(work / "routers-a", stack_of(model)).windows == 8

    eval_line = ("depth", "eval", deep, text, "--routers", "routers-a", *common)
    measured = told(here(*eval_line, "--json", "--baselines"))
    assert {"layers_per_token", "agreement", "nats_per_token"} <= measured.keys()
    assert measured["baselines"].keys() == {"random", "shortgpt", "early_exit"}
    plain = told(here(*eval_line, "--json", "--control", 0.5))
    assert (plain["layers_per_token"], plain["agreement"]) == (4.0, 1.0)
    whole = told(here("depth", "eval", deep, text, *common, "--json"))
    assert whole["nats_per_token"] == plain["nats_per_token"] == plain["full_nats_per_token"]
    step = told(here(*eval_line, "--json", "--decide", "step", "--control", -0.9))
    assert step["layers_per_token"] < 4

    shown = told(
        here("depth", "report", deep, text, "--routers", "routers-a", "--out", "depth-report", *common, "--json")
    )
    assert {path.name for path in (work / "depth-report").iterdir()} == {"report.json", "depth.png", "depth.svg"}
    assert shown == json.loads((work / "depth-report" / "report.json").read_text())
    assert (work / "depth-report" / "depth.png").read_bytes()[:4] == b"\x89PNG"


def test_what_a_reader_sees(here, work, deep, questions):
    code, out, err = here("depth", "search", deep, questions, "-o", "q-paths.jsonl", "--simulations", 8, "--quiet")
    assert code == 0, err
    assert "16 questions" in out
    assert "next-token" in out
    assert "anabranch depth train deep q-paths.jsonl --out routers" in out
    code, out, err = here(
        "depth",
        "train",
        deep,
        "--paths",
        "q-paths.jsonl",
        "--out",
        "routers-b",
        "--epochs",
        2,
        "--flips",
        "keep",
        "--quiet",
    )
    assert code == 0, err
    assert "macro-F1" in out
    assert "no router will" not in err
    asked = (work / questions).read_text()
    (work / "edited.jsonl").write_text(asked.replace("plus", "and"))
    code, out, err = here("depth", "search", deep, "edited.jsonl", "-o", "q-paths.jsonl", "--simulations", 8, "--quiet")
    assert (code, "with another prompt or answer than is asked now" in err) == (2, True), err
    code, out, err = here(
        "depth", "eval", deep, "--data", questions, "--routers", "routers-b", "--baselines", "--quiet"
    )
    assert code == 0, err
    for word in ("layers/token", "agreement", "ShortGPT", "random skip", "early exit", "whole model", "4.00"):
        assert word in out


def test_options_of_a_question_choose_the_reward(here, work, deep):
    rows = [
        {"id": str(number), "prompt": f"{number}?", "options": ["yes", "no", "maybe"], "answer": "no"}
        for number in range(4)
    ]
    (work / "options.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = told(
        here("depth", "search", deep, "options.jsonl", "-o", "o.jsonl", "--simulations", 4, "--json", "--quiet")
    )
    assert found["reward"] == "options"
    assert found["control"]["probe"] == 4 - found["base_right"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("search {deep} a.jsonl --data b.jsonl --out z", "give one of them"),
        ("search {deep} none.jsonl --out z", "none.jsonl"),
        ("search {deep} {questions} --out z --reward best", "there is no reward 'best'"),
        ("search {deep} {questions} --out z --reward options", "has no options"),
        ("search {deep} {questions} --out {questions}", "would be lost"),
        ("search {deep} {questions} --out z --set widening=0", "widening is 0"),
        ("search {deep} {questions} --out z --set nothing=0", "nothing"),
        ("search {deep} {questions} --out z --simulations 0", "--simulations"),
        ("search {deep} {text} --out z --context 64", "--context is 64"),
        ("search {deep} {questions} --out text", "it is no file"),
        ("train {deep} --out z", "PATHS is missing"),
        ("train {deep} {questions} --out z", "no field 'base_reward'"),
        ("train {deep} none.jsonl --out z", "cannot read none.jsonl"),
        ("eval {deep} {questions} --routers text", "no routers in text"),
        ("eval {deep} {questions} --control 2", "--control"),
        ("eval {deep} {questions} --control nan", "nan"),
        ("eval {deep} {questions} --decide never", "--decide"),
        ("report {deep} {questions} --routers text --out z", "no routers in text"),
        ("report {deep} {questions} --out z", "--routers"),
    ],
)
def test_mistakes_are_told_in_a_line(here, work, deep, questions, text, line, message):
    code, out, err = here("depth", *line.format(deep=deep, questions=questions, text=text).split(), "--quiet")
    assert (code, out) == (2, "")
    assert message in err
    assert len([part for part in err.splitlines() if part.startswith("error: ")]) == 1
    assert not (work / "z").exists()
    assert json.loads((work / questions).read_text().splitlines()[0])["id"] == "q0"


def test_routers_of_another_model(here, work, deep, questions):
    config = Decoder.Config(
        dim=16,
        num_layers=3,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=SwiGLU.Config(hidden_dim=24),
        max_positions=64,
    )
    save_model(work / "shallow", config.build(seed=0), ByteTokenizer())
    assert (
        here(
            "depth", "search", deep, questions, "-o", "of-deep.jsonl", "--simulations", 2, "--quiet", "--flips", "keep"
        )[0]
        == 0
    )
    assert (
        here("depth", "train", deep, "of-deep.jsonl", "-o", "of-deep", "--epochs", 1, "--flips", "keep", "--quiet")[0]
        == 0
    )
    config = config.replace(num_layers=4)
    save_model(work / "as-deep", config.build(seed=1), ByteTokenizer())
    code, _, err = here("depth", "train", "as-deep", "of-deep.jsonl", "--out", "z", "--flips", "keep", "--quiet")
    assert (code, "the paths are of another model: fingerprint" in err) == (2, True), err
    assert not (work / "z").exists()
    code, _, err = here("depth", "train", "shallow", "of-deep.jsonl", "--out", "z", "--flips", "keep", "--quiet")
    assert code == 2
    assert "4 blocks, and this one has 3" in err
    code, _, err = here("depth", "eval", "shallow", questions, "--routers", "of-deep", "--quiet")
    assert code == 2
    assert "blocks (L) 4, and here 3" in err


def test_duo_llm_is_in_the_family(here):
    code, out, _ = here("depth", "--help")
    assert code == 0
    for name in ("search", "train", "eval", "report", "oracle"):
        assert name in out


def attached(work, deep):
    """(the model, its tokenizer, a depth router with numbers of chance, which is in ``random-routers``)."""
    from anabranch.depth import DepthRouter, stack_of
    from anabranch.depth.dr_llm import BankConfig

    model, tokenizer = load_model(work / deep)
    stack = stack_of(model.eval())
    config = BankConfig(num_blocks=stack.num_blocks, width=stack.width, fingerprint=stack.fingerprint())
    RouterBank(config, seed=1).save(work / "random-routers")
    return tokenizer, DepthRouter.attach(model, work / "random-routers")


def test_generate_runs_what_routers_choose(here, work, deep):
    from anabranch.lm import SamplingConfig

    tokenizer, router = attached(work, deep)
    prompt = tokenizer.encode_prompt("3 plus 4 is")
    options = ("-p", "3 plus 4 is", "--max-tokens", 6, "--temperature", 0, "--dtype", "float32", "--json")
    paths = set()
    for control in (-0.6, -0.5, 0.5, 1):
        found = told(here("generate", deep, *options, "--depth", "random-routers", "--depth-control", control))
        router.reset()
        wanted = router.generate(prompt, SamplingConfig(temperature=0, max_tokens=6), control=control)
        assert found["token_ids"] == wanted[: len(found["token_ids"])]
        assert (found["depth"]["num_layers"], len(found["depth"]["path"])) == (4, router.report().layers_per_token)
        paths.add(tuple(found["depth"]["path"]))
    assert len(paths) > 2
    assert "depth" not in told(here("generate", deep, *options))
    for more, says in (
        (("--depth", "none"), "no routers in none"),
        (("--depth-control", 0), "--depth-control is 0, and there are no depth routers"),
        (("--depth", "random-routers", "--depth-control", 2), "control"),
        (("--depth", "random-routers", "--skipper", "x"), "--depth and --skipper both choose what the model computes"),
    ):
        code, out, err = here("generate", deep, *options, *more)
        assert (code, out) == (2, ""), more
        assert says in err


def test_chat_runs_what_routers_choose_about_the_conversation(here, work, deep, monkeypatch):
    from anabranch.lm import SamplingConfig

    tokenizer, router = attached(work, deep)
    greedy = SamplingConfig(temperature=0, max_tokens=6)
    options = ("--max-tokens", 6, "--temperature", 0, "--dtype", "float32")

    def alone(messages, control):
        router.reset()
        prompt = tokenizer.encode_chat(tokenizer.apply_chat_template(messages))
        return router.generate(prompt, greedy, control=control)

    paths, answers = set(), []
    for control in (-0.6, -0.5, 1):
        more = ("--depth", "random-routers", "--depth-control", control)
        found = told(here("chat", deep, "-m", "3 plus 4?", "--json", *options, *more))
        wanted = alone([{"role": "user", "content": "3 plus 4?"}], control)
        assert found["token_ids"] == wanted[: len(found["token_ids"])]
        answers.append(found["token_ids"])
        assert (found["depth"]["num_layers"], len(found["depth"]["path"])) == (4, router.report().layers_per_token)
        paths.add(tuple(found["depth"]["path"]))
    assert len(paths) > 1
    assert all(answers)
    # A second message is answered as the whole conversation, on which what was stored for the first has no say.
    monkeypatch.setattr("sys.stdin", io.StringIO("3 plus 4?\nand 5?\n"))
    code, out, err = here("chat", deep, *options, *more)
    assert (code, err) == (0, "")
    first = tokenizer.decode(wanted)
    talk = [{"role": "user", "content": "3 plus 4?"}, {"role": "assistant", "content": first}]
    second = tokenizer.decode(alone([*talk, {"role": "user", "content": "and 5?"}], 1))
    assert out == f"{visible(first)}\n{visible(second)}\n"
    assert "depth" not in told(here("chat", deep, "-m", "3", "--json", *options))
    for more, says in (
        (("--depth", "none"), "no routers in none"),
        (("--depth-control", 0), "--depth-control is 0, and there are no depth routers"),
        (("--depth", "random-routers", "--depth-control", 2), "control"),
        (("--depth", "random-routers", "--skipper", "x"), "--depth and --skipper both choose what the model computes"),
    ):
        code, out, err = here("chat", deep, "-m", "x", *options, *more)
        assert (code, out) == (2, ""), more
        assert says in err
