"""Cascades that learned from outcomes, served: each draft and verification is a call of its own, streamed, explained, paid and bounded."""

import json

import pytest

from anabranch.cli.main import main
from anabranch.gateway.providers.assembling import assembled
from anabranch.web.sse import read_data
from gateway_process import call, served
from gateway_scripted import scripted, sse, whole

STRATEGIES = ("cascade", "automix")
OPERATOR = "operator-key-1"

QUESTION = [{"role": "user", "content": "an easy question"}]

# What makes small's answer right, and what it says then.
WORDS = {"easy": "It is surely so", "hard": "Perhaps it is so"}


def outcomes(path):
    """Small is right where it is sure, large always; votes tell, nine times in ten."""
    lines = []
    for row in range(300):
        kind = ("easy", "hard")[row % 2]
        right = float(kind == "easy")
        vote = right if row % 20 < 18 else 1 - right
        lines.append(
            {
                "query": f"an {kind} question {row}",
                "scores": {"small": right, "large": 1.0},
                "cost": {"small": 1e-4, "large": 1e-3},
                "answers": {"small": f"{WORDS[kind]}.", "large": "It is so."},
                "signals": {"votes": {"small": vote, "large": 1.0}},
            }
        )
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def small(body):
    """A model that says what the question makes of it, and finds its sure answers right."""
    asked = body["messages"][-1]["content"]
    if asked.startswith("Somebody was asked"):
        text = "Correct" if "surely" in asked else "Incorrect"
    else:
        text = f"{WORDS['easy' if 'easy' in asked else 'hard']}."
    usage, head = (
        {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14},
        {"id": "c", "created": 1, "model": "m"},
    )
    if not body.get("stream"):
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        return whole({**head, "object": "chat.completion", "choices": [choice], "usage": usage})
    part = {"index": 0, "delta": {"content": text}, "finish_reason": "stop"}
    head["object"] = "chat.completion.chunk"
    return sse({**head, "choices": [part]}, {**head, "choices": [], "usage": usage}, b"data: [DONE]\n\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Fitted by the command line, judged by it, and served."""
    folder = tmp_path_factory.mktemp("cascades")
    data = str(outcomes(folder / "outcomes.jsonl"))
    settings = ("cascade.uses_vector=false", "cascade.trade_off=100", "automix.trade_off=300", "automix.votes=4")
    flags = [part for one in settings for part in ("--set", one)]
    named = [part for one in STRATEGIES for part in ("--strategy", one)]
    routers = str(folder / "routers")
    assert main(["gateway", "fit", data, "--out", routers, *named, *flags, "--hold-out", "0", "--quiet"]) == 0
    with scripted({"small": small}) as url:
        upstreams = {
            "small": (1, f'kind = "openai", model = "m", base_url = "{url}/small", key_env = ""'),
            "large": (1000, 'kind = "mock", model = "large", reply = "It is so.", tokens_per_s = 100'),
        }
        models = "".join(
            f'[[models]]\nname = "{name}"\nmax_tokens = 100\nprice = {{ input_usd = 1, output_usd = {dollars} }}\n'
            f"deployments = [{{ provider = {{ {provider} }} }}]\n"
            for name, (dollars, provider) in upstreams.items()
        )
        learned = "".join(f'[strategies.{name}]\nrouter = "{routers}/{name}.safetensors"\n' for name in STRATEGIES)
        config = folder / "gateway.toml"
        top = f'store = "{folder}/gateway.db"\nadmin = {{ key = "env:TEST_ADMIN_KEY" }}\n[log]\nprompts = true\n'
        config.write_text(f"{top}{models}{learned}")
        with served("--config", str(config), environment={"TEST_ADMIN_KEY": OPERATOR}) as server:
            yield server.url, data, routers


def admin(url, method, path, body=None):
    status, found, _ = call(url, method, f"/admin/{path}", body, key=OPERATOR)
    assert status == 200, found
    return found


def key_of(url, name, **fields):
    return admin(url, "POST", "keys", {"name": name, **fields})["secret"]


def chat(url, key, strategy, text, **fields):
    """Status, the text of the answer (of an error, its code), headers, and how many pieces it came in."""
    body = {"model": f"auto/{strategy}", "messages": [{"role": "user", "content": text}], "max_tokens": 50, **fields}
    status, found, headers = call(url, "POST", "/v1/chat/completions", body, key=key)
    if status != 200:
        return status, found["error"]["code"], headers, 0
    chunks = list(read_data(found.encode())) if fields.get("stream") else []
    answer = assembled(chunks, "chat") if chunks else found
    pieces = sum(bool(one["choices"] and one["choices"][0]["delta"].get("content")) for one in chunks)
    return status, answer["choices"][0]["message"]["content"].strip(), headers, pieces


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_learned_cascade_answers_and_every_call_has_its_row(place, strategy, streams):
    url, _, _ = place
    key = key_of(url, f"{strategy}-{streams}")
    judged = 4 if strategy == "automix" else 0
    for kind, model, said in (("easy", "small", "It is surely so."), ("hard", "large", "It is so.")):
        status, text, headers, pieces = chat(url, key, strategy, f"an {kind} question", stream=streams)
        assert (status, text, headers["x-route-model"], headers["x-route-strategy"]) == (200, said, model, strategy)
        assert headers.get("x-route-bypassed") is None
        # The last model's answer goes out as it comes; a draft has to be whole before it can be judged.
        assert pieces > 1 if streams and model == "large" else pieces == int(streams)
        id = headers["x-request-id"]
        calls = admin(url, "GET", f"ledger?parent_id={id}")["rows"]
        calls.sort(key=lambda row: int(row["request_id"].rpartition(".")[2]))
        wanted = [
            ("draft", "small"),
            *[("judge", "small")] * judged,
            *([("answer", "large")] if model == "large" else []),
        ]
        assert [(row["purpose"], row["model"]) for row in calls] == wanted
        [own] = admin(url, "GET", f"ledger?request_id={id}")["rows"]
        assert (own["model"], own["calls"], own["cost_nano"]) == (model, len(wanted), 0)
        assert own["calls_nano"] == sum(row["cost_nano"] for row in calls) > 0
        [decision] = admin(url, "GET", f"decisions/{id}")["decisions"]
        [step] = decision["body"]["details"]["trace"]
        assert step["step"] == {"cascade": "scored", "automix": "verified"}[strategy]
        assert (step["model"], step["is_given"]) == ("small", model == "small")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_asks_no_model_that_the_key_may_not_use(place, strategy):
    url, _, _ = place
    key = key_of(url, f"{strategy}-small", models=["small"])
    # There is nobody else to ask, so it is not judged.
    status, text, headers, _ = chat(url, key, strategy, "a hard question")
    assert (status, text, headers["x-route-model"], headers["x-route-calls"]) == (
        200,
        "Perhaps it is so.",
        "small",
        "1",
    )
    assert headers.get("x-route-bypassed") is None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_stays_within_the_purse_and_gives_the_draft_there_is(place, strategy):
    """Fifty tokens of large may cost five cents; the key has one."""
    url, _, _ = place
    key = key_of(url, f"{strategy}-poor", budget_usd=0.01)
    status, text, headers, _ = chat(url, key, strategy, "a hard question")
    assert (status, text, headers["x-route-model"]) == (200, "Perhaps it is so.", "small")
    [decision] = admin(url, "GET", f"decisions/{headers['x-request-id']}")["decisions"]
    assert [step["step"] for step in decision["body"]["details"]["trace"]][1:] == ["failed"]


def test_votes_that_cannot_be_paid_at_once_are_made_one_after_another(place):
    url, _, _ = place
    # The most that each may cost, of four, is two cents of these five.
    key = key_of(url, "votes-poor", budget_usd=0.05)
    status, text, headers, _ = chat(url, key, "automix", "an easy question" + " x" * 10_000)
    assert (status, text, headers["x-route-model"]) == (200, "It is surely so.", "small")
    [decision] = admin(url, "GET", f"decisions/{headers['x-request-id']}")["decisions"]
    [step] = decision["body"]["details"]["trace"]
    assert (step["votes"], step.get("missing"), step["confidence"], step["is_given"]) == (4, None, 1.0, True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_says_why_before_anybody_is_asked(place, strategy):
    url, data, routers = place
    told = admin(url, "POST", "explain", {"model": f"auto/{strategy}", "messages": QUESTION})
    assert [one["model"] for one in told["candidates"]] == ["small", "large"]
    assert told["details"]["chain"] == ["small", "large"]
    assert main(["gateway", "eval", data, "--test", data, "--router", routers, "--allow-leak", "--quiet"]) == 0


def test_other_endpoints_and_choices_are_refused_clearly(place):
    url, _, _ = place
    key = key_of(url, "other")
    assert chat(url, key, "cascade", "an easy question", n=2)[0] == 400
    status, found, _ = call(url, "POST", "/v1/completions", {"model": "auto/cascade", "prompt": "an easy one"}, key=key)
    assert (status, "is a program" in found["error"]["message"]) == (400, True)
