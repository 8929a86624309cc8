"""Ogg that is made to be read wrongly: pages that some decoders drop, and packets that they do."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway import sound_packets
from anabranch.gateway.media_tokens import AUDIO_A_SECOND, sound
from anabranch.gateway.sound_containers import contained
from anabranch.gateway.sound_ogg import _sum
from anabranch.gateway.sound_packets import Pieces
from sound_made import OPUS_HEAD, PACKETS, ogg_opus, packet, page, summed

SMALL = packet(b"\xf8", 40)


def raw_page(body, sizes, *, flags=0, serial=1, total=b"\x00" * 4):
    head = b"OggS\x00" + bytes([flags]) + struct.pack("<qII", 0, serial, 0) + total
    return head + bytes([len(sizes)]) + bytes(sizes) + body


def wrapped(raw):
    """Within pages whose sum is wrong, which decoders drop, to look on behind their first byte."""
    pieces = [raw[at : at + 65_025] for at in range(0, len(raw), 65_025)]
    return b"".join(raw_page(piece, b"\xff" * 255) for piece in pieces)


@given(st.binary(max_size=300), st.integers(0, 2**32 - 1))
def test_the_sum_of_a_page_is_that_of_the_document(body, serial):
    made = summed(raw_page(body, b"\x00", serial=serial))
    assert _sum(made, 0, len(made)) == made[22:26]


def test_what_a_page_of_a_wrong_sum_hides_counts_by_its_bytes():
    hidden = b"".join(page([SMALL] * 50) for _ in range(30))
    raw = ogg_opus([SMALL]) + wrapped(hidden)
    assert sound(raw, "ogg").at_most >= 30 * 50 * 0.02 * AUDIO_A_SECOND
    assert contained(ogg_opus([SMALL] * 50), walked=Pieces()).rest == 0
    # One that is cut off ends somewhere: so much of it is there.
    cut = ogg_opus([SMALL] * 50)[:-100]
    assert 0 < contained(cut, walked=Pieces()).rest < 3_000


def test_a_packet_that_is_begun_and_not_gone_on_with_is_one():
    begun = summed(raw_page(packet(b"\xf8", 255), b"\xff"))
    raw = ogg_opus([]) + (begun + page([SMALL])) * 100
    assert contained(raw, walked=Pieces()).seconds >= 100 * 0.04 - 1e-6
    # The rest of it, as its page says, is none of its own.
    more = summed(raw_page(packet(b"\xf8", 9), b"\x09", flags=1))
    assert contained(ogg_opus([]) + (begun + more) * 100, walked=Pieces()).seconds == pytest.approx(2.0)


def test_what_is_no_note_is_a_packet():
    # Each page says that the stream begins anew.
    pair = page([OPUS_HEAD, SMALL], first=True)
    assert contained(ogg_opus([SMALL]) + pair * 100, walked=Pieces()).seconds == pytest.approx(101 * 0.02)


def test_a_page_that_is_dropped_does_not_make_another_codec_of_a_stream():
    head = b"\x01vorbis" + struct.pack("<IBI", 0, 2, 44_100) + b"\x00" * 14
    lie = raw_page(OPUS_HEAD, [len(OPUS_HEAD)], flags=2)
    for raw in (page([head], first=True) + lie, lie + page([head], first=True)):
        raw += page([b"x" * 200] * 100, granule=44_100 * 7)
        assert not contained(raw, walked=Pieces()).is_counted
        assert sound(raw, "ogg").at_most >= len(raw) / 1_000 * AUDIO_A_SECOND


def test_what_has_too_many_pieces_is_not_read(monkeypatch):
    monkeypatch.setattr(sound_packets, "MOST_PIECES", 1_000)
    assert contained(ogg_opus([SMALL] * 400), walked=Pieces()) is not None
    many_streams = page([b"x"], serial=2, first=True) + page([b"x"], serial=3, first=True)
    for raw in (ogg_opus([SMALL] * 600), ogg_opus([SMALL]) + page([b""] * 255) * 3, ogg_opus([SMALL]) + many_streams):
        with pytest.raises(sound_packets.ManyPiecesError):
            contained(raw, walked=Pieces())


_PART = st.one_of(
    st.tuples(st.just("page"), st.lists(st.tuples(st.sampled_from(sorted(PACKETS)), st.integers(4, 400)), max_size=6)),
    st.tuples(
        st.just("wrapped"), st.lists(st.tuples(st.sampled_from(sorted(PACKETS)), st.integers(4, 90)), max_size=6)
    ),
    st.tuples(st.just("bytes"), st.binary(max_size=60)),
    st.tuples(st.just("lie"), st.tuples(st.binary(max_size=60), st.binary(max_size=5), st.integers(0, 255))),
)


@given(st.lists(_PART, max_size=8))
def test_no_packet_of_a_whole_page_is_lost(parts):
    raw, sure_s = ogg_opus([SMALL]), 0.0
    for kind, told in parts:
        if kind in ("page", "wrapped"):
            made = page([packet(head, size) for head, size in told])
            raw += wrapped(made)[: 27 + 255 + len(made)] if kind == "wrapped" else made
            sure_s += sum(min(PACKETS[head] / 1e3, size / 1_000) for head, size in told)
        elif kind == "bytes":
            raw += told
        else:
            body, sizes, flags = told
            raw += raw_page(body, sizes, flags=flags)
    found = contained(raw, walked=Pieces())
    assert found is None or 0 < max(found.seconds, found.at_most) <= 1_000_000
    assert sound(raw, "ogg").at_most >= int(sure_s * AUDIO_A_SECOND)


@given(st.binary(max_size=400))
def test_any_bytes_are_one_or_none(data):
    for raw in (b"OggS" + data, ogg_opus([SMALL]) + data):
        found = contained(raw, walked=Pieces())
        assert found is None or 0 < max(found.seconds, found.at_most) <= 1_000_000
