"""The version of layers that are served: those that answer otherwise have another, in whatever they differ."""

import json
import shutil
from dataclasses import fields

import pytest
from safetensors.torch import load_file, save_file

from anabranch.adapters.glider import GliderConfig, HiddenStates, describe_expert
from anabranch.adapters.glider.folder import Described, read_described
from anabranch.adapters.glider.settings import KEYS
from anabranch.data import ByteTokenizer
from anabranch.errors import CheckpointError, ConfigError
from anabranch.serving.engine import layer_reader
from anabranch.serving.engine.adapter_place import MOST_CONFIG, files_of, folder_of
from anabranch.serving.engine.adapter_reader import AdapterReader
from anabranch.serving.engine.adapter_rows import Sites
from scripted_endpoint import endpoint, vectors
from served_adapters import make_model, make_pool, make_routers

# Another value of each field.
FIELDS = {
    "local": "arrow",
    "instruction": False,
    "top_k": 1,
    "top_p": 0.5,
    "weight": 2.0,
    "gamma": 50.0,
    "beta": 1.0,
    "threshold": 0.5,
    "temperature": 2.0,
    "clusters": 2,
}


@pytest.fixture(scope="module")
def version_of():
    model = make_model()
    read = AdapterReader(model.config, Sites(model), states=HiddenStates(model, ByteTokenizer()))
    return lambda place: read(str(place)).version


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_pool(tmp_path_factory.mktemp("made") / "pool")


@pytest.fixture
def pool(made, tmp_path):
    shutil.copytree(made, tmp_path / "pool")
    return tmp_path / "pool"


def said(pool, texts):
    describe_expert(pool / "law", instruction=texts)


def config(pool, **table):
    path = pool / "law" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **table}))


def gate(pool):
    gates = read_described(pool / "law").gates
    first = next(iter(gates))
    describe_expert(pool / "law", gate={**gates, first: gates[first].flip(0)})


def swap(pool):
    (pool / "law").rename(pool / "x")
    (pool / "sql").rename(pool / "law")
    (pool / "x").rename(pool / "sql")


def others(pool):
    """Numbers of an adapter of the same sizes."""
    path = pool / "law" / "adapter_model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(path).items()}, path)


# What beside a pool's config decides what it answers; the first of each are of `Described`.
CHANGES = {
    "instructions": lambda pool: said(pool, "Name the mountain that a picture shows."),
    "instructions, another wording": lambda pool: said(
        pool, [*read_described(pool / "law").instructions, "Find the statute of a case."]
    ),
    "instructions, none": lambda pool: (pool / "law" / "glider.json").unlink(),
    "gates": gate,
    "gates, none": lambda pool: (pool / "law" / "glider.safetensors").unlink(),
    "numbers": others,
    "alpha": lambda pool: config(pool, lora_alpha=3),
    "rslora": lambda pool: config(pool, use_rslora=True),
    "one less": lambda pool: shutil.rmtree(pool / "sum"),
    "one more": lambda pool: shutil.copytree(pool / "sum", pool / "more"),
    "order": swap,
}


def test_all_fields_are_looked_at():
    assert set(FIELDS) == {field.name for field in fields(GliderConfig)}
    assert {field.name for field in fields(Described)} <= set(CHANGES)


@pytest.mark.parametrize("field", FIELDS)
def test_pools_that_choose_otherwise_have_another_version(field, pool, version_of):
    """As the file beside them says, of each setting that there is."""
    before = version_of(pool)
    (pool / "pool.json").write_text(json.dumps({field: FIELDS[field]}))
    assert version_of(pool) != before


def test_by_whom_queries_are_compared_is_of_the_version(pool, version_of):
    """What an endpoint is asked with is not: a key, how long."""
    before = version_of(pool)
    with endpoint(lambda path, body: (200, vectors(*[[1.0, float(len(text))] for text in body["input"]]), {})) as (
        url,
        _,
    ):
        one, other = {"url": url, "model": "e"}, {"url": url, "model": "f"}
        told = [
            {"embedder": one},
            {"embedder": other},
            {"writer": one},
            {"embedder": one, "writer": one},
            {"embedder": "hidden-states"},
        ]
        versions = []
        for said in told:
            (pool / "pool.json").write_text(json.dumps(said))
            versions.append(version_of(pool))
        assert len({before, *versions}) == len(told) + 1
        (pool / "pool.json").write_text(json.dumps({"embedder": {**one, "timeout_s": 3}, "wait_s": 1}))
        assert version_of(pool) == versions[0]
    (pool / "pool.json").write_text(json.dumps({"embedder": "tfidf"}))
    assert version_of(pool) == before


def test_to_look_at_a_pool_asks_nobody(pool, monkeypatch):
    """What a start would refuse of settings is told; that an endpoint does not answer is for when it is asked."""
    look = AdapterReader(make_model().config).look
    for said in ({"embedder": {"url": "http://127.0.0.1:9/v1", "model": "e"}}, {"embedder": "hidden-states"}):
        (pool / "pool.json").write_text(json.dumps(said))
        assert look(str(pool)).nbytes > 0
    (pool / "pool.json").write_text(
        '{"embedder": {"url": "http://127.0.0.1:9/v1", "model": "e", "key_env": "NO_SUCH"}}'
    )
    with pytest.raises(ConfigError, match=r"pool\.json: embedder: key_env is 'NO_SUCH', "):
        look(str(pool))
    monkeypatch.setenv(KEYS, "NO_SUCH")
    with pytest.raises(ConfigError, match=r"pool\.json: embedder: the key of .* is to be in NO_SUCH, which is not set"):
        look(str(pool))


def test_what_a_pool_says_is_what_it_chooses_by(pool):
    (pool / "pool.json").write_text('{"threshold": 0.25, "weight": 7, "local": "none"}')
    assert layer_reader.pool_of(folder_of(str(pool), None)).config == GliderConfig(
        threshold=0.25, weight=7, local="none"
    )
    # A kind in front says for itself what it decides.
    arrow = layer_reader.pool_of(folder_of(f"arrow:{pool}", None)).config
    assert arrow == GliderConfig(threshold=0.25, weight=7, local="arrow", instruction=False)


@pytest.mark.parametrize(
    ("text", "error", "told"),
    [
        ('{"treshold": 0.25}', ConfigError, "pool.json: .*treshold"),
        ('{"threshold": 2}', ConfigError, "pool.json: .*threshold"),
        ('{"top_k": 1, "top_p": 0.5}', ConfigError, "pool.json: .*give one of them"),
        ('{"top_k": 99}', ConfigError, "pool.json: top_k is 99, but there are 3"),
        ('{"clusters": 99}', ConfigError, "pool.json: clusters is 99; of 3 experts"),
        ('{"weight": NaN}', ConfigError, "pool.json: weight is nan; it must be a finite number"),
        ("[" * 5000, CheckpointError, "pool.json: it is nested too deeply"),
        ("[1]", CheckpointError, "pool.json: it holds a list"),
        ("{", CheckpointError, "cannot read .*pool.json"),
        (
            '{"weight": ' + " " * MOST_CONFIG + "1}",
            CheckpointError,
            "pool.json: it has .* bytes; a pool is served with",
        ),
    ],
)
def test_what_a_pool_cannot_say(pool, version_of, text, error, told):
    (pool / "pool.json").write_text(text)
    with pytest.raises(error, match=told):
        version_of(pool)
    # Of one adapter it says nothing.
    assert version_of(pool / "law")


def test_the_file_of_a_pool_is_seen(pool):
    assert pool / "pool.json" in files_of([str(pool)])
    assert not any(path.name == "pool.json" for path in files_of([str(pool / "law")]))


def test_kinds_of_one_pool_have_other_versions(pool, version_of):
    """Whether requests are compared with instructions at all was of no account."""
    versions = {kind: version_of(f"{kind}{pool}") for kind in ("", "glider:", "phatgoose:", "arrow:")}
    assert versions[""] == versions["glider:"]
    assert len(set(versions.values())) == 3


@pytest.mark.parametrize("change", CHANGES)
def test_pools_of_other_adapters_have_another_version(change, pool, version_of):
    before = version_of(pool)
    CHANGES[change](pool)
    assert version_of(pool) != before


def test_what_answers_the_same_has_the_same_version(made, pool, version_of):
    """Wherever it lies; what an adapter's card tells others; and instructions where nothing is compared with them."""
    versions = {kind: version_of(f"{kind}{pool}") for kind in ("", "phatgoose:", "arrow:")}
    assert version_of(made) == versions[""]
    card = pool / "law" / "glider.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "notes": "mine"}))
    assert version_of(pool) == versions[""]
    said(pool, "Name the mountain that a picture shows.")
    assert {kind: version_of(f"{kind}{pool}") == versions[kind] for kind in versions} == {
        "": False,
        "phatgoose:": True,
        "arrow:": True,
    }


def test_the_names_of_tasks_are_of_the_version(tmp_path, version_of):
    """A request says its task by name."""
    place = tmp_path / "multi_head_routed"
    made = make_routers(tmp_path)
    before = version_of(made["multi_head_routed"])
    table = place / "adapter.json"
    text = table.read_text()
    assert '"sql"' in text
    table.write_text(text.replace('"sql"', '"poems"'))
    assert version_of(place) != before
