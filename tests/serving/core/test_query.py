"""What a request asks for, in words, as routers of adapters compare it."""

from anabranch.serving.core.query import MOST_QUERY, asked_in, last_asked


def test_what_is_asked_in_words():
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert asked_in("prompt") == {"query": "prompt"}
    assert asked_in("prompt", last_asked(chat)) == {"query": "a"}
    assert asked_in("", last_asked([])) == {}
    assert asked_in("x" * 3000) == {"query": "x" * MOST_QUERY}


def test_what_is_told_goes_before_it_and_no_writer_changes_it():
    assert asked_in("prompt", "a", told="Do it.") == {"instruction": "Do it."}
    assert asked_in("prompt", "a", told="") == {}


def test_parts_of_a_message_and_what_is_no_message():
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, 3, {"text": "b"}]}
    assert last_asked([parts, {"role": "assistant", "content": "c"}]) == "a\nb"
    assert last_asked([{"role": "user", "content": None}]) == ""
    assert last_asked(["user", {"role": "system", "content": "s"}]) == ""
