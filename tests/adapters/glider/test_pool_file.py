"""``pool.json`` says how a pool chooses to Python as to commands and servers."""

import json
from pathlib import Path

import pytest

from anabranch.adapters.glider import GliderConfig, GliderPool, HiddenStates, PoolSettings
from anabranch.adapters.glider.pool_file import POOL, pool_file, settings_in
from anabranch.data import ByteTokenizer
from anabranch.errors import AnabranchError, CheckpointError, ConfigError
from anabranch.serving.engine.adapter_place import folder_of
from anabranch.serving.engine.layer_reader import pool_of
from scripted_endpoint import chat, endpoint, vectors
from served_adapters import make_model, make_pool


@pytest.fixture
def pool(tmp_path):
    return Path(make_pool(tmp_path / "pool"))


def says(pool, **settings):
    (pool / POOL).write_text(json.dumps(settings))


def test_without_a_file_it_is_as_by_default(pool):
    assert pool_file(pool) is None
    assert settings_in(pool, 3) == PoolSettings()
    assert GliderPool.load(pool).config == GliderConfig()


SAID = [
    {"weight": 7.0, "top_k": 1, "local": "arrow"},
    {"threshold": 0.4},
    {"instruction": False},
    {"embedder": "tfidf", "clusters": 2},
    # Of which nothing can be made.
    {"embedder": "bert"},
    {"embedder": "hidden-states"},
    {"top_k": 4},
    {"topk": 1},
    {"weight": "much"},
    {"wait_s": 3},
    {"writer": {"url": "http://192.0.2.1/v1", "model": "m"}},
]


@pytest.mark.parametrize("said", SAID, ids=[json.dumps(said) for said in SAID])
def test_python_chooses_as_a_server_does_or_says_why_not(pool, said):
    says(pool, **said)
    found = []
    for make in (lambda: GliderPool.load(pool), lambda: pool_of(folder_of(str(pool), None))):
        try:
            found.append(make().config)
        except AnabranchError as error:
            found.append((type(error), str(error)))
    assert found[0] == found[1]
    if isinstance(found[0], tuple):
        assert found[0][1].startswith(f"{pool / POOL}: ")
    else:
        assert found[0] == GliderConfig(**{name: value for name, value in said.items() if name != "embedder"})


def test_a_file_that_cannot_be_read_is_told(pool):
    (pool / POOL).write_text("{")
    with pytest.raises(CheckpointError, match=r"pool\.json"):
        GliderPool.load(pool)


def test_what_is_said_goes_before_the_file(pool):
    says(pool, embedder="hidden-states", weight=7.0)
    own = GliderConfig(weight=1.0)
    assert GliderPool.load(pool, own).config == own
    embedder = HiddenStates(make_model(), ByteTokenizer())
    made = GliderPool.load(pool, embedder=embedder, cached=3)
    assert (made.config, made.matcher.embedder) == (GliderConfig(weight=7.0), embedder)
    with pytest.raises(ConfigError, match=r"pool\.json: embedder is 'hidden-states', of the model"):
        GliderPool.load(pool)


def test_endpoints_of_the_file_are_asked(pool):
    def answer(path, body):
        if path.endswith("completions"):
            return 200, chat("It is of law"), {}
        return 200, vectors(*[[float("law" in text) + 0.01, 1.0] for text in body["input"]]), {}

    with endpoint(answer) as (url, seen):
        says(pool, embedder={"url": url, "model": "e"}, writer={"url": url, "model": "w"}, weight=5.0)
        GliderPool.load(pool).terms("Which one applies?")
        assert [path for path, _, _ in seen] == ["/v1/embeddings", "/v1/chat/completions", "/v1/embeddings"]
        seen.clear()
        GliderPool.load(pool, writer=lambda prompt: "It is of my own").terms("Which one applies?")
        assert [body["input"] for _, body, _ in seen][1:] == [["It is of my own"]]


@pytest.mark.parametrize(("kind", "local"), [("arrow", "arrow"), ("phatgoose", "phatgoose")])
def test_a_kind_goes_before_the_file(pool, kind, local):
    says(pool, local="arrow", weight=7.0)
    made = settings_in(pool, 3, kind)
    assert (made.local, made.instruction, made.weight) == (local, False, 7.0)
