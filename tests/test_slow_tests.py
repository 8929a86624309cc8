import ast
from functools import cache
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from anabranch import __file__ as package
from slow_tests import ALONE, EACH, KEPT, chosen, function_of, read, slow_ones

ROOT = Path(package).parents[2]

SECONDS = st.dictionaries(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), st.floats(0, 3))


@cache
def _body(file: Path) -> list[ast.stmt]:
    return ast.parse(file.read_text()).body if file.is_file() else []


def test_every_test_of_the_list_is_there():
    """One that was renamed would run in ``make test`` again; who renames it renames it in the list."""
    gone = []
    for function in [*read(), *KEPT]:
        path, *names = function.split("::")
        file = ROOT / path
        body = _body(file)
        for name in names:
            body = next((node.body for node in body if getattr(node, "name", None) == name), None) or []
        if not body and names[-1] != "runTest":
            gone.append(function)
    assert gone == []


@given(SECONDS)
def test_what_runs_is_short_and_nothing_short_is_left_out(took):
    took = {f"{name}[{number}]": seconds for (name, number), seconds in sorted(took.items())}
    slow = dict(zip(took, slow_ones(took, chosen(took)), strict=True))
    for name in {function_of(node) for node in took}:
        times = [seconds for node, seconds in took.items() if function_of(node) == name]
        ran = [seconds for node, seconds in took.items() if function_of(node) == name and not slow[node]]
        assert ran == times[: len(ran)]
        if sum(times) <= EACH:
            assert ran == times
        elif times[0] > ALONE:
            assert ran == []
        else:
            assert len(ran) == 1 or sum(ran) <= EACH
            assert sum(times[: len(ran) + 1]) > EACH


def test_a_front_door_is_kept_whatever_it_takes():
    name = next(iter(KEPT))
    assert slow_ones([f"{name}[0]", f"{name}[1]"], chosen({f"{name}[0]": 30.0, f"{name}[1]": 30.0})) == [False, True]
