"""What is refused, how: OpenAI's form, the right status, and the name of the parameter."""

import difflib
import json
import socket

import pytest

from anabranch.errors import ConfigError
from anabranch.serving.http.config import HttpConfig
from fake_engine import Script
from serving_thread import HELLO, serving, streamed

FUNCTION = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def server():
    with serving(Script(positions=64)) as running:
        yield running


def user(content):
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": user(3)}, "messages[0].content"),
        ({"messages": user([{"type": "image_url", "image_url": {"url": "x"}}])}, "messages[0].content[0].type"),
        ({"messages": user([{"type": "text"}])}, "messages[0].content[0].text"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages[0].tool_calls[0]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"9999": 1}}, "logit_bias"),
        ({"stop_token_ids": [9999]}, "stop_token_ids"),
        ({"min_tokens": 5, "max_tokens": 2}, "min_tokens"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"nope": 1}}, "stream_options.nope"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [FUNCTION, FUNCTION]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [FUNCTION], "tool_choice": "maybe"}, "tool_choice"),
        (
            {"tools": [FUNCTION], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice.function.name",
        ),
        (
            {"tools": [FUNCTION], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
        ),
        ({"user": 5}, "user"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"priority": 10**6}, "priority"),
        ({"audio": {}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"store": True}, "store"),
        ({"functions": [{}]}, "functions"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
    ],
)
def test_wrong_fields_are_named(server, fields, param):
    status, headers, body = server.chat(**fields)
    assert status == 400, body
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["param"] == param
    assert body["error"]["type"] == "invalid_request_error"
    assert headers["x-request-id"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a", 5]}, "prompt[1]"),
        ({"prompt": [300]}, "prompt[0]"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21, "echo": True}, "logprobs"),
        ({"logprobs": -1, "echo": True}, "logprobs"),
        ({"logprobs": 1, "max_tokens": 0}, "max_tokens"),
        ({"logprobs": 1, "echo": True, "prompt": "x" * 64, "max_tokens": 1}, "prompt"),
        ({"logprobs": 1, "echo": True, "prompt": "x" * 65, "max_tokens": 0}, "prompt"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_wrong_fields_of_completions_are_named(server, fields, param):
    status, _, body = server.complete(**fields)
    assert (status, body["error"]["param"]) == (400, param)


def test_values_of_unsupported_fields_that_ask_for_nothing_pass(server):
    fields = {"store": False, "modalities": ["text"], "functions": [], "service_tier": "auto", "verbosity": "medium"}
    assert server.chat(max_tokens=2, **fields)[0] == 200


@pytest.mark.parametrize(
    ("ask", "param"),
    [
        (lambda server: server.complete(prompt="x" * 64), "prompt"),
        (lambda server: server.complete(prompt="x" * 60, max_tokens=5), "max_tokens"),
        (lambda server: server.chat(messages=user("x" * 64)), "messages"),
        (lambda server: server.chat(max_tokens=60), "max_tokens"),
        (lambda server: server.chat(max_completion_tokens=60), "max_completion_tokens"),
        # The newer name counts.
        (lambda server: server.chat(max_tokens=1, max_completion_tokens=60), "max_completion_tokens"),
    ],
)
def test_too_long_for_the_model(server, ask, param):
    status, _, body = ask(server)
    assert (status, body["error"]["code"], body["error"]["param"]) == (400, "context_length_exceeded", param)
    if "max" in param:
        assert body["error"]["message"].startswith(f"{param} is ")


def test_unknown_fields_are_told_or_refused(server):
    status, headers, _ = server.chat(max_tokens=2, colour="red", flavour=1)
    assert status == 200
    assert headers["x-warning"] == "ignored unknown fields: colour, flavour"
    near = server.chat(max_tokens=2, num_stream=3, top_probs=1)[1]["x-warning"]
    assert (
        near == "ignored unknown fields: num_stream (did you mean num_streams?), top_probs (did you mean top_logprobs?)"
    )
    refused = server.chat(max_tokens=2, path=[0, 1])
    assert refused[0] == 400
    assert refused[2]["error"]["message"] == "path is a list, which this server does not do; leave it out"
    assert server.chat(max_tokens=2, **{"ü\r\nx: y": 1})[1]["x-warning"] == "ignored unknown fields: ???x: y"
    with serving(strict=True) as strict:
        status, _, body = strict.chat(colour="red")
        assert (status, body["error"]["param"]) == (400, "colour")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize"])
def test_of_very_many_unknown_fields_only_the_first_are_looked_at(server, monkeypatch, path):
    looked, find = [], difflib.get_close_matches

    def counted(name, *rest, **more):
        looked.append(name)
        return find(name, *rest, **more)

    monkeypatch.setattr(difflib, "get_close_matches", counted)
    names = [f"presence_{number:04}" for number in range(9999, 0, -1)]
    content = {"messages": HELLO["messages"]} if "chat" in path else {"prompt": "x"}
    most = {} if path == "/tokenize" else {"max_tokens": 1}
    status, headers, _ = server.ask(path, {"model": "fake", **content, **most, **dict.fromkeys(names, 1)})
    assert status == 200
    assert looked == names[:10]
    assert headers["x-warning"] == f"ignored unknown fields: {', '.join(sorted(names[:10]))} and 9,989 more"


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/nowhere", "GET", 404),
        ("/v1/chat/completions", "GET", 405),
        ("/v1/models", "POST", 405),
        ("/v1/models/other", "GET", 404),
        ("/health/live", "DELETE", 405),
        ("/v1/admin/drain", "POST", 404),
    ],
)
def test_paths_and_methods(server, path, method, status):
    answer, headers, body = server.ask(path, None if method != "POST" else {}, method)
    assert answer == status
    assert body["error"]["message"]
    assert status != 405 or headers["allow"]


def test_another_model(server):
    status, _, body = server.chat(model="gpt-5")
    assert (status, body["error"]["code"], body["error"]["param"]) == (404, "model_not_found", "model")


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'{"a": NaN}', "invalid_json"),
        (b'{"model": "\xff"}', "invalid_utf8"),
        (b"[" * 60_000, "invalid_json"),
        (b"[" * 100_000, "too_many_values"),
    ],
)
def test_bodies_that_are_no_json(server, raw, code):
    status, _, body = server.ask("/v1/chat/completions", raw)
    assert (status, body["error"]["code"]) == (400, code)


def test_media_types(server):
    assert server.ask("/v1/chat/completions", HELLO, content_type="text/plain")[0] == 415
    assert server.ask("/v1/chat/completions", HELLO, content_type="application/json; charset=utf-8")[0] == 200
    assert server.ask("/v1/chat/completions", HELLO, content_encoding="gzip")[0] == 415


def test_a_large_body(server):
    body = json.dumps({**HELLO, "messages": user("x" * 10_000_000)}).encode()
    status, _, answer = server.ask("/v1/chat/completions", body)
    assert (status, answer["error"]["code"]) == (413, "request_too_large")


def test_api_keys():
    import hashlib

    digest = hashlib.sha256(b"second").hexdigest()
    with serving(api_keys=("one=first", f"two=sha256:{digest}")) as running:
        assert running.chat()[0] == 401
        status, headers, body = running.ask("/v1/models", authorization="Bearer wrong")
        assert (status, body["error"]["type"]) == (401, "authentication_error")
        assert headers["www-authenticate"] == "Bearer"
        for name, secret in (("one", "first"), ("two", "second")):
            assert (
                running.ask("/v1/chat/completions", {**HELLO, "max_tokens": 2}, authorization=f"Bearer {secret}")[0]
                == 200
            )
            assert running.script.requests[-1].key == name
        assert running.ask("/v1/models", authorization=f"Bearer sha256:{digest}")[0] == 401
        assert running.ask("/health/live")[0] == 200


def test_admin_has_a_token_of_its_own():
    with serving(api_keys=("one=first",), admin_token="operator-secret") as running:
        assert running.ask("/v1/admin/routes", authorization="Bearer first")[0] == 401
        token = {"authorization": "Bearer operator-secret"}
        assert running.ask("/v1/models", **token)[0] == 401
        status, _, body = running.ask("/v1/admin/routes", **token)
        assert status == 200
        assert body["layers"] == {"1": 4, "3": 4}
        assert running.ask("/v1/admin/scale", {"devices": 2}, **token)[2] == {"result": True}
        assert running.ask("/v1/admin/cache", None, "DELETE", **token)[2] == {"result": True}
        assert running.engine.controls == [("scale", {"devices": 2}), ("reset_prefix_cache", {})]
        full = {"devices": 3, "mode": "drain", "lost": [1]}
        assert running.ask("/v1/admin/scale", full, **token)[2] == {"result": True}
        assert running.engine.controls[-1] == ("scale", full)
        for wrong in (
            {"devices": 3, "mode": "jump"},
            {"devices": 3, "lost": [-1]},
            {"devices": 3, "lost": 1},
            {"devices": 3, "now": 1},
        ):
            param = [*wrong][1]
            assert running.ask("/v1/admin/scale", wrong, **token)[2]["error"]["param"] == param
        for lost, said in (([0, True], "lost[1] is True"), (["a"], "lost[0] is 'a'"), ([0, [1]], "lost[1] is a list")):
            status, _, body = running.ask("/v1/admin/scale", {"devices": 3, "lost": lost}, **token)
            assert status == 400
            assert body["error"]["message"] == f"{said}; it must be the number of a device that is gone"
        assert running.ask("/v1/admin/scale", {"devices": 0}, **token)[2]["error"]["param"] == "devices"
        assert running.ask("/v1/admin/cache", **token)[2]["kv_usage_ratio"] == 0.25
        assert running.ask("/v1/admin/nothing", **token)[0] == 404
        assert running.ask("/v1/admin/drain", {}, **token)[2]["state"] == "draining"
        assert running.ask("/v1/models", authorization="Bearer first")[0] == 200
        status, _, body = running.ask("/v1/chat/completions", HELLO, authorization="Bearer first")
        assert (status, body["error"]["code"]) == (503, "draining")
        assert running.ask("/v1/admin/drain", None, "DELETE", **token)[2]["state"] == "ready"
        assert running.ask("/v1/chat/completions", {**HELLO, "max_tokens": 2}, authorization="Bearer first")[0] == 200


def test_cors_is_off_unless_asked_for():
    with serving() as running:
        answer = running.ask("/v1/models", origin="http://page.example")
        assert "access-control-allow-origin" not in answer[1]
        preflight = {"origin": "http://page.example", "access_control_request_method": "POST"}
        assert running.ask("/v1/models", None, "OPTIONS", **preflight)[0] == 403
    with serving(cors_origins=("http://page.example",)) as running:
        headers = running.ask("/v1/models", origin="http://page.example")[1]
        assert headers["access-control-allow-origin"] == "http://page.example"
        other = running.ask("/v1/models", origin="http://other.example")
        assert (other[0], other[2]["error"]["code"]) == (403, "forbidden_origin")
        assert "access-control-allow-origin" not in other[1]
        status, headers, _ = running.ask("/v1/chat/completions", None, "OPTIONS", **preflight)
        assert status == 204
        assert "POST" in headers["access-control-allow-methods"]
        raw = running.ask("/v1/chat/completions", {**HELLO, "stream": True}, origin="http://page.example")
        assert raw[1]["access-control-allow-origin"] == "http://page.example"


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"host": "page.example"}, "forbidden_host"),  # a page's name that means this machine now
        ({"host": "192.168.0.1:80"}, "forbidden_host"),
        ({"host": ""}, "forbidden_host"),
        ({"host": "localhost.page.example"}, "forbidden_host"),
        ({"host": "["}, "forbidden_host"),
        ({"origin": "http://page.example"}, "forbidden_origin"),
        ({"origin": "null"}, "forbidden_origin"),
        ({"origin": "http://localhost:1"}, "forbidden_origin"),  # another server of this machine
        ({"host": "localhost:7", "origin": "http://localhost:7"}, None),
        ({"host": "LOCALHOST."}, None),
        ({"host": "[::1]:80"}, None),
        ({"host": "127.0.0.9"}, None),
    ],
)
def test_no_web_page_drives_a_server_of_this_machine(server, headers, code):
    status, _, body = server.ask("/v1/chat/completions", {**HELLO, "max_tokens": 1}, **headers)
    assert (status, body.get("error", {}).get("code")) == ((403, code) if code else (200, None))


def test_names_that_a_server_may_have_are_said():
    with serving(hosts=("proxy.example",)) as running:
        assert running.ask("/version", host="proxy.example:80")[0] == 200
        assert running.ask("/version", host="other.example")[0] == 403
    with serving(hosts=("*",)) as running:
        assert running.ask("/version", host="other.example")[0] == 200
    with serving(host="0.0.0.0") as running:
        assert running.ask("/version", host="other.example", origin="http://page.example")[0] == 200


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_body_that_does_not_say_it_is_json_is_refused(server, kind):
    status, _, body = server.ask("/v1/chat/completions", {**HELLO, "max_tokens": 1}, content_type=kind)
    assert (status, body["error"]["code"]) == (415, "unsupported_media_type")


KEYS = ("alice=a", "bob=b")


def as_key(name):
    return {"authorization": f"Bearer {name[0]}"}


def test_keys_share_no_prefix_and_no_order_unless_they_may():
    asked = {"model": "fake", "prompt": "hello", "max_tokens": 1, "priority": -1000, "cache_salt": "s"}

    def request(running, name):
        assert running.ask("/v1/completions", asked, **as_key(name))[0] == 200
        made = running.script.requests[-1]
        return made.priority, made.own_priority, made.cache_salt

    with serving(api_keys=KEYS, priority_keys=("bob",)) as running:
        alice, bob = request(running, "alice"), request(running, "bob")
        assert alice == (0, -1000, "5 alice s")
        assert bob == (-1000, 0, "3 bob s")
    with serving(api_keys=KEYS, priority_keys=("*",), shared_prefixes=True) as running:
        assert request(running, "alice") == (-1000, 0, "s")
    with pytest.raises(ConfigError, match=r"priority_keys has 'carol', which no key is called \(alice, bob\)"):
        HttpConfig(api_keys=KEYS, priority_keys=("carol",))


def test_other_routes(server):
    assert server.ask("/v1/models")[2]["data"][0]["id"] == "fake"
    assert server.ask("/v1/models/fake")[2]["max_model_len"] == 64
    assert set(server.ask("/version")[2]) == {"version"}
    assert server.ask("/health/ready")[0] == server.ask("/health")[0] == 200
    status, _, body = server.ask("/v1/embeddings", {"model": "fake", "input": "x"})
    assert (status, body["error"]["code"]) == (501, "not_supported")


def test_tokens_of_a_text(server):
    assert server.ask("/tokenize", {"prompt": "hé"})[2] == {"tokens": [104, 195, 169], "count": 3, "max_model_len": 64}
    assert server.ask("/tokenize", {"prompt": "hi", "return_token_strs": True})[2]["token_strs"] == ["h", "i"]
    chat = server.ask("/tokenize", {"messages": user("hi")})[2]["tokens"]
    assert bytes(chat).decode() == "User: hi\nAssistant:"
    assert server.ask("/detokenize", {"tokens": chat})[2] == {"prompt": "User: hi\nAssistant:"}
    assert server.ask("/detokenize", {"tokens": [-1]})[2]["error"]["param"] == "tokens"
    assert server.ask("/tokenize", {})[2]["error"]["param"] == "prompt"


def test_half_of_a_surrogate_pair_comes_back_as_json_has_it(server):
    half = "a \ud800 b"
    asked = {"model": "fake", "input": "x", "instructions": half, "metadata": {half: half}}
    status, _, told = server.ask("/v1/responses", asked)
    assert (status, told["instructions"], told["metadata"]) == (200, half, {half: half})
    for stream in (False, True):
        status, _, told = server.complete(prompt=half, echo=True, max_tokens=1, stream=stream)
        assert status == 200
        text = streamed(told) if stream else told["choices"][0]["text"]
        assert text.startswith(half)
    # Its name of a field is told in a header too, which takes no such letter.
    status, headers, _ = server.chat(**{half: 1})
    assert (status, headers["x-warning"]) == (200, "ignored unknown fields: a ? b")


def test_who_waits_until_the_body_is_wanted_is_told_so(server):
    said = json.dumps(HELLO).encode()
    more = f"host: localhost\r\nexpect: 100-continue\r\ncontent-length: {len(said)}\r\n"
    for kind, told in (("application/json", b"HTTP/1.1 100 Continue\r\n\r\n"), ("text/plain", b"HTTP/1.1 415 ")):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as link:
            link.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{more}content-type: {kind}\r\n\r\n".encode())
            assert link.recv(65536).startswith(told)
            if b" 100 " in told:
                link.sendall(said)
                assert link.recv(65536).startswith(b"HTTP/1.1 200")
