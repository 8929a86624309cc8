"""M4A that is made to be read wrongly: tables that are told otherwise, twice, or where they are not looked for."""

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway import sound_packets
from anabranch.gateway.media_tokens import AUDIO_A_SECOND, sound
from anabranch.gateway.sound_containers import contained
from anabranch.gateway.sound_packets import Pieces
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
    found = contained(file(tables=(stts(1_000), stz2(1_000, bits))), walked=Pieces())
    assert (found.seconds, found.is_counted) == (pytest.approx(1_000 * SAMPLE_S), True)
    # No more of them than have a size there, and none of a size of nothing.
    short = contained(
        file(tables=(stts(1_000), stz2(10, bits).replace(struct.pack(">I", 10), struct.pack(">I", 1_000)))),
        walked=Pieces(),
    )
    assert short.seconds <= 20 * SAMPLE_S + 1_000 / 44_100
    none = file(tables=(stts(1_000), stz2(1_000, 0)))
    assert not contained(none, walked=Pieces()).is_counted


def test_without_samples_nothing_was_counted():
    raw = file(tables=(stts(1_000),), data=b"\x55" * 50_000)
    assert not contained(raw, walked=Pieces()).is_counted
    assert sound(raw, "m4a").at_most >= 50 * AUDIO_A_SECOND


@pytest.mark.parametrize("other", [stsz(2_000), stsz(2_000, size=1), stz2(2_000)])
def test_of_two_tables_the_longer_one_counts(other):
    for tables in ((stsz(1), other), (other, stsz(1))):
        raw = file(tables=tables, data=b"\x55" * 9_000)
        assert contained(raw, walked=Pieces()).seconds == pytest.approx(2_000 * SAMPLE_S)


def test_a_sample_has_a_byte_at_least():
    raw = file(tables=(stsz(0xFFFFFFFF, size=1),))
    assert contained(raw, walked=Pieces()).seconds <= len(raw) * SAMPLE_S
    fragment = box(b"moof", box(b"traf", box(b"trun", b"\x00" * 4, struct.pack(">I", 0xFFFFFFFF))))
    raw = file(tables=(stsz(0),), more=fragment)
    assert contained(raw, walked=Pieces()).seconds <= len(raw) * SAMPLE_S


@pytest.mark.parametrize(
    "hidden",
    [
        box(b"what", box(b"stsz", b"\x00" * 4, struct.pack(">II", 1, 50_000))),
        box(b"moov", box(b"cmov", b"\x00" * 90)),
        box(b"free", box(b"moof", box(b"traf", box(b"trun", b"\x00" * 4, struct.pack(">I", 5_000))))),
        box(b"moov", b"\x00\x00\x00\x20trak", b"\x00" * 8),
        box(b"moov", box(b"trak", box(b"mdia", box(b"minf", box(b"stbl", stsz(5_000)))))),
    ],
)
def test_where_a_table_may_be_that_was_not_read_nothing_was_counted(hidden):
    raw = file(tables=(stsz(1),), more=hidden, data=b"\x55" * 50_000)
    assert not contained(raw, walked=Pieces()).is_counted
    assert sound(raw, "m4a").at_most >= 50 * AUDIO_A_SECOND


def test_of_two_configs_the_slower_one_counts():
    two = esds(CONFIGS[44_100]) + esds(CONFIGS[8_000])
    entry = box(b"mp4a", b"\x00" * 24, struct.pack(">I", 48_000 << 16), two)
    other = box(b"stsd", b"\x00" * 4, struct.pack(">I", 1), entry)
    found = contained(file(tables=(stsz(100), other)), walked=Pieces())
    assert (found.seconds, found.is_counted) == (pytest.approx(100 * 1024 / 8_000), True)
    for first, last in ((44_100, 8_000), (8_000, 44_100)):
        other = box(b"stsd", b"\x00" * 12 + b"mp4a" + b"\x00" * 28, esds(CONFIGS[last]))
        found = contained(file(tables=(stsz(100), other), config=CONFIGS[first]), walked=Pieces())
        assert (found.seconds, found.is_counted) == (pytest.approx(100 * 1024 / 8_000), True)
    # One of another codec is not known at all.
    other = box(b"stsd", b"\x00" * 4, struct.pack(">I", 1), box(b"alac", b"\x00" * 60))
    assert not contained(file(tables=(stsz(100), other)), walked=Pieces()).is_counted
    assert not contained(file(tables=(other, stsz(100))), walked=Pieces()).is_counted


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


def test_what_has_too_many_pieces_is_not_read(monkeypatch):
    monkeypatch.setattr(sound_packets, "MOST_PIECES", 500)
    assert contained(m4a(30), walked=Pieces()) is not None
    for more in (box(b"free") * 100, box(b"moov", box(b"trak"))):
        with pytest.raises(sound_packets.ManyPiecesError):
            contained(m4a(30) + more, walked=Pieces())


# Samples that are played more than once


def elst(*edits, long=False):
    rows = b"".join(struct.pack(">QqI" if long else ">IiI", length, at, 1 << 16) for length, at in edits)
    return box(b"elst", bytes([long]) + b"\x00" * 3, struct.pack(">I", len(edits)), rows)


def stco(*places, long=False):
    rows = b"".join(struct.pack(">Q" if long else ">I", at) for at in places)
    return box(b"co64" if long else b"stco", b"\x00" * 4, struct.pack(">I", len(places)), rows)


def mvhd(scale=1_000):
    return box(b"mvhd", b"\x00" * 12, struct.pack(">II", scale, 0), b"\x00" * 80)


def played(*tables, more=b"", **fields):
    """Seconds of a file whose head of the film says that its clock counts thousandths."""
    raw = file(tables=tables, more=box(b"moov", mvhd()) + more, **fields)
    found = contained(raw, walked=Pieces())
    assert found.is_counted
    # Each sample may hold many blocks.
    assert found.at_most >= found.seconds
    assert sound(raw, "m4a").at_most == math.ceil(found.at_most * AUDIO_A_SECOND)
    return found.seconds


@pytest.mark.parametrize("long", [False, True])
def test_each_edit_plays_its_samples_again(long):
    tables = (stts(50, 1_024), stsz(50))
    whole = 50 * SAMPLE_S
    assert played(*tables, box(b"edts", elst((1_160, 1_024), long=long))) == pytest.approx(whole)
    assert played(*tables, box(b"edts", elst(*[(1_160, 0)] * 200, long=long))) == pytest.approx(200 * whole, rel=0.03)
    assert played(*tables, box(b"edts", elst(*[(0, 0)] * 9, long=long))) == pytest.approx(9 * whole)
    # Of pieces only what is in them, and a little around; a gap lasts as long as it says.
    assert played(*tables, box(b"edts", elst((100, 0), (100, 9)))) == pytest.approx(whole)
    assert played(*tables, box(b"edts", elst(*[(100, 0)] * 50, long=long))) == pytest.approx(50 * 0.146, rel=0.05)
    assert played(*tables, box(b"edts", elst((2_000, -1), (1_160, 0), long=long))) == pytest.approx(whole + 2)
    # Behind others some play the track in place of a gap.
    assert played(*tables, box(b"edts", elst((1_160, 0), (1_160, -1), long=long))) == pytest.approx(2 * whole)


@pytest.mark.parametrize(
    ("times", "more", "scale"),
    [
        (stts(50, 1), b"", 1 << 30),
        (stts(50, 1_024), box(b"free", b"ctts"), 44_100),
        (stts(50, 1 << 31), b"", 44_100),
        (stts(50, 0), b"", 44_100),
    ],
)
def test_where_nobody_knows_when_samples_are_each_edit_may_play_all(times, more, scale):
    tables = (times, stsz(50), box(b"edts", elst(*[(2, 0)] * 100)))
    raw = file(tables=tables, more=box(b"moov", mvhd()) + more, scale=scale)
    assert contained(raw, walked=Pieces()).seconds >= 100 * 50 * SAMPLE_S - 1e-6
    raw = file(tables=tables, more=box(b"moof", box(b"traf", box(b"trun", b"\x00" * 4, struct.pack(">I", 7)))))
    assert contained(raw, walked=Pieces()).seconds >= 100 * 57 * SAMPLE_S - 1e-6


@pytest.mark.parametrize("long", [False, True])
def test_chunks_may_lie_on_one_another(long):
    alike = stsz(5_000, size=100)
    for tables in ((alike, stco(*[900] * 100, long=long)), (stco(*[900] * 100, long=long), alike)):
        assert played(stts(5_000), *tables, data=b"\x55" * 5_000) == pytest.approx(5_000 * SAMPLE_S)
    # What is claimed has to lie somewhere.
    raw = file(tables=(stts(1), stsz(1 << 31, size=100), stco(900, 900, long=long)))
    assert contained(raw, walked=Pieces()).seconds <= 2 * (len(raw) / 100 + 1) * SAMPLE_S


def test_runs_of_fragments_may_lie_on_one_another():
    run = box(b"moof", box(b"traf", box(b"trun", b"\x00" * 4, struct.pack(">I", 400))))
    assert played(stsz(0), more=run * 300) == pytest.approx(300 * 400 * SAMPLE_S)


@pytest.mark.parametrize("broken", [b"mdhd", b"elst", b"stsd", b"stsz", b"stz2", b"hdlr", b"stts", b"stco", b"mvhd"])
def test_a_box_that_ends_too_early_does_not_hide_the_others(broken):
    for at in (0, 1, 5):
        tables = (stsz(5_000, size=100), stco(*[900] * 100), box(broken, b"\x01" * at))
        raw = file(tables=tables, data=b"\x55" * 5_000)
        assert sound(raw, "m4a").at_most >= 5_000 * SAMPLE_S * AUDIO_A_SECOND


def test_what_stands_before_the_head_of_a_film_is_passed_over():
    tables = (stsz(5_000, size=100), stco(*[900] * 100))
    raw = file(tables=tables, data=b"\x55" * 5_000).replace(b"ftyp", b"what")
    for more in (b"", box(b"free", b"\x00" * 5_000)):
        assert sound(more + raw, "m4a").at_most >= 5_000 * SAMPLE_S * AUDIO_A_SECOND


def test_a_clock_that_does_not_run_and_a_track_that_does_not_say_what_it_is():
    for fields in ({"scale": 0}, {"length": 0}):
        raw = file(tables=(stsz(5_000, size=100), stco(*[900] * 100)), data=b"\x55" * 5_000, **fields)
        assert sound(raw, "m4a").at_most >= 5_000 * SAMPLE_S * AUDIO_A_SECOND
        raw = raw.replace(b"soun", b"????")
        assert not contained(raw, walked=Pieces()).is_counted
        assert sound(raw, "m4a").at_most >= 5_000 * SAMPLE_S * AUDIO_A_SECOND


@pytest.mark.parametrize(
    ("codec", "each_s"), [(b"alac", 0.511), (b"fLaC", 8.19), (b"samr", 0.02), (b"sowt", 1 / 8_000)]
)
def test_of_other_codecs_no_sample_is_longer_than_theirs(codec, each_s):
    raw = file(tables=(stts(5_000), stsz(5_000, size=1), stco(*[900] * 100))).replace(b"mp4a", codec)
    assert not contained(raw, walked=Pieces()).is_counted
    assert 5_000 * each_s <= contained(raw, walked=Pieces()).at_most
    assert codec != b"sowt" or contained(raw, walked=Pieces()).at_most <= 1


def test_blocks_of_the_newest_aac_are_four_times_as_long():
    xhe = (31 << 27 | 10 << 21 | 4 << 17 | 1 << 13).to_bytes(4, "big")
    assert contained(file(tables=(stts(1), stsz(100)), config=xhe), walked=Pieces()).seconds == pytest.approx(
        100 * 4_096 / 44_100, rel=1e-3
    )


@given(
    samples=st.integers(1, 60),
    chunks=st.integers(1, 9),
    edits=st.lists(st.tuples(st.integers(0, 3_000), st.sampled_from([-1, 0, 500])), max_size=6),
    delta=st.sampled_from([0, 1, 512, 1_024, 5_000]),
)
def test_never_shorter_than_what_a_decoder_plays(samples, chunks, edits, delta):
    tables = (stts(samples * chunks, delta), stsz(samples * chunks, size=10), stco(*[0] * chunks))
    raw = file(tables=(*tables, box(b"edts", elst(*edits))), more=box(b"moov", mvhd()), data=b"\x55" * 10 * samples)
    # As FFmpeg goes by edits: those samples whose time is within, by the clock of the track.
    each_s, heard = delta / 44_100, 0
    for length, at in edits:
        if at >= 0:
            begin, end = at / 44_100, at / 44_100 + (length / 1_000 if length else 1e9)
            heard += sum(begin - each_s < number * each_s < end for number in range(samples * chunks))
    assert contained(raw, walked=Pieces()).seconds >= max(heard, samples * chunks) * SAMPLE_S - 1e-6


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
    found = contained(raw, walked=Pieces())
    assert found is None or 0 < max(found.seconds, found.at_most) <= 1_000_000
    assert sound(raw, "m4a").at_most >= min(samples * SAMPLE_S, len(raw) / 1_000) * AUDIO_A_SECOND - 1


@given(st.binary(max_size=400))
def test_any_bytes_are_one_or_none(data):
    for raw in (box(b"ftyp", b"M4A ") + data, file(tables=(stsz(3), data))):
        found = contained(raw, walked=Pieces())
        assert found is None or 0 < max(found.seconds, found.at_most) <= 1_000_000
