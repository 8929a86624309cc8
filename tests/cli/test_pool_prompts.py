"""``generate`` and ``chat`` with a pool compare what is asked with the instructions of its adapters, as a server does."""

import io
import json
import shutil

import pytest

from anabranch.bounds import MOST_QUERY
from anabranch.data import ByteTokenizer
from anabranch.lm import save_model
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.config import ServingConfig
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.local import LocalEngine
from scripted_endpoint import endpoint, vectors
from served_adapters import INSTRUCTIONS, make_model, make_pool
from serving_thread import serving

# What a pool's pool.json says, by the pool's name; each chooses otherwise.
POOLS = {
    "plain": None,
    "heavy": {"weight": 1000.0},
    "local": {"weight": 0.0},
    "states": {"weight": 1000.0, "embedder": "hidden-states"},
}
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


@pytest.mark.parametrize("pool", POOLS)
def test_a_callers_instruction_is_compared_in_the_place_of_what_is_asked(here, root, server, pool):
    adapter, asked = ("--adapter", root / pool), INSTRUCTIONS["sql"]
    for told in (INSTRUCTIONS["law"], ""):
        given = (*adapter, "--instruction", told)
        assert said(here, "generate", root / "base", "-p", asked, *given) == served(
            server, "/v1/completions", model=pool, prompt=asked, query=told
        )
        messages = [{"role": "user", "content": asked}]
        assert said(here, "chat", root / "base", "-m", asked, *given) == served(
            server, "/v1/chat/completions", model=pool, messages=messages, query=told
        )
    if POOLS[pool] and POOLS[pool]["weight"] > 0:
        by_law = said(here, "generate", root / "base", "-p", asked, *adapter, "--instruction", INSTRUCTIONS["law"])
        assert by_law == said(here, "generate", root / "base", "-p", asked, "--adapter", root / pool / "law")


def test_an_instruction_that_nobody_compares(here, root):
    for command, option in (("generate", "-p"), ("chat", "-m")):
        for given, message in (
            ((), "name a pool with --adapter"),
            (("--adapter", root / "plain" / "law"), "name a pool with --adapter"),
            (("--adapter", root / "plain", "--instruction", "x" * (MOST_QUERY + 1)), "has 2,001 characters"),
        ):
            code, out, err = here(command, root / "base", option, "x", "--instruction", "y", *given)
            assert (code, out, message in err, len(err.strip().splitlines())) == (2, "", True, 1), err


def test_commands_choose_by_the_embedder_of_the_file(here, root, tmp_path):
    """What `route` says is nearest is what `generate` answers with, also where the default would find another."""
    pool = tmp_path / "pool"
    shutil.copytree(root / "plain", pool)

    def embeds(path, body):
        # Not what words would find.
        return (
            200,
            vectors(*[[float("news" in text or "SQL" in text), float("law" in text), 0.1] for text in body["input"]]),
            {},
        )

    with endpoint(embeds) as (url, seen):
        table = {"weight": 1000.0, "top_k": 1, "embedder": {"url": url, "model": "e"}}
        (pool / "pool.json").write_text(json.dumps(table))
        code, out, err = here("adapters", "route", pool, "is it lawful?", "--json")
        assert code == 0, err
        assert json.loads(out)["retrieved"][0]["name"] == "law"
        given = ("-p", "is it lawful?", "--adapter")
        by_pool = said(here, "generate", root / "base", *given, pool)
        assert by_pool == said(here, "generate", root / "base", *given, pool / "law")
        rows = tmp_path / "rows.jsonl"
        rows.write_text('{"task": "t", "input": "is it lawful?", "output": "yes"}\n')
        scores = []
        for adapter in (pool, pool / "law"):
            code, out, err = here("adapters", "eval", root / "base", adapter, "--data", rows, "--json")
            assert code == 0, err
            scores.append(json.loads(out)["nats_per_token"])
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
        code, _, err = here("adapters", "report", root / "base", pool, "--data", rows, "--out", tmp_path / "report")
        assert code == 0, err
        use = json.loads((tmp_path / "report" / "adapters.json").read_text())
        assert "law" in json.dumps(use)
        assert len(seen) >= 4
    for line in (
        ("adapters", "route", pool, "other?"),
        ("adapters", "eval", root / "base", pool, "--data", rows),
        ("generate", root / "base", "-p", "x", "--adapter", pool),
    ):
        code, _, err = here(*line)
        assert (code, "cannot reach" in err, len(err.strip().splitlines())) == (2, True, 1), (line, err)


@pytest.mark.parametrize("pool", ["plain", "heavy", "local"])
def test_whether_a_query_is_of_the_pool_is_said_by_the_threshold_whatever_the_weight(here, root, pool):
    for query, is_known in ((INSTRUCTIONS["law"], True), ("Tell me of a river.", False)):
        code, out, err = here("adapters", "route", root / pool, query, "--json")
        assert code == 0, err
        assert json.loads(out)["known_task"] == is_known


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"embedder": "bert"},
            "pool.json: embedder is 'bert'; it must be 'tfidf', 'hidden-states' or a table of an endpoint",
        ),
        (
            {"writer": {"url": "http://x.example/v1", "model": "m"}},
            "pool.json: writer: the endpoint http://x.example/v1 is not on this",
        ),
        ({"embeder": "tfidf"}, "did you mean 'embedder'?"),
    ],
)
def test_all_commands_refuse_what_the_file_cannot_say_in_a_line(here, root, tmp_path, table, message):
    pool, rows = tmp_path / "pool", tmp_path / "rows.jsonl"
    shutil.copytree(root / "plain", pool)
    (pool / "pool.json").write_text(json.dumps(table))
    rows.write_text('{"task": "t", "input": "x", "output": "y"}\n')
    for line in (
        ("adapters", "route", pool, "x"),
        ("adapters", "eval", root / "base", pool, "--data", rows),
        ("adapters", "report", root / "base", pool, "--data", rows, "--out", tmp_path / "report"),
        ("generate", root / "base", "-p", "x", "--adapter", pool),
        ("chat", root / "base", "-m", "x", "--adapter", pool),
        ("serve", root / "base", "--adapter", f"all={pool}", "--check"),
    ):
        code, out, err = here(*line)
        assert (code, out, message in err, len(err.strip().splitlines())) == (2, "", True, 1), (line, err)


def test_states_of_the_model_need_the_model(here, root):
    code, out, err = here("adapters", "route", root / "states", INSTRUCTIONS["law"])
    assert (code, out, "pool.json: embedder is 'hidden-states', of the base model; name it with --model" in err) == (
        2,
        "",
        True,
    ), err
    code, out, err = here("adapters", "route", root / "states", INSTRUCTIONS["law"], "--model", root / "base", "--json")
    assert code == 0, err
    assert json.loads(out)["retrieved"][0] == {"name": "law", "cosine": pytest.approx(1, abs=1e-5)}


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
