"""Chat and text completions over HTTP: shapes, parameters, streams that say what the whole answer says."""

import pytest

from serving_thread import serving


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


def test_a_whole_answer(server):
    status, headers, body = server.chat(max_tokens=5)
    assert status == 200
    assert headers["x-request-id"]
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["content"] == "User:"
    assert body["choices"][0]["finish_reason"] == "length"
