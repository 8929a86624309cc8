"""What formats a WAV file may have, and how many bytes of a second."""

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway import sound_packets
from anabranch.gateway.media_tokens import AUDIO_A_SECOND, sound
from anabranch.gateway.sound_packets import ManyPiecesError, OtherSoundError, Pieces
from anabranch.gateway.sound_wave import wave_rate

TAIL = bytes.fromhex("0000 0000 1000 8000 00AA 0038 9B71")


def fmt(form, bits, samples=8_000, channels=1, more=b"", rate=10**6):
    return b"fmt ", struct.pack("<HHIIHH", form, channels, samples, rate, 1, bits) + more


def long(form, bits, tail=TAIL):
    return fmt(0xFFFE, bits, more=struct.pack("<HHIH", 22, bits, 0, form) + tail)


def wav(*chunks):
    body = b"".join(name + struct.pack("<I", len(told)) + told + b"\0" * (len(told) % 2) for name, told in chunks)
    return b"RIFF\0\0\0\0WAVE" + body


DATA = b"data", bytes(80_000)


@pytest.mark.parametrize(
    ("chunk", "rate"),
    [
        (fmt(1, 16), 16_000),
        (fmt(3, 32), 32_000),
        (fmt(6, 8), 8_000),
        (fmt(7, 8), 8_000),
        (fmt(7, 16, channels=2), 16_000),
        (fmt(2, 4), 4_000),
        (fmt(0x11, 4, channels=2), 8_000),
        (fmt(0x11, 2), 2_000),
        (fmt(0x11, 64), 4_000),
        (fmt(0x11, 4, rate=3_000), 3_000),
        (long(1, 24), 24_000),
        (long(7, 8), 8_000),
        (fmt(1, 0), None),
        (fmt(1, 16, rate=0), None),
    ],
)
def test_a_second_of_a_plain_format_has_so_many_bytes(chunk, rate):
    assert wave_rate(wav(chunk, DATA), walked=Pieces()) == rate
    if rate:
        raw = wav(chunk, DATA)
        found = sound(raw, "wav")
        assert found.at_most == found.tokens == -(-len(raw) * AUDIO_A_SECOND // rate)


PACKED = {
    "WAV of FLAC (tag 0xF1AC)": fmt(0xF1AC, 16),
    "WAV of AAC (tag 0x00FF)": fmt(0xFF, 16),
    "WAV of MP3 (tag 0x0055)": fmt(0x55, 0),
    "WAV of another format (tag 0x1234)": fmt(0x1234, 16),
    "WAV of a format that has no tag": long(1, 16, b"\xff" + TAIL[1:]),
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize(
    "before",
    [[], [(b"LIST", b"x" * 400_000)], [fmt(1, 16)], [fmt(1, 0)], [(b"fmt ", b"x" * 7)]],
    ids=["alone", "behind much", "behind another", "behind what cannot be", "behind what is too short"],
)
def test_a_packed_format_is_refused(name, before):
    """Twenty minutes of FLAC were reserved as four seconds."""
    with pytest.raises(OtherSoundError) as told:
        sound(wav(*before, PACKED[name], (b"data", b"x" * 2_000)), "wav")
    assert str(told.value) == name


def test_a_long_tag_of_flac_is_flac():
    with pytest.raises(OtherSoundError, match=r"FLAC \(tag 0xF1AC\)"):
        sound(wav(long(0xF1AC, 16), DATA), "wav")


def test_notes_before_it_are_walked_through_with_the_rest(monkeypatch):
    monkeypatch.setattr(sound_packets, "MOST_PIECES", 1_000)
    assert wave_rate(wav(*[(b"note", b"")] * 400, fmt(1, 16), DATA), walked=Pieces()) == 16_000
    with pytest.raises(ManyPiecesError):
        wave_rate(wav(*[(b"note", b"")] * 600, fmt(1, 16), DATA), walked=Pieces())


@given(st.binary(max_size=100))
def test_any_bytes_are_one_or_none(data):
    for raw in (b"RIFF\0\0\0\0WAVE" + data, wav((b"fmt ", data), DATA)):
        with suppress(OtherSoundError):
            assert (wave_rate(raw, walked=Pieces()) or 1) > 0
