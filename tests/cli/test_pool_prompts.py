"""``generate`` and ``chat`` with a pool compare what is asked with the instructions of its adapters, as a server does."""

import io
import json

import pytest

from anabranch.data import ByteTokenizer
from anabranch.lm import save_model
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.query import MOST_QUERY
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.local import LocalEngine
from served_adapters import INSTRUCTIONS, make_model, make_pool
from serving_thread import serving

# What a pool's pool.json says, by the pool's name; each chooses otherwise.
POOLS = {"plain": None, "heavy": {"weight": 1000.0}, "local": {"weight": 0.0}}
ASKED = [*INSTRUCTIONS.values(), "Tell me of a river.", INSTRUCTIONS["sum"] + " word" * MOST_QUERY]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    made = tmp_path_factory.mktemp("pools")
    save_model(made / "base", make_model(max_positions=16384), ByteTokenizer())
    for name, table in POOLS.items():
        make_pool(made / name)
        if table is not None:
            (made / name / "pool.json").write_text(json.dumps(table))
    return made


@pytest.fixture(scope="module")
def server(root):
    adapters = AdaptersConfig(load=tuple(f"{name}={root / name}" for name in POOLS))
    config = ServingConfig(num_blocks=2048, name="demo", dtype="float32", max_seqs=2, adapters=adapters)
    model = make_model(max_positions=16384)
    with serving(lambda: LocalEngine(lambda: Engine.of(model, config, tokenizer=ByteTokenizer()))) as running:
        yield running


def served(server, path, **fields):
    status, _, body = server.ask(path, {"temperature": 0, "max_tokens": 6, **fields})
    assert status == 200, body
    choice = body["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def said(here, *arguments):
    code, out, err = here(*arguments, "--max-tokens", 6, "--temperature", 0, "--json")
    assert code == 0, err
    return json.loads(out)["text"]


@pytest.mark.parametrize("asked", ASKED, ids=["sql", "law", "sum", "other", "long"])
@pytest.mark.parametrize("pool", POOLS)
def test_the_command_line_says_what_a_server_says(here, root, server, pool, asked):
    adapter = ("--adapter", root / pool)
    assert said(here, "generate", root / "base", "-p", asked, *adapter) == served(
        server, "/v1/completions", model=pool, prompt=asked
    )
    messages = [{"role": "system", "content": INSTRUCTIONS["law"]}, {"role": "user", "content": asked}]
    assert said(here, "chat", root / "base", "--system", INSTRUCTIONS["law"], "-m", asked, *adapter) == served(
        server, "/v1/chat/completions", model=pool, messages=messages
    )


def test_the_weight_of_instructions_matters(here, root):
    for command, option in (("generate", "-p"), ("chat", "-m")):
        asked = (command, root / "base", option, INSTRUCTIONS["law"], "--adapter")
        texts = {pool: said(here, *asked, root / pool) for pool in POOLS}
        # All of the weight on what the instruction says is the adapter of that instruction alone.
        assert texts["heavy"] == said(here, *asked, root / "heavy" / "law")
        assert texts["heavy"] != texts["local"]


def test_each_message_of_a_chat_is_compared_anew(here, root, server, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{text}\n" for text in INSTRUCTIONS.values())))
    code, out, err = here("chat", root / "base", "--adapter", root / "heavy", "--max-tokens", 6, "--temperature", 0)
    assert code == 0, err
    messages, texts = [], []
    for text in INSTRUCTIONS.values():
        messages.append({"role": "user", "content": text})
        texts.append(served(server, "/v1/chat/completions", model="heavy", messages=messages))
        messages.append({"role": "assistant", "content": texts[-1]})
    from anabranch.cli.output import visible

    assert out == "".join(f"{visible(text)}\n" for text in texts)
