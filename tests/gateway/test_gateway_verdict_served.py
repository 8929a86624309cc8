"""From a table to a served verdict, through the command line and HTTP alone: fit, eval, serve what it recommends, ask ``auto``, ask why."""

import json
import urllib.request

import pytest

from anabranch.cli.main import main
from gateway_process import served
from made_outcomes import MODELS, made_outcomes, write_outcomes

ADMIN = "admin-key-of-this-test"


def command(capsys, *arguments):
    capsys.readouterr()
    assert main(["gateway", *map(str, arguments), "--quiet", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def config(folder):
    models = "\n".join(
        f'[[models]]\nname = "{name}"\nmax_tokens = 20\nprice = {{ input_usd = {usd}, output_usd = {usd} }}\n'
        f'deployments = [{{ provider = {{ kind = "mock", model = "{name}", reply = "{name} says so" }} }}]'
        for usd, name in enumerate(MODELS, 1)
    )
    path = folder / "gateway.toml"
    path.write_text(
        f'require_key = false\nstore = "{folder}/gateway.db"\n[admin]\nkey = "env:TEST_ADMIN_KEY"\n{models}\n'
    )
    return path


def sent(url, body=None, headers=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json", **(headers or {})})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read()), answer.headers


@pytest.mark.slow
def test_what_the_verdict_recommends_decides_what_is_asked_of_auto(tmp_path, capsys):
    table, routers = write_outcomes(tmp_path / "outcomes.jsonl", made_outcomes(1500, seed=3)), tmp_path / "routers"
    command(capsys, "fit", table, "--out", routers, "--strategy", "knn", "--strategy", "ridge")
    verdict = command(capsys, "eval", table, "--router", routers)["verdict"]
    chosen = verdict["recommended"]
    assert chosen["kind"] == "strategy"
    assert verdict["next"].endswith(f"--router {routers}")

    options = ("--config", str(config(tmp_path)), "--router", str(routers))
    with served(*options, environment={"TEST_ADMIN_KEY": ADMIN}) as gateway:
        for text, best in (("add the numbers 7", "medium"), ("fix the function 7", "large")):
            body = {"model": "auto", "messages": [{"role": "user", "content": text}]}
            answer, headers = sent(f"{gateway.url}/v1/chat/completions", body)
            assert answer["choices"][0]["message"]["content"] == f"{best} says so"
            assert (headers["x-route-model"], headers["x-route-strategy"]) == (best, "recommended")
            assert headers.get("x-route-bypassed") is None
            assert headers["x-route-reason"].startswith(f"{chosen['name']} expects 0.")
            admin = {"authorization": f"Bearer {ADMIN}"}
            told, _ = sent(f"{gateway.url}/admin/decisions/{headers['x-request-id']}", headers=admin)
            decision = told["decisions"][0]
            assert (decision["strategy"], decision["model"]) == ("recommended", best)
            assert (decision["body"]["strategy"], decision["body"]["candidates"][0]["model"]) == (chosen["name"], best)
            assert decision["body"]["reason"] == headers["x-route-reason"]
            explained, _ = sent(f"{gateway.url}/admin/explain", body, admin)
            assert (explained["strategy"], explained["candidates"][0]["model"]) == (chosen["name"], best)
