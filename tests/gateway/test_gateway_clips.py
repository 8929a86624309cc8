"""Clips that say what they are not, through the front door: no error of ours, and no limit of others is filled by a claim."""

import base64
import struct

from gateway_process import call, served
from gateway_scripted import scripted, whole
from sound_made import block, box, element, packet

ADMIN = "operator-key-1"
ANSWER = {
    "id": "c", "created": 1, "model": "m", "object": "chat.completion",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "ok"}}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14},
}  # fmt: skip
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
            # What it was counted in with is corrected by what the upstream says: else the second one had no room.
            for _ in range(2):
                status, told = asked(
                    {"model": "small", "messages": [{"role": "user", "content": "hi there " * 300}]}, two
                )
                assert status == 200, told
