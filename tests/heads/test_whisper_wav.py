"""WAV files: samples come back as they were through every header, what cannot be read is refused, and damage makes nothing large."""

import contextlib
import os
import struct
import wave

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import DataError
from anabranch.heads.whisper.sound import RATE, check_sound, read_sound, resampled
from anabranch.heads.whisper.wav import WavForm, read_wav, wav_form

TAIL = "0000 0000 1000 8000 00AA 0038 9B71"


def part(name, held, size=None):
    return name + struct.pack("<I", len(held) if size is None else size) + held + b"\0" * (len(held) % 2)


def form(tag=1, channels=1, rate=RATE, bits=16, *, align=None, valid=None, tail=TAIL):
    """The format; extensible with ``valid`` bits."""
    align = channels * ((bits + 7) // 8) if align is None else align
    head = 0xFFFE if valid is not None else tag
    made = struct.pack("<HHIIHH", head, channels, rate, rate * align % 2**32, align, bits)
    return made if valid is None else made + struct.pack("<HHIH", 22, valid, 3, tag) + bytes.fromhex(tail)


def file_of(told, held, *, before=b"", size=None):
    body = before + part(b"fmt ", told) + part(b"data", held, size)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


def packed(values, width):
    """Whole numbers as they stand in a file, from -2^(bits-1)."""
    return b"".join(
        bytes([value + 128]) if width == 1 else value.to_bytes(width, "little", signed=True) for value in values
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("wav") / "a.wav"


@given(data=st.data(), width=st.integers(1, 4), channels=st.integers(1, 6), extensible=st.booleans())
def test_whole_numbers_come_back_exactly(path, data, width, channels, extensible):
    most = 2 ** (8 * width - 1)
    frames = data.draw(
        st.lists(st.lists(st.integers(-most, most - 1), min_size=channels, max_size=channels), min_size=1)
    )
    before = data.draw(st.sampled_from([b"", part(b"JUNK", b"abc"), part(b"LIST", bytes(8)) + part(b"fact", bytes(4))]))
    # Who records 20 bits puts them highest in 24.
    valid = data.draw(st.integers(1, 8 * width)) if extensible else None
    held = packed([value for frame in frames for value in frame], width)
    path.write_bytes(
        file_of(form(1, channels, RATE, 8 * width, valid=valid), held, before=before) + part(b"LIST", bytes(6))
    )
    found = wav_form(path)
    assert (found.channels, found.rate, found.width, found.length) == (channels, RATE, width, len(frames))
    wanted_TC = (np.array(frames, np.float64) / most).astype(np.float32)
    sound_T = read_sound(path)
    assert torch.equal(sound_T, torch.from_numpy(wanted_TC.mean(1)))
    if channels == 1:
        assert [float(value) * most for value in sound_T] == [float(np.float32(frame[0])) for frame in frames]


@given(
    values=st.lists(st.floats(-1, 1, width=32), min_size=1),
    extensible=st.booleans(),
    bits=st.sampled_from([32, 64]),
    loud=st.sampled_from([1.5, -7.0, float("inf")]),
)
def test_floats_come_back_exactly_and_what_is_too_loud_is_cut_off(path, values, extensible, bits, loud):
    held = struct.pack(f"<{len(values) + 1}{'f' if bits == 32 else 'd'}", *values, loud)
    path.write_bytes(file_of(form(3, 1, RATE, bits, valid=bits if extensible else None), held))
    assert read_sound(path).tolist() == [*values, 1.0 if loud > 0 else -1.0]


def test_what_is_no_number_is_refused(path):
    path.write_bytes(file_of(form(3, 1, RATE, 32), struct.pack("<2f", 0.5, float("nan"))))
    with pytest.raises(DataError, match=r"a.wav has samples that are no numbers"):
        read_sound(path)


@given(values=st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1), channels=st.integers(1, 2))
def test_it_is_what_the_standard_library_writes(path, values, channels):
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, RATE, 0, "NONE", ""))
        file.writeframes(packed([value for value in values for _ in range(channels)], 2))
    assert read_sound(path).tolist() == [value / 2**15 for value in values]


def test_many_samples_are_read_in_pieces(path, monkeypatch):
    sample_TC = np.random.default_rng(0).integers(-(2**15), 2**15, (1000, 3)).astype("<i2")
    path.write_bytes(file_of(form(1, 3), sample_TC.tobytes()))
    whole_T = read_sound(path)
    monkeypatch.setattr("anabranch.heads.whisper.wav._AT_ONCE", 100)
    assert torch.equal(read_sound(path), whole_T)
    assert len(whole_T) == 1000


def test_a_length_that_was_never_written_ends_with_the_file(path):
    """As ffmpeg writes into a pipe; and a file that was cut off in the middle of a frame."""
    held = packed(range(100), 2)
    path.write_bytes(file_of(form(channels=2), held, size=0xFFFFFFFF))
    assert len(read_sound(path)) == 50
    path.write_bytes(file_of(form(channels=2), held)[:-3])
    assert len(read_sound(path)) == 49
    # It may become shorter between both looks.
    told = wav_form(path)
    path.write_bytes(path.read_bytes()[:-20])
    assert len(read_wav(path, told)) == 44


WRONG = {
    "empty": (b"", "it does not begin as one"),
    "of the other byte order": (b"RIFX" + file_of(form(), b"ab")[4:], "it does not begin as one"),
    "another RIFF": (b"RIFF\x04\0\0\0AVI ", "it does not begin as one"),
    "without a format": (b"RIFF\x04\0\0\0WAVE", "it does not say the format"),
    "without samples": (file_of(form(), b"")[:36], "it has no samples"),
    "samples first": (
        b"RIFF\0\0\0\0WAVE" + part(b"data", b"ab") + part(b"fmt ", form()),
        "before it says their format",
    ),
    "a cut format": (file_of(form()[:15], b"ab"), "the format of its samples is cut off"),
    "a cut extensible header": (file_of(form(valid=16)[:39], b"ab"), "its extensible header is cut off"),
    "a format without a tag": (file_of(form(valid=16, tail="11" * 14), b"ab"), "of the format 0100111111"),
    "A-law": (file_of(form(6, bits=8), b"ab"), r"are A-law of 8 bits \(tag 0x0006\)"),
    "extensible mu-law": (file_of(form(7, bits=8, valid=8), b"ab"), r"are mu-law of 8 bits \(tag 0x0007\)"),
    "MP3": (file_of(form(0x55, bits=0, align=1), b"ab"), r"are MP3 of 0 bits \(tag 0x0055\)"),
    "an unknown tag": (file_of(form(0x1234), b"ab"), r"are another format of 16 bits \(tag 0x1234\)"),
    "whole numbers of 64 bits": (file_of(form(bits=64), bytes(8)), "are whole numbers of 64 bits"),
    "floats of 16 bits": (file_of(form(3), b"ab"), "are floats of 16 bits"),
    "no bits": (file_of(form(bits=0), b"ab"), "are whole numbers of 0 bits"),
    "no channel": (file_of(form(channels=0), b"ab"), "it has 0 channels of 16 bits in 0 bytes"),
    "24 bits in 4 bytes": (file_of(form(bits=24, align=4), bytes(4)), "it has 1 channels of 24 bits in 4 bytes"),
    "a rate of 1 Hz": (file_of(form(rate=1), b"ab"), "it has 1 samples a second; 1,000 to 768,000 are read"),
    "a rate below all": (file_of(form(rate=999), b"ab"), "it has 999 samples a second"),
    "a rate above all": (file_of(form(rate=768_001), b"ab"), "it has 768,001 samples a second"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_read_is_refused(path, case):
    held, message = WRONG[case]
    path.write_bytes(held)
    for read in (check_sound, read_sound):
        with pytest.raises(DataError, match=rf"cannot read .*a.wav as a WAV: .*{message}"):
            read(path)


@pytest.mark.parametrize("rate", [1_000, 768_000])
def test_rates_at_the_ends_are_read(path, rate):
    path.write_bytes(file_of(form(rate=rate), bytes(200)))
    assert len(read_sound(path)) == max(1, -(-100 * RATE // rate))


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    for each in (tmp_path / "pipe.wav", tmp_path):
        with pytest.raises(DataError, match="as a WAV: it is no file"):
            check_sound(each)
    with pytest.raises(DataError, match="as a WAV: No such file"):
        check_sound(tmp_path / "nowhere.wav")


def test_endless_parts_are_not_gone_through(path):
    path.write_bytes(file_of(form(), b"ab", before=part(b"JUNK", b"") * 999))
    with pytest.raises(DataError, match="it has no samples"):
        check_sound(path)
    path.write_bytes(file_of(form(), b"ab", before=part(b"JUNK", b"") * 998))
    assert check_sound(path) == WavForm(1, RATE, 2, False, 12 + 998 * 8 + 24 + 8, 1)


def test_what_is_too_long_is_refused_before_it_is_read(path):
    path.write_bytes(file_of(form(rate=1_000, bits=8), b"", size=0xFFFFFFFF))
    head = path.stat().st_size
    os.truncate(path, head + 12 * 3600 * 1_000)
    assert check_sound(path).length == 12 * 3600 * 1_000
    os.truncate(path, head + 12 * 3600 * 1_000 + 360_000)
    for read in (check_sound, read_sound):
        with pytest.raises(DataError, match=r"a.wav lasts 12.1 h; up to 12 h are read at once, so cut it"):
            read(path)
    path.unlink()


@given(
    changes=st.lists(st.tuples(st.integers(0, 67), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.integers(0, 400),
    extensible=st.booleans(),
)
def test_a_damaged_file_is_read_or_refused_and_never_becomes_large(path, changes, cut, extensible):
    held = bytearray(file_of(form(valid=16 if extensible else None), packed(range(150), 2)))
    for place, value in changes:
        held[place] = value
    path.write_bytes(held[: len(held) - cut])
    with contextlib.suppress(DataError):
        sound_T = read_sound(path)
        assert 0 < len(sound_T) <= 16 * len(held)
        assert bool(sound_T.isfinite().all())


@given(
    rate=st.one_of(st.integers(1_000, 50_000), st.sampled_from([8_000, 44_100, 48_000, 96_000])),
    count=st.integers(1, 60),
)
def test_a_sample_of_another_rate_is_the_windowed_sinc_of_those_around_it(rate, count):
    """With a naive loop."""
    sound_T = torch.randn(count, generator=torch.Generator().manual_seed(rate))
    found_T = resampled(sound_T, rate)
    assert len(found_T) == (count if rate == RATE else max(1, -(-count * RATE // rate)))
    if rate == RATE:
        assert torch.equal(found_T, sound_T)
        return
    lower = min(1.0, RATE / rate)
    reach = int(np.ceil(24 / lower))
    for number in {0, len(found_T) // 3, len(found_T) - 1}:
        at = number * rate / RATE
        away_T = np.arange(count) - at
        window_T = np.cos(np.pi / 2 * away_T / (reach + 1)) ** 2
        whole_T = np.abs(np.arange(count) - np.floor(at)) <= reach
        wanted = (sound_T.numpy() * lower * np.sinc(lower * away_T) * window_T * whole_T).sum()
        assert abs(float(found_T[number]) - wanted) < 1e-5


def test_resampling_in_pieces_is_resampling_at_once(monkeypatch):
    sound_T = torch.randn(1_000, generator=torch.Generator().manual_seed(0))
    for rate in (44_100, 47_999, 8_000):
        whole_T = resampled(sound_T, rate)
        with monkeypatch.context() as patched:
            patched.setattr("anabranch.heads.whisper.sound._AT_ONCE", 30_000)
            torch.testing.assert_close(resampled(sound_T, rate), whole_T, atol=1e-6, rtol=0)
