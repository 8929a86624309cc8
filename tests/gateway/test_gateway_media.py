"""What images, audio and files count: exact cases of each rule, and never less than a provider makes of it."""

import base64
import math
import struct
import zlib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.media_tokens import (
    AUDIO_A_SECOND,
    IMAGE_MOST,
    IMAGE_TOKENS,
    PAGE_MOST,
    PAGE_TOKENS,
    PAGES,
    STREAM_MOST,
    Media,
    audio,
    file,
    image,
)
from anabranch.gateway.prompt_tokens import count_prompt, last_text, predicted_tokens
from anabranch.gateway.providers.generate_content import _part
from anabranch.gateway.providers.provider import UpstreamError
from anabranch.gateway.sound_packets import OtherSoundError


def coded(raw):
    return base64.b64encode(raw).decode()


def png(width, height):
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height) + b"\x08\x02\0\0\0"


def gif(width, height):
    first = b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0)
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x81, 0, 0) + b"\x2c" * 12 + first


def jpeg(width, height):
    note = b"\xff\xe1" + struct.pack(">H", 5_002) + b"\xff\xc0" * 2_500  # a note that holds what looks like a size
    return b"\xff\xd8" + note + b"\xff\xff\xc2" + struct.pack(">HBHHB", 17, 8, height, width, 3) + b"\0" * 20


def webp(kind, width, height):
    bodies = {
        "VP8 ": b"\0" * 4 + b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height),
        "VP8L": b"\0" * 4 + b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14),
        "VP8X": b"\0" * 4 + b"\0" * 4 + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"),
    }
    return b"RIFF\0\0\0\0WEBP" + kind.encode() + bodies[kind] + b"\0" * 20


def url(raw, kind="image/png"):
    return f"data:{kind};base64,{coded(raw)}"


FORMS = [
    png,
    gif,
    jpeg,
    *(lambda width, height, kind=kind: webp(kind, width, height) for kind in ("VP8 ", "VP8L", "VP8X")),
]


@pytest.mark.parametrize("form", FORMS)
def test_the_size_of_an_image_is_read(form):
    assert image(url(form(1500, 1000))) == Media(IMAGE_TOKENS, math.ceil(2.46 * 47 * 32), "image")
    assert image(url(form(300, 200))).tokens == 85
    assert image(url(form(750, 500))).tokens == 500


@given(st.sampled_from(FORMS), st.integers(1, 8000), st.integers(1, 8000))
def test_an_image_is_never_more_than_what_is_reserved_for_it(form, width, height):
    found = image(url(form(width, height)))
    anthropic = min(math.ceil(width * height / 750), 4_784)
    scale = min(1, 2048 / max(width, height))
    scale *= min(1, 768 / (min(width, height) * scale))
    across, down = (math.ceil(round(side * scale / 512, 6)) for side in (width, height))
    openai = 85 + 170 * across * down
    patches = 2.46 * min(math.ceil(width / 32) * math.ceil(height / 32), 1536)
    gemini = 258 if max(width, height) <= 384 else 258 * math.ceil(width / 768) * math.ceil(height / 768)
    assert found.at_most >= max(anthropic, openai, patches, gemini)
    assert found.tokens <= found.at_most


@pytest.mark.parametrize(
    "given_",
    [
        "https://x/y.png",
        "",
        "data:",
        "data:image/png;base64,",
        "data:image/png;base64,!!!",
        url(b"\xff\xd8\xff"),
        url(png(0, 5)),
        url(b"RIFF\0\0\0\0WEBPVP8 "),
        "data:" + "x" * 10_000,
    ],
)
def test_an_image_whose_size_is_not_known(given_):
    assert image(given_) == Media(IMAGE_TOKENS, IMAGE_MOST, "image")


def wav(seconds, samples=16_000, channels=1, bits=16, form=1, rate=None):
    rate = samples * channels * bits // 8 if rate is None else rate
    head = b"RIFF\0\0\0\0WAVEfmt " + struct.pack(
        "<IHHIIHH", 16, form, channels, samples, rate, channels * bits // 8, bits
    )
    return head + b"data\0\0\0\0" + b"\0" * (int(seconds * samples * channels * bits // 8))


def test_audio_counts_by_seconds():
    clip = {"data": coded(wav(10)), "format": "wav"}
    assert audio(clip).tokens == audio(clip).at_most == pytest.approx(10 * AUDIO_A_SECOND, abs=2)
    assert audio({"data": coded(wav(10, samples=48_000, channels=2)), "format": "wav"}).at_most == pytest.approx(
        320, abs=2
    )
    # The fewer of what it says in two ways.
    lies = audio({"data": coded(wav(10, rate=10**9)), "format": "wav"})
    assert lies.at_most == pytest.approx(320, abs=2)
    mp3 = audio({"data": "x" * 750_000, "format": "mp3"})
    assert mp3.tokens == math.ceil(562_500 / 16_000 * 32)
    assert mp3.at_most == math.ceil(562_500 / 1_000 * 32) == 18_000  # it was a million
    assert audio({"data": 5, "format": "mp3"}) is None
    assert audio({}) is None


# Containers that hold what looks like a size, before the size


def riff(*chunks):
    body = b"WAVE" + b"".join(
        name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for name, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def fmt(samples, channels=1, bits=8, form=1, rate=None):
    rate = samples * channels * bits // 8 if rate is None else rate
    return b"fmt ", struct.pack("<HHIIHH", form, channels, samples, rate, channels * bits // 8 % 65_536, bits)


DECOY = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 60_000, 4 * 10**9, 4 * 10**9, 1, 8)
SAMPLES = b"data", b"\x80" * 8000 * 60


def clip_of(raw, form="wav"):
    return audio({"data": coded(raw), "format": form}).at_most


HONEST = 60 * AUDIO_A_SECOND


@pytest.mark.parametrize(
    "chunks",
    [
        [fmt(8000)],
        [(b"LIST", b"INFO" + DECOY), fmt(8000)],
        [(b"LIST", b"INFO" + DECOY + b"x"), fmt(8000)],
        [(b"JUNK", b"\0" * 20_000), fmt(8000)],
        [fmt(384_000, 32, 64), fmt(8000)],
        [fmt(8000), fmt(384_000, 32, 64)],
        [fmt(8000), (b"LIST", DECOY)],
        [fmt(4 * 10**9, 60_000, 8, rate=4 * 10**9)],
        [fmt(8000, 1, 65_535)],
        [fmt(8000, form=2, rate=4 * 10**9)],
        [(b"fmt ", b"x" * 7), fmt(8000)],
        [],
    ],
)
@pytest.mark.parametrize("form", ["wav", "mp3"])
def test_a_clip_is_as_long_as_whoever_decodes_it_finds(chunks, form):
    """A minute was reserved as 11 tokens, for a note before its format."""
    assert clip_of(riff(*chunks, SAMPLES), form) >= HONEST


def test_an_honest_clip_is_not_reserved_for_more():
    assert clip_of(riff((b"LIST", b"INFO" + DECOY), fmt(8000), SAMPLES)) <= HONEST + 2


def test_a_slow_clip_is_long_whatever_it_is_called():
    raw = riff(fmt(100), (b"data", b"\x80" * 6000))
    assert clip_of(raw, "wav") == clip_of(raw, "mp3") >= HONEST
    assert clip_of(riff(fmt(160, form=0x11), (b"data", b"\x80" * 4800))) >= HONEST


@given(
    st.lists(
        st.tuples(st.sampled_from([b"LIST", b"JUNK", b"bext", b"fmt_", b"fact"]), st.binary(max_size=60)), max_size=4
    ),
    st.integers(1, 48_000),
    st.integers(1, 8),
    st.sampled_from([8, 16, 24, 32]),
    st.booleans(),
)
def test_no_note_makes_a_clip_shorter(notes, samples, channels, bits, decoys):
    notes = [(name, data + DECOY * decoys) for name, data in notes]
    raw = riff(*notes, fmt(samples, channels, bits), (b"data", b"\0" * 5000))
    assert clip_of(raw) >= 5000 / (samples * channels * bits // 8) * AUDIO_A_SECOND


SMALL = b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, 1, 1, 3) + b"\0" * 20
MARKS = st.sampled_from(
    [b"\xff", b"\xff\x01", b"\xff\xd0", b"\xff\xd7", b"\xff\xfe\0\x16" + SMALL[:20], b"\xff\xc4\0\x16" + SMALL[:20]]
)


@given(st.lists(MARKS, max_size=6), st.integers(1000, 8000), st.integers(1000, 8000))
def test_no_mark_of_a_jpeg_hides_its_size(marks, width, height):
    size = b"\xff\xc2" + struct.pack(">HBHHB", 17, 8, height, width, 3)
    raw = b"\xff\xd8" + b"".join(marks) + size + b"\0" * 20 + SMALL
    assert image(url(raw)) == image(url(jpeg(width, height)))


@given(
    st.lists(st.binary(min_size=1, max_size=255), max_size=4),
    st.integers(1, 4000),
    st.integers(1, 4000),
    st.integers(0, 7),
)
def test_a_gif_is_as_large_as_its_first_picture(notes, width, height, colours):
    blocks = b"".join(b"\x21\xfe" + bytes([len(note)]) + note + b"\0" for note in notes)
    first = b"\x2c" + struct.pack("<HHHHB", 3, 4, width, height, 0)
    raw = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80 | colours, 0, 0) + b"\x2c" * (3 << colours + 1) + blocks + first
    assert image(url(raw)) == image(url(png(width + 3, height + 4)))


def test_a_png_whose_first_part_is_another_is_of_no_known_size():
    assert (
        image(url(b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 4, b"CgBI", 1, 1) + png(4000, 4000)[8:])).at_most
        == IMAGE_MOST
    )


@given(
    st.sampled_from([b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8", b"RIFF\0\0\0\0WEBP", b"RIFF\0\0\0\0WAVE", b""]),
    st.binary(max_size=200),
)
def test_anything_is_counted(head, rest):
    for count in (lambda: image(url(head + rest)), lambda: audio({"data": coded(head + rest), "format": "wav"})):
        with suppress(OtherSoundError):
            assert (found := count()).at_most >= found.tokens >= 0


def pdf(pages, extra=b""):
    kids = b"".join(b"%d 0 obj <</Type /Page /Parent 1 0 R>> endobj\n" % number for number in range(pages))
    return b"%PDF-1.4\n1 0 obj <</Type /Pages /Count " + str(pages).encode() + b">> endobj\n" + kids + extra


@pytest.mark.parametrize("prefix", ["data:application/pdf;base64,", ""])
def test_a_pdf_counts_by_pages(prefix):
    filler = b"\0" * 200_000
    found = file({"file_data": prefix + coded(pdf(3, filler)), "filename": "a.pdf"})
    assert found == Media(3 * PAGE_TOKENS, 3 * PAGE_MOST)
    hidden = b"1 0 obj <</Type /ObjStm>> stream" + zlib.compress(pdf(3)) + filler
    raw = coded(b"%PDF-1.5\n" + hidden)
    assert file({"file_data": prefix + raw}) == Media(PAGE_TOKENS, len(raw))
    raw = coded(b"%PDF-1.5\n" + hidden + filler * 5)
    assert file({"file_data": prefix + raw}) == Media(PAGE_TOKENS, PAGES * PAGE_MOST)
    lies = file({"file_data": prefix + coded(pdf(1, b"/Count 9999999"))})
    assert lies.tokens <= lies.at_most


def test_other_files():
    assert file({"file_data": "data:text/csv;base64," + coded(b"a,b\n" * 300)}) == Media(300, 1200)
    assert file({"file_id": "file-1"}) == Media(PAGE_TOKENS, PAGES * PAGE_MOST)
    assert file({"file_data": "data:application/zip;base64,AAAA"}) is None  # its letters count
    assert file({"file": "x"}) is None


def count(*parts):
    return count_prompt({"messages": [{"role": "user", "content": list(parts)}]})


def test_a_prompt_counts_each_part_by_its_rule_and_what_else_is_said_as_text():
    around = 7
    clip = {"type": "input_audio", "input_audio": {"data": coded(wav(10)), "format": "wav"}}
    assert count(clip).at_most == around + audio(clip["input_audio"]).at_most + len("wav")
    paper = {
        "type": "file",
        "file": {"file_data": "data:application/pdf;base64," + coded(pdf(2, b"\0" * 50_000)), "filename": "a" * 40},
    }
    assert count(paper).at_most == around + 2 * PAGE_MOST + 40
    for name, inner in (("input_audio", clip["input_audio"]), ("file", paper["file"])):
        assert count({"type": name, name: {**inner, "type": "x" * 5000}}).at_most >= 5000
        assert count({"type": name, name: inner, "note": "x" * 5000}).at_most >= 5000
    picture = {"type": "image_url", "image_url": {"url": url(png(300, 200)), "detail": "x" * 5000}}
    assert count(picture).at_most == around + 85 + 8 * 170 + 5000
    assert count({"type": "input_image", "image_url": url(png(300, 200))}).at_most == around + 85 + 8 * 170
    for odd in (
        {"type": "file", "file": "x" * 5000},
        {"type": "input_audio", "input_audio": {"data": {"a": "x" * 5000}}},
        {"type": ["file"], "file": "x" * 5000},
        {"type": "file", "file": {"data": "x" * 5000}},
    ):
        assert count(odd).at_most >= 5000


def test_what_is_no_text_is_no_part_of_the_question():
    parts = [
        {"type": "text", "text": "what is this?"},
        {"type": "image_url", "image_url": {"url": url(png(3, 2)), "detail": "high"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}},
    ]
    assert last_text([{"role": "user", "content": parts}]) == "what is this?"


def test_a_clip_is_not_walked_through_for_the_texts_beside_it():
    """One that cannot be read is refused where it is counted, and nowhere else."""
    data = base64.b64encode(b"#!AMR\n" + bytes(99)).decode()
    clip = {"type": "input_audio", "input_audio": {"data": data, "format": "amr"}}
    content = [clip, {"type": "text", "text": "four"}]
    assert last_text([{"role": "user", "content": content}]) == "four"
    assert predicted_tokens({"prediction": {"type": "content", "content": content}}) == 4
    assert predicted_tokens({"prediction": {"content": "é"}}) == 2
    for odd in (None, 3, [], {"content": 3}, {"content": [None, [], {"text": 4}]}):
        assert predicted_tokens({"prediction": odd}) == 0


@given(
    st.recursive(
        st.text(max_size=9) | st.integers() | st.none(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    ["type", "file", "file_data", "file_id", "input_audio", "data", "format", "image_url", "url"]
                ),
                inner,
            )
        ),
    )
)
def test_parts_of_any_shape_are_counted(part):
    found = count(*(part if isinstance(part, list) else [part]))
    assert 0 < found.tokens <= found.at_most


PAPER = PAGES * PAGE_MOST


@pytest.mark.parametrize(
    ("part", "most"),
    [
        ({"type": "document", "source": {"type": "url", "url": "https://x.org/a.pdf"}}, PAPER),
        ({"type": "document", "source": {"type": "file", "file_id": "file_1"}}, PAPER),
        ({"type": "image", "source": {"type": "file", "file_id": "file_1"}}, IMAGE_MOST),
        ({"type": "tool_result", "content": [{"type": "document", "source": {"type": "file", "file_id": "f"}}]}, PAPER),
        ({"type": "tool_result", "content": [{"type": "file", "file": {"file_id": "f"}}]}, PAPER),
        ({"type": "file", "file": {"file_data": "https://x.org/a.pdf"}}, PAPER),
        ({"type": "file", "file": {"file_url": "https://x.org/a"}}, PAPER),
        # What some providers call theirs.
        ({"type": "document_url", "document_url": "https://x.org/a.pdf"}, PAPER),
        ({"type": "document_url", "document_url": {"url": "https://x.org/a.pdf"}}, PAPER),
        ({"type": "input_file", "file_url": "https://x.org/a.pdf"}, PAPER),
        ({"type": "file_url", "file_url": {"url": "https://x.org/a.pdf"}}, PAPER),
        ({"type": "tool_result", "content": [{"type": "document_url", "document_url": "https://x.org/a.pdf"}]}, PAPER),
        ({"type": "video", "video": ["https://x.org/1.png"] * 5}, 5 * IMAGE_MOST),
        # Addresses where data may be, texts where tables may be, and more than one beside each other.
        ({"type": "input_audio", "input_audio": {"data": "https://x.org/hours.wav", "format": "wav"}}, STREAM_MOST),
        ({"type": "input_audio", "input_audio": "https://x.org/hours"}, STREAM_MOST),
        (
            {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav", "url": "https://x.org/a"}},
            STREAM_MOST + 1,
        ),
        ({"type": "video_url", "video_url": "https://x.org/film"}, STREAM_MOST),
        ({"video_url": "https://x.org/film"}, STREAM_MOST),
        ({"type": "video", "video": "https://x.org/film"}, STREAM_MOST),
        ({"type": "audio", "audio": {"url": "https://x.org/clip"}}, STREAM_MOST),
        ({"type": "media", "file_uri": "gs://x/a"}, PAPER),
        ({"type": "file", "file": "https://x.org/a.pdf"}, PAPER),
        ({"type": "file", "file": {"url": "https://x.org/a.pdf"}}, PAPER),
        # Who gets it looks at what it is.
        ({"type": "file", "file": {"file_data": "https://x.org/a.png"}}, PAPER),
        ({"type": "input_file", "file_data": "https://x.org/a.pdf"}, PAPER),
        (
            {"type": "image_url", "image_url": {"url": "https://x.org/y.png"}, "document_url": "https://x.org/a.pdf"},
            PAPER + IMAGE_MOST,
        ),
        (
            {"type": "file", "file": {"file_url": "https://x.org/a"}, "video_url": "https://x.org/film"},
            PAPER + STREAM_MOST,
        ),
        (
            {
                "type": "tool_result",
                "content": [{"type": "input_audio", "input_audio": {"data": "https://x.org/hours.wav"}}],
            },
            STREAM_MOST,
        ),
        # What is within it is no address, nor is what a text or a search says.
        (
            {"type": "input_audio", "input_audio": {"data": "data:;base64," + "AAAA" * 10**5, "format": "mp3"}},
            300 * AUDIO_A_SECOND,
        ),
        ({"type": "text", "text": "https://x.org/a.pdf"}, 0),
        (
            {
                "type": "tool_result",
                "content": [{"type": "web_search_result", "url": "https://x.org/a.pdf", "title": "a"}],
            },
            0,
        ),
        ({"type": "document_url", "document_url": "data:application/pdf;base64,AAAA"}, 0),
        ({"type": "text", "text": "a", "file_url": ""}, 0),
        ({"type": "file", "file": {"file_data": "gs://x/film.mp4"}}, STREAM_MOST),
        ({"type": "video_url", "video_url": {"url": "https://x.org/film"}}, STREAM_MOST),
        ({"type": "audio_url", "audio_url": {"url": "https://x.org/clip"}}, STREAM_MOST),
        ({"type": "image_url", "image_url": {"url": "https://x.org/film.mp4"}}, STREAM_MOST),
        ({"type": "image_url", "image_url": {"url": "data:audio/mp3;base64," + "AAAA" * 10**5}}, 300 * AUDIO_A_SECOND),
        ({"type": "file", "file": {"file_data": "data:audio/mp3;base64," + "AAAA" * 10**5}}, 300 * AUDIO_A_SECOND),
    ],
)
def test_what_is_named_counts_as_what_it_may_be(part, most):
    found = count(part)
    assert most <= found.at_most <= most + 250
    assert found.tokens <= found.at_most


def test_sound_is_sound_whatever_part_it_comes_in():
    clip = "data:audio/mp3;base64," + "AAAA" * 10**5
    assert count({"type": "image_url", "image_url": {"url": clip}}).audio == 300 * AUDIO_A_SECOND
    assert count({"type": "image_url", "image_url": {"url": "https://x.org/a.png?b.mp4"}}).images == IMAGE_MOST


@pytest.mark.parametrize("url", ["https://x.org/film.mp4", "data:audio/mp3;base64,AAAA", "data:application/pdf,x"])
def test_gemini_is_sent_no_film_as_an_image(url):
    with pytest.raises(UpstreamError, match="must be an image"):
        _part({"type": "image_url", "image_url": {"url": url}})


def test_a_picture_that_a_model_made_counts_as_one_when_it_goes_back():
    """It is in ``images`` of the message, and was counted by its letters."""
    url = "data:image/png;base64," + "A" * 10**6
    made = {"role": "assistant", "content": "Here.", "images": [{"type": "image_url", "image_url": {"url": url}}]}
    asked = [{"role": "user", "content": "again"}]
    plain = count_prompt({"messages": [{"role": "assistant", "content": "Here."}, *asked]})
    counted = count_prompt({"messages": [made, *asked]})
    assert (counted.at_most, counted.images) == (plain.at_most + image(url).at_most, image(url).at_most)
    # What is no picture is a text that is paid for.
    assert count_prompt({"messages": [{**made, "images": "x" * 999}]}).at_most > 999
