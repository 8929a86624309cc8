"""Seconds of sound in containers, against sums made by hand; what a field says is not believed where it can be counted."""

import base64
import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.media_tokens import AUDIO_A_SECOND, audio, heard_seconds, sound
from anabranch.gateway.sound_containers import contained, is_container, opus_ms

# First byte of packets of Opus: 20 ms as CELT, 60 ms as SILK, twice 10 ms; and three of 20 ms, told by the second byte.
PACKETS = {b"\xf8": 20.0, b"\x18": 60.0, b"\xf1": 20.0, b"\xfb\x03": 60.0}
OPUS_HEAD = b"OpusHead\x01\x02\x38\x01\x80\xbb\x00\x00\x00\x00\x00"


def page(packets, *, serial=1, granule=0, first=False):
    """An Ogg page of whole packets, without its sum, which nobody here looks at."""
    sizes = b"".join(b"\xff" * (len(one) // 255) + bytes([len(one) % 255]) for one in packets)
    head = b"OggS\x00" + bytes([2 if first else 0]) + struct.pack("<qIII", granule, serial, 0, 0)
    return head + bytes([len(sizes)]) + sizes + b"".join(packets)


def ogg_opus(packets, *, serial=1, granule=1, each=20):
    made = page([OPUS_HEAD], serial=serial, first=True) + page([b"OpusTags" + b"x" * 300], serial=serial)
    for at in range(0, len(packets), each):
        made += page(packets[at : at + each], serial=serial, granule=granule)
    return made


def packet(head, size=60):
    return head + b"\x55" * (size - len(head))


@pytest.mark.parametrize("granule", [0, 1, 10**15])
def test_packets_of_opus_are_counted_whatever_the_pages_say(granule):
    raw = ogg_opus([packet(head) for head in PACKETS] * 25, granule=granule)
    found = contained(raw)
    assert found.seconds == pytest.approx(25 * sum(PACKETS.values()) / 1e3)
    assert (found.is_counted, found.rest) == (True, 0)


@given(
    st.lists(st.tuples(st.sampled_from(sorted(PACKETS)), st.integers(2, 700)), min_size=1, max_size=30),
    st.integers(1, 7),
)
def test_packets_of_any_length_in_pages_of_any_number(packets, each):
    raw = ogg_opus([packet(head, size) for head, size in packets], each=each)
    assert contained(raw).seconds == pytest.approx(sum(PACKETS[head] for head, _ in packets) / 1e3)


def test_a_packet_may_go_on_in_the_next_page():
    begun = b"OggS\x00\x00" + struct.pack("<qIII", 5, 1, 0, 0) + b"\x01\xff" + packet(b"\x18", 255)
    rest = b"OggS\x00\x01" + struct.pack("<qIII", 5, 1, 0, 0) + b"\x02\x0a\x09" + b"x" * 10 + packet(b"\xf8", 9)
    assert contained(ogg_opus([]) + begun + rest).seconds == pytest.approx(0.08)


def test_streams_beside_and_behind_one_another_are_all_heard():
    one, other = (ogg_opus([packet(b"\xf8")] * 50, serial=serial) for serial in (1, 2))
    assert contained(one + other).seconds == pytest.approx(2.0)
    # The same number again begins with its head again.
    assert contained(one + one).seconds == pytest.approx(2.0)


def test_what_belongs_to_nothing_is_the_sparsest_sound():
    raw = ogg_opus([packet(b"\xf8")] * 50)
    junk = raw + b"\x00" * 5_000
    assert contained(junk).rest == 5_000
    assert sound(junk, "ogg").at_most == sound(raw, "ogg").at_most + 5 * AUDIO_A_SECOND


def test_of_another_codec_the_last_place_is_believed_as_an_estimate():
    head = b"\x01vorbis" + struct.pack("<IBI", 0, 2, 44_100) + b"\x00" * 14
    raw = page([head], first=True) + page([b"x" * 200], granule=44_100 * 7) + page([b"x" * 200], granule=-1)
    found = contained(raw)
    assert (found.seconds, found.is_counted) == (7.0, False)
    assert sound(raw, "ogg").tokens == 7 * AUDIO_A_SECOND
    long = raw + b"".join(page([b"x" * 250] * 40, granule=44_100 * 7) for _ in range(20))
    assert sound(long, "ogg").at_most == math.ceil(len(long) / 1_000 * AUDIO_A_SECOND)


# WebM


def element(id, body):
    size = len(body)
    return bytes.fromhex(id) + (1 << 56 | size).to_bytes(8, "big") + body


def block(head, track=1, time=0, flags=0x80):
    return element("A3", bytes([0x80 | track]) + struct.pack(">hB", time, flags) + head)


def webm(blocks, *, codec=b"A_OPUS", duration=None, endless=True, scale=None):
    info = element("2AD7B1", (scale or 1_000_000).to_bytes(4, "big")) if scale else b""
    if duration is not None:
        info += element("4489", struct.pack(">d", duration))
    tracks = element("1654AE6B", element("AE", element("D7", b"\x01") + element("86", codec)))
    cluster = element("E7", b"\x00") + b"".join(blocks)
    # As a recorder in a browser writes it: it does not know how long it will be.
    cluster = bytes.fromhex("1F43B67501FFFFFFFFFFFFFF") + cluster if endless else element("1F43B675", cluster)
    body = element("1549A966", info) + tracks + cluster
    segment = bytes.fromhex("1853806701FFFFFFFFFFFFFF") + body if endless else element("18538067", body)
    return element("1A45DFA3", b"\x42\x82\x84webm") + segment


@pytest.mark.parametrize("endless", [True, False])
@pytest.mark.parametrize("duration", [None, 1.0, 1e9])
def test_packets_of_a_webm_are_counted_whatever_it_says(endless, duration):
    raw = webm([block(packet(b"\xf8"), time=at * 20) for at in range(50)], duration=duration, endless=endless)
    assert contained(raw) == contained(raw[:]) is not None
    assert contained(raw).seconds == pytest.approx(1.0)
    assert contained(raw).is_counted


def test_blocks_in_groups_of_films_and_with_several_packets():
    group = element("A0", element("A1", b"\x81\x00\x00\x00" + packet(b"\x18")))
    assert contained(webm([group])).seconds == pytest.approx(0.06)
    # Of several in one block each is taken for the longest.
    laced = element("A3", b"\x81\x00\x00\x04\x02" + b"\x55" * 90)
    assert contained(webm([laced])).seconds == pytest.approx(3 * 0.12)
    # Pictures make no sound.
    film = element("AE", element("D7", b"\x02") + element("86", b"V_VP8"))
    raw = webm([block(packet(b"\xf8")), block(packet(b"\xf8"), track=2)])
    raw = raw.replace(bytes.fromhex("1F43B675"), film + bytes.fromhex("1F43B675"), 1)
    assert contained(raw) is None or contained(raw).seconds >= 0.02


def test_a_webm_of_another_codec_says_how_long_it_is():
    assert contained(webm([], codec=b"A_VORBIS", duration=2500.0)).seconds == 2.5
    assert contained(webm([block(b"xxxx", time=900)], codec=b"A_VORBIS")).seconds == pytest.approx(0.9)
    assert contained(webm([block(b"xxxx", time=900)], codec=b"A_VORBIS", scale=2_000_000)).seconds == pytest.approx(1.8)
    assert contained(webm([], codec=b"A_VORBIS", duration=float("nan"))) is None


# M4A


def box(name, *parts):
    body = b"".join(parts)
    return struct.pack(">I", 8 + len(body)) + name + body


def esds(config):
    inner = b"\x04" + bytes([13 + 2 + len(config)]) + b"\x40" + b"\x00" * 12 + b"\x05" + bytes([len(config)]) + config
    return box(b"esds", b"\x00" * 4, b"\x03" + bytes([3 + len(inner)]) + b"\x00\x01\x00" + inner)


# Kind and rate of AudioSpecificConfig: AAC LC at 44,100 and at 24,000, one whose rate is in full, and HE-AAC over 24,000.
CONFIGS = {
    44_100: (2 << 11 | 4 << 7 | 2 << 3).to_bytes(2, "big"),
    24_000: (2 << 11 | 6 << 7 | 1 << 3).to_bytes(2, "big"),
    11_111: (2 << 35 | 15 << 31 | 11_111 << 7 | 1 << 3).to_bytes(5, "big"),
    # A kind of two bytes, that is.
    8_000: (31 << 11 | 10 << 5 | 11 << 1).to_bytes(2, "big"),
    -24_000: (5 << 19 | 6 << 15 | 2 << 11 | 3 << 7).to_bytes(3, "big"),
}


def m4a(
    samples,
    *,
    config=CONFIGS[44_100],
    scale=44_100,
    delta=1024,
    length=None,
    codec=b"mp4a",
    size=0,
    fragments=(),
    handler=b"soun",
):
    entry = box(codec, b"\x00" * 8, b"\x00" * 16, struct.pack(">I", 48_000 << 16), esds(config) if config else b"")
    sizes = struct.pack(">I", 100) * samples if not size else b""
    table = box(
        b"stbl",
        box(b"stsd", b"\x00" * 4, struct.pack(">I", 1), entry),
        box(b"stts", b"\x00" * 4, struct.pack(">III", 1, samples, delta) if samples else struct.pack(">I", 0)),
        box(b"stsz", b"\x00" * 4, struct.pack(">II", size, samples), sizes),
    )
    length = samples * delta if length is None else length
    media = box(
        b"mdia",
        box(b"mdhd", b"\x00" * 12, struct.pack(">II", scale, length), b"\x00" * 4),
        box(b"hdlr", b"\x00" * 8, handler, b"\x00" * 12),
        box(b"minf", table),
    )
    moofs = [box(b"moof", box(b"traf", box(b"trun", b"\x00" * 4, struct.pack(">I", count)))) for count in fragments]
    return (
        box(b"ftyp", b"M4A \x00\x00\x00\x00")
        + box(b"moov", box(b"trak", media))
        + b"".join(moofs)
        + box(b"mdat", b"\x55" * 500)
    )


@pytest.mark.parametrize("rate", CONFIGS)
def test_samples_of_aac_are_counted_at_the_rate_of_their_own_config(rate):
    raw = m4a(430, config=CONFIGS[rate], scale=1000, delta=0)
    found = contained(raw)
    assert found.seconds == pytest.approx(430 * 1024 / abs(rate))
    assert found.is_counted
    told = audio({"data": base64.b64encode(raw).decode(), "format": "m4a"})
    assert told.tokens == told.at_most == math.ceil(round(430 * 1024 / abs(rate) * AUDIO_A_SECOND, 6))


@pytest.mark.parametrize("fields", [{"length": 1}, {"delta": 1}, {"length": 0xFFFFFFFF}, {"size": 5}])
def test_what_an_m4a_says_is_shorter_is_not_believed(fields):
    assert contained(m4a(430, **fields)).seconds == pytest.approx(430 * 1024 / 44_100)


def test_what_it_says_is_longer_is():
    assert contained(m4a(430, delta=2048)).seconds == pytest.approx(430 * 2048 / 44_100)
    # In whichever of its places it says so.
    assert contained(m4a(430, delta=2048, length=1)).seconds == pytest.approx(430 * 2048 / 44_100)
    assert contained(m4a(430, length=430 * 4096)).seconds == pytest.approx(430 * 4096 / 44_100)


def test_samples_of_fragments_count_too():
    assert contained(m4a(0, fragments=(40, 3))).seconds == pytest.approx(43 * 1024 / 44_100)


def test_another_codec_says_how_long_it_is():
    found = contained(m4a(100, codec=b"alac", config=b"", delta=4096))
    assert (found.seconds, found.is_counted) == (pytest.approx(100 * 4096 / 44_100), False)
    assert contained(m4a(100, handler=b"vide")) is None


# What is none, or lies


@pytest.mark.parametrize(
    "raw", [b"", b"OggS", b"OggS" * 99, b"\x1aE\xdf\xa3", b"\x00\x00\x00\x08ftyp", b"RIFF", b"\x00" * 40]
)
def test_what_tells_nothing_is_counted_by_its_bytes(raw):
    assert contained(raw) is None
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
    found = contained(raw)
    assert found is None or 0 < found.seconds <= 1_000_000
    assert 0 <= sound(raw, form).tokens


@pytest.mark.parametrize("form", MADE)
def test_what_is_made_is_told_in_its_own_seconds(form):
    assert is_container(MADE[form])
    assert heard_seconds(MADE[form], form) == pytest.approx(contained(MADE[form]).seconds, abs=0.04)


@pytest.mark.parametrize(
    ("packet", "ms"), [(b"", 0), (b"\xfb", 0), (b"\xfb\x3f", 120), (b"\x80", 2.5), (b"\x60", 10), (b"\x1a", 120)]
)
def test_packets_say_how_long_they_are(packet, ms):
    assert opus_ms(packet) == ms
