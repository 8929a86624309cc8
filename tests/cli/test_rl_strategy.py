"""What is written for a gateway after a training: it can be read, whatever models are called and told to be."""

import tomllib

from hypothesis import given
from hypothesis import strategies as st

from anabranch.cli.rl.strategy import GATEWAY, STRATEGY, write_strategy
from anabranch.rl.router_r1 import LiveWorld, PoolModel, PoolPrice

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.sampled_from(
    ["\U0001f680 quick", "\x7f", "a\r\nb", '"', "\\"]
)
ENGINE = {"adapters": {"load": ["a=b"]}, "memory": 0.5, "deterministic": True}


def world(models, **fields):
    """As it is after a training, without tokens and questions."""
    made = object.__new__(LiveWorld)
    made.config = LiveWorld.Config(questions="q.jsonl", tokenizer="t", models=models, **fields)
    return made


@given(names=st.lists(TEXTS, min_size=2, max_size=2, unique=True), about=TEXTS, instruction=TEXTS)
def test_what_is_written_is_read_back(tmp_path_factory, names, about, instruction):
    out = tmp_path_factory.getbasetemp() / "strategy"
    price = PoolPrice(output_usd=1e-7)
    models = {
        names[0]: PoolModel(price=price, about=about, base_url="http://h/v1", key_env="KEY", model="m"),
        names[1]: PoolModel(price=price, engine="local", engine_settings=ENGINE),
    }
    written = write_strategy(world(models, instruction=instruction), out)
    assert written == {"strategy": str(out / STRATEGY), "gateway": str(out / GATEWAY)}
    read = {name: tomllib.loads((out / name).read_text(encoding="utf-8")) for name in (STRATEGY, GATEWAY)}
    told = read[STRATEGY]["strategies"]["router-r1"]
    assert told["about"] == {names[0]: about, names[1]: "1e-07 dollars a million tokens"}
    assert (told["policy"], told["kind"], told["instruction"]) == ("router", "router_r1", instruction)
    assert read[GATEWAY]["strategies"] == read[STRATEGY]["strategies"]
    assert read[GATEWAY]["require_key"] is False
    router, asked, local = read[GATEWAY]["models"]
    assert router["deployments"] == [{"provider": {"kind": "local", "model": str(out.resolve())}}]
    assert (asked["name"], asked["price"]) == (names[0], {"input_usd": 0.0, "output_usd": 1e-7})
    assert asked["deployments"] == [
        {"provider": {"kind": "openai", "model": "m", "base_url": "http://h/v1", "key_env": "KEY"}}
    ]
    assert local["deployments"][0]["provider"]["engine"] == ENGINE


def test_settings_that_a_gateway_cannot_have_are_told(tmp_path, caplog):
    model = PoolModel(price=PoolPrice(output_usd=1), base_url="http://h/v1", settings={"reasoning_effort": "low"})
    write_strategy(world({"a\n": model}), tmp_path)
    text = (tmp_path / GATEWAY).read_text()
    assert tomllib.loads(text)["models"][1]["name"] == "a\n"
    assert r"# settings of 'a\n' are not in gateway.toml" in text
    assert "settings of" in caplog.text


def test_a_folder_that_toml_cannot_name(tmp_path, caplog):
    out = tmp_path / "b\udcff"
    out.mkdir()
    written = write_strategy(world({"a": PoolModel(price=PoolPrice(output_usd=1), base_url="http://h/v1")}), out)
    assert written == {"strategy": str(out / STRATEGY)}
    assert "gateway.toml was not written: it cannot be written as TOML" in caplog.text
