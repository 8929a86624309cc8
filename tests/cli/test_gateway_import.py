"""``anabranch gateway import``, end to end."""

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch import extras
from anabranch.cli.gateway.convert import _changed
from anabranch.cli.main import main
from anabranch.gateway.config import import_litellm, load_config
from anabranch.gateway.config.file import config_from
from anabranch.routers.money import MOST_NANO, NANO, Price

LITELLM = """
model_list:
  - model_name: gpt
    litellm_params: {model: openai/gpt-4o, api_key: os.environ/OPENAI_API_KEY, rpm: 60}
    model_info: {input_cost_per_token: 0.0000025, output_cost_per_token: 0.00001}
  - model_name: gpt
    litellm_params: {model: openai/gpt-4o, api_base: "http://10.0.0.1:8000/v1", api_key: os.environ/OTHER_KEY}
  - model_name: claude
    litellm_params: {model: anthropic/claude-3-5-sonnet, api_key: os.environ/ANTHROPIC_API_KEY}
router_settings: {routing_strategy: simple-shuffle, num_retries: 3, timeout: 30, fallbacks: [{gpt: [claude]}], weird: 1}
general_settings: {master_key: os.environ/MASTER}
"""


@pytest.fixture
def litellm(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(LITELLM)
    return path


def test_what_is_written_is_a_config_of_ours(litellm, tmp_path, capsys, monkeypatch):
    for name in ("MASTER", "OPENAI_API_KEY", "OTHER_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, "a-key-of-the-operator")
    out = tmp_path / "gateway.yaml"
    assert main(["gateway", "import", str(litellm), "--out", str(out), "--partial", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["models"] == ["gpt", "claude"]
    assert any("weird" in line for line in shown["left"])
    config = load_config(out)
    gpt, claude = config.models
    assert [one.provider.key_env for one in gpt.deployments] == ["OPENAI_API_KEY", "OTHER_KEY"]
    assert (gpt.deployments[0].rpm, gpt.price.input, gpt.price.output) == (60, 2_500_000_000, 10_000_000_000)
    assert claude.deployments[0].provider.owner.kind == "anthropic"
    assert config.fallbacks == {"gpt": ("claude",)}
    assert "null" not in out.read_text()  # defaults stay out of it


@pytest.mark.parametrize("as_json", [False, True])
def test_where_something_is_left_out_nothing_is_written(litellm, tmp_path, capsys, as_json):
    """An operator who does not read the list would run with less than they had."""
    out = tmp_path / "g.yaml"
    assert main(["gateway", "import", str(litellm), "--out", str(out), *(["--json"] if as_json else [])]) == 2
    shown = capsys.readouterr()
    assert not out.exists()
    assert "--partial" in shown.err
    for line in ("router_settings.weird has no counterpart", "clients that send it with requests get 401"):
        assert line in shown.err
        assert not as_json or any(line in left for left in json.loads(shown.out)["left"])


def test_where_nothing_is_left_out_it_is_written(litellm, tmp_path, capsys, monkeypatch):
    text = LITELLM.replace(", weird: 1", "").replace("general_settings: {master_key: os.environ/MASTER}", "")
    litellm.write_text(text)
    for name in ("OPENAI_API_KEY", "OTHER_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, "a-key-of-the-operator")
    assert main(["gateway", "import", str(litellm), "--out", str(tmp_path / "g.yaml")]) == 0
    assert "left out" not in capsys.readouterr().err
    # As there, where no master key is set.
    assert load_config(tmp_path / "g.yaml").require_key is False


@pytest.mark.parametrize("text", ["", "model_list: 3", "{", "model_list: []"])
def test_what_is_no_config_is_told_in_a_line(text, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert main(["gateway", "import", str(path), "--out", str(tmp_path / "g.yaml")]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "g.yaml").exists()


def test_a_file_is_not_written_over_itself(litellm, capsys):
    assert main(["gateway", "import", str(litellm), "--out", str(litellm)]) == 2
    assert litellm.read_text() == LITELLM
    assert "name another" in capsys.readouterr().err


DEAR = """
model_list:
  - model_name: gpt
    litellm_params: {model: azure/our-own, api_base: "https://x.openai.azure.com", api_key: os.environ/OPENAI_API_KEY}
    model_info: {base_model: azure/gpt-4o}
  - model_name: cheap
    litellm_params: {model: hosted_vllm/x, api_base: "http://10.0.0.1/v1"}
    model_info: {input_cost_per_token: 0.0000001, output_cost_per_token: 0.000000000000001}
"""


def test_prices_are_written_in_dollars_and_read_back_the_same(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-of-the-operator")
    path, out = tmp_path / "config.yaml", tmp_path / "gateway.yaml"
    path.write_text(DEAR)
    assert main(["gateway", "import", str(path), "--out", str(out)]) == 0
    capsys.readouterr()
    wanted, found = import_litellm(path).config.models, load_config(out).models
    assert [model.price for model in found] == [model.price for model in wanted]
    assert found[0].deployments[0].price == wanted[0].deployments[0].price
    assert found[0].deployments[0].price.tiers["batch"].input == 1_250_000_000
    text = out.read_text()
    assert "input_usd: 0.1\n" in text
    assert "output_usd: 1.0e-09\n" in text
    assert not re.search(r"\b(input|output|request): ", text)


WHOLE = st.integers(0, MOST_NANO // NANO * NANO)


@settings(max_examples=30)
@given(
    st.builds(Price, **dict.fromkeys(("input", "output", "cached_input", "request"), WHOLE)),
    WHOLE,
)
def test_no_price_is_changed_by_being_written(price, nano):
    whole = price.replace(tiers={"flex": Price(input=nano)}, long_context=9, long=Price(output=nano))
    table = yaml.safe_load(yaml.safe_dump(_changed(whole)))
    provider = {"kind": "mock", "model": "m"}
    data = {"models": [{"name": "m", "price": table, "deployments": [{"provider": provider}]}]}
    assert config_from(data, {}, Path("x.yaml")).models[0].price == whole


@pytest.mark.parametrize("as_json", [False, True])
def test_an_extra_that_is_not_installed_is_named_before_the_next_command_wants_it(
    tmp_path, capsys, monkeypatch, as_json
):
    path, out = tmp_path / "config.yaml", tmp_path / "gateway.yaml"
    path.write_text(
        "model_list:\n"
        "  - model_name: claude\n"
        "    litellm_params: {model: bedrock/anthropic.claude-x, aws_region_name: us-east-1}\n"
        "  - model_name: gem\n"
        "    litellm_params: {model: vertex_ai/gemini-2.5-pro, vertex_project: p, vertex_location: us-central1}\n"
        "router_settings: {redis_url: os.environ/REDIS}\n"
    )
    monkeypatch.delenv("AWS_BEARER_TOKEN_BEDROCK", raising=False)
    monkeypatch.setattr(
        extras, "is_installed", lambda module: module not in ("botocore", "redis", "google", "cryptography")
    )
    line = ["gateway", "import", str(path), "--out", str(out), *(["--json"] if as_json else [])]
    assert main(line) == 0
    shown = capsys.readouterr()
    lines = json.loads(shown.out)["install"] if as_json else shown.err.splitlines()
    for name in ("bedrock", "redis"):
        assert any("pip install" in line and name in line for line in lines), lines
    monkeypatch.setenv("AWS_BEARER_TOKEN_BEDROCK", "x")
    assert main(line) == 0
    shown = capsys.readouterr()
    assert "provider bedrock" not in shown.out + shown.err
    monkeypatch.setattr(extras, "is_installed", lambda module: True)
    assert main(line) == 0
    shown = capsys.readouterr()
    assert "pip install" not in shown.out + shown.err


UNPRICED = """
model_list:
  - model_name: gpt
    litellm_params: {model: openai/gpt-4o, api_key: os.environ/OPENAI_API_KEY}
    model_info: {input_cost_per_token: 0.0000025, output_cost_per_token: 0.00001, cache_creation_input_token_cost: 0.000003}
  - model_name: gpt
    litellm_params: {model: openai/gpt-4o, api_key: os.environ/OPENAI_API_KEY}
    model_info: {input_cost_per_token: 0.000005, output_cost_per_token: 0.00002}
  - model_name: free
    litellm_params: {model: hosted_vllm/llama, api_base: "http://10.0.0.1/v1", api_key: os.environ/OPENAI_API_KEY}
    model_info: {input_cost_per_token: 0, output_cost_per_token: 0}
  - model_name: own
    litellm_params: {model: hosted_vllm/llama, api_base: "http://10.0.0.1/v1", api_key: os.environ/OPENAI_API_KEY}
  - model_name: listed
    litellm_params: {model: openai/gpt-4o-mini, api_key: os.environ/OPENAI_API_KEY}
"""


def test_prices_are_kept_and_those_that_nobody_knows_are_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-of-the-operator")
    path, out = tmp_path / "config.yaml", tmp_path / "gateway.yaml"
    path.write_text(UNPRICED)
    assert main(["gateway", "import", str(path), "--out", str(out)]) == 0
    told = capsys.readouterr()
    lines = [line for line in (told.out + told.err).splitlines() if line.startswith("no price")]
    assert len(lines) == 1
    assert "deployment own of model own has no price" in lines[0]
    assert main(["gateway", "import", str(path), "--out", str(out), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["unpriced"]) == 1
    gpt, free, own, listed = load_config(out).models
    assert (gpt.price.input, gpt.price.output, gpt.price.cache_write) == (2_500_000_000, 10_000_000_000, 3_000_000_000)
    assert [one.price and one.price.input for one in gpt.deployments] == [None, 5_000_000_000]
    assert free.price.is_free
    assert own.price is listed.price is None
    # Likewise where the config is checked.
    assert main(["gateway", "serve", "--config", str(out), "--check"]) == 0
    told = capsys.readouterr()
    assert [line for line in (told.out + told.err).splitlines() if line.startswith("no price")] == lines
