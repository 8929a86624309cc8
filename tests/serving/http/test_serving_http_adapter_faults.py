"""Faults of adapters of the command line: what `anabranch serve --check` finds is what a start finds, and a server outlives them."""

import itertools
import json
import os
import shutil
import signal
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from anabranch.adapters.catalogue import apply
from anabranch.adapters.own_folder import write_own
from anabranch.cli.main import main
from anabranch.data import ByteTokenizer
from anabranch.errors import AnabranchError
from anabranch.lm import export_huggingface, save_model
from anabranch.nn.quantize import quantize
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.config import ServingConfig
from anabranch.serving.http.serve import ServeConfig
from served_adapters import make_adapters, make_model, make_pool
from server_process import started
from waiting import until

FORMS = ("ours", "hugging face", "int8")


def base_of(folder, form, model):
    """A model in a form of files."""
    if form == "hugging face":
        export_huggingface(folder, model, ByteTokenizer())
    else:
        if form == "int8":
            quantize(model, "int8")
        save_model(folder, model, ByteTokenizer())
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of models by form, of adapters of peft's, and of ones in our form: of this model, and of another."""
    root = tmp_path_factory.mktemp("faults")
    make_adapters(root / "peft")
    for form in FORMS:
        base_of(root / form, form, make_model())
    for name in ("same", "other"):
        model = make_model()
        if name == "other":
            model.embedding.weight.data += 0.5
        apply(model, "shira", rank=1)
        write_own(root / name, model, base=name)
    return root


CASES = {
    "fits": ("peft/a", {}, None),
    "no room": ("peft/b", {"memory": "1KiB"}, "adapters may take 1,024"),
    "no room, our form": ("same", {"memory": "1KiB"}, "adapters may take 1,024"),
    "same base": ("same", {}, None),
    "another base": ("other", {}, "was trained on another base, other"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_check_finds_what_the_start_finds(made, form, case, dtype):
    folder, more, what = CASES[case]
    adapters = AdaptersConfig(load=(f"x={made / folder}",), **more)
    config = ServeConfig(
        engine=ServingConfig(model=str(made / form), num_blocks=8, dtype=dtype, process=False, adapters=adapters)
    )
    told = []
    for find in (lambda: config.check_model(), config.engine.load):
        try:
            find()
            told.append(None)
        except AnabranchError as error:
            told.append((type(error), str(error)))
    assert told[0] == told[1]
    assert (what is None) == (told[0] is None)
    assert what is None or what in told[0][1]


def test_the_command(made, capsys):
    for line in (
        ("--adapter", f"x={made / 'other'}"),
        ("--adapter", f"x={made / 'peft' / 'b'}", "--adapter-memory", "1KiB"),
    ):
        assert main(["serve", str(made / "ours"), "--check", *line]) == 2
        assert capsys.readouterr().err.count("\n") <= 2


def ask(server, model):
    """(status, answer)."""
    body = json.dumps({"model": model, "prompt": "hello", "max_tokens": 4, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"{server.url}/v1/completions", body, {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def end_engine(server):
    """Kill the engine's process, and wait until another answers."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    [engine] = map(int, children.read_text().split())
    os.kill(engine, signal.SIGKILL)
    until(lambda: str(engine) not in children.read_text().split() and ask(server, "demo")[0] == 200)


@pytest.mark.slow
def test_a_server_outlives_a_text_that_was_edited(tmp_path, made):
    """An instruction of a pool, and then its file as no JSON: requests for the pool are refused, and all others answered."""
    pool = tmp_path / "pool"
    make_pool(pool)
    shutil.copytree(made / "ours", tmp_path / "demo")
    given = ("--adapter", f"all={pool}", "--adapter", f"a={made / 'peft' / 'a'}")
    texts = itertools.chain(['{"schema": 1, "instructions": ["Name the mountain."]}'], ['{"schema": 1, "instr'])
    with started("serve", str(tmp_path / "demo"), *given) as server:
        before = {model: ask(server, model) for model in ("demo", "a", "all")}
        assert [status for status, _ in before.values()] == [200, 200, 200]
        kept = (pool / "law" / "glider.json").read_text()
        for text in (*texts, kept):
            (pool / "law" / "glider.json").write_text(text)
            end_engine(server)
            for model in ("demo", "a", *(["all"] if text == kept else [])):
                status, answer = ask(server, model)
                assert (status, answer["choices"]) == (200, before[model][1]["choices"])
            if text != kept:
                status, answer = ask(server, "all")
                assert status == 503
                assert "the server's log says why" in answer["error"]["message"]
        assert server.process.poll() is None
        log = server.log.read_text()
    assert "adapter all cannot be read again" in log
    assert "holds other numbers than when the adapter was loaded" in log
    assert "Traceback" not in log
