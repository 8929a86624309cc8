"""A prior for each question, from recorded samples to a gateway: fitted by one command, served by another, told, and gone by."""

import json

import numpy as np
import pytest

from anabranch.cli.main import main
from gateway_process import call, served
from gateway_scripted import scripted, whole

OPERATOR = "operator-key-1"


@pytest.fixture(scope="module")
def routers(tmp_path_factory):
    """Fitted to easy and hard questions, which differ by their words."""
    folder = tmp_path_factory.mktemp("difficulty")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(240):
        is_easy = number % 2
        chance = rng.beta(9, 1) if is_easy else rng.beta(1, 6)
        text = f"{'add these sums' if is_easy else 'prove that theorem'} number {number}"
        rows.append({"question": text, "samples": (rng.random(8) < chance).tolist(), "model": "small"})
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = f"gateway fit {folder}/samples.jsonl --strategy best_of --out {folder}/routers --set best_of.least_gain=0.04"
    assert main([*line.split(), "--set", "best_of.decides=prior", "--quiet"]) == 0
    return folder / "routers"


@pytest.fixture(scope="module")
def url(routers):
    count = [0]

    def small(body):
        count[0] += 1
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": f"The answer is {count[0]}."},
        }
        usage = {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14}
        return whole(
            {"id": "c", "created": 1, "model": "m", "object": "chat.completion", "choices": [choice], "usage": usage}
        )

    with scripted({"small": small}) as upstream:
        config = routers.parent / "gateway.toml"
        config.write_text(
            f'store = "{routers.parent}/gateway.db"\nadmin = {{ key = "env:TEST_ADMIN_KEY" }}\n'
            '[[models]]\nname = "small"\nmax_tokens = 100\nprice = { input_usd = 1, output_usd = 1 }\n'
            f'deployments = [{{ provider = {{ kind = "openai", model = "m", base_url = "{upstream}/small", key_env = "" }} }}]\n'
            f'[strategies.best-of]\nrouter = "{routers}/best_of.safetensors"\n'
        )
        with served("--config", str(config), environment={"TEST_ADMIN_KEY": OPERATOR}) as server:
            yield server.url


def admin(url, method, path, body=None):
    status, found, _ = call(url, method, f"/admin/{path}", body, key=OPERATOR)
    assert status == 200, found
    return found


def test_fit_tells_whose_questions_have_a_prior(routers, capsys):
    line = f"gateway fit {routers.parent}/samples.jsonl --strategy best_of --out {routers.parent}/again --json --quiet"
    assert main(line.split()) == 0
    (told,) = json.loads(capsys.readouterr().out)["told"]["best_of"]
    assert told.startswith("prior per question: small (0.")


def test_a_question_is_drawn_for_by_how_hard_it_is(url):
    key = admin(url, "POST", "keys", {"name": "k"})["secret"]
    found = {}
    for text in ("add these sums please", "prove that theorem please"):
        body = {"model": "auto/best-of", "messages": [{"role": "user", "content": text}], "max_tokens": 20}
        status, answer, headers = call(url, "POST", "/v1/chat/completions", body, key=key)
        assert status == 200, answer
        [decision] = admin(url, "GET", f"decisions/{headers['x-request-id']}")["decisions"]
        found[text.split()[0]] = decision["body"]["details"]
    easy, hard = found["add"], found["prove"]
    assert easy["difficulty"]["chance"] > 0.6 > 0.3 > hard["difficulty"]["chance"]
    assert easy["budget"] != hard["budget"]
    # The controller went by it: no vote is ever decided, since no two answers are the same.
    for one in (easy, hard):
        [step] = [step for step in one["trace"] if step["step"] == "sampled"]
        assert (step["samples"], step["reason"]) == (one["budget"], "saturated")


def test_it_is_explained(url):
    body = {"model": "auto/best-of", "messages": [{"role": "user", "content": "prove that theorem"}]}
    told = json.dumps(admin(url, "POST", "explain", body))
    assert '"difficulty"' in told
    assert '"held_out_gain"' in told
