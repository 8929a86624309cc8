"""Clips that say what they are not, through the front door: no error of ours, and no limit of others is filled by a claim."""

import base64
import struct

from gateway_process import call, served
from gateway_scripted import scripted, whole
from sound_made import block, box, element, m4a, packet

ADMIN = "operator-key-1"
ANSWER = {
    "id": "c",
    "created": 1,
    "model": "m",
    "object": "chat.completion",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "ok"}}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14},
}
CLAIM = box(b"ftyp", b"M4A ") + box(
    b"moov",
    box(
        b"trak",
        box(b"mdia", box(b"mdhd", b"\0" * 12, struct.pack(">II", 1, 31_000)), box(b"hdlr", b"\0" * 8, b"soun")),
    ),
)
ENDLESS = bytes.fromhex("01FFFFFFFFFFFFFF")
HUGE = element("1A45DFA3", b"") + bytes.fromhex("18538067") + ENDLESS + bytes.fromhex("1F43B675") + ENDLESS
HUGE += element("E7", b"\xff" * 200) + block(packet(b"\xf8"))


def clip(raw, form):
    heard = {"type": "input_audio", "input_audio": {"data": base64.b64encode(raw).decode(), "format": form}}
    return {"model": "small", "messages": [{"role": "user", "content": [heard]}]}


def longer(raw, more):
    """With the sizes of the boxes around a track, into which so many bytes were put."""
    for name in (b"moov", b"trak"):
        at = raw.index(name) - 4
        raw = raw[:at] + struct.pack(">I", struct.unpack(">I", raw[at : at + 4])[0] + more) + raw[at + 4 :]
    return raw


def test_a_claim_of_hours_shuts_nobody_out(tmp_path):
    with scripted({"up": whole(ANSWER)}) as url:
        (tmp_path / "g.toml").write_text(
            f"""store = "{tmp_path}/g.db"
admin = {{ key = "env:TK" }}
[[models]]
name = "small"
max_tokens = 100
price = {{ input_usd = 1, output_usd = 1, audio_input_usd = 1 }}

[[models.deployments]]
tpm = 1000
provider = {{ kind = "openai", model = "m", base_url = "{url}/up", key_env = "" }}
"""
        )
        with served("--config", str(tmp_path / "g.toml"), environment={"TK": ADMIN}) as server:
            one, two = (
                call(server.url, "POST", "/admin/keys", {"name": name}, key=ADMIN)[1]["secret"] for name in ("a", "b")
            )

            def asked(body, key):
                return call(server.url, "POST", "/v1/chat/completions", body, key=key)[:2]

            for raw, form in ((CLAIM, "m4a"), (HUGE, "webm")):
                status, told = asked(clip(raw, form), one)
                assert status == 200, told
            # Clips that are nothing but heads are not read to their end.
            heads = element("1A45DFA3", b"") + bytes.fromhex("18538067") + ENDLESS + b"\xae\x80" * 220_000
            slow = clip(heads, "webm")
            slow["messages"][0]["content"] *= 4
            status, told = asked(slow, one)
            assert (status, told["error"]["param"]) == (400, "messages"), told
            # Of what lasts far longer than its bytes say nothing is sent on.
            packed = (
                b"RIFF\0\0\0\0WAVEfmt " + struct.pack("<IHHIIHH", 16, 0xF1AC, 1, 8_000, 8_000, 1, 16) + b"data\0\0\0\0"
            )
            status, told = asked(clip(packed, "wav"), one)
            assert (status, told["error"]["param"]) == (400, "messages"), told
            assert "a clip is WAV of FLAC" in told["error"]["message"]
            # Samples that are played again and again are paid for as often.
            edits = box(b"elst", b"\0" * 4, struct.pack(">I", 5_000), struct.pack(">IiI", 1_160, 0, 1 << 16) * 5_000)
            song = m4a(50, length=1).replace(b"trak", b"trak" + box(b"edts", edits), 1)
            poor = call(server.url, "POST", "/admin/keys", {"name": "c", "budget_usd": 0.01}, key=ADMIN)[1]["secret"]
            assert asked(clip(m4a(50), "m4a"), poor)[0] == 200
            status, told = asked(clip(longer(song, len(box(b"edts", edits))), "m4a"), poor)
            assert (status, told["error"]["code"]) == (429, "insufficient_quota"), told
            # What it was counted in with is corrected by what the upstream says: else the second one had no room.
            for _ in range(2):
                status, told = asked(
                    {"model": "small", "messages": [{"role": "user", "content": "hi there " * 300}]}, two
                )
                assert status == 200, told
