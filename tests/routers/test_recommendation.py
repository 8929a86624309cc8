"""What is recommended of a folder of routers: kept, read, refused where it is damaged, and used where no router is named."""

import dataclasses
import json

import numpy as np
import pytest

from anabranch.errors import CheckpointError, ConfigError
from anabranch.gateway.config import StrategyConfig, default_config
from anabranch.gateway.config.recommended import with_recommended
from anabranch.gateway.decide import Decider
from anabranch.routers import strategies
from anabranch.routers.data import pool_of
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.fitted import FittedRouter, files_of, save_folder
from anabranch.routers.recommendation import keep_recommendation, pick, read_recommendation
from anabranch.routers.referee.verdict import Choice, undecided
from made_outcomes import MODELS, made_outcomes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of two routers."""
    data = made_outcomes(120)
    embedder = Hashed(Hashed.Config(dim=64)).fit(data.query)
    data = data.with_vectors(embedder.embed(data.query))
    routers = {
        name: FittedRouter(strategy=strategies.make(name).fit(data), models=pool_of(MODELS).models, embedder=embedder)
        for name in ("knn", "ridge")
    }
    return data, routers


@pytest.fixture
def folder(made, tmp_path):
    data, routers = made
    save_folder(tmp_path / "routers", routers, data, {})
    return tmp_path / "routers"


def keep(folder, **fields):
    choice = Choice(**{"kind": "strategy", "name": "ridge", "reason": "it is better", **fields})
    keep_recommendation(folder, dataclasses.replace(undecided("", 10, 0.02), recommended=choice))
    return choice


def test_what_is_kept_is_read(folder):
    assert read_recommendation(folder) is None
    assert pick(folder) is None  # two, and none is recommended
    for setting in (None, 0.0, 12.5):
        assert read_recommendation(folder) != keep(folder, setting=setting) == read_recommendation(folder)
    assert folder / "recommended.json" in files_of(folder)


@pytest.mark.parametrize(
    ("fields", "left", "stays"),
    [
        ({}, ("knn", "ridge"), True),
        ({"setting": 2.0}, ("ridge",), True),
        ({}, ("knn",), False),  # what it recommends is not there any more
        ({"kind": "model", "name": "medium"}, ("knn",), True),
        ({"kind": "model", "name": "gone"}, ("knn",), False),
    ],
)
def test_a_new_fit_keeps_what_was_recommended_where_it_can_be_served(folder, made, fields, left, stays):
    """Between fit and eval the folder can be served, as before; why it is recommended says that this was judged before."""
    kept, (data, routers) = keep(folder, **fields), made
    for _ in range(2):
        save_folder(folder, {name: routers[name] for name in left}, data, {})
    found = read_recommendation(folder)
    assert (found is not None) == stays
    if found is not None:
        assert found == dataclasses.replace(kept, reason=found.reason)
        assert found.reason == f"{kept.reason} (judged before the routers were fitted anew; eval judges again)"
        assert pick(folder).name == kept.name
        keep(folder, **fields)
        assert read_recommendation(folder) == kept


def test_a_new_fit_does_away_with_a_recommendation_that_is_damaged(folder, made):
    data, routers = made
    for text in ("{", "[]", "3", '{"version": 1, "recommended": {"kind": "strategy", "name": [], "setting": "x"}}'):
        (folder / "recommended.json").write_text(text)
        save_folder(folder, routers, data, {})
        assert read_recommendation(folder) is None


def test_a_router_is_picked_by_name_else_recommended_else_alone(folder):
    assert pick(folder, "knn").name == "knn"
    assert pick(folder / "knn.safetensors", "other").name == "knn"
    keep(folder)
    assert pick(folder, "knn").choice is None
    found = pick(folder, "learned")
    assert (found.name, found.why) == ("ridge", "eval recommends ridge, since it is better")
    assert pick(folder / "knn.safetensors").choice is None


def test_a_setting_of_the_knob_is_served_at(folder):
    keep(folder, setting=1e9)
    router = pick(folder).router
    assert router.strategy.config.trade_off == 1e9
    assert router.route("add the numbers 7").model == "small"  # the cheapest
    keep(folder, setting=0.0)
    assert pick(folder).router.route("add the numbers 7").model == "medium"


def test_a_single_model_is_always_asked(folder):
    keep(folder, kind="model", name="medium")
    found = pick(folder)
    assert found.router.route("write verses about 7").model == "medium"
    assert found.why.startswith("eval recommends always medium")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        ("[]", "not of version 1"),
        ({"version": 2}, "not of version 1"),
        ({"version": 1}, "names nothing that is recommended"),
        (
            {"version": 1, "recommended": {"kind": "other", "name": "knn", "setting": None, "reason": ""}},
            "names nothing",
        ),
        (
            {"version": 1, "recommended": {"kind": "strategy", "name": 3, "setting": None, "reason": ""}},
            "names nothing",
        ),
        (
            {"version": 1, "recommended": {"kind": "strategy", "name": "gone", "setting": None, "reason": ""}},
            "'gone', a router that",
        ),
        (
            {"version": 1, "recommended": {"kind": "model", "name": "gone", "setting": None, "reason": ""}},
            "'gone', a model that its",
        ),
    ],
)
def test_a_file_that_is_damaged_is_refused(folder, content, message):
    place = folder / "recommended.json"
    if isinstance(content, bytes):
        place.write_bytes(content)
    else:
        place.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        pick(folder)


def test_auto_is_the_recommended_one(folder):
    with pytest.raises(ConfigError, match=r"no router of .* is recommended yet \(anabranch gateway eval DATA --router"):
        with_recommended(default_config(), folder)
    keep(folder, setting=1e9)
    config = with_recommended(default_config(), folder)
    assert config.default == "recommended"
    lane = Decider(config, None).lanes["recommended"]
    assert (lane.strategy.name, lane.strategy.config.trade_off) == ("ridge", 1e9)
    with pytest.raises(ConfigError, match=r"strategies\.recommended is in the config"):
        with_recommended(config, folder)
    assert with_recommended(default_config(), folder / "knn.safetensors").default == "recommended"


def test_a_strategy_of_the_config_takes_what_is_recommended(folder):
    config = default_config().replace(strategies={"learned": StrategyConfig(router=str(folder))}, default_strategy=None)
    with pytest.raises(ConfigError, match=r"which holds knn, ridge; name the strategy as one of them: no router of"):
        Decider(config, None)
    keep(folder)
    assert Decider(config, None).lanes["learned"].strategy.name == "ridge"
    named = config.replace(strategies={"knn": StrategyConfig(router=str(folder))})
    assert Decider(named, None).lanes["knn"].strategy.name == "knn"


def test_models_that_are_not_in_the_config_are_told_at_the_start(folder):
    config = default_config()
    keep(folder, kind="model", name="medium")
    without = config.replace(
        models=tuple(model for model in config.models if model.name != "medium"),
        fallbacks={},
        strategies={"learned": StrategyConfig(router=str(folder))},
        default_strategy=None,
    )
    with pytest.raises(
        ConfigError, match=r"recommends always medium, .*and medium is not in the config, which has small, large"
    ):
        Decider(without, None)
    keep(folder)
    other = without.replace(models=tuple(model.replace(name=f"other-{model.name}") for model in without.models))
    with pytest.raises(ConfigError, match=r"small, medium, large are not in the config"):
        Decider(other, None)


def test_vectors_are_those_of_the_router(folder, made):
    keep(folder, setting=0.0)
    found = pick(folder).router
    np.testing.assert_array_equal(found.embedder.embed(["a"]), made[1]["ridge"].embedder.embed(["a"]))
