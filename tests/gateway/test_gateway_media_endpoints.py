"""Pictures, sound, moderation and ranking through the gateway, with keys, budgets and a ledger, before a server that is asked for real."""

import asyncio
import io
import json
import threading
import wave
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig
from anabranch.gateway.dispatch.bill import bill
from anabranch.gateway.dispatch.billed import whole_at_most
from anabranch.gateway.forms import parse_form
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.app import App
from anabranch.gateway.media_requests import (
    asked_of_media,
    check_media,
    count_media,
    in_seconds,
    is_by_second,
    most_made,
)
from anabranch.gateway.media_tokens import heard_seconds, sound
from anabranch.gateway.providers.media import PATHS, Upload, encoded, read, usage_of
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.providers.provider import UpstreamRequest
from anabranch.gateway.providers.scenes import Behaviour
from anabranch.gateway.providers.usage import Usage
from anabranch.gateway.sound_packets import OtherSoundError
from anabranch.routers.money import Price
from anabranch.web.api_error import ApiError

openai = pytest.importorskip("openai")
SOUND = b"ID3\x04\x00--\r\n\r\n" + bytes(range(256)) * 40
ANSWERS = {
    "/v1/images/generations": {
        "created": 1,
        "data": [{"b64_json": "AAAA"}, {"b64_json": "BBBB"}],
        "usage": {
            "input_tokens": 9,
            "output_tokens": 2112,
            "total_tokens": 2121,
            "input_tokens_details": {"text_tokens": 9, "image_tokens": 0},
        },
    },
    "/v1/images/edits": {"created": 1, "data": [{"b64_json": "AAAA"}]},
    "/v1/audio/transcriptions": {
        "text": "hello",
        "usage": {
            "type": "tokens",
            "input_tokens": 14,
            "output_tokens": 5,
            "input_token_details": {"audio_tokens": 14},
        },
    },
    "/v1/audio/translations": {"text": "hello", "usage": {"type": "duration", "seconds": 3.2}},
    "/v1/moderations": {
        "id": "m",
        "model": "x",
        "results": [{"flagged": False, "categories": {}, "category_scores": {}}],
    },
    "/v1/rerank": {"results": [{"index": 1, "relevance_score": 0.9}], "usage": {"total_tokens": 21}},
}


@pytest.fixture
def upstream():
    seen = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            """Nothing."""

        def do_POST(self):
            raw, kind = self.rfile.read(int(self.headers["content-length"])), self.headers["content-type"]
            body = parse_form(raw, kind) if kind.startswith("multipart/") else json.loads(raw)
            seen.append((self.path, body))
            data = SOUND if self.path == "/v1/audio/speech" else json.dumps(ANSWERS[self.path]).encode()
            if body.get("response_format") == "srt":
                data = b"1\n00:00:00,000 --> 00:00:01,000\nhello\n"
            self.send_response(200)
            self.send_header("content-type", "application/octet-stream")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    server.shutdown()
    server.server_close()


def through(upstream, tmp_path, work, **price):
    """What ``await work(client, gateway)`` gives, and all rows of the ledger, oldest first."""
    provider = OpenAI.Config(model="theirs", base_url=upstream[0], key_env=None)
    made = ModelConfig(name="ours", price=Price(**price), deployments=(DeploymentConfig(provider=provider),))
    config = GatewayConfig(models=(made,), store=str(tmp_path / "g.db"))

    async def main():
        async with Gateway(config) as gateway:
            server = App(gateway).server()
            listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
            key, _ = await gateway.store.create_key("one")
            url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
            try:
                async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as client:
                    found = await work(client, gateway)
                await gateway.settled()
                return found, (await gateway.store.ledger())[::-1]
            finally:
                listener.close()
                await server.shutdown(0.1)

    return asyncio.run(main())


def test_each_endpoint_passes_through_and_has_its_row(upstream, tmp_path):
    async def work(client, gateway):
        images = await client.images.generate(model="ours", prompt="a river", n=2, size="1024x1024")
        assert [one.b64_json for one in images.data] == ["AAAA", "BBBB"]
        pictures = [("a.png", b"\x89PNG\r\n\x1a\n--", "image/png"), ("b.png", b"\x00\xff\r\n", "image/png")]
        assert (await client.images.edit(model="ours", prompt="more", image=pictures)).data[0].b64_json == "AAAA"
        speech = await client.audio.speech.create(model="ours", voice="alloy", input="hello", response_format="opus")
        assert (speech.content, speech.response.headers["content-type"]) == (SOUND, "audio/ogg")
        text = await client.audio.transcriptions.create(
            model="ours", file=("a.mp3", SOUND, "audio/mpeg"), language="nl"
        )
        assert text.text == "hello"
        form = {"headers": {"content-type": "multipart/form-data"}}
        sound = [("file", ("a.mp3", SOUND, "audio/mpeg"))]
        spoken = await client.post(
            "/audio/translations", cast_to=object, body={"model": "ours"}, files=sound, options=form
        )
        assert spoken["text"] == "hello"
        srt = await client.audio.transcriptions.create(
            model="ours", file=("a.mp3", SOUND, "audio/mpeg"), response_format="srt"
        )
        assert srt.startswith("1\n00:00")
        assert not (await client.moderations.create(model="ours", input=["a", "b"])).results[0].flagged
        ranked = await client.post(
            "/rerank", body={"model": "ours", "query": "q", "documents": ["a", "b"]}, cast_to=object
        )
        assert ranked["results"][0]["index"] == 1

    _, rows = through(
        upstream, tmp_path, work, input=1_000_000, output=10_000_000, image_output=40_000_000, audio_input=6_000_000
    )
    seen = upstream[1]
    assert {row.status for row in rows} == {"ok"}
    assert [(row.prompt_tokens, row.completion_tokens) for row in rows[:2]] == [
        (9, 2112),
        (rows[1].prompt_tokens, 8192),
    ]
    assert [(row.prompt_tokens, row.completion_tokens) for row in rows[2:5]] == [(5, 52), (14, 5), (4, 0)]
    assert [row.cost_nano for row in rows[:1]] == [9 + 2112 * 40]
    assert [row.cost_nano for row in rows[3:5]] == [14 * 6 + 50, 4 * 6]
    # What was heard and read of an answer without usage is charged: the sound by its bytes, and each byte of the text.
    count = count_media("transcriptions", seen[5][1])
    assert rows[5].cost_nano == 6 * count.audio + (count.at_most - count.audio) + 10 * 38
    assert {body["model"] for _, body in seen} == {"theirs"}
    edited = seen[1][1]
    assert [(one.name, one.type, one.data) for one in edited["image"]] == [
        ("a.png", "image/png", b"\x89PNG\r\n\x1a\n--"),
        ("b.png", "image/png", b"\x00\xff\r\n"),
    ]
    assert (seen[3][1]["file"][0].data, seen[3][1]["language"]) == (SOUND, "nl")


def test_keys_budgets_and_mistakes_count_as_for_text(upstream, tmp_path):
    async def work(client, gateway):
        other = client.with_options(api_key="sk-wrong")
        with pytest.raises(openai.AuthenticationError):
            await other.images.generate(model="ours", prompt="a river")
        for call in (
            client.images.generate(model="auto", prompt="x"),
            client.images.generate(model="ours", prompt="x", n=1000),
            client.images.generate(model="ours", prompt=3),
            client.audio.speech.create(model="ours", voice="alloy", input="x", stream_format="sse"),
            client.post("/audio/transcriptions", body={"model": "ours"}, cast_to=object),
            client.post("/rerank", body={"model": "ours", "query": "q"}, cast_to=object),
            client.post("/moderations", body={"model": "ours"}, cast_to=object),
        ):
            with pytest.raises(openai.BadRequestError):
                await call
        await gateway.store.set_budget("global", 1000)
        with pytest.raises(openai.RateLimitError, match="budget"):
            await client.images.generate(model="ours", prompt="a river", n=2)

    _, rows = through(upstream, tmp_path, work, output=10_000_000)
    assert upstream[1] == []
    assert {row.cost_nano for row in rows} <= {0}


@given(
    st.dictionaries(
        st.sampled_from(["prompt", "language", "size"]),
        st.text(max_size=9).filter(lambda text: "\r" not in text),
        max_size=3,
    ),
    st.lists(st.binary(max_size=40), min_size=1, max_size=3),
)
def test_a_form_is_read_as_it_was_written(texts, files):
    body = {**texts, "file": [Upload('a"\r\n.bin', "application/octet-stream", data) for data in files]}
    data, kind = encoded(UpstreamRequest("transcriptions", body, prompt_tokens=1), "m")
    found = parse_form(data, kind)
    assert [one.data for one in found.pop("file")] == files
    assert found == {**texts, "model": "m"}


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (b"x", "multipart/form-data"),
        (b"x", "multipart/form-data; boundary=b"),
        (b"--b\r\n\r\nx\r\n--b--", "multipart/form-data; boundary=b"),
        (b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n', "multipart/form-data; boundary=b"),
    ],
)
def test_a_broken_form_is_refused(raw, kind):
    with pytest.raises(ApiError) as caught:
        parse_form(raw, kind)
    assert caught.value.status == 400


@given(st.binary(max_size=80))
def test_any_bytes_are_a_form_or_refused(raw):
    try:
        found = parse_form(b"--b" + raw + b"--b--", "multipart/form-data; boundary=b")
    except ApiError:
        return
    assert isinstance(found, dict)


def test_what_is_counted_and_what_is_feared():
    body = {"model": "m", "input": "né", "voice": "v"}
    check_media("speech", body)
    assert (count_media("speech", body).tokens, most_made("speech", body, None, 7)) == (2, 4)
    assert most_made("images", {"n": 3}, None, 7) == 3 * 8192
    assert most_made("images", {"n": 3}, 1, 7) == 3
    assert (most_made("rerank", {}, 5, 7), most_made("transcriptions", {}, None, 7)) == (0, 7)
    asked = UpstreamRequest("images", {"prompt": "x"}, prompt_tokens=4)
    assert usage_of(asked, {"data": [{}, {}]}) == Usage(4, 2, 0, True, image_output=2)
    ranked = UpstreamRequest("rerank", {}, prompt_tokens=4)
    assert usage_of(ranked, {"meta": {"tokens": {"input_tokens": 8}}}).prompt == 8
    assert usage_of(ranked, {}) == Usage(4, 0, 0, True)


def clip(seconds, rate=8000):
    """A WAV file of silence."""
    made = io.BytesIO()
    with wave.open(made, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(bytes(2 * rate * seconds))
    return made.getvalue()


def flac(samples, rate=16_000):
    """The head of a FLAC file of two channels of 16 bits."""
    told = rate << 44 | 1 << 41 | 15 << 36 | samples
    return b"fLaC\x80\x00\x00\x22" + bytes(10) + told.to_bytes(8, "big") + bytes(16)


def test_sound_and_pictures_are_set_aside_at_their_own_prices():
    body = {"model": "m", "file": [Upload("a.png", "image/png", clip(60))]}
    count = count_media("transcriptions", body)
    assert 60 * 32 <= count.audio <= 60 * 32 + 32
    assert count.audio <= count.at_most
    most = asked_of_media("transcriptions", body).most(count, 0)
    assert most.audio_input == count.audio
    assert in_seconds(count).audio in (60, 61)
    assert is_by_second(Price(audio_input=1))
    assert not is_by_second(Price(audio_input=1, input=1))
    assert not is_by_second(Price(input=1))
    picture = count_media("image_edits", {"prompt": "x", "image": [Upload("a.wav", "audio/wav", b"?")] * 2})
    assert (picture.images, picture.audio) == (2 * (4_784 + 6_240), 0)


def test_a_flac_is_as_long_as_it_says():
    assert sound(flac(3600 * 16_000), "flac").at_most == 3600 * 32
    assert sound(b"ID3\x04\x00\x00\x00\x00\x00\x05hello" + flac(60 * 16_000), "mp3").at_most == 60 * 32
    # It may say less than it has, or nothing.
    for said in (1, 0):
        assert sound(flac(said) + bytes(100_000), "flac").at_most >= 100 * 32
    assert sound(flac((1 << 36) - 1, 1), "flac").at_most == 32_000_000


def test_how_long_sound_is():
    assert round(heard_seconds(clip(7, 24_000), "wav")) == 7
    assert heard_seconds(bytes(96_000), "pcm") == 2
    # MPEG 2, layer III, 64 kilobits a second: frames of 192 bytes and 24 ms.
    assert heard_seconds((b"\xff\xf3\x84\xc4" + bytes(188)) * 50, "mp3") == pytest.approx(1.2)
    assert heard_seconds(b"?" * 16_000, "mp3") == 1
    assert heard_seconds(b"", "mp3") == 0


@given(st.binary(max_size=60), st.sampled_from(["mp3", "pcm", "wav", "flac", "?"]))
def test_any_sound_has_a_length(data, form):
    for head in (b"", b"ID3", b"\xff\xfb", b"fLaC\x00", b"RIFF"):
        assert heard_seconds(head + data, form) >= 0
        with suppress(OtherSoundError):
            assert sound(head + data, form).at_most >= 0


def answered(endpoint, body, data, most):
    request = UpstreamRequest(endpoint, body, prompt_tokens=3)
    return whole_at_most(most, read(request, data, None))


def test_an_answer_without_usage_is_charged_what_it_may_have_cost():
    most = Usage(100, 2000, 0, True, audio_input=90)
    said = json.dumps({"text": "wörd " * 20}).encode()
    assert answered("transcriptions", {}, said, most) == Usage(100, 120, 0, True)
    assert answered("translations", {"response_format": "text"}, b"word " * 20, most) == Usage(100, 100, 0, True)
    assert answered("transcriptions", {"response_format": "srt"}, b"x" * 9000, most).completion == 2000
    pictures = json.dumps({"data": [{}, {}]}).encode()
    whole = Usage(9, 16_384, 0, True, image_output=16_384)
    assert answered("images", {"n": 2}, pictures, whole) == whole
    # Where a picture is a token.
    single = Usage(9, 2, 0, True, image_output=2)
    assert answered("images", {"n": 2}, pictures, single) == single
    spoken = {"input": "1234567890", "response_format": "wav", "instructions": "slowly"}
    heard = answered("speech", spoken, clip(120, 24_000), Usage(10, 400, 0, True, audio_output=400))
    assert 2400 <= heard.audio_output == heard.completion <= 2401


def test_what_is_spoken_slowly_is_set_aside():
    assert most_made("speech", {"input": "ab"}, None, 7) == 4
    assert most_made("speech", {"input": "a1\u4e00"}, None, 7) == 42
    assert most_made("speech", {"input": "ab", "instructions": "slowly"}, None, 7) == 80
    assert most_made("speech", {"input": "ab", "speed": 0.5}, None, 7) == 8
    assert most_made("speech", {"input": "ab", "speed": 1e-9}, None, 7) == 16


def test_clips_at_once_do_not_pass_a_budget(upstream, tmp_path):
    async def work(client, gateway):
        await gateway.store.set_budget("global", 10_000_000)

        async def one():
            file = ("a.mp3", b"x" * 3_600_000, "audio/mpeg")
            with pytest.raises(openai.RateLimitError, match="budget"):
                await client.audio.transcriptions.create(model="ours", file=file)

        await asyncio.gather(*(one() for _ in range(3)))

    through(upstream, tmp_path, work, audio_input=100_000_000_000)
    assert upstream[1] == []


def test_a_request_with_a_name_is_paid_for_once(upstream, tmp_path):
    async def work(client, gateway):
        def named(name):
            return {"extra_headers": {"Idempotency-Key": name}}

        for _ in range(2):
            made = await client.images.generate(model="ours", prompt="a river", **named("one"))
            assert [one.b64_json for one in made.data] == ["AAAA", "BBBB"]
            spoken = await client.audio.speech.create(model="ours", voice="v", input="x", **named("two"))
            assert (spoken.content, spoken.response.headers["content-type"]) == (SOUND, "audio/mpeg")
            sound = {"model": "ours", "file": ("a.mp3", SOUND, "audio/mpeg"), "response_format": "srt"}
            assert (await client.audio.transcriptions.create(**sound, **named("three"))).startswith("1\n00:00")
        with pytest.raises(openai.UnprocessableEntityError, match="three"):
            await client.audio.transcriptions.create(
                **{**sound, "file": ("a.mp3", SOUND + b"x", "audio/mpeg")}, **named("three")
            )

    _, rows = through(upstream, tmp_path, work, input=1_000_000, output=10_000_000)
    assert len(upstream[1]) == 3
    assert [row.cache for row in rows] == ["", "", "", "exact", "exact", "exact", ""]
    assert [bool(row.cost_nano) for row in rows] == [True] * 3 + [False] * 4


@pytest.mark.parametrize(
    "path",
    [
        "embeddings",
        "completions",
        "chat/completions",
        "responses",
        "messages",
        "messages/count_tokens",
        "moderations",
        "feedback",
    ],
)
def test_a_form_where_json_is_asked_for_is_refused(upstream, tmp_path, path):
    async def work(client, gateway):
        form = {"headers": {"content-type": "multipart/form-data"}}
        body = {"model": "ours", "input": "x", "prompt": "x", "messages": "x"}
        with pytest.raises(openai.BadRequestError, match="takes JSON"):
            await client.post(
                f"/{path}", cast_to=object, body=body, files=[("extra", ("a", b"x", "a/b"))], options=form
            )

    _, rows = through(upstream, tmp_path, work)
    assert (rows, upstream[1]) == ([], [])


def test_a_form_that_says_it_is_no_stream_is_none(upstream, tmp_path):
    async def work(client, gateway):
        for said in ("false", "true"):
            sent = client.audio.transcriptions.create(
                model="ours", file=("a.mp3", SOUND, "audio/mpeg"), extra_body={"stream": said}
            )
            if said == "false":
                assert (await sent).text == "hello"
            else:
                with pytest.raises(openai.BadRequestError, match="in one piece"):
                    await sent

    through(upstream, tmp_path, work, input=1_000_000)


def test_a_ranking_is_billed_by_its_units(upstream, tmp_path):
    answer = {"results": [{"index": 0}], "meta": {"billed_units": {"search_units": 50}}}
    body = {"model": "ours", "query": "q", "documents": ["d"] * 5000}
    assert asked_of_media("rerank", body).calls == 50
    assert asked_of_media("rerank", {"query": "q" * 300, "documents": ["x" * 251] * 100}).calls == 2
    assert asked_of_media("rerank", {"query": "q", "documents": []}).calls == 1
    price = Price(request=2_000_000_000)
    most = asked_of_media("rerank", body).most(count_media("rerank", body), 0)
    assert bill(price, most, most) == 50 * 2_000_000
    request = UpstreamRequest("rerank", body, prompt_tokens=3)

    def billed(value):
        return bill(price, whole_at_most(most, read(request, json.dumps(value).encode(), None)), most)

    assert billed(answer) == 50 * 2_000_000
    answer["meta"]["billed_units"]["search_units"] = 1
    assert billed(answer) == 2_000_000
    # One that bills by tokens says those; of one that says nothing, nobody knows.
    assert billed({"results": [], "usage": {"total_tokens": 9}}) == 2_000_000
    assert billed({"results": []}) == 50 * 2_000_000

    async def work(client, gateway):
        await gateway.store.set_budget("global", 99_000_000)
        with pytest.raises(openai.RateLimitError, match="budget"):
            await client.post("/rerank", body=body, cast_to=object)
        await client.post("/rerank", body={**body, "documents": ["d"]}, cast_to=object)

    _, rows = through(upstream, tmp_path, work, request=2_000_000_000)
    assert [row.cost_nano for row in rows] == [0, 2_000_000]


# Upstreams that make their answers up


def test_pictures_and_the_like_are_not_made_up(tmp_path):
    asked = {
        "images": {"prompt": "a river"},
        "moderations": {"input": "a"},
        "rerank": {"query": "q", "documents": ["a"]},
        "speech": {"input": "a", "voice": "v"},
    }
    made = ModelConfig(name="m", deployments=(DeploymentConfig(provider=Mock.Config(model="m")),))

    async def main():
        async with Gateway(GatewayConfig(models=(made,), store=str(tmp_path / "g.db"), require_key=False)) as gateway:
            for endpoint, fields in asked.items():
                with pytest.raises(ApiError) as caught:
                    await gateway.handle(endpoint, {"model": "m", **fields})
                assert (caught.value.status, caught.value.code) == (400, "unsupported")
                assert f"{endpoint} cannot be asked of mock" in str(caught.value)

    asyncio.run(main())
    # Nor by the scripted server.
    for path in (*PATHS.values(), "/nothing", ""):
        scene = Behaviour(Mock.Config()).scene(f"/v1{path}", b"{}")
        assert scene.status == 404
        assert b"there is no " in scene.parts[0][1]
