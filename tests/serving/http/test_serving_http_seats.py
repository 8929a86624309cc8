"""More long streams of one key than there are places: another key's request does not wait for one of them to end."""

import http.client
import json
import threading

from anabranch.data import ByteTokenizer
from anabranch.serving.config import ServingConfig
from anabranch.serving.engine import Engine
from anabranch.serving.engine.local import LocalEngine
from serving_models import small_moe
from serving_thread import serving, streamed
from waiting import until

KEYS = ("alice=a", "bob=b")
LONG = {"model": "small-moe", "max_tokens": 300, "temperature": 0, "ignore_eos": True, "stream": True}


def stream(port, key, raw, **fields):
    """The bytes of a stream of a key, as they come, into ``raw``."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=200)
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    link.request("POST", "/v1/completions", json.dumps({**LONG, **fields}), headers)
    answer = link.getresponse()
    assert answer.status == 200
    while part := answer.read1(1 << 16):
        raw += part
    link.close()


def test_a_key_with_more_streams_than_places_keeps_nobody_waiting_for_their_end():
    config = ServingConfig(num_blocks=512, name="small-moe", dtype="float32", max_seqs=2)
    prompts, alone, short = ["one", "two and more", "three"], bytearray(), bytearray()
    with serving(
        lambda: LocalEngine(lambda: Engine.of(small_moe(), config, tokenizer=ByteTokenizer())), api_keys=KEYS
    ) as server:
        stream(server.port, "b", alone, prompt=prompts)
        found = [bytearray() for _ in prompts]
        threads = [
            threading.Thread(target=stream, args=(server.port, "a", raw), kwargs={"prompt": prompt})
            for prompt, raw in zip(prompts, found, strict=True)
        ]
        for thread in threads:
            thread.start()
        # Two are under way, and the third waits.
        until(lambda: sum(bool(raw) for raw in found) == 2, 100)
        stream(server.port, "b", short, prompt="x", max_tokens=1)
        assert b"[DONE]" in short
        assert not any(b"[DONE]" in raw for raw in found)
        for thread in threads:
            thread.join(200)
        assert [streamed(bytes(raw)) for raw in found] == [streamed(bytes(alone), at) for at in range(3)]
        until(lambda: server.metrics()["preemptions_total"] >= 1)
