"""No config takes a number that would only fail later: every field of every config is tried with numbers out of all bounds."""

import contextlib
import dataclasses
import importlib
import math
import pkgutil
from typing import Annotated

import pytest

import anabranch
from anabranch.bounds import LARGEST_INT, MOST_SEED, SMALLEST_FLOAT, check_number, shown_json
from anabranch.config import Config, Field, Part, configclass, from_dict, override
from anabranch.errors import ConfigError, MissingExtraError
from anabranch.lm import SamplingConfig
from anabranch.nn import MoE, Rotary
from anabranch.train import RunConfig

HOSTILE = [10**30, -(10**30), 10**5000, 2**63, -(2**63), -1, 0, math.inf, -math.inf, math.nan, 1e-46, 1e308, -0.0, True]
HOSTILE += ["", "x" * 100, "\ud800", None, [], {}, [10**30], [math.nan], {"a": math.inf}, {"kind": 10**5000}, [[]]]


def configs():
    for module in pkgutil.walk_packages(anabranch.__path__, "anabranch."):
        if not module.name.rpartition(".")[2].startswith("__") and ".cli" not in module.name:
            # What needs a package that is not here has no configs, but adapters to that package.
            with contextlib.suppress(MissingExtraError):
                importlib.import_module(module.name)
    found, open_ = {}, [Config]
    while open_:
        for cls in open_.pop().__subclasses__():
            if hasattr(cls, "__pydantic_fields__") and cls.__module__.startswith("anabranch."):
                found[f"{cls.__module__}:{cls.__qualname__}"] = cls
            open_.append(cls)
    return found


def test_no_field_of_any_config_takes_a_number_out_of_bounds():
    """All configs there are: what is refused is a ConfigError, and no integer or float out of bounds is let through."""
    tried = longest = 0
    for name, cls in configs().items():
        for field in dataclasses.fields(cls):
            for value in HOSTILE:
                try:
                    made = cls(**{field.name: value})
                except ConfigError as error:
                    longest = max(longest, len(str(error)))
                else:
                    check_number(name, value if not isinstance(value, int) or value <= 0 else min(value, LARGEST_INT))
                    assert getattr(made, field.name) == value
                tried += 1
    assert tried > 5000
    assert longest < 5000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SamplingConfig(seed=2**64), "seed is 18446744073709551616; it must be less than or equal to"),
        (lambda: SamplingConfig(seed=-1), "seed is -1; it must be greater than or equal to 0"),
        (lambda: Rotary.Config(theta=1e-46), "theta is 1e-46; it must be at least 1e-37"),
        (lambda: Rotary.Config(theta=1e300), "theta is 1e+300; it must be between -1e+37 and 1e+37"),
        (lambda: SamplingConfig(temperature=math.nan), "temperature is nan; it must be a finite number"),
        (
            lambda: SamplingConfig(max_tokens=10**5000),
            "max_tokens is an integer of about 5001 digits; it must be between",
        ),
        (lambda: SamplingConfig(stop=(1, 10**30)), "stop.1 is 1000000000000000000000000000000; it must be between"),
        (lambda: MoE.Config(num_experts=10**9), "num_experts is 1000000000; it must be less than or equal to 65536"),
        (lambda: override(RunConfig(), {"train.learning_rate": math.inf}), "train.learning_rate is inf; it must be"),
        (lambda: override(RunConfig(), {"model.dim": 10**30}), "model.dim is 1000000000000000000000000000000; it must"),
        (
            lambda: from_dict(MoE.Config, {"router": {"select": {"kind": "top_k", "top_k": 2**70}}}),
            "router.select.top_k is",
        ),
    ],
)
def test_the_message_names_field_value_and_limits(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(message)


class Rates(Part):
    """Positive numbers alone, in a list, inside a table and beside None."""

    @configclass
    class Config(Config):
        rate: float | None = Field(default=None, gt=0)
        rates: tuple[Annotated[float, Field(gt=0)], ...] = ()
        table: dict[str, list[Annotated[float, Field(gt=0)]]] = Field(default_factory=dict)
        shares: tuple[float, ...] = ()


@pytest.mark.parametrize(
    ("values", "name"),
    [({"rate": 1e-46}, "rate"), ({"rates": (1.0, 1e-46)}, "rates.1"), ({"table": {"a": [1e-46]}}, "table.a.0")],
)
def test_a_positive_number_is_one_inside_containers_too(values, name):
    """What float32 rounds to 0 is not above 0."""
    with pytest.raises(ConfigError, match=rf"^{name} is 1e-46; it must be at least {SMALLEST_FLOAT}$"):
        Rates.Config(**values)
    assert Rates.Config(rates=(SMALLEST_FLOAT,), shares=(1e-46, 0.0)).shares == (1e-46, 0.0)


def test_the_widest_values_pass():
    assert SamplingConfig(seed=MOST_SEED).seed == MOST_SEED
    assert Rotary.Config(theta=SMALLEST_FLOAT).theta == SMALLEST_FLOAT
    assert SamplingConfig(temperature=1e-46, max_tokens=LARGEST_INT).max_tokens == LARGEST_INT


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        ('ü "x"', r'"ü \"x\""'),
        ([None, False, {"a": 1.5}], '[null, false, {"a": 1.5}]'),
        ("a\nb\x7f\ud800", r'"a\nb\x7f\ud800"'),
        (7, "7"),
        ({1}, "{1}"),
    ],
    ids=range(7),
)
def test_what_was_read_from_json_is_told_in_its_words(value, text):
    assert shown_json(value) == text
    assert len(shown_json([value] * 400)) <= 240


def test_what_json_cannot_say_is_shown_all_the_same():
    assert shown_json(10**5000) == "an integer of about 5001 digits"
    assert shown_json([10**5000]) == "a list that cannot be shown"
