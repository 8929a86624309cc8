"""An engine that is started again has the model that requests are read for, or the server gives up; and the adapters that it had, or
whoever asks for one is refused."""

import asyncio
import os
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from adapter_models import make_adapter
from anabranch.cli.serve_told import Told
from anabranch.data import ByteTokenizer
from anabranch.depth.dr_llm.bank import RouterBank
from anabranch.depth.ftp import TokenSkipper, saving
from anabranch.errors import CheckpointError
from anabranch.lm import Decoder, load_model, save_model
from anabranch.nn import SelfAttention
from anabranch.seen_files import SeenFiles
from anabranch.serving import load
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.config import ServingConfig
from anabranch.serving.depth import DepthConfig
from anabranch.serving.elasticmoe.config import ElasticConfig
from anabranch.serving.elasticmoe.group import Group
from anabranch.serving.http import frontend
from anabranch.serving.http.config import HttpConfig
from anabranch.serving.http.frontend import Frontend, OtherModelError
from anabranch.serving.http.inside import Inside
from anabranch.serving.http.inside_config import InsideConfig
from anabranch.serving.http.serve import ServeConfig, read_model
from anabranch.serving.http.shape import fingerprint
from depth_banks import saved_bank
from fake_engine import Script
from serving_models import saved_moe, small_moe
from serving_thread import serving
from waiting import until

BODY = {"model": "small", "prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "model"
    shutil.copytree(saved_moe(), place)
    return place


class Engines:
    """Engines of a folder, each in a thread; the last of them can be made to die."""

    def __init__(self, folder):
        self.config = ServingConfig(model=str(folder), name="small", num_blocks=64, dtype="float32", process=False)
        self.made, self.clients = [], []

    def __call__(self):
        if not self.clients:
            self._next = self.config.engines()
        client = self._next()
        make = client._make
        client._make = lambda: self._noted(make())
        self.clients.append(client)
        return client

    def _noted(self, engine):
        self.made.append(engine)
        return engine

    def die(self, running):
        def dead(batch):
            raise RuntimeError("gone")

        self.made[-1].runner.run = dead
        assert running.ask("/v1/completions", BODY)[0] == 500


def other_weights(folder):
    model, tokenizer = load_model(folder)
    save_model(folder.with_name("other"), model.config.build(seed=1), tokenizer)
    os.replace(folder.with_name("other") / "model.safetensors", folder / "model.safetensors")


def other_tokenizer(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text() + " ")


def whole_folder(folder):
    other_weights(folder)
    os.replace(folder, folder.with_name("before"))
    shutil.copytree(folder.with_name("before"), folder)


OTHER = [other_weights, other_tokenizer, whole_folder]


@pytest.mark.parametrize("change", OTHER, ids=lambda change: change.__name__)
def test_an_engine_that_finds_another_model_is_not_served(folder, change, caplog):
    engines = Engines(folder)
    with serving(engines, read_model(str(folder), HttpConfig())) as running:
        assert running.ask("/v1/completions", BODY)[0] == 200
        change(folder)
        # As long as the engine lives it has what it has read.
        assert running.ask("/v1/completions", BODY)[0] == 200
        engines.die(running)
        until(running.frontend.failed.is_set)
        status, _, answer = running.ask("/v1/completions", BODY)
        assert (status, answer["error"]["code"]) == (503, "failed")
        # The place is the operator's to know.
        assert "no longer those" in answer["error"]["message"]
        assert str(folder) not in answer["error"]["message"]
        assert running.ask("/health/live")[0] == 503
        # It does not come back by being tried again, and what was started has ended.
        assert len(engines.clients) == 2
        until(lambda: not any(client.is_ready for client in engines.clients))
    assert f"{folder}{os.sep}" in caplog.text
    assert "is another file than when the server was started" in caplog.text


def cut(folder):
    os.truncate(folder / "model.safetensors", 100)


def taken(folder):
    os.remove(folder / "config.json")


@pytest.mark.parametrize("change", [cut, taken], ids=lambda change: change.__name__)
def test_an_engine_that_cannot_read_its_model_again_is_given_up_at_once(folder, change, caplog):
    engines = Engines(folder)
    with serving(engines, read_model(str(folder), HttpConfig())) as running:
        change(folder)
        engines.die(running)
        until(lambda: "no longer those" in running.frontend.error)
    assert len(engines.clients) == 2
    assert "is another file than when the server was started, and cannot be read" in caplog.text


@pytest.fixture
def beside(tmp_path):
    """What may be beside a model, and how another comes in its place."""
    skippers = [tmp_path / name for name in ("skipper", "another")]
    banks = [Path(saved_bank(tmp_path / f"routers {seed}", small_moe(), seed)) for seed in (0, 1)]
    for share, place in zip((0.6, 0.4), skippers, strict=True):
        TokenSkipper(small_moe(), (0.0, share)).save(place)
    routers = [bank / "routers.safetensors" for bank in banks]
    queries = {f"model.layers.{layer}.self_attn.q_proj": (16, 16) for layer in range(2)}
    for place in ("one", "other", "pool/a", "pool/b", "pool of another/a"):
        make_adapter(tmp_path / place, queries, seed=place)
    numbers = "adapter_model.safetensors"
    return {
        "skipper": ({"depth": DepthConfig(skipper=str(skippers[0]))}, skippers),
        "routers": ({"depth": DepthConfig(routers=str(banks[0]))}, routers),
        "adapter": (
            {"adapters": AdaptersConfig(load=(f"x={tmp_path / 'one'}",))},
            [tmp_path / place / numbers for place in ("one", "other")],
        ),
        "pool": (
            {"adapters": AdaptersConfig(load=(f"x=arrow:{tmp_path / 'pool'}",))},
            [tmp_path / place / numbers for place in ("pool/a", "pool of another/a")],
        ),
    }


BESIDE = ["skipper", "routers", "adapter", "pool"]


@pytest.mark.parametrize("name", BESIDE[:2])
def test_an_engine_that_finds_others_beside_its_model_is_not_served(folder, beside, name, caplog):
    changes, (place, another) = beside[name]
    engines = Engines(folder)
    engines.config = engines.config.replace(**changes)
    with serving(engines, read_model(str(folder), HttpConfig())) as running:
        (place.parent / "README.md").write_text("something else")
        engines.die(running)
        until(lambda: len(engines.clients) == 2 and running.frontend.state == "ready")
        assert running.ask("/v1/completions", BODY)[0] == 200
        os.replace(another, place)
        engines.die(running)
        until(lambda: "no longer those" in running.frontend.error)
    assert f"{place} is another file than when the server was started" in caplog.text


# What may become of a file of an adapter while a server runs.
FATES = {
    "cut": lambda place, another: os.truncate(place, 100),
    "replaced": lambda place, another: os.replace(another, place),
    "another text": lambda place, another: place.write_text("{ this is no table"),
    "gone": lambda place, another: shutil.rmtree(place.parent),
    "too many bytes": lambda place, another: place.write_bytes(struct.pack("<Q", 2**40) + b"{}"),
}


@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("name", ["adapter", "pool"])
def test_an_engine_that_finds_other_adapters_serves_all_else(folder, beside, tmp_path, name, fate, caplog):
    """One of several no longer keeps the engine from starting again: whoever asks for it alone is refused, as for one that came later."""
    changes, (place, another) = beside[name]
    make_adapter(
        tmp_path / "kept", {f"model.layers.{layer}.self_attn.q_proj": (16, 16) for layer in (0, 1)}, seed="kept"
    )
    engines = Engines(folder)
    load = (*changes["adapters"].load, f"kept={tmp_path / 'kept'}")
    engines.config = engines.config.replace(adapters=AdaptersConfig(load=load))
    file = place.with_name("adapter_config.json") if fate == "another text" else place
    with serving(engines, read_model(str(folder), HttpConfig())) as running:
        before = {model: running.ask("/v1/completions", {**BODY, "model": model}) for model in ("small", "x", "kept")}
        FATES[fate](file, another)
        for number in (2, 3):
            engines.die(running)
            until(lambda number=number: len(engines.clients) == number and running.frontend.state == "ready")
            for model in ("small", "kept"):
                status, _, answer = running.ask("/v1/completions", {**BODY, "model": model})
                assert status == 200
                for told in ("choices", "system_fingerprint"):
                    assert answer[told] == before[model][2][told]
            status, _, answer = running.ask("/v1/completions", {**BODY, "model": "x"})
            assert status == 503
            assert "is known and cannot be read now" in answer["error"]["message"]
            assert str(tmp_path) not in answer["error"]["message"]
    assert "adapter x cannot be read again" in caplog.text


def test_an_engine_in_place_of_another_has_the_plan_of_its_memory(folder, beside):
    """Adapters that cannot be read by now kept it from being planned, and others might have had other bits."""
    changes, (place, _) = beside["adapter"]
    engines = Engines(folder)
    engines.config = engines.config.replace(**changes, memory="4GiB")
    with serving(engines, read_model(str(folder), HttpConfig())) as running:
        before = running.ask("/v1/completions", BODY)[2]
        kept = place.with_name("adapter_config.json").read_text()
        place.with_name("adapter_config.json").write_text("{")
        # Also where the one in place of another is replaced.
        for number in (2, 3):
            engines.die(running)
            until(lambda number=number: len(engines.clients) == number and running.frontend.state == "ready")
            answer = running.ask("/v1/completions", BODY)[2]
            for told in ("choices", "system_fingerprint"):
                assert answer[told] == before[told]
            assert running.ask("/v1/completions", {**BODY, "model": "x"})[0] == 503
        place.with_name("adapter_config.json").write_text(kept)
        assert running.ask("/v1/completions", {**BODY, "model": "x"})[0] == 200


def test_an_adapter_that_is_back_is_served_again(folder, beside):
    changes, (place, another) = beside["adapter"]
    engines = Engines(folder)
    engines.config = engines.config.replace(**changes)
    with serving(engines, read_model(str(folder), HttpConfig())) as running:
        body = {**BODY, "model": "x"}
        before = running.ask("/v1/completions", body)[2]["choices"]
        os.replace(place, place.with_name("before"))
        shutil.copy(another, place)
        engines.die(running)
        until(lambda: len(engines.clients) == 2 and running.frontend.state == "ready")
        assert running.ask("/v1/completions", body)[0] == 503
        assert running.ask("/v1/adapters/x")[2]["pinned"]
        os.replace(place.with_name("before"), place)
        assert running.ask("/v1/completions", body)[2]["choices"] == before
        assert running.ask("/v1/adapters/x")[2]["pinned"]


@pytest.mark.parametrize("name", BESIDE)
def test_what_lies_beside_a_model_and_changes_while_it_is_read_is_not_served(folder, beside, name, monkeypatch):
    changes, (place, another) = beside[name]
    config = Engines(folder).config.replace(**changes)
    settings = load.answer_settings
    monkeypatch.setattr(load, "answer_settings", lambda *parts: os.replace(another, place) or settings(*parts))
    with pytest.raises(CheckpointError, match=f"{re.escape(str(place))} is another file than when it was read"):
        config.load()


@pytest.mark.parametrize(("name", "reads"), [("skipper", (saving, "read_skipper")), ("routers", (RouterBank, "load"))])
def test_what_changes_beside_a_model_while_a_group_of_devices_reads_it_is_not_served(
    folder, beside, monkeypatch, name, reads
):
    changes, (place, another) = beside[name]
    read = getattr(*reads)

    def replaced(path):
        # It is read for its sizes too.
        if another.exists():
            os.replace(another, place)
        return read(path)

    monkeypatch.setattr(*reads, replaced)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(place))} is another file than when it was read"):
        Group(ElasticConfig(model=str(folder), **changes))


def test_an_engine_that_finds_its_model_again_is_served(folder):
    engines = Engines(folder)
    with serving(engines, read_model(str(folder), HttpConfig())) as running:
        before = running.ask("/v1/completions", BODY)[2]
        (folder / "README.md").write_text("something else")
        (folder / "route-predictor.safetensors").write_text("something else")
        engines.die(running)
        until(lambda: len(engines.clients) == 2 and running.frontend.state == "ready")
        after = running.ask("/v1/completions", BODY)[2]
    assert [before[name] for name in ("choices", "system_fingerprint")] == [
        after[name] for name in ("choices", "system_fingerprint")
    ]


def test_fingerprints_of_other_weights_differ(folder):
    first = Engines(folder).config.load()[0].info
    assert fingerprint(first) == fingerprint(Engines(saved_moe()).config.load()[0].info)
    other_weights(folder)
    assert fingerprint(first) != fingerprint(Engines(folder).config.load()[0].info)


def test_fingerprints_of_other_bits_and_types_differ(tmp_path):
    wide = Decoder.Config(vocab_size=257, dim=64, num_layers=1, attention=SelfAttention.Config(num_heads=2)).build(
        seed=0
    )
    save_model(tmp_path, wide, ByteTokenizer())
    config = ServingConfig(model=str(tmp_path), num_blocks=8)
    made = [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"quantize": "int8"},
        {"quantize": "int4"},
        {"quantize": "nf4"},
    ]
    told = [fingerprint(config.replace(**more).load()[0].info) for more in (*made, *made)]
    assert told[:5] == told[5:]
    assert len(set(told)) == 5


@pytest.fixture
def run(folder, tmp_path):
    """A training run of one checkpoint."""
    shutil.move(folder, tmp_path / "demo" / "checkpoints" / "step-00000001")
    return tmp_path / "demo"


def go_on(run):
    """A checkpoint of other weights is written."""
    steps = run / "checkpoints"
    shutil.copytree(steps / "step-00000001", run / "made")
    other_weights(run / "made")
    (run / "made").rename(steps / "step-00000002")


def served_by(config, monkeypatch):
    """What `ServeConfig.serve` gives the server: (its own config, a maker of engines, one of readers)."""
    given = []
    monkeypatch.setattr("anabranch.serving.http.run.run", lambda *parts, **told: given.append(parts))
    config.serve()
    return given[0]


SETTINGS = {"num_blocks": 64, "dtype": "float32", "process": False}


def test_a_run_is_served_by_the_checkpoint_that_it_was_started_with(run, monkeypatch):
    config = ServeConfig(engine=ServingConfig(model=str(run), **SETTINGS))
    alone, _ = ServingConfig(model=str(run), **SETTINGS).load()
    _http, make_engine, make_reader = served_by(config, monkeypatch)
    # While the process of the engine imports, and before anybody reads.
    go_on(run)
    made = []

    def engine():
        made.append(make_engine())
        return made[-1]

    body = {**BODY, "model": "demo"}
    with serving(engine, make_reader()) as running:
        before = running.ask("/v1/completions", body)[2]
        assert running.frontend.info.model == "demo"
        assert {Path(one.path).parent.name for one in running.frontend.info.files.files} == {"step-00000001"}
        # Also after the engine was started again.
        asyncio.run_coroutine_threadsafe(made[0].close(), running.loop).result(60)
        until(lambda: len(made) == 2 and running.frontend.state == "ready")
        after = running.ask("/v1/completions", body)[2]
        assert before["choices"] == after["choices"]
        assert before["system_fingerprint"] == after["system_fingerprint"]
        assert before["system_fingerprint"] == fingerprint(alone.info)
        # What is replaced in the checkpoint itself is still refused.
        other_weights(run / "checkpoints" / "step-00000001")
        asyncio.run_coroutine_threadsafe(made[1].close(), running.loop).result(60)
        until(running.frontend.failed.is_set)
        assert "no longer those" in running.ask("/v1/completions", body)[2]["error"]["message"]


def test_a_run_that_is_named_by_a_dot_is_called_something(run, monkeypatch):
    monkeypatch.chdir(run)
    found = ServingConfig(model=".").found()
    assert (found.name, Path(found.model).name) == ("model", "step-00000001")


def test_it_is_told_which_checkpoint_is_served(run, capsys):
    step = run / "checkpoints" / "step-00000001"
    for model, told in ((run, step), (step, step), (saved_moe(), saved_moe())):
        config = ServeConfig(engine=ServingConfig(model=str(model))).found()
        Told(config, as_json=False, quiet=False).bound("http://a:1")
        assert re.search(rf"loading +{re.escape(str(told))} ", capsys.readouterr().err)
    Told(ServeConfig(engine=ServingConfig(model="m", name="n")), as_json=False, quiet=False).bound("http://a:1")
    assert re.search(r"loading +n ", capsys.readouterr().err)


def test_devices_of_a_group_have_the_checkpoint_that_it_was_started_with(run, monkeypatch):
    config = ServeConfig(engine=ServingConfig(model=str(run)), devices=2)
    _, make_engine, _ = served_by(config, monkeypatch)
    elastic = make_engine.__self__
    assert (elastic.model, elastic.name) == (str(run / "checkpoints" / "step-00000001"), "demo")


def test_a_model_inside_a_gateway_is_that_which_it_was_started_with(run):
    config = InsideConfig(engine=ServingConfig(model=str(run), **SETTINGS))

    async def work():
        inside = Inside(config)
        make_engine = inside.frontend._make_engine

        def late():
            go_on(run)
            return make_engine()

        inside.frontend._make_engine = late
        try:
            info = await inside.start()
            assert info.model == "demo"
            assert {Path(one.path).parent.name for one in info.files.files} == {"step-00000001"}
        finally:
            await inside.frontend.close()

    asyncio.run(work())


def test_where_there_is_no_model_a_gateway_is_told(tmp_path):
    async def work():
        with pytest.raises(CheckpointError, match="no model at"):
            await Inside(InsideConfig(engine=ServingConfig(model=str(tmp_path / "none"), **SETTINGS))).start()

    asyncio.run(work())


def test_a_server_whose_tokenizer_is_of_another_model_does_not_start(folder):
    reader = read_model(str(folder), HttpConfig())
    other_weights(folder)

    async def work():
        made = Frontend(HttpConfig(), Engines(folder), lambda: reader)
        try:
            with pytest.raises(OtherModelError, match=r"model\.safetensors is another file"):
                await made.start()
            assert (made.info, made.reader) == (None, None)
        finally:
            await made.close()

    asyncio.run(work())


def test_engines_that_are_not_used_are_ended(monkeypatch, tmp_path):
    """Whether they could not begin with adapters, or are of another model: each would keep its memory."""
    monkeypatch.setattr(frontend, "AGAIN_S", 0.01)
    script, ended = Script(), []

    def make():
        engine = script()
        start, number = engine.start, len(script.made)

        async def starting():
            info = await start()
            if number == 2:
                raise RuntimeError("no more threads")
            (tmp_path / "m").write_text(str(max(number, 2)))
            return replace(info, files=SeenFiles.of([tmp_path / "m"]))

        async def closing(drain_s=0.0):
            ended.append(number)

        engine.start, engine.close = starting, closing
        return engine

    with serving(make, restarts=5) as running:
        running.on_loop(script.made[0].kill)
        until(running.frontend.failed.is_set)
        assert ended == [1, 2, 3]
