"""Forms of sound of which nobody can say how long it lasts before it is decoded: they are refused by the marks that they begin with."""

from anabranch.gateway.sound_packets import OtherSoundError

# What stands where, at the beginning, and what it is called.
_MARKS = tuple(
    (at, bytes.fromhex(mark) if isinstance(mark, str) else mark, name)
    for at, mark, name in (
        (0, b"riff\x2e\x91\xcf\x11", "W64"),
        (0, b"RF64", "RF64"),
        (0, b"BW64", "BW64"),
        (0, b"RIFX", "RIFX"),
        (0, b"caff", "CAF"),
        (0, b"FORM", "AIFF"),
        (0, b"FRM8", "DSDIFF"),
        (0, b"DSD ", "DSF"),
        (0, b".snd", "AU"),
        (0, b"FLV", "FLV"),
        (0, "3026B2758E66CF11", "ASF (WMA)"),
        (0, b".RMF", "RealMedia"),
        (0, b".ra\xfd", "RealAudio"),
        (0, b"#!AMR", "AMR"),
        (0, b"#!SILK", "SILK"),
        (1, b"#!SILK", "SILK"),
        (0, b"ADIF", "AAC as ADIF"),
        (0, b"wvpk", "WavPack"),
        (0, b"MAC ", "Monkey's Audio"),
        (0, b"TTA", "TTA"),
        (0, b"tBaK", "TAK"),
        (0, b"OFR ", "OptimFROG"),
        (0, b"MPCK", "Musepack"),
        (0, b"MP+", "Musepack"),
        (0, b"ajkg", "Shorten"),
        (0, b"TWIN97012000", "VQF"),
        (0, b"Creative Voice File", "VOC"),
        (0, b"MThd", "MIDI"),
        (0, "000001BA", "MPEG-PS"),
        (0, "060E2B34", "MXF"),
        (0, b"\x0b\x77", "AC-3"),
        (0, "7FFE8001", "DTS"),
    )
)

# Packets of MPEG-TS, each of which begins so; and of AAC as LATM, by 11 bits.
_TS, _TS_BYTES = b"G", (188, 192, 204)

# NUT is looked for beyond its beginning, as far as that which decides what a clip is.
_NUT, LOOKED_AT = bytes.fromhex("4E4D7A561F5F04AD"), 1 << 20

# What is taken, as an error names it, but not behind notes (ID3), which others pass over.
_BARE = ((b"OggS", "Ogg"), (b"\x1aE\xdf\xa3", "WebM"), (b"RIFF", "WAV"))


def refuse_others(data: bytes, noted: int = 0) -> None:
    """Raises OtherSoundError for a clip that begins as another form.

    Args:
        data: its first bytes, `LOOKED_AT` of them or more.
        noted: bytes of the notes (ID3) that it begins with; decoders look for the form behind them.
    """
    begun = data[noted : noted + 1_024]
    for at, mark, name in _MARKS:
        if begun.startswith(mark, at):
            raise OtherSoundError(name)
    if begun.startswith(b"RIFF") and begun[8:12] != b"WAVE" and len(begun) >= 12:
        raise OtherSoundError("AVI" if begun[8:11] == b"AVI" else "RIFF that is not WAV")
    if any(begun[at : at + size * 5 : size] == _TS * 5 for size in _TS_BYTES for at in (0, 4)):
        raise OtherSoundError("MPEG-TS")
    if begun[:1] == b"\x56" and begun[1:2] >= b"\xe0":
        raise OtherSoundError("AAC as LATM")
    if _NUT in data:
        raise OtherSoundError("NUT")
    for mark, name in _BARE:
        if noted and begun.startswith(mark):
            raise OtherSoundError(f"{name} behind ID3 notes")
    if noted and begun[4:8] in (b"ftyp", b"styp", b"moov"):
        raise OtherSoundError("M4A behind ID3 notes")
