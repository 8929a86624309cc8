"""The official client of Azure OpenAI against a gateway process, and probes by the names that other proxies have for them."""

from urllib.parse import quote

import pytest

from anabranch.gateway.http.paths import deployment_of, plain
from gateway_process import call
from gateway_scripted import fronted, model, scripted, whole
from gateway_upstream import ANSWER

openai = pytest.importorskip("openai")
HELLO = [{"role": "user", "content": "hello"}]
VECTORS = {
    "object": "list",
    "model": "m",
    "data": [{"object": "embedding", "index": 0, "embedding": "AACAPwAAAEA="}],
    "usage": {"prompt_tokens": 1, "total_tokens": 1},
}


def answers(body):
    """Of an upstream: what the body asks for."""
    return whole(VECTORS if "input" in body and "voice" not in body else ANSWER)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with scripted({"gpt-4o": answers, "eu": answers}) as url:
        models = [model("gpt-4o", "openai", url, key_env=""), model("eu", "openai", url, key_env="")]
        models[1]["aliases"] = ["eu/gpt 4.1", "50%?", "%2F"]
        with fronted(tmp_path_factory.mktemp("azure"), models, {}) as running:
            yield running


@pytest.fixture
def client(server):
    made = {"azure_endpoint": server.url, "api_key": "any", "api_version": "2024-10-21", "max_retries": 0}
    with openai.AzureOpenAI(**made) as client:
        yield client


def test_chat_embeddings_and_models(client):
    raw = client.chat.completions.with_raw_response.create(model="gpt-4o", messages=HELLO)
    assert (raw.parse().choices[0].message.content, raw.headers["x-route-model"]) == ("hi", "gpt-4o")
    assert client.embeddings.create(model="gpt-4o", input="hello").data[0].embedding == [1.0, 2.0]
    assert {"gpt-4o", "eu"} <= {one.id for one in client.models.list()}
    assert client.models.retrieve("eu").id == "eu"
    # A name with what a path may not hold, and a strategy.
    for name, answered in (("eu/gpt 4.1", "eu"), ("auto/cheapest", "gpt-4o")):
        raw = client.chat.completions.with_raw_response.create(model=name, messages=HELLO)
        assert raw.headers["x-route-model"] == answered
    with pytest.raises(openai.NotFoundError, match="gpt-5"):
        client.chat.completions.create(model="gpt-5", messages=HELLO)


def test_a_client_of_one_deployment_asks_that_whatever_the_body_says(server):
    made = {"azure_endpoint": server.url, "api_key": "any", "api_version": "2024-10-21", "max_retries": 0}
    with openai.AzureOpenAI(azure_deployment="eu", **made) as client:
        raw = client.chat.completions.with_raw_response.create(model="gpt-4o", messages=HELLO)
        assert raw.headers["x-route-model"] == "eu"
        assert client.models.retrieve("gpt-4o").id == "gpt-4o"
        assert client.responses.create(model="gpt-4o", input="hello").output_text == "hi"


def test_streams_come_as_events(client, server):
    # This upstream tells a whole answer; the gateway makes a stream of it.
    chunks = list(client.chat.completions.create(model="gpt-4o", messages=HELLO, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "hi"


def test_the_newer_paths_are_those_of_openai(server):
    with openai.OpenAI(base_url=f"{server.url}/openai/v1/", api_key="any", max_retries=0) as client:
        assert client.chat.completions.create(model="gpt-4o", messages=HELLO).choices[0].message.content == "hi"
        assert client.models.retrieve("eu").id == "eu"


def test_a_body_without_a_model_will_do_and_a_key_is_needed_as_elsewhere(server, tmp_path):
    path = "/openai/deployments/gpt-4o/chat/completions?api-version=2024-10-21"
    assert call(server.url, "POST", path, {"messages": HELLO})[0] == 200
    assert call(server.url, "GET", "/openai/deployments/gpt-4o/chat/completions")[0] == 405
    for odd in ("/openai/deployments/gpt-4o/files", "/openai/deployments//chat/completions", "/openai/nothing"):
        assert call(server.url, "POST", odd, {"messages": HELLO})[0] == 404, odd
    # A page may reach nothing that it may not reach by the other paths.
    assert call(server.url, "POST", path, {"messages": HELLO}, headers={"host": "page.example"})[0] == 403
    closed = [model("gpt-4o", "openai", "http://127.0.0.1:9", key_env="")]
    with fronted(tmp_path, closed, {}, require_key=True) as running:
        assert call(running.url, "POST", path, {"messages": HELLO})[0] == 401
        assert call(running.url, "POST", path, {"messages": HELLO}, headers={"api-key": "sk-wrong"})[0] == 401


@pytest.mark.parametrize(
    "path",
    [
        "/openai/deployments/eu/chat/completions",
        "/openai/deployments/eu/chat%2Fcompletions",
        "/%6fpenai/deployments/eu/chat/completions",
        "/openai%2Fdeployments%2F%65u%2fchat/completions",
        "/openai/deployments/eu/chat/completions%2F",
        "/openai/deployments/eu/chat/completions/",
    ],
)
def test_the_path_says_which_model_is_asked_however_it_is_written(server, path):
    status, _, headers = call(server.url, "POST", path, {"model": "gpt-4o", "messages": HELLO})
    assert (status, headers["x-route-model"]) == (200, "eu")


@pytest.mark.parametrize("name", ["eu", "eu/gpt 4.1", "50%?", "%2F"])
@pytest.mark.parametrize(
    "before", ["/v1/models/", "/openai/models/", "/openai%2Fmodels/", "/openai/v1%2fmodels%2F", "/%6fpenai/v1/models/"]
)
@pytest.mark.parametrize("safe", ["/", ""])
def test_a_model_is_told_however_its_path_is_written(server, before, name, safe):
    status, told, _ = call(server.url, "GET", before + quote(name, safe=safe))
    assert (status, told["id"]) == (200, name)


def test_probes_of_other_proxies_charts(server):
    for path, same in (
        ("/health/liveliness", "/health"),
        ("/health/liveness", "/health"),
        ("/health/readiness", "/ready"),
    ):
        told = call(server.url, "GET", path, headers={"host": "pod-7.cluster"})
        assert told[:2] == call(server.url, "GET", same)[:2]
        assert told[0] == 200
    assert call(server.url, "GET", "/health/other")[0] == 404


@pytest.mark.parametrize(
    ("path", "found", "name"),
    [
        ("/v1/models", "/v1/models", None),
        ("/openai/v1/models", "/v1/models", None),
        ("/openai/models/a", "/v1/models/a", None),
        ("/openai/deployments/a/b/chat/completions", "/v1/chat/completions", "a/b"),
        ("/openai/deployments/auto/x/completions", "/v1/completions", "auto/x"),
        ("/openai/deployments/a/audio/speech", "/v1/audio/speech", "a"),
        ("/openai/deployments/a/admin/keys", "/openai/deployments/a/admin/keys", None),
        ("/openaix/v1/models", "/openaix/v1/models", None),
        ("/health/liveliness", "/health", None),
        ("/health/liveness", "/health", None),
    ],
)
def test_what_a_path_stands_for(path, found, name):
    assert (plain(path), deployment_of(path)) == (found, name)
