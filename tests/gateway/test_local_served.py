"""A gateway process that runs a model itself, asked over HTTP: the official client, who leaves, and neighbours that fail."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from anabranch.cli.main import main
from anabranch.data import ByteTokenizer
from anabranch.lm import save_model
from gateway_process import SOURCE, ask, call, served
from serving_models import small_moe
from waiting import until

openai = pytest.importorskip("openai")

# The model has no vector for it that is a number: whoever says it gets none.
POISON = "\x01"
HELLO = [{"role": "user", "content": "where does this river go?"}]
GREEDY = {"temperature": 0, "max_tokens": 24}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"far": {"type": "boolean"}}, "required": ["far"]},
    },
}
CONFIG = """
require_key = false
store = "{store}"
[admin]
key = "env:ANABRANCH_TEST_ADMIN"
[cache]
exact = false
[retries]
attempts = 1
[[models]]
name = "river"
deployments = [{{ provider = {{ kind = "local", model = "river", engine = {{ dtype = "float32", num_blocks = 800, threads = 1 }} }} }}]
[[models]]
name = "narrow"
[[models.deployments]]
[models.deployments.provider]
kind = "local"
model = "river"
engine = {{ dtype = "float32", num_blocks = 400, threads = 1, name = "brook" }}
admission = {{ max_in_flight = 1 }}
[[models]]
name = "scripted"
deployments = [{{ provider = {{ kind = "mock", reply = "yes" }} }}]
"""
ADMIN = "admin-0123456789"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a model and a config."""
    made = tmp_path_factory.mktemp("local")
    model = small_moe()
    with torch.no_grad():
        model.embedding.weight[ord(POISON)] = torch.nan
    save_model(made / "river", model, ByteTokenizer())
    (made / "gateway.toml").write_text(CONFIG.format(store=made / "g.db"))
    return made


@pytest.fixture(scope="module")
def gateway(folder):
    with served("--config", str(folder / "gateway.toml"), environment={"ANABRANCH_TEST_ADMIN": ADMIN}) as running:
        yield running


@pytest.fixture(scope="module")
def client(gateway):
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_the_official_client_chats_and_streams(client):
    raw = client.chat.completions.with_raw_response.create(model="river", messages=HELLO, **GREEDY)
    whole = raw.parse()
    assert (raw.headers["x-route-model"], whole.model) == ("river", "river")
    assert 0 < whole.usage.completion_tokens <= 24
    assert whole.usage.prompt_tokens > len(HELLO[0]["content"])
    chunks = list(
        client.chat.completions.create(
            model="river", messages=HELLO, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        == whole.choices[0].message.content
    )
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    # The same engine's options under another name.
    assert client.chat.completions.create(model="narrow", messages=HELLO, **GREEDY).model == "brook"


def test_text_vectors_and_other_forms(client, gateway):
    text = client.completions.create(model="river", prompt="Once", max_tokens=5, temperature=0)
    assert (text.choices[0].finish_reason, text.usage.completion_tokens) == ("length", 5)
    vectors = client.embeddings.create(model="river", input=["one", "two"])
    assert [len(one.embedding) for one in vectors.data] == [16, 16]
    response = client.responses.create(model="river", input="Once", max_output_tokens=5)
    assert response.usage.output_tokens <= 5
    # Drawn by chance it may be what no vector is there for.
    said = {"model": "river", "max_tokens": 5, "messages": HELLO, "top_k": 3, "temperature": 0}
    status, message, _ = call(gateway.url, "POST", "/v1/messages", said)
    assert (status, message["type"], message["usage"]["output_tokens"] > 0) == (200, "message", True)


def test_a_prompt_is_counted_as_the_engine_reads_it(gateway):
    tools = [{"name": "look", "input_schema": {"type": "object", "properties": {}}}]
    said = {"model": "river", "messages": HELLO, "tools": tools}
    status, counted, _ = call(gateway.url, "POST", "/v1/messages/count_tokens", said)
    _, message, _ = call(gateway.url, "POST", "/v1/messages", {**said, "max_tokens": 1})
    assert (status, counted["input_tokens"]) == (200, message["usage"]["input_tokens"])
    assert counted["input_tokens"] > 300


def test_tools_and_forms_are_kept(client):
    answer = client.chat.completions.create(
        model="river",
        messages=HELLO,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
        seed=1,
    )
    [called] = answer.choices[0].message.tool_calls
    assert called.function.name == "look"
    assert isinstance(json.loads(called.function.arguments)["far"], bool)
    schema = {
        "type": "object",
        "properties": {"far": {"type": "boolean"}},
        "required": ["far"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "seen", "schema": schema}}
    stream = client.chat.completions.create(
        model="river", messages=HELLO, response_format=form, max_tokens=200, seed=2, stream=True
    )
    said = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert isinstance(json.loads(said)["far"], bool)


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"max_tokens": 5000}, openai.BadRequestError, "2,048 tokens"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, openai.BadRequestError, "2,048 tokens"),
        ({"temperature": 9}, openai.BadRequestError, "temperature"),
        ({"response_format": {"type": "poem"}}, openai.BadRequestError, "poem"),
    ],
)
def test_a_request_that_is_wrong_is_told_so_by_the_engine(client, fields, error, says):
    with pytest.raises(error, match=says):
        client.chat.completions.create(**{"model": "river", "messages": HELLO, "max_tokens": 3, **fields})


def test_a_client_that_leaves_frees_the_row(gateway):
    link = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=60)
    # It never ends of itself, nor says what it could not read.
    asked = {
        "model": "narrow",
        "messages": HELLO,
        "max_tokens": 1900,
        "logit_bias": {"256": -100, str(ord(POISON)): -100},
    }
    sent = json.dumps({**asked, "stream": True})
    link.request("POST", "/v1/chat/completions", sent, {"content-type": "application/json"})
    answer = link.getresponse()
    assert answer.status == 200
    assert answer.readline().startswith(b"data: ")

    def again():
        return call(gateway.url, "POST", "/v1/chat/completions", {**asked, "max_tokens": 2})

    status, refused, headers = again()
    assert (status, refused["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(headers["retry-after"]) >= 1
    # It is well, however often it is asked too much: no breaker opens.
    assert {again()[0] for _ in range(8)} == {429}
    # Long before its answer would have been complete.
    link.sock.close()
    answer.close()
    assert until(lambda: (status := again()[0]) != 429 and status) == 200


def test_a_request_that_fails_in_a_step_fails_alone(gateway, client):
    def plain():
        return client.chat.completions.create(model="river", messages=HELLO, **GREEDY).choices[0].message.content

    def poisoned():
        return ask(gateway.url, f"say {POISON}", "river")

    alone = plain()
    with ThreadPoolExecutor(8) as pool:
        bad = [pool.submit(poisoned) for _ in range(8)]
        good = [pool.submit(plain) for _ in range(8)]
        failed, others = [one.result() for one in bad], {one.result() for one in good}
    assert {(status, told["error"]["code"]) for status, told, _ in failed} == {(502, "request_failed")}
    assert others == {alone}
    # However often that happens: nobody else's requests are shut out.
    _, text, _ = call(gateway.url, "GET", "/metrics", key=ADMIN)
    lines = set(text.splitlines())
    assert 'anabranch_breaker_open{deployment="river"} 0.0' in lines
    assert any(line.startswith('anabranch_attempts_total{deployment="river",outcome="excess"} 8') for line in lines)
    assert any(line.startswith('anabranch_attempts_total{deployment="river",outcome="ok"}') for line in lines)


def test_it_is_in_the_ledger_and_free(gateway):
    _, told, _ = call(gateway.url, "GET", "/admin/ledger?model=river&status=ok&limit=1", key=ADMIN)
    [row] = told["rows"]
    assert (row["deployment"], row["cost_nano"], row["is_estimated"]) == ("river", 0, False)
    assert row["completion_tokens"] > 0


def test_a_check_says_what_is_wrong_and_several_workers_are_refused(folder, capsys, monkeypatch):
    monkeypatch.setenv("ANABRANCH_TEST_ADMIN", ADMIN)
    path = folder / "checked.toml"
    path.write_text(CONFIG.format(store=folder / "c.db"))
    assert not main(["gateway", "serve", "--check", "--config", str(path)])
    for more in ([], ["--check"]):
        assert main(["gateway", "serve", "--workers", "2", "--config", str(path), *more]) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert (
            "checked.toml:12: models.0.deployments.0.provider: deployment river runs its model in the gateway's process"
            in told
        )
    path.write_text(path.read_text().replace("num_blocks = 800", 'kv_memory = "1KiB", block_tokens = 64'))
    # A server sets it for its process.
    interval_s = sys.getswitchinterval()
    assert main(["gateway", "serve", "--port", "0", "--config", str(path)]) == 2
    sys.setswitchinterval(interval_s)
    told = " ".join(capsys.readouterr().err.split())
    assert "checked.toml:12: models.0.deployments.0.provider: deployment river cannot start: kv_memory is 1KiB" in told
    path.write_text(path.read_text().replace('model = "river"', 'model = "lake"', 1))
    assert main(["gateway", "serve", "--check", "--config", str(path)]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "checked.toml:12: models.0.deployments.0.provider.model is" in told
    assert "there is no such file or folder" in told


def test_a_reload_keeps_it_and_the_end_is_clean(folder, gateway):
    """The last one: it ends the process."""

    def text():
        return call(gateway.url, "POST", "/v1/completions", {"model": "river", "prompt": "x", "max_tokens": 1})[0]

    assert (call(gateway.url, "GET", "/ready")[0], text()) == (200, 200)
    path = folder / "gateway.toml"
    path.write_text(path.read_text().replace('name = "scripted"', 'name = "renamed"'))
    os.kill(gateway.process.pid, signal.SIGHUP)
    until(lambda: call(gateway.url, "GET", "/v1/models/renamed")[0] == 200)
    assert ask(gateway.url, "hello", "renamed")[0] == 200
    assert text() == 200
    # Counted from the beginning on: the engines are those that there were.
    _, metrics, _ = call(gateway.url, "GET", "/metrics", key=ADMIN)
    counted = 'anabranch_serving_requests_total{deployment="river",code="200",endpoint="completions"}'
    [line] = [line for line in metrics.splitlines() if line.startswith(counted)]
    assert float(line.split()[-1]) >= 2
    gateway.process.send_signal(signal.SIGTERM)
    assert gateway.process.wait(60) == 0
    told = gateway.log.read_text()
    assert "Traceback" not in told
    assert f"loading river, narrow; {gateway.url}/v1 answers for other models meanwhile" in told


@pytest.mark.slow
@pytest.mark.parametrize("wait_s", [0.0, 1.0, 2.0])
def test_a_signal_ends_it_while_it_loads(folder, wait_s):
    path = folder / "stopped.toml"
    path.write_text(CONFIG.format(store=folder / "s.db"))
    command = [sys.executable, "-m", "anabranch.cli.main", "gateway", "serve", "--port", "0", "--config", str(path)]
    environment = {**os.environ, "PYTHONPATH": SOURCE, "ANABRANCH_TEST_ADMIN": ADMIN}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stderr is not None
        told = process.stderr.readline()
        assert told.startswith("loading river, narrow")
        time.sleep(wait_s)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()
