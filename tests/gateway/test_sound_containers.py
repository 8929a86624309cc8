"""Seconds of sound in containers, against sums made by hand; what a field says is not believed where it can be counted."""

import base64
import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.media_tokens import AUDIO_A_SECOND, audio, heard_seconds, sound
from anabranch.gateway.sound_containers import contained, is_container
from anabranch.gateway.sound_packets import Pieces, opus_ms
from sound_made import CONFIGS, PACKETS, block, element, m4a, ogg_opus, packet, page, webm


@pytest.mark.parametrize("granule", [0, 1, 10**15])
def test_packets_of_opus_are_counted_whatever_the_pages_say(granule):
    raw = ogg_opus([packet(head) for head in PACKETS] * 25, granule=granule)
    found = contained(raw, walked=Pieces())
    assert found.seconds == pytest.approx(25 * sum(PACKETS.values()) / 1e3)
    assert (found.is_counted, found.rest) == (True, 0)


@given(
    st.lists(st.tuples(st.sampled_from(sorted(PACKETS)), st.integers(2, 700)), min_size=1, max_size=30),
    st.integers(1, 7),
)
def test_packets_of_any_length_in_pages_of_any_number(packets, each):
    raw = ogg_opus([packet(head, size) for head, size in packets], each=each)
    assert contained(raw, walked=Pieces()).seconds == pytest.approx(sum(PACKETS[head] for head, _ in packets) / 1e3)


def test_a_packet_may_go_on_in_the_next_page():
    begun = b"OggS\x00\x00" + struct.pack("<qIII", 5, 1, 0, 0) + b"\x01\xff" + packet(b"\x18", 255)
    rest = b"OggS\x00\x01" + struct.pack("<qIII", 5, 1, 0, 0) + b"\x02\x0a\x09" + b"x" * 10 + packet(b"\xf8", 9)
    assert contained(ogg_opus([]) + begun + rest, walked=Pieces()).seconds == pytest.approx(0.08)


def test_streams_beside_and_behind_one_another_are_all_heard():
    one, other = (ogg_opus([packet(b"\xf8")] * 50, serial=serial) for serial in (1, 2))
    assert contained(one + other, walked=Pieces()).seconds == pytest.approx(2.0)
    # The same number again begins with its head again.
    assert contained(one + one, walked=Pieces()).seconds == pytest.approx(2.0)


def test_what_belongs_to_nothing_is_the_sparsest_sound():
    raw = ogg_opus([packet(b"\xf8")] * 50)
    junk = raw + b"\x00" * 5_000
    assert contained(junk, walked=Pieces()).rest == 5_000
    assert sound(junk, "ogg").at_most == sound(raw, "ogg").at_most + 5 * AUDIO_A_SECOND


def test_of_another_codec_the_last_place_is_believed_as_an_estimate():
    head = b"\x01vorbis" + struct.pack("<IBI", 0, 2, 44_100) + b"\x00" * 14
    raw = page([head], first=True) + page([b"x" * 200], granule=44_100 * 7) + page([b"x" * 200], granule=-1)
    found = contained(raw, walked=Pieces())
    assert (found.seconds, found.is_counted) == (7.0, False)
    # As far as its bytes can be that long.
    assert sound(raw, "ogg").tokens == math.ceil(len(raw) / 1_000 * AUDIO_A_SECOND)
    assert sound(raw, "ogg").at_most == 7 * AUDIO_A_SECOND
    long = raw + b"".join(page([b"x" * 250] * 40, granule=44_100 * 7) for _ in range(20))
    assert sound(long, "ogg").tokens == 7 * AUDIO_A_SECOND
    assert sound(long, "ogg").at_most == math.ceil(len(long) / 1_000 * AUDIO_A_SECOND)


# WebM


@pytest.mark.parametrize("endless", [True, False])
@pytest.mark.parametrize("duration", [None, 1.0, 1e9])
def test_packets_of_a_webm_are_counted_whatever_it_says(endless, duration):
    raw = webm([block(packet(b"\xf8"), time=at * 20) for at in range(50)], duration=duration, endless=endless)
    assert contained(raw, walked=Pieces()) == contained(raw[:], walked=Pieces()) is not None
    assert contained(raw, walked=Pieces()).seconds == pytest.approx(1.0)
    assert contained(raw, walked=Pieces()).is_counted


def test_blocks_in_groups_of_films_and_with_several_packets():
    group = element("A0", element("A1", b"\x81\x00\x00\x00" + packet(b"\x18")))
    assert contained(webm([group]), walked=Pieces()).seconds == pytest.approx(0.06)
    # Of several in one block each is taken for the longest.
    laced = element("A3", b"\x81\x00\x00\x04\x02" + b"\x55" * 90)
    assert contained(webm([laced]), walked=Pieces()).seconds == pytest.approx(3 * 0.12)
    # Pictures make no sound.
    film = element("AE", element("D7", b"\x02") + element("86", b"V_VP8"))
    raw = webm([block(packet(b"\xf8")), block(packet(b"\xf8"), track=2)])
    raw = raw.replace(bytes.fromhex("1F43B675"), film + bytes.fromhex("1F43B675"), 1)
    assert contained(raw, walked=Pieces()) is None or contained(raw, walked=Pieces()).seconds >= 0.02


def test_a_webm_of_another_codec_says_how_long_it_is():
    assert contained(webm([], codec=b"A_VORBIS", duration=2500.0), walked=Pieces()).seconds == 2.5
    assert contained(webm([block(b"xxxx", time=900)], codec=b"A_VORBIS"), walked=Pieces()).seconds == pytest.approx(0.9)
    assert contained(
        webm([block(b"xxxx", time=900)], codec=b"A_VORBIS", scale=2_000_000), walked=Pieces()
    ).seconds == pytest.approx(1.8)
    assert contained(webm([], codec=b"A_VORBIS", duration=float("nan")), walked=Pieces()) is None


# M4A


@pytest.mark.parametrize("rate", CONFIGS)
def test_samples_of_aac_are_counted_at_the_rate_of_their_own_config(rate):
    raw = m4a(430, config=CONFIGS[rate], scale=1000, delta=0)
    found = contained(raw, walked=Pieces())
    assert found.seconds == pytest.approx(430 * 1024 / abs(rate))
    assert found.is_counted
    told = audio({"data": base64.b64encode(raw).decode(), "format": "m4a"})
    assert told.tokens == math.ceil(round(430 * 1024 / abs(rate) * AUDIO_A_SECOND, 6))
    # Of its 43,000 bytes at most 2,000 are believed to be one second.
    most_s = max(430 * 1024 / abs(rate), 21.5)
    assert told.at_most == math.ceil(round(most_s * AUDIO_A_SECOND, 6))


@pytest.mark.parametrize("fields", [{"length": 1}, {"delta": 1}, {"length": 0xFFFFFFFF}, {"size": 5}])
def test_what_an_m4a_says_is_shorter_is_not_believed(fields):
    assert contained(m4a(430, **fields), walked=Pieces()).seconds == pytest.approx(430 * 1024 / 44_100)


def test_what_it_says_is_longer_is():
    assert contained(m4a(430, delta=2048), walked=Pieces()).seconds == pytest.approx(430 * 2048 / 44_100)
    # In whichever of its places it says so.
    assert contained(m4a(430, delta=2048, length=1), walked=Pieces()).seconds == pytest.approx(430 * 2048 / 44_100)
    assert contained(m4a(430, length=430 * 4096), walked=Pieces()).seconds == pytest.approx(430 * 4096 / 44_100)


def test_samples_of_fragments_count_too():
    assert contained(m4a(0, fragments=(40, 3)), walked=Pieces()).seconds == pytest.approx(43 * 1024 / 44_100)


def test_another_codec_says_how_long_it_is():
    found = contained(m4a(100, codec=b"alac", config=b"", delta=4096), walked=Pieces())
    assert (found.seconds, found.is_counted) == (pytest.approx(100 * 4096 / 44_100), False)
    assert contained(m4a(100, handler=b"vide"), walked=Pieces()) is None


@pytest.mark.parametrize(
    ("head", "each_s"),
    [
        # Blocks of 256 and 4,096 samples, that overlap by half.
        (b"\x01vorbis" + struct.pack("<IBIiiiBB", 0, 1, 8_000, 0, 0, 0, 0xC8, 1), 2_048 / 8_000),
        (
            b"Speex   1.2".ljust(28, b"\0")
            + struct.pack("<iiiiiiiiii", 1, 80, 8_000, 0, 4, 1, -1, 160, 0, 3)
            + b"\0" * 12,
            0.06,
        ),
        (b"\x7fFLAC\1\0\0\1fLaC\0\0\0\x22" + b"\0" * 10 + (8_000 << 4).to_bytes(3, "big") + b"\0" * 21, 65_535 / 8_000),
        (b"what is not known", 0.512),
    ],
)
def test_packets_of_other_codecs_last_no_longer_than_their_head_lets_them(head, each_s):
    raw = page([head], first=True) + b"".join(page([b"x"] * 200, granule=1) for _ in range(5))
    found = contained(raw, walked=Pieces())
    assert not found.is_counted
    assert 1_000 * each_s <= found.at_most <= 1_001.001 * each_s
    assert sound(raw, "ogg").at_most >= 1_000 * each_s * AUDIO_A_SECOND


# What is none, or lies


@pytest.mark.parametrize(
    "raw", [b"", b"OggS", b"OggS" * 99, b"\x1aE\xdf\xa3", b"\x00\x00\x00\x08ftyp", b"RIFF", b"\x00" * 40]
)
def test_what_tells_nothing_is_counted_by_its_bytes(raw):
    found = contained(raw, walked=Pieces())
    assert found is None or (found.seconds, found.is_counted) == (0, False)
    assert sound(raw, "ogg").tokens == math.ceil(len(raw) / 6_000 * AUDIO_A_SECOND)


MADE = {
    "ogg": ogg_opus([packet(b"\xf8")] * 30),
    "webm": webm([block(packet(b"\xf8"))] * 30, endless=False),
    "m4a": m4a(30),
}


@pytest.mark.parametrize("form", MADE)
@given(data=st.data())
def test_damaged_ones_are_read_without_a_fault_and_never_for_ever(form, data):
    raw = bytearray(MADE[form])
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = bytes(raw[: data.draw(st.integers(0, len(raw)))])
    found = contained(raw, walked=Pieces())
    assert found is None or 0 < max(found.seconds, found.at_most) <= 1_000_000
    assert 0 <= sound(raw, form).tokens


@pytest.mark.parametrize("form", MADE)
def test_what_is_made_is_told_in_its_own_seconds(form):
    assert is_container(MADE[form])
    assert heard_seconds(MADE[form], form) == pytest.approx(contained(MADE[form], walked=Pieces()).seconds, abs=0.04)


@pytest.mark.parametrize(
    ("packet", "ms"), [(b"", 0), (b"\xfb", 0), (b"\xfb\x3f", 120), (b"\x80", 2.5), (b"\x60", 10), (b"\x1a", 120)]
)
def test_packets_say_how_long_they_are(packet, ms):
    assert opus_ms(packet) == ms
