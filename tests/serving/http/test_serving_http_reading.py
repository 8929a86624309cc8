"""Long requests are read beside the loop, in turn by key, and not at all where there is no room for them."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from anabranch.data import ByteTokenizer
from anabranch.serving.core.admission import AdmissionConfig
from anabranch.serving.http.reading import Reader
from fake_engine import Script
from serving_thread import serving
from waiting import until

LONG = "a" * 30_000


class Slow(Reader):
    """Waits for texts of a's, and notes the threads that read."""

    def __init__(self):
        super().__init__(ByteTokenizer())
        self.threads, self.waiting = [], []
        self.may_go = threading.Event()

    def encode(self, text):
        self.threads.append(threading.current_thread().name)
        if text.startswith("aaa"):
            self.waiting.append(text)
            assert self.may_go.wait(60)
        return super().encode(text)


def as_key(name):
    return {"authorization": f"Bearer {name[0]}"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "fake", "prompt": LONG.replace("a", "b"), "max_tokens": 1}),
        ("/tokenize", {"prompt": LONG.replace("a", "b")}),
    ],
)
def test_long_texts_are_read_beside_the_loop_and_short_ones_at_once(path, body):
    reader = Slow()
    with serving(Script(positions=100_000), reader=reader) as server:
        assert server.ask(path, body)[0] == 200
        assert server.ask(path, {**body, "prompt": "short"})[0] == 200
        assert server.ask("/detokenize", {"tokens": [98] * 30_000})[2]["prompt"] == LONG.replace("a", "b")
        long, short = reader.threads
        assert long.startswith("anabranch-reading")
        assert not short.startswith("anabranch")
        # What is wrong with it is told as ever.
        raw = b'{"prompt": "' + b"x" * 30_000
        status, _, answer = server.ask(path, raw)
        assert (status, answer["error"]["code"]) == (400, "invalid_json")


def test_a_key_with_many_long_texts_holds_up_itself_alone():
    reader = Slow()
    with (
        serving(
            Script(positions=100_000),
            reader=reader,
            api_keys=("alice=a", "bob=b"),
            admission=AdmissionConfig(max_queued_tokens=None),
        ) as server,
        ThreadPoolExecutor(20) as pool,
    ):
        body = {"model": "fake", "prompt": LONG, "max_tokens": 1}
        alice = [pool.submit(server.ask, "/v1/completions", body, **as_key("alice")) for _ in range(20)]
        until(lambda: len(reader.waiting) == 3)
        assert server.ask("/v1/completions", {**body, "prompt": "b" * 30_000}, **as_key("bob"))[0] == 200
        assert server.ask("/tokenize", {"prompt": "b" * 30_000}, **as_key("bob"))[2]["count"] == 30_000
        assert len(reader.waiting) == 3
        reader.may_go.set()
        assert {one.result(60)[0] for one in alice} == {200}


def test_what_there_is_no_room_for_is_not_read():
    reader = Slow()
    limits = AdmissionConfig(max_in_flight=1)
    with (
        serving(Script(positions=100_000, endless=True, delay_s=0.01), reader=reader, admission=limits) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        body = {"model": "fake", "prompt": "b", "max_tokens": 300}
        under_way = pool.submit(server.ask, "/v1/completions", body)
        until(lambda: server.frontend.admission.in_flight == 1)
        status, headers, answer = server.ask("/v1/completions", {**body, "prompt": LONG})
        assert (status, answer["error"]["code"], headers["x-should-retry"]) == (429, "overloaded", "true")
        assert reader.waiting == []
        assert under_way.result(60)[0] == 200


def test_too_many_that_wait_to_be_read_are_told_to_ask_again():
    reader = Slow()
    with serving(Script(positions=100_000), reader=reader) as server, ThreadPoolExecutor(5) as pool:
        body = {"prompt": LONG}
        waiting = [pool.submit(server.ask, "/tokenize", body) for _ in range(3)]
        until(lambda: len(reader.waiting) == 3)
        server.frontend._reading._most_waiting = 2
        waiting += [pool.submit(server.ask, "/tokenize", body) for _ in range(2)]
        until(lambda: len(server.frontend._reading._waiting.get("", ())) == 2)
        status, headers, answer = server.ask("/tokenize", body)
        assert (status, answer["error"]["message"]) == (429, "busy: 2 long requests wait to be read; ask again")
        assert headers["retry-after"] == "1"
        reader.may_go.set()
        assert {one.result(60)[0] for one in waiting} == {200}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/tokenize"])
def test_json_in_a_text_holds_up_nobody(path):
    """As the JSON of a body: 8 MiB of lists take the parser seconds, in which no other thread runs."""
    arguments = "[" + "[]," * 1_000_000 + "[]]"
    item = {"type": "function_call", "call_id": "1", "name": "f", "arguments": arguments}
    said = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": arguments}}]}
    ask = {"role": "user", "content": "hello"}
    body = (
        {"model": "fake", "input": [ask, item]}
        if path == "/v1/responses"
        else {"model": "fake", "messages": [ask, said]}
    )
    with serving(Script()) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.ask, path, body)
        with server.holds() as held:
            while not asked.done():
                assert server.ask("/health/live")[0] == 200
        status, _, answer = asked.result()
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
        assert "the arguments of all calls together have more than 65,536 values" in answer["error"]["message"]
        assert max(held) < 1


def test_a_deadline_that_passes_while_a_request_waits_to_be_read_is_told_as_one():
    reader = Slow()
    script = Script(positions=100_000, endless=True, delay_s=0.01)
    with serving(script, reader=reader) as server, ThreadPoolExecutor(2) as pool:
        body = {"model": "fake", "prompt": LONG, "max_tokens": 1}
        # So that the pace is known and the engine is not idle.
        under_way = pool.submit(server.ask, "/v1/completions", {**body, "prompt": "b", "max_tokens": 60})
        until(lambda: server.frontend.admission.in_flight == 1 and not server.frontend.admission.queued)
        asked = pool.submit(lambda: server.ask("/v1/completions", body, x_deadline_ms="50"))
        until(lambda: len(reader.waiting) == 1)
        time.sleep(0.06)
        reader.may_go.set()
        status, _, answer = asked.result(60)
        assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
        assert sum(server.frontend.admission.rejections.values()) == 0
        assert under_way.result(60)[0] == 200
