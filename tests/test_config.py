"""Configs: checked when built, printed and read back equal, set by dotted path, with messages that say what would work."""

import copy
import json
import pickle
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch import registry
from anabranch.bounds import LARGEST_INT
from anabranch.config import Config, Field, Part, Size, configclass, from_dict, override, parse_assignment, to_dict
from anabranch.errors import AnabranchError, ConfigError


class Brew(Part, family="brew"):
    """A small family of parts to test with: an interface and three kinds."""

    @configclass
    class Config(Config):
        strength: float = Field(default=1.0, gt=0)

    def __init__(self, config: "Brew.Config", cups: int = 1) -> None:
        self.config, self.cups = config, cups


class Tea(Brew, kind="tea"):
    @configclass
    class Config(Brew.Config):
        leaves: int = Field(default=2, ge=1)
        steep: Literal["short", "long"] = "short"


class Coffee(Brew, kind="coffee"):
    @configclass
    class Config(Brew.Config):
        beans: int = Field(default=10, ge=1, le=99)
        blend: Tea.Config = Tea.Config(leaves=7)

        def __post_init__(self) -> None:
            if self.beans == 13:
                raise ConfigError("beans is 13, an unlucky number; use 12 or 14")


class Water(Brew, kind="water"):
    """A kind without fields of its own."""


@configclass
class Point(Config):
    x: float
    y: float = 0.0


@configclass
class Kitchen(Config):
    seed: int = 0
    name: str = "home"
    open: bool = True
    limit: int | None = Field(default=None, ge=1)
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, Point] = (0, Point(x=0.0))
    points: tuple[Point, ...] = ()
    mix: int | tuple[float, ...] = 1
    weights: dict[str, float] = Field(default_factory=dict)
    shelves: dict[str, Point] = Field(default_factory=dict)
    first: Brew.Config = Tea.Config()
    second: Brew.Config | None = None
    third: Tea.Config | None = None
    spot: Point | None = None


@pytest.fixture(autouse=True)
def brews(monkeypatch):
    """The family is registered like a built-in one, by import path."""
    table = {"tea": f"{__name__}:Tea", "coffee": f"{__name__}:Coffee", "water": f"{__name__}:Water"}
    monkeypatch.setitem(registry.BUILTIN, "brew", table)
    registry.resolve.cache_clear()
    yield
    registry.resolve.cache_clear()


def error_of(action, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        action(*args, **kwargs)
    return str(caught.value)


# Building


@configclass
class HookConfig(Config):
    url: str


def test_a_class_that_is_a_part_of_a_file_is_told_in_words():
    assert error_of(HookConfig) == "url is missing in the hook config"
    assert error_of(HookConfig, url="x", ulr="y") == "the hook config has no field 'ulr'; did you mean 'url'?"


def test_config_builds_its_owner_and_passes_the_rest_on():
    tea = Tea.Config(leaves=3).build(cups=4)
    assert type(tea) is Tea
    assert tea.config == Tea.Config(leaves=3)
    assert tea.cups == 4


def test_kind_without_fields_of_its_own_builds_itself_not_its_base():
    assert type(Water.Config(strength=2.0).build()) is Water
    assert type(Brew.Config().build()) is Brew
    assert type(from_dict(Brew.Config, {"kind": "water"}).build()) is Water


def test_config_is_frozen_keyword_only_and_hashable():
    config = Tea.Config()
    with pytest.raises(AttributeError):
        config.leaves = 4
    with pytest.raises(TypeError):
        Tea.Config(3)
    assert hash(config) == hash(Tea.Config())


def test_replace_checks_again():
    assert Tea.Config().replace(leaves=5) == Tea.Config(leaves=5)
    assert error_of(Tea.Config().replace, leaves=0) == "leaves is 0; it must be greater than or equal to 1"
    assert error_of(Tea.Config().replace, leafs=3) == "Tea has no field 'leafs'; did you mean 'leaves'?"


def test_configs_copy_and_pickle_equal():
    config = Kitchen(first=Coffee.Config(), points=(Point(x=1.0),))
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert pickle.loads(pickle.dumps(Water.Config(strength=3.0))) == Water.Config(strength=3.0)


def test_config_error_is_a_value_error_of_ours():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, AnabranchError)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": "x"}, "seed is 'x'; it must be an integer"),
        ({"seed": 1.0}, "seed is 1.0; it must be an integer"),
        ({"seed": True}, "seed is True; it must be an integer"),
        ({"open": 1}, "open is 1; it must be true or false"),
        ({"limit": 0}, "limit is 0; it must be greater than or equal to 1"),
        ({"sizes": [1]}, "sizes is [1]; it must be a list"),
        ({"sizes": (1, "a")}, "sizes.1 is 'a'; it must be an integer"),
        ({"sede": 1}, "Kitchen has no field 'sede'; did you mean 'seed'?"),
    ],
)
def test_message_names_the_field_the_value_and_what_is_allowed(fields, message):
    assert error_of(Kitchen, **fields).startswith(message)


def test_message_tells_every_wrong_field():
    message = error_of(Kitchen, seed="x", limit=0)
    assert "seed is 'x'; it must be an integer" in message
    assert "limit is 0; it must be greater than or equal to 1" in message


def test_message_of_a_choice_a_missing_field_and_a_check_of_our_own():
    assert error_of(Tea.Config, steep="lng") == "steep is 'lng'; it must be 'short' or 'long'"
    assert error_of(Point) == "x is missing in Point"
    assert error_of(Coffee.Config, beans=13) == "beans is 13, an unlucky number; use 12 or 14"
    assert error_of(Point, x=1.0, quux=2).endswith("Point has no field 'quux'; known: x, y")


def test_message_of_a_length_is_a_sentence():
    @configclass
    class Row(Config):
        items: tuple[int, ...] = Field(default=(1,), min_length=1)

    assert error_of(Row, items=()) == "items is (); it must have at least 1 item"


# Printing and reading back


def test_dict_form_by_hand():
    config = Kitchen(seed=3, first=Coffee.Config(beans=4), pair=(1, Point(x=2.0)), weights={"a": 0.5})
    tea = {"kind": "tea", "strength": 1.0, "leaves": 7, "steep": "short"}
    assert to_dict(config) == {
        "seed": 3,
        "name": "home",
        "open": True,
        "limit": None,
        "sizes": [1, 2],
        "pair": [1, {"x": 2.0, "y": 0.0}],
        "points": [],
        "mix": 1,
        "weights": {"a": 0.5},
        "shelves": {},
        "first": {"kind": "coffee", "strength": 1.0, "beans": 4, "blend": tea},
        "second": None,
        "third": None,
        "spot": None,
    }


def test_missing_fields_take_their_defaults():
    assert from_dict(Kitchen, {}) == Kitchen()
    assert from_dict(Brew.Config, {"kind": "tea"}) == Tea.Config()
    assert from_dict(Tea.Config, {"leaves": 3}) == Tea.Config(leaves=3)


finite = st.floats(-1e37, 1e37)
integers = st.integers(-LARGEST_INT, LARGEST_INT)
strengths = st.floats(min_value=0.001, max_value=1e6)
points = st.builds(Point, x=finite, y=finite)
teas = st.builds(Tea.Config, strength=strengths, leaves=st.integers(1, 50), steep=st.sampled_from(["short", "long"]))
waters = st.builds(Water.Config, strength=strengths)
coffees = st.builds(Coffee.Config, strength=strengths, beans=st.integers(20, 99), blend=teas)
brewings = st.one_of(teas, coffees, waters)
kitchens = st.builds(
    Kitchen,
    seed=integers,
    name=st.text(),
    open=st.booleans(),
    limit=st.none() | st.integers(1, 9),
    sizes=st.lists(integers).map(tuple),
    pair=st.tuples(integers, points),
    points=st.lists(points, max_size=3).map(tuple),
    mix=integers | st.lists(finite, max_size=3).map(tuple),
    weights=st.dictionaries(st.text(), finite, max_size=3),
    shelves=st.dictionaries(st.text(), points, max_size=2),
    first=brewings,
    second=st.none() | brewings,
    third=st.none() | teas,
    spot=st.none() | points,
)


@given(kitchens)
def test_any_config_reads_back_equal_from_json(config):
    data = to_dict(config)
    again = from_dict(Kitchen, json.loads(json.dumps(data)))
    assert again == config
    assert type(again.first) is type(config.first)
    assert to_dict(again) == data


@given(kitchens, kitchens)
def test_setting_every_field_by_path_turns_one_config_into_another(start, goal):
    assert override(start, to_dict(goal)) == goal
    assert override(start, {}) == start


@given(kitchens, brewings)
def test_changing_the_kind_keeps_the_fields_both_have(start, goal):
    kind = to_dict(goal)["kind"]
    changed = override(start, {"first.kind": kind})
    assert type(changed.first) is type(goal)
    assert changed.first.strength == start.first.strength
    assert changed.replace(first=start.first) == start


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1], "Kitchen is [1]; it must be a table of fields"),
        ({"spot": 3}, "spot is 3; it must be an instance of Point"),
        ({"first": 3}, "first is 3; it must be a table of fields"),
        ({"sede": 1}, "Kitchen has no field 'sede'; did you mean 'seed'?"),
        ({"spot": {"y": 1.0}}, "spot.x is missing in Point"),
        ({"spot": {"x": 1.0, "z": 1.0}}, "spot: Point has no field 'z'; known: x, y"),
        ({"points": [{"x": 1.0}, {"x": "a"}]}, "points.1.x is 'a'; it must be a number"),
        ({"pair": [1, {"x": "a"}]}, "pair.1.x is 'a'; it must be a number"),
        ({"pair": [1]}, "pair.1 is missing in Kitchen"),
        ({"shelves": {"top": {"x": "a"}}}, "shelves.top.x is 'a'; it must be a number"),
        ({"first": {"kind": "tea", "leaves": 0}}, "first.leaves is 0; it must be greater than or equal to 1"),
        ({"first": {"kind": "tae"}}, "first: no brew of kind 'tae'; did you mean 'tea'?"),
        ({"first": {"kind": "lemonade"}}, "first: no brew of kind 'lemonade'; known: coffee, tea, water"),
        ({"first": {"kind": 3}}, "first has kind 3; it must be one of: coffee, tea, water"),
        ({"first": {"leaves": 3}}, "first needs a kind of brew; known: coffee, tea, water"),
        ({"spot": {"kind": "tea", "x": 1.0}}, "spot has no field 'kind' (got 'tea')"),
        ({"first": {"kind": "coffee", "blend": {"leaves": 0}}}, "first.blend.leaves is 0; it must be"),
        ({"first": {"kind": "coffee", "beans": 13}}, "first.beans is 13, an unlucky number; use 12 or 14"),
    ],
)
def test_reading_names_the_dotted_path(data, message):
    assert error_of(from_dict, Kitchen, data).startswith(message)


# Setting by path


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": 1.0}, "points is {'x': 1.0}; it must be a list, in TOML [[points]] or [{...}, {...}]"),
        ("near", "points is 'near'; it must be a list"),
    ],
)
def test_what_is_no_list_where_a_file_has_a_list_is_told_in_the_words_of_files(given, message):
    assert error_of(from_dict, Kitchen, {"points": given}) == message


def test_override_by_hand():
    config = override(Kitchen(points=(Point(x=1.0), Point(x=2.0))), {"seed": 4, "points.1.y": 3, "first.leaves": 9})
    assert config == Kitchen(seed=4, points=(Point(x=1.0), Point(x=2.0, y=3.0)), first=Tea.Config(leaves=9))


def test_override_leaves_the_original_alone():
    config = Kitchen(weights={"a": 1.0})
    override(config, {"weights.a": 2.0, "weights.b": 3.0})
    assert config.weights == {"a": 1.0}


def test_override_sets_tables_lists_and_entries():
    assert override(Kitchen(), {"sizes": [5, 6]}).sizes == (5, 6)
    assert override(Kitchen(), {"sizes.0": 5}).sizes == (5, 2)
    assert override(Kitchen(), {"pair.1.x": 4.5}).pair == (0, Point(x=4.5))
    assert override(Kitchen(), {"mix": [0.5, 1]}).mix == (0.5, 1.0)
    assert override(Kitchen(), {"weights.new": 2}).weights == {"new": 2.0}
    assert override(Kitchen(), {"shelves.new.x": 2}).shelves == {"new": Point(x=2.0)}
    assert override(Kitchen(), {"first": {"kind": "coffee", "beans": 3}}).first == Coffee.Config(beans=3)


def test_override_swaps_a_kind_and_sets_fields_that_only_the_new_kind_has():
    # Regression: the fields of the new kind were looked for in the old one and refused.
    config = override(
        Kitchen(first=Tea.Config(strength=2.0)), {"first.kind": "coffee", "first.beans": 3, "first.blend.leaves": 4}
    )
    # blend keeps the default of Coffee, but for what was set.
    assert config.first == Coffee.Config(strength=2.0, beans=3, blend=Tea.Config(leaves=4))
    assert override(Kitchen(), {"first.kind": "coffee", "first.blend.steep": "long"}).first.blend.leaves == 7


def test_override_starts_a_part_that_is_none():
    # Regression: the message said to set the kind first, and then refused that too.
    assert override(Kitchen(), {"second.kind": "coffee", "second.beans": 3}).second == Coffee.Config(beans=3)
    assert override(Kitchen(), {"third.leaves": 3}).third == Tea.Config(leaves=3)
    assert override(Kitchen(), {"spot.x": 3}).spot == Point(x=3.0)
    assert override(Kitchen(third=Tea.Config()), {"third": None}).third is None


@configclass
class Told(Config):
    either: Literal["none", "all"] = "all"
    number: Literal["none"] | float = 1.0
    nothing: Literal["none", "all"] | None = "all"
    name: str = "a"


@pytest.mark.parametrize("said", ["none", "null", "None"])
def test_none_is_the_choice_of_that_name_where_nothing_is_no_choice(said):
    for field, expected in (("either", "none"), ("number", "none"), ("nothing", None)):
        assert getattr(override(Told(), dict([parse_assignment(f"{field}={said}")])), field) == expected
    assert "name is None; it must be" in error_of(override, Told(), dict([parse_assignment(f"name={said}")]))
    assert override(Told(), dict([parse_assignment(f'name="{said}"')])).name == said


@pytest.mark.parametrize(("said", "value"), [("True", True), ("False", False), ("true", True), (" False ", False)])
def test_truth_is_read_as_python_writes_it_too(said, value):
    assert parse_assignment(f"train.recompute={said}") == ("train.recompute", value)


def test_override_of_a_part_config_itself():
    assert override(Tea.Config(leaves=4, strength=2.0), {"kind": "coffee"}) == Coffee.Config(strength=2.0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sede", 1, "cannot set sede: Kitchen has no field 'sede'; did you mean 'seed'?"),
        ("first.leafs", 1, "cannot set first.leafs: first has no field 'leafs'; did you mean 'leaves'?"),
        ("frist.leaves", 1, "cannot set frist.leaves: Kitchen has no field 'frist'; did you mean 'first'?"),
        ("points.0.x", 1, "cannot set points.0.x: points has 0 entries; set points as a whole"),
        ("sizes.2", 1, "cannot set sizes.2: sizes has 2 entries; use sizes.0 to sizes.1"),
        ("sizes.first", 1, "cannot set sizes.first: sizes has 2 entries; use sizes.0 to sizes.1"),
        ("seed.x", 1, "cannot set seed.x: seed is 0, which has no fields; set seed itself"),
        ("limit.x", 1, "cannot set limit.x: limit is None, which has no fields; set limit itself"),
        ("second.beans", 1, "second needs a kind of brew; known: coffee, tea, water"),
        ("first.kind", "tae", "first: no brew of kind 'tae'; did you mean 'tea'?"),
        ("first.kind", 3, "first has kind 3; it must be one of: coffee, tea, water"),
        ("spot.kind", "tea", "spot has no field 'kind' (got 'tea')"),
        ("first.leaves", 0, "first.leaves is 0; it must be greater than or equal to 1"),
        ("first.leaves", "many", "first.leaves is 'many'; it must be an integer"),
        ("first", None, "first is None; it must be a table of fields"),
        ("", 1, "cannot set : Kitchen has no field ''"),
    ],
)
def test_override_says_what_would_work(path, value, message):
    assert error_of(override, Kitchen(), {path: value}).startswith(message)


# Assignments as typed in a terminal


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=4", ("a.b", 4)),
        ("a = 0.5", ("a", 0.5)),
        ("a=3e-4", ("a", 3e-4)),
        ("a=true", ("a", True)),
        ("a=none", ("a", None)),
        ("a=None", ("a", None)),
        ("a=cosine", ("a", "cosine")),
        ('a="none"', ("a", "none")),
        ("a=[1, 2]", ("a", [1, 2])),
        ("a={x=1}", ("a", {"x": 1})),
        ("a=x=y", ("a", "x=y")),
        ("a=", ("a", "")),
        ("a=2024-05-01", ("a", "2024-05-01")),
        ("a=12:30:00", ("a", "12:30:00")),
        ("a=/data/my corpus.txt", ("a", "/data/my corpus.txt")),
    ],
)
def test_assignment_is_read_as_toml_or_text(text, expected):
    name, value = parse_assignment(text)
    assert (name, value) == expected
    assert type(value) is type(expected[1])


@pytest.mark.parametrize("text", ["a.b", "", "=3", " = 3"])
def test_assignment_without_a_path_or_a_value_is_refused(text):
    assert error_of(parse_assignment, text).startswith(f"cannot read {text!r}; write path=value, e.g. ")


@given(st.text())
def test_any_assignment_is_read_or_refused_in_one_line(text):
    try:
        _, value = parse_assignment(text)
    except ConfigError:
        assert "=" not in text or not text.partition("=")[0].strip()
    else:
        json.dumps(value)


@configclass
class Narrowed(Config):
    """Narrower than its type at both ends, and at one."""

    wide: Size = Field(default=8, ge=4, le=16)
    least: Size = Field(default=8, ge=4)
    needed: Size = Field(ge=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"wide": 3}, "wide is 3"),
        ({"wide": 17}, "wide is 17"),
        ({"least": 3}, "least is 3"),
        ({"least": 2**31}, "least is 2147483648"),
        ({"needed": 1}, "needed is 1"),
    ],
)
def test_limits_of_a_field_hold_beside_those_of_its_type(values, message):
    """Those of the type alone held where both had one."""
    with pytest.raises(ConfigError, match=message):
        Narrowed(**{"needed": 2, **values})
    assert Narrowed(needed=2, wide=4, least=4) != Narrowed(needed=2, wide=16)
