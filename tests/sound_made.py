"""Clips of sound in containers, made by hand: Ogg, WebM, M4A."""

import struct

# First byte of packets of Opus: 20 ms as CELT, 60 ms as SILK, twice 10 ms; and three of 20 ms, told by the second byte.
PACKETS = {b"\xf8": 20.0, b"\x18": 60.0, b"\xf1": 20.0, b"\xfb\x03": 60.0}
OPUS_HEAD = b"OpusHead\x01\x02\x38\x01\x80\xbb\x00\x00\x00\x00\x00"


def page(packets, *, serial=1, granule=0, first=False):
    """An Ogg page of whole packets."""
    sizes = b"".join(b"\xff" * (len(one) // 255) + bytes([len(one) % 255]) for one in packets)
    head = b"OggS\x00" + bytes([2 if first else 0]) + struct.pack("<qIII", granule, serial, 0, 0)
    return summed(head + bytes([len(sizes)]) + sizes + b"".join(packets))


def summed(page):
    """With its sum (RFC 3533, 6): bit by bit, as it is written there."""
    found = 0
    for byte in page:
        found ^= byte << 24
        for _ in range(8):
            found = found << 1 ^ (0x104C11DB7 if found & 0x80000000 else 0)
    return page[:22] + struct.pack("<I", found) + page[26:]


def ogg_opus(packets, *, serial=1, granule=1, each=20):
    made = page([OPUS_HEAD], serial=serial, first=True) + page([b"OpusTags" + b"x" * 300], serial=serial)
    for at in range(0, len(packets), each):
        made += page(packets[at : at + each], serial=serial, granule=granule)
    return made


def packet(head, size=60):
    return head + b"\x55" * (size - len(head))


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
    8_000: (31 << 11 | 7 << 5 | 11 << 1).to_bytes(2, "big"),
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
        + box(b"mdat", b"\x55" * 100 * (samples + sum(fragments)))
    )
