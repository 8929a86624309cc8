"""Every test checks something: it asserts, expects an error, or calls a function of the tests that does."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePath

import pytest

TESTS = Path(__file__).parent

# Below an empty line, a decorator or the line of a class: code within a text has none of them above it.
DEFINITION = re.compile(r"(?:\A|^\n|^ *(?:[@)]|class ).*\n)( *)(?:async )?def (\w+)", re.MULTILINE)
WORD = re.compile(r"\w+")
# Also what libraries and `anabranch.testing` check with.
CHECK = re.compile(r"\bassert\b|\bAssertionError\b|\b(?:raises|warns|fail)\(|\b_?(?:assert|check)_\w")
# What stands above the first function: imports and names.
HEAD = re.compile(r".*?(?=^(?:@|def |async def |class ))", re.MULTILINE | re.DOTALL)


def functions(text: str) -> Iterator[tuple[str, str]]:
    """Name and text of each, with what is defined within it."""
    found = list(DEFINITION.finditer(text))
    for number, each in enumerate(found):
        depth = len(each[1])
        ends = (other.start() for other in found[number + 1 :] if len(other[1]) <= depth)
        yield each[2], text[each.end() : next(ends, len(text))]


def checking(of: list[tuple[str, str]], known: set[str]) -> set[str]:
    """Which of these functions check, themselves or by calling one that does."""
    found = {name for name, body in of if not name.startswith("test_") and CHECK.search(body)}
    words = {name: set(WORD.findall(body)) for name, body in of if name not in found and not name.startswith("test_")}
    while more := {name for name, used in words.items() if name not in found and used & (known | found)}:
        found |= more
    return found


def unchecked(texts: dict[str, str]) -> list[str]:
    """Tests that check nothing, from the text of each file of a folder of tests by its name there."""
    of_file = {name: list(functions(text)) for name, text in texts.items()}
    shared: dict[str, set[str]] = {}
    # Helpers call each other: until no more is found.
    while True:
        known = set().union(*shared.values()) if shared else set()
        found = {name: checking(of, known) for name, of in of_file.items() if not _is_test(name)}
        if found == shared:
            break
        shared = found
    missing = []
    for name, of in of_file.items():
        bare = [(test, body) for test, body in of if test.startswith("test_") and not CHECK.search(body)]
        if not _is_test(name) or not bare:
            continue
        head = set(WORD.findall(HEAD.match(texts[name])[0]))
        near = {file for file in shared if PurePath(file).stem in head or _is_conftest_of(file, name)}
        known = set().union(*(shared[file] for file in near)) if near else set()
        known |= checking(of, known)
        missing += [f"{name}::{test}" for test, body in bare if not known & set(WORD.findall(body))]
    return missing


def _is_test(name: str) -> bool:
    return PurePath(name).name.startswith("test_")


def _is_conftest_of(file: str, test: str) -> bool:
    return PurePath(file).name == "conftest.py" and PurePath(test).is_relative_to(PurePath(file).parent)


def test_every_test_checks_something():
    texts = {
        str(path.relative_to(TESTS)): path.read_text(encoding="utf-8")
        for path in TESTS.rglob("*.py")
        if "mutated" not in path.parts
    }
    assert len(texts) > 1000
    assert unchecked(texts) == []


HELPERS = """
from anabranch.errors import InputError

def told(value):
    return value

def same(one, other):
    assert one == other

def all_same(*values):
    for value in values:
        same(value, values[0])
"""


@pytest.mark.parametrize(
    "body",
    [
        "assert 1 == 1",
        "with pytest.raises(ValueError):\n        int('x')",
        "with pytest.warns(DeprecationWarning):\n        old()",
        "torch.testing.assert_close(1, 1)",
        "check_router(made())",
        "helpers.all_same(1, 1)",
        "near(1, 1)",
        "given()",
        "def within():\n        assert True\n\n    within()",
        'text = """\ndef f():\n    pass\n"""\n    assert text',
    ],
)
def test_what_checks(body):
    text = f"import helpers\n\n\ndef near(one, other):\n    helpers.same(one, other)\n\n\ndef test_it(given):\n    {body}\n"
    conftest = "@pytest.fixture\ndef given():\n    assert True\n"
    assert unchecked({"helpers.py": HELPERS, "a/conftest.py": conftest, "a/test_a.py": text}) == []


@pytest.mark.parametrize(
    "body",
    [
        "load()",
        "helpers.told(1)",
        # Of a file that this one does not import, and of a folder that it does not stand in.
        "other.far(1)",
        "given()",
        "def within():\n        return 1\n\n    within()",
    ],
)
def test_what_checks_nothing(body):
    text = f"import helpers\n\n\ndef test_it():\n    {body}\n\n\ndef test_next():\n    assert True\n"
    others = {
        "helpers.py": HELPERS,
        "far_helpers.py": "def far(value):\n    assert value\n",
        "b/conftest.py": "@pytest.fixture\ndef given():\n    assert True\n",
    }
    assert unchecked({**others, "a/test_a.py": text}) == ["a/test_a.py::test_it"]
