"""Methods of `adapt` whose experts a router chooses: what they hand on to the systems themselves."""

import dataclasses

import pytest

from anabranch.adapters import DynMoLE
from anabranch.adapters.adapt.mixtures import Dynmole
from anabranch.errors import ConfigError

SHARED = {field.name for field in dataclasses.fields(DynMoLE)} & {
    field.name for field in dataclasses.fields(Dynmole.Config)
}
OTHER = {
    "rank": 3,
    "alpha": 5.0,
    "dropout": 0.25,
    "policy": "top_p",
    "top_p": 0.5,
    "keep_top_k": 1,
    "entropy_threshold": 0.4,
    "entropy": "shannon",
    "entropy_index": 1.5,
    "nucleus": "inclusive",
    "renormalize": True,
    "entropy_loss": 0.5,
    "balance_loss": 0.25,
}


def test_dynmole_starts_from_the_systems_own_settings():
    settings, own = Dynmole.Config().settings(), DynMoLE()
    assert {name: getattr(settings, name) for name in SHARED} == {name: getattr(own, name) for name in SHARED}


def test_every_setting_of_dynmole_is_handed_on():
    assert OTHER.keys() <= SHARED
    settings = Dynmole.Config(**OTHER).settings()
    assert {name: getattr(settings, name) for name in OTHER} == OTHER


def test_what_the_system_refuses_is_refused_at_once():
    with pytest.raises(ConfigError, match="keep_top_k"):
        Dynmole.Config(experts=2, keep_top_k=3)
