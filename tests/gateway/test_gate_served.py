"""A gateway of this machine that needs no key is not driven by web pages: through a real server, with the headers that browsers send."""

import http.client
import json

import pytest

from gateway_process import call, mock_config, served

BODY = {"model": "small", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
OPEN = "require_key = false\n"


def send(url, headers, path="/v1/chat/completions", body=BODY, method="POST"):
    """Status, and the error's code, or its type in the Messages API's form; a Host that is given takes the place of the usual one."""
    link = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    try:
        raw = None if body is None else json.dumps(body).encode()
        link.putrequest(method, path, skip_host="host" in headers)
        for name, value in {"content-length": str(len(raw or b"")), **headers}.items():
            link.putheader(name, value)
        link.endheaders(raw)
        answer = link.getresponse()
        found = answer.read()
        error = json.loads(found).get("error", {}) if answer.status >= 400 else {}
        return answer.status, error.get("code", error.get("type"))
    finally:
        link.close()


def refused(url):
    """Requests that were refused, by code."""
    lines = call(url, "GET", "/metrics")[1].splitlines()
    return {line.split('"')[1]: float(line.split()[1]) for line in lines if line.startswith("anabranch_refused_total{")}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served("--config", mock_config(tmp_path_factory.mktemp("gate") / "gateway.toml", top=OPEN)) as running:
        yield running


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"host": "page.example"}, "forbidden_host"),  # a page's name that means this machine now
        ({"host": "page.example:8080", "origin": "http://page.example:8080"}, "forbidden_host"),
        ({"host": "localhost.page.example"}, "forbidden_host"),
        ({"host": "192.168.0.1:80"}, "forbidden_host"),
        ({"host": ""}, "forbidden_host"),
        ({"host": "["}, "forbidden_host"),
        ({"host": "localhost#.page.example"}, "forbidden_host"),
        ({"host": "localhost?.page.example"}, "forbidden_host"),
        ({"host": "a@127.0.0.1"}, "forbidden_host"),
        # Two headers of one name.
        ({"host": "localhost:7", "origin": "http://localhost:7", "Origin": "http://page.example"}, "forbidden_origin"),
        ({"origin": "http://page.example"}, "forbidden_origin"),
        # A page may send this anywhere without asking first, and the gateway reads it.
        ({"origin": "http://page.example", "content-type": "text/plain"}, "forbidden_origin"),
        ({"origin": "null"}, "forbidden_origin"),
        ({"origin": "http://localhost:1"}, "forbidden_origin"),  # another server of this machine
        ({"host": "localhost:7", "origin": "http://localhost:7"}, None),
        ({"host": "LOCALHOST."}, None),
        ({"host": "[::1]:80"}, None),
        ({}, None),
    ],
)
def test_no_web_page_spends_money(server, headers, code):
    before = refused(server.url).get(code, 0)
    assert send(server.url, headers) == ((403, code) if code else (200, None))
    assert refused(server.url).get(code, 0) == before + (code is not None)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/models", None),
        ("GET", "/models/", None),
        ("GET", "/v1/models/small", None),
        ("GET", "/openapi.json", None),
        ("POST", "/v1/messages", BODY),
        ("POST", "/v1/responses", {"model": "small", "input": "hello"}),
        ("POST", "/v1/feedback", {}),
        ("POST", "/chat/completions", BODY),
        ("GET", "/v1/key", None),
    ],
)
def test_no_route_of_clients_is_open_to_pages(server, method, path, body):
    of_messages = path == "/v1/messages"
    assert send(server.url, {"host": "page.example"}, path, body, method) == (
        403,
        "permission_error" if of_messages else "forbidden_host",
    )
    assert send(server.url, {"origin": "http://page.example"}, path, body, method) == (
        403,
        "permission_error" if of_messages else "forbidden_origin",
    )


def test_paths_that_are_not_there_are_counted(server):
    before = refused(server.url).get("not_found", 0)
    assert send(server.url, {}, "/v2/chat", None, "GET") == (404, "not_found")
    assert refused(server.url)["not_found"] == before + 1


def test_probes_may_call_it_what_they_like(server):
    for path in ("/health", "/ready"):
        assert send(server.url, {"host": "pod-7.cluster"}, path, None, "GET") == (200, None)
    # What operators see has a look of its own.
    assert send(server.url, {"host": "page.example"}, "/metrics", None, "GET")[0] == 403


def test_the_config_says_which_names_and_pages_may(tmp_path):
    top = OPEN + 'hosts = ["gateway.example"]\ncors_origins = ["https://app.example"]\n'
    with served("--config", mock_config(tmp_path / "gateway.toml", top=top)) as running:
        assert send(running.url, {"host": "Gateway.Example"}) == (200, None)
        assert send(running.url, {"origin": "https://app.example"}) == (200, None)
        assert send(running.url, {"host": "other.example"}) == (403, "forbidden_host")
        assert send(running.url, {"origin": "https://other.example"}) == (403, "forbidden_origin")


def test_where_keys_say_who_asks_any_name_will_do(tmp_path):
    with served("--config", mock_config(tmp_path / "gateway.toml")) as running:
        assert send(running.url, {"host": "gateway.example"}) == (401, "invalid_api_key")
