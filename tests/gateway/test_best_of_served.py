"""`auto/best-of` behind a real server, asked by the official client: drawn batch by batch, chosen, paid, explained, bounded, learned."""

import json
import sys

import pytest

from anabranch.cli.main import main
from anabranch.gateway.providers.assembling import assembled
from anabranch.jail import jail
from anabranch.web.sse import read_data
from gateway_process import call, served
from gateway_scripted import scripted, sse, whole
from jailed import LACK, needs_jail

openai = pytest.importorskip("openai")

OPERATOR = "operator-key-1"
STRATEGIES = {
    "best-of": "batch = 2\nmax_n = 8",
    "rethink": "rounds = true\nmax_n = 3",
    **({} if LACK else {"code": 'verifier = "examples"\nbatch = 2\nmax_n = 6\ndecides = "posterior"'}),
    "judged": 'select = "judge"\njudge = "judge"\nmax_n = 2\nbatch = 2',
    "capped": "batch = 6\nmax_n = 8\ndecides = 'posterior'\nmax_usd = 0.0003",
    "tasked": 'tasks = ["math"]\nmax_n = 1',
    "mean": "max_usd = 0.00001",
    "likely": 'select = "logprob"\nmax_n = 3\nbatch = 3',
}

EXAMPLES = "Write inc.\n\n>>> inc(2)\n3\n"
WRONG, RIGHT = "```python\ndef inc(x): return x\n```", "```python\ndef inc(x): return x + 1\n```"


class Small:
    """A model that says, of each question, what its script has next; and remembers what it was asked."""

    def __init__(self):
        self.scripts, self.asked = {}, []

    def __call__(self, body):
        self.asked.append(body)
        question = body["messages"][0]["content"]
        key = next(name for name in (*self.scripts, "") if name in question)
        script = self.scripts.get(key, ["The answer is 4."])
        text = script.pop(0) if len(script) > 1 else script[0]
        if text is None:
            return whole({"error": {"message": "no", "type": "server_error"}}, status=500)
        return answer(body, text)


def answer(body, text):
    usage = {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14}
    head = {"id": "c", "created": 1, "model": "m"}
    if body.get("stream"):
        part = {"index": 0, "delta": {"content": text}, "finish_reason": "stop"}
        head["object"] = "chat.completion.chunk"
        return sse({**head, "choices": [part]}, {**head, "choices": [], "usage": usage}, b"data: [DONE]\n\n")
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    if body.get("logprobs"):
        choice["logprobs"] = {
            "content": [{"token": text, "logprob": -0.1 if "sure" in text else -3.0, "top_logprobs": []}]
        }
    return whole({**head, "object": "chat.completion", "choices": [choice], "usage": usage})


def judge(body):
    """Gives full marks to what says 7, and to anything else few; of some it tells a story."""
    text = body["messages"][-1]["content"]
    if "<<<" not in text:
        return answer(body, "I can answer too")
    text = text.split("<<<")[2]
    return answer(body, "I would say it is quite good" if "story" in text else "10" if "7" in text else "2")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder, small = tmp_path_factory.mktemp("best-of"), Small()
    with scripted({"small": small, "judge": judge}) as url:
        models = "".join(
            f'[[models]]\nname = "{name}"\nmax_tokens = 100\nprice = {{ input_usd = 1, output_usd = 1 }}\n'
            f'deployments = [{{ provider = {{ kind = "openai", model = "m", base_url = "{url}/{name}", key_env = "" }} }}]\n'
            for name in ("small", "judge")
        )
        made = "".join(
            f'[strategies.{name}]\nkind = "best_of"\nmodel = "small"\n{more}\n' for name, more in STRATEGIES.items()
        )
        config = folder / "gateway.toml"
        top = f'store = "{folder}/gateway.db"\nadmin = {{ key = "env:TEST_ADMIN_KEY" }}\nretries = {{ attempts = 1 }}\n'
        config.write_text(f"{top}{models}{made}")
        with served("--config", str(config), environment={"TEST_ADMIN_KEY": OPERATOR}) as server:
            yield server.url, small


def admin(url, method, path, body=None):
    status, found, _ = call(url, method, f"/admin/{path}", body, key=OPERATOR)
    assert status == 200, found
    return found


@pytest.fixture(scope="module")
def key(place):
    return admin(place[0], "POST", "keys", {"name": "k"})["secret"]


def chat(url, key, text, model="auto/best-of", **fields):
    """Status, the text of the answer (of an error, its code), headers, and the steps of the trace."""
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 50, **fields}
    status, found, headers = call(url, "POST", "/v1/chat/completions", body, key=key)
    if status != 200:
        return status, found["error"]["code"], headers, []
    if fields.get("stream"):
        found = assembled(list(read_data(found.encode())), "chat")
    [decision] = admin(url, "GET", f"decisions/{headers['x-request-id']}")["decisions"]
    return status, found["choices"][0]["message"]["content"], headers, decision["body"]["details"].get("trace")


def test_the_official_client_is_given_the_commonest_answer(place, key):
    url, small = place
    small.scripts["apples"] = ["It is 5.", "The answer is 4.", "4"]
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60) as client:
        assert "auto/best-of" in {model.id for model in client.models.list()}
        raw = client.chat.completions.with_raw_response.create(
            model="auto/best-of", messages=[{"role": "user", "content": "how many apples?"}], max_tokens=20, seed=7
        )
    found = raw.parse()
    assert found.choices[0].message.content == "The answer is 4."
    assert found.model == raw.headers["x-route-model"] == "small"
    id = raw.headers["x-request-id"]
    calls = admin(url, "GET", f"ledger?parent_id={id}")["rows"]
    assert found.usage.completion_tokens == 4 * len(calls)
    assert {row["purpose"] for row in calls} == {"draft"}
    [own] = admin(url, "GET", f"ledger?request_id={id}")["rows"]
    assert (own["calls"], own["calls_nano"], own["cost_nano"]) == (len(calls), 14_000 * len(calls), 0)
    [decision] = admin(url, "GET", f"decisions/{id}")["decisions"]
    details = decision["body"]["details"]
    [step] = details["trace"]
    # The curve of what nobody has seen: up to so many are worth their price; the sender's own draw is one of them.
    assert step["samples"] == len(calls) == details["budget"] == 8
    # Five to one is not enough, seven to one is.
    assert (step["step"], step["reason"]) == ("sampled", "agreement")
    sent = [body for body in small.asked if "apples" in body["messages"][0]["content"]]
    assert sorted(body["seed"] for body in sent) == [7 + number for number in range(8)]
    assert [body.get("temperature") for body in sorted(sent, key=lambda body: body["seed"])] == [None] + [0.8] * 7


def test_it_stops_where_answers_agree_and_streams_the_one_it_gives(place, key):
    url, _ = place
    status, text, _, [step] = chat(url, key, "plain", stream=True)
    assert (status, text, step["reason"], step["samples"]) == (200, "The answer is 4.", "agreement", 4)
    status, text, _, [step] = chat(url, key, "plain", model="auto/best-of?n=2")
    assert (step["samples"], step["reason"]) == (2, "budget")
    for knob in ("n=0", "n=9", "n=x", "m=2"):
        assert chat(url, key, "plain", model=f"auto/best-of?{knob}")[0] == 400


def test_rounds_think_the_last_answer_over(place, key):
    url, small = place
    small.scripts["riddle"] = ["I say 3", "no, 5", "surely 4"]
    status, text, _, [step] = chat(url, key, "a riddle", model="auto/rethink")
    assert (status, text, step["samples"]) == (200, "surely 4", 3)
    last = small.asked[-1]["messages"]
    assert [one["role"] for one in last] == ["user", "assistant", "user"]
    assert last[1]["content"] == "no, 5"


@needs_jail
def test_code_that_passes_the_examples_is_given_and_teaches(place, key):
    url, small = place
    small.scripts["inc"] = [WRONG, WRONG, WRONG, RIGHT]
    status, text, _, [step] = chat(url, key, EXAMPLES, model="auto/code")
    assert (status, text, step["reason"], step["verified"]) == (200, RIGHT, "verified", 1)
    assert step["samples"] == 4
    for _ in range(3):
        small.scripts["inc"] = [RIGHT]
        assert chat(url, key, EXAMPLES, model="auto/code")[3][0]["samples"] == 2
    told = admin(url, "POST", "explain", {"model": "auto/code", "messages": [{"role": "user", "content": EXAMPLES}]})
    assert told["details"]["questions"] == 4, told


# What a sender asked the gateway's machine to tell about itself: each example is one bit of it, if it holds.
READS = """
>>> import glob, os
>>> def own(p):
...     try: return open(p).read()
...     except OSError: return ''
>>> 'TEST_ADMIN_KEY=operator-k' in ''.join(own(p) for p in glob.glob('/proc/[0-9]*/environ'))
{said}
"""
REACHES = """
>>> import socket
>>> def reaches():
...     try: return bool(socket.create_connection(('127.0.0.1', {port}), 1))
...     except OSError: return False
>>> reaches()
{said}
"""


@needs_jail
@pytest.mark.parametrize("tries", [READS, REACHES])
def test_examples_of_a_sender_reach_nothing_of_the_gateway(place, key, tries):
    url, small = place
    small.scripts["Write x"] = ["```python\nx = 1\n```"]

    def samples(said):
        text = "Write x." + tries.format(said=said, port=url.rpartition(":")[2])
        status, _, headers, [step] = chat(url, key, text, model="auto/code")
        assert (status, step["verified"] > 0) == (200, step["reason"] == "verified")
        return int(headers["x-route-calls"])

    # That it is False is verified at once; that it is True is not, however often it is asked.
    assert samples("False") == 2
    assert samples("True") > 2


def test_a_config_that_would_run_code_without_walls_is_refused(tmp_path, monkeypatch, capsys):
    config = tmp_path / "gateway.toml"
    config.write_text(
        'require_key = false\n[[models]]\nname = "small"\ndeployments = [{ provider = { kind = "mock", model = "m" } }]\n'
        '[strategies.code]\nkind = "best_of"\nverifier = "examples"\n'
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    jail.cache_clear()
    try:
        assert main(["gateway", "serve", "--config", str(config), "--check"]) == 2
    finally:
        jail.cache_clear()
    said = capsys.readouterr().err
    assert "strategies.code: verifier is 'examples', and code of others is run " in said
    if sys.platform.startswith("linux"):
        assert "install bubblewrap 0.5 or newer (apt install bubblewrap, dnf install bubblewrap)" in said
    # Of the line where it stands.
    assert "gateway.toml:7" in said


def test_a_judge_chooses_and_one_that_tells_stories_leaves_the_vote(place, key):
    url, small = place
    small.scripts["guess"] = ["it is 3", "it is 7"]
    status, text, headers, [step] = chat(url, key, "guess a number", model="auto/judged")
    assert (status, text, step["sure"]) == (200, "it is 7", 1.0)
    calls = admin(url, "GET", f"ledger?parent_id={headers['x-request-id']}")["rows"]
    assert (
        sorted((row["purpose"], row["model"]) for row in calls) == [("draft", "small")] * 2 + [("judge", "judge")] * 2
    )
    small.scripts["fable"] = ["a story of 3", "a story of 5"]
    assert chat(url, key, "a fable", model="auto/judged")[1] in ("a story of 3", "a story of 5")


def test_likely_answers_weigh_more_and_nobody_sees_what_was_not_asked_for(place, key):
    url, small = place
    small.scripts["weigh"] = ["it is 1", "it is 1", "I am sure it is 2"]
    body = {"model": "auto/likely", "messages": [{"role": "user", "content": "weigh it"}]}
    _, found, _ = call(url, "POST", "/v1/chat/completions", body, key=key)
    [choice] = found["choices"]
    assert choice["message"]["content"] == "I am sure it is 2"
    assert "logprobs" not in choice


def test_models_that_fail_are_replaced_and_all_that_failed_is_told(place, key):
    url, small = place
    small.scripts["broken"] = [None]
    status, text, headers, steps = chat(url, key, "broken")
    assert (status, headers["x-route-model"]) == (200, "judge")
    assert (steps[0]["model"], steps[0]["samples"], steps[0]["error"]) == ("small", 0, "UpstreamError")
    only = admin(url, "POST", "keys", {"name": "small alone", "models": ["small"]})["secret"]
    assert chat(url, only, "broken")[0] >= 500
    # One of two that fails is no matter.
    small.scripts["flaky"] = [None, "The answer is 4."]
    status, text, _, [step] = chat(url, key, "flaky")
    assert (status, text, step["failed"]) == (200, "The answer is 4.", 1)


def test_it_stays_within_the_purse_of_its_key(place):
    url, _ = place
    # A draw of 50 tokens may cost some 60 millionths of a dollar: there is room for one at a time.
    poor = admin(url, "POST", "keys", {"name": "poor", "budget_usd": 0.0001})["secret"]
    status, text, _, [step] = chat(url, poor, "plain")
    assert (status, text) == (200, "The answer is 4.")
    assert step["samples"] >= 1
    assert step["failed"] >= 1


def test_tasks_that_the_operator_lists_are_told_apart_and_no_other(place, key):
    url, _ = place

    def asked(task):
        """Its id, and of how many questions was known what became of them."""
        body = {"model": "auto/tasked", "messages": [{"role": "user", "content": "plain"}]}
        status, _, headers = call(url, "POST", "/v1/chat/completions", body, key=key, headers={"x-task": task})
        assert status == 200
        [decision] = admin(url, "GET", f"decisions/{headers['x-request-id']}")["decisions"]
        return headers["x-request-id"], decision["body"]["details"]["questions"]

    for task in ("math", "made up 1", "made up 2", "math"):
        id, _ = asked(task)
        status, told, _ = call(url, "POST", "/v1/feedback", {"request_id": id, "score": 1.0}, key=key)
        assert (status, told["learned"]) == (200, True)
    assert [asked(task)[1] for task in ("math", "made up 1", "new")] == [2, 4, 4]


def test_a_cap_on_money_is_kept_and_one_without_room_says_so(place, key):
    url, small = place
    small.scripts["count up"] = [f"it is {number}" for number in range(9)]
    status, _, headers, [step] = chat(url, key, "count up", model="auto/capped")
    calls = admin(url, "GET", f"ledger?parent_id={headers['x-request-id']}")["rows"]
    # Four at the most that they may cost are begun at once, and cost 14 millionths each.
    assert (status, step["samples"], step["failed"], len(calls)) == (200, 8, 0, 8)
    assert sum(row["cost_nano"] for row in calls) == 8 * 14_000 <= 300_000
    assert step["cost_usd"] == pytest.approx(8 * 14e-6)
    before = len(small.asked)
    body = {"model": "auto/mean", "messages": [{"role": "user", "content": "count up"}], "max_tokens": 50}
    status, found, _ = call(url, "POST", "/v1/chat/completions", body, key=key)
    assert (status, len(small.asked)) == (429, before), found
    assert "a request may cost $0.00001 in all (best_of.max_usd)" in found["error"]["message"]


def test_hostile_answers_are_bounded(place, key):
    """Nested marks, endless digits, closing tags, nothing at all: an answer comes, at once."""
    url, small = place
    small.scripts["hostile"] = [
        "answer is" * 20_000,
        "</answer>" * 10_000,
        "9" * 100_000,
        "",
        "\\boxed{" * 10_000,
        "(((" * 10_000,
    ]
    status, _, _, [step] = chat(url, key, "hostile")
    assert status == 200
    assert step["samples"] <= 8


def test_other_endpoints_and_choices_are_refused_clearly(place, key):
    url, _ = place
    assert chat(url, key, "plain", n=2)[0] == 400
    status, found, _ = call(url, "POST", "/v1/completions", {"model": "auto/best-of", "prompt": "plain"}, key=key)
    assert (status, "is a program" in found["error"]["message"]) == (400, True)
    assert json.dumps(found)


def test_the_page_shows_the_curve_and_where_it_stops(place, key):
    url, _ = place
    chat(url, key, "plain")
    status, text, _ = call(url, "GET", "/ui", key=OPERATOR)
    assert status == 200
    assert "How many answers pay" in text
    assert "8 answers pay; about 80% of questions are solved so" in text


@pytest.mark.slow
def test_what_was_learned_outlives_the_process(tmp_path):
    """One process counts, and the next one, on the same store, knows."""
    with scripted({"small": Small()}) as url:
        config = tmp_path / "gateway.toml"
        config.write_text(
            f'store = "{tmp_path}/gateway.db"\nrequire_key = false\nadmin = {{ key = "env:TEST_ADMIN_KEY" }}\n'
            f'[[models]]\nname = "small"\nmax_tokens = 100\ndeployments = [{{ provider = {{ kind = "openai", model = "m", '
            f'base_url = "{url}/small", key_env = "" }} }}]\n[strategies.best-of]\nkind = "best_of"\n'
        )
        asked = {"model": "auto/best-of", "messages": [{"role": "user", "content": "plain"}]}
        for wanted in (0, 1):
            with served("--config", str(config), environment={"TEST_ADMIN_KEY": OPERATOR}) as server:
                assert admin(server.url, "POST", "explain", asked)["details"]["questions"] == wanted
                _, _, headers = call(server.url, "POST", "/v1/chat/completions", asked)
                said = {"request_id": headers["x-request-id"], "score": 1.0}
                status, told, _ = call(server.url, "POST", "/v1/feedback", said)
                assert status == 200, told
