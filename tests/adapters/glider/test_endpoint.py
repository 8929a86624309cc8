"""Endpoints that write instructions and make vectors: what they are sent, and how they fail, in one line without the key."""

import socket
import threading
import time

import numpy as np
import pytest

from anabranch.adapters.glider import ChatWriter, EndpointEmbedder, GliderPool, prompt_of
from anabranch.adapters.glider.endpoint import _MOST_TEXTS
from anabranch.errors import ConfigError, DataError
from ports import held_port
from scripted_endpoint import chat, endpoint, vectors


def test_a_writer_asks_for_the_task_of_a_text(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with endpoint(lambda *_: (200, chat("  Write SQL\nfor a question. "), {})) as (url, seen):
        assert ChatWriter(url, "small")("how many users are there?") == "Write SQL for a question."
        assert ChatWriter(url + "/", "small", key_env="MY_KEY", max_tokens=9)("x") == "Write SQL for a question."
    (path, body, headers), (_, other, others) = seen
    assert path == "/v1/chat/completions"
    assert (body["model"], body["temperature"], body["max_tokens"], other["max_tokens"]) == ("small", 0, 128, 9)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["messages"][1]["content"] == "how many users are there?"
    assert "Authorization" not in headers
    assert others["Authorization"] == "Bearer sk-secret"


def test_vectors_are_in_the_order_of_the_texts_whatever_that_of_the_answer():
    def answer(path, body):
        assert path == "/v1/embeddings"
        rows = [[float(len(text)), 1.0] for text in body["input"]]
        return 200, {"data": vectors(*rows)["data"][::-1]}, {}

    with endpoint(answer) as (url, seen):
        embedder = EndpointEmbedder(url, "vectors")
        assert embedder.embed(["a", "abc", "ab"]).tolist() == [[1, 1], [3, 1], [2, 1]]
        assert embedder.embed([]).shape == (0, 1)
        many = embedder.embed(["x" * (number % 7) for number in range(2 * _MOST_TEXTS + 3)])
    assert many[:, 0].tolist() == [number % 7 for number in range(2 * _MOST_TEXTS + 3)]
    assert many.dtype == np.float32
    assert [len(body["input"]) for _, body, _ in seen] == [3, _MOST_TEXTS, _MOST_TEXTS, 3]


def test_a_pool_is_written_and_found_by_endpoints(tmp_path):
    from adapter_models import make_adapter

    words = ("sql", "law")

    def answer(path, body):
        if path.endswith("embeddings"):
            return 200, vectors(*[[float(word in text) + 0.01 for word in words] for text in body["input"]]), {}
        asked = body["messages"][1]["content"]
        return 200, chat("It is about " + next((word for word in words if word in asked), "nothing")), {}

    for name in words:
        make_adapter(tmp_path / name, {"model.layers.0.self_attn.q_proj": (32, 32)}, seed=name)
    with endpoint(answer) as (url, seen):
        pool = GliderPool(writer=ChatWriter(url, "w"), embedder=EndpointEmbedder(url, "e"))
        for name in words:
            pool.add(tmp_path / name, examples=[(f"a question of {name}", "its answer")])
        assert [pool.matcher.texts[name] for name in words] == [("It is about sql",), ("It is about law",)]
        assert pool.retrieve("which law is it?")[0].name == "law"
        calls = len(seen)
        # The second time it is known.
        assert pool.retrieve("which law is it?")[0].name == "law"
        assert len(seen) == calls
    assert prompt_of([("a question of sql", "its answer")]) in [
        body["messages"][1]["content"] for path, body, _ in seen if "chat" in path
    ]


@pytest.mark.parametrize(
    ("status", "said", "headers", "message"),
    [
        (500, {"error": {"message": "no room, key sk-secret"}}, {}, r"answers 500: no room, key \*\*\*"),
        (404, b"<html>", {}, "answers 404: Not Found"),
        (400, b"[" * 70000, {}, "answers 400: Bad Request"),
        (302, b"", {"location": "http://127.0.0.1:1/elsewhere"}, "answers 302"),
        (200, b"no json", {}, "does not answer /chat/completions with a JSON object"),
        (200, b"[1]", {}, "does not answer /chat/completions with a JSON object"),
        (200, b"\xff\xfe", {}, "does not answer /chat/completions with a JSON object"),
        (200, {"choices": []}, {}, "wrote no instruction"),
        (200, chat("  "), {}, "wrote no instruction"),
        (200, chat(7), {}, "wrote no instruction"),
        (200, {"choices": "sk-secret"}, {}, r"wrote no instruction: .*\*\*\*"),
    ],
)
def test_answers_that_are_none(status, said, headers, message, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with endpoint(lambda *_: (status, said, headers)) as (url, seen):
        with pytest.raises(DataError, match=message) as raised:
            ChatWriter(url, "small", key_env="MY_KEY")("x")
        # It is told of no other address.
        assert len(seen) == 1
    assert "sk-secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"data": None},
        {"data": []},
        vectors([1.0], [2.0], [3.0]),
        vectors([1.0], [2.0], first=1),
        vectors([1.0], ["x"]),
        vectors([1.0], []),
        vectors([1.0], [[1.0]]),
        b'{"data": [{"index": 0, "embedding": [NaN]}, {"index": 1, "embedding": [1]}]}',
        {"data": [{"embedding": [1.0]}, {"embedding": [1.0]}]},
    ],
)
def test_vectors_that_are_none(said):
    with (
        endpoint(lambda *_: (200, said, {})) as (url, _),
        pytest.raises(DataError, match="a vector of finite numbers for each"),
    ):
        EndpointEmbedder(url, "vectors").embed(["a", "b"])


def test_vectors_have_one_size():
    with endpoint(lambda *_: (200, vectors([1.0], [2.0, 3.0]), {})) as (url, _):
        with pytest.raises(DataError, match=r"gives vectors of \[1, 2\] numbers"):
            EndpointEmbedder(url, "vectors").embed(["a", "b"])


def test_who_is_not_there_says_nothing_or_speaks_another_language():
    with held_port() as port, pytest.raises(DataError, match=f"cannot reach http://127.0.0.1:{port}/v1: .*refused"):
        ChatWriter(f"http://127.0.0.1:{port}/v1", "small")("x")
    with endpoint(lambda *_: time.sleep(0.5) or (200, chat("late"), {})) as (url, _):
        with pytest.raises(DataError, match=r"did not answer within 0\.1 seconds"):
            ChatWriter(url, "small", timeout_s=0.1)("x")
    listener = socket.create_server(("127.0.0.1", 0))

    def speak():
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(b"SSH-2.0-other\r\n")
        connection.close()

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    with pytest.raises(DataError, match=r"does not speak HTTP|cannot reach"):
        ChatWriter(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", "small")("x")
    thread.join()
    listener.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8000", "write http://HOST:PORT/v1"),
        ("ftp://host/v1", "write http://HOST:PORT/v1"),
        ("http://", "write http://HOST:PORT/v1"),
        ("http://host:99999/v1", "write http://HOST:PORT/v1"),
        ("http://host/v1?key=1", "write http://HOST:PORT/v1"),
        ("http://host/v1?k=hunter2", r"the endpoint is 'http://host/v1\?\*\*\*'; write http://HOST:PORT/v1"),
        ("http://me:pw@host/v1?a=b\n&k=hunter2#hunter2", r"the endpoint is 'http://me:\*\*\*@host/v1\?\*\*\*'; write"),
        ("http://host/v1#hunter2", "write http://HOST:PORT/v1"),
        ("http://me:hunter2@host/v1", "write http://HOST:PORT/v1"),
        ("http://:hunter2@host/v1", "write http://HOST:PORT/v1"),
        ("http://host/v1\nx", "write http://HOST:PORT/v1"),
    ],
)
def test_addresses_that_are_none(url, message):
    with pytest.raises(ConfigError, match=message) as raised:
        ChatWriter(url, "small")
    assert "hunter2" not in str(raised.value)


def test_what_else_an_endpoint_needs(monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    for options, message in (
        ({"model": ""}, "no model is named at the endpoint http://h/v1"),
        ({"model": "m", "key_env": "NO_KEY"}, "the key of http://h/v1 is to be in NO_KEY, which is not set"),
        ({"model": "m", "timeout_s": 0}, "timeout_s is 0; it must be above 0"),
        ({"model": "m", "timeout_s": float("nan")}, "timeout_s is nan; it must be above 0"),
        # Above what a thread, or a socket, can wait for.
        ({"model": "m", "timeout_s": 1e10}, "it must be above 0 and at most 1,000,000"),
        ({"model": "m", "max_tokens": 0}, "max_tokens is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            ChatWriter("http://h/v1", **options)


@pytest.mark.parametrize("before", [0, 350, 370, 390, 399])
@pytest.mark.parametrize("form", ["error", "answer", "instruction"])
def test_a_key_that_is_repeated_is_hidden_wherever_what_is_said_is_cut(monkeypatch, form, before):
    """Of a key across the cut the half before it was told."""
    key = "sk-" + 'A1"b2C3d4' * 6
    monkeypatch.setenv("MY_KEY", key)
    said = "x" * before + " " + key + " " + "y" * 600
    answers = {
        "error": (401, {"error": {"message": said}}, {}),
        "answer": (200, {"headers": said}, {}),
        "instruction": (200, chat(said), {}),
    }
    with endpoint(lambda *_: answers[form]) as (url, _):
        writer = ChatWriter(url, "w", key_env="MY_KEY")
        if form == "instruction":
            told = writer("x")
        else:
            with pytest.raises(DataError) as raised:
                writer("x")
            told = str(raised.value)
    # However the quotation mark in it is written.
    assert "C3d4" not in told
    assert len(told) < 500 or form == "instruction"


def test_a_key_is_hidden_however_its_spaces_are_told(monkeypatch):
    key = "sk-abc  def/ghi"
    monkeypatch.setenv("MY_KEY", key)
    for said in (key, "sk-abc def/ghi"):
        with (
            endpoint(lambda *_, said=said: (401, {"error": {"message": f"bad\nkey {said}"}}, {})) as (url, _),
            pytest.raises(DataError, match=r"answers 401: bad key \*\*\*$"),
        ):
            ChatWriter(url, "w", key_env="MY_KEY")("x")


def test_a_call_whose_time_is_up_leaves_no_thread_and_no_socket():
    """A byte now and then kept both for as long as the other side liked."""
    gone = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def drip():
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            try:
                while not gone.wait(0.02):
                    connection.sendall(b" ")
            except OSError:
                gone.set()

    threading.Thread(target=drip, daemon=True).start()
    before = set(threading.enumerate())
    with pytest.raises(DataError, match="did not answer within 1 seconds"):
        ChatWriter(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", "w", timeout_s=1)("x")
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=60)
        assert not thread.is_alive()
    # The other side is told.
    assert gone.wait(60)
    listener.close()


def test_no_proxy_is_asked_and_an_address_without_a_port_or_of_version_6_is_one(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with endpoint(lambda *_: (200, chat("Do it."), {})) as (url, _):
        assert ChatWriter(url, "w")("x") == "Do it."
    for url, wanted in (("https://[::1]/v1", ("::1", 443)), ("http://h/v1", ("h", 80)), ("http://h:81", ("h", 81))):
        made = ChatWriter(url, "w")._connection()
        assert (made.host, made.port) == wanted


@pytest.mark.parametrize("key", ["sk-one\n", "sk-eins\u2013zwei", "\tsk"])
def test_a_key_that_no_header_may_hold_is_told_as_that(monkeypatch, key):
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(ConfigError, match="MY_KEY holds what no header may") as raised:
        ChatWriter("http://127.0.0.1:1/v1", "w", key_env="MY_KEY")
    assert key.strip() not in str(raised.value)


def test_a_vector_of_endless_digits_is_none():
    with endpoint(lambda *_: (200, {"data": [{"index": 0, "embedding": [10**400]}]}, {})) as (url, _):
        with pytest.raises(DataError, match="does not give a vector of finite numbers for each of 1 texts"):
            EndpointEmbedder(url, "e").embed(["a"])


def test_an_answer_that_comes_byte_by_byte_has_the_time_of_a_call():
    """Each read had it anew."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        stopped = threading.Event()

        def drip():
            with server.accept()[0] as calls:
                calls.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
                while not stopped.wait(0.05):
                    try:
                        calls.sendall(b" ")
                    except OSError:
                        return

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        try:
            with pytest.raises(DataError, match="did not answer within 1 seconds"):
                ChatWriter(f"http://127.0.0.1:{server.getsockname()[1]}/v1", "w", timeout_s=1)("x")
        finally:
            stopped.set()
            thread.join()
