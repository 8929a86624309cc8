"""What is reserved of honest clips is within a few times of their length; and of crafted ones, what they can last is not far beyond it."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.media_tokens import AUDIO_A_SECOND, sound
from anabranch.gateway.sound_containers import contained
from anabranch.gateway.sound_frames import flac, framed
from anabranch.gateway.sound_packets import Pieces
from anabranch.gateway.sound_places import SamplePlaces
from sound_made import block, box, element, esds

# Marks of rates in the heads of ADTS.
MARKS = {48_000: 3, 44_100: 4, 24_000: 6, 16_000: 8, 8_000: 11}

# Kind of AAC (LC), rate by its mark, one channel.
CONFIG = {rate: (2 << 11 | mark << 7 | 1 << 3).to_bytes(2, "big") for rate, mark in MARKS.items()}


def sizes_of(rate, bit_rate, seconds, seed=0):
    """Bytes of each block of a memo, as an encoder makes them: words have more than pauses."""
    num = round(seconds * rate / 1_024)
    weights = np.random.default_rng(seed).gamma(2.0, 1.0, num)
    return np.maximum(8, weights / weights.sum() * bit_rate / 8 * seconds).astype(int)


def m4a_of(codec, sizes, *, config=b"", chunk=20, places=None, edits=(), rate=44_100, samples=1_024, data=None):
    """Of samples of these sizes, so many in a chunk; ``places`` of chunks in the data in place of one behind the other."""
    entry = box(codec, b"\x00" * 24, struct.pack(">I", rate << 16), config)
    counts = [len(sizes[at : at + chunk]) for at in range(0, len(sizes), chunk)]
    if places is None:
        ends = np.cumsum([sum(sizes[at : at + chunk]) for at in range(0, len(sizes), chunk)])
        places = [0, *ends[:-1].tolist()]
    runs = [(1, counts[0]), *([(len(counts), counts[-1])] if counts[-1] != counts[0] else [])]
    table = box(
        b"stbl",
        box(b"stsd", b"\x00" * 4, struct.pack(">I", 1), entry),
        box(b"stts", b"\x00" * 4, struct.pack(">III", 1, len(sizes), samples)),
        box(b"stsc", b"\x00" * 4, struct.pack(">I", len(runs)), *(struct.pack(">III", *run, 1) for run in runs)),
        box(b"stsz", b"\x00" * 4, struct.pack(">II", 0, len(sizes)), np.asarray(sizes, ">u4").tobytes()),
        box(b"stco", b"\x00" * 4, struct.pack(">I", len(places)), np.asarray(places, ">u4").tobytes()),
    )
    listed = box(b"elst", b"\x00" * 4, struct.pack(">I", len(edits)), *(struct.pack(">IiI", *one, 0) for one in edits))
    media = box(
        b"mdia",
        box(b"mdhd", b"\x00" * 12, struct.pack(">II", rate, len(sizes) * samples), b"\x00" * 4),
        box(b"hdlr", b"\x00" * 8, b"soun", b"\x00" * 12),
        box(b"minf", table),
    )
    track = box(b"trak", *([box(b"edts", listed)] if edits else []), media)
    body = b"\x55" * int(sum(sizes)) if data is None else data
    return box(b"ftyp", b"M4A \x00\x00\x00\x00") + box(b"moov", track) + box(b"mdat", body)


def mkv_of(codec, frames, private):
    endless = bytes.fromhex("01FFFFFFFFFFFFFF")
    entry = element("D7", b"\x01") + element("86", codec) + element("63A2", private)
    head = element("1A45DFA3", b"") + bytes.fromhex("18538067") + endless + element("1654AE6B", element("AE", entry))
    return head + bytes.fromhex("1F43B675") + endless + b"".join(map(block, frames))


def adts(body, rate):
    bits = 0xFFF1 << 40 | 1 << 38 | MARKS[rate] << 34 | 1 << 30 | (len(body) + 7) << 13 | 0x7FF << 2
    return bits.to_bytes(7, "big") + body


def clips(rate, bodies):
    """The same blocks as M4A, in Matroska and as ADTS."""
    return {
        "m4a": m4a_of(b"mp4a", [len(one) for one in bodies], config=esds(CONFIG[rate]), rate=rate),
        "mkv": mkv_of(b"A_AAC", bodies, CONFIG[rate]),
        "aac": b"".join(adts(one, rate) for one in bodies),
    }


@pytest.mark.parametrize(("rate", "bit_rate"), [(48_000, 64_000), (44_100, 64_000), (24_000, 32_000), (16_000, 24_000)])
def test_a_memo_reserves_at_most_four_times_its_length(rate, bit_rate):
    bodies = [b"\x55" * size for size in sizes_of(rate, bit_rate, 60)]
    lasts_s = len(bodies) * 1_024 / rate
    for form, raw in clips(rate, bodies).items():
        told = sound(raw, form)
        assert lasts_s * AUDIO_A_SECOND - 1 <= told.tokens <= 1.01 * lasts_s * AUDIO_A_SECOND + 1, form
        assert lasts_s * AUDIO_A_SECOND <= told.at_most <= 4 * lasts_s * AUDIO_A_SECOND + 1, form


@pytest.mark.parametrize(("rate", "short"), [(48_000, 11), (44_100, 12), (16_000, 33), (8_000, 65)])
def test_blocks_of_four_bytes_are_told_short_by_no_more_than_that(rate, short):
    # A sample of 400 bytes is a hundred blocks; nothing but decoding tells.
    bodies = [b"\x01\x40\x00\x07" * 100] * 500
    lasts_s = len(bodies) * 100 * 1_024 / rate
    for form, raw in clips(rate, bodies).items():
        assert sound(raw, form).at_most * short >= lasts_s * AUDIO_A_SECOND, form


# FLAC


def sum8(data):
    found = 0
    for byte in data:
        found ^= byte
        for _ in range(8):
            found = found << 1 & 0xFF ^ (0x07 if found & 0x80 else 0)
    return found


def info(rate):
    return b"\x80\x00\x00\x22\x10\x00\x10\x00" + b"\x00" * 6 + (rate << 44 | 15 << 36).to_bytes(8, "big") + b"\x00" * 16


def flac_frames(num, size, rate_mark=9, block_mark=12, number_from=0, seed=0):
    """Frames of ``size`` bytes of noise, one channel of 16 bits; by their marks of 4,096 samples at 44,100."""
    rng = np.random.default_rng(seed)
    frames = []
    for number in range(number_from, number_from + num):
        head = b"\xff\xf8" + bytes([block_mark << 4 | rate_mark, 0x08]) + chr(number % 0xD000).encode()
        head += bytes([sum8(head)]) + b"\x42"
        frames.append(head + rng.bytes(max(0, size - len(head))))
    return frames


DFLA = box(b"dfLa", b"\x00" * 4, info(44_100))

# 4,096 samples of 16 bits as 400 and as 800 kbit/s.
HONEST = pytest.mark.parametrize("bit_rate", [400_000, 800_000])


@HONEST
def test_honest_flac_reserves_its_length(bit_rate):
    frames = flac_frames(200, int(4_096 / 44_100 * bit_rate / 8))
    lasts_s = 200 * 4_096 / 44_100
    private = b"fLaC" + info(44_100)
    for form, raw in {
        "flac": private + b"".join(frames),
        "m4a": m4a_of(b"fLaC", list(map(len, frames)), config=DFLA, samples=4_096, data=b"".join(frames)),
        "mkv": mkv_of(b"A_FLAC", frames, private),
    }.items():
        assert lasts_s * AUDIO_A_SECOND <= sound(raw, form).at_most <= 2 * lasts_s * AUDIO_A_SECOND, form
        assert sound(raw, form).tokens <= 1.1 * lasts_s * AUDIO_A_SECOND, form


def test_frames_of_next_to_nothing_count_as_they_are():
    # 65,535 samples each, at 8,000 a second, twenty in a sample.
    frames = [b"".join(flac_frames(20, 12, 4, 15))] * 50
    lasts_s = 50 * 20 * 32_768 / 8_000
    raws = [
        m4a_of(b"fLaC", list(map(len, frames)), config=DFLA, data=b"".join(frames)),
        mkv_of(b"A_FLAC", frames, b"fLaC" + info(44_100)),
    ]
    for raw in raws:
        assert sound(raw, "").at_most >= lasts_s * AUDIO_A_SECOND


@pytest.mark.parametrize(
    "fields",
    [{"places": [0] * 10}, {"places": [0, 300, 500, *range(2_000, 9_000, 1_000)]}, {"chunk": 1, "places": [0]}],
)
def test_samples_that_lie_on_one_another_count_by_their_bytes(fields):
    one = b"".join(flac_frames(40, 12))
    raw = m4a_of(b"fLaC", [len(one)] * 10, config=DFLA, **{"chunk": 1, **fields}, data=one + b"\x00" * 9_000)
    # Each may be all of it.
    assert contained(raw, walked=Pieces()).at_most >= 10 * 40 * 4_096 / 44_100


def test_each_edit_plays_all_frames_again():
    frames = flac_frames(50, 500)
    sizes = list(map(len, frames))
    once, twice = (
        contained(
            m4a_of(b"fLaC", sizes, config=DFLA, edits=[(0, 0)] * num, samples=4_096, data=b"".join(frames)),
            walked=Pieces(),
        )
        for num in (1, 3)
    )
    assert once.seconds == pytest.approx(50 * 4_096 / 44_100)
    assert twice.at_most >= 3 * once.seconds


def test_a_second_table_of_chunks_or_a_fragment_is_not_passed_over():
    frames = flac_frames(50, 500)
    raw = m4a_of(b"fLaC", list(map(len, frames)), config=DFLA, samples=4_096, data=b"".join(frames))
    run = box(b"moof", box(b"traf", box(b"trun", b"\x00" * 4, struct.pack(">I", 50))))
    for more in (box(b"free", box(b"stco", b"\x00" * 8)), run):
        assert contained(raw + more, walked=Pieces()).at_most > 40 * contained(raw, walked=Pieces()).at_most


def test_a_rate_of_one_frame_is_not_that_of_the_others():
    # As by chance in a long clip: 4,096 samples at 100 a second.
    head = b"\xff\xf8\xcd\x08\x00\x00\x64"
    odd = head + bytes([sum8(head)]) + b"\x00" * 8
    usual = b"".join(flac_frames(100, 200))
    found = flac(b"fLaC" + info(44_100) + usual + odd, walked=Pieces())
    assert found.seconds == pytest.approx(100 * 4_096 / 44_100 + 40.96)
    # Those that do not say theirs may be played at it.
    silent = b"".join(flac_frames(100, 200, 0))
    assert flac(b"fLaC" + info(44_100) + silent + odd, walked=Pieces()).seconds == pytest.approx(101 * 40.96)


@pytest.mark.parametrize("change", [(3, 0x06), (-1, 0x80), (-1, 0x04), (-1, 0x3E)])
def test_what_decoders_refuse_is_no_frame(change):
    at, value = change
    head = bytearray(b"\xff\xf8\xc9\x08\x00")
    if at >= 0:
        head[at] = value
    behind = value if at < 0 else 0
    assert (
        flac(b"fLaC" + info(44_100) + bytes(head) + bytes([sum8(head), behind]) + b"\x00" * 9, walked=Pieces()).seconds
        == 0
    )
    # A number that goes on with a byte that cannot be in it.
    head = b"\xff\xf8\xc9\x08\xc2\x20"
    assert flac(b"fLaC" + info(44_100) + head + bytes([sum8(head)]) + b"\x00" * 9, walked=Pieces()).seconds == 0


def alac_config(samples, rate):
    return box(b"alac", b"\x00" * 4, struct.pack(">IBBBBBBHIII", samples, 0, 16, 40, 10, 14, 1, 255, 0, 0, rate))


@pytest.mark.parametrize(("samples", "rate"), [(4_096, 44_100), (4_096, 96_000), (1 << 24, 8_000)])
def test_a_sample_of_alac_lasts_as_long_as_its_config_says(samples, rate):
    # The first two are honest, of 700 kbit/s; of the last a decoder makes half an hour of each sample.
    size = round(samples / rate * 700_000 / 8) if samples == 4_096 else 90
    raw = m4a_of(b"alac", [size] * 100, config=alac_config(samples, rate), rate=44_100, samples=4_096)
    told = sound(raw, "m4a")
    lasts_s = max(100 * samples / rate, 100 * 4_096 / 44_100)
    assert contained(raw, walked=Pieces()).is_counted
    assert lasts_s * AUDIO_A_SECOND <= told.at_most <= 1.01 * lasts_s * AUDIO_A_SECOND
    assert told.tokens <= 1.01 * lasts_s * AUDIO_A_SECOND


def test_of_two_configs_of_alac_the_longer_frame_counts_and_without_one_nothing_is_known():
    two = alac_config(4_096, 44_100) + alac_config(8_192, 44_100)
    for config in (two, alac_config(8_192, 44_100) + alac_config(4_096, 44_100)):
        assert contained(m4a_of(b"alac", [900] * 10, config=config), walked=Pieces()).seconds == pytest.approx(
            10 * 8_192 / 44_100
        )
    behind = m4a_of(b"alac", [900] * 10, config=alac_config(4_096, 44_100))
    one, two = (b"stsd" + struct.pack(">II", 0, num) for num in (1, 2))
    assert contained(behind, walked=Pieces()).is_counted
    assert not contained(behind.replace(one, two), walked=Pieces()).is_counted
    for config in (b"", alac_config(4_096, 0)):
        assert not contained(m4a_of(b"alac", [900] * 10, config=config), walked=Pieces()).is_counted


def places(sizes, runs, chunks):
    return SamplePlaces(
        [np.array(sizes, ">u4")], [np.array(runs, ">u4").reshape(-1, 3)], [np.array(chunks, ">u8")]
    ).lie_apart()


def test_places_are_apart_or_not():
    assert places([5, 5, 5], [(1, 2, 1), (2, 1, 1)], [100, 110])
    assert places([5, 5, 5], [(1, 2, 1), (2, 1, 1)], [110, 100])
    assert not places([5, 5, 5], [(1, 2, 1), (2, 1, 1)], [100, 109])
    assert not places([5, 5, 5], [(1, 2, 1), (2, 1, 1)], [100, 100])
    # Tables that do not fit, and none.
    for runs in ([], [(2, 3, 1)], [(1, 3, 1), (1, 3, 1)], [(1, 2, 1)], [(1, 1, 1), (9, 1, 1)], [(1, 4_000_000_000, 1)]):
        assert not places([5, 5, 5], runs, [100, 200])
    assert not places([], [(1, 1, 1)], [100])
    assert not places([5], [(1, 1, 1)], [])
    assert not places([5], [(1, 1, 1)], [(1 << 64) - 1])


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=1, max_size=5), st.data())
def test_apart_as_byte_by_byte(sizes, data):
    chunks = data.draw(st.lists(st.integers(0, 30), min_size=len(sizes), max_size=len(sizes)))
    seen = [at for begin, own in zip(chunks, sizes, strict=True) for at in range(begin, begin + sum(own))]
    runs = [(place + 1, len(own), 1) for place, own in enumerate(sizes)]
    if places([size for own in sizes for size in own], runs, chunks):
        assert len(seen) == len(set(seen))
    elif all(map(sum, sizes)):
        assert len(seen) > len(set(seen))


@given(st.binary(max_size=60), st.sampled_from([b"stsc", b"stco", b"co64", b"stsz"]))
def test_any_table_is_read(body, name):
    frames = flac_frames(3, 30)
    raw = m4a_of(b"fLaC", list(map(len, frames)), config=DFLA, samples=4_096, data=b"".join(frames))
    found = contained(raw + box(b"moov", box(name, body)), walked=Pieces())
    assert found is None or found.at_most >= 0
    assert framed(body, walked=Pieces()) is None or framed(body, walked=Pieces()).at_most >= 0
