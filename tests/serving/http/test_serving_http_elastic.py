"""``anabranch serve --devices``: a group of devices behind HTTP, changed while it answers."""

import dataclasses
import json
import os
import subprocess
import sys
import urllib.request

import pytest

from anabranch.config import override
from anabranch.errors import ConfigError
from anabranch.serving.config import ServingConfig
from anabranch.serving.elasticmoe import ElasticConfig
from anabranch.serving.elasticmoe.cuda_driver import LIBRARY
from anabranch.serving.http.serve import NOT_ELASTIC, ServeConfig
from elastic_backends import NEEDS_GPU, compile_standin
from elastic_models import save_moe
from server_process import SOURCE
from serving_models import serve_process

TOKEN = "operator-secret"


def post(server, path, body, **headers):
    raw = json.dumps(body).encode()
    request = urllib.request.Request(f"{server.url}{path}", raw, {"content-type": "application/json", **headers})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.mark.parametrize("name", NOT_ELASTIC)
def test_options_of_one_engine_are_refused(name):
    values = {
        "dtype": "float32",
        "quantize": "int4",
        "long_prefill_chunk": 8,
        "expert_budget": "1MiB",
        "host_kv": "1MiB",
        "num_streams": 2,
        "max_depth": 2,
        "threads": 2,
        "scheduling": "async",
        "kv_memory": "1MiB",
        "process": False,
    }
    value = values.get(name, True)
    with pytest.raises(ConfigError, match=rf"devices is 2, but engine\.{name}"):
        override(ServeConfig(), {"devices": 2, f"engine.{name}": value})


# A name is what clients call the model, whatever runs it.
KNOWN = {field.name for field in dataclasses.fields(ServingConfig)} - {*NOT_ELASTIC, "name"}


NEEDS = {
    "disk_kv": ("host_kv", "1MiB", "disk_kv", "1MiB"),
    "experts": ("expert_budget", "1MiB", "experts.policy", "lru"),
}


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_every_other_option_reaches_the_group(name):
    values = {"device": "cuda", "prefix_cache": False, "model": "there", "watchdog_s": None}
    config = override(ServeConfig(), {"devices": 2, "engine.model": "somewhere"})
    if name in NEEDS:
        # It needs another, which is refused.
        other, value, path, own = NEEDS[name]
        with pytest.raises(ConfigError, match=rf"engine\.{other} is for one engine"):
            override(config, {f"engine.{other}": value, f"engine.{path}": own})
        return
    changed = override(config, {f"engine.{name}": values.get(name, 7)})
    assert changed._elastic() != config._elastic()


@pytest.mark.parametrize("weights", ["shared", "own"])
def test_devices_share_weights_unless_told_otherwise(weights, monkeypatch):
    made = []
    monkeypatch.setattr(ElasticConfig, "build", lambda self: made.append(self))
    monkeypatch.setattr("anabranch.serving.http.run.run", lambda http, make_engine, *args, **how: make_engine() or 0)
    config = ServeConfig() if weights == "shared" else override(ServeConfig(), {"device_weights": weights})
    override(config, {"devices": 2, "engine.model": "somewhere"}).serve()
    assert [(each.devices, each.weights, each.model, each.device) for each in made] == [
        (2, weights, "somewhere", "cpu")
    ]
    override(config, {"devices": 2, "engine.model": "somewhere", "engine.device": "cuda"}).serve()
    assert made[1].device == "cuda"
    with pytest.raises(ConfigError, match=r"engine\.device is 'cuda:1'; a group of devices takes 'cpu' or 'cuda'"):
        override(config, {"devices": 2, "engine.device": "cuda:1"})


def test_cuda_devices_on_a_machine_without_cuda(tmp_path):
    model = save_moe(tmp_path / "moe")
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
        after = post(server, "/v1/completions", body)
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
            metrics = answer.read().decode()
    assert report
    texts = [answer["choices"][0]["text"] for answer in (alone, before, after)]
    assert len(set(texts)) == 1
    assert "elastic" in metrics
