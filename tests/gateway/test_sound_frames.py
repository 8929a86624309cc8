"""Seconds of a clip by its frames, against sums made by hand; and never an honest clip at a multiple of its tokens."""

import base64
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.gateway.media_tokens import AUDIO_A_SECOND, audio, heard_seconds, sound
from anabranch.gateway.sound_frames import flac, framed, notes_end
from anabranch.gateway.sound_packets import Pieces
from counted_calls import counted_calls

NOTES = b"ID3\x04\x00\x00\x00\x00\x00\x05hello"

# Head, bytes and seconds of frames, by the documents: 144 * 128,000 / 44,100 = 417 bytes of 1,152 samples, and the like.
FRAMES = {
    "mpeg 1 layer 3, 128 kbit/s at 44,100": (b"\xff\xfb\x90\x00", 417, 1152 / 44_100),
    "the same, padded": (b"\xff\xfb\x92\x00", 418, 1152 / 44_100),
    "mpeg 2 layer 3, 32 kbit/s at 24,000": (b"\xff\xf3\x44\x00", 96, 576 / 24_000),
    "mpeg 2.5 layer 3, 8 kbit/s at 8,000": (b"\xff\xe3\x18\x00", 72, 576 / 8_000),
    "mpeg 1 layer 2, 192 kbit/s at 48,000": (b"\xff\xfd\xa4\x00", 576, 1152 / 48_000),
    "mpeg 1 layer 1, 384 kbit/s at 44,100": (b"\xff\xff\xc0\x00", 416, 384 / 44_100),
    # 200 bytes: 0x19 << 3.
    "aac at 44,100": (b"\xff\xf1\x50\x80\x19\x1f\xfc", 200, 1024 / 44_100),
}


def frame(name):
    head, size, _ = FRAMES[name]
    return head + b"\x55" * (size - len(head))


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("notes", [b"", NOTES, NOTES + NOTES])
def test_seconds_are_those_of_all_frames(name, notes):
    found = framed(notes + frame(name) * 100, walked=Pieces())
    assert found.seconds == pytest.approx(100 * FRAMES[name][2])
    assert found.rest == 0


@given(names=st.lists(st.sampled_from(sorted(FRAMES)), min_size=3, max_size=30), tail=st.binary(max_size=40))
def test_a_clip_of_any_frames_is_as_long_as_they_are(names, tail):
    tail = tail.replace(b"\xff", b"\x00")
    found = framed(b"".join(map(frame, names)) + tail, walked=Pieces())
    assert found.seconds == pytest.approx(sum(FRAMES[name][2] for name in names))
    assert found.rest == len(tail)


def test_a_decoder_that_is_lost_goes_on_at_the_next_frames():
    one = frame("mpeg 1 layer 3, 128 kbit/s at 44,100")
    found = framed(one * 5 + b"\x00" * 50 + b"\xff\xfb" + b"\x00" * 50 + one * 5, walked=Pieces())
    assert found.seconds == pytest.approx(10 * 1152 / 44_100)
    assert found.rest == 102


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"\xff\xfb\x90\x00" * 250, b"RIFF" + b"\x00" * 99, b"\xff\xfb\xf0\x00", NOTES, b"OggS" * 9]
)
def test_what_does_not_begin_with_frames_is_not_walked(data):
    assert framed(data, walked=Pieces()) is None


def test_notes_that_end_behind_the_clip_are_none():
    assert notes_end(b"ID3\x04\x00\x00\x7f\x7f\x7f\x7f" + b"x" * 99) == 0
    assert notes_end(NOTES) == len(NOTES)
    assert notes_end(NOTES * 1_000) == len(NOTES) * 100
    # Their foot counts too.
    assert notes_end(b"ID3\x04\x00\x10\x00\x00\x00\x05" + b"x" * 15) == 25


@pytest.mark.parametrize("form", ["mp3", "wav", ""])
@pytest.mark.parametrize("name", [name for name in FRAMES if "aac" not in name])
def test_a_clip_is_reserved_at_its_own_tokens(name, form):
    raw, seconds = NOTES + frame(name) * 500, 500 * FRAMES[name][2]
    found = audio({"data": base64.b64encode(raw).decode(), "format": form})
    # It was sixteen times as many at 128 kbit/s.
    assert found.tokens == found.at_most == math.ceil(round(seconds * AUDIO_A_SECOND, 6))
    assert sound(raw, form) == found
    assert heard_seconds(raw, form) == pytest.approx(seconds)


@settings(max_examples=40)
@given(st.integers(0, 3000))
def test_bytes_that_are_of_no_frame_are_the_sparsest_sound(count):
    raw = frame("mpeg 1 layer 3, 128 kbit/s at 44,100") * 3
    plain, more = sound(raw, "mp3"), sound(raw + b"\x00" * count, "mp3")
    assert more.at_most >= plain.at_most + count * AUDIO_A_SECOND // 1_000 - 1


@pytest.mark.parametrize("junk", [b"\xff" * 10**6, b"\xff\xfb\x90\x00" * 250_000, b"\xff\xf1\x50\x80" * 250_000])
def test_what_looks_like_many_beginnings_is_no_work_to_speak_of(junk):
    raw = frame("mpeg 1 layer 3, 128 kbit/s at 44,100") * 3 + junk
    # It was 4 s for 8 MB: a step for each that looks so.
    found, count = counted_calls(lambda: framed(raw, walked=Pieces()))
    assert count < len(raw) / 40
    assert found.rest <= len(junk)
    assert found.seconds + found.rest / 1_000 >= 3 * 1152 / 44_100


def test_frames_behind_anything_count():
    # 0.13 s of 8 bytes each.
    sparse = b"\xff\xf1\x6c\x80\x01\x1f\xfc\x00" * 2_000
    for before in (b"\x00", b"junk" * 20):
        assert sound(before + sparse, "aac").at_most >= 2_000 * 1024 / 8_000 * AUDIO_A_SECOND
        assert framed(before + sparse, walked=Pieces()) is None


# FLAC


def sum8(data):
    """Bit by bit, as it is written (RFC 9639, 9.1.8)."""
    found = 0
    for byte in data:
        found ^= byte
        for _ in range(8):
            found = found << 1 & 0xFF ^ (0x07 if found & 0x80 else 0)
    return found


def flac_file(*frames, rate=8_000, told=0, notes=b""):
    info = b"\x10\x00" * 2 + b"\x00" * 6 + (rate << 44 | 15 << 36 | told).to_bytes(8, "big") + b"\x00" * 16
    return notes + b"fLaC\x80\x00\x00\x22" + info + b"".join(frames)


def flac_frame(block=12, rate=0, *, number=b"\x00", more=b"", body=b"\x00" * 8, sync=b"\xff\xf8"):
    head = sync + bytes([block << 4 | rate, 0x08]) + number + more
    return head + bytes([sum8(head)]) + body


@pytest.mark.parametrize(
    ("one", "seconds"),
    [
        (flac_frame(1), 192 / 8_000),
        (flac_frame(5), 4_608 / 8_000),
        (flac_frame(12), 4_096 / 8_000),
        (flac_frame(15), 32_768 / 8_000),
        (flac_frame(6, more=b"\x63"), 100 / 8_000),
        (flac_frame(7, more=b"\xff\xfe", number=b"\xf0\x90\x80\x80", sync=b"\xff\xf9"), 65_535 / 8_000),
        # It says more samples a second than the file, and fewer.
        (flac_frame(12, 9), 4_096 / 8_000),
        (flac_frame(12, 12, more=b"\x04"), 4_096 / 4_000),
        (flac_frame(12, 13, more=b"\x00\x01"), 4_096),
        (flac_frame(12, 14, more=b"\x00\x64"), 4_096 / 1_000),
    ],
)
@pytest.mark.parametrize("notes", [b"", NOTES])
def test_a_flac_is_as_long_as_its_frames_whatever_it_says(one, seconds, notes):
    for told in (0, 8_000):
        raw = flac_file(*[one] * 100, told=told, notes=notes)
        assert flac(raw, walked=Pieces()).seconds == pytest.approx(min(100 * seconds, 1e6))
        assert sound(raw, "flac").at_most == math.ceil(round(100 * seconds * AUDIO_A_SECOND, 4))
    # Of what it says is longer one who decodes it hears nothing; a budget of one's own it may fill.
    assert sound(flac_file(*[one] * 100, told=1 << 35), "flac").at_most == 32_000_000


@pytest.mark.parametrize(
    "broken",
    [
        flac_frame(0),
        flac_frame(12, 15),
        flac_frame(12, number=b"\xff"),
        flac_frame(12, number=b"\x80"),
        flac_frame(12)[:5] + b"\x00" * 9,
        flac_frame(12)[:4],
        b"\xff\xf8\xc0\xb8\x00" + bytes([sum8(b"\xff\xf8\xc0\xb8\x00")]),
        b"\xff\xf8\xc0\x09\x00" + bytes([sum8(b"\xff\xf8\xc0\x09\x00")]),
    ],
)
def test_what_is_no_frame_of_flac_counts_as_none(broken):
    assert flac(flac_file(broken), walked=Pieces()).seconds == 0
    assert flac(flac_file(flac_frame(12), broken), walked=Pieces()).seconds == pytest.approx(4_096 / 8_000)


def test_a_flac_without_frames_is_not_believed_below_its_bytes():
    raw = flac_file(bytes(50_000), told=8_000)
    assert sound(raw, "flac").at_most >= 50 * AUDIO_A_SECOND
    assert flac(b"no such", walked=Pieces()) is None
    assert flac(b"fLaC", walked=Pieces()).seconds == 0


@given(st.binary(max_size=300))
def test_any_flac_is_read(data):
    for raw in (b"fLaC" + data, flac_file(data), flac_file(flac_frame(12), data)):
        assert 0 <= flac(raw, walked=Pieces()).seconds <= 1e6
        assert 0 <= sound(raw, "flac").tokens <= sound(raw, "flac").at_most
