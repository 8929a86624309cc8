"""Random JSON schemas, each with instances that it allows, for tests of grammars."""

import re

from hypothesis import strategies as st

NAMES = ["a", "b", "ab", 'q"q', "ключ", "x y"]
# llguidance takes the control character DEL as an escape alone; json.dumps writes it as it is.
LETTERS = st.characters(exclude_categories=("Cs",), exclude_characters="\x7f")
TEXT = st.text(LETTERS, max_size=6)
PATTERNS = [
    "^[a-c]+$",
    "b{2,3}",
    "^(foo|ba[rz])?$",
    r"^\d{2}-\d{2}$",
    "^[^x]*x",
    r"\w\s\w",
    "^a.c$|^zz",
]


def scalars():
    """Pairs (schema, strategy of its instances)."""
    bounds = st.tuples(st.integers(-300, 300), st.integers(0, 400)).map(lambda pair: (pair[0], pair[0] + pair[1]))
    tenths = st.tuples(st.integers(-300, 300), st.integers(1, 400)).map(
        lambda pair: (pair[0] / 10, (pair[0] + pair[1]) / 10)
    )
    sizes = st.tuples(st.integers(0, 3), st.integers(0, 3)).map(lambda pair: (pair[0], pair[0] + pair[1]))
    return st.one_of(
        st.just(({"type": "null"}, st.none())),
        st.just(({"type": "boolean"}, st.booleans())),
        st.just(({"type": "integer"}, st.integers())),
        st.just(({"type": "number"}, st.integers() | st.floats(-1e300, 1e300))),
        st.just(({"type": ["string", "null"]}, TEXT | st.none())),
        bounds.map(lambda b: ({"type": "integer", "minimum": b[0], "maximum": b[1]}, st.integers(*b))),
        bounds.map(lambda b: ({"type": "integer", "exclusiveMinimum": b[0]}, st.integers(min_value=b[0] + 1))),
        bounds.map(lambda b: ({"maximum": b[0]}, st.integers(max_value=b[0]))),
        tenths.map(lambda b: ({"type": "number", "minimum": b[0], "maximum": b[1]}, plain_floats(*b))),
        tenths.map(
            lambda b: (
                {"exclusiveMinimum": b[0], "exclusiveMaximum": b[1]},
                plain_floats(*b).filter(lambda value: b[0] < value < b[1]),
            )
        ),
        sizes.map(
            lambda s: (
                {"type": "string", "minLength": s[0], "maxLength": s[1]},
                st.text(LETTERS, min_size=s[0], max_size=s[1]),
            )
        ),
        st.sampled_from(PATTERNS).map(
            lambda p: ({"type": "string", "pattern": p}, st.from_regex(re.compile(p, re.ASCII)).filter(is_plain(p)))
        ),
        st.sampled_from(["date", "uuid", "ipv4"]).map(lambda f: ({"type": "string", "format": f}, FORMATS[f])),
        st.lists(st.none() | st.booleans() | st.integers(-9, 9) | TEXT, min_size=1, max_size=3).map(
            lambda values: ({"enum": values}, st.sampled_from(values))
        ),
        st.fixed_dictionaries({"k": st.lists(TEXT, max_size=2)}).map(lambda value: ({"const": value}, st.just(value))),
    )


FORMATS = {
    "date": st.dates().map(lambda day: day.isoformat()),
    "uuid": st.uuids().map(str),
    "ipv4": st.ip_addresses(v=4).map(str),
}


def plain_floats(low, high):
    """Floats that are written without an exponent, in at most 12 digits after the point, and not as ``1.0``."""
    return (
        st.floats(low, high)
        .map(lambda value: round(value, 9))
        .filter(lambda value: low <= value <= high and "e" not in repr(value) and not value.is_integer())
    )


def is_plain(pattern):
    """Python's ``$`` and ``.`` and ``\\s`` let a few more texts through than ECMAScript's; those are left out."""
    odd = re.compile("[\n\r\x1c-\x1f\x85\u2028\u2029\ud800-\udfff]")
    return lambda text: not odd.search(text) and re.search(pattern, text, re.ASCII) is not None


@st.composite
def objects(draw, inner):
    """Pairs as of `scalars` for objects."""
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=3))
    parts = {name: draw(inner) for name in names}
    required = [name for name in names if draw(st.booleans())]
    schema = {"type": "object", "properties": {name: part[0] for name, part in parts.items()}, "required": required}
    values = {name: part[1] for name, part in parts.items()}
    optional = {name: value for name, value in values.items() if name not in required}
    instances = st.fixed_dictionaries({name: values[name] for name in required}, optional=optional)
    extra = draw(st.sampled_from([None, False, True, {"type": "null"}]))
    if extra is not None:
        schema["additionalProperties"] = extra
    if extra:
        others = st.dictionaries(TEXT.filter(lambda key: key not in names), st.none(), max_size=2)
        instances = st.builds(lambda left, right: {**left, **right}, instances, others)
    return schema, instances.map(lambda value: in_order_of(names, value))


def in_order_of(names, value):
    """An object with the properties that a schema names first, in its order."""
    return {name: value[name] for name in [*names, *(other for other in value if other not in names)] if name in value}


@st.composite
def arrays(draw, inner):
    """Pairs as of `scalars` for arrays."""
    schema, item = draw(inner)
    least = draw(st.integers(0, 2))
    most = draw(st.none() | st.integers(least, 3))
    result = {"type": "array", "items": schema, "minItems": least}
    if most is not None:
        result["maxItems"] = most
    return result, st.lists(item, min_size=least, max_size=3 if most is None else most)


@st.composite
def unions(draw, inner):
    """Pairs as of `scalars` for schemas that are one of several."""
    parts = draw(st.lists(inner, min_size=1, max_size=3))
    return {"anyOf": [schema for schema, _ in parts]}, st.one_of([value for _, value in parts])


def schemas():
    """Pairs of a schema and the strategy of its instances."""
    return st.recursive(scalars(), lambda inner: objects(inner) | arrays(inner) | unions(inner), max_leaves=6)
