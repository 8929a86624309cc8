"""Loading adapters over HTTP where there is no room yet: what an operator says later counts, and whose fault it was is told."""

import asyncio
import contextlib
import http.client
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from anabranch.data import ByteTokenizer
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.config import ServingConfig
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.local import LocalEngine
from served_adapters import make_adapters, make_model
from serving_thread import serving
from waiting import until


class Busy:
    """A server whose memory for adapters is in use by ``b`` until `free`; ``c`` is small and has no room beside it."""

    def __init__(self, server, shelf, root):
        self.server, self.shelf, self.root = server, shelf, root
        self._threads = ThreadPoolExecutor(8)

    def post(self, name, folder):
        status, _, body = self.server.ask("/v1/adapters", {"name": name, "folder": folder})
        return status, body

    def waits(self, name, folder):
        """A POST that finds no room yet; (status, body) in the end."""
        told = self._threads.submit(self.post, name, folder)
        until(lambda: len(self.shelf._line) == 1)
        return told

    def leaves(self, name, folder):
        """A POST that finds no room yet, and whose sender gives up waiting."""
        link = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        with contextlib.closing(link):
            body = json.dumps({"name": name, "folder": folder})
            link.request("POST", "/v1/adapters", body, {"content-type": "application/json"})
            until(lambda: len(self.shelf._line) == 1)

    def waiting(self):
        """Who waits in the line, by id."""
        return [one.id for one in self.shelf._line]

    def changes(self):
        """What the server has under way for operators."""
        return self.server.app._adapters._changes

    def delete(self, name):
        return self.server.ask(f"/v1/adapters/{name}", None, "DELETE")[0]

    def say(self, name):
        return self.server.ask("/v1/completions", {"model": name, "prompt": "x", "max_tokens": 1})[0]

    def there(self):
        return [row["id"] for row in self.server.ask("/v1/adapters")[2]["data"]]

    def free(self):
        self.shelf.release("held")


@pytest.fixture
def busy(tmp_path):
    make_adapters(tmp_path)
    most = os.path.getsize(tmp_path / "b" / "adapter_model.safetensors")
    config = ServingConfig(
        num_blocks=256, name="demo", dtype="float32", max_seqs=8, adapters=AdaptersConfig(memory=f"{most}B")
    )
    engines = []

    def make():
        engines.append(Engine.of(make_model(), config, tokenizer=ByteTokenizer()))
        return engines[-1]

    with serving(lambda: LocalEngine(make), adapter_root=str(tmp_path)) as server:
        server.wait_ready()
        made = Busy(server, engines[0].adapters.shelf, tmp_path)
        assert made.post("b", "b")[0] == 200
        assert made.shelf.lease("held", (("b", 1.0),), "a key") is None
        yield made
        made.free()
        made._threads.shutdown()


def test_unloading_calls_off_what_waits_to_be_loaded(busy):
    told = busy.waits("x", "c")
    assert busy.say("x") == 404
    assert busy.delete("x") == 200
    status, body = told.result(60)
    assert (status, body["error"]["code"]) == (409, "adapter_called_off")
    assert "what came later counts" in body["error"]["message"]
    busy.free()
    assert (busy.say("x"), busy.delete("x"), busy.there()) == (404, 404, ["b"])


def test_a_later_load_of_the_name_calls_off_the_one_that_waits(busy):
    first = busy.waits("x", "c")
    later = busy._threads.submit(busy.post, "x", "a")
    assert first.result(60)[0] == 409
    busy.free()
    assert later.result(60)[0] == 200
    assert (busy.there(), busy.server.frontend.adapters.folders) == (["b", "x"], {"b": "b", "x": "a"})
    assert busy.say("x") == 200


def test_the_same_load_again_joins_the_one_that_waits(busy):
    """An operator's client that gave up waiting and asked again called its own load off each time, and was never first."""
    for _ in range(2):
        busy.leaves("x", "c")
    first = busy.waiting()
    told = [busy.waits("x", "c") for _ in range(3)]
    # All of them have come, as the last has.
    until(lambda: len(busy.changes()) == 5)
    assert busy.waiting() == first
    assert not any(each.done() for each in told)
    busy.free()
    answers = [each.result(60) for each in told]
    assert answers[0][0] == 200
    assert answers == [answers[0]] * 3
    assert (busy.there(), busy.server.frontend.adapters.folders) == (["b", "x"], {"b": "b", "x": "c"})
    assert busy.say("x") == 200


def test_unloading_calls_off_all_that_wait_together(busy):
    told = [busy.waits("x", "c") for _ in range(2)]
    until(lambda: len(busy.changes()) == 2)
    assert busy.delete("x") == 200
    assert [each.result(60)[0] for each in told] == [409, 409]


def test_a_server_that_hears_late_of_a_load_knows_that_it_was_unloaded(busy, monkeypatch):
    """The engine answers what it does at once before what its thread has done."""
    engine, replies = busy.server.frontend.engine, []
    control = engine.control

    async def late(command, **arguments):
        found = await control(command, **arguments)
        if command == "load_adapter":
            replies.append(found)
            while busy.shelf.names != ("b",):
                await asyncio.sleep(0)
        return found

    busy.free()
    monkeypatch.setattr(engine, "control", late)
    told = busy._threads.submit(busy.post, "x", "c")
    until(lambda: replies)
    assert busy.delete("x") == 200
    assert told.result(60)[0] == 200
    assert busy.server.frontend.adapters.folders == {"b": "b"}
    assert busy.say("x") == 404


def test_a_folder_that_went_meanwhile_is_the_operators_fault(busy):
    shutil.copytree(busy.root / "c", busy.root / "gone")
    told = busy.waits("x", "gone")
    shutil.rmtree(busy.root / "gone")
    busy.free()
    status, body = told.result(60)
    assert (status, body["error"]["param"]) == (400, "folder")
    assert "known" not in body["error"]["message"]
    at_once = busy.post("x", "gone")
    assert (status, body) == at_once


def test_an_engine_that_ends_meanwhile_is_not_the_operators_fault(busy):
    told = busy.waits("x", "c")
    busy.server.on_loop(lambda: busy.server.frontend._engine._give_up("a test"))
    status, body = told.result(60)
    assert (status, body["error"]["code"], body["error"]["param"]) == (500, "engine_failed", None)
