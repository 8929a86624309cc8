"""``rewire`` in requests to a server, what usage tells of it, and ``anabranch serve --rewire``."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from anabranch.adapters.rewiring import Rerouter
from anabranch.cli.main import main
from anabranch.data import ByteTokenizer
from anabranch.lm import SamplingConfig, generate
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.rewires import SETTINGS as OF_REQUESTS
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.local import LocalEngine
from anabranch.serving.http.fields import REWIRE_FIELDS
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
        ({"rewire": 1}, "rewire", "rewire is 1; it must be true or false, or an object of settings"),
        ({"rewire": "on"}, "rewire", "it must be true or false"),
        ({"rewire": [True]}, "rewire", "rewire is a list; it must be true or false"),
        (
            {"rewire": {"steps": 3}},
            "rewire.steps",
            "rewire.steps is 3; it may be 2 or less here (engine.rewiring.limits)",
        ),
        ({"rewire": {"interval": 3}}, "rewire.interval", "rewire.interval is 3; it may be 4 or more, or left out"),
        ({"rewire": {"steps": 0}}, "rewire.steps", "rewire.steps is 0; it must be an integer from 1"),
        ({"rewire": {"steps": 1.5}}, "rewire.steps", "rewire.steps is 1.5; it must be an integer"),
        ({"rewire": {"steps": True}}, "rewire.steps", "it must be an integer"),
        ({"rewire": {"eta": 0}}, "rewire.eta", "rewire.eta is 0"),
        ({"rewire": {"eta": 1e38}}, "rewire.eta", "it must be a number from 1e-37 to 1e+37"),
        ({"rewire": {"guard": "no"}}, "rewire.guard", "it must be true or false"),
        ({"rewire": {"select": ["all"]}}, "rewire.select", "it must be all, uncertain or decisive"),
        ({"rewire": {"window": 2, "guard": True}}, "rewire.window", "of which the guard holds back 16"),
        ({"rewire": {"stepz": 1}}, "rewire.stepz", "rewire has no field 'stepz'; it takes eta, steps"),
        ({"rewire": {"cache": "keep"}}, "rewire.cache", "rewire has no field 'cache'"),
        ({"rewire": {"checkpointing": True}}, "rewire.checkpointing", "rewire has no field"),
        ({"rewire": {"return_state": 1}}, "rewire.return_state", "it must be true or false"),
        ({"rewire": {"state": []}}, "rewire.state", "rewire.state is a list with nothing in it; it must be an object"),
        ({"rewire": {"state": {}}}, "rewire.state", "it is no state of a rewired request"),
        ({"rewire": {"steps": 1}, "num_streams": 1}, "rewire", "rewire is set, which does not go with num_streams"),
        ({"rewire": True, "num_streams": 1}, "rewire", "does not go with num_streams"),
        ({"rewires": True}, "rewires", "rewires is True, which this server does not do"),
    ],
)
def test_what_cannot_be_is_a_mistake_of_the_request(server, more, param, says):
    status, _, answer = server.ask("/v1/completions", {**BODY, **more})
    assert status == 400, answer
    assert says in answer["error"]["message"]
    assert answer["error"]["param"] == param


def test_null_is_what_is_not_said(server, model):
    rewire = dict.fromkeys(REWIRE_FIELDS)
    status, _, made = server.ask("/v1/completions", {**BODY, "rewire": rewire})
    assert (status, made["choices"][0]["text"]) == (200, wanted(model, "hello")[0])


def test_a_server_that_turns_no_routers(model):
    with serving(make_engine(model)) as other:
        for wanted in (True, {}, {"steps": 1}):
            status, _, answer = other.ask("/v1/completions", {**BODY, "rewire": wanted})
            assert (status, answer["error"]["param"]) == (400, "rewire")
            assert "the server turns no routers (--rewire)" in answer["error"]["message"]
        assert other.ask("/v1/completions", {**BODY, "rewire": False})[0] == 200


def test_it_is_described(server):
    schemas = server.ask("/openapi.json")[2]["components"]["schemas"]
    for kind in ("Chat", "Completion"):
        flag, table = schemas[kind]["properties"]["rewire"]["anyOf"]
        assert "boolean" in flag["type"]
        assert set(table["properties"]) == set(REWIRE_FIELDS) == {*OF_REQUESTS, "state", "return_state"}


class Talk:
    """A conversation with a server that keeps nothing of it, and the same with a rerouter."""

    def __init__(self, model, **settings):
        self.rerouter = Rerouter(model, RewiringConfig(on=True, settings={**SETTINGS, **settings}).rewiring)
        self.state, self.text, self.settings, self.told = self.rerouter.new_state(), "who is it? ", settings, None

    def body(self):
        return {**BODY, "prompt": self.text, "rewire": {**self.settings, "state": self.told, "return_state": True}}

    def take(self, text, told):
        self.state.go_on()
        config = SamplingConfig(temperature=0, max_tokens=10)
        [tokens] = self.rerouter.generate([ByteTokenizer().encode(self.text)], config, states=[self.state])
        assert text == ByteTokenizer().decode(tokens)
        assert {**told, "seconds": 0} == {**self.rerouter.told_state(self.state), "seconds": 0}
        # What the model said may be no text.
        self.text, self.told = f"{self.text} {len(self.text)} and then? ", told


def events(raw):
    return [json.loads(line[6:]) for line in raw.decode().splitlines() if line.startswith("data: {")]


def test_a_conversation_goes_on_with_its_state(server, model):
    """Whole, in a stream, and with settings of its own; the server keeps nothing between."""
    talk, other = Talk(model), Talk(model, steps=1, eta=0.3, interval=5)
    for _ in range(3):
        for one in (talk, other):
            status, _, made = server.ask("/v1/completions", one.body())
            assert status == 200, made
            [choice] = made["choices"]
            one.take(choice["text"], choice["rewire_state"])
    assert talk.state.steps > other.state.steps
    status, _, raw = server.ask("/v1/completions", {**talk.body(), "stream": True})
    told = [choice for event in events(raw) for choice in event["choices"] if "rewire_state" in choice]
    assert [choice["finish_reason"] for choice in told] == ["length"]
    talk.take(streamed(raw), told[0]["rewire_state"])
    # Nobody else's, and not unasked.
    status, _, made = server.ask("/v1/completions", {**BODY, "rewire": {"state": talk.told}})
    assert (status, "rewire_state" in made["choices"][0]) == (200, False)


def test_choices_have_a_state_each_and_one_that_is_cut_by_a_text_too(server, model):
    body = {**BODY, "prompt": ["hello", "who is it?"], "n": 2, "temperature": 1, "seed": 3}
    status, _, made = server.ask("/v1/completions", {**body, "rewire": {"return_state": True, "interval": 4}})
    assert status == 200
    states = [choice["rewire_state"] for choice in made["choices"]]
    assert len({json.dumps(state["delta"]) for state in states}) == 4
    text = wanted(model, "hello")[0]
    status, _, made = server.ask("/v1/completions", {**BODY, "stop": [text[4:7]], "rewire": {"return_state": True}})
    assert (status, made["choices"][0]["finish_reason"]) == (200, "stop")
    assert made["choices"][0]["rewire_state"]["kind"] == "anabranch.rewiring_state"


def test_chats_and_responses_too(server):
    chat = {"model": "small", "messages": [{"role": "user", "content": "who is it?"}], "max_tokens": 5}
    chat |= {"ignore_eos": True, "rewire": {"return_state": True}, "temperature": 0}
    _, _, made = server.ask("/v1/chat/completions", chat)
    state = {**made["choices"][0]["rewire_state"], "seconds": 0}
    assert state["steps"] == 4
    _, _, raw = server.ask("/v1/chat/completions", {**chat, "stream": True})
    told = [choice for event in events(raw) for choice in event["choices"] if "rewire_state" in choice]
    assert [{**choice["rewire_state"], "seconds": 0} for choice in told] == [state]
    body = {"model": "small", "input": "who is it?", "max_output_tokens": 5}
    body |= {name: chat[name] for name in ("ignore_eos", "rewire", "temperature")}
    _, _, made = server.ask("/v1/responses", body)
    assert {**made["rewire_state"], "seconds": 0} == state
    _, _, raw = server.ask("/v1/responses", {**body, "stream": True})
    assert {**events(raw)[-1]["response"]["rewire_state"], "seconds": 0} == state


STATES = [
    ({"kind": 3}, "it is no state of a rewired request"),
    ({"version": 7}, "its version is 7"),
    ({"model": "rt_0000000000000000"}, "it is of the routers 'rt_0000000000000000'"),
    ({"routers": ["x"]}, "vectors of one model mean nothing to another"),
    ({"more": 1}, "it has the field 'more'"),
    ({"delta": [[0.0]]}, "its delta is 1 lists"),
    ({"delta": [[0.0]] * 10_000}, "its delta is 10000 lists"),
    ({"delta": "x" * 10_000}, "its delta is '"),
    ({"delta": [[10**400] * 4] * 2}, "its delta[0][0] is "),
    ({"delta": [[1e5] * 4] * 2}, "it must be a number from -10,000 to 10,000"),
    ({"delta": [["1"] * 4] * 2}, "its delta[0][0] is '1'"),
    ({"steps": -1}, "steps of the state is -1"),
    ({"seconds": -1}, "seconds of the state is -1"),
]


@pytest.mark.parametrize(("change", "says"), STATES, ids=[str(number) for number in range(len(STATES))])
def test_a_state_that_cannot_be_is_a_mistake_of_its_request(server, model, change, says):
    rerouter = Rerouter(model)
    told = {**rerouter.told_state(rerouter.new_state()), **change}
    assert len(rerouter.layers) == 2
    for path, body in (
        ("/v1/completions", BODY),
        ("/v1/completions", {**BODY, "stream": True}),
        ("/v1/chat/completions", {"model": "small", "messages": [{"role": "user", "content": "x"}]}),
    ):
        status, _, answer = server.ask(path, {**body, "rewire": {"state": told}})
        answer = json.loads(answer) if isinstance(answer, bytes) else answer
        assert (status, answer["error"]["param"]) == (400, "rewire.state"), answer
        message = answer["error"]["message"]
        assert message.startswith("rewire.state cannot be gone on with: ")
        assert says in message
        assert len(message) < 500


def test_a_state_of_many_numbers_is_told_in_pieces(monkeypatch, server, model):
    """As what takes long to write is."""
    monkeypatch.setattr("anabranch.serving.http.shape.MOST_AT_ONCE", 4)
    talk = Talk(model)
    for stream in (False, True, False):
        status, _, made = server.ask("/v1/completions", {**talk.body(), "stream": stream})
        assert status == 200
        if stream:
            [state] = [
                one["rewire_state"] for event in events(made) for one in event["choices"] if "rewire_state" in one
            ]
            talk.take(streamed(made), state)
        else:
            talk.take(made["choices"][0]["text"], made["choices"][0]["rewire_state"])


def test_lines(capsys):
    for line, says in (
        (["--rewire-set", "steps=3"], "settings is given, but on is not; set both (--rewire), or none"),
        (["--rewire", "--rewire-set", "step=3"], "steps"),
        (["--rewire", "--rewire-set", "steps"], "write path=value"),
        (["--rewire", "--rewire-set", "steps=0"], "steps is 0"),
        (["--rewire", "--rewire-set", "cache=keep"], "settings.cache is 'keep'"),
        (["--set", "engine.rewiring.limits.steps=3"], "limits is given, but on is not"),
        (
            ["--rewire", "--set", "engine.rewiring.limits.steps=3"],
            "settings.steps is 5; it may be 3 or less here (limits)",
        ),
        (["--rewire", "--set", "engine.rewiring.limits.eta=3"], "limits has no 'eta'"),
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
    for more in ([], ["--quantize", "int8"], ["--set", "engine.rewiring.limits.steps=20"]):
        assert main(["serve", saved_moe(), "--rewire", "--rewire-set", "interval=none", *more, "--check"]) == 0


@pytest.mark.slow
def test_a_server_process(model):
    options = [text for name, value in SETTINGS.items() for text in ("--rewire-set", f"{name}={json.dumps(value)}")]
    with serve_process("--rewire", *options, "--set", "engine.dtype=float32") as running:
        for prompt in PROMPTS:
            answer = posted(running.url, {**BODY, "model": "small-moe", "prompt": prompt, "rewire": True})
            assert answer["choices"][0]["text"] == wanted(model, prompt)[0]
        talk = Talk(model)
        for _ in range(2):
            [choice] = posted(running.url, {**talk.body(), "model": "small-moe"})["choices"]
            talk.take(choice["text"], choice["rewire_state"])
