"""Forms of sound that last far longer than their bytes say are refused: ten such clips were charged thirty times what was reserved."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.media_tokens import sound
from anabranch.gateway.sound_packets import OtherSoundError
from sound_made import OPUS_HEAD, m4a, ogg_opus, packet, webm

OPUS = packet(b"\xf8")
OTHERS = {
    "W64": b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb",
    "RF64": b"RF64\xff\xff\xff\xffWAVE",
    "CAF": b"caff\x00\x01\x00\x00desc",
    "AVI": b"RIFF\x00\x10\x00\x00AVI LIST",
    "FLV": b"FLV\x01\x04\x00\x00\x00\x09",
    "ASF (WMA)": bytes.fromhex("3026B2758E66CF11A6D900AA0062CE6C"),
    "NUT": b"nut/multimedia container\x00" + bytes.fromhex("4E4D7A561F5F04AD"),
    "AIFF": b"FORM\x00\x00\x10\x00AIFCCOMM",
    "AMR": b"#!AMR\n",
    "MPEG-TS": b"G".ljust(188, b"\0") * 6,
    "AAC as LATM": b"\x56\xe0\x20",
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("form", ["wav", "mp3"])
def test_another_form_is_refused_by_its_mark(name, form):
    notes = b"ID3\x04\x00\x00\x00\x00\x00\x05hello"
    for raw in (OTHERS[name], notes + OTHERS[name]):
        with pytest.raises(OtherSoundError) as told:
            sound(raw + bytes(3_000), form)
        assert str(told.value) == name


@pytest.mark.parametrize("raw", [ogg_opus([OPUS] * 9), webm([OPUS] * 9), m4a(9)], ids=["ogg", "webm", "m4a"])
def test_what_is_taken_is_taken_without_notes_alone(raw):
    assert sound(raw, "x").at_most > 0
    # A decoder passes over the notes of any form.
    with pytest.raises(OtherSoundError, match="behind ID3 notes"):
        sound(b"ID3\x04\x00\x00\x00\x00\x00\x05hello" + raw, "mp3")


@given(st.binary(max_size=60))
def test_what_ogg_holds_makes_it_no_other_form(data):
    raw = ogg_opus([OPUS_HEAD + data])
    assert sound(raw, "ogg").at_most >= 0
