"""``anabranch serve --devices``: a group of devices behind HTTP, changed while it answers."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from anabranch.config import override
from anabranch.data.tokenizer import ByteTokenizer
from anabranch.errors import CapacityError, ConfigError
from anabranch.lm import save_model
from anabranch.serving.config import ServingConfig
from anabranch.serving.elasticmoe import ElasticConfig
from anabranch.serving.elasticmoe.cuda_driver import LIBRARY
from anabranch.serving.http.serve import ServeConfig
from elastic_backends import NEEDS_GPU, compile_standin
from elastic_models import moe_config
from server_process import SOURCE
from serving_models import saved_moe, serve_process
from waiting import until

TOKEN = "operator-secret"


def post(server, path, body, **headers):
    raw = json.dumps(body).encode()
    request = urllib.request.Request(f"{server.url}{path}", raw, {"content-type": "application/json", **headers})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


# Of fields whose types do not say what they may be, or that need another beside them.
GIVEN = {
    "prompt_lookup_ngram": {"prompt_lookup": 4, "prompt_lookup_ngram": 7},
    "model": "there",
    "name": "called",
    "dtype": "float32",
    "quantize": "int4",
    "device": "cuda",
    "memory": "4GiB",
    "kv_memory": "2GiB",
    "pooling": "mean",
    "scheduling": "async",
    "expert_budget": "1MiB",
    "host_kv": "1MiB",
    "disk_kv": {"host_kv": "1MiB", "disk_kv": "1MiB"},
    "pipeline": {"nano_batches": True, "pipeline": "order.json"},
    "experts": {"expert_budget": "1MiB", "experts.policy": "lru"},
    "adapters": {"adapters.memory": "1MiB"},
    "depth": {"depth.routers": "somewhere"},
    "rewiring": {"rewiring.on": True},
}


@pytest.mark.parametrize("field", dataclasses.fields(ServingConfig), ids=lambda field: field.name)
def test_every_option_of_an_engine_reaches_a_group_or_is_refused_by_name(field):
    """Also one that is new: it is set to something else than its default."""
    name, plain = field.name, ServeConfig(devices=2, engine=ServingConfig(model="somewhere"))
    value = GIVEN.get(name, not field.default if isinstance(field.default, bool) else 7)
    own = {f"engine.{path}": each for path, each in (value if isinstance(value, dict) else {name: value}).items()}
    one = override(ServeConfig(), own)
    assert getattr(one.engine, name) != field.default
    try:
        changed = override(plain, own)
    except ConfigError as error:
        refusal = str(error)
    else:
        assert changed._elastic() != plain._elastic()
        return
    # The part, or what of it was said.
    names = {name for path in own for name in (path, f"engine.{path.removeprefix('engine.').partition('.')[0]}")}
    assert any(f"{name} is" in refusal for name in names), refusal
    assert refusal.startswith("devices is 2")


def test_a_group_forms_steps_as_it_does_whether_that_is_said_or_not():
    plain, said = ServeConfig(devices=2), override(ServeConfig(devices=2), {"engine.scheduling": "sync"})
    assert said._elastic() == plain._elastic()


@pytest.mark.parametrize(
    ("setting", "reaches"),
    [
        ({"group.mode": "drain"}, {"mode": "drain"}),
        ({"group.standby": 0}, {"standby": 0}),
        ({"group.ahead": False}, {"ahead": False}),
        ({"group.busy": "refuse"}, {"busy": "refuse"}),
        ({"group.device_memory": "2MiB"}, {"device_memory": 2 << 20}),
        ({"engine.kv_memory": "3GiB"}, {"kv_memory": "3GiB"}),
        ({"engine.num_blocks": 9}, {"num_blocks": 9, "kv_memory": None}),
        ({"engine.threads": 3}, {"threads": 3}),
        ({"engine.seed": 0}, {"seed": 0}),
        ({}, {"kv_memory": "1GiB", "threads": 1, "seed": None, "mode": "migrate", "device_memory": None}),
    ],
)
def test_what_is_said_of_a_group_reaches_it(setting, reaches):
    made = override(ServeConfig(devices=2), setting)._elastic()
    assert {name: getattr(made, name) for name in reaches} == reaches


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"group.mode": "jump"}, "group.mode is 'jump'"),
        ({"group.device_memory": "much"}, "device_memory is 'much'"),
        ({"scaling.max_devices": 1}, "devices is 2; policy.max_devices=1 is less"),
    ],
)
def test_mistakes_in_what_is_said_of_a_group(setting, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        override(ServeConfig(devices=2), setting)


def test_a_cache_is_as_large_as_its_memory_and_no_larger_than_it_can_be_used():
    config = ElasticConfig(model="there", kv_memory="1MiB", block_tokens=16, max_seqs=2)
    # 16 tokens of 64 bytes are a KiB.
    assert config.blocks_for(64, 100_000) == 1024
    assert config.blocks_for(64, 160) == 4 * 2 * 10
    assert ElasticConfig(model="there").blocks_for(64, 160) == 256
    with pytest.raises(CapacityError, match="kv_memory is 1MiB; a block of 16 tokens takes 1600000 bytes"):
        config.blocks_for(100_000, 160)


@pytest.mark.parametrize("weights", ["shared", "own"])
def test_devices_share_weights_unless_told_otherwise(weights, monkeypatch):
    made = []
    monkeypatch.setattr(ElasticConfig, "build", lambda self: made.append(self))
    monkeypatch.setattr("anabranch.serving.http.run.run", lambda http, make_engine, *args, **how: make_engine() or 0)
    config = ServeConfig() if weights == "shared" else override(ServeConfig(), {"device_weights": weights})
    override(config, {"devices": 2, "engine.model": saved_moe()}).serve()
    assert [(each.devices, each.weights, each.model, each.device) for each in made] == [
        (2, weights, saved_moe(), "cpu")
    ]
    override(config, {"devices": 2, "engine.model": saved_moe(), "engine.device": "cuda"}).serve()
    assert made[1].device == "cuda"
    with pytest.raises(ConfigError, match=r"engine\.device is 'cuda:1'; a group of devices takes 'cpu' or 'cuda'"):
        override(config, {"devices": 2, "engine.device": "cuda:1"})


def test_cuda_devices_on_a_machine_without_cuda(tmp_path):
    model = tmp_path / "moe"
    save_model(model, moe_config().replace(vocab_size=257).build(seed=0), ByteTokenizer())
    command = [sys.executable, "-m", "anabranch.cli.main", "serve", str(model), "--port", "0", "--quiet"]
    options = ["--devices", "2", "--set", "engine.device=cuda"]
    environment = {**os.environ, "PYTHONPATH": SOURCE, LIBRARY: str(tmp_path / "none.so")}
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()  # no traceback
    assert line.startswith("error: there is no CUDA driver here")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["cpu", "standin", pytest.param("cuda", marks=NEEDS_GPU)])
def test_devices_change_while_it_answers(where, tmp_path):
    standin = compile_standin(tmp_path) if where == "standin" else None
    if where == "standin" and standin is None:
        pytest.skip("a stand-in for the CUDA driver needs a C compiler and Linux")
    environment = {LIBRARY: str(standin)} if standin else {}
    device = "cpu" if where == "cpu" else "cuda"
    body = {"model": "small-moe", "prompt": "hello", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    with serve_process("--set", "engine.dtype=float32") as server:
        alone = post(server, "/v1/completions", body)
    options = ["--devices", "1", "--set", f"engine.device={device}", "--set", f"http.admin_token={TOKEN}"]
    with serve_process(*options, environment=environment) as server:
        before = post(server, "/v1/completions", body)
        report = post(server, "/v1/admin/scale", {"devices": 2}, authorization=f"Bearer {TOKEN}")["result"]
        drained = post(server, "/v1/admin/scale", {"devices": 3, "mode": "drain"}, authorization=f"Bearer {TOKEN}")
        for unknown in ([7], [0, 10**400]):
            with pytest.raises(urllib.error.HTTPError, match="400") as refused:
                post(server, "/v1/admin/scale", {"devices": 2, "lost": unknown}, authorization=f"Bearer {TOKEN}")
            assert "the group has devices 0, 1, 2" in json.loads(refused.value.read())["error"]["message"]
        lost = post(server, "/v1/admin/scale", {"devices": 2, "lost": [0]}, authorization=f"Bearer {TOKEN}")["result"]
        after = post(server, "/v1/completions", body)
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as answer:
            metrics = answer.read().decode()
    assert (report["mode"], report["new"]) == ("migrate", [0, 1])
    assert (drained["result"]["mode"], drained["result"]["new"]) == ("drain", [0, 1, 2])
    assert lost["new"] == [1, 2]
    texts = [answer["choices"][0]["text"] for answer in (alone, before, after)]
    assert len(set(texts)) == 1
    assert "elastic" in metrics


def children(pid):
    """Processes below one, with what they were started as."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                found[int(entry.name)] = parent, (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    below, last = {pid}, set()
    while below != last:
        last, below = below, below | {child for child, (parent, _) in found.items() if parent in below}
    return {child: found[child] for child in below - {pid}}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_process_of_the_group_that_stops_is_replaced_beside_a_stream():
    body = {"model": "called", "prompt": "hello", "max_tokens": 600, "temperature": 0, "ignore_eos": True}
    options = ["--devices", "2", "--set", "engine.watchdog_s=5", "--set", f"http.admin_token={TOKEN}"]
    options += ["--set", "engine.name=called", "--set", "group.ahead=false"]
    admin = {"authorization": f"Bearer {TOKEN}"}

    def readiness(server):
        try:
            with urllib.request.urlopen(f"{server.url}/health/ready", timeout=60) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    with serve_process(*options) as server, ThreadPoolExecutor(2) as pool:
        alone = post(server, "/v1/completions", body)["choices"][0]["text"]
        processes = children(server.process.pid)
        (forge,) = (
            pid for pid, (parent, what) in processes.items() if "fork_server" in what and parent == server.process.pid
        )
        (memory,) = (pid for pid, (_, what) in processes.items() if "elasticmoe.memory" in what)
        ranks = [pid for pid, (parent, _) in processes.items() if parent == forge]
        for name, pid in (("rank", ranks[0]), ("forge", forge), ("memory", memory)):
            stream = pool.submit(post, server, "/v1/completions", body)
            time.sleep(0.2)
            os.kill(pid, signal.SIGSTOP)
            seen = set()

            def is_gone(pid=pid, seen=seen):
                seen.add(readiness(server))
                return pid not in children(server.process.pid)

            until(is_gone)
            until(lambda: readiness(server) == 200)
            assert stream.result(60)["choices"][0]["text"] == alone, name
            assert pid not in children(server.process.pid), name
            if name == "rank":
                assert 503 in seen
            devices = {"rank": 3, "forge": 2, "memory": 3}[name]
            assert len(post(server, "/v1/admin/scale", {"devices": devices}, **admin)["result"]["new"]) == devices
        assert "a bug:" not in server.log.read_text()
