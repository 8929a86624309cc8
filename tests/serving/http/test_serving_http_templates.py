"""A model's chat template that takes long holds up nobody but who asks for it."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tokenizers

from anabranch import sandbox
from anabranch.data import templates
from anabranch.data.bpe import train_bpe
from anabranch.data.tokenizer import HuggingFaceTokenizer
from anabranch.serving.http.reading import Reader
from serving_thread import serving
from waiting import until


class Waiting(Reader):
    """Reads when it is told to."""

    def __init__(self, template):
        backend = tokenizers.Tokenizer.from_str(train_bpe(["abc"], 257)._backend.to_str())
        super().__init__(HuggingFaceTokenizer(backend, eos_id=0, chat_template=template))
        self.is_asked, self.may_answer = threading.Event(), threading.Event()
        self.asked = []

    def render(self, messages, tools, **more):
        self.is_asked.set()
        self.asked.append(messages)
        assert self.may_answer.wait(60)
        return super().render(messages, tools, **more)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_others_are_answered_while_a_template_is_rendered(path):
    reader, made = Waiting("{{ messages[0].content }}"), []
    messages = [{"role": "user", "content": "abc"}]
    with serving(reader=reader) as server:
        body = {"model": "fake", "messages": messages}
        thread = threading.Thread(target=lambda: made.append(server.ask(path, body)))
        thread.start()
        try:
            until(reader.is_asked.is_set)
            assert server.ask("/health/live")[0] == 200
            assert not made
        finally:
            reader.may_answer.set()
            thread.join(60)
        assert made[0][0] == 200


def test_what_renders_nothing_never_waits_behind_templates():
    reader = Waiting("{{ messages[0].content }}")
    # As many as asyncio has threads for everything else.
    count = min(32, (os.cpu_count() or 1) + 4)
    with serving(reader=reader) as server, ThreadPoolExecutor(count) as pool:
        chats = [pool.submit(server.chat) for _ in range(count)]
        try:
            until(lambda: len(reader.asked) == count)
            long = "abc" * 10_000
            status, _, body = server.ask("/v1/completions", {"model": "fake", "prompt": long, "max_tokens": 1})
            assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
            assert not any(chat.done() for chat in chats)
        finally:
            reader.may_answer.set()
        assert [chat.result()[0] for chat in chats] == [200] * count


def test_templates_that_wait_too_long_for_a_process_are_no_fault_of_the_request(monkeypatch):
    monkeypatch.setattr(sandbox, "WAIT_S", 0.05)
    renderer = sandbox.Sandbox.of(templates.WORK)
    monkeypatch.setattr(renderer, "_free", [])
    with serving(reader=Reader(Waiting("{{ messages[0].content }} {{ 7 }}").tokenizer)) as server:
        status, headers, body = server.chat()
    assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "busy", "1")
    assert "none of the" in body["error"]["message"]


def test_a_template_without_end_is_an_error_of_the_request():
    with serving(reader=Reader(Waiting("{{ 'x'.ljust(2000000000) }}").tokenizer)) as server:
        status, _, body = server.chat()
        assert status == 400
        assert "asked for more than 1 GiB of memory" in body["error"]["message"]
