"""``anabranch serve`` as a process: its config, its signals, its engine's death, made-up requests."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from anabranch.cli.main import main
from anabranch.data import ByteTokenizer
from anabranch.lm import Decoder, load_model, save_model
from anabranch.nn import MoE, SelfAttention
from anabranch.serving.http.openapi import describe
from serving_models import saved_moe, serve_process
from waiting import until

PROGRAM = Path(sys.executable).parent / "schemathesis"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def ask(server, body=None, path="/v1/completions", timeout=30):
    raw = None if body is None else json.dumps({"model": "small-moe", "prompt": "hello", **body}).encode()
    request = urllib.request.Request(f"{server.url}{path}", raw, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def in_background(function, *arguments):
    """Run it in a thread; its result is there after the thread's end."""
    made = []
    thread = threading.Thread(target=lambda: made.append(function(*arguments)))
    thread.start()
    return thread, made


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_model_saved_in_fewer_bits_is_served_as_one_quantised_at_load(bits, tmp_path, capsys):
    # Wider than the small mixture: its layers of 16 cannot be packed.
    attention, experts = SelfAttention.Config(num_heads=2), MoE.Config(num_experts=4, hidden_dim=32)
    config = Decoder.Config(
        vocab_size=257, dim=64, num_layers=2, attention=attention, feed_forward=experts, init_std=0.2, max_positions=256
    )
    plain, saved = tmp_path / "m", tmp_path / "q"
    save_model(plain, config.build(seed=0), ByteTokenizer())
    assert main(["convert", str(plain), str(saved), "--to", "native", "--dtype", "float32", "--quantize", bits]) == 0
    assert f"anabranch serve {saved}" in capsys.readouterr().out
    body = {"temperature": 0, "max_tokens": 40, "ignore_eos": True, "logprobs": 2}
    said = []
    for model, more in ((plain, ("--quantize", bits)), (saved, ())):
        with serve_process(
            "--set", "engine.dtype=float32", "--set", "engine.name=small-moe", *more, model=str(model)
        ) as server:
            said.append(json.loads(ask(server, body)[1])["choices"][0])
    assert said[0] == said[1]


@pytest.mark.slow
def test_a_signal_lets_requests_end_and_a_dead_engine_comes_back():
    with serve_process("--set", "engine.num_blocks=256") as server:
        assert ask(server, {"max_tokens": 3})[0] == 200
        engines = children(server.process.pid)
        assert len(engines) == 1
        os.kill(engines[0], signal.SIGKILL)
        until(lambda: ask(server, None, "/health/ready")[0] == 503)
        until(lambda: ask(server, None, "/health/ready")[0] == 200)
        assert ask(server, {"max_tokens": 3})[0] == 200
        jobs = [
            in_background(ask, server, {"max_tokens": 400, "ignore_eos": True, "stream": number % 2 == 0})
            for number in range(4)
        ]
        until(lambda: b"anabranch_serving_in_flight 4" in ask(server, None, "/metrics")[1])
        server.process.send_signal(signal.SIGTERM)
        until(lambda: ask(server, {"max_tokens": 1})[0] == 503)
        for thread, made in jobs:
            thread.join(60)
            assert made[0][0] == 200
            assert b"length" in made[0][1]
        assert server.process.wait(60) == 0
        assert not [pid for pid in engines if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--expert-budget", "4KiB")], ids=["all", "budget"])
def test_a_run_that_is_trained_on_is_served_as_it_was_until_the_server_is_started_again(more, tmp_path):
    run = tmp_path / "small-moe"
    steps = run / "checkpoints"
    shutil.copytree(saved_moe(), steps / "step-00000001")
    body = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
    settings = ("--set", "engine.dtype=float32", *more)
    said = []
    with serve_process(*settings, model=str(run)) as server:
        said.append(json.loads(ask(server, body)[1]))
        save_model(run / "made", load_model(saved_moe())[0].config.build(seed=5), ByteTokenizer())
        (run / "made").rename(steps / "step-00000002")
        [engine] = children(server.process.pid)
        os.kill(engine, signal.SIGKILL)
        until(lambda: ask(server, None, "/health/ready")[0] == 503)
        until(lambda: ask(server, None, "/health/ready")[0] == 200)
        said.append(json.loads(ask(server, body)[1]))
    with serve_process(*settings, model=str(run)) as server:
        said.append(json.loads(ask(server, body)[1]))
    first, again, later = ((one["choices"], one["system_fingerprint"], one["model"]) for one in said)
    assert first == again
    assert first[0] != later[0]
    assert first[1] != later[1]
    assert first[2] == later[2] == "small-moe"


def renamed(folder, engine):
    """As a release is put there; then the engine happens to die."""
    save_model(folder.with_name("next"), load_model(folder)[0].config.build(seed=5), ByteTokenizer())
    os.replace(folder.with_name("next") / "model.safetensors", folder / "model.safetensors")
    os.kill(engine, signal.SIGKILL)


def written(folder, engine):
    """Under an engine that reads its experts from there, which ends it."""
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-4096] + bytes(4096))


@pytest.mark.slow
@pytest.mark.parametrize("change", [renamed, written], ids=lambda change: change.__name__)
def test_a_server_whose_model_is_replaced_ends_with_its_engine(change, tmp_path):
    folder = shutil.copytree(saved_moe(), tmp_path / "small-moe")
    with serve_process("--expert-budget", "4KiB", "--set", "engine.dtype=float32", model=str(folder)) as server:
        assert ask(server, {"max_tokens": 3})[0] == 200
        [engine] = children(server.process.pid)
        change(folder, engine)
        until(lambda: server.process.poll() is not None or ask(server, {"max_tokens": 30})[0] >= 500)
        assert server.process.wait(60) == 3
        log = server.log.read_text()
        assert f"{folder / 'model.safetensors'} is another file than when the server was started" in log
        assert "Traceback" not in log.partition("is another file")[2]


@pytest.mark.slow
def test_an_engine_that_dies_while_it_drains_is_in_the_exit_code():
    with serve_process() as server:
        [engine] = children(server.process.pid)
        thread, made = in_background(ask, server, {"max_tokens": 900, "ignore_eos": True, "n": 8})
        until(lambda: b"anabranch_serving_in_flight 8" in ask(server, None, "/metrics")[1])
        server.process.send_signal(signal.SIGTERM)
        until(lambda: ask(server, None, "/health/ready")[0] == 503)
        os.kill(engine, signal.SIGKILL)
        thread.join(60)
        assert made[0][0] == 500
        assert server.process.wait(60) == 1


@pytest.mark.slow
def test_a_server_that_stops_leaves_no_engine_that_hangs():
    with serve_process("--drain-timeout", "0.5") as server:
        [engine] = children(server.process.pid)
        thread, made = in_background(ask, server, {"max_tokens": 900, "ignore_eos": True, "n": 8})
        until(lambda: b"anabranch_serving_in_flight 8" in ask(server, None, "/metrics")[1])
        os.kill(engine, signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        thread.join(60)
        assert made[0][0] == 503
        assert server.process.wait(60) == 1
        until(
            lambda: not Path(f"/proc/{engine}").exists() or "Z" in Path(f"/proc/{engine}/stat").read_text().split()[2]
        )


@pytest.mark.slow
def test_a_second_signal_ends_it_now():
    with serve_process("--set", "engine.process=false") as server:
        thread, made = in_background(ask, server, {"max_tokens": 500, "ignore_eos": True, "stream": True, "n": 8})
        until(lambda: b"anabranch_serving_in_flight 8" in ask(server, None, "/metrics")[1])
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        thread.join(60)
        is_cut = b"shutting_down" in made[0][1]
        assert server.process.wait(60) == (1 if is_cut else 0)
        assert made[0][1].endswith(b"data: [DONE]\n\n")


def children(pid):
    """Processes that this one has started, of whatever thread."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


@pytest.mark.slow
@pytest.mark.skipif(not (PROGRAM.exists() or shutil.which("schemathesis")), reason="needs schemathesis (the dev extra)")
def test_no_made_up_request_breaks_it():
    with serve_process("--set", "engine.process=false", "--set", "http.admin_token=operator-1") as server:
        program = str(PROGRAM) if PROGRAM.exists() else "schemathesis"
        command = [
            program,
            "run",
            f"{server.url}/openapi.json",
            "--checks",
            CHECKS,
            "--max-examples",
            "25",
            "--seed",
            "1",
            "--phases",
            "examples,coverage,fuzzing",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout[-6000:]
        assert ask(server, {"max_tokens": 2})[0] == 200


def test_the_document_names_only_schemas_there_are():
    document = describe("1", 16)
    text = json.dumps(document)
    for part in text.split("#/components/schemas/")[1:]:
        assert part.split('"')[0] in document["components"]["schemas"]


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["--set", "engine.max_seq=3"], {}, "did you mean 'max_seqs'"),
        (["--set", "http.limits.most_n=0"], {}, "http.limits.most_n is 0"),
        (["--port", "70000"], {}, "http.port is 70000"),
        (["--api-key", "nosecret"], {}, "api_keys"),
        ([], {"ANABRANCH_SERVE_HTTP__PORTS": "1"}, "in the environment"),
        (["--config", "/nowhere.toml"], {}, "cannot read /nowhere.toml"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, environment, says, capsys, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["serve", "some/model", "--check", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert says in said


def test_options_beat_the_environment_which_beats_the_file(tmp_path, monkeypatch, capsys):
    from anabranch.cli.serve import config_of

    file = tmp_path / "serve.toml"
    file.write_text('[engine]\nmodel = "a"\nmax_seqs = 3\n[http]\nport = 1\nhost = "::1"\n')
    monkeypatch.setenv("ANABRANCH_SERVE_HTTP__PORT", "2")
    monkeypatch.setenv("ANABRANCH_SERVE_ENGINE__MAX_SEQS", "4")
    config = config_of(file, {"http.port": 3})
    assert (config.engine.model, config.engine.max_seqs, config.http.port, config.http.host) == ("a", 4, 3, "::1")


def test_without_a_model_the_error_says_what_to_give(monkeypatch, capsys):
    monkeypatch.setattr("anabranch.serving.http.serve._small_model", lambda: None)
    assert main(["serve", "--check"]) == 2
    assert "no model is given; give the folder or file of a model" in capsys.readouterr().err


def test_secrets_are_not_shown(capsys):
    assert main(["serve", saved_moe(), "--check", "--api-key", "secretwithoutname"]) == 2
    said = capsys.readouterr()
    assert "api_keys.0 is not of the form" in said.err
    assert "secretwithoutname" not in said.err + said.out


@pytest.mark.slow
def test_five_hundred_connections_at_once_take_bounded_memory():
    import asyncio

    import aiohttp

    settings = (
        "engine.process=false",
        "http.admission.max_in_flight=64",
        "http.admission.max_queued=64",
        "engine.kv_memory=64MiB",
    )
    with serve_process(*(word for setting in settings for word in ("--set", setting))) as server:

        async def one(session, number):
            body = {"model": "small-moe", "prompt": f"number {number}", "max_tokens": 16, "stream": number % 2 == 0}
            async with session.post(f"{server.url}/v1/completions", json=body) as answer:
                data = await answer.read()
                assert answer.status in (200, 429)
                assert answer.status == 429 or b"finish_reason" in data
                return answer.status

        async def burst():
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                return await asyncio.gather(*(one(session, number) for number in range(500)))

        def resident():
            return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        asyncio.run(burst())
        first = resident()
        for _ in range(3):
            statuses = asyncio.run(burst())
            assert len(statuses) == 500
            assert {200, 429} == set(statuses)
        assert resident() - first < 48 << 20
        assert b"anabranch_serving_in_flight 0" in ask(server, None, "/metrics")[1]
