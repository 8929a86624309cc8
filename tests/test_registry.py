"""The registry: short names to classes, imported only when asked for, with the nearest name when there is none."""

import subprocess
import sys
from importlib import metadata

import pytest

from anabranch import registry
from anabranch.config import Part
from anabranch.errors import ConfigError
from anabranch.registry import BUILTIN, kinds, resolve


@pytest.fixture(autouse=True)
def fresh_cache():
    resolve.cache_clear()
    yield
    resolve.cache_clear()


@pytest.fixture
def plugin(monkeypatch):
    """A third-party package that adds ``select: mine`` by entry point."""
    point = metadata.EntryPoint(name="mine", value=f"{__name__}:Mine", group="anabranch.select")

    def entry_points(*, group: str, **filters: str) -> metadata.EntryPoints:
        return metadata.EntryPoints([point]).select(group=group, **filters)

    monkeypatch.setattr(registry, "entry_points", entry_points)


class Mine(Part, family="select", kind="mine"):
    """What the plug-in adds."""


def test_kinds_are_sorted_and_unknown_families_are_empty():
    assert kinds("select")[:2] == ["expert_choice", "group_top_k"]
    assert kinds("select") == sorted(BUILTIN["select"])
    assert kinds("nothing") == []


def test_plugin_kinds_come_by_entry_point(plugin):
    assert "mine" in kinds("select")
    assert "mine" not in kinds("score")
    found = resolve("select", "mine")
    assert (found.__module__, found.__qualname__) == (Mine.__module__, "Mine")
    assert resolve("select", "top_k").__name__ == "TopK"


@pytest.mark.parametrize(
    ("family", "kind", "message"),
    [
        ("select", "topk", "no select of kind 'topk'; did you mean 'top_k'?"),
        (
            "select",
            "zzz",
            "no select of kind 'zzz'; known: expert_choice, group_top_k, hybrid_entropy, mixture, positive, soft_then_top_k, "
            "threshold, top_k, top_p",
        ),
        ("score", "top_k", "no score of kind 'top_k'; known: "),
    ],
)
def test_unknown_kind_gives_the_nearest_name_or_all(family, kind, message):
    with pytest.raises(ConfigError) as caught:
        resolve(family, kind)
    assert str(caught.value).startswith(message)


def test_naming_a_part_imports_nothing():
    # The seam: a low layer knows a design by name only.
    script = (
        "import sys, anabranch.registry as registry; registry.kinds('feed_forward');"
        "print([name for name in sys.modules if name.startswith('anabranch.') or name == 'torch'])"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "['anabranch.errors', 'anabranch.registry']"


@pytest.mark.parametrize(
    ("family", "kind"), [(family, kind) for family in sorted(BUILTIN.keys() - {"outcomes"}) for kind in BUILTIN[family]]
)
def test_built_in_kind_is_a_part_that_knows_its_name(family, kind):
    made = resolve(family, kind)
    assert issubclass(made, Part)
    assert (made.family, made.kind) == (family, kind)
    assert made.Config.owner is made
    assert made.__doc__


def test_sources_of_outcomes_are_functions():
    for kind in BUILTIN["outcomes"]:
        assert resolve("outcomes", kind).__doc__.startswith("Outcomes from ")
