"""Which configs answer alike, and may share what they answered."""

import dataclasses

import pytest

from anabranch.errors import ConfigError
from anabranch.gateway.answer_mark import answer_mark
from anabranch.gateway.config import (
    CacheConfig,
    DeploymentConfig,
    GatewayConfig,
    LimitsConfig,
    ModelConfig,
    StrategyConfig,
)
from anabranch.gateway.providers.mock import Mock
from anabranch.routers.strategies import make


def model(name, **fields):
    return ModelConfig(name=name, deployments=(DeploymentConfig(provider=Mock.Config(model=name, **fields)),))


BASE = GatewayConfig(models=(model("a"), model("b")), strategies={"x": StrategyConfig(use="cheapest")})

OTHERS = {
    "another reply of a deployment": {"models": (model("a", reply="new"), model("b"))},
    "another order of models": {"models": BASE.models[::-1]},
    "a model more": {"models": (*BASE.models, model("c"))},
    "another strategy of the name": {"strategies": {"x": StrategyConfig(use="random")}},
    "another default": {"strategies": {**BASE.strategies, "y": StrategyConfig(use="random")}, "default_strategy": "y"},
    "a fallback": {"fallbacks": {"a": ("b",)}},
    "a shorter life": {"cache": CacheConfig(ttl_s=60)},
}


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS)
def test_what_decides_answers_makes_a_difference(fields):
    assert answer_mark(dataclasses.replace(BASE, **fields)) != answer_mark(BASE)


def test_where_and_how_much_makes_none():
    same = dataclasses.replace(
        BASE, store="elsewhere.db", require_key=False, limits=LimitsConfig(rpm=3), cache=CacheConfig(max_bytes=1)
    )
    assert answer_mark(same) == answer_mark(BASE)
    assert len(answer_mark(BASE)) == 16


def test_a_router_is_told_by_what_is_in_its_file(tmp_path):
    def mark(place):
        return answer_mark(dataclasses.replace(BASE, strategies={"x": StrategyConfig(router=str(place))}))

    one = tmp_path / "x.router"
    one.write_bytes(b"old")
    before, folder = mark(one), mark(tmp_path)
    assert (mark(one), mark(tmp_path)) == (before, folder)
    one.write_bytes(b"new")
    assert before != mark(one)
    assert folder != mark(tmp_path)
    with pytest.raises(ConfigError, match=r"strategies\.x\.router: .*cannot be read"):
        mark(tmp_path / "none")
    # One that is given takes its place.
    gone = dataclasses.replace(BASE, strategies={"x": StrategyConfig(router=str(tmp_path / "none"))})
    given = {"x": make("cheapest")}
    assert answer_mark(gone, given) == answer_mark(gone, given) != answer_mark(BASE)
