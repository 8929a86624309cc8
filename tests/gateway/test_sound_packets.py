"""What is walked through of the clips of one request, all together."""

import base64

import pytest

from anabranch.gateway import sound_packets
from anabranch.gateway.media_requests import count_media
from anabranch.gateway.media_tokens import heard_seconds
from anabranch.gateway.native_tokens import count_native
from anabranch.gateway.prompt_tokens import count_prompt
from anabranch.gateway.providers.media import Upload
from anabranch.gateway.sound_containers import contained
from anabranch.gateway.sound_packets import Pieces, one_request
from anabranch.web.api_error import ApiError
from anabranch.web.responses import to_chat
from sound_made import m4a, ogg_opus, packet, page, webm

# Each of fewer pieces than a thousand, two of more.
CLIPS = {
    "mp3": b"\xff\xf3\x44\x00".ljust(96, b"\x55") * 600,
    "flac": b"fLaC\x80\x00\x00\x22" + b"\x00" * 34 + b"\xff\xf8\x00\x00\x00\x00" * 600,
    "ogg": ogg_opus([packet(b"\xf8")] * 240),
    "webm": webm([]) + b"\xec\x80" * 300,
    "m4a": m4a(30),
}


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr(sound_packets, "MOST_PIECES", 1_000)


def part(form, data):
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": form}}


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize("form", CLIPS)
def test_all_clips_of_a_request_are_walked_through_together(form):
    one = part(form, CLIPS[form])
    assert count_prompt({"messages": user(one)}).audio > 0
    # The next request begins anew.
    assert count_prompt({"messages": user(one)}).audio > 0
    for messages in (user(one, one, one), [*user(one), *user(one), *user(one)]):
        with pytest.raises(
            ApiError, match="messages: the sound in this request is made of more than 1,000 frames"
        ) as told:
            count_prompt({"messages": messages})
        assert told.value.status == 400
    body = {"input": [*user(one), {"type": "reasoning", "summary": [], "content": [one, one]}]}
    with pytest.raises(ApiError, match="input: the sound"):
        count_native(to_chat(body), body)
    upload = Upload(f"a.{form}", "audio/x", CLIPS[form] * 4)
    with pytest.raises(ApiError, match="file: the sound"):
        count_media("transcriptions", {"model": "m", "file": [upload]})


def test_the_answer_of_a_model_is_read_as_far_as_it_goes():
    assert heard_seconds(CLIPS["mp3"] * 9, "mp3") == pytest.approx(len(CLIPS["mp3"]) * 9 / 16_000)


@pytest.mark.parametrize("ms", [20, 10])
def test_an_hour_of_live_sound_is_read(monkeypatch, ms):
    """A page around each packet, as live encoders send it: beyond 53 minutes it was refused. A tenth, within a tenth."""
    monkeypatch.undo()
    monkeypatch.setattr(sound_packets, "MOST_PIECES", sound_packets.MOST_PIECES // 10)
    raw = ogg_opus([]) + page([packet(b"\x08" if ms == 20 else b"\x00", 20)]) * (360_000 // ms)
    assert contained(raw, walked=Pieces()).seconds == pytest.approx(360)


def test_a_clip_of_another_form_is_refused():
    one = part("wav", b"caff\0\1\0\0desc")
    with pytest.raises(
        ApiError, match=r"messages: a clip is CAF, and .*; send WAV of PCM .*, MP3, FLAC, Ogg, WebM"
    ) as told:
        count_prompt({"messages": user(one)})
    assert told.value.status == 400
    with pytest.raises(ApiError, match="file: a clip is CAF"):
        count_media("transcriptions", {"model": "m", "file": [Upload("a.caf", "audio/x", b"caff\0\1\0\0desc")]})
    # What a model has made is paid for whatever it is.
    assert heard_seconds(b"caff".ljust(16_000), "mp3") == 1


def test_a_request_within_another_is_walked_through_with_it():
    def read(count):
        with one_request("x") as walked:
            walked.add(1_000)
            # It is the one around it that says what is wrong.
            with one_request("y", walked) as same:
                same.add(count)

    read(0)
    with pytest.raises(ApiError, match="x: the sound in this request"):
        read(1)
    read(0)
