"""docs/serving-design.md says what is called on the way of a streamed chat, and in which order."""

import importlib
import inspect
import re
import threading
import tomllib
from pathlib import Path

import pytest

from anabranch.data import ByteTokenizer
from anabranch.lm import Decoder
from anabranch.nn import MoE, SelfAttention, kernels
from anabranch.routing import Router, TopK
from anabranch.serving.config import ServingConfig
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.local import LocalEngine
from serving_thread import serving, streamed

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving-design.md").read_text()
NAME = re.compile(r"`([^`]+)`")
# What a token passes on the event loop; metrics have a clock of their own.
FRONT = re.compile(r"anabranch/serving/(http/(?!metrics)\w+|core/(stream|text)|engine/(streams|local))\.py$")


def rows(heading):
    """Cells of the table under a heading."""
    lines = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]


def code_of(row):
    """The code of what a row names, where it stands."""
    file, name = row[0].strip("`"), row[1].strip("`")
    found = importlib.import_module("anabranch." + file.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        found = getattr(found, part)
    code = inspect.unwrap(found).__code__
    assert code.co_filename.endswith(f"anabranch/{file}"), f"{name} is not of {file}"
    return code


@pytest.fixture(scope="module")
def called():
    """The names of all rows, as they are called while a chat is streamed; and its text."""
    names = {code_of(row): row[1].strip("`") for row in rows("There") + rows("Back")}
    log, classes, is_on = [], set(), threading.Event()

    def note(frame, event, argument):
        if event != "call" or not is_on.is_set():
            return
        # The first token's way on the event loop.
        is_on_its_way = "Stream.push" in log and "event" not in log
        name = names.get(frame.f_code)
        if name is not None:
            log.append(name)
        if is_on_its_way and "self" in frame.f_locals and FRONT.search(frame.f_code.co_filename):
            classes.add(type(frame.f_locals["self"]).__name__)

    config = ServingConfig(num_blocks=64, name="small", dtype="float32", max_seqs=2)
    # As wide as the compiled step takes them.
    model = Decoder.Config(
        vocab_size=257,
        dim=64,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=4),
        feed_forward=MoE.Config(num_experts=4, hidden_dim=64, router=Router.Config(select=TopK.Config(top_k=2))),
        max_positions=256,
    )
    model = model.build(seed=0).eval()
    threading.setprofile(note)
    try:
        with serving(lambda: LocalEngine(lambda: Engine.of(model, config, tokenizer=ByteTokenizer()))) as server:
            is_on.set()
            body = {"model": "small", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
            status, _, raw = server.ask("/v1/chat/completions", {**body, "stream": True, "temperature": 0})
    finally:
        threading.setprofile(None)
    assert status == 200
    return log, classes, streamed(raw)


def ways(heading):
    names = [row[1].strip("`") for row in rows(heading)]
    return [name for name in names if name != "FastDecoder.hidden" or kernels.load() is not None]


def in_order(log, wanted, at=0):
    """The first of these names that is not called after those before it; None where all are."""
    for name in wanted:
        if name not in log[at:]:
            return name
        at = log.index(name, at)
    return None


def test_a_request_goes_there_in_the_order_of_the_page(called):
    log, _, _ = called
    assert in_order(log, ways("There")) is None
    # Nothing of the front end's part was called before its turn.
    front = [
        name
        for name in ways("There")
        if not name.startswith(("EngineLoop", "Scheduler", "ModelRunner", "Fast", "Sampler"))
    ]
    assert sorted(front, key=log.index) == front


def test_a_token_comes_back_in_the_order_of_the_page(called):
    log, _, text = called
    assert text
    assert in_order(log, ways("Back"), log.index("Scheduler.update")) is None


def test_three_objects_hold_a_token_and_nothing_runs_beside_what_the_page_names(called):
    _, classes, _ = called
    held = [name for row in rows("Back") for name in NAME.findall(row[3])]
    assert held == ["Stream", "Completion", "ChatShape"]
    parts, around = (NAME.findall(PAGE.split(f"{what}: ")[1].split(". ")[0]) for what in ("Their parts", "Around them"))
    assert classes == {*held, *parts, *around}


def test_every_file_and_name_of_the_page_is_there():
    package = ROOT / "src" / "anabranch"
    files = [path for folder in ("serving", "web") for path in (package / folder).rglob("*.py")]
    classes = {name for path in files for name in re.findall(r"^class (\w+)", path.read_text(), re.MULTILINE)}
    named = set(NAME.findall(PAGE))
    of_files = {name for name in named if "/" in name and name.endswith((".py", ".cpp"))}
    of_classes = {name for name in named - of_files if name[0].isupper() and "." not in name}
    assert of_files
    assert {name for name in of_files if not any((place / name).is_file() for place in (ROOT, package))} == set()
    assert of_classes
    assert of_classes <= classes


def test_the_order_of_folders_is_that_of_the_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [layers] = [contract["layers"] for contract in contracts if contract.get("containers") == ["anabranch.serving"]]
    told = NAME.findall(PAGE.split("(`pyproject.toml`): ")[1].split(". ")[0].replace(" and at the bottom", ""))
    assert [name.removesuffix(".py") for name in told] == [name for layer in layers for name in layer.split(" | ")]
