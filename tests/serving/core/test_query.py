"""What a request asks for, in words, as routers of adapters compare it."""

from anabranch.serving.core.query import MOST_QUERY, instruction_in, last_asked


def test_what_is_asked_in_words():
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert instruction_in("prompt") == "prompt"
    assert instruction_in("prompt", last_asked(chat)) == last_asked(chat) == "a"
    assert instruction_in("", last_asked([])) is None
    assert instruction_in("x" * 3000) == "x" * MOST_QUERY


def test_parts_of_a_message_and_what_is_no_message():
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, 3, {"text": "b"}]}
    assert last_asked([parts, {"role": "assistant", "content": "c"}]) == "a\nb"
    assert last_asked([{"role": "user", "content": None}]) == ""
    assert last_asked(["user", {"role": "system", "content": "s"}]) == ""
