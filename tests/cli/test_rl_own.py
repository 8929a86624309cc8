"""``anabranch rl train router-r1`` on questions of one's own: a pool behind a real HTTP server, in this process, and from a table."""

import json
import re
import threading

import pytest

from anabranch.cli.main import main
from anabranch.lm import load_model
from anabranch.routers.router_r1.kept_pool import KeptPool
from gateway_process import ask, mock_config, served
from rl_own_models import QUESTIONS, line, pool_file, router, says, taught, tokenizer, write_lines
from scripted_endpoint import endpoint


def run(capfd, *line):
    code = main([*map(str, line)])
    out, err = capfd.readouterr()
    return code, out, err


def told(result):
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return router(tmp_path_factory.mktemp("policy"), {"small": "knows all", "large": "2 dollars a million tokens"})


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "q.jsonl", QUESTIONS)
    return tmp_path


def test_from_questions_and_an_endpoint_to_a_router(capfd, files, policy):
    with endpoint(says) as (url, seen):
        pool_file(files, url)
        made = told(run(capfd, *line(policy, "run", "--max-usd", 1, "--json")))
        # 8 episodes and 2 of the evaluation ask the same, and whoever was asked is not asked again.
        assert (made["samples"], made["pool_calls"]) == (8, len(seen))
        assert made["exact_match"] == 1.0
        assert made["calls"] == 1.0
        kept = [json.loads(one) for one in (files / "run/pool.jsonl").read_text().splitlines()]
        assert {
            "model": "small",
            "query": "who wrote it ?",
            "text": "Ann",
            "prompt_tokens": 30,
            "completion_tokens": 5,
            "usd": 50e-6,
        } in kept
        assert made["pool_usd"] == pytest.approx(
            sum((one["prompt_tokens"] + 4 * one["completion_tokens"]) / 1e6 for one in kept)
        )
        asked = len(seen)
        # The same question of a test costs nothing again, in eval, replay and route.
        again = told(run(capfd, "rl", "eval", "run", "--episodes", 2, "--json", "--csv", "e.csv"))
        assert again["exact_match"] == 1.0
        assert again["raw_cost"] == pytest.approx(5 * 4)
        routed = told(run(capfd, "routers", "route", "who wrote book 2 ?", "--router", "run", "--json"))
        # It was cut, and nothing was answered, as if the router knew nothing.
        code, _, err = run(capfd, "routers", "route", "who wrote book 2 ? " * 100, "--router", "run")
        assert code == 2
        assert "tokens, and the policy reads" in " ".join(err.split())
        assert "nothing is cut: use a shorter question" in " ".join(err.split())
        assert len(seen) == asked
    assert routed["answer"] == "Ann"
    assert routed["calls"] == [{"model": "small", "query": "who wrote it ?"}]
    assert (seen[0][1]["model"], seen[0][1]["max_tokens"], seen[0][1]["temperature"]) == ("small", 8, 0.0)
    assert "who wrote it ?" in seen[0][1]["messages"][0]["content"]
    assert load_model(files / "run")[1].vocab_size == tokenizer().vocab_size
    gateway = (files / "run/gateway.toml").read_text()
    assert gateway.count("[[models]]") == 3
    assert f'base_url = "{url}"' in gateway
    assert 'small = "knows all"' in (files / "run/strategy.toml").read_text()


@pytest.mark.slow
def test_what_was_trained_is_served_by_one_line(capfd, files, policy):
    with endpoint(says) as (url, seen):
        pool_file(files, url)
        made = told(run(capfd, *line(policy, "run", "--max-usd", 1, "--json")))
        with served("--config", str(files / "run/gateway.toml")) as gateway:
            status, body, headers = ask(gateway.url, "who wrote book 3 ?", model="auto/router-r1")
    assert (status, body["choices"][0]["message"]["content"].strip()) == (200, "Ann")
    assert made["gateway"].endswith("gateway.toml")
    # Two turns of the router, and between them the model that it asked, as in training.
    assert headers["x-route-calls"] == "3"
    assert seen[-1][1]["messages"] == seen[0][1]["messages"]


@pytest.mark.slow
def test_a_pool_may_be_a_gateway(capfd, files, policy):
    """The pool's prices count; the gateway's own mock answers."""
    with served("--config", mock_config(files / "gateway.toml", top="require_key = false")) as gateway:
        pool_file(files, f"{gateway.url}/v1")
        made = told(run(capfd, *line(policy, "run", "--max-calls", 40, "--json")))
    kept = [json.loads(one) for one in (files / "run/pool.jsonl").read_text().splitlines()]
    assert made["pool_calls"] == len(kept)
    small = [one for one in kept if one["model"] == "small"]
    assert small
    assert all(one["completion_tokens"] == 4 for one in small)


def test_transcripts_of_a_router(capfd, files, policy):
    with endpoint(says) as (url, _):
        pool_file(files, url)
        told(run(capfd, *line(policy, "run", "--max-usd", 1, "--json")))
        told(run(capfd, "rl", "eval", "run", "--csv", "e.csv", "--json"))
        found = told(run(capfd, "rl", "replay", "run", "--out", "e.jsonl", "--json"))
        told(run(capfd, "rl", "replay", "run", "--out", "one.jsonl", "--episode", 1, "--json"))
        assert run(capfd, "rl", "replay", "run", "--out", "e.txt", "--episode", 1)[0] == 0
    rows = [json.loads(one) for one in (files / "e.jsonl").read_text().splitlines()]
    table = (files / "e.csv").read_text().splitlines()
    assert len(rows) == found["episodes"] == len(table) - 1
    assert [row["question"] for row in rows] == [one.split(",")[0] for one in table[1:]]
    row = json.loads((files / "one.jsonl").read_text())
    assert row == rows[1]
    assert [one["by"] for one in row["texts"]] == ["world", "policy", "world", "policy"]
    assert "<search> small : who wrote it ?" in row["texts"][1]["text"]
    assert "<information> Ann </information>" in row["texts"][2]["text"]
    text = (files / "e.txt").read_text()
    assert f"question: {row['question']}" in text
    assert text.count("[policy]") == 2
    code, _, err = run(capfd, "rl", "replay", "run", "--out", "e.gif")
    assert (code, ".txt or .jsonl" in err) == (2, True)
    code, _, err = run(capfd, "rl", "replay", "run", "--out", "x.txt", "--episode", 999)
    assert (code, "episode 999 is not there" in err) == (2, True)


def test_a_run_goes_on_and_asks_nobody_again(capfd, files, policy):
    with endpoint(says) as (url, seen):
        pool_file(files, url)
        told(run(capfd, *line(policy, "run", "--max-calls", 50, "--json")))
        asked = len(seen)
        more = told(run(capfd, "rl", "train", "--out", "run", "--resume", "--samples", 16, "--quiet", "--json"))
        assert more["samples"] == 16
        questions = [json.loads(one) for one in (files / "run/pool.jsonl").read_text().splitlines()]
        assert len(questions) == len(seen) == more["pool_calls"]
        assert len({(one["model"], one["query"]) for one in questions}) == len(questions)
        assert asked <= len(seen)
    # The folder goes elsewhere, the endpoint is gone: what was said is still there.
    (files / "run").rename(files / "moved")
    assert told(run(capfd, "rl", "eval", "moved", "--episodes", 2, "--json"))["exact_match"] == 1.0
    write_lines(files / "q.jsonl", QUESTIONS[::-1])
    code, _, err = run(capfd, "rl", "train", "--out", "moved", "--resume", "--samples", 24, "--quiet")
    assert code == 2
    assert "the questions of the run changed since it began" in err


def test_training_ends_before_a_limit_and_goes_on_with_another(capfd, files, policy):
    with endpoint(says) as (url, seen):
        pool_file(files, url)
        code, _, err = run(capfd, *line(policy, "run", "--max-calls", 0))
        assert code == 2
        assert "max_calls allows" in err
        # The end that is documented, not a crash of the engine.
        assert "anabranch rl train --out run --resume --max-calls N --max-usd USD" in " ".join(err.split())
        assert "Traceback" not in err
        assert "the engine" not in err
        assert not seen
        # Nothing was saved yet: it begins with the model that it was to start from.
        assert (
            told(run(capfd, "rl", "train", "--out", "run", "--resume", "--max-calls", 50, "--quiet", "--json"))[
                "exact_match"
            ]
            == 1.0
        )
        assert 0 < len(seen) <= 50


def test_a_pool_that_costs_something_needs_a_limit(capfd, files, policy):
    with endpoint(says) as (url, seen):
        pool_file(files, url)
        code, _, err = run(capfd, *line(policy, "run"))
        assert code == 2
        # 8 episodes and 2 tests of 2 turns, each with 3 tries.
        assert "may ask models 60 times" in err
        assert "--max-usd" in err
        assert not seen
    assert not (files / "run").exists()


@pytest.mark.parametrize("retries", [0, 2])
def test_no_more_is_asked_and_counted_than_is_told_first(capfd, files, policy, monkeypatch, retries):
    """Each call was made three times, and told once: whoever limited calls to what was told was stopped short."""
    monkeypatch.setitem(KeptPool.__init__.__kwdefaults__, "wait_s", 0.0)
    with endpoint(lambda *_: (503, {"error": {"message": "busy"}}, {})) as (url, seen):
        path = pool_file(files, url)
        path.write_text(f"retries = {retries}\nmax_failures = 1000\n" + path.read_text())
        code, _, refused = run(capfd, *line(policy, "run"))
        assert (code, len(seen)) == (2, 0)
        number, usd = re.search(r"models ([\d,]+) times, which may cost \$([\d.]+)", " ".join(refused.split())).groups()
        # 8 episodes and 2 tests of 2 turns.
        assert int(number) == 20 * (1 + retries)
        made = told(run(capfd, *line(policy, "run", "--max-calls", number, "--json")))
    assert made["pool_calls"] == len(seen) <= int(number)
    assert made["pool_usd"] <= float(usd) + 0.005
    # Each question that was asked was tried as often as it may be.
    kept = [json.loads(one) for one in (files / "run/pool.jsonl").read_text().splitlines()]
    assert len(kept) == len(seen)
    assert len(kept) % (1 + retries) == 0


def test_a_pool_that_always_fails_ends_the_training(capfd, files, policy):
    with endpoint(lambda *_: (401, {"error": {"message": "no such key"}}, {})) as (url, _):
        pool_file(files, url)
        text = (files / "pool.toml").read_text()
        (files / "pool.toml").write_text("max_failures = 3\n" + text)
        code, _, err = run(capfd, *line(policy, "run", "--max-usd", 1))
    assert code == 2
    # Calls that were under way when the third failed count too.
    (failures,) = re.findall(r"the pool failed (\d+) times in a row", " ".join(err.split()))
    assert int(failures) >= 3
    assert "no such key" in err
    assert "--resume --max-calls N --max-usd USD" in " ".join(err.split())
    assert "Traceback" not in err
    lines = (files / "run/pool.jsonl").read_text().splitlines()
    assert all("error" in json.loads(one) for one in lines)


def test_a_model_in_this_process_and_a_table(capfd, files, policy):
    write_lines(files / "table.jsonl", [{"model": "large", "query": "who wrote it ?", "text": "Bob"}])
    # Whatever it says, it says it in this process.
    taught(files / "engine", [("who wrote it ?", "Ann Ann")], steps=10)
    pool = 'table = "table.jsonl"\nreply_tokens = 4\n[models.small]\nabout = "knows all"\nprice = { output_usd = 0.5 }\nengine = "engine"\n'
    (files / "pool.toml").write_text(pool + "[models.large]\nprice = { output_usd = 2 }\n")
    threads = threading.active_count()
    made = told(run(capfd, *line(policy, "run", "--json", name="router-r1-grpo", samples=8), "--set", "task.group=2"))
    assert made["pool_calls"] >= 1
    kept = [json.loads(one) for one in (files / "run/pool.jsonl").read_text().splitlines()]
    assert {one["model"] for one in kept} == {"small"}
    assert 1 <= kept[0]["completion_tokens"] <= 4
    # A model of a table alone has no deployment: no whole config is written.
    assert "gateway" not in made
    assert threading.active_count() <= threads + 1
    # Everything from a table: nobody is asked, and nothing has to be limited.
    write_lines(
        files / "table.jsonl",
        [{"model": name, "query": "who wrote it ?", "text": "Ann"} for name in ("small", "large")],
    )
    text = (files / "pool.toml").read_text()
    (files / "pool.toml").write_text(text.replace('engine = "engine"\n', ""))
    made = told(run(capfd, *line(policy, "recorded", "--json")))
    assert "pool_calls" not in made
    assert made["exact_match"] == 1.0


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        ({}, ["--reward", "exact"], "--reward does not go with router-r1"),
        ({"price": None}, [], "price"),
        ({"key_env": '"NOT_SET_ANYWHERE"'}, [], "NOT_SET_ANYWHERE, which is not set"),
        ({"engine": '"nowhere"'}, [], "nowhere"),
        ({"temprature": "1"}, [], "temprature"),
        ({}, ["--set", "task.model.dim=64"], "the model is the one that training starts from"),
        ({}, ["--set", "task.max_positions=8"], "the longest prompt has"),
        ({}, ["--set", "warm.steps=3"], "fields of task and train can be set"),
    ],
)
def test_wrong_pools_and_lines_are_one_line(capfd, files, policy, change, more, message):
    path = pool_file(
        files, "http://127.0.0.1:9/v1", **{name: value for name, value in change.items() if value is not None}
    )
    if "price" in change:
        path.write_text(path.read_text().replace("price = { output_usd = 2 }", ""))
    code, _, err = run(capfd, *line(policy, "run", "--max-usd", 1, *more))
    assert code == 2
    assert message in err
    assert err.strip().count("\n") == 0
    assert not (files / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["router-r1", "--model", "m"], "needs --data"),
        (["router-r1", "--data", "q.jsonl"], "needs --model"),
        (["router-r1", "--max-usd", "1"], "needs --model"),
        (["cartpole", "--max-calls", "3"], "--max-calls does not go with cartpole"),
        (["grpo", "--model", "m"], "needs --data"),
    ],
)
def test_options_that_do_not_go_together(capfd, files, words, message):
    code, _, err = run(capfd, "rl", "train", *words, "--out", "run")
    assert (code, message in err) == (2, True), err
