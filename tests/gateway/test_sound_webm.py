"""WebM that is made to be read wrongly: what is told stays above what any decoder plays, and no clip holds others up."""

import base64
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway import sound_packets
from anabranch.gateway.media_tokens import AUDIO_A_SECOND, audio, sound
from anabranch.gateway.sound_containers import contained
from anabranch.gateway.sound_packets import Pieces
from sound_made import PACKETS, block, element, packet

HEAD = element("1A45DFA3", b"")
ENDLESS = bytes.fromhex("01FFFFFFFFFFFFFF")
SEGMENT, CLUSTER = bytes.fromhex("18538067") + ENDLESS, bytes.fromhex("1F43B675") + ENDLESS
TRACKS = bytes.fromhex("1654AE6B") + ENDLESS
TIME = element("E7", b"\x00")
LENGTH = element("1549A966", element("4489", struct.pack(">d", 5_000.0)))


def track(number=1, codec=b"A_OPUS", *more, is_turned=False):
    said = [element("D7", bytes([number])), element("86", codec)]
    return bytes.fromhex("AE") + ENDLESS + b"".join(reversed(said) if is_turned else said) + b"".join(more)


OPUS = HEAD + SEGMENT + TRACKS + track()
SMALL = block(packet(b"\xf8", 40))


@pytest.mark.parametrize("size", [9, 200, 30_000])
@pytest.mark.parametrize("id", ["E7", "2AD7B1", "D7"])
def test_an_integer_of_more_than_eight_bytes_is_passed_over(id, size):
    raw = HEAD + SEGMENT + LENGTH + TRACKS + track(codec=b"A_VORBIS") + CLUSTER
    raw += element(id, b"\xff" * size) + SMALL * 500
    found = contained(raw, walked=Pieces())
    assert (found.seconds, found.is_counted) == (5.0, False)
    assert found.at_most >= 500 * 0.02
    assert sound(raw, "webm").at_most >= len(raw) / 1_000 * AUDIO_A_SECOND
    # Of eight they are fine, however large.
    assert contained(raw.replace(element(id, b"\xff" * size), element(id, b"\xff" * 8)), walked=Pieces()) is not None


@pytest.mark.parametrize(
    "broken",
    [
        b"\xec\x10\xff\xff\xff",  # a filling that is longer than the clip
        bytes.fromhex("1F43B67581") + b"\xec\x42\x00",  # and one that is longer than the cluster
        bytes.fromhex("1F43B67585A34200"),  # a block that is longer than the cluster
        element("4489", b"\x00" * 9)[:-1],  # a length that takes the mark of the next cluster
        b"\xec\x01\xff\xff\xff\xff\xff\xff\xff",  # one without an end that may have none
        bytes.fromhex("6D80") + ENDLESS,
    ],
)
def test_behind_an_element_that_is_too_long_the_next_cluster_counts(broken):
    hidden = CLUSTER + TIME + SMALL * 1_000
    raw = OPUS + CLUSTER + TIME + SMALL + broken + hidden
    assert sound(raw, "webm").at_most >= 20 * AUDIO_A_SECOND


def test_what_is_walked_past_is_the_sparsest_sound():
    raw = OPUS + CLUSTER + TIME + SMALL * 50
    filled = raw + element("EC", b"\x00" * 4_991)
    assert contained(filled, walked=Pieces()).rest - contained(raw, walked=Pieces()).rest == 5_000
    broken = raw + b"\xec\x10\xff\xff\xff" + b"\x00" * 995
    assert contained(broken, walked=Pieces()).rest - contained(raw, walked=Pieces()).rest == 1_000
    # However it calls itself, if it is longer than what says something.
    long = raw + element("4489", b"\x00" * 990)
    assert contained(long, walked=Pieces()).rest - contained(raw, walked=Pieces()).rest == 1_000


@pytest.mark.parametrize("is_turned", [False, True])
def test_a_track_tells_of_itself_in_any_order(is_turned):
    second = block(packet(b"\xf8", 40), track=2)
    raw = OPUS + track(2, is_turned=is_turned) + CLUSTER + TIME + SMALL + second * 500
    assert contained(raw, walked=Pieces()).seconds == pytest.approx(501 * 0.02)
    assert contained(raw, walked=Pieces()).is_counted


def test_of_a_track_that_is_not_told_of_all_counts():
    raw = OPUS + CLUSTER + TIME + SMALL + block(packet(b"\xf8", 40), track=3) * 500
    found, alone = contained(raw, walked=Pieces()), contained(OPUS + CLUSTER + TIME + SMALL, walked=Pieces())
    assert found.seconds == pytest.approx(501 * 0.02)
    assert found.rest - alone.rest == 500 * 44


def test_pictures_make_no_sound_and_a_number_that_is_both_does():
    film = block(packet(b"\xf8", 40), track=2) * 500
    assert contained(
        OPUS + track(2, b"V_VP8") + CLUSTER + TIME + SMALL + film, walked=Pieces()
    ).seconds == pytest.approx(0.02)
    both = OPUS + track(2, b"V_VP8") + track(2) + CLUSTER + TIME + SMALL + film
    assert contained(both, walked=Pieces()).seconds == pytest.approx(501 * 0.02)
    other = OPUS + LENGTH + track(2, b"A_VORBIS") + CLUSTER + TIME + SMALL + film
    assert not contained(other, walked=Pieces()).is_counted


def test_packets_that_do_not_stand_there_as_they_are_may_be_the_longest():
    coded = HEAD + SEGMENT + TRACKS + track(1, b"A_OPUS", element("6D80", b"\x00" * 4)) + CLUSTER + TIME + SMALL * 10
    assert contained(coded, walked=Pieces()).seconds == pytest.approx(10 * 0.12)


def test_what_has_too_many_pieces_is_not_read(monkeypatch):
    monkeypatch.setattr(sound_packets, "MOST_PIECES", 1_000)
    raw = OPUS + CLUSTER + TIME
    assert contained(raw + SMALL * 200, walked=Pieces()) is not None
    other_tracks = block(packet(b"\xf8"), track=2) + block(packet(b"\xf8"), track=3)
    for more in (SMALL * 300, SMALL + b"\xec\x80" * 300, SMALL + other_tracks, (TRACKS + track()) * 4):
        with pytest.raises(sound_packets.ManyPiecesError):
            contained(raw + more, walked=Pieces())


@pytest.mark.parametrize("broken", [b"\x00", b"\xa3\x80", b"\xa3\x81\x81", b"\xec\x00", element("E7", b"\x00" * 9)])
def test_what_came_before_something_broken_counts_and_the_cluster_behind_it(broken):
    whole = OPUS + CLUSTER + TIME + block(b"\xfb\x06") * 500
    assert contained(whole + broken, walked=Pieces()).seconds == pytest.approx(500 * 0.12)
    assert contained(whole + broken + CLUSTER + TIME + SMALL * 100, walked=Pieces()).seconds == pytest.approx(
        500 * 0.12 + 100 * 0.02
    )


@pytest.mark.parametrize("id", ["42F7", "EC", "18530167"])
def test_a_cluster_within_what_is_not_known_counts(id):
    hidden = element(id, TRACKS + track() + CLUSTER + TIME + block(b"\xfb\x06") * 500)
    assert sound(HEAD + hidden, "webm").at_most >= 500 * 0.12 * AUDIO_A_SECOND
    assert sound(OPUS + hidden, "webm").at_most >= 500 * 0.12 * AUDIO_A_SECOND


@pytest.mark.parametrize(
    ("codec", "each_s"), [(b"A_AAC", 0.139), (b"A_VORBIS", 0.5), (b"A_FLAC", 8.19), (b"A_ALAC", 0.5)]
)
def test_frames_of_other_codecs_last_no_longer_than_theirs_do(codec, each_s):
    raw = HEAD + SEGMENT + TRACKS + track(codec=codec) + CLUSTER + TIME + block(b"x") * 1_000
    assert sound(raw, "webm").at_most >= 1_000 * each_s * AUDIO_A_SECOND


# What stands between blocks that are fine: damage of any kind, each behind the mark of a cluster or before one.
_IDS = ["EC", "4489", "2AD7B1", "86", "6D80", "1549A966", "1F43B675", "18538067", "A0", "BF", "42F7"]
_SIZES = st.one_of(st.integers(0, 300), st.integers(0, 1 << 56), st.just((1 << 56) - 1))
_DAMAGE = st.builds(
    lambda id, size, body: bytes.fromhex(id) + (1 << 56 | size).to_bytes(8, "big") + body,
    st.sampled_from(_IDS),
    _SIZES,
    st.binary(max_size=40),
)
_PLANTED = st.tuples(st.sampled_from(sorted(PACKETS)), st.integers(4, 90), st.sampled_from([1, 2, 7]))


@given(st.lists(st.one_of(_PLANTED, _DAMAGE, st.binary(max_size=12)), max_size=20))
def test_of_any_damage_no_block_is_lost(parts):
    raw, sure_s = OPUS + track(2, is_turned=True), 0.0
    for part in parts:
        if isinstance(part, bytes):
            raw += part
            continue
        head, size, number = part
        raw += CLUSTER + TIME + block(packet(head, size), track=number)
        sure_s += min(PACKETS[head] / 1e3, size / 1_000)
    found = contained(raw, walked=Pieces())
    assert found is None or 0 < max(found.seconds, found.at_most) <= 1_000_000
    assert sound(raw, "webm").at_most >= int(sure_s * AUDIO_A_SECOND)


@given(st.binary(max_size=400))
def test_any_bytes_are_one_or_none(data):
    for raw in (HEAD + data, OPUS + CLUSTER + data):
        found = contained(raw, walked=Pieces())
        assert found is None or 0 < max(found.seconds, found.at_most) <= 1_000_000


def test_audio_of_a_request_is_told_likewise():

    raw = HEAD + SEGMENT + CLUSTER + element("E7", b"\xff" * 200) + SMALL
    told = audio({"data": base64.b64encode(raw).decode(), "format": "webm"})
    assert told == sound(raw, "webm")
