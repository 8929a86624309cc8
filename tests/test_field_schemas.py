"""JSON schemas of the fields of configs say what the configs take."""

from typing import Literal

from anabranch.bounds import LARGEST_FLOAT, SMALLEST_FLOAT
from anabranch.config import Config, Field, Size, configclass
from anabranch.field_schemas import field_schemas


@configclass
class Some(Config):
    share: float = Field(default=0.5, gt=0, lt=1)
    any: float = 0.0
    over: float = Field(default=4.0, gt=3)
    wide: Size = Field(default=8, ge=2)
    window: Size | None = Field(default=None, ge=0, le=9)
    kind: Literal["a", "b"] | None = None
    on: bool = False


def test_each_field_has_its_ends_in_the_order_of_the_class():
    made = field_schemas(Some)
    assert list(made) == ["share", "any", "over", "wide", "window", "kind", "on"]
    assert made["share"] == {"type": "number", "minimum": SMALLEST_FLOAT, "exclusiveMaximum": 1}
    assert made["any"] == {"type": "number", "minimum": -LARGEST_FLOAT, "maximum": LARGEST_FLOAT}
    assert made["over"] == {"type": "number", "exclusiveMinimum": 3, "maximum": LARGEST_FLOAT}
    assert made["wide"] == {"type": "integer", "minimum": 2, "maximum": 2**31 - 1}
    assert (made["window"]["minimum"], made["window"]["maximum"]) == (0, 9)
    assert made["kind"] == {"type": "string", "enum": ["a", "b"]}
    assert made["on"] == {"type": "boolean"}
