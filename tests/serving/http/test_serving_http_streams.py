"""``num_streams`` in requests to a server, and ``anabranch serve --streams``."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from anabranch.cli.main import main
from anabranch.data import ByteTokenizer
from anabranch.lm import SamplingConfig, generate
from anabranch.serving.config import ServingConfig
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.local import LocalEngine
from serving_models import saved_moe, saved_streams, serve_process, small_moe, small_streams
from serving_thread import serving, streamed

BODY = {"prompt": "hello", "temperature": 0, "max_tokens": 12, "ignore_eos": True}


def make_engine(model, **config):
    config = ServingConfig(num_blocks=64, name="small", dtype="float32", **config)
    return lambda: LocalEngine(lambda: Engine.of(model, config, tokenizer=ByteTokenizer()))


@pytest.fixture(scope="module")
def model():
    return small_streams()


@pytest.fixture(scope="module")
def server(model):
    with serving(make_engine(model, num_streams=2)) as running:
        yield running


def test_each_request_runs_with_its_number(server, model):
    wanted = {}
    for number in (1, 2, 3):
        config = SamplingConfig(temperature=0, max_tokens=12)
        [tokens] = generate(model, [ByteTokenizer().encode("hello")], config, num_streams=number)
        wanted[number] = ByteTokenizer().decode(tokens)
    assert len(set(wanted.values())) == 3
    asked = [1, 2, 3, None, 3, 1] * 2

    def ask(number):
        return server.ask("/v1/completions", {"model": "small", **BODY, "num_streams": number})

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(ask, asked))
    for number, (status, headers, body) in zip(asked, answers, strict=True):
        assert status == 200
        assert body["choices"][0]["text"] == wanted[number or 2]
        assert headers["x-route-streams"] == str(number or 2)
    chat = {"model": "small", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 8}
    texts = {number: server.ask("/v1/chat/completions", {**chat, "num_streams": number})[2] for number in (1, 3)}
    assert texts[1]["choices"][0]["message"] != texts[3]["choices"][0]["message"]
    whole = server.ask("/v1/completions", {"model": "small", **BODY, "num_streams": 3, "stream": True})
    assert streamed(whole[2]) == wanted[3]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (4, "num_streams is 4; the model runs with 1, 2, 3"),
        (0, "num_streams is 0; it must be an integer from 1 to 2,147,483,647"),
        (True, "num_streams is True; it must be an integer"),
        ("2", "num_streams is '2'; it must be an integer"),
        (2.0, "num_streams is 2.0; it must be an integer"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_number_that_cannot_be_is_a_mistake_of_the_request(server, number, message, stream):
    body = {"model": "small", **BODY, "num_streams": number, "stream": stream}
    status, _, answer = server.ask("/v1/completions", body)
    assert status == 400
    assert answer["error"]["param"] == "num_streams"
    assert answer["error"]["message"].startswith(message)


def test_a_plain_model_takes_no_streams():
    with serving(make_engine(small_moe())) as plain:
        status, headers, _ = plain.ask("/v1/completions", {"model": "small", **BODY, "num_streams": 1})
        assert status == 200
        assert "x-route-streams" not in headers
        status, _, answer = plain.ask("/v1/completions", {"model": "small", **BODY, "num_streams": 2})
        assert status == 400
        assert answer["error"]["message"] == "num_streams is 2, but the model has no parallel streams; leave it out"


def test_it_is_described(server):
    schemas = server.ask("/openapi.json")[2]["components"]["schemas"]
    for kind in ("Chat", "Completion"):
        assert schemas[kind]["properties"]["num_streams"]["minimum"] == 1


@pytest.mark.slow
def test_a_server_gives_what_generate_streams_gives_beside_a_neighbour(capsys):
    def ask(url, prompt, number):
        raw = json.dumps({"model": "small-streams", **BODY, "max_tokens": 40, "prompt": prompt, "num_streams": number})
        request = urllib.request.Request(f"{url}/v1/completions", raw.encode(), {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())["choices"][0]["text"]
        except urllib.error.HTTPError as error:
            with error:
                return json.loads(error.read())["error"]["message"]

    prompts, wanted = ("hello", "hello there"), {}
    for number in (1, 2, 3):
        for prompt in prompts:
            line = ("generate", saved_streams(), "--prompt", prompt, "--temperature", "0", "--max-tokens", "40")
            assert main([*line, "--streams", str(number), "--dtype", "float32", "--json"]) == 0
            wanted[prompt, number] = json.loads(capsys.readouterr().out)["text"]
    assert len(set(wanted.values())) == 6
    options = ("--streams", "2", "--set", "engine.dtype=float32")
    with serve_process(*options, model=saved_streams()) as server:
        asked = [(prompt, number) for number in (3, None, 1, 2) for prompt in prompts] * 2
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(lambda one: ask(server.url, *one), asked))
        for (prompt, number), text in zip(asked, answers, strict=True):
            assert text == wanted[prompt, number or 2]
        assert ask(server.url, "hello", 5) == "num_streams is 5; the model runs with 1, 2, 3"


@pytest.mark.parametrize(
    ("model", "streams", "says"),
    [
        (saved_streams, "5", "num_streams is 5, but the model has gates for 1, 2, 3"),
        (saved_moe, "4", "num_streams is 4, but the model has no streams; leave it out"),
    ],
)
def test_a_check_refuses_a_number_that_the_model_has_not(model, streams, says, capsys):
    assert main(["serve", model(), "--streams", streams, "--check"]) == 2
    assert says in capsys.readouterr().err
    assert main(["serve", model(), "--streams", "1", "--check"]) == 0


def test_a_check_refuses_a_model_that_is_not_there(capsys):
    assert main(["serve", "/nowhere", "--check"]) == 2
    assert "no model at /nowhere" in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_is_not_started_with_a_number_that_the_model_has_not():
    line = [sys.executable, "-m", "anabranch", "serve", saved_streams(), "--streams", "5", "--port", "0"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "num_streams is 5, but the model has gates for 1, 2, 3" in done.stderr
    assert "Traceback" not in done.stderr
