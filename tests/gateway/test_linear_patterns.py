"""No pattern that sees text of users or models takes time quadratic in it: all of a package's are found by introspection, and tried.

They are tried in a process of its own, whose processor time for one search is bounded: at `CHARACTERS` what is quadratic needs seconds.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("aiohttp")

PROBE = r"""
import importlib, inspect, pkgutil, re, signal, sys

CHARACTERS, MOST_S = 60_000, 1.0
RUNS = (" ", "\n", "\t", '"', "'", "a", "A", "1", "(", "[", "{", "<", "-", "*", "#", ".", ",", "a ", "1 ", "a.", "1-", "\\", "/", "=")

def patterns(value, depth=0):
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, dict | list | tuple | set | frozenset) and depth < 3:
        for one in value.values() if isinstance(value, dict) else value:
            yield from patterns(one, depth + 1)

found = {}
for package in sys.argv[1:]:
    root = importlib.import_module(package)
    for info in pkgutil.walk_packages(root.__path__, package + "."):
        # The others read what whoever runs the gateway wrote.
        if info.name.endswith("__main__") or info.name.startswith(("anabranch.gateway.config", "anabranch.routers.data")):
            continue
        try:
            module = importlib.import_module(info.name)
        except ImportError:
            # It needs an extra that is not here.
            continue
        for name, value in vars(module).items():
            for pattern in patterns(value):
                source = inspect.getsource(module)
                used = set(re.findall(rf"\b{name}\.(match|fullmatch)\b", source))
                is_sought = not used or re.search(rf"\b{name}\.(search|find|sub|split)", source)
                tried = {"findall", *used} if is_sought else used
                found.setdefault(pattern, (f"{info.name}.{name}", tried))

def late(*_):
    raise TimeoutError

def tries(pattern):
    is_bytes = isinstance(pattern.pattern, bytes)
    source = pattern.pattern.decode() if is_bytes else pattern.pattern
    # What a run may follow: nothing, or words that the pattern itself begins with.
    for word in dict.fromkeys(["", *re.findall(r"[A-Za-z#]{3,}", source)[:3]]):
        for run in RUNS:
            text = word + run * (CHARACTERS // len(run)) + "\x00"
            yield (word, run), text.encode() if is_bytes else text

signal.signal(signal.SIGVTALRM, late)
for pattern, (name, tried) in found.items():
    try:
        for how, text in tries(pattern):
            for method in tried:
                signal.setitimer(signal.ITIMER_VIRTUAL, MOST_S)
                getattr(pattern, method)(text)
    except TimeoutError:
        print("SLOW", name, repr(how), method, flush=True)
signal.setitimer(signal.ITIMER_VIRTUAL, 0)
print("TRIED", len(found))
"""


@pytest.mark.slow
def test_every_pattern_is_linear():
    packages = ["anabranch.gateway", "anabranch.web", "anabranch.routers"]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *packages], capture_output=True, text=True, timeout=200, env={**os.environ}
    )
    said, _, tried = done.stdout.strip().rpartition(" ")
    assert said == "TRIED", done.stdout + done.stderr
    assert int(tried) > 50
