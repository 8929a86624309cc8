"""Which families there are, in which order, and what those that could have a sliding window write of it."""

import sys
from importlib import metadata
from types import ModuleType

import pytest

from anabranch import registry
from anabranch.lm.formats.families import FAMILIES
from anabranch.presets import PRESETS


@pytest.fixture
def installed(monkeypatch):
    """A package that adds a family, and another one of the name of ours."""
    module = ModuleType("families_of_the_test")
    module.family = object()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    points = [
        metadata.EntryPoint(name=name, value=f"{module.__name__}:family", group="anabranch.huggingface")
        for name in ("a_first_by_name", "llama")
    ]

    def entry_points(*, group: str, **filters: str) -> metadata.EntryPoints:
        return metadata.EntryPoints(points).select(group=group, **filters)

    monkeypatch.setattr(registry, "entry_points", entry_points)
    registry.resolve.cache_clear()
    yield module.family
    registry.resolve.cache_clear()


def test_installed_ones_come_after_ours_once_and_ours_stay_what_they_are(installed):
    ours = list(FAMILIES)[:-1]
    assert ours[:3] == ["llama", "qwen2", "qwen3"]
    assert ours[-1] == "qwen2_parscale"
    assert list(FAMILIES)[-1] == "a_first_by_name"
    assert len(FAMILIES) == len(set(FAMILIES)) == len(ours) + 1
    assert FAMILIES["a_first_by_name"] is installed
    assert FAMILIES["llama"].MODEL_TYPE == "llama"
    with pytest.raises(KeyError, match="unheard"):
        FAMILIES["unheard"]


@pytest.mark.parametrize(("family", "preset"), [("qwen2", "dense"), ("qwen2_moe", "moe")])
def test_a_family_that_may_have_a_sliding_window_says_that_there_is_none(family, preset):
    """Readers take a width in the generic config for a window unless they are told that it is off."""
    assert FAMILIES[family].write(PRESETS[preset]().model)["use_sliding_window"] is False
