"""The wheel in new environments, with what pip brings for it and nothing else. Needs the package index; `make test-install` runs it."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
import venv
import zipfile

import numpy as np
import pytest

from base_install import ROOT, check_base, check_ends, tried

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
# Packages come from the index, and nothing of this checkout or of whoever runs the tests is seen.
CLEAN = {
    name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ANABRANCH_", "VIRTUAL_ENV"))
}


def run(*words, **options):
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=500, env=CLEAN, **options
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
    (found,) = folder.glob("anabranch-*.whl")
    return found


class Environment:
    """A new one; files that commands are given lie in its folder."""

    def __init__(self, folder, wheel, extra):
        venv.create(folder / "env", with_pip=True)
        self.folder, self.python = folder, folder / "env" / "bin" / "python"
        self.install(f"{wheel}{extra}")

    def install(self, what):
        run(self.python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check", what)

    def anabranch(self, *words):
        return run(self.folder / "env" / "bin" / "anabranch", *words, cwd=self.folder)

    def installed(self):
        return {
            entry["name"].lower() for entry in json.loads(run(self.python, "-m", "pip", "list", "--format", "json"))
        }


@pytest.fixture(scope="module")
def base(tmp_path_factory, wheel):
    return Environment(tmp_path_factory.mktemp("base"), wheel, "")


@pytest.fixture(scope="module")
def graph(tmp_path_factory, wheel):
    made = Environment(tmp_path_factory.mktemp("graph"), wheel, "[graph]")
    assert not {"torch", "tokenizers", "aiohttp", "matplotlib"} & made.installed()
    return made


@pytest.fixture(scope="module")
def gateway(tmp_path_factory, wheel):
    made = Environment(tmp_path_factory.mktemp("gateway"), wheel, "[gateway]")
    heavy = {"torch", "matplotlib", "numba", "scipy", "networkx", "pyarrow", "tokenizers", "starlette", "uvicorn"}
    assert not heavy & made.installed()
    return made


def test_a_gateway_takes_little_room(gateway):
    """What an image of one holds beside Python: pip itself is left out, which an image can do without."""
    (packages,) = (gateway.folder / "env" / "lib").glob("python3*/site-packages")
    tools = ("pip", "setuptools", "pkg_resources", "wheel", "_distutils_hack")
    kept = [entry for entry in packages.iterdir() if entry.name.partition("-")[0] not in tools]
    files = [file for entry in kept for file in (entry.rglob("*") if entry.is_dir() else [entry]) if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 150e6


def test_the_base_is_light_and_every_help_and_message_works(base):
    assert not {"torch", "tokenizers", "matplotlib", "scipy", "numba", "aiohttp"} & base.installed()
    assert base.anabranch("--help")
    check_base(*tried(base.python, hide=False, env=CLEAN, cwd=base.folder))


def test_graphs_work_with_their_extra_alone(graph):
    (graph.folder / "edges.csv").write_text("source,target\na,b\nb,c\nc,a\nc,d\n")
    assert json.loads(graph.anabranch("graph", "info", "edges.csv", "--json"))["nodes"] == 4
    assert json.loads(graph.anabranch("graph", "info", "karate", "--json"))["nodes"] == 34
    assert "error" not in graph.anabranch("graph", "ppr", "edges.csv", "a", "--top", "2")
    # What is said to come next needs no more than what came before.
    np.save(graph.folder / "rows.npy", np.eye(4, dtype=np.float32))
    told = graph.anabranch("graph", "index", "rows.npy", "--out", "rows.anb")
    [following] = [line.split("anabranch ", 1)[1] for line in told.splitlines() if line.startswith("next")]
    assert "recall" in graph.anabranch(*shlex.split(following))


def test_a_gateway_without_torch_answers(gateway):
    words = [gateway.folder / "env" / "bin" / "anabranch", "gateway", "serve", "--port", "0", "--json"]
    with subprocess.Popen(
        [str(word) for word in words], stdout=subprocess.PIPE, text=True, env=CLEAN, cwd=gateway.folder
    ) as server:
        try:
            url = json.loads("".join(iter(server.stdout.readline, "}\n")) + "}")["url"]
            body = json.dumps({"model": "auto", "messages": [{"role": "user", "content": "hello"}]}).encode()
            asked = urllib.request.Request(f"{url}/v1/chat/completions", body, {"content-type": "application/json"})
            with urllib.request.urlopen(asked, timeout=60) as answer:
                assert json.load(answer)["choices"][0]["message"]["content"]
        finally:
            server.send_signal(signal.SIGTERM)
    assert server.returncode == 0


def test_a_gateway_learns_and_judges_without_torch(gateway):
    told, _ = tried(gateway.python, hide=False, extra="gateway", env=CLEAN, cwd=gateway.folder)
    check_ends(told)


def test_the_readme_of_an_index_leads_to_the_documentation(wheel):
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        text = files.read(name).decode()
    targets = re.findall(r"\]\(([^)\s]+)\)", text.partition("\n\n")[2])
    assert len(targets) > 30
    assert [target for target in targets if not target.startswith("https://")] == []
    assert "https://anabranch.readthedocs.io/en/latest/systems/rexmoe/" in targets
    assert "https://anabranch.readthedocs.io/en/latest/images/serving-chat.png" in targets
