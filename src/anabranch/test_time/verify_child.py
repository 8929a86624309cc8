"""What runs inside: code, and what is asked of it. It is given to a Python of its own as a file, and imports nothing of ours.

One JSON line comes in; JSON lines go out. ``mode`` says what is done with ``code``:

    examples   runs ``sources`` behind it, one after another, and tells what each printed or raised: what they should say is not here
    serve      answers calls of its function ``name``, which come from a process with the tests: values go between them as literals
    check      is that process: it runs tests, and its candidate asks the other one
    run        runs ``tests`` behind it, in the same process
"""

import ast
import builtins
import contextlib
import io
import json
import os
import socket
import sys
import traceback
from typing import Any

# Characters that the examples may print in all, and bytes of a value.
MOST_PRINTED, MOST_VALUE = 200_000, 1 << 20

# What is called here is not what code may have put in its place.
_compile, _exec, _write, _dumps, _loads = compile, exec, os.write, json.dumps, json.loads
_BUILTINS = dict(builtins.__dict__)


def main() -> None:
    """See the module."""
    asked = json.loads(sys.stdin.buffer.readline())
    more, out = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    _limit(asked["limits"])
    # From here on an end without a word is the code's.
    _tell(out, {"started": True})
    code, told = asked["code"], dict[str, Any]()
    scope: dict[str, Any] = {"__name__": "__main__", "__builtins__": dict(_BUILTINS)}
    try:
        if asked["mode"] == "serve":
            _serve(socket.socket(fileno=asked["peer"]), code, asked["name"], scope)
            os._exit(0)
        if asked["mode"] == "check":
            _check(socket.socket(fileno=asked["peer"]), code, asked["tests"], asked["name"], scope)
            told = {"passed": True}
        else:
            _exec(_compile(code, "answer", "exec"), scope)
            if asked["mode"] == "examples":
                told = {"outputs": _outputs(asked["sources"], scope)}
            else:
                _tell(out, {"ready": True})
                asked = _loads(_read(more))
                # The tests see the names of the code, and builtins that it has not touched.
                _exec(_compile(asked["tests"], "tests", "exec"), {**scope, "__builtins__": _BUILTINS})
                told = {"passed": asked["word"]}
    except BaseException as error:
        # A name of an error, and no more: its text is the code's.
        told = {"error": type(error).__name__[:60]}
    _tell(out, told)
    os._exit(0)


def _tell(out: int, told: dict[str, Any]) -> None:
    text = _dumps(told).encode() + b"\n"
    while text:
        text = text[_write(out, text) :]


def _read(handle: int) -> bytes:
    text = b""
    while not text.endswith(b"\n"):
        piece = os.read(handle, 1 << 16)
        if not piece:
            raise EOFError
        text += piece
    return text


def _limit(limits: dict[str, Any]) -> None:
    import resource

    for name, wanted in limits.items():
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        with contextlib.suppress(ValueError, OSError):
            hard = resource.getrlimit(kind)[1]
            wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(kind, (wanted, wanted))
    sys.setrecursionlimit(1000)


def _outputs(sources: list[str], scope: dict[str, Any]) -> list[Any]:
    """Of each: what it printed, and the last line of what it raised or None. As in `doctest`, names are kept from one to the next."""
    found, left = [], MOST_PRINTED
    for source in sources:
        printed, raised = io.StringIO(), None
        with contextlib.redirect_stdout(printed):
            sys.displayhook = sys.__displayhook__
            try:
                _exec(_compile(source, "example", "single"), scope)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                raised = traceback.format_exception_only(type(error), error)[-1][:left]
        text = printed.getvalue()
        left -= len(text) + len(raised or "")
        if left < 0:
            raise MemoryError
        found.append([text, raised])
    return found


# Two processes, one of which has the code and the other the tests


def _serve(peer: socket.socket, code: str, name: str, scope: dict[str, Any]) -> None:
    """Run the code, and answer calls until there are no more."""
    lines, told, candidate = peer.makefile("rwb"), dict[str, Any](), None
    try:
        _exec(_compile(code, "answer", "exec"), scope)
        candidate = scope[name]
        told = {"ready": True}
    except BaseException as error:
        told = {"error": type(error).__name__[:60]}
    while True:
        lines.write(_dumps(told).encode() + b"\n")
        lines.flush()
        line = lines.readline()
        if not line:
            return
        try:
            args, named = ast.literal_eval(json.loads(line)["call"])
            # None where the code has failed: then it fails once more.
            told = {"value": literal(candidate(*args, **named))}  # type: ignore[misc]
        except BaseException as error:
            told = {"error": type(error).__name__[:60]}


def _check(peer: socket.socket, prompt: str, tests: str, name: str, scope: dict[str, Any]) -> None:
    """Run the tests of a candidate that is elsewhere. Raises what they raise."""
    lines = peer.makefile("rwb")

    def said() -> dict[str, Any]:
        line = lines.readline(MOST_VALUE)
        if not line.endswith(b"\n"):
            raise EOFError
        told = json.loads(line)
        if "error" in told:
            # As it was raised there, as far as Python has it: a test may want an error.
            kind: Any = _BUILTINS.get(told["error"])
            is_error = isinstance(kind, type) and issubclass(kind, Exception)
            raise kind() if is_error else _named(told["error"])
        return told

    def candidate(*args: Any, **named: Any) -> Any:
        lines.write(_dumps({"call": literal((args, named))}).encode() + b"\n")
        lines.flush()
        return ast.literal_eval(said()["value"])

    said()
    # Helpers and imports of the prompt are for tests too.
    _exec(_compile(prompt, "prompt", "exec"), scope)
    scope[name] = candidate
    _exec(_compile(tests, "tests", "exec"), scope)


def _named(name: object) -> BaseException:
    name = name if isinstance(name, str) and name.isidentifier() else "Exception"
    return type(name, (Exception,), {})()


def literal(value: object) -> str:
    """A value as Python writes it, for `ast.literal_eval`. Raises TypeError for what has no such form, among it NaN."""
    if value is None or isinstance(value, bool):
        return repr(bool(value)) if value is not None else "None"
    if isinstance(value, int):
        # Of long ones Python writes no decimals.
        return int.__repr__(value) if value.bit_length() < 10_000 else int.__format__(value, "#x")
    if isinstance(value, float):
        if value != value:
            raise TypeError("NaN")
        return float.__repr__(value) if abs(value) != float("inf") else "1e999" if value > 0 else "-1e999"
    if isinstance(value, complex):
        return complex.__repr__(value)
    if isinstance(value, str):
        return str.__repr__(value)
    if isinstance(value, bytes):
        return bytes.__repr__(value)
    if isinstance(value, tuple):
        return "(" + "".join(literal(one) + "," for one in value) + ")"
    if isinstance(value, list):
        return "[" + ",".join(map(literal, value)) + "]"
    if isinstance(value, set | frozenset):
        return "{" + ",".join(map(literal, value)) + "}" if value else "set()"
    if isinstance(value, dict):
        return "{" + ",".join(f"{literal(key)}:{literal(item)}" for key, item in value.items()) + "}"
    raise TypeError(type(value).__name__)


if __name__ == "__main__":
    main()
