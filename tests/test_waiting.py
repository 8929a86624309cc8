"""How tests wait for what another thread, task or process does: for just that which they assert, and for as long as a busy machine needs.

A test that waits for one thing and asserts another fails where the machine takes its time between the two. What is looked for here is the
plain form of that, of deadlines that are too short, and of times that are asserted, of the clock or of the processor.
"""

import ast
import asyncio
import re
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from waiting import until, until_async

HERE = Path(__file__).parent
WAITS = ("until", "until_async")
# Whose first argument, or `timeout`, is seconds; and those whose last one is.
FIRST, LAST = ("wait", "join", "result", "communicate", "settimeout"), ("wait_for", "timeout")
# What gives the same in every thread.
PURE = (
    "len",
    "sorted",
    "set",
    "sum",
    "any",
    "all",
    "list",
    "dict",
    "tuple",
    "str",
    "type",
    "abs",
    "max",
    "min",
    "isinstance",
)
CLOCKS = ("monotonic", "perf_counter", "time", "process_time", "thread_time")
CLOCKS += tuple(f"{name}_ns" for name in CLOCKS)
# Seconds of other waits.
ENOUGH_S = 60
# What has a limit that is tested.
OURS = ("GossipServer",)
# Files that are not looked at, and why.
BY_HAND = {
    "web/test_web_readers.py": "time goes on by hand",
    "gateway/test_virtual_time.py": "time goes on by hand",
    "test_waiting.py": "has what is looked for in its texts",
    "waiting.py": "how it is done",
    "paced_time.py": "a clock itself",
    "mutations.py": "runs tests itself, and ends those that hang",
    "damage.py": "the time of its thread alone, a thousand times what a reader takes: what never ends is told with its case",
}


def found_in(source: str) -> list[tuple[int, str]]:
    """Lines that wait otherwise, with why."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for body in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            if isinstance(body, list):
                found += list(_unawaited(body))
        if isinstance(node, ast.Call):
            found += list(_short(node))
        if isinstance(node, ast.While) and any(_is_clock(one) for one in ast.walk(node.test)):
            found.append((node.lineno, "a loop with a deadline; use until"))
        if _is_so_often(node):
            found.append((node.lineno, "a loop with a deadline; use until"))
        if isinstance(node, ast.Assert) and any(map(_is_elapsed, ast.walk(node.test))):
            found.append((node.lineno, "asserts a time"))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found += list(_kept_times(node))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and _is_clock(node.left):
            found += list(_short_seconds(node.lineno, node.right))
    return sorted(set(found))


def _name(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def _is_clock(node: ast.AST) -> bool:
    """Of the machine; that of a loop may go on by hand."""
    if not isinstance(node, ast.Call) or _name(node) not in CLOCKS:
        return False
    said = ast.unparse(node.func)
    return said == "time.time" if said.endswith("time") and "_" not in said else said.count(".") < 2


def _is_elapsed(node: ast.AST) -> bool:
    """``time.monotonic() - began < 5``, or the like; that it took no less is no matter of how busy a machine is."""
    if not isinstance(node, ast.Compare):
        return False
    sides = [node.left, *node.comparators]
    return any(
        (isinstance(op, ast.Lt | ast.LtE) and _is_since(left))
        or (isinstance(op, ast.Gt | ast.GtE) and _is_since(right))
        for left, op, right in zip(sides, node.ops, sides[1:], strict=False)
    )


def _is_since(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub) and _is_clock(node.left)


def _kept_times(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[int, str]]:
    """As `_is_elapsed`, of a time that has a name: ``took_s = time.monotonic() - began`` and ``assert took_s < 5``."""
    kept = {
        name.id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and _is_since(node.value)
        for name in node.targets
        if isinstance(name, ast.Name)
    }
    for node in ast.walk(function) if kept else ():
        compared = (
            [one for one in ast.walk(node.test) if isinstance(one, ast.Compare)] if isinstance(node, ast.Assert) else []
        )
        for one in compared:
            sides = [one.left, *one.comparators]
            for left, op, right in zip(sides, one.ops, sides[1:], strict=False):
                less, _ = (left, right) if isinstance(op, ast.Lt | ast.LtE) else (right, left)
                if (
                    isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE)
                    and isinstance(less, ast.Name)
                    and less.id in kept
                ):
                    yield node.lineno, "asserts a time"


def _short(call: ast.Call) -> Iterator[tuple[int, str]]:
    """Seconds of a wait that are neither too few to wait for anything nor enough for a busy machine."""
    name, given = _name(call), [keyword.value for keyword in call.keywords if keyword.arg == "timeout"]
    if name in OURS:
        return
    if name in FIRST and isinstance(call.func, ast.Attribute) and len(call.args) == 1:
        given.append(call.args[0])
    if (name in LAST and len(call.args) == (2 if name == "wait_for" else 1)) or (name in WAITS and len(call.args) > 1):
        given.append(call.args[-1])
    for seconds in given:
        yield from _short_seconds(call.lineno, seconds)


def _short_seconds(line: int, seconds: ast.AST) -> Iterator[tuple[int, str]]:
    value = seconds.value if isinstance(seconds, ast.Constant) else None
    if isinstance(value, int | float) and 1 <= value < ENOUGH_S:
        yield line, f"waits {value} s; a busy machine may need {ENOUGH_S}"


def _unawaited(body: list[ast.stmt]) -> Iterator[tuple[int, str]]:
    """An assertion behind ``until(lambda: ...)`` of what was not waited for, and that another thread changes as well."""
    for before, after in pairwise(body):
        waited = _waited(before)
        if waited is None or not isinstance(after, ast.Assert):
            continue
        if any(isinstance(one, ast.Call | ast.Await) and _name_of(one) not in PURE for one in ast.walk(after.test)):
            continue
        known = set(_chains(waited))
        if unknown := [chain for chain in _chains(after.test) if _is_of_a_thing(chain) and not _is_known(chain, known)]:
            yield after.lineno, f"asserts {unknown[0]}, which was not waited for"


def _name_of(node: ast.Call | ast.Await) -> str:
    return _name(node) if isinstance(node, ast.Call) else ""


def _waited(statement: ast.stmt) -> ast.AST | None:
    """What a statement waits for."""
    if isinstance(statement, ast.While) and len(statement.body) == 1 and _sleeps(statement.body[0]):
        return statement.test
    if not isinstance(statement, ast.Expr):
        return None
    call = statement.value.value if isinstance(statement.value, ast.Await) else statement.value
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in WAITS:
        return call.args[0]
    return None


def _sleeps(statement: ast.stmt) -> bool:
    return any(isinstance(one, ast.Call) and _name(one) == "sleep" for one in ast.walk(statement))


def _waits_a_moment(statement: ast.stmt) -> bool:
    """``event.wait(0.01)``, where nobody looks what came of it."""
    call = statement.value if isinstance(statement, ast.Expr) else None
    return (
        isinstance(call, ast.Call) and _name(call) == "wait" and any(isinstance(one, ast.Constant) for one in call.args)
    )


def _is_so_often(node: ast.AST) -> bool:
    """So many looks with a sleep between, which is a deadline too."""
    if not isinstance(node, ast.For) or not isinstance(node.iter, ast.Call) or _name(node.iter) != "range":
        return False
    ends = ast.Break | ast.Return if ast.unparse(node.target) == "_" else ast.Break
    return any(_sleeps(one) or _waits_a_moment(one) for one in node.body) and any(
        isinstance(one, ends) for one in ast.walk(node)
    )


def _chains(node: ast.AST) -> list[str]:
    """``a.b.c`` for each such chain of attributes."""
    if isinstance(node, ast.Attribute):
        inner = node.value
        while isinstance(inner, ast.Attribute):
            inner = inner.value
        return [ast.unparse(node)] if isinstance(inner, ast.Name) else _chains(inner)
    return [chain for child in ast.iter_child_nodes(node) for chain in _chains(child)]


def _is_of_a_thing(chain: str) -> bool:
    """Not of a class or a module, which do not change."""
    return not re.fullmatch(r"[A-Z].*|(asyncio|socket|signal|threading)\..*", chain)


def _is_known(chain: str, known: set[str]) -> bool:
    return any(chain == one or one.startswith(chain + ".") or chain.startswith(one + ".") for one in known)


def test_tests_wait_for_what_they_assert():
    # The others have nothing of the kind, and need not be parsed.
    waits = r"\buntil(_async)?\(|\bsleep\(|wait_for\(|\.(wait|join|result|communicate|timeout)\([\d.]|timeout=[\d.]"
    looks = re.compile(waits + r"|monotonic|perf_counter|\btime\.time|(process|thread)_time|settimeout\(")
    found = []
    for path in sorted(HERE.rglob("*.py")):
        name, source = str(path.relative_to(HERE)), path.read_text(encoding="utf-8")
        if name not in BY_HAND and looks.search(source):
            found += [f"{name}:{line}: {why}" for line, why in found_in(source)]
    assert found == []


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("until(lambda: channel.is_closed)\nassert 'late' in ends.closed[0]", "asserts ends.closed"),
        ("until(lambda: len(a.aborted) == 1)\nassert a.held.num_bytes == 0", "asserts a.held.num_bytes"),
        ("async def f():\n    await until_async(lambda: a.b)\n    assert a.c", "asserts a.c"),
        ("if x:\n    until(lambda: a.b)\n    assert not a.c", "asserts a.c"),
        ("assert time.monotonic() - began < 5", "asserts a time"),
        ("assert 3 > time.perf_counter() - began", "asserts a time"),
        ("assert time.process_time() - began < 5", "asserts a time"),
        ("def f():\n    took_s = time.monotonic() - began\n    assert 0.1 < took_s < 5", "asserts a time"),
        ("until_s = time.monotonic() + 20", "waits 20 s"),
        ("call(sock, time.monotonic() + 5)", "waits 5 s"),
        ("link.settimeout(5)", "waits 5 s"),
        ("for _ in range(100):\n    sleep(0.1)\n    if done:\n        return", "a loop with a deadline"),
        ("while not done and time.monotonic() < end:\n    pass", "a loop with a deadline"),
        ("while not a.b:\n    time.sleep(0.1)\nassert a.c", "asserts a.c"),
        ("for _ in range(200):\n    if done:\n        break\n    time.sleep(0.01)", "a loop with a deadline"),
        ("for _ in range(1000):\n    if done:\n        break\n    ended.wait(0.01)", "a loop with a deadline"),
        ("thread.join(5)", "waits 5 s"),
        ("process.communicate(timeout=20)", "waits 20 s"),
        ("asyncio.wait_for(task, 1.5)", "waits 1.5 s"),
        ("until(lambda: a.b, 30)", "waits 30 s"),
    ],
)
def test_what_is_found(source, why):
    [(_, said)] = found_in(source)
    assert said.startswith(why)


@pytest.mark.parametrize(
    "source",
    [
        "until(lambda: a.b and a.c)\nassert a.c.d == 5",
        "until(lambda: len(a.b) == 2)\nassert a.b == [1, 2]",
        "until(lambda: a.b)\nassert ask(a.c) == 200",
        "until(lambda: a.b)\nassert found == []",
        "assert time.monotonic() - began >= 0.2",
        "def f():\n    took_s = time.monotonic() - began\n    assert took_s > 0.1",
        "end = time.monotonic() + 120",
        "late = time.monotonic() + 0.01",
        "link.settimeout(0.5)",
        "thread.join(0.05)",
        "thread.join(60)",
        "', '.join('ab')",
        "thread.join(BOUND_S)",
    ],
)
def test_what_is_not(source):
    assert found_in(source) == []


def test_until_gives_what_came_true_and_fails_where_nothing_does():
    values = iter([0, "", None, [3], 5])
    assert until(lambda: next(values)) == [3]
    with pytest.raises(AssertionError, match="did not come true"):
        until(lambda: False, 0.01)


def test_until_async_lets_the_loop_go_on():
    async def main():
        seen = []

        async def look():
            return list(seen)

        asyncio.get_running_loop().call_later(0.01, seen.append, 7)
        assert await until_async(lambda: seen) == [7]
        assert await until_async(look) == [7]
        began = time.monotonic()
        with pytest.raises(AssertionError, match="did not come true"):
            await until_async(lambda: False, 0.05)
        assert time.monotonic() - began >= 0.05

    asyncio.run(main())
