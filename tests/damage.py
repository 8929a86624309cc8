"""Damage for readers: bytes and fields of a valid file changed at random, and what a reader may answer to that.

A reader either reads or raises an `AnabranchError`, within `SECONDS` of its thread and without taking `ROOM` more memory.
"""

import copy
import json
import random
import resource
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from anabranch.errors import AnabranchError

SECONDS = 10.0
ROOM = 6 << 30  # bytes of address space; threads and mapped files take more of it than they use
HUGE = [2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 10**30, 10**400]
VALUES: list[Any] = [None, True, False, 0, -1, 1, 3, 7, *HUGE, -(2**63), 0.5, -0.0, 1e-46, 1e30, 1e308]
VALUES += [
    float("nan"),
    float("inf"),
    "",
    "x",
    "\0",
    "../x",
    "/etc/passwd",
    "\ud800",
    "é" * 3,
    "9" * 5000,
    "nan",
    "1e400",
]
VALUES += [
    [],
    {},
    [[]],
    [None],
    [[[[1]]]],
    {"": {}},
    {"a": [1, {"b": None}]},
    ["x"] * 300,
    [-1],
    [2**70],
    [float("nan")],
]
WORDS = [struct.pack("<Q", value) for value in (0, 1, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1)]
WORDS += [struct.pack("<I", value) for value in (0, 1, 8, 9, 255, 2**31, 2**32 - 1)] + [
    b"\xff",
    b"\0",
    b"\xc3\x28",
    b"{",
    b'"',
]


def damaged(data: bytes, random: random.Random) -> bytes:
    """``data`` with one to four changes: bytes written over, cut out, put in or doubled, or an end that is missing."""
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        at = random.randrange(len(data) + 1) if random.random() < 0.5 else random.randrange(min(len(data), 400) + 1)
        piece = random.choice(WORDS) if random.random() < 0.8 else random.randbytes(random.randrange(1, 9))
        kind = random.randrange(10)
        if kind < 6:
            data = data[:at] + piece + data[at + len(piece) :]
        elif kind == 6:
            data = data[:at] + data[at + random.choice([1, 2, 4, 8, 100]) :]
        elif kind == 7:
            data = data[:at] + piece + data[at:]
        elif kind == 8:
            data = data[:at] + data[max(at - 64, 0) :]
        else:
            data = data[:at]
    return data


def altered(value: Any, random: random.Random) -> Any:
    """A JSON ``value`` with one to three of its fields set to what no one expects, left out, doubled or renamed."""
    value = copy.deepcopy(value)
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        places = list(_places(value))
        if not places:
            return value
        holder, key = random.choice(places)
        kind = random.randrange(10)
        if kind < 7:
            holder[key] = copy.deepcopy(random.choice(VALUES))
        elif kind == 7:
            del holder[key]
        elif isinstance(holder, dict):
            holder[random.choice(["kind", "", "x" * 50, "é", f"{key}2"])] = holder[key]
        else:
            holder.extend(copy.deepcopy(holder[:50]))
    return value


def as_json(value: Any, random: random.Random) -> bytes:
    """``value`` as text of JSON, now and then damaged, oddly encoded or nested without end."""
    text = json.dumps(value, default=str).encode()
    kind = random.randrange(30)
    if kind == 0:
        return text.decode().encode(random.choice(["utf-16", "utf-32", "utf-8-sig"]))
    if kind == 1:
        return text[:-1] + b',"x":' + b"[" * 100_000
    return damaged(text, random) if kind < 6 else text


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below ``value``; of long lists the first fifty."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value[:50]) if isinstance(value, list) else ()
    for key, item in pairs:
        yield value, key
        yield from _places(item)


@contextmanager
def little_room() -> Iterator[None]:
    """At most `ROOM` more memory than now: what asks for more gets a MemoryError."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def refuse_or_read(read: Callable[[], Any], what: str) -> bool:
    """Whether ``read`` read; anything but that or an `AnabranchError` in one line, in time, fails the test. ``what`` names the case."""
    started, refusal = time.thread_time(), None
    try:
        read()
    except AnabranchError as error:
        refusal = str(error)
    except BaseException as error:
        error.add_note(f"case: {what}")
        raise
    seconds = time.thread_time() - started
    assert seconds < SECONDS, f"{what} took {seconds:.1f} s"
    assert refusal is None or 0 < len(refusal) < 20_000, what
    return refusal is None


def each(number: int) -> Iterator[random.Random]:
    """``number`` sources of random numbers, seeded 0, 1, 2, ..."""
    for seed in range(number):
        source = random.Random(seed)
        source.name = f"seed {seed}"  # type: ignore[attr-defined]
        yield source
