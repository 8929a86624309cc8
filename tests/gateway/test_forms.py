"""Forms: what each field becomes, and that none takes more time than its bytes: at these sizes a quadratic reader takes minutes."""

import pytest

from anabranch.gateway.forms import MOST_FORM_PARTS, MOST_HEAD_BYTES, parse_form
from anabranch.gateway.providers.media import Upload, encoded
from anabranch.gateway.providers.provider import UpstreamRequest
from anabranch.web.api_error import ApiError

KIND = "multipart/form-data; boundary=b"


def form(*parts):
    """Of (head, data)."""
    return b"".join(b"--b\r\n" + head + b"\r\n\r\n" + data + b"\r\n" for head, data in parts) + b"--b--\r\n"


def field(name, data):
    return f'Content-Disposition: form-data; name="{name}"'.encode(), data


def file(name, kind=b"", filename="a.wav"):
    return f'Content-Disposition: form-data; name="{name}"; filename="{filename}"\r\n'.encode() + kind, b"x"


def refused(raw):
    with pytest.raises(ApiError) as caught:
        parse_form(raw, KIND)
    assert caught.value.status == 400
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (b"Content-Type: audio/wav", "audio/wav"),
        (b"content-type:audio/wav  ", "audio/wav"),
        (b"X-Other: 1\r\nCONTENT-TYPE :  text/plain; charset=utf-8", "text/plain; charset=utf-8"),
        (b"Content-Type: audio", "application/octet-stream"),
        (b"Content-Type: audio/wav\n", "audio/wav"),
        (b"X-Content-Type: audio/wav", "application/octet-stream"),
        (b"X: 1", "application/octet-stream"),
    ],
)
def test_the_type_of_a_file(kind, wanted):
    assert parse_form(form(file("file", kind)), KIND) == {"file": [Upload("a.wav", wanted, b"x")]}


def test_a_field_that_comes_twice_is_a_list_where_its_name_says_so():
    made = parse_form(form(field("a[]", b"1"), field("b", b"1"), field("a[]", b"2"), field("b", b"2")), KIND)
    assert made == {"a[]": ["1", "2"], "b": "2"}
    assert parse_form(form(field("a[]", b"1")), KIND) == {"a[]": "1"}


@pytest.mark.parametrize(
    ("name", "said", "wanted"),
    [
        ("stream", b"false", False),
        ("stream", b"True", True),
        ("stream", b"maybe", "maybe"),
        ("prompt", b"false", "false"),
        ("n", b"2", 2),
        ("n", b"-2", "-2"),
        ("n", b"9" * 5000, "9" * 5000),
    ],
)
def test_what_is_no_text(name, said, wanted):
    made = parse_form(form(field(name, said)), KIND)[name]
    assert made == wanted
    assert type(made) is type(wanted)


def test_what_was_read_as_false_is_sent_on_as_a_form_says_it():
    body = {"stream": False, "file": [Upload("a", "audio/wav", b"x")]}
    raw, _ = encoded(UpstreamRequest("transcriptions", body, prompt_tokens=1), "m")
    assert b'name="stream"\r\n\r\nfalse\r\n' in raw


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("text", [b"x", b""])
def test_no_name_is_both_a_text_and_a_file(text, order):
    assert "both text and a file" in refused(form(*[field("a", text), file("a")][::order]))


def test_spaces_of_a_head_are_read_once():
    assert parse_form(form(file("file", b"Content-Type: a" + b" " * 7000 + b"b")), KIND)["file"][0].type.endswith(
        "stream"
    )
    assert f"{MOST_HEAD_BYTES:,} bytes" in refused(form(file("file", b"Content-Type: a" + b" " * 4_000_000 + b"b")))


def test_a_head_has_room_for_what_is_allowed_and_no_more():
    head = b'name="a"; '
    for num_bytes, is_read in ((MOST_HEAD_BYTES, True), (MOST_HEAD_BYTES + 1, False)):
        # The line's end before a head is the third and fourth byte of its piece.
        raw = form((head + b"x" * (num_bytes - len(head) - 2), b"v"))
        if is_read:
            assert parse_form(raw, KIND) == {"a": "v"}
        else:
            assert "bytes" in refused(raw)


def test_parts_are_counted_before_any_is_read():
    parts = [field("a[]", b"1")] * MOST_FORM_PARTS
    assert parse_form(form(*parts), KIND) == {"a[]": ["1"] * MOST_FORM_PARTS}
    assert f"1,001 parts; it may have {MOST_FORM_PARTS:,}" in refused(form(*parts, field("b", b"")))
    refused(b'--b\r\nname="a[]"\r\n\r\n\r\n' * 400_000 + b"--b--\r\n")
