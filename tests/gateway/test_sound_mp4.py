"""M4A that is made to be read wrongly: tables that are told otherwise, twice, or where they are not looked for."""

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway import sound_packets
from anabranch.gateway.media_tokens import AUDIO_A_SECOND, sound
from anabranch.gateway.sound_containers import contained
from sound_made import CONFIGS, box, esds, m4a

SAMPLE_S = 1024 / 44_100


def file(*, tables, scale=44_100, length=1, config=CONFIGS[44_100], more=b"", data=b"\x55" * 500, entries=1):
    entry = box(b"mp4a", b"\x00" * 24, struct.pack(">I", 48_000 << 16), esds(config))
    stbl = box(b"stbl", box(b"stsd", b"\x00" * 4, struct.pack(">I", entries), entry), *tables)
    media = box(
        b"mdia",
        box(b"mdhd", b"\x00" * 12, struct.pack(">II", scale, length), b"\x00" * 4),
        box(b"hdlr", b"\x00" * 8, b"soun", b"\x00" * 12),
        box(b"minf", stbl),
    )
    return box(b"ftyp", b"M4A \x00\x00\x00\x00") + box(b"moov", box(b"trak", media)) + more + box(b"mdat", data)


def stsz(count, size=0):
    return box(b"stsz", b"\x00" * 4, struct.pack(">II", size, count), b"" if size else struct.pack(">I", 100) * count)


def stz2(count, bits=8):
    return box(b"stz2", b"\x00" * 7, bytes([bits]), struct.pack(">I", count), b"\x64" * (-(-count * bits // 8)))


def stts(count, delta=1):
    return box(b"stts", b"\x00" * 4, struct.pack(">III", 1, count, delta))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_samples_of_the_compact_table_count(bits):
    found = contained(file(tables=(stts(1_000), stz2(1_000, bits))))
    assert (found.seconds, found.is_counted) == (pytest.approx(1_000 * SAMPLE_S), True)
    # No more of them than have a size there, and none of a size of nothing.
    short = contained(
        file(tables=(stts(1_000), stz2(10, bits).replace(struct.pack(">I", 10), struct.pack(">I", 1_000))))
    )
    assert short.seconds <= 20 * SAMPLE_S + 1_000 / 44_100
    none = file(tables=(stts(1_000), stz2(1_000, 0)))
    assert not contained(none).is_counted


def test_without_samples_nothing_was_counted():
    raw = file(tables=(stts(1_000),), data=b"\x55" * 50_000)
    assert not contained(raw).is_counted
    assert sound(raw, "m4a").at_most >= 50 * AUDIO_A_SECOND


@pytest.mark.parametrize("other", [stsz(2_000), stsz(2_000, size=1), stz2(2_000)])
def test_of_two_tables_the_longer_one_counts(other):
    for tables in ((stsz(1), other), (other, stsz(1))):
        raw = file(tables=tables, data=b"\x55" * 9_000)
        assert contained(raw).seconds == pytest.approx(2_000 * SAMPLE_S)


def test_a_sample_has_a_byte_at_least():
    raw = file(tables=(stsz(0xFFFFFFFF, size=1),))
    assert contained(raw).seconds <= len(raw) * SAMPLE_S
    fragment = box(b"moof", box(b"traf", box(b"trun", b"\x00" * 4, struct.pack(">I", 0xFFFFFFFF))))
    raw = file(tables=(stsz(0),), more=fragment)
    assert contained(raw).seconds <= len(raw) * SAMPLE_S


@pytest.mark.parametrize(
    "hidden",
    [
        box(b"udta", box(b"stsz", b"\x00" * 4, struct.pack(">II", 1, 50_000))),
        box(b"moov", box(b"cmov", b"\x00" * 90)),
        box(b"free", box(b"moof", box(b"traf", box(b"trun", b"\x00" * 4, struct.pack(">I", 5_000))))),
        box(b"moov", b"\x00\x00\x00\x20trak", b"\x00" * 8),
        box(b"moov", box(b"trak", box(b"mdia", box(b"minf", box(b"stbl", stsz(5_000)))))),
    ],
)
def test_where_a_table_may_be_that_was_not_read_nothing_was_counted(hidden):
    raw = file(tables=(stsz(1),), more=hidden, data=b"\x55" * 50_000)
    assert not contained(raw).is_counted
    assert sound(raw, "m4a").at_most >= 50 * AUDIO_A_SECOND


def test_of_two_configs_the_slower_one_counts():
    two = esds(CONFIGS[44_100]) + esds(CONFIGS[8_000])
    entry = box(b"mp4a", b"\x00" * 24, struct.pack(">I", 48_000 << 16), two)
    other = box(b"stsd", b"\x00" * 4, struct.pack(">I", 1), entry)
    found = contained(file(tables=(stsz(100), other)))
    assert (found.seconds, found.is_counted) == (pytest.approx(100 * 1024 / 8_000), True)
    for first, last in ((44_100, 8_000), (8_000, 44_100)):
        other = box(b"stsd", b"\x00" * 12 + b"mp4a" + b"\x00" * 28, esds(CONFIGS[last]))
        found = contained(file(tables=(stsz(100), other), config=CONFIGS[first]))
        assert (found.seconds, found.is_counted) == (pytest.approx(100 * 1024 / 8_000), True)
    # One of another codec is not known at all.
    other = box(b"stsd", b"\x00" * 4, struct.pack(">I", 1), box(b"alac", b"\x00" * 60))
    assert not contained(file(tables=(stsz(100), other))).is_counted
    assert not contained(file(tables=(other, stsz(100)))).is_counted


def test_a_claim_of_hours_is_as_long_as_its_bytes_can_be():
    raw = box(b"ftyp", b"M4A ") + box(
        b"moov",
        box(
            b"trak",
            box(
                b"mdia",
                box(b"mdhd", b"\x00" * 12, struct.pack(">II", 1, 31_000)),
                box(b"hdlr", b"\x00" * 8, b"soun"),
            ),
        ),
    )
    told = sound(raw, "m4a")
    assert told.tokens == math.ceil(len(raw) / 1_000 * AUDIO_A_SECOND)
    # A budget is asked for all that it may come to.
    assert told.at_most == 31_000 * AUDIO_A_SECOND
    # Counted ones too, of next to no bytes each.
    raw = file(tables=(stsz(0xFFFFFFFF, size=1),), config=(2 << 35 | 15 << 31 | 1 << 7 | 1 << 3).to_bytes(5, "big"))
    assert sound(raw, "m4a").tokens <= math.ceil(len(raw) / 100 * AUDIO_A_SECOND)
    honest = m4a(430)
    assert sound(honest, "m4a").tokens == math.ceil(round(430 * SAMPLE_S * AUDIO_A_SECOND, 6))


def test_what_has_too_many_pieces_is_none(monkeypatch):
    monkeypatch.setattr(sound_packets, "MOST_PIECES", 100)
    assert contained(m4a(30)) is not None
    assert contained(m4a(30) + box(b"free") * 100) is None


_NAMES = st.sampled_from([b"moov", b"trak", b"mdia", b"minf", b"stbl", b"udta", b"free", b"moof", b"traf", b"wave"])
_LEAF = st.one_of(
    st.builds(
        box, st.sampled_from([b"mdhd", b"stts", b"stsd", b"stsz", b"stz2", b"trun", b"hdlr"]), st.binary(max_size=40)
    ),
    st.binary(max_size=20),
    st.builds(stsz, st.integers(0, 40), st.integers(0, 3)),
    st.builds(stz2, st.integers(0, 40), st.sampled_from([0, 4, 8, 16, 255])),
)
_TREE = st.recursive(
    _LEAF, lambda inner: st.builds(lambda name, parts: box(name, *parts), _NAMES, st.lists(inner, max_size=4))
)


@given(st.lists(_TREE, max_size=4), st.integers(1, 300), st.integers(0, 30))
def test_of_any_boxes_around_it_no_sample_is_lost(trees, samples, cut):
    raw = file(tables=(*trees, stsz(samples)), more=b"".join(trees), data=b"\x55" * 30_000)
    raw = raw[: len(raw) - cut]
    found = contained(raw)
    assert found is None or 0 < found.seconds <= 1_000_000
    assert sound(raw, "m4a").at_most >= min(samples * SAMPLE_S, len(raw) / 1_000) * AUDIO_A_SECOND - 1


@given(st.binary(max_size=400))
def test_any_bytes_are_one_or_none(data):
    for raw in (box(b"ftyp", b"M4A ") + data, file(tables=(stsz(3), data))):
        found = contained(raw)
        assert found is None or 0 < found.seconds <= 1_000_000
