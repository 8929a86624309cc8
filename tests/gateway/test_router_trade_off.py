"""A fitted router is served at the trade-off, or within the budget, that the config says."""

import pytest

from anabranch.cli.main import main
from anabranch.errors import ConfigError
from anabranch.gateway.config import load_config
from anabranch.gateway.runtime import Runtime
from anabranch.routers.fitted import FittedRouter
from made_outcomes import MODELS, made_outcomes, write_outcomes

MODEL = """
[[models]]
name = "{name}"
price = {{ input_usd = 1, output_usd = 1 }}
deployments = [{{ provider = {{ kind = "mock", model = "{name}" }} }}]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spend")
    write_outcomes(folder / "data.jsonl", made_outcomes(200))
    fit = "gateway fit {0}/data.jsonl --out {0}/{1} --quiet --hold-out 0 --strategy ridge {2}"
    assert main(fit.format(folder, "routers", "--strategy mf").split()) == 0
    assert main(fit.format(folder, "kept", "--set ridge.budget=0.003").split()) == 0
    return folder


def served(place, setting, router="routers/ridge.safetensors"):
    path = place / "gateway.toml"
    models = "".join(MODEL.format(name=name) for name in MODELS)
    path.write_text(f'{models}\n[strategies.learned]\nrouter = "{place}/{router}"\n{setting}\n')
    return Runtime(load_config(path)).decider.lanes["learned"].strategy


def test_the_config_says_the_trade_off(place):
    saved = FittedRouter.load(place / "routers/ridge.safetensors")
    assert served(place, "").config.trade_off == saved.strategy.config.trade_off == 0
    assert served(place, "trade_off = 7.5").config.trade_off == 7.5
    spent = saved.about["spending"]
    assert spent[0][1] > 0.003 > spent[-1][1]
    found = served(place, "budget_usd = 0.003").config.trade_off
    assert dict(map(tuple, spent))[found] <= 0.003
    # As it was fitted within a budget, it is served.
    kept = served(place, "", "kept/ridge.safetensors")
    assert kept.config.trade_off > 0
    assert kept.config.budget == 0.003


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("budget_usd = 1e-9", "below the"),
        ("budget_usd = 0", "budget_usd"),
        ("budget_usd = 1\ntrade_off = 1", "finds the trade_off of a fitted router"),
    ],
)
def test_what_cannot_be_kept_is_said_at_the_start(place, setting, message):
    with pytest.raises(ConfigError, match=message):
        served(place, setting)


def test_a_router_without_what_it_takes_is_told(place):
    saved = FittedRouter.load(place / "routers/ridge.safetensors")
    FittedRouter(strategy=saved.strategy, models=saved.models, embedder=saved.embedder).save(place / "old.safetensors")
    with pytest.raises(ConfigError, match="fit it anew"):
        served(place, "budget_usd = 1", "old.safetensors")
    path = place / "plain.toml"
    path.write_text(MODEL.format(name="small") + '\n[strategies.learned]\nkind = "cheapest"\nbudget_usd = 1\n')
    with pytest.raises(ConfigError, match=r"learned.*budget_usd is 1, and finds"):
        load_config(path)
