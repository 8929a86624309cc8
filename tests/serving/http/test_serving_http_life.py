"""Overload, deadlines, readers who go or stand still, engines that die; and what the metrics say of it."""

import asyncio
import contextlib
import errno
import json
import math
import socket
import time
import types

import pytest

from anabranch.errors import BackendError
from anabranch.serving.core import stream
from anabranch.serving.core.admission import AdmissionConfig
from anabranch.serving.http import frontend
from anabranch.serving.http.config import Limits
from anabranch.serving.http.run import _drain
from fake_engine import Script
from serving_thread import HELLO, events, serving, streamed
from waiting import until

SLOW = {"max_tokens": 4000}


class Link:
    """A raw connection that has asked for a stream."""

    def __init__(self, server, body, buffer=None, headers=""):
        self.socket = socket.socket()
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.settimeout(60)
        self.socket.connect(("127.0.0.1", server.port))
        raw = json.dumps({**HELLO, **body}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        head += f"{headers}content-length: {len(raw)}\r\n\r\n"
        self.socket.sendall(head.encode() + raw)

    def until(self, mark):
        data = b""
        while mark not in data:
            part = self.socket.recv(4096)
            assert part, data
            data += part
        return data

    def rest(self):
        data = b""
        with contextlib.suppress(ConnectionError):
            while part := self.socket.recv(1 << 16):
                data += part
        return data

    def close(self):
        self.socket.close()


@pytest.mark.parametrize("status", [429, 503])
def test_too_many_requests_are_refused_at_once(status):
    with serving(
        Script(delay_s=0.01, endless=True), admission=AdmissionConfig(max_in_flight=2, status=status)
    ) as running:
        links = [Link(running, {**SLOW, "stream": True}) for _ in range(2)]
        for link in links:
            link.until(b"data: ")
        assert running.metrics()["in_flight"] == 2
        answer, headers, body = running.chat()
        assert answer == status
        assert body["error"]["type"] == "rate_limit_error"
        assert 1 <= int(headers["retry-after"]) <= 120
        assert running.metrics()['admission_rejections_total{reason="in_flight"}'] == 1
        for link in links:
            link.close()
        until(lambda: running.chat(max_tokens=1)[0] == 200)
        until(lambda: running.frontend.admission.in_flight == 0)


def test_choices_count_and_are_let_in_together_or_not_at_all():
    with serving(Script(delay_s=0.01), admission=AdmissionConfig(max_in_flight=3)) as running:
        holder = Link(running, {**SLOW, "stream": True})
        until(lambda: running.frontend.admission.in_flight == 1)
        assert running.chat(n=3)[0] == 429
        until(lambda: running.frontend.admission.in_flight == 1)
        holder.close()
        until(lambda: running.frontend.admission.in_flight == 0)
        status, _, body = running.chat(n=4)
        assert (status, body["error"]["code"]) == (400, "too_many_sequences")
        assert "never takes more than 3 of them at once" in body["error"]["message"]
        until(lambda: running.frontend.admission.in_flight == 0)
        assert running.chat(n=3, max_tokens=2)[0] == 200


def test_each_key_has_its_share():
    limits = AdmissionConfig(max_per_key=1)
    with serving(Script(delay_s=0.01, endless=True), admission=limits, api_keys=("a=aa", "b=bb")) as running:
        link = Link(running, {**SLOW, "stream": True}, headers="authorization: Bearer aa\r\n")
        link.until(b"data: ")
        assert running.ask("/v1/chat/completions", HELLO, authorization="Bearer aa")[0] == 429
        assert running.ask("/v1/chat/completions", {**HELLO, "max_tokens": 1}, authorization="Bearer bb")[0] == 200
        link.close()


@pytest.mark.parametrize("limits", [{"max_in_flight": 8}, {"max_queued": 6}])
def test_a_key_that_takes_all_it_can_keeps_nobody_out(limits):
    script = Script(delay_s=0.01, endless=True, slots=2 if "max_queued" in limits else 64)
    with serving(script, admission=AdmissionConfig(**limits), api_keys=("a=aa", "b=bb")) as running:
        links, greedy = [], "authorization: Bearer aa\r\n"
        for count in range(1, 9):
            links.append(Link(running, {**SLOW, "stream": True}, headers=greedy))
            until(lambda count=count: running.frontend.admission.in_flight + refusals(running) == count)
        assert refusals(running) > 0
        held = running.frontend.admission.in_flight
        answer = running.ask("/v1/chat/completions", HELLO, authorization="Bearer aa")
        assert (answer[0], answer[2]["error"]["code"]) == (429, "overloaded")
        other = Link(running, {**SLOW, "stream": True}, headers="authorization: Bearer bb\r\n")
        until(lambda: running.frontend.admission.in_flight == held + 1)
        for link in links:
            link.close()
        other.until(b"data: ")
        other.close()


def refusals(running):
    return running.metrics()['admission_rejections_total{reason="key_share"}']


def test_who_waits_in_the_queue_counts_until_the_engine_begins():
    limits = AdmissionConfig(max_queued=1)
    with serving(Script(delay_s=0.01, endless=True, slots=1), admission=limits) as running:
        first = Link(running, {**SLOW, "stream": True})
        first.until(b"data: ")
        second = Link(running, {**SLOW, "stream": True})
        until(lambda: running.frontend.admission.queued == 1)
        status, headers, _ = running.chat()
        assert status == 429
        assert headers["retry-after"]
        first.close()
        second.until(b"data: ")
        until(lambda: running.frontend.admission.queued == 0)
        second.close()


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_who_goes_away_is_forgotten_at_once(is_stream):
    with serving(Script(delay_s=0.01, endless=True)) as running:
        link = Link(running, {**SLOW, "n": 2, "stream": is_stream})
        until(lambda: len(running.engine.running) == 2)
        link.close()
        until(lambda: not running.engine.running)
        until(lambda: len(running.engine.aborted) == 2)
        until(lambda: running.metrics()['aborted_total{reason="client_gone"}'] == 2)
        assert running.metrics()['requests_total{code="499",endpoint="chat"}'] == 1


def test_a_reader_who_stands_still_is_cut_off():
    limits = Limits(stream_events=4, stall_s=0.3)
    text = "x" * 60_000
    with serving(Script(endless=True, positions=10_000_000, say=text), limits=limits) as running:
        wanted = {"max_tokens": 3_000_000, "stream": True, "logprobs": True, "top_logprobs": 20}  # large events
        link = Link(running, wanted, buffer=4096)
        until(lambda: running.metrics()['aborted_total{reason="slow_reader"}'] == 1)
        until(lambda: not running.engine.running)
        link.close()


def test_a_whole_answer_that_nobody_reads_is_not_kept():
    with serving(Script(say="x" * 4000), limits=Limits(stall_s=0.3)) as running:
        link = Link(running, {"max_tokens": 4000, "logprobs": True, "top_logprobs": 20}, buffer=4096)
        until(lambda: not running.engine.running and running.script.requests)
        until(lambda: not running.app.under_way)
        until(lambda: running.metrics()['requests_total{code="499",endpoint="chat"}'] == 1)
        assert running.chat(max_tokens=1)[0] == 200
        head, _, body = link.rest().partition(b"\r\n\r\n")
        link.close()
        # In pieces, whose last one is empty; it may also be cut off before anything of it could be read.
        assert not head or b"transfer-encoding: chunked" in head.lower()
        assert not body.endswith(b"0\r\n\r\n")


@pytest.mark.slow
@pytest.mark.parametrize("choices", [1, 3])
def test_a_whole_answer_that_is_read_slowly_keeps_no_place_of_the_engine(choices):
    """All of it has been generated: whoever reads it as slowly as they may keeps nobody out."""
    with serving(Script(say="x" * 4000), admission=AdmissionConfig(max_in_flight=choices)) as running:
        asked = {"max_tokens": 4000, "n": choices, "logprobs": True, "top_logprobs": 20}
        link = Link(running, asked, buffer=4096)
        until(lambda: running.app.under_way and running.script.requests and not running.engine.running)
        until(lambda: running.frontend.admission.in_flight == 0)
        assert running.chat(max_tokens=1, n=choices)[0] == 200
        # It is being written all the while.
        assert running.app.under_way
        link.close()


def test_a_reader_may_stand_still_for_as_long_as_the_config_says(monkeypatch):
    """The engine's own patience is for those who use it without a server."""
    monkeypatch.setattr(stream, "STALL_S", 0.01)
    with serving(limits=Limits(stream_events=4, stall_s=100)) as running:
        assert running.chat(max_tokens=3, stream=True)[0] == 200
        request = running.script.requests[-1]
        assert (request.buffer, request.stall_s) == (4, math.inf)


def test_an_engine_that_dies_while_it_drains_is_started_again_when_requests_are_taken():
    with serving(Script(endless=True, delay_s=0.01)) as running:
        link = Link(running, {**SLOW, "stream": True})
        link.until(b"data: ")
        running.on_loop(running.frontend.drain)
        running.on_loop(running.engine.kill)
        assert b"engine_failed" in link.until(b"[DONE]")
        link.close()
        time.sleep(0.2)
        assert (running.frontend.state, len(running.script.made)) == ("draining", 1)
        running.on_loop(running.frontend.resume)
        until(lambda: running.frontend.state == "ready" and len(running.script.made) == 2)
        assert running.chat(max_tokens=2)[0] == 200


@pytest.mark.parametrize("header", [{"x_deadline_ms": "800"}, {"x_request_timeout": "0.8"}])
def test_a_deadline(header):
    with serving(Script(delay_s=0.02, endless=True)) as running:
        status, _, body = running.ask("/v1/chat/completions", {**HELLO, **SLOW}, **header)
        assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
        raw = running.ask("/v1/chat/completions", {**HELLO, **SLOW, "stream": True}, **header)
        assert raw[0] == 200
        made = events(raw[2])
        assert made[-2]["error"]["code"] == "deadline_exceeded"
        assert made[-1] == "[DONE]"
        until(lambda: not running.engine.running)
        assert running.metrics()['aborted_total{reason="deadline"}'] == 2


def test_deadlines_that_are_none():
    with serving() as running:
        for text in ("soon", "-1", "nan", "inf", "0"):
            assert (
                running.ask("/v1/chat/completions", HELLO, x_deadline_ms=text)[2]["error"]["param"] == "x-deadline-ms"
            )


def test_a_sign_of_life_while_nothing_comes():
    with serving(Script(delay_s=0.15, say="ab"), keep_alive_s=0.04) as running:
        raw = running.chat(stream=True)[2]
        assert streamed(raw) == "ab"
        # Where the server gets no time until a token is there, it need not say that it waits.
        until(lambda: b": waiting\n\n" in running.chat(stream=True)[2])


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_request_that_fails_does_so_alone(is_stream):
    with serving() as running:
        answer = running.ask("/v1/chat/completions", {**HELLO, "stream": is_stream}, x_request_id="bad-1")
        assert answer[0] == 500  # nothing was written yet
        assert answer[1]["x-should-retry"] == "false"
        assert answer[2]["error"]["code"] == "request_failed"
        assert answer[2]["error"]["message"] == "not a number"
        assert running.metrics()['aborted_total{reason="request_failed"}'] == 1
        assert running.metrics()['aborted_total{reason="engine_failed"}'] == 0
        assert running.chat(max_tokens=2)[0] == 200
        assert running.frontend.state == "ready"
        assert len(running.script.made) == 1


def test_an_error_after_the_first_byte_is_an_event():
    with serving(Script(endless=True, crash_after=5, delay_s=0.005)) as running:
        made = events(running.chat(max_tokens=50, stream=True)[2])
        assert made[-2]["error"]["code"] == "engine_failed"
        assert made[-1] == "[DONE]"


def test_a_dead_engine_is_started_again():
    with serving(Script(endless=True, delay_s=0.01)) as running:
        link = Link(running, {**SLOW, "stream": True})
        link.until(b"data: ")
        running.on_loop(running.engine.kill)
        assert b"engine_failed" in link.until(b"[DONE]")
        link.close()
        until(lambda: len(running.script.made) == 2 and running.frontend.state == "ready")
        assert running.chat(max_tokens=2)[0] == 200
        shown = running.metrics()
        assert shown["engine_restarts_total"] == 1
        assert shown['engine_state{anabranch_serving_engine_state="ready"}'] == 1
        assert shown["expert_hits_total"] >= 4  # what the first engine counted is not forgotten


def test_an_engine_that_dies_too_often_is_given_up():
    script = Script(crash_after=0)
    with serving(script, restarts=3) as running:
        for died in range(4):
            until(lambda: running.frontend.state == "ready")
            assert running.chat()[0] == 500
            until(lambda died=died: len(script.made) == died + 2 or running.frontend.state == "failed")
        until(lambda: running.frontend.state == "failed" and len(script.made) == 4)
        until(lambda: running.frontend.failed.is_set())
        assert running.chat()[0] == 503
        assert running.ask("/health/live")[0] == 503


def failing_after_the_first(script, error, times):
    """Engines of which the second and further ones cannot be started, ``times`` times."""
    left = [times]

    def make():
        engine = script()
        start = engine.start

        async def failing():
            if len(script.made) > 1 and left[0]:
                left[0] -= 1
                raise error
            return await start()

        engine.start = failing
        return engine

    return make


def drained(running, drain_s=60.0):
    """A drain as a signal begins it; whether some requests were cut short, once that is known."""
    signals = types.SimpleNamespace(kill=asyncio.Event())
    made = asyncio.run_coroutine_threadsafe(_drain(running.frontend, running.app, signals, drain_s), running.loop)
    until(lambda: running.frontend.state == "draining")
    return made


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("has_begun", [False, True])
def test_a_drain_tells_that_an_engine_failed_its_requests(is_stream, has_begun):
    with serving(Script(endless=True, delay_s=0.01, slots=1 if has_begun else 0)) as running:
        links = [Link(running, {**SLOW, "stream": is_stream}) for _ in range(2)]
        until(lambda: running.frontend.admission.in_flight == 2 and len(running.engine.running) == 2)
        made = drained(running)
        running.on_loop(running.engine.kill)
        assert made.result(60)
        for link in links:
            assert b"engine_failed" in link.rest()
            link.close()


def test_a_drain_in_which_all_are_answered_tells_of_none_cut_short():
    with serving(Script(endless=True, delay_s=0.01)) as running:
        # What was cut before it began is another matter.
        running.on_loop(running.engine.kill)
        assert running.chat()[0] == 500
        until(lambda: len(running.script.made) == 2 and running.frontend.state == "ready")
        until(lambda: running.frontend.num_cut == 1)
        before = len(running.script.requests)
        links = [
            Link(running, {"max_tokens": 30}),
            # How long it waits is its own to say.
            Link(running, SLOW, headers="x-deadline-ms: 300\r\n"),
        ]
        until(lambda: len(running.script.requests) == before + 2)
        assert not drained(running).result(60)
        assert b'"finish_reason"' in links[0].rest()
        assert b"deadline_exceeded" in links[1].rest()
        for link in links:
            link.close()


def test_a_drain_that_takes_too_long_tells_of_those_cut_short():
    with serving(Script(endless=True, delay_s=0.01)) as running:
        link = Link(running, {**SLOW, "stream": True})
        link.until(b"data: ")
        assert drained(running, 0.05).result(60)
        assert b"shutting_down" in link.rest()
        until(lambda: running.frontend.num_cut == 1)
        link.close()


@pytest.mark.parametrize("is_read", [False, True])
def test_a_drain_tells_of_an_answer_that_is_made_and_not_written_to_its_end(is_read):
    with serving(Script(width=1_000)) as running, socket.socket() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.settimeout(60)
        link.connect(("127.0.0.1", running.port))
        raw = json.dumps({"model": "fake", "input": ["x"] * 300}).encode()
        head = "POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        link.sendall(f"{head}connection: close\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw)
        assert link.recv(100).startswith(b"HTTP/1.1 200")
        until(lambda: running.frontend.admission.in_flight == 0)
        draining = drained(running, 60.0 if is_read else 0.05)
        while is_read and link.recv(1 << 16):
            pass
        assert draining.result(60) is not is_read


SHORTAGES = [OSError(errno.EMFILE, "Too many open files"), RuntimeError("can't start new thread"), BackendError("no")]


@pytest.mark.parametrize("error", SHORTAGES, ids=lambda error: type(error).__name__)
def test_an_engine_that_cannot_be_started_again_at_once_is_tried_again(error, monkeypatch, caplog):
    monkeypatch.setattr(frontend, "AGAIN_S", 0.05)
    script = Script()
    with serving(failing_after_the_first(script, error, 2), restarts=3) as running:
        before = time.monotonic()
        running.on_loop(script.made[0].kill)
        until(lambda: len(script.made) == 4 and running.frontend.state == "ready")
        # Twice as long before each further start.
        assert time.monotonic() - before > 0.05 + 0.1
        assert running.chat(max_tokens=2)[0] == 200
        assert running.metrics()["engine_restarts_total"] == 3
    assert f"the engine did not start: {error}" in caplog.text


@pytest.mark.parametrize("error", SHORTAGES, ids=lambda error: type(error).__name__)
def test_an_engine_that_cannot_be_started_again_is_given_up(error, monkeypatch):
    monkeypatch.setattr(frontend, "AGAIN_S", 0.01)
    script = Script()
    with serving(failing_after_the_first(script, error, 99), restarts=2) as running:
        running.on_loop(script.made[0].kill)
        until(lambda: running.frontend.state == "failed")
        until(lambda: running.frontend.failed.is_set() and len(script.made) == 3)
        assert running.ask("/health/live")[0] == 503


def test_an_engine_whose_end_fails_is_started_again_nonetheless(monkeypatch):
    script = Script()
    with serving(script) as running:

        async def failing(drain_s=0.0):
            raise RuntimeError("can't start new thread")

        script.made[0].close = failing
        running.on_loop(script.made[0].kill)
        until(lambda: len(script.made) == 2 and running.frontend.state == "ready")
        assert running.chat(max_tokens=2)[0] == 200


def test_a_server_that_cannot_look_after_its_engine_gives_up(monkeypatch, caplog):
    with serving() as running:
        monkeypatch.setattr(running.frontend.metrics, "absorb", lambda stats: stats.nothing)
        until(lambda: running.frontend.state == "failed")
        until(lambda: running.frontend.failed.is_set())
        status, _, said = running.ask("/health/live")
        assert (status, said["error"]["code"]) == (503, "failed")
        assert "cannot be looked after: AttributeError" in said["error"]["message"]
    assert "a bug: the engine cannot be looked after" in caplog.text


def test_loading_is_told():
    script, may_start = Script(), asyncio.Event()

    def make():
        engine = script()
        start = engine.start

        async def waiting():
            await may_start.wait()
            return await start()

        engine.start = waiting
        return engine

    with serving(make, wait=False) as running:
        assert running.ask("/health/live")[0] == 200
        for path in ("/health/ready", "/v1/chat/completions", "/tokenize"):
            status, headers, body = running.ask(path, None if "health" in path else HELLO)
            assert (status, body["error"]["code"]) == (503, "loading")
            assert headers["retry-after"]
        assert running.ask("/v1/models")[2]["data"] == []
        running.on_loop(may_start.set)
        running.wait_ready()
        assert running.chat(max_tokens=2)[0] == 200


def test_every_series_is_there_before_traffic_and_adds_up_after_it():
    with serving() as running:
        before = running.metrics()
        for name in (
            "prompt_tokens_total",
            "cached_prompt_tokens_total",
            "generation_tokens_total",
            "preemptions_total",
            "expert_hits_total",
            "expert_misses_total",
            "expert_late_total",
            "expert_prefetched_unused_total",
            "expert_bytes_moved_total",
            "running",
            "waiting",
            "queued_tokens",
            "expert_resident_bytes",
            "ttft_seconds_count",
            "inter_token_seconds_count",
            "e2e_seconds_count",
            "queue_time_seconds_count",
            "step_time_seconds_count",
            "batch_tokens_count",
            "prompt_len_tokens_count",
            "output_len_tokens_count",
            'requests_total{code="200",endpoint="chat"}',
            'admission_rejections_total{reason="queued"}',
            'aborted_total{reason="client_gone"}',
            "in_flight",
        ):
            assert before[name] == 0, name
        assert "kv_usage_ratio" in before
        usages = [running.chat(max_tokens=size, n=size)[2]["usage"] for size in (1, 2, 3)]
        raw = running.complete(prompt=["ab", "cd"], stream=True, stream_options={"include_usage": True})[2]
        usages.append(events(raw)[-2]["usage"])
        running.chat(temperature=9)
        now = running.metrics()
        assert now["prompt_tokens_total"] == sum(usage["prompt_tokens"] for usage in usages)
        assert now["generation_tokens_total"] == sum(usage["completion_tokens"] for usage in usages) == 1 + 4 + 9 + 4
        cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
        assert now["cached_prompt_tokens_total"] == cached > 0
        choices = 1 + 2 + 3 + 2
        for name in ("ttft_seconds", "e2e_seconds", "queue_time_seconds", "prompt_len_tokens", "output_len_tokens"):
            assert now[f"{name}_count"] == choices, name
        assert now["inter_token_seconds_count"] == now["generation_tokens_total"] - choices
        assert now["output_len_tokens_sum"] == now["generation_tokens_total"]
        assert now["step_time_seconds_count"] == now["steps_total"] == now["batch_tokens_sum"]
        assert now['requests_total{code="200",endpoint="chat"}'] == 3
        assert now['requests_total{code="400",endpoint="chat"}'] == 1
        assert now["in_flight"] == 0


def test_the_access_log_has_no_prompts(caplog):
    secret = "a very private question"
    for is_asked in (False, True):
        caplog.clear()
        with (
            caplog.at_level("INFO", "anabranch.serving.access"),
            serving(access_log=True, log_prompts=is_asked) as running,
        ):
            running.chat(messages=[{"role": "user", "content": secret}], stream=True)
        lines = [
            json.loads(record.getMessage()) for record in caplog.records if record.name == "anabranch.serving.access"
        ]
        [line] = [line for line in lines if line["path"] == "/v1/chat/completions"]
        assert {"request_id", "status", "ms", "ttft_ms", "prompt_tokens", "completion_tokens", "finish"} <= set(line)
        assert line["status"] == 200
        assert (secret in caplog.text) == is_asked


def test_half_a_request_is_dropped():
    with serving(limits=Limits(header_timeout_s=0.5, body_timeout_s=120.0)) as running:
        with socket.create_connection(("127.0.0.1", running.port), timeout=60) as link:
            link.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n")
            assert link.recv(100) == b""
    with serving(limits=Limits(header_timeout_s=120.0, body_timeout_s=0.5)) as running:
        with socket.create_connection(("127.0.0.1", running.port), timeout=60) as link:
            link.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
            )
            assert b"408" in link.recv(1000)
    with serving() as running:
        with socket.create_connection(("127.0.0.1", running.port), timeout=60) as link:
            link.sendall(b"what is this\r\n\r\n")
            assert b" 400 " in link.recv(1000)
        assert running.chat(max_tokens=1)[0] == 200


def test_pipelined_requests_are_answered_in_order():
    with serving() as running, socket.create_connection(("127.0.0.1", running.port), timeout=60) as link:
        ask = b"GET /version HTTP/1.1\r\nhost: localhost\r\nx-request-id: %d\r\n\r\n"
        link.sendall(
            ask % 1
            + ask % 2
            + b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx-request-id: 3\r\nconnection: close\r\n\r\n"
        )
        data = b""
        while part := link.recv(4096):
            data += part
        assert data.count(b"HTTP/1.1 200 OK") == 3
        places = [data.lower().index(b"x-request-id: %d" % number) for number in (1, 2, 3)]
        assert places == sorted(places)
