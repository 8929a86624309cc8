"""Several names for one model: a request may use any, and its answer names the one that it used."""

import pytest

from anabranch.errors import ConfigError
from anabranch.serving.http.config import HttpConfig
from fake_engine import Script
from serving_models import serve_process
from serving_thread import events, serving

openai = pytest.importorskip("openai")
NAMES = ("gpt-4o", "org/small", "fake")


@pytest.fixture(scope="module")
def server():
    with serving(Script(say="yes"), names=NAMES) as running:
        yield running


def test_all_are_listed_each_once_and_can_be_looked_up(server):
    listed = server.ask("/v1/models")[2]["data"]
    assert [model["id"] for model in listed] == ["fake", "gpt-4o", "org/small"]
    for name, path in (("gpt-4o", "gpt-4o"), ("org/small", "org%2Fsmall"), ("org/small", "org/small")):
        status, _, model = server.ask(f"/v1/models/{path}")
        assert (status, model["id"]) == (200, name)
    assert server.ask("/v1/models/org")[0] == 404


@pytest.mark.parametrize("name", NAMES)
def test_answers_name_what_was_asked_for(server, name):
    status, headers, whole = server.chat(model=name)
    assert (status, whole["model"], headers["x-route-model"]) == (200, name, "fake")
    stream = events(server.chat(model=name, stream=True)[2])[:-1]
    assert {chunk["model"] for chunk in stream} == {name}
    assert server.complete(model=name)[2]["model"] == name
    assert server.complete(model=name, max_tokens=0, echo=True)[2]["model"] == name
    assert server.ask("/tokenize", {"model": name, "prompt": "x"})[0] == 200


@pytest.mark.parametrize("name", ["Fake", "gpt-4", "org", ""])
def test_other_names_are_unknown(server, name):
    status, _, body = server.chat(model=name)
    assert status == (404 if name else 400)
    assert body["error"]["param"] == "model"
    assert "'fake', 'gpt-4o', 'org/small'" in body["error"]["message"]


def test_names_have_characters():
    with pytest.raises(ConfigError, match=r"names\.1 is ''; a name has 1 to 256"):
        HttpConfig(names=("a", ""))


@pytest.mark.slow
def test_names_are_given_on_the_command_line():
    names = ("--served-name", "first", "--served-name", "second")
    with serve_process(*names) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        assert [model.id for model in client.models.list()] == ["first", "second"]
        assert client.models.retrieve("second").id == "second"
        for name in ("first", "second"):
            answer = client.completions.create(model=name, prompt="x", max_tokens=1)
            assert answer.model == name
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="small-moe", prompt="x", max_tokens=1)
