"""How long bytes of AAC and of FLAC may last: by the config of one, by the longest frame of the other."""

import struct

import pytest

from anabranch.gateway.media_tokens import AUDIO_A_SECOND, sound
from anabranch.gateway.sound_aac import FLAC_FRAME_S, config_rate, flac_within
from anabranch.gateway.sound_containers import contained
from anabranch.gateway.sound_frames import framed
from anabranch.gateway.sound_packets import Pieces
from sound_made import CONFIGS, block, box, element, esds, m4a

# Heads of frames of FLAC: 4,096 samples at the rate that the file says, and 65,536 of 1 a second.
USUAL, SLOW = bytes.fromhex("fff8c00800"), bytes.fromhex("fff87d0800ffff0001")


def sum8(data):
    found = 0
    for byte in data:
        found ^= byte
        for _ in range(8):
            found = (found << 1 ^ 7 if found & 0x80 else found << 1) & 0xFF
    return bytes([found])


def flac_frame(head):
    return head + sum8(head) + b"\x00" * 8


def told(rate):
    """STREAMINFO with its head."""
    return (
        b"\x80\x00\x00\x22"
        + b"\x10\x00\x10\x00"
        + b"\x00" * 6
        + (rate << 44 | 1 << 36).to_bytes(8, "big")
        + b"\x00" * 16
    )


@pytest.mark.parametrize(
    ("config", "rate"),
    [*((config, abs(rate)) for rate, config in CONFIGS.items()), (b"", 96_000 * 0), (b"\x16\x80", 0)],
)
def test_the_rate_of_a_config(config, rate):
    # Without any byte there is no kind of which that would be the rate; of mark 13 there is none.
    assert config_rate(config) == (rate or (96_000 if not config else 0))


def test_a_frame_of_flac_lasts_as_long_as_the_longest_that_is_there():
    def longest_s(data):
        return flac_within(data, walked=Pieces()).longest_s

    assert longest_s(b"fLaC" + told(44_100) + flac_frame(USUAL) * 3) == 4_096 / 44_100
    assert longest_s(b"dfLa" + b"\x00" * 4 + told(8_000) + flac_frame(USUAL)) == 4_096 / 8_000
    # A head that says a rate is believed.
    assert longest_s(b"fLaC" + told(44_100) + flac_frame(USUAL) + flac_frame(SLOW)) == 65_536
    # Where no rate is told.
    assert longest_s(flac_frame(USUAL)) == FLAC_FRAME_S
    assert longest_s(b"") == FLAC_FRAME_S
    # All together, those that do not say how fast they are at the lowest rate that is said; none for longer than any clip is.
    both = flac_within(b"fLaC" + told(44_100) + flac_frame(USUAL) * 3 + flac_frame(SLOW), walked=Pieces())
    assert (both.num, both.seconds) == (4, 65_536 + 3 * 4_096)
    assert flac_within(flac_frame(SLOW) * 99, walked=Pieces()).seconds == 1_000_000


def adts(body, mark=11, blocks=1):
    """A frame at the rate of a mark (8,000)."""
    size = len(body) + 7
    bits = 0xFFF1 << 40 | 1 << 38 | mark << 34 | 1 << 30 | size << 13 | 0x7FF << 2 | blocks - 1
    return bits.to_bytes(7, "big") + body


def test_a_frame_of_adts_may_hold_more_blocks_than_it_says():
    many = adts(b"\x01" * 4_000) * 4
    found = framed(many, walked=Pieces())
    assert found.seconds == 4 * 1_024 / 8_000
    # 16 kbit/s.
    assert found.at_most == 4 * 2
    assert sound(many, "aac").at_most == 8 * AUDIO_A_SECOND
    # What it says counts where that is more.
    assert framed(adts(b"\x01" * 4, blocks=4) * 4, walked=Pieces()).at_most == 16 * 1_024 / 8_000
    # Frames of another kind among them last as long as they do.
    layer_3 = (b"\xff\xfb\x90\x00" + b"\x55" * 413) * 4
    assert framed(many + layer_3, walked=Pieces()).at_most == pytest.approx(8 + 4 * 1_152 / 44_100)


def test_a_sample_of_an_m4a_may_hold_many_blocks():
    # 100 bytes in each of 430 samples, of 2,000 a second.
    raw = m4a(430)
    assert contained(raw, walked=Pieces()).seconds == pytest.approx(430 * 1_024 / 44_100)
    assert contained(raw, walked=Pieces()).at_most == pytest.approx(430 / 20)
    alike = m4a(10, size=4_000, config=CONFIGS[24_000])
    # The file has fewer bytes than that: there is one, of all of them.
    assert len(alike) < 4_000
    assert contained(alike, walked=Pieces()).at_most == pytest.approx(len(alike) / 2_000)


@pytest.mark.parametrize(
    ("flags", "head", "row", "at"),
    [(0x200, b"", ">I", 0), (0xF01, b"\x00" * 4, ">IIII", 1), (0x204, b"\x00" * 4, ">I", 0)],
)
def test_a_run_of_a_fragment_says_how_long_its_samples_are(flags, head, row, at):
    sizes = [8, 16, 4_000]
    rows = b"".join(struct.pack(row, *(size if place == at else 7 for place in range(len(row) - 1))) for size in sizes)
    run = box(b"trun", struct.pack(">II", flags, len(sizes)), head, rows)
    raw = m4a(0) + box(b"moof", box(b"traf", run)) + box(b"mdat", b"\x55" * 4_024)
    assert contained(raw, walked=Pieces()).at_most == pytest.approx(4_024 / 2_000)
    # Without its rows each of the clip's bytes may be in it.
    cut = m4a(0) + box(b"moof", box(b"traf", run[:-4])) + box(b"mdat", b"\x55" * 4_024)
    assert sound(cut, "m4a").at_most >= len(cut) / 2_000 * AUDIO_A_SECOND


def webm_of(codec, blocks, private=b""):
    endless = bytes.fromhex("01FFFFFFFFFFFFFF")
    entry = element(
        "AE", element("D7", b"\x01") + element("86", codec) + (element("63A2", private) if private else b"")
    )
    tracks = element("1654AE6B", entry)
    return (
        element("1A45DFA3", b"")
        + bytes.fromhex("18538067")
        + endless
        + tracks
        + bytes.fromhex("1F43B675")
        + endless
        + blocks
    )


def test_a_block_of_a_webm_may_hold_many_of_aac_and_of_flac():
    blocks = block(b"\x01" * 396) * 10
    private = CONFIGS[44_100]
    found = contained(webm_of(b"A_AAC", blocks, private), walked=Pieces())
    assert (found.seconds, found.is_counted) == (pytest.approx(10 * 1_024 / 44_100), True)
    assert found.at_most == pytest.approx(10 * 396 / 2_000)
    # Without a config each may be of the lowest rate.
    assert contained(webm_of(b"A_AAC", blocks), walked=Pieces()).at_most == pytest.approx(10 * 396 / 2_000)
    short = contained(webm_of(b"A_AAC", block(b"\x01" * 8) * 10), walked=Pieces())
    assert (short.at_most, short.is_counted) == (pytest.approx(10 * 1_024 / 7_350), False)
    flac = webm_of(b"A_FLAC", block(flac_frame(USUAL) * 10) * 10, b"fLaC" + told(44_100))
    assert contained(flac, walked=Pieces()).at_most == pytest.approx(100 * 4_096 / 44_100)
    assert contained(flac, walked=Pieces()).is_counted
    # Of those that are one packet each, no more than so many.
    assert contained(webm_of(b"A_VORBIS", blocks), walked=Pieces()).at_most == pytest.approx(10 * 0.512)


def test_flac_in_an_m4a_may_be_of_any_rate():
    entry = box(
        b"fLaC", b"\x00" * 8, b"\x00" * 16, struct.pack(">I", 48_000 << 16), box(b"dfLa", b"\x00" * 4, told(44_100))
    )
    assert b"esds" not in entry
    frames = flac_frame(SLOW) * 3
    table = box(
        b"stbl",
        box(b"stsd", b"\x00" * 4, struct.pack(">I", 1), entry),
        box(b"stts", b"\x00" * 4, struct.pack(">III", 1, 1, 1)),
        box(b"stsz", b"\x00" * 4, struct.pack(">II", 0, 1), struct.pack(">I", len(frames))),
    )
    media = box(
        b"mdia",
        box(b"mdhd", b"\x00" * 12, struct.pack(">II", 44_100, 1), b"\x00" * 4),
        box(b"hdlr", b"\x00" * 8, b"soun", b"\x00" * 12),
        box(b"minf", table),
    )
    raw = box(b"ftyp", b"M4A \x00\x00\x00\x00") + box(b"moov", box(b"trak", media)) + box(b"mdat", frames)
    assert contained(raw, walked=Pieces()).at_most >= 3 * 65_536
    assert esds(CONFIGS[44_100]) not in raw
