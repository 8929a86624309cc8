"""Adapters over HTTP: which a request means, what there is, loading and unloading while others are answered."""

import json
import os
import re
import shutil
import signal
import socket
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapter_models import drawn, make_adapter, make_kind
from anabranch.adapters.glider import GliderPool
from anabranch.config import override
from anabranch.data import ByteTokenizer
from anabranch.errors import ConfigError
from anabranch.lm import save_model
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.config import ServingConfig
from anabranch.serving.engine import adapter_reader
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.local import LocalEngine
from anabranch.serving.http.serve import ServeConfig
from served_adapters import layers_of, make_adapters, make_model
from serving_models import serve_process
from serving_thread import serving
from waiting import until

openai = pytest.importorskip("openai")
BASE, TOKEN = "demo", "operators-only"
PROMPT = "Tell me of a river."


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    made = tmp_path_factory.mktemp("root")
    make_adapters(made)
    (made / "empty").mkdir()
    (made / "broken").mkdir()
    (made / "broken" / "adapter_config.json").write_text("{")
    make_adapter(made / "nan", layers_of(("self_attn.q_proj",)))
    outside = tmp_path_factory.mktemp("outside")
    make_adapters(outside)
    query = layers_of(("self_attn.q_proj",))
    lengths = {f"{module}.lora_magnitude_vector": drawn(f"{module} m", (64,)) + 2 for module in query}
    make_adapter(made / "dora", query, extra=lengths, use_dora=True)
    downs = {f"model.layers.{layer}.mlp.down_proj.weight": torch.empty(64, 96) for layer in (0, 1)}
    make_kind(made / "ia3", "ia3", downs, words=["down_proj"])
    head = make_model().head.weight.detach()
    make_adapter(made / "head as peft", {"lm_head": (64, 257)}, extra={"lm_head.base_layer.weight": head})
    other_head = {"lm_head.base_layer.weight": head + 1}
    make_adapter(made / "other head", {"lm_head": (64, 257)}, extra=other_head)
    make_adapter(made / "other shape", {"model.layers.0.self_attn.q_proj": (32, 64)})
    made_numbers = make_adapter(made / "not a number", layers_of(("self_attn.q_proj",)))
    save_file(
        {name: tensor * float("nan") for name, tensor in made_numbers.items()},
        made / "not a number" / "adapter_model.safetensors",
    )
    for name in ("pool", "damaged"):
        make_adapter(made / name / "one", layers_of(("self_attn.q_proj",)))
    (made / "damaged" / "one" / "adapter_model.safetensors").write_bytes(b"no")
    (made / "link").symlink_to(outside / "a")
    (made / "linked").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (made / "linked" / name).symlink_to(outside / "a" / name)
    (made / "loop").symlink_to(made / "loop")
    (made / "file").write_text("x")
    return made


@pytest.fixture(scope="module")
def make_engine(root):
    config = ServingConfig(
        num_blocks=256,
        name=BASE,
        dtype="float32",
        max_seqs=8,
        max_batched_tokens=64,
        adapters=AdaptersConfig(load=(f"a={root / 'a'}", f"b={root / 'b'}")),
    )
    return lambda: LocalEngine(lambda: Engine.of(make_model(), config, tokenizer=ByteTokenizer()))


@pytest.fixture(scope="module")
def server(make_engine, root):
    with serving(make_engine, adapter_root=str(root), names=("other",), admin_token=TOKEN) as running:
        yield running


def say(server, **fields):
    """(status, headers, body) of a completion."""
    return server.ask(
        "/v1/completions",
        {"model": BASE, "prompt": PROMPT, "temperature": 0, "max_tokens": 12, "ignore_eos": True, **fields},
    )


def text(server, **fields):
    status, _, body = say(server, **fields)
    assert status == 200, body
    return body["choices"][0]["text"]


def change(server, body=None, method="POST", path="", token=TOKEN, **headers):
    if token is not None:
        headers["authorization"] = f"Bearer {token}"
    return server.ask(f"/v1/adapters{path}", body, method, **headers)


def test_names_of_models_say_which_adapters(server):
    texts = {name: text(server, model=name) for name in (BASE, "a", "b", "a+b")}
    assert len(set(texts.values())) == 4
    assert text(server, model="other") == texts[BASE]
    for name in (f"{BASE}:a", "other:a", "base:a"):
        assert text(server, model=name) == texts["a"]
    assert text(server, model="b+a") == text(server, model=f"{BASE}:b+a") == texts["a+b"]
    assert text(server, adapters={"a": 0.5, "b": 0.5}) == texts["a+b"]
    assert text(server, adapters={"a": 1}) == texts["a"]
    assert text(server, adapters={}) == text(server, adapters=None) == text(server, adapters={"a": 0}) == texts[BASE]
    assert text(server, adapters={"a": 0.7, "b": 0.3}) not in (texts["a"], texts[BASE])


def test_answers_say_what_was_asked_for(server):
    _, headers, body = say(server, model="a+b")
    assert (body["model"], headers["x-route-model"], headers["x-route-adapters"]) == ("a+b", BASE, "a*0.5,b*0.5")
    _, headers, body = say(server)
    assert (body["model"], headers["x-route-adapters"]) == (BASE, None)


def test_every_route_takes_them(server):
    chat = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": 12}
    response = {"input": PROMPT, "temperature": 0, "max_output_tokens": 12}
    bases = {}
    for model in (BASE, "a"):
        bases[model] = [
            server.ask("/v1/chat/completions", {"model": model, **chat})[2]["choices"][0]["message"]["content"],
            server.ask("/v1/responses", {"model": model, **response})[2]["output"][0]["content"][0]["text"],
            server.ask("/v1/embeddings", {"model": model, "input": PROMPT})[2]["data"][0]["embedding"],
            say(server, model=model, echo=True, max_tokens=0, logprobs=0)[2]["choices"][0]["logprobs"][
                "token_logprobs"
            ],
        ]
    assert all(one != other for one, other in zip(*bases.values(), strict=True))
    given = {"model": BASE, "adapters": {"a": 1.0}}
    assert server.ask("/v1/embeddings", {**given, "input": PROMPT})[2]["data"][0]["embedding"] == bases["a"][2]
    answer = server.ask("/v1/responses", {**given, **response})
    assert answer[2]["output"][0]["content"][0]["text"] == bases["a"][1]
    assert "x-warning" not in answer[1]
    assert server.ask("/tokenize", {"model": "a", "prompt": "x"})[0] == 200


def test_models_are_listed(server):
    listed = server.ask("/v1/models")[2]["data"]
    assert [(model["id"], model.get("parent")) for model in listed] == [
        (BASE, None),
        ("other", None),
        ("a", BASE),
        ("b", BASE),
    ]
    assert server.ask("/v1/models/a")[2]["id"] == "a"
    assert server.ask("/v1/models/none")[0] == 404


WRONG = [
    (
        {"model": "none"},
        404,
        "model",
        "there is no model 'none'; this server has 'demo', 'other', and the adapters 'a', 'b'",
    ),
    ({"model": "a+none"}, 404, "model", "'a+none'"),
    ({"model": "a+"}, 404, "model", "'a+'"),
    ({"model": "+"}, 404, "model", "'+'"),
    ({"model": "demo:"}, 404, "model", "'demo:'"),
    ({"model": "demo:demo"}, 404, "model", "'demo:demo'"),
    ({"model": "demo+a"}, 404, "model", "'demo+a'"),
    ({"model": "elsewhere:a"}, 404, "model", "'elsewhere:a'"),
    ({"model": "base"}, 404, "model", "'base'"),
    ({"model": "A"}, 404, "model", "'A'"),
    ({"model": "a\n"}, 404, "model", "'?'"),
    ({"model": "a+a"}, 400, "model", "'a' is named twice"),
    ({"model": "+".join(["a", "b"] * 9)}, 400, "model", "named twice"),
    ({"model": "a" * 300}, 404, "model", "no model"),
    ({"model": 7}, 400, "model", "model is 7"),
    ({"model": ["a"]}, 400, "model", "a list"),
    ({"model": "a", "adapters": {"b": 1}}, 400, "adapters", "say them in one of the two"),
    ({"adapters": "a"}, 400, "adapters", "an object"),
    ({"adapters": ["a"]}, 400, "adapters", "an object"),
    ({"adapters": 1}, 400, "adapters", "an object"),
    ({"adapters": {"none": 1}}, 404, "adapters", "no adapter 'none'; this server has the adapters 'a', 'b'"),
    ({"adapters": {"": 1}}, 404, "adapters", "no adapter ''"),
    ({"adapters": {"a": "1"}}, 400, "adapters.a", "-1000 to 1000"),
    ({"adapters": {"a": None}}, 400, "adapters.a", "missing"),
    ({"adapters": {"a": True}}, 400, "adapters.a", "true"),
    ({"adapters": {"a": 1001}}, 400, "adapters.a", "1001"),
    ({"adapters": {"a": 10**400}}, 400, "adapters.a", "-1000 to 1000"),
    ({"adapters": {"a": {}}}, 400, "adapters.a", "-1000 to 1000"),
    ({"adapters": {f"a{number}": 1 for number in range(17)}}, 400, "adapters", "17 names"),
]


@pytest.mark.parametrize(("fields", "status", "param", "what"), WRONG, ids=[json.dumps(row[0])[:40] for row in WRONG])
def test_what_cannot_be_meant(server, fields, status, param, what):
    found, _, body = say(server, **fields)
    assert (found, body["error"]["param"]) == (status, param), body
    assert what.lower() in body["error"]["message"].lower()


@pytest.mark.parametrize("weight", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_weights_that_are_no_numbers(server, weight):
    raw = f'{{"model": "{BASE}", "prompt": "x", "adapters": {{"a": {weight}}}}}'.encode()
    status, _, body = server.ask("/v1/completions", raw)
    assert (status, body["error"]["code"]) == (400, "invalid_json")


def test_they_come_and_go(server, root):
    assert say(server, model="c")[0] == 404
    status, _, made = change(server, {"name": "c", "folder": "c"})
    assert (status, made["id"], made["object"], made["parent"], made["in_memory"], made["pinned"]) == (
        200,
        "c",
        "adapter",
        BASE,
        True,
        False,
    )
    assert str(root) not in json.dumps(made)
    first = text(server, model="c")
    assert first not in (text(server), text(server, model="a"))
    assert "c" in [model["id"] for model in server.ask("/v1/models")[2]["data"]]
    listed = server.ask("/v1/adapters")[2]["data"]
    assert [(row["id"], row["pinned"]) for row in listed] == [("a", True), ("b", True), ("c", False)]
    assert server.ask("/v1/adapters/c")[2]["version"] == made["version"]
    # Another in its place, by a path from the top.
    status, _, other = change(server, {"name": "c", "folder": str(root / "b")})
    assert (status, other["version"] != made["version"]) == (200, True)
    assert text(server, model="c") == text(server, model="b")
    status, _, gone = change(server, None, "DELETE", "/c")
    assert (status, gone["deleted"]) == (200, True)
    assert say(server, model="c")[0] == 404
    assert change(server, None, "DELETE", "/c")[0] == 404
    assert server.ask("/v1/adapters/c")[0] == 404
    # Though nobody asks for anything any more.
    until(lambda: server.metrics()["adapters_in_memory"] == 2)
    found = server.metrics()
    assert found["adapter_loads_total"] >= 4
    assert found["adapter_resident_bytes"] > 0


def test_other_kinds_and_adapters_of_the_head_are_loaded_too(server):
    base, texts = text(server), {}
    for number, folder in enumerate(("dora", "ia3", "head as peft")):
        status, _, told = change(server, {"name": f"kind{number}", "folder": folder})
        assert status == 200, told
        texts[folder] = text(server, model=f"kind{number}")
        assert text(server, model=BASE, adapters={f"kind{number}": 0.0}) == base
    assert text(server, adapters={"kind0": 1.0, "kind1": 1.0}) not in (base, texts["dora"])
    assert len({base, *texts.values()}) == 4
    for number in range(3):
        assert change(server, method="DELETE", path=f"/kind{number}")[0] == 200


FOLDERS = [
    ("..", "below"),
    ("../outside/a", "below"),
    ("a/../../x", "below"),
    (".", "below"),
    ("/", "below"),
    ("/etc", "below"),
    ("link", "below"),
    ("linked", "outside"),
    ("loop", "cannot be read"),
    ("gone", "cannot be read"),
    ("file", "cannot be read"),
    ("other head", "brings lm_head.weight whole"),
    ("other shape", "model's has 64 and 64"),
    ("not a number", "NaN"),
    ("arrow:damaged", "damaged/one"),
    ("arrow:a", "is one adapter"),
    ("empty", "adapter_config.json"),
    ("broken", "adapter_config.json"),
    ("a\0b", "must be the path"),
    ("", "must be the path"),
    (7, "must be the path"),
    (None, "missing"),
    ("x" * 5000, "must be the path"),
    ("x" * 300, "cannot be read"),
]


@pytest.mark.parametrize(
    ("folder", "what"), FOLDERS, ids=[str(row[0])[:20].replace("\0", "0") or "none" for row in FOLDERS]
)
def test_folders_that_are_not_loaded(server, root, folder, what):
    status, _, body = change(server, {"name": "x", "folder": folder})
    assert (status, body["error"]["param"]) == (400, "folder"), body
    assert what in body["error"]["message"]
    # Nothing of where it lies beyond the root.
    assert str(root) not in body["error"]["message"]
    assert "x" not in [row["id"] for row in server.ask("/v1/adapters")[2]["data"]]


@pytest.mark.parametrize(
    ("body", "status", "param", "what"),
    [
        ({"name": "a", "folder": "c"}, 409, None, "'a' was given when the server started"),
        ({"name": BASE, "folder": "c"}, 400, "name", "as the model without adapters is called"),
        ({"name": "other", "folder": "c"}, 400, "name", "as the model without adapters is called"),
        ({"name": "base", "folder": "c"}, 400, "name", "as the model without adapters is called"),
        ({"name": "x+y", "folder": "c"}, 400, "name", "letters, digits"),
        ({"name": "../x", "folder": "c"}, 400, "name", "letters, digits"),
        ({"name": 7, "folder": "c"}, 400, "name", "is 7"),
        ({"folder": "c"}, 400, "name", "has no name"),
        ({"name": "x", "folder": "c", "weight": 1}, 400, "weight", "nobody knows weight"),
        ([], 400, None, "send an object"),
        (b"{", 400, None, "not JSON"),
    ],
)
def test_loads_that_cannot_be(server, body, status, param, what):
    found, _, said = change(server, body)
    assert (found, said["error"]["param"]) == (status, param), said
    assert what in said["error"]["message"]


def test_only_an_operator_changes_them(server, make_engine, root):
    body = {"name": "x", "folder": "c"}
    for token in (None, "wrong"):
        assert change(server, body, token=token)[0] == 401
        assert change(server, None, "DELETE", "/a", token=token)[0] == 401
    assert change(server, None, "DELETE", "/a")[0] == 409
    assert change(server, body, "PUT")[0] == 405
    assert change(server, body, "POST", "/x")[0] == 405
    assert change(server, body, content_type="text/plain")[0] == 415
    with serving(make_engine, adapter_root=str(root), api_keys=("me=secret",)) as keyed:
        assert change(keyed, body, token="secret")[0] == 403
        assert keyed.ask("/v1/adapters")[0] == 401
        assert keyed.ask("/v1/adapters", authorization="Bearer secret")[0] == 200
    with serving(make_engine) as closed:
        status, _, said = change(closed, body, token=None)
        assert (status, said["error"]["code"]) == (403, "adapters_closed")
        assert "--adapter-root" in said["error"]["message"]


def test_without_adapters_nothing_is_known_of_them():
    with serving() as fake:
        assert fake.complete(model="a")[0] == 404
        assert fake.complete(adapters={"a": 1})[0] == 404
        assert fake.complete(adapters={})[0] == 200
        assert fake.ask("/v1/adapters")[0] == 501


def test_a_running_request_keeps_its_adapter(server, root):
    assert change(server, {"name": "x", "folder": "c"})[0] == 200
    wanted, made = text(server, model="x", max_tokens=150), []
    thread = threading.Thread(target=lambda: made.append(text(server, model="x", max_tokens=150)))
    thread.start()
    until(lambda: server.metrics()["running"] >= 1 or made)
    assert change(server, {"name": "x", "folder": "b"})[0] == 200
    assert change(server, None, "DELETE", "/x")[0] == 200
    assert say(server, model="x")[0] == 404
    thread.join(60)
    assert made == [wanted]


def test_an_engine_that_died_has_its_adapters_again(make_engine, root):
    engines = []

    def make():
        engines.append(make_engine())
        return engines[-1]

    with serving(make, adapter_root=str(root)) as running:
        assert change(running, {"name": "c", "folder": "c"}, token=None)[0] == 200
        wanted = text(running, model="c")
        running.on_loop(lambda: engines[0]._give_up("a test"))
        until(lambda: len(engines) == 2 and running.frontend.state == "ready")
        assert [row["in_memory"] for row in running.ask("/v1/adapters")[2]["data"]] == [True, True, False]
        assert text(running, model="c") == wanted
        assert [row["in_memory"] for row in running.ask("/v1/adapters")[2]["data"]] == [True, True, True]


def test_an_engine_that_died_does_not_take_other_numbers_for_an_adapter(make_engine, own_root, caplog):
    engines = []

    def make():
        engines.append(make_engine())
        return engines[-1]

    def prints():
        return {name: say(running, model=name)[2].get("system_fingerprint") for name in ("demo", "x", "y")}

    with serving(make, adapter_root=str(own_root)) as running:
        for name in "xy":
            assert change(running, {"name": name, "folder": "c"}, token=None)[0] == 200
        before = prints()
        for name in ("a", "c"):
            shutil.copytree(own_root / name, own_root / f"{name} before")
        shutil.copytree(own_root / "a", own_root / "c", dirs_exist_ok=True)
        running.on_loop(lambda: engines[0]._give_up("a test"))
        until(lambda: len(engines) == 2 and running.frontend.state == "ready")
        assert say(running, model="x")[2]["error"]["code"] == "busy"
        assert "holds other numbers than when the adapter was loaded" in caplog.text
        assert change(running, {"name": "x", "folder": "c"}, token=None)[0] == 200
        shutil.copytree(own_root / "c before", own_root / "c", dirs_exist_ok=True)
        after = prints()
        assert (after["demo"], after["y"]) == (before["demo"], before["y"])
        assert len({*before.values(), *after.values()}) == 4


def test_configs_that_cannot_be(tmp_path, root):
    save_model(tmp_path / "demo", make_model(), ByteTokenizer())
    for config, what in (
        ({"engine.adapters.load": ("demo=x",)}, "an adapter is called 'demo'"),
        ({"engine.adapters.load": ("base=x",)}, "an adapter is called 'base'"),
        ({"http.adapter_root": str(tmp_path / "none")}, "which is no folder"),
        ({"engine.adapters.load": (f"a={root / 'a'}",), "devices": 2}, "engine.adapters is for one engine"),
        ({"http.adapter_root": str(root), "devices": 2}, "adapter_root is for one engine"),
        (
            {"http.adapter_root": str(root), "engine.memory": "2GiB"},
            "nobody knows how large adapters are that come while it serves",
        ),
    ):
        with pytest.raises(ConfigError, match=what):
            override(ServeConfig(engine=ServingConfig(model=str(tmp_path / "demo"))), config).check_model()


@pytest.mark.slow
def test_a_server_of_its_own_and_the_official_client(tmp_path, root):
    save_model(tmp_path / "demo", make_model(), ByteTokenizer())
    given = (
        "--adapter",
        f"a={root / 'a'}",
        "--adapter",
        f"b={root / 'b'}",
        "--adapter-root",
        str(root),
        "--adapter-memory",
        "1MiB",
    )
    greedy = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    with (
        serve_process(*given, model=str(tmp_path / "demo")) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
    ):
        assert [model.id for model in client.models.list()] == ["demo", "a", "b"]
        names = ("demo", "a", "b", "a+b", "demo:a")
        texts = {name: client.completions.create(model=name, **greedy).choices[0].text for name in names}
        assert len(set(texts.values())) == 4
        mixed = client.completions.create(model="demo", extra_body={"adapters": {"a": 0.5, "b": 0.5}}, **greedy)
        assert mixed.choices[0].text == texts["a+b"]
        chat = client.chat.completions.create(
            model="a", messages=[{"role": "user", "content": "hello"}], max_tokens=8, stream=True
        )
        assert {chunk.model for chunk in chat} == {"a"}
        with pytest.raises(openai.NotFoundError, match="'a', 'b'"):
            client.completions.create(model="c", **greedy)
        made = client.post("/adapters", body={"name": "c", "folder": "c"}, cast_to=object)
        assert made["id"] == "c"
        third = client.completions.create(model="c", **greedy).choices[0].text
        [engine] = [
            int(pid)
            for pid in Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        ]
        os.kill(engine, signal.SIGKILL)
        until(lambda: _said(client, greedy) == third)
        assert client.delete("/adapters/c", cast_to=object)["deleted"]
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="c", **greedy)


def _said(client, greedy):
    try:
        return client.completions.create(model="c", **greedy).choices[0].text
    except openai.APIStatusError:
        return None


@pytest.fixture
def own_root(tmp_path):
    """A root of a test's own, which it may change."""
    make_adapters(tmp_path / "root")
    make_adapters(tmp_path / "outside")
    return tmp_path / "root"


@pytest.fixture
def own(make_small_engine, own_root):
    with serving(make_small_engine, adapter_root=str(own_root), names=("demo", "demo:b")) as running:
        yield running


@pytest.fixture
def make_small_engine(own_root):
    """An engine with room for one of ``b`` and some of the small ones."""
    sizes = {name: os.path.getsize(own_root / name / "adapter_model.safetensors") for name in ("b", "c")}
    config = ServingConfig(
        num_blocks=256, name=BASE, dtype="float32", max_seqs=8, adapters=AdaptersConfig(memory=f"{sizes['b']}B")
    )
    return lambda: LocalEngine(lambda: Engine.of(make_model(), config, tokenizer=ByteTokenizer()))


def load(server, name, folder):
    status, _, body = change(server, {"name": name, "folder": folder}, token=None)
    assert status == 200, body
    return body


def held(server):
    return {row["id"]: row["in_memory"] for row in server.ask("/v1/adapters")[2]["data"]}


def test_the_root_holds_when_an_adapter_is_read_again(own, own_root):
    load(own, "x", "c")
    wanted = text(own, model="x")
    load(own, "b", "b")
    assert held(own) == {"x": False, "b": True}
    (own_root / "c").rename(own_root / "before")
    (own_root / "c").symlink_to(own_root.parent / "outside" / "c")
    status, headers, body = say(own, model="x")
    assert (status, body["error"]["code"], headers["retry-after"]) == (503, "busy", "1")
    (own_root / "c").unlink()
    # A link to what is below is followed.
    (own_root / "c").symlink_to(own_root / "before")
    assert text(own, model="x") == wanted
    load(own, "b", "b")
    (own_root / "c").unlink()
    (own_root / "c").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (own_root / "c" / name).symlink_to(own_root.parent / "outside" / "c" / name)
    assert say(own, model="x")[0] == 503


def test_the_root_holds_for_an_engine_that_is_started_again(make_small_engine, own_root):
    engines = []

    def make():
        engines.append(make_small_engine())
        return engines[-1]

    with serving(make, adapter_root=str(own_root)) as running:
        # By a path that can be read from everywhere.
        load(running, "x", str(own_root / "c"))
        (own_root / "c").rename(own_root / "before")
        (own_root / "c").symlink_to(own_root.parent / "outside" / "c")
        running.on_loop(lambda: engines[0]._give_up("a test"))
        until(lambda: len(engines) == 2 and running.frontend.state == "ready")
        assert say(running, model="x")[0] == 503


def test_whose_folder_went_is_told_to_the_operator_alone(own, own_root, caplog):
    load(own, "x", "c")
    load(own, "b", "b")
    shutil.rmtree(own_root / "c")
    for _, body in [say(own, model="x")[1:], own.ask("/v1/embeddings", {"model": "x", "input": "x"})[1:]]:
        assert body["error"]["code"] == "busy"
        assert "'x' is known and cannot be read now" in body["error"]["message"]
        assert str(own_root.parent) not in json.dumps(body)
    assert str(own_root / "c") in caplog.text or "folder is 'c'" in caplog.text
    # The others are as they were.
    assert text(own, model="b") != text(own)


def test_a_mixture_that_never_fits_is_not_asked_for_again(own):
    load(own, "x", "c")
    load(own, "y", "b")
    status, _, body = say(own, model="x+y")
    assert (status, body["error"]["code"]) == (400, "invalid_value")
    assert "of the others in its mixture" in body["error"]["message"]
    assert say(own, model="x")[0] == say(own, model="y")[0] == 200


def test_a_pool_that_never_fits_is_refused_with_its_size_and_is_not_read(own, own_root, monkeypatch):
    """Its files would fit: in its stacks both adapters have the rank of the greater."""
    load(own, "x", "c")
    before = text(own, model="x")
    for name, rank in (("e", 4), ("f", 1)):
        make_adapter(own_root / "uneven" / name, layers_of(), seed=name, rank=rank)
    read, add = [], GliderPool.add
    monkeypatch.setattr(GliderPool, "add", lambda *given, **more: read.append(given) or add(*given, **more))
    status, _, body = change(own, {"name": "all", "folder": "uneven"}, token=None)
    assert read == []
    assert (status, body["error"]["code"]) == (400, "adapter_too_large")
    taken, most = re.search(
        r"'all' takes ([\d,]+) bytes, and adapters may take ([\d,]+)", body["error"]["message"]
    ).groups()
    files = sum(path.stat().st_size for path in own_root.glob("uneven/*/*.safetensors"))
    assert files < int(most.replace(",", "")) < int(taken.replace(",", ""))
    assert held(own) == {"x": True}
    assert text(own, model="x") == before
    assert say(own, model="all")[0] == 404


def test_only_the_files_that_are_read_are_looked_at(own, own_root, monkeypatch):
    (own_root / "c" / "README.md").symlink_to(own_root.parent / "outside")
    listed = []
    for name in ("iterdir", "glob"):
        monkeypatch.setattr(Path, name, lambda self, *more: listed.append(self) or iter(()))
    load(own, "x", "c")
    assert listed == []


def test_nobody_waits_while_a_folder_is_looked_at(own, monkeypatch):
    gate, come, folder_of = threading.Event(), threading.Event(), adapter_reader.folder_of

    def slow(*where):
        come.set()
        assert gate.wait(60)
        return folder_of(*where)

    monkeypatch.setattr(adapter_reader, "folder_of", slow)
    made = []
    thread = threading.Thread(target=lambda: made.append(change(own, {"name": "x", "folder": "c"}, token=None)[0]))
    thread.start()
    try:
        assert come.wait(60)
        assert own.ask("/health")[0] == 200
        assert say(own)[0] == 200
    finally:
        gate.set()
        thread.join(60)
    assert made == [200]


def test_who_waits_for_its_adapters_is_no_reason_to_refuse_others(own, monkeypatch):
    load(own, "x", "c")
    load(own, "y", "b")
    assert held(own) == {"x": False, "y": True}
    gate, come, folder_of = threading.Event(), threading.Event(), adapter_reader.folder_of

    def slow(*where):
        come.set()
        assert gate.wait(60)
        return folder_of(*where)

    monkeypatch.setattr(adapter_reader, "folder_of", slow)
    made, admission = [], own.frontend.admission
    thread = threading.Thread(target=lambda: made.append(say(own, model="x")[0]))
    thread.start()
    try:
        assert come.wait(60)
        until(lambda: admission.queued == 1 and not admission._line.waiting)
        assert say(own)[0] == 200
        assert admission.queued == 1
    finally:
        gate.set()
        thread.join(60)
    assert made == [200]
    assert admission.queued == 0


@pytest.mark.parametrize("before", [None, "a"])
def test_a_load_goes_on_where_its_sender_leaves(own, before, monkeypatch):
    """The engine and the server say the same of the adapter, and so does the next engine."""
    if before is not None:
        load(own, "ghost", before)
    gate, come, folder_of = threading.Event(), threading.Event(), adapter_reader.folder_of

    def slow(*where):
        come.set()
        assert gate.wait(60)
        return folder_of(*where)

    monkeypatch.setattr(adapter_reader, "folder_of", slow)
    body = b'{"name": "ghost", "folder": "c"}'
    fields = [f"host: 127.0.0.1:{own.port}", "content-type: application/json", f"content-length: {len(body)}"]
    head = "\r\n".join(["POST /v1/adapters HTTP/1.1", *fields, "", ""])
    try:
        with socket.create_connection(("127.0.0.1", own.port)) as link:
            link.sendall(head.encode() + body)
            assert come.wait(60)
        until(lambda: own.app.under_way == 0)
    finally:
        gate.set()
    until(lambda: own.frontend.adapters.folders == {"ghost": "c"})
    assert held(own) == {"ghost": True}
    assert "ghost" in [model["id"] for model in own.ask("/v1/models")[2]["data"]]
    monkeypatch.undo()
    with_c = text(own, model="ghost")
    load(own, "y", "c")
    assert text(own, model="y") == with_c
    assert change(own, None, "DELETE", "/ghost", token=None)[0] == 200
    assert set(held(own)) == {"y"}


def test_bases_whose_names_begin_alike(own):
    load(own, "x", "c")
    wanted = text(own, model="x")
    assert text(own, model="demo:x") == text(own, model="demo:b:x") == text(own, model="base:x") == wanted
    assert say(own, model="demo:b:b")[0] == 404


def test_an_error_names_the_adapters_that_may_be_its_reason(own):
    load(own, "h", "huge")
    status, _, body = say(own, model="h")
    assert (status, body["error"]["code"]) == (500, "request_failed")
    assert "are not numbers" in body["error"]["message"]
    assert "with the adapters 'h'" in body["error"]["message"]


def test_a_weight_that_is_said_twice_is_the_last_as_everywhere_in_json(server):
    given = f'{{"model": "{BASE}", "prompt": "{PROMPT}", "temperature": 0, "max_tokens": 12, "ignore_eos": true, '
    raw = (given + '"adapters": {"a": 9, "a": 1}}').encode()
    assert server.ask("/v1/completions", raw)[2]["choices"][0]["text"] == text(server, model="a")
