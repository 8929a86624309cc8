import re
from functools import cache
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from anabranch import __file__ as package
from slow_tests import ALONE, EACH, KEPT, LAST, chosen, function_of, read, slow_ones

ROOT = Path(package).parents[2]

SECONDS = st.dictionaries(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), st.floats(0, 3))


@cache
def _named(file: Path) -> set[str]:
    """What a file defines, and what it gives another name."""
    text = file.read_text() if file.is_file() else ""
    return set(re.findall(r"^ *(?:(?:async )?def|class) (\w+)", text, re.MULTILINE)) | set(
        re.findall(r"^(\w+) = ", text, re.MULTILINE)
    )


def test_every_test_of_the_list_is_there():
    """One that was renamed would run in ``make test`` again; who renames it renames it in the list."""
    gone = []
    for function in [*read(), *KEPT]:
        path, *names = function.split("::")
        if not set(names) - {"runTest"} <= _named(ROOT / path):
            gone.append(function)
    assert gone == []


def test_the_list_leaves_what_is_kept():
    """Who adds to `KEPT` takes its line out of the list, or writes there how many variants run."""
    named = read()
    assert [name for name, count in KEPT.items() if named.get(name, count) < count] == []


@given(SECONDS)
def test_what_runs_is_short_and_nothing_short_is_left_out(took):
    took = {f"f.py::{name}[{number}]": seconds for (name, number), seconds in sorted(took.items())}
    slow = dict(zip(took, slow_ones(took, chosen(took)), strict=True))
    of_each = {name: [node for node in took if function_of(node) == name] for name in map(function_of, took)}
    first = {name: took[nodes[0]] for name, nodes in of_each.items()}
    for name, nodes in of_each.items():
        times = [took[node] for node in nodes]
        ran = [took[node] for node in nodes if not slow[node]]
        assert ran == times[: len(ran)]
        if sum(times) <= EACH:
            assert ran == times
        elif times[0] > ALONE:
            # The quickest of a file that would have nothing left.
            is_last = min(first.values()) > ALONE and next(iter(sorted(first, key=first.__getitem__))) == name
            assert len(ran) == (is_last and times[0] <= LAST)
        else:
            assert len(ran) == 1 or sum(ran) <= EACH
            assert sum(times[: len(ran) + 1]) > EACH


def test_the_quickest_test_of_a_file_is_left_to_it():
    took = {
        "a.py::x": 0.9,
        "a.py::y[0]": 0.7,
        "a.py::y[1]": 0.7,
        "b.py::z": LAST + 0.1,
        "c.py::x": 0.8,
        "c.py::y": 0.01,
    }
    assert chosen(took) == {"a.py::x": 0, "a.py::y": 1, "b.py::z": 0, "c.py::x": 0}


def test_a_front_door_is_kept_whatever_it_takes():
    name = next(iter(KEPT))
    assert slow_ones([f"{name}[0]", f"{name}[1]"], chosen({f"{name}[0]": 30.0, f"{name}[1]": 30.0})) == [False, True]
