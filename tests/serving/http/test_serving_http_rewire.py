"""``rewire`` in requests to a server, what usage tells of it, and ``anabranch serve --rewire``."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from anabranch.adapters.rewiring import Rerouter
from anabranch.cli.main import main
from anabranch.data import ByteTokenizer
from anabranch.lm import SamplingConfig, generate
from anabranch.serving.config import ServingConfig
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.local import LocalEngine
from anabranch.serving.rewiring import RewiringConfig
from serving_models import posted, saved_dense, saved_moe, serve_process, small_moe
from serving_thread import serving, streamed
from waiting import until

SETTINGS = {"interval": 4, "steps": 2, "eta": 0.5, "scale_step": False, "guard": False}
BODY = {"model": "small", "prompt": "hello", "temperature": 0, "max_tokens": 10, "ignore_eos": True}
PROMPTS = ["hello", "hello there, who is it", "x", "def add(a, b):"]


def make_engine(model, **config):
    config = ServingConfig(num_blocks=64, name="small", dtype="float32", **config)
    return lambda: LocalEngine(lambda: Engine.of(model, config, tokenizer=ByteTokenizer()))


def wanted(model, prompt, count=10):
    """(text, number of phases) of a rerouter's own generation."""
    turned = Rerouter(model, RewiringConfig(on=True, settings=SETTINGS).rewiring)
    state = turned.new_state()
    config = SamplingConfig(temperature=0, max_tokens=count)
    [tokens] = turned.generate([ByteTokenizer().encode(prompt)], config, states=[state])
    return ByteTokenizer().decode(tokens), len(state.phases)


def plain(model, prompt):
    [tokens] = generate(model, [ByteTokenizer().encode(prompt)], SamplingConfig(temperature=0, max_tokens=10))
    return ByteTokenizer().decode(tokens)


@pytest.fixture(scope="module")
def model():
    return small_moe()


@pytest.fixture(scope="module")
def server(model):
    with serving(make_engine(model, rewiring=RewiringConfig(on=True, settings=SETTINGS))) as running:
        yield running


def test_each_request_is_turned_to_its_own_text(server, model):
    asked = [(prompt, rewire) for prompt in PROMPTS for rewire in (True, False, None)] * 2

    def ask(case):
        prompt, rewire = case
        return server.ask("/v1/completions", {**BODY, "prompt": prompt, "rewire": rewire})

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(ask, asked))
    for (prompt, rewire), (status, _, body) in zip(asked, answers, strict=True):
        assert status == 200, body
        text, phases = wanted(model, prompt) if rewire else (plain(model, prompt), 0)
        assert body["choices"][0]["text"] == text, (prompt, rewire)
        if rewire:
            [told] = body["usage"]["rewiring"]
            assert [phase["length"] for phase in told] == [
                len(ByteTokenizer().encode(prompt)) + 4 * at for at in range(phases)
            ]
        else:
            assert "rewiring" not in body["usage"]
    assert any(wanted(model, prompt)[0] != plain(model, prompt) for prompt in PROMPTS)
    # The server looks at its engine from time to time.
    until(lambda: server.metrics()["rewiring_phases_total"] >= len(PROMPTS) * 3)


def test_chats_and_streams_and_choices_too(server, model):
    body = {**BODY, "rewire": True}
    status, _, raw = server.ask("/v1/completions", {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert (status, streamed(raw)) == (200, wanted(model, "hello")[0])
    [usage] = [
        event["usage"]
        for line in raw.decode().splitlines()
        if line.startswith("data: {") and (event := json.loads(line[6:])).get("usage")
    ]
    assert len(usage["rewiring"][0]) == 3
    status, _, made = server.ask("/v1/completions", {**body, "prompt": ["hello", "x"], "n": 2})
    assert status == 200
    assert [choice["text"] for choice in made["choices"]] == [
        wanted(model, text)[0] for text in ("hello", "hello", "x", "x")
    ]
    assert len(made["usage"]["rewiring"]) == 4
    chat = {
        "model": "small",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 5,
        "rewire": True,
        "ignore_eos": True,
    }
    status, _, made = server.ask("/v1/chat/completions", chat)
    assert status == 200
    assert len(made["usage"]["rewiring"][0]) == 2


@pytest.mark.parametrize(
    ("more", "param", "says"),
    [
        ({"rewire": 1}, "rewire", "rewire is 1; it must be true or false"),
        ({"rewire": "on"}, "rewire", "it must be true or false"),
        ({"rewire": {"steps": 3}}, "rewire", "it must be true or false"),
        ({"rewire": True, "num_streams": 1}, "rewire", "does not go with num_streams"),
        ({"rewires": True}, "rewires", "rewires is True, which this server does not do"),
    ],
)
def test_what_cannot_be_is_a_mistake_of_the_request(server, more, param, says):
    status, _, answer = server.ask("/v1/completions", {**BODY, **more})
    assert status == 400, answer
    assert says in answer["error"]["message"]
    assert answer["error"]["param"] == param


def test_a_server_that_turns_no_routers(model):
    with serving(make_engine(model)) as other:
        status, _, answer = other.ask("/v1/completions", {**BODY, "rewire": True})
        assert (status, answer["error"]["param"]) == (400, "rewire")
        assert "the server turns no routers (--rewire)" in answer["error"]["message"]
        assert other.ask("/v1/completions", {**BODY, "rewire": False})[0] == 200


def test_it_is_described(server):
    schemas = server.ask("/openapi.json")[2]["components"]["schemas"]
    for kind in ("Chat", "Completion"):
        assert "boolean" in json.dumps(schemas[kind]["properties"]["rewire"])


def test_lines(capsys):
    for line, says in (
        (["--rewire-set", "steps=3"], "settings is given, but on is not; set both (--rewire), or none"),
        (["--rewire", "--rewire-set", "step=3"], "steps"),
        (["--rewire", "--rewire-set", "steps"], "write path=value"),
        (["--rewire", "--rewire-set", "steps=0"], "steps is 0"),
        (["--rewire", "--rewire-set", "cache=keep"], "settings.cache is 'keep'"),
        (["--rewire", "--memory", "1GiB"], "does not go with memory"),
        (["--rewire", "--expert-budget", "1MiB"], "does not go with expert_budget"),
        (["--rewire", "--devices", "2"], "engine.rewiring is for one engine"),
    ):
        assert main(["serve", saved_moe(), *line, "--check"]) == 2, line
        error = capsys.readouterr().err
        assert says in error, line
        assert error.count("\n") == 1, error
    assert main(["serve", saved_dense(), "--rewire", "--check"]) == 2
    assert "has no router that chooses experts" in capsys.readouterr().err
    for more in ([], ["--quantize", "int8"]):
        assert main(["serve", saved_moe(), "--rewire", "--rewire-set", "interval=none", *more, "--check"]) == 0


@pytest.mark.slow
def test_a_server_process(model):
    options = [text for name, value in SETTINGS.items() for text in ("--rewire-set", f"{name}={json.dumps(value)}")]
    with serve_process("--rewire", *options, "--set", "engine.dtype=float32") as running:
        for prompt in PROMPTS:
            answer = posted(running.url, {**BODY, "model": "small-moe", "prompt": prompt, "rewire": True})
            assert answer["choices"][0]["text"] == wanted(model, prompt)[0]
