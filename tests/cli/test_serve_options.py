"""Options of ``anabranch serve`` in sets: each is a field of the config, and one that is not said leaves the field as it is."""

from pathlib import Path

import pytest

from anabranch.cli.serve import config_of
from anabranch.cli.serve_options import Adapted, ByDepth, Listening, Rewires, Room
from anabranch.errors import ConfigError
from anabranch.serving.http.serve import ServeConfig

SAID = [
    (
        Listening(host="::1", served_name=["a", "b", "c"], port=9),
        "http",
        {"host": "::1", "name": "a", "names": ("b", "c"), "port": 9},
    ),
    (Room("8GiB", "2GiB", "int4"), "engine", {"memory": "8GiB", "expert_budget": "2GiB", "quantize": "int4"}),
    (Adapted(["x=y"], Path("z"), "1MiB"), "engine.adapters", {"load": ("x=y",), "memory": "1MiB"}),
    (Adapted(adapter_root=Path("z")), "http", {"adapter_root": "z"}),
    (ByDepth(Path("r"), 0.5, Path("s")), "engine.depth", {"routers": "r", "control": 0.5, "skipper": "s"}),
    (
        Rewires(True, ["interval=none", "steps=3"]),
        "engine.rewiring",
        {"on": True, "settings": {"interval": None, "steps": 3}},
    ),
]


@pytest.mark.parametrize(
    ("some", "table", "fields"), SAID, ids=[f"{type(some).__name__}-{table}" for some, table, _ in SAID]
)
def test_what_is_said_is_in_the_config(some, table, fields):
    held = config_of(None, {"engine.model": "m", **some.settings()})
    for name in table.split("."):
        held = getattr(held, name)
    assert {name: getattr(held, name) for name in fields} == fields


@pytest.mark.parametrize("kind", [Listening, Room, Adapted, ByDepth, Rewires])
def test_what_is_not_said_is_in_no_place(kind):
    assert kind().settings() == {}
    assert config_of(None, {"engine.model": "m", **kind().settings()}) == config_of(None, {"engine.model": "m"})
    assert config_of(None, {"engine.model": "m"}).http == ServeConfig().http


def test_a_setting_of_rewiring_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="write path=value"):
        Rewires(True, ["steps"]).settings()
